"""A model with its policy as tasks use it: batches of prompts answered, continuations scored."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from freqkv_jax.decode import Decoder, eos_ids, prefill
from freqkv_jax.evals.task import Answer, Prompt
from freqkv_jax.model.llama import Llama
from freqkv_jax.sampling import sampling
from freqkv_jax.score import score_greedy
from freqkv_jax.sharding import check_mesh, mesh_of
from freqkv_jax.tokenizer import Tokenizer

BLOCK_STEPS = 64  # tokens between two looks at which answers have ended
T = TypeVar("T")


class ModelEngine:
    """The `Engine` of task.py. Batches of other sizes than `rows` are cut, and filled up with
    repeated rows, so that nothing is compiled for them."""

    def __init__(
        self,
        model: Llama,
        params: Mapping[str, Any],
        load_tokenizer: Callable[[], Tokenizer] | None = None,
        rows: int = 1,
    ) -> None:
        """
        Args:
          load_tokenizer: called once, when a task first asks for the tokenizer.
          rows: texts that run together.
        """
        if rows < 1:
            raise ValueError(f"--batch-size must be at least 1, got {rows}")
        mesh = mesh_of(params)
        if mesh is not None:  # said before the work begins, not for each item
            check_mesh(model.config, mesh, rows)
        self.model, self.params, self.rows = model, params, rows
        self._load_tokenizer = load_tokenizer
        self._tokenizer: Tokenizer | None = None

    @property
    def tokenizer(self) -> Tokenizer:
        """Loaded when it is first asked for; ValueError where the model has none."""
        if self._load_tokenizer is None:
            raise ValueError("this task needs a tokenizer, and the model has none")
        if self._tokenizer is None:
            self._tokenizer = self._load_tokenizer()
        return self._tokenizer

    def generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        """Greedy answers, in order."""
        answers: list[Answer] = []
        for batch in self._batches(prompts):
            answers.extend(self._generate(batch))
        return answers[: len(prompts)]

    def log_probs(
        self, contexts: Sequence[Sequence[int]], continuations: Sequence[Sequence[int]]
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """Of each token of each continuation: log p, and whether it is the most likely one."""
        out: list[tuple[np.ndarray, np.ndarray]] = []
        for batch in self._batches(list(zip(contexts, continuations, strict=True))):
            if any(not len(context) for context, _ in batch):
                raise ValueError("a continuation is scored behind one token of context at least")
            texts = [np.concatenate([np.asarray(x, np.int64) for x in pair]) for pair in batch]
            ids, lengths = padded(texts)
            logp, best = score_greedy(self.model, self.params, ids, lengths)
            for row, (context, _) in enumerate(batch):
                place = slice(len(context) - 1, int(lengths[row]) - 1)
                out.append((logp[row, place].astype(np.float64), best[row, place]))
        return out[: len(contexts)]

    def _batches(self, items: Sequence[T]) -> Iterator[list[T]]:
        for first in range(0, len(items), self.rows):
            batch = list(items[first : first + self.rows])
            yield batch + [batch[-1]] * (self.rows - len(batch))

    def _generate(self, prompts: Sequence[Prompt]) -> list[Answer]:
        ids, lengths = padded([np.asarray(prompt.tokens, np.int64) for prompt in prompts])
        eos = eos_ids(self.model, self.tokenizer.eos_ids)
        rule, draw = sampling(0.0, None, None, None, len(prompts))
        decoder = Decoder(self.model, self.params, rule, draw, eos, len(prompts))
        logits, state = prefill(self.model, self.params, ids, lengths)
        most = max(prompt.max_new_tokens for prompt in prompts)
        if self.model.kv.capacity is None:  # room for all at once: the arrays grow only once
            state = decoder.run.with_slots(state, int(lengths.max()) + most)
        writers = [_Writer(prompt, self.tokenizer) for prompt in prompts]
        least = np.array([prompt.min_new_tokens for prompt in prompts])
        done = 0
        while done < most and not all(writer.ended for writer in writers):
            early = done < least
            if early.any() and eos is not None:
                logits = _without(logits, eos, early, self.model.config.vocab_size)
            steps = 1 if early.any() else min(most - done, BLOCK_STEPS)
            tokens, logits, state = decoder.steps(state, logits, steps)
            done += steps
            for writer, row in zip(writers, tokens, strict=True):
                writer.take(row.tolist(), eos)
        return [writer.answer() for writer in writers]


class _Writer:
    """An answer as it grows."""

    def __init__(self, prompt: Prompt, tokenizer: Tokenizer) -> None:
        self.prompt, self.tokenizer = prompt, tokenizer
        self.ids: list[int] = []
        self.finished = False
        self.cut: str | None = None  # the text before a stop, once there is one

    @property
    def ended(self) -> bool:
        return self.finished or len(self.ids) >= self.prompt.max_new_tokens

    def take(self, ids: Sequence[int], eos: np.ndarray | None) -> None:
        """Appends what belongs to the answer, up to an end token or a stop."""
        if self.ended:
            return
        before = len(self.ids)
        for token in ids[: self.prompt.max_new_tokens - before]:
            if eos is not None and token in eos and len(self.ids) >= self.prompt.min_new_tokens:
                self.finished = True
                break
            self.ids.append(int(token))
        if self.prompt.stop and self._stop_place(len(self.ids)) is not None:
            # The first number of tokens that hold a stop: the answer must not depend on how many
            # tokens were made at a time.
            low, high = before, len(self.ids)
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (
                    (low, middle) if self._stop_place(middle) is not None else (middle, high)
                )
            place = self._stop_place(high)
            self.ids, self.finished = self.ids[:high], True
            self.cut = self._text(high)[:place]

    def _text(self, count: int) -> str:
        return self.tokenizer.decode(self.ids[:count], skip_special_tokens=True)

    def _stop_place(self, count: int) -> int | None:
        """Where the first stop stands in the text of the first `count` tokens."""
        if count <= self.prompt.min_new_tokens:
            return None
        early = len(self._text(self.prompt.min_new_tokens)) if self.prompt.min_new_tokens else 0
        text = self._text(count)
        places = [text.find(stop, early) for stop in self.prompt.stop]
        return min((place for place in places if place >= 0), default=None)

    def answer(self) -> Answer:
        text = self._text(len(self.ids)) if self.cut is None else self.cut
        return Answer(text, len(self.ids), self.finished)


def padded(texts: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids as one array [B, T] with zeros behind each, and their lengths [B]."""
    lengths = np.array([len(text) for text in texts], np.int64)
    out = np.zeros((len(texts), int(lengths.max(initial=0))), np.int64)
    for row, text in zip(out, texts, strict=True):
        row[: len(text)] = text
    return out, lengths


def _without(logits: Any, eos: np.ndarray, rows: np.ndarray, vocab_size: int) -> Any:
    """The logits with end tokens ruled out in some rows."""
    ends = np.zeros(vocab_size, bool)
    ends[eos] = True
    return _rule_out(logits, ends[None] & rows[:, None])


@jax.jit
def _rule_out(logits: Any, mask: Any) -> Any:
    return jnp.where(mask, -jnp.inf, logits)
