"""Token streams for evaluation: flat token files and plain text."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

TOKEN_DTYPES = {"uint16": np.dtype("<u2"), "uint32": np.dtype("<u4")}
BLOCK_BYTES = 1 << 24  # a file is hashed and checked this much at a time


class Encoder(Protocol):
    """The one thing that reading text needs of a tokenizer."""

    def encode(self, text: str) -> list[int]:
        """Token ids of `text`, without special tokens."""
        ...


@dataclass(frozen=True)
class TokenStream:
    """One long sequence of token ids and where it came from.

    `tokens` is a one-dimensional integer array (memory-mapped for token files), `sha256` the
    digest of the file as it lies on disk, `token_dtype` None where the file was text.
    """

    tokens: np.ndarray
    path: str
    sha256: str
    token_dtype: str | None

    def describe(self) -> dict[str, object]:
        """What a result file says about the data."""
        return {
            "path": self.path,
            "sha256": self.sha256,
            "num_tokens": len(self.tokens),
            "token_dtype": self.token_dtype,
        }


def load_tokens(
    path: str | os.PathLike[str],
    vocab_size: int,
    token_dtype: str | None = None,
    tokenizer: Callable[[], Encoder] | None = None,
) -> TokenStream:
    """Reads a token stream from a file.

    Args:
      path: `NAME.bin` is flat little-endian token ids without a header; any other name is UTF-8
        text, encoded without special tokens.
      vocab_size: ids must be below it.
      token_dtype: "uint16" or "uint32" of a `.bin` file; None takes uint16 where the vocabulary
        fits (at most 65,536 ids), else uint32.
      tokenizer: called only when the file is text, so that token files need no tokenizer.

    Raises:
      FileNotFoundError: no such file.
      ValueError: the size is no multiple of the dtype, uint16 with a vocabulary that does not
        fit, ids outside the vocabulary, text that is not UTF-8, or no tokens at all.
    """
    file = Path(path)
    if not file.is_file():
        raise FileNotFoundError(f"--data {file} is not a file; give a .bin token file or a text")
    if file.suffix == ".bin":
        return _load_token_file(file, vocab_size, token_dtype)
    if token_dtype is not None:
        raise ValueError(
            f"--token-dtype {token_dtype} is for .bin files, but {file.name} is read as text;"
            " leave it out, or rename the file to .bin if it holds token ids"
        )
    if tokenizer is None:
        raise ValueError(f"{file.name} is text and needs a tokenizer; give a .bin token file")
    raw = file.read_bytes()
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{file.name} is not UTF-8 text (byte {error.start}); convert it, or name it .bin if"
            " it holds token ids"
        ) from None
    tokens = np.asarray(tokenizer().encode(text), np.int32)
    _check_ids(file, tokens, vocab_size)
    return TokenStream(tokens, str(path), hashlib.sha256(raw).hexdigest(), None)


def _load_token_file(file: Path, vocab_size: int, token_dtype: str | None) -> TokenStream:
    name = token_dtype or ("uint16" if vocab_size <= 65536 else "uint32")
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
        _check_ids(file, block, vocab_size, start)
    return TokenStream(tokens, str(file), digest.hexdigest(), name)


def _check_ids(file: Path, tokens: np.ndarray, vocab_size: int, offset: int = 0) -> None:
    outside = np.flatnonzero(tokens >= vocab_size)
    if outside.size:
        first = int(outside[0])
        raise ValueError(
            f"{file.name} holds token id {int(tokens[first])} at place {first + offset}, but the"
            f" model's vocabulary is 0 to {vocab_size - 1}; the file was made for another"
            " tokenizer, or --token-dtype is wrong"
        )


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
    if max_windows is None or max_windows >= len(starts):
        return starts
    places = np.linspace(0, len(starts) - 1, max_windows).round().astype(int)
    return [starts[place] for place in places]
