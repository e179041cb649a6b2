"""Rows of fixed length out of documents, and mixtures of several sources."""

import bisect
import hashlib
import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np

from freqkv_jax.training.store import TokenStore

OPEN_ROWS = 256  # rows that are being filled at a time
PACKS = ("documents", "concat")


class RowSource(Protocol):
    """Rows by number, the same whoever asks and whenever."""

    num_rows: int
    fingerprint: str  # equal for equal rows: a resume compares it

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """{"tokens": int32 [n, seq_len], "mask": bool [n, seq_len]}; the loss counts predictions
        of the tokens that the mask names. ValueError if a file has changed."""
        ...


def cut(
    offsets: np.ndarray, seq_len: int, pack: str, from_end: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Starts and lengths of the pieces, none longer than a row, that make up all documents.

    With pack="concat" a piece also ends where a row of the joined documents does. `from_end` cuts
    each document from its end, so that an answer there has a whole row before it.
    """
    starts, stops = offsets[:-1], offsets[1:]
    if pack == "concat":
        cuts = np.union1d(offsets, np.arange(0, offsets[-1], seq_len))
        return cuts[:-1], np.diff(cuts)
    counts = -(-(stops - starts) // seq_len)
    document = np.repeat(np.arange(len(starts)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    if from_end:
        ends = stops[document] - number * seq_len
        begins = np.maximum(ends - seq_len, starts[document])
        order = np.argsort(begins, kind="stable")
        return begins[order], (ends - begins)[order]
    begins = starts[document] + number * seq_len
    return begins, np.minimum(begins + seq_len, stops[document]) - begins


def fill_rows(lengths: np.ndarray, seq_len: int) -> np.ndarray:
    """The row of each piece; pieces keep whole, and go where the least space is left over.

    Only OPEN_ROWS rows are open at a time, so that the time grows with the pieces alone.
    """
    rows = np.empty(len(lengths), np.int64)
    whole = lengths == seq_len
    next_row = int(whole.sum())
    rows[whole] = np.arange(next_row)
    spaces: list[tuple[int, int]] = []  # (space left, row), smallest first
    for piece in np.flatnonzero(~whole).tolist():
        length = int(lengths[piece])
        at = bisect.bisect_left(spaces, (length, -1))
        if at < len(spaces):
            space, row = spaces.pop(at)
        else:
            space, row = seq_len, next_row
            next_row += 1
        rows[piece] = row
        # A space of one token can hold nothing that would be learnt.
        if space - length > 1:
            bisect.insort(spaces, (space - length, row))
            if len(spaces) > OPEN_ROWS:
                spaces.pop(0)
    return rows


class PackedRows:
    """Rows of a TokenStore (a RowSource).

    The mask leaves out position 0, the first token of each piece of a document (what came before
    it in the row tells nothing about it), padding, and with `answers_only` all but answers.
    """

    def __init__(
        self, store: TokenStore, seq_len: int, pack: str, answers_only: bool, name: str
    ) -> None:
        """ValueError if nothing is left to learn from, or answers are not known; `name` says
        which data that is."""
        if pack not in PACKS:
            raise ValueError(f"data.pack {pack!r} is not known; allowed: {', '.join(PACKS)}")
        if answers_only and not store.has_answers:
            raise ValueError(
                f"data.answers_only is set, but {name} does not say which tokens are answers; it"
                " needs chat or alpaca records (tokenised with --answers-only), or set it to false"
            )
        self.seq_len = seq_len
        self._store, self._answers_only = store, answers_only
        starts, lengths = cut(store.offsets, seq_len, pack, store.has_answers)
        useful = lengths > 1
        if answers_only:
            learnt = [
                int(store.answers(s + 1, s + n).sum()) for s, n in zip(starts, lengths, strict=True)
            ]
            useful &= np.array(learnt, np.int64) > 0
        if pack == "concat":
            rows = starts // seq_len
            # Rows keep their shape; a row goes when nothing in it is useful.
            kept = np.isin(rows, np.unique(rows[useful]))
        else:
            kept = useful
            rows = fill_rows(lengths[kept], seq_len)
        starts, lengths = starts[kept], lengths[kept]
        if pack == "concat":
            rows = np.unique(rows[kept], return_inverse=True)[1]
        order = np.argsort(rows, kind="stable")
        self._starts, self._lengths = starts[order], lengths[order]
        self.num_rows = int(rows.max()) + 1 if len(rows) else 0
        if self.num_rows == 0:
            what = "no token of an answer" if answers_only else "no document of two tokens"
            raise ValueError(f"{name} is empty: there is {what} in it; give data to learn from")
        self._first = np.searchsorted(rows[order], np.arange(self.num_rows + 1))
        about = repr((store.fingerprint, seq_len, pack, answers_only, "v1"))
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens int32 [n, seq_len] and mask bool [n, seq_len]; ValueError if a file changed."""
        self._store.check()
        tokens = np.zeros((len(indices), self.seq_len), np.int32)
        mask = np.zeros(tokens.shape, bool)
        for place, row in enumerate(np.asarray(indices).tolist()):
            at = 0
            for piece in range(self._first[row], self._first[row + 1]):
                start, length = int(self._starts[piece]), int(self._lengths[piece])
                tokens[place, at : at + length] = self._store.tokens(start, start + length)
                mask[place, at : at + length] = (
                    self._store.answers(start, start + length) if self._answers_only else True
                )
                mask[place, at] = False
                at += length
        return {"tokens": tokens, "mask": mask}


class Mixture:
    """Rows of several sources by weight (a RowSource).

    A source gives its weight's share of the rows, spread evenly. The mixture is as long as it
    takes to read every source once: then one has been read exactly once, and the others as often
    as their weights ask, every row of theirs equally often but for one.
    """

    def __init__(self, sources: Sequence[RowSource], weights: Sequence[float]) -> None:
        """ValueError for weights that are not positive numbers."""
        if any(not (w > 0 and math.isfinite(w)) for w in weights):
            raise ValueError(f"data weights must be positive numbers, got {list(weights)}")
        self._sources = list(sources)
        share = np.asarray(weights, np.float64) / math.fsum(weights)
        sizes = np.array([source.num_rows for source in sources], np.int64)
        total = float((sizes / share).max())
        # Never fewer than the source has: rounding must not leave a row out.
        counts = np.maximum(np.rint(total * share).astype(np.int64), sizes)
        self.num_rows = int(counts.sum())
        spread = np.concatenate([(np.arange(n) + 0.5) / n for n in counts])
        order = np.argsort(spread, kind="stable")
        source = np.repeat(np.arange(len(sizes)), counts)
        row = np.concatenate([np.arange(n) % size for n, size in zip(counts, sizes, strict=True)])
        self._source, self._row = source[order].astype(np.int32), row[order]
        parts = [source.fingerprint for source in sources]
        about = repr((parts, [float(w) for w in weights], "v1"))
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Rows of the sources that the places of the mixture belong to."""
        indices = np.asarray(indices, np.int64)
        which, row = self._source[indices], self._row[indices]
        out: dict[str, np.ndarray] = {}
        for number in np.unique(which).tolist():
            chosen = which == number
            for name, part in self._sources[number].rows(row[chosen]).items():
                if name not in out:
                    out[name] = np.zeros((len(indices), *part.shape[1:]), part.dtype)
                out[name][chosen] = part
        return out
