"""The reference in NumPy float64: a token at a time, a cache that is a growing list, no tricks.

It shares no code with the library. It reads the library's parameter tree (kernels [in, out]) and
the fields of its LlamaConfig. A policy is an `OraclePolicy`; `full` and `sink_window` are the same
program with other numbers, as they should be.
"""

from dataclasses import dataclass

import numpy as np
from scipy.fft import dct, idct


@dataclass(frozen=True)
class OraclePolicy:
    """What a cache of `cache_size` slots does when it is full. `cache_size` None never is."""

    cache_size: int | None
    sink_size: int = 4
    recent_size: int = 0
    retain_ratio: float = 0.5
    window: bool = False  # keep the newest entries in place of the low-pass of the middle

    @property
    def keep(self) -> int:
        assert self.cache_size is not None
        return int((self.cache_size - self.sink_size - self.recent_size) * self.retain_ratio)

    def compress(self, entries: np.ndarray) -> np.ndarray:
        """[N, K, D] -> [P, K, D]: sinks stay, the middle is compressed, the most recent stay."""
        sink, recent, keep = self.sink_size, self.recent_size, self.keep
        assert len(entries) == self.cache_size
        if self.window:
            newest = entries[len(entries) - recent - keep :]
            return np.concatenate([entries[:sink], newest])
        middle = entries[sink : len(entries) - recent]
        recents = entries[len(entries) - recent :]
        return np.concatenate([entries[:sink], low_pass(middle, keep), recents])


def low_pass(x: np.ndarray, keep: int) -> np.ndarray:
    """[n, ...] -> [keep, ...]: orthonormal DCT-II, the first `keep` coefficients, the orthonormal
    inverse of that length, times sqrt(keep / n)."""
    if keep == 0:
        return x[:0]
    coefficients = dct(x, type=2, norm="ortho", axis=0)[:keep]
    return idct(coefficients, type=2, norm="ortho", axis=0) * np.sqrt(keep / len(x))


def low_pass_matrix(n: int, keep: int) -> np.ndarray:
    """The same map as a matrix [keep, n]."""
    return low_pass(np.eye(n), keep)


def inverse_frequencies(rope, head_dim: int) -> np.ndarray:
    """[D/2] angles per position, for rope types default, linear and llama3."""
    freqs = rope.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    if rope.rope_type == "linear":
        return freqs / rope.factor
    if rope.rope_type == "llama3":
        scaled = []
        for freq in freqs:
            turns = rope.original_max_position_embeddings * freq / (2 * np.pi)
            low, high = rope.low_freq_factor, rope.high_freq_factor
            share = min(max((turns - low) / (high - low), 0.0), 1.0)  # 1: kept, 0: divided
            scaled.append(share * freq + (1 - share) * freq / rope.factor)
        return np.array(scaled)
    assert rope.rope_type == "default"
    return freqs


def rotate(x: np.ndarray, positions, freqs: np.ndarray) -> np.ndarray:
    """Rotary embedding of [..., heads, D] at positions [...], halves paired as in Hugging Face."""
    angles = np.asarray(positions, np.float64)[..., None, None] * freqs
    cos, sin = np.cos(angles), np.sin(angles)
    first, second = np.split(x, 2, axis=-1)
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def rms_norm(x: np.ndarray, scale: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * scale


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


class Oracle:
    """One sequence of tokens through one model. `caches[i]` is (keys, values), unrotated lists."""

    def __init__(self, config, params, policy: OraclePolicy):
        self.config, self.policy = config, policy
        self.params = _float64(params)
        self.freqs = inverse_frequencies(config.rope, config.head_dim)
        self.caches: list[tuple[list, list]] = [([], []) for _ in range(config.num_layers)]
        self.num_compressions = 0

    @property
    def fill(self) -> int:
        return len(self.caches[0][0])

    def step(self, token: int) -> np.ndarray:
        """Reads one token; returns the logits [V] of the next."""
        if self.fill == self.policy.cache_size:  # lazily: only now is room needed
            self._make_room()
        x = self.params["embed"]["embedding"][token]
        eps = self.config.rms_norm_eps
        for i in range(self.config.num_layers):
            layer = self.params[f"layers_{i}"]
            y = rms_norm(x, layer["input_norm"]["scale"], eps)
            x = x + self._attend(layer["attention"], y, *self.caches[i])
            y = rms_norm(x, layer["post_norm"]["scale"], eps)
            gate, up = y @ layer["mlp"]["gate"]["kernel"], y @ layer["mlp"]["up"]["kernel"]
            x = x + (gate / (1 + np.exp(-gate)) * up) @ layer["mlp"]["down"]["kernel"]
        x = rms_norm(x, self.params["norm"]["scale"], eps)
        if self.config.tie_word_embeddings:
            return x @ self.params["embed"]["embedding"].T
        return x @ self.params["lm_head"]["kernel"]

    def read(self, tokens) -> np.ndarray:
        """Reads tokens [T]; returns logits [T, V]."""
        return np.stack([self.step(int(token)) for token in tokens])

    def _make_room(self) -> None:
        for keys, values in self.caches:
            keys[:] = list(self.policy.compress(np.stack(keys)))
            values[:] = list(self.policy.compress(np.stack(values)))
        self.num_compressions += 1

    def _attend(self, weights, y, keys: list, values: list) -> np.ndarray:
        c = self.config
        query = (y @ weights["q"]["kernel"]).reshape(c.num_heads, c.head_dim)
        keys.append((y @ weights["k"]["kernel"]).reshape(c.num_kv_heads, c.head_dim))
        values.append((y @ weights["v"]["kernel"]).reshape(c.num_kv_heads, c.head_dim))
        # A position is a slot: rotation comes after compression, at every step anew.
        query = rotate(query, len(keys) - 1, self.freqs)
        rotated = rotate(np.stack(keys), np.arange(len(keys)), self.freqs)
        stacked = np.stack(values)
        heads = []
        for h in range(c.num_heads):
            k = h // (c.num_heads // c.num_kv_heads)  # the kv head that query head h reads
            scores = rotated[:, k] @ query[h] / np.sqrt(c.head_dim)
            heads.append(softmax(scores) @ stacked[:, k])
        return np.concatenate(heads) @ weights["o"]["kernel"]


def logits(config, params, policy: OraclePolicy, tokens) -> np.ndarray:
    """tokens [B, T] -> float64 logits [B, T, V]."""
    return np.stack([Oracle(config, params, policy).read(row) for row in np.asarray(tokens)])


def mean_loss(logits: np.ndarray, tokens) -> float:
    """Mean over rows and positions of -log p(next token), natural logarithm."""
    log_probs = np.log(softmax(logits[:, :-1]))
    return float(-np.take_along_axis(log_probs, np.asarray(tokens)[:, 1:, None], axis=-1).mean())


def from_policy(kv) -> OraclePolicy:
    """The oracle's policy for a library policy of any of the three built-in kinds."""
    if kv.name == "full":
        return OraclePolicy(cache_size=None)
    return OraclePolicy(
        kv.cache_size, kv.sink_size, kv.recent_size, kv.retain_ratio, kv.name == "sink_window"
    )


def _float64(tree):
    if isinstance(tree, dict):
        return {key: _float64(value) for key, value in tree.items()}
    return np.asarray(tree, np.float64)
