"""A tiny made-up language: rows that need no download, no file and no tokenizer.

Text is sentences of words of a small lexicon. Every word is followed by one of three others, and
every sentence opens with the row's topic, which only the row's own beginning tells. So a model of
any size learns spelling first, then word order, then to look back.
"""

import hashlib

import numpy as np

NUM_ROWS = 1 << 16
LETTERS = "abcdefghijklmnopqrstuvwxyz ."
NUM_WORDS, NUM_FOLLOWERS = 40, 3
_LANGUAGE_KEY = 0x5EED  # the language is one: training and held-out rows differ, not it


def mix(values: np.ndarray) -> np.ndarray:
    """uint64 to uint64, one to one and well scattered (splitmix64; Steele et al. 2014).

    Own arithmetic and not numpy's generators, whose streams may change with its version.
    """
    x = values.astype(np.uint64) + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def key_of(*parts: object) -> np.ndarray:
    """One uint64 (as an array of one) that stands for the parts."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return np.frombuffer(digest[:8], "<u8")


def _draws(key: np.ndarray, count: int) -> np.ndarray:
    return mix(key + np.arange(count, dtype=np.uint64))


def _lexicon() -> tuple[list[str], np.ndarray]:
    """Words, and for each the numbers of those that may follow it [NUM_WORDS, NUM_FOLLOWERS]."""
    words: dict[str, None] = {}
    draws = iter(_draws(key_of(_LANGUAGE_KEY), 100 * NUM_WORDS).tolist())
    while len(words) < NUM_WORDS:
        syllables = 1 + next(draws) % 3
        word = "".join(
            "bdfgklmnprst"[next(draws) % 12] + "aeiou"[next(draws) % 5] for _ in range(syllables)
        )
        words.setdefault(word)
    follow = _draws(key_of(_LANGUAGE_KEY, "follow"), NUM_WORDS * NUM_FOLLOWERS) % NUM_WORDS
    return list(words), follow.astype(np.int64).reshape(NUM_WORDS, NUM_FOLLOWERS)


class Generated:
    """Rows of the language (a RowSource); row i is a function of (name, split, seed, i)."""

    def __init__(self, name: str, split: str, seq_len: int, vocab_size: int, seed: int) -> None:
        """ValueError where the vocabulary is too small for an alphabet."""
        if vocab_size < len(LETTERS):
            raise ValueError(
                f"data of kind generated needs a vocabulary of at least {len(LETTERS)} tokens, the"
                f" model has {vocab_size}"
            )
        self.num_rows = NUM_ROWS
        self.seq_len = seq_len
        self._key = ("rows", name, split, seed)
        self._words, self._follow = _lexicon()
        # Bytes where they fit, so that a byte tokenizer reads the rows; else letter numbers.
        fits = vocab_size > max(map(ord, LETTERS))
        self._bytes = fits
        self._token = {c: ord(c) if fits else i for i, c in enumerate(LETTERS)}
        about = (*self._key, seq_len, fits, "v1")
        self.fingerprint = "generated-" + hashlib.sha256(repr(about).encode()).hexdigest()

    def rows(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Tokens int32 [n, seq_len] and mask bool [n, seq_len]."""
        tokens = np.stack([self._row(int(index)) for index in indices])
        mask = np.ones(tokens.shape, bool)
        mask[:, 0] = False
        return {"tokens": tokens, "mask": mask}

    def text(self, index: int) -> str:
        """A row as text, seq_len characters of it."""
        draws = iter(_draws(key_of(*self._key, index), self.seq_len + 1).tolist())
        topic = next(draws) % NUM_WORDS
        pieces, length, word, left = [], 0, topic, 0
        while length < self.seq_len:
            draw = next(draws)
            if left == 0:
                word, left = topic, 3 + draw % 5
                piece = self._words[word]
            else:
                word = int(self._follow[word, (draw >> 8) % NUM_FOLLOWERS])
                left -= 1
                piece = " " + self._words[word] + (". " if left == 0 else "")
            pieces.append(piece)
            length += len(piece)
        return "".join(pieces)[: self.seq_len]

    def _row(self, index: int) -> np.ndarray:
        text = self.text(index)
        if self._bytes:
            return np.frombuffer(text.encode("ascii"), np.uint8).astype(np.int32)
        return np.array([self._token[c] for c in text], np.int32)
