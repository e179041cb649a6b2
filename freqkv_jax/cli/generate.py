"""`freqkv generate`: continues a text, word by word, or talks in the terminal."""

import argparse
import contextlib
import dataclasses
import io
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from freqkv_jax.cli.common import (
    add_model_arguments,
    add_policy_arguments,
    add_weights_argument,
    describe_policy,
    load_model,
    note,
    size_text,
)
from freqkv_jax.evals.progress import progress

LONG_PROMPT = 4096  # tokens from which a bar shows how far the reading is

DESCRIPTION = """\
Continues a prompt of any length, or talks with you (--chat), through a cache of fixed size. Words
are printed as they come; sizes and speed go to stderr. --temperature 0, the default, always takes
the likeliest token. On one NVIDIA GPU weights are fused first, for speed (fk.fuse)."""
EPILOG = """\
examples:
  freqkv generate --model MODEL --prompt "Once upon a time" --max-new-tokens 100
  freqkv generate --model MODEL --prompt-file book.txt --cache-size 2048 --temperature 0.8
  freqkv generate --model MODEL --chat --system "You answer in one sentence."

in a chat: /info  /save FILE  /load FILE  /reset  /exit"""


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_model_arguments(parser)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", metavar="TEXT", help="text to continue")
    source.add_argument("--prompt-file", metavar="FILE", help="UTF-8 text to continue; - is stdin")
    source.add_argument("--chat", action="store_true", help="talk, with the model's chat template")
    parser.add_argument("--system", metavar="TEXT", help="what a chat tells the model beforehand")
    parser.add_argument(
        "--max-new-tokens", type=int, default=256, metavar="N", help="at most (default: 256)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.0, help="0 is greedy (default); 1 samples"
    )
    parser.add_argument("--top-k", type=int, help="sample among the k likeliest only")
    parser.add_argument("--top-p", type=float, help="sample among this share of probability")
    parser.add_argument("--seed", type=int, default=0, help="of sampling (default: 0)")
    parser.add_argument(
        "--ignore-eos", action="store_true", help="go on past the end-of-text token"
    )
    add_weights_argument(parser, "read and write")
    add_policy_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Loads the model and continues the prompt, or starts the conversation."""
    import freqkv_jax as fk
    from freqkv_jax.model import fused

    if args.system is not None and not args.chat:
        raise ValueError("--system is for --chat; put the text into the prompt instead")
    prompt = None if args.chat else _prompt_text(args)
    tokenizer = fk.load_tokenizer(args.model)
    model, params = load_model(args)
    if args.weights is not None or fused.pays(params, 1):
        params = fk.fuse(params, donate=True, weights=args.weights)
    voice = Voice(model, params, tokenizer, sampling_from_flags(args, model, tokenizer))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that cannot show a letter
    if prompt is None:
        from freqkv_jax.cli.chat import talk

        return talk(voice, args.system)
    ids = tokenizer.encode(prompt, add_special_tokens=True)
    note(f"prompt: {len(ids)} tokens; policy: {describe_policy(model.kv)}")
    spoken = voice.speak(ids, print_now)
    print_now("\n")
    note(spoken.summary(model))
    return 0


def _prompt_text(args: argparse.Namespace) -> str:
    if args.prompt is not None:
        text, where = args.prompt, "--prompt"
    elif args.prompt_file == "-":
        text, where = sys.stdin.read(), "stdin"
    else:
        try:
            text = Path(args.prompt_file).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise ValueError(
                f"--prompt-file {args.prompt_file} is not UTF-8 text (byte {error.start})"
            ) from None
        where = f"--prompt-file {args.prompt_file}"
    if not text:
        raise ValueError(f"{where} is empty; give at least one character to continue")
    return text


def sampling_from_flags(args: argparse.Namespace, model: Any, tokenizer: Any) -> dict[str, Any]:
    """The arguments of `fk.generate` that the flags stand for, with the model's own end tokens."""
    stops = sorted({*model.config.eos_ids, *tokenizer.eos_ids})
    return {
        "max_new_tokens": args.max_new_tokens,
        "temperature": args.temperature,
        "top_k": args.top_k,
        "top_p": args.top_p,
        "seed": args.seed,
        "eos_id": None if args.ignore_eos or not stops else stops,
    }


def print_now(text: str) -> None:
    """Writes to stdout without waiting for the end of a line."""
    sys.stdout.write(text)
    sys.stdout.flush()


@dataclasses.dataclass(frozen=True)
class Spoken:
    """What one call of `Voice.speak` gave.

    `ids` are the new tokens (no end token), `first_s` the seconds until the first of them were
    there (reading the prompt, and compiling), `first_count` how many those were.
    """

    ids: list[int]
    text: str
    state: Any
    num_prompt: int
    first_count: int
    first_s: float
    total_s: float

    def summary(self, model: Any) -> str:
        """One line for the user: sizes, rounds and speed."""
        seen = int(self.state.seen[0])
        rest, rest_s = len(self.ids) - self.first_count, self.total_s - self.first_s
        speed = f"{rest / rest_s:.1f} tokens/s" if rest > 0 and rest_s > 0 else "too short to time"
        return (
            f"[{self.num_prompt} tokens read in {self.first_s:.1f} s, {len(self.ids)} written:"
            f" {speed} after the first {self.first_count}; {seen} seen,"
            f" {model.kv.num_compressions(seen)} compressions, KV cache"
            f" {size_text(self.state.nbytes)}]"
        )


@dataclasses.dataclass(frozen=True)
class Voice:
    """A model with its tokenizer and its manner of sampling."""

    model: Any
    params: Any
    tokenizer: Any
    sampling: dict[str, Any]

    @property
    def rows(self) -> int:
        """Rows that are read and written, all alike: one a position of a mesh's batch axes."""
        from freqkv_jax.sharding import BATCH_AXES, mesh_of

        mesh = mesh_of(self.params)
        return 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)

    def speak(self, ids: Sequence[int], write: Callable[[str], None], state: Any = None) -> Spoken:
        """Reads `ids` (after what `state` has read) and continues; `write` gets text as it comes.

        The state given is used up.
        """
        import freqkv_jax as fk

        decoder, rows = self.tokenizer.stream_decoder(), self.rows
        sampling = dict(self.sampling)
        if rows > 1:  # a key each would let rows write on behind the end of the first
            sampling["seed"] = [sampling["seed"]] * rows
        begin = time.monotonic()
        first: list[tuple[int, float]] = []
        pieces: list[str] = []

        reading = contextlib.ExitStack()
        on_progress = None
        if len(ids) > LONG_PROMPT:
            update = reading.enter_context(progress("reading", len(ids)))
            on_progress = lambda done, total: update(done // rows)  # noqa: E731

        def stream(row: int, new: Sequence[int]) -> None:
            if row:
                return
            reading.close()
            if not first:
                first.append((len(new), time.monotonic() - begin))
            say(decoder.feed([int(token) for token in new]))

        def say(text: str) -> None:
            if text:
                pieces.append(text)
                write(text)

        with reading:
            lists, state = fk.generate(
                self.model,
                self.params,
                [list(ids)] * rows,
                **sampling,
                stream=stream,
                return_state=True,
                state=state,
                on_progress=on_progress,
            )
        say(decoder.flush())
        total_s = time.monotonic() - begin
        count, first_s = first[0] if first else (0, total_s)
        new_ids = [int(token) for token in lists[0]]
        return Spoken(new_ids, "".join(pieces), state, len(ids), count, first_s, total_s)
