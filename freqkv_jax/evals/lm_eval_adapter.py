"""A model with its policy as an `lm_eval` language model, without torch (extra `eval`).

    lm = FreqKVLM(ModelEngine(model, params, lambda: fk.load_tokenizer("MODEL"), rows=8))
    lm_eval.simple_evaluate(model=lm, tasks=["hellaswag"])

`freqkv eval lm-eval` does the same with a ledger to go on from (lm_eval_task.py). It goes by what
lm-eval's own `hf` model does, but for this: a text of any length is read as it is unless
`max_length` is given, and then a context loses its middle, not its beginning; a begin token never
stands twice; answers are greedy.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from freqkv_jax.evals.chat_wrap import begins_texts
from freqkv_jax.evals.drive import batches
from freqkv_jax.evals.progress import progress
from freqkv_jax.evals.task import Engine, Item, Prompt, Record

try:
    from lm_eval.api.model import LM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
except ImportError as error:  # another package that lm_eval wants may be the one that is missing
    raise ImportError(
        f"lm-eval cannot be imported ({error}); install it: pip install 'freqkv-jax[eval]'"
    ) from error

KINDS = ("loglikelihood", "loglikelihood_rolling", "generate_until")
DEFAULT_NEW_TOKENS = 256  # as lm-eval's own models
# Names of the most tokens of an answer, the first that is given counts.
_LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
# Without sampling these change nothing.
_IDLE = {"until", "do_sample", "temperature", "top_p", "top_k", "min_p", *_LENGTHS}


@dataclass(frozen=True, kw_only=True)
class Scored(Item):
    """Continuations to be scored, each behind its context; the item's value is their sum."""

    pairs: tuple[tuple[tuple[int, ...], tuple[int, ...]], ...]


class FreqKVLM(LM):
    """`lm_eval.api.model.LM` on an `Engine`."""

    def __init__(
        self, engine: Engine, max_length: int | None = None, batch_size: int | None = None
    ) -> None:
        """
        Args:
          engine: with a tokenizer.
          max_length: most tokens of a prompt, or of context and continuation together: what is
            longer loses the middle of its context; texts for rolling log-likelihood are read in
            windows of so many. None: everything is read whole.
          batch_size: requests run together (default: the engine's rows).
        """
        super().__init__()
        if max_length is not None and max_length < 2:
            raise ValueError(f"--max-length must be at least 2, got {max_length}")
        self.engine, self.max_length = engine, max_length
        self.batch_size = batch_size or getattr(engine, "rows", 1)
        self._begins = begins_texts(engine.tokenizer)

    # What lm-eval asks of a model.

    def loglikelihood(self, requests: Sequence[Any], **_: Any) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether it is the greedy one) of each request."""
        return self._respond("loglikelihood", requests)

    def loglikelihood_rolling(self, requests: Sequence[Any], **_: Any) -> list[float]:
        """log p(text | begin token) of each request."""
        return self._respond("loglikelihood_rolling", requests)

    def generate_until(self, requests: Sequence[Any], **_: Any) -> list[str]:
        """A greedy answer to each request, up to a text of its `until`."""
        return self._respond("generate_until", requests)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """A conversation as text. Without `add_generation_prompt` it ends with the last message,
        open to be continued."""
        text = self.engine.tokenizer.render_chat(chat_history, add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"]
        last = last if last in text else last.strip()  # a template may trim
        return text[: text.rindex(last) + len(last)]

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's source, "" where there is none."""
        return (self.engine.tokenizer.chat_template or "") if chat_template else None

    @property
    def tokenizer_name(self) -> str:
        """Tells tokenizers and templates apart in lm-eval's cache of requests."""
        tokenizer = self.engine.tokenizer
        source = tokenizer.backend.to_str() + (tokenizer.chat_template or "")
        return "freqkv-" + hashlib.sha256(source.encode()).hexdigest()[:16]

    @property
    def eot_token_id(self) -> int | None:
        """The first end token."""
        return next(iter(self.engine.tokenizer.eos_ids), None)

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it: the begin token, else the end
        token, else token 0."""
        begin = self.engine.tokenizer.bos_id
        return begin if begin is not None else self.eot_token_id or 0

    def tok_encode(self, string: str, add_special_tokens: bool | None = None) -> list[int]:
        """Token ids; with a begin token if the tokenizer puts one, and the text has none."""
        ids = self.engine.tokenizer.encode(string)
        begin = self.engine.tokenizer.bos_id
        wanted = self._begins if add_special_tokens is None else add_special_tokens
        if not wanted or begin is None or ids[:1] == [begin]:
            return ids
        return [begin, *ids]

    # How it is done: requests become items, and items records.

    def plan(self, kind: str, arguments: Sequence[Any], key: str) -> Scored | Prompt:
        """What a request (its kind of KINDS and its arguments) asks of the engine.

        Raises:
          ValueError: it cannot be done (sampling, no room for the continuation, ...).
        """
        if kind == "loglikelihood":
            return self._scored(kind, key, [self._pair(*arguments)])
        if kind == "loglikelihood_rolling":
            return self._scored(kind, key, self._windows(arguments[0]))
        if kind != "generate_until":
            raise ValueError(f"{kind} requests cannot be answered; allowed: {', '.join(KINDS)}")
        text, settings = arguments
        stop, most = greedy_settings(settings)
        ids = cut_middle(self.tok_encode(text) or [self.prefix_token_id], self.max_length)
        return Prompt(
            key=key,
            length=len(ids),
            group=kind,
            tokens=tuple(ids),
            max_new_tokens=most,
            stop=stop,
        )

    def measure(self, items: Sequence[Item]) -> list[Record]:
        """Of items of one kind: log_prob and greedy, or answer, num_new_tokens and finished."""
        scored = [item for item in items if isinstance(item, Scored)]
        if not scored:
            prompts = [item for item in items if isinstance(item, Prompt)]
            return [
                {"answer": a.text, "num_new_tokens": a.num_tokens, "finished": a.finished}
                for a in self.engine.generate(prompts)
            ]
        pairs = [pair for item in scored for pair in item.pairs]
        found = iter(self.engine.log_probs([a for a, _ in pairs], [b for _, b in pairs]))
        records: list[Record] = []
        for item in scored:
            parts = [next(found) for _ in item.pairs]
            records.append(
                {
                    "log_prob": float(sum(logp.sum() for logp, _ in parts)),
                    "greedy": all(bool(best.all()) for _, best in parts),
                }
            )
        return records

    def _respond(self, kind: str, requests: Sequence[Any]) -> list[Any]:
        items = [self.plan(kind, r.args, str(i)) for i, r in enumerate(requests)]
        answers: dict[str, Any] = {}
        with progress(kind, len(items)) as update:
            for batch in batches(items, self.batch_size):
                for item, record in zip(batch, self.measure(batch), strict=True):
                    answers[item.key] = response(kind, record)
                    request = requests[int(item.key)]
                    self.cache_hook.add_partial(kind, request.args, answers[item.key])
                update(len(answers))
        return [answers[item.key] for item in items]

    def _pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        if context:
            # Blanks belong to the word behind them, as most tokenizers see it.
            head = context.rstrip()
            before = self.tok_encode(head)
            after = self.tok_encode(head + context[len(head) :] + continuation)[len(before) :]
        else:
            before, after = [], self.tok_encode(continuation, add_special_tokens=False)
        if not before:
            if after[:1] == [self.prefix_token_id]:
                before, after = after[:1], after[1:]
            else:
                before = [self.prefix_token_id]
        if not after:
            raise ValueError(f"the continuation {continuation!r} has no token of its own to score")
        room = None if self.max_length is None else self.max_length - len(after)
        if room is not None and room < 1:
            raise ValueError(
                f"a continuation of {len(after)} tokens leaves no room for a context within"
                f" --max-length {self.max_length}"
            )
        return cut_middle(before, room), after

    def _windows(self, text: str) -> list[tuple[list[int], list[int]]]:
        ids = self.tok_encode(text, add_special_tokens=False)
        if self.max_length is None or len(ids) < self.max_length:
            return [([self.prefix_token_id], ids)] if ids else []
        windows = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length, 1)
        return [make_disjoint_window(window) for window in windows]

    def _scored(self, kind: str, key: str, pairs: Sequence[tuple[Any, Any]]) -> Scored:
        fixed = tuple((tuple(a), tuple(b)) for a, b in pairs)
        # Windows are texts of their own: the longest tells how full the cache becomes.
        length = max((len(a) + len(b) for a, b in fixed), default=1)
        return Scored(key=key, length=length, group=kind, pairs=fixed)


def response(kind: str, record: Record | None) -> Any:
    """A record as lm-eval wants it; None, a failed request, is a wrong answer."""
    if kind == "generate_until":
        return record["answer"] if record else ""
    log_prob = record["log_prob"] if record else float("-inf")
    if kind == "loglikelihood_rolling":
        return log_prob
    return log_prob, bool(record and record["greedy"])


def cut_middle(ids: Sequence[int], room: int | None) -> list[int]:
    """The ids without their middle if there are more than `room`."""
    if room is None or len(ids) <= room:
        return list(ids)
    head = room - room // 2
    return [*ids[:head], *ids[len(ids) - room // 2 :]]


def greedy_settings(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int]:
    """Stop texts and most new tokens of lm-eval's generation settings.

    Raises:
      ValueError: they ask for anything but a greedy answer.
    """
    until = settings.get("until") or []
    stop = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
    most = next((int(settings[n]) for n in _LENGTHS if settings.get(n) is not None), None)
    most = DEFAULT_NEW_TOKENS if most is None else most
    sample, heat = settings.get("do_sample"), settings.get("temperature")
    heat = float(heat if heat is not None else bool(sample))
    if sample is not False and heat > 0:
        raise ValueError(
            f"the task samples (do_sample={sample}, temperature={heat}), and answers here are"
            " greedy; --gen-kwargs do_sample=false overrules the task"
        )
    odd = {name: value for name, value in settings.items() if name not in _IDLE}
    odd = {n: v for n, v in odd.items() if v is not None and (n, v) != ("num_beams", 1)}
    if odd:
        raise ValueError(f"generation settings {odd} are not known; answers here are greedy")
    if most < 1:
        raise ValueError(f"an answer must be allowed at least one token, got {most}")
    return stop, most
