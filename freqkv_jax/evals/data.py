"""Token streams for evaluation: flat token files and plain text."""

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import numpy as np

from freqkv_jax.token_ids import TOKEN_DTYPES, check_ids, dtype_for

T = TypeVar("T")
WRONG_IDS = "the file was made for another tokenizer, or --token-dtype is wrong"
BLOCK_BYTES = 1 << 24  # a file is hashed and checked this much at a time


class Encoder(Protocol):
    """What reading text needs of a tokenizer."""

    @property
    def bos_id(self) -> int | None:
        """The begin token, if there is one."""
        ...

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...


@dataclass(frozen=True)
class TokenStream:
    """One long sequence of token ids and where it came from.

    `tokens` is a one-dimensional integer array (memory-mapped for token files), `sha256` the
    digest of the file as it lies on disk (of names and texts for a folder), `token_dtype` None
    where the file was text. `offsets`: where each document begins, and the end; None where that is
    not known. `names`: of the documents of a folder.
    """

    tokens: np.ndarray
    path: str
    sha256: str
    token_dtype: str | None
    offsets: tuple[int, ...] | None = None
    names: tuple[str, ...] = ()

    def describe(self) -> dict[str, object]:
        """What a result file says about the data."""
        about: dict[str, object] = {
            "path": self.path,
            "sha256": self.sha256,
            "num_tokens": len(self.tokens),
            "token_dtype": self.token_dtype,
        }
        if self.offsets is not None:
            about["num_documents"] = len(self.offsets) - 1
        return about


def stream_of(task: Any, engine: Any) -> TokenStream:
    """The text of a task with the options data, token_dtype and, if it has it, add_bos; it is read
    once. `engine`: of task.py, which is asked for the tokenizer where the file is text."""
    held = task.__dict__  # a field would be an option
    if "stream" not in held:
        held["stream"] = load_tokens(
            task.data,
            engine.model.config.vocab_size,
            task.token_dtype,
            lambda: engine.tokenizer,
            getattr(task, "add_bos", False),
        )
    return held["stream"]


def load_tokens(
    path: str | os.PathLike[str],
    vocab_size: int,
    token_dtype: str | None = None,
    tokenizer: Callable[[], Encoder] | None = None,
    add_bos: bool = False,
) -> TokenStream:
    """Reads a token stream from a file or a folder of texts.

    Args:
      path: `NAME.bin` is flat little-endian token ids without a header; `NAME.json` beside it may
        say where documents begin ("offsets", the end included). Any other file is UTF-8 text, one
        document; a folder's .txt and .md files are a document each, in the order of their names.
        Text is encoded without special tokens.
      vocab_size: ids must be below it.
      token_dtype: "uint16" or "uint32" of a `.bin` file; None takes uint16 where the vocabulary
        fits (at most 65,536 ids), else uint32.
      tokenizer: called only when the file is text, so that token files need no tokenizer.
      add_bos: whether the begin token is put before each text.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the size is no multiple of the dtype, uint16 with a vocabulary that does not
        fit, ids outside the vocabulary, text that is not UTF-8, or no tokens at all.
    """
    file = Path(path)
    if not file.exists():
        raise FileNotFoundError(
            f"--data {file} is not a file; give a .bin token file, a text, or a folder of texts"
        )
    if file.suffix == ".bin" and file.is_file():
        if add_bos:
            raise ValueError(
                f"--add-bos is for texts; {file.name} holds token ids, begin tokens included or not"
            )
        return _load_token_file(file, vocab_size, token_dtype)
    if token_dtype is not None:
        raise ValueError(
            f"--token-dtype {token_dtype} is for .bin files, but {file.name} is read as text;"
            " leave it out, or rename the file to .bin if it holds token ids"
        )
    if tokenizer is None:
        raise ValueError(f"{file.name} is text and needs a tokenizer; give a .bin token file")
    files = _texts_of(file) if file.is_dir() else [file]
    encoder = tokenizer()
    begin = [encoder.bos_id] if add_bos else []
    if begin == [None]:
        raise ValueError("--add-bos: this model's tokenizer has no begin token; leave it out")
    digest, parts = hashlib.sha256(), []
    for text in files:
        raw = text.read_bytes()
        digest.update(raw if text == file else f"{text.name} {len(raw)}\n".encode() + raw)
        tokens = np.asarray(begin + encoder.encode(_decoded(text, raw)), np.int32)
        check_ids(text.name, tokens, vocab_size, WRONG_IDS)
        parts.append(tokens)
    offsets = tuple(np.cumsum([0, *map(len, parts)]).tolist())
    names = tuple(text.name for text in files) if file.is_dir() else ()
    return TokenStream(np.concatenate(parts), str(path), digest.hexdigest(), None, offsets, names)


def _texts_of(folder: Path) -> list[Path]:
    found = sorted(p for p in folder.iterdir() if p.suffix in (".txt", ".md") and p.is_file())
    if not found:
        raise FileNotFoundError(f"--data {folder} is a folder without .txt or .md files")
    return found


def _decoded(file: Path, raw: bytes) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.name} is not UTF-8 text (byte {error.start}); convert it, or name it .bin if"
            " it holds token ids"
        ) from None


def _load_token_file(file: Path, vocab_size: int, token_dtype: str | None) -> TokenStream:
    name = token_dtype or dtype_for(vocab_size)
    if name not in TOKEN_DTYPES:
        allowed = ", ".join(TOKEN_DTYPES)
        raise ValueError(f"token dtype {name!r} is not known; allowed: {allowed}")
    if name == "uint16" and vocab_size > 65536:
        raise ValueError(
            f"uint16 holds ids below 65,536, but the vocabulary has {vocab_size:,};"
            " write the token file as uint32 and leave --token-dtype out"
        )
    dtype, num_bytes = TOKEN_DTYPES[name], file.stat().st_size
    if num_bytes % dtype.itemsize:
        raise ValueError(
            f"{file.name} has {num_bytes:,} bytes, which is no multiple of the {dtype.itemsize}"
            f" bytes of {name}; the file is cut short, or --token-dtype is wrong"
        )
    if num_bytes == 0:
        raise ValueError(f"{file.name} is empty; a token file needs at least one window of tokens")
    tokens = np.memmap(file, dtype, mode="r")
    digest = hashlib.sha256()
    step = BLOCK_BYTES // dtype.itemsize
    for start in range(0, len(tokens), step):
        block = tokens[start : start + step]
        digest.update(block.tobytes())
        check_ids(file.name, block, vocab_size, WRONG_IDS, start)
    offsets = _offsets(file.with_suffix(".json"), len(tokens))
    return TokenStream(tokens, str(file), digest.hexdigest(), name, offsets)


def _offsets(sidecar: Path, num_tokens: int) -> tuple[int, ...] | None:
    """Where documents begin, of the JSON file beside a token file; None where it says nothing."""
    if not sidecar.is_file():
        return None
    try:
        about = json.loads(sidecar.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{sidecar} is not JSON ({error}); mend or remove it") from None
    offsets = about.get("offsets") if isinstance(about, dict) else None
    if offsets is None:
        return None
    whole = isinstance(offsets, list) and all(type(place) is int for place in offsets)
    if not whole or offsets[:1] != [0] or offsets[-1] != num_tokens or offsets != sorted(offsets):
        raise ValueError(
            f"{sidecar}: offsets must rise from 0 to the {num_tokens:,} tokens of the .bin file"
        )
    return tuple(offsets)


def window_starts(
    num_tokens: int, seq_len: int, stride: int, max_windows: int | None = None
) -> list[int]:
    """Where evaluation windows begin: 0, stride, ... below num_tokens - seq_len, last one dropped.

    That is ceil((num_tokens - seq_len) / stride) - 1 windows, as LongLoRA's evaluator (and the
    FreqKV paper after it) takes them. `max_windows` keeps so many of them, evenly spaced.

    Raises:
      ValueError: non-positive numbers, seq_len below 2, or a text too short for one window.
    """
    if seq_len < 2:
        raise ValueError(f"--seq-len must be at least 2 (one prediction), got {seq_len}")
    if stride < 1:
        raise ValueError(f"--stride must be at least 1, got {stride}")
    if max_windows is not None and max_windows < 1:
        raise ValueError(f"--max-windows must be at least 1, got {max_windows}")
    if num_tokens - seq_len <= stride:
        raise ValueError(
            f"the data holds {num_tokens:,} tokens; windows of --seq-len {seq_len:,} with --stride"
            f" {stride:,} need more than {seq_len + stride:,} (the last window is dropped):"
            " lower one of them or give a longer file"
        )
    starts = list(range(0, num_tokens - seq_len, stride))[:-1]
    return evenly(starts, max_windows)


def evenly(values: list[T], count: int | None) -> list[T]:
    """So many of the values, evenly spaced; all where there are no more, or for None."""
    if count is None or count >= len(values):
        return values
    places = np.linspace(0, len(values) - 1, count).round().astype(int)
    return [values[place] for place in places]


def document_windows(
    offsets: Sequence[int], seq_len: int, stride: int
) -> list[tuple[int, int, int]]:
    """Windows that stay within their document: (document, start, length) each.

    A document of at most `seq_len` tokens is one window; of a longer one, all whole windows that
    start every `stride` tokens. Documents of one token hold nothing to predict and are left out.
    """
    if seq_len < 2 or stride < 1:
        raise ValueError(
            f"--seq-len must be at least 2 and --stride at least 1, got {seq_len} and {stride}"
        )
    found = []
    for number, (start, end) in enumerate(zip(offsets, offsets[1:], strict=False)):
        length = min(seq_len, end - start)
        if length >= 2:
            starts = range(start, end - length + 1, stride)
            found.extend((number, place, length) for place in starts)
    return found
