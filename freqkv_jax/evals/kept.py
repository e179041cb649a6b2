"""What becomes of the entries of a cache, round by round: which a policy keeps, or what is left."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from freqkv_jax.config import LlamaConfig
from freqkv_jax.decode import prefill
from freqkv_jax.kv.choosing import ChoosingPolicy
from freqkv_jax.kv.linear import LinearPolicy
from freqkv_jax.kv.policy import KVPolicy, Maps, Memory, write_places
from freqkv_jax.model.llama import Llama
from freqkv_jax.rope import Rope

DIGIT = 256  # whole numbers up to it are exact in bfloat16
DIGITS = 3  # so places in a text may have 24 bits


class Watched(NamedTuple):
    """A policy's memory, the place in the text of each entry, and the tokens read."""

    memory: Memory
    place: Array  # int32 [B, K, N]
    read: Array  # int32 [B, K]


@dataclass(frozen=True)
class WatchedPolicy(KVPolicy):
    """A choosing policy that remembers where in the text each of its entries stood.

    It chooses, stores and is read as `kv` is. A round moves values and never mixes them, and its
    choice has no gradient: so the derivative of the values along the places, written in digits
    that every dtype holds exactly, is where the places go.
    """

    kv: ChoosingPolicy

    @property
    def needs(self) -> tuple[str, ...]:  # pyright: ignore[reportIncompatibleVariableOverride]
        """As `kv`."""
        return self.kv.needs

    @property
    def capacity(self) -> int:
        """As `kv`."""
        return self.kv.capacity

    @property
    def prefix(self) -> int:
        """As `kv`."""
        return self.kv.prefix

    def kv_bytes(self, config: LlamaConfig, dtype: str, seen: int | None = None) -> int:
        """As `kv`: what watching takes does not count."""
        return self.kv.kv_bytes(config, dtype, seen)

    def constants(self) -> dict[str, np.ndarray]:
        """As `kv`."""
        return self.kv.constants()

    def init(
        self, batch: int, kv_heads: int, head_dim: int, dtype: Any, slots: int | None = None
    ) -> Watched:
        """Empty."""
        assert head_dim >= DIGITS
        place = jnp.zeros((batch, kv_heads, self.capacity), jnp.int32)
        memory = self.kv.init(batch, kv_heads, head_dim, dtype, slots)
        return Watched(memory, place, jnp.zeros((batch, kv_heads), jnp.int32))

    def append(
        self,
        memory: Watched,
        k: Array,
        v: Array,
        fill: int | Array,
        count: Array | None = None,
        queries: Array | None = None,
    ) -> Watched:
        """Stores the tokens, and their places."""
        inner = self.kv.append(memory.memory, k, v, fill, count, queries)
        return Watched(inner, *write_places(memory.place, memory.read, k.shape[1], fill, count))

    def view(self, memory: Watched) -> tuple[Array, Array]:
        """As `kv`."""
        return self.kv.view(memory.memory)

    def position(self, seen: Array, fill: Array) -> Array:
        """As `kv`."""
        return self.kv.position(seen, fill)

    def make_room(self, memory: Watched, rope: Rope, maps: Maps) -> Watched:
        """As `kv`; the places go where the values go."""
        inner = memory.memory

        def room(v: Array) -> tuple[Array, Memory]:
            left = self.kv.make_room(inner._replace(v=v), rope, maps)
            return left.v, left

        parts = [memory.place // DIGIT**i % DIGIT for i in range(DIGITS)]
        digits = jnp.stack(parts, axis=-1).astype(inner.v.dtype)
        digits = jnp.pad(digits, [(0, 0)] * 3 + [(0, inner.v.shape[-1] - DIGITS)])
        _, moved, left = jax.jvp(room, (inner.v,), (digits,), has_aux=True)
        moved = moved[..., :DIGITS].astype(jnp.int32)
        place = sum(moved[..., i] * DIGIT**i for i in range(DIGITS))
        return Watched(left, jnp.asarray(place), memory.read)


def rounds_followed(kv: KVPolicy, seq_len: int) -> int:
    """Rounds after which a whole chunk was read of a text of `seq_len` tokens.

    Raises:
      ValueError: a policy whose entries cannot be followed, or fewer than two rounds.
    """
    if not isinstance(kv, (ChoosingPolicy, LinearPolicy)):
        raise ValueError(
            f"policy {kv.name!r} neither chooses entries nor maps them; nothing can be followed"
        )
    rounds = max(0, (seq_len - kv.capacity) // kv.chunk)
    if rounds < 2:
        raise ValueError(
            f"--seq-len {seq_len} gives {rounds} rounds of making room and a whole chunk; give at"
            f" least {kv.capacity + 2 * kv.chunk} (cache_size + 2 chunk)"
        )
    return rounds


def kept_places(
    model: Llama, params: Mapping[str, Any], tokens: Int[np.ndarray, "T"]
) -> Iterator[Int[np.ndarray, "L K P"]]:
    """After each round, the places in the text of the entries in slots 0 .. P of each kv head.

    The model reads the text with its policy, which must choose entries.
    """
    kv = model.kv
    assert isinstance(kv, ChoosingPolicy)
    watching = model.clone(kv=WatchedPolicy(kv))
    rounds = rounds_followed(kv, len(tokens))
    text = np.asarray(tokens, np.int32)[None]
    _, state = prefill(watching, params, text[:, : kv.capacity])
    for number in range(rounds):
        start = kv.capacity + number * kv.chunk
        _, state = prefill(watching, params, text[:, start : start + kv.chunk], state=state)
        yield np.stack([np.asarray(m.place[0, :, : kv.prefix]) for m in state.layers])


@dataclass(frozen=True)
class Fates:
    """What became of each token of a text that has gone through R rounds.

    Attributes:
      kv: the policy. rounds: R.
      lost: [L, K, T'], the round (1 to R) that dropped the token, 0 where it is still there. T' are
        the tokens that were read before the last round.
    """

    kv: ChoosingPolicy
    rounds: int
    lost: Int[np.ndarray, "L K T"]

    def present(self, number: int) -> Bool[np.ndarray, "L K T"]:
        """Which tokens are in the cache after a round (1 to R)."""
        read = self.kv.capacity + (number - 1) * self.kv.chunk
        held = (self.lost == 0) | (self.lost > number)
        return held & (np.arange(held.shape[-1]) < read)


def fates(kv: ChoosingPolicy, held: Iterator[Int[np.ndarray, "L K P"]], rounds: int) -> Fates:
    """Of what `kept_places` gives."""
    size = kv.capacity + (rounds - 1) * kv.chunk
    lost, number = np.zeros((0, 0, size), np.int32), 0
    for number, places in enumerate(held, 1):
        if number == 1:
            lost = np.zeros((*places.shape[:2], size), np.int32)
        there = np.zeros(lost.shape, bool)
        np.put_along_axis(there, places, True, axis=-1)
        known = np.arange(size) < kv.capacity + (number - 1) * kv.chunk
        lost[known & ~there & (lost == 0)] = number
    assert number == rounds
    return Fates(kv, rounds, lost)


def survival(found: Fates) -> Float[np.ndarray, "L R"]:
    """Share of the entries that are there after they went through 0, 1, ..., R - 1 rounds.

    Of the tokens that came in chunks: those that filled the cache first were never its newest.
    """
    kv, rounds = found.kv, found.rounds
    place = np.arange(kv.capacity, found.lost.shape[-1])
    before = (place - kv.capacity) // kv.chunk + 1  # rounds that were over when it came
    lost = found.lost[..., kv.capacity :]
    shares = []
    for through in range(rounds):
        followed = before + through <= rounds
        alive = (lost == 0) | (lost > before + through)
        shares.append(alive[..., followed].mean(axis=(1, 2)))
    return np.stack(shares, axis=-1)


class Agreement(NamedTuple):
    """Mean Jaccard index (intersection over union) of what two heads chose, after the last round.

    Sinks and recents, which all heads hold, do not count. None where there is nothing to compare.
    """

    heads: Float[np.ndarray, "L"] | None  # two heads of a layer
    layers: Float[np.ndarray, "L L"] | None  # a head of one layer and one of another
    chance: float | None  # of two sets of that size drawn from all that was read


def agreement(found: Fates) -> Agreement:
    """Of heads and of layers."""
    kv = found.kv
    sets = found.present(found.rounds)[..., kv.sink_size :]
    sets = sets[..., : sets.shape[-1] - kv.recent_size]
    num_layers, num_heads, candidates = sets.shape
    if kv.keep == 0:
        return Agreement(None, None, None)
    flat = sets.reshape(-1, candidates).astype(np.float32)
    common = flat @ flat.T
    index = common / (2 * kv.keep - common)
    index = index.reshape(num_layers, num_heads, num_layers, num_heads).transpose(0, 2, 1, 3)
    layers = index.mean(axis=(2, 3))
    heads = None
    if num_heads > 1:
        own = np.einsum("llkm->lkm", index)
        pairs = ~np.eye(num_heads, dtype=bool)
        heads = own[:, pairs].mean(axis=1)
        layers[np.diag_indices(num_layers)] = heads
    expected = kv.keep**2 / candidates
    chance = expected / (2 * kv.keep - expected)
    return Agreement(heads, layers, chance)


def left_by_round(kv: LinearPolicy, rounds: int) -> Float[np.ndarray, "R T"]:
    """What is left of each token after each round, for policies whose round is a linear map.

    A token is written into slots with weights, which each round maps again; what is left is the sum
    of their squares: 1 where it stands alone in a slot. Keys and values, layers and heads are
    alike. Tokens that have not been read have 0.
    """
    size, prefix = kv.capacity, kv.prefix
    num_tokens = size + (rounds - 1) * kv.chunk
    maps = {name: jnp.asarray(array) for name, array in kv.constants().items()}
    shrink = jax.jit(lambda x, maps: kv.shrink(x, 0, maps))
    weights, left = np.eye(size, num_tokens, dtype=np.float32), []
    for number in range(rounds):
        small = np.asarray(shrink(weights, maps))
        left.append((small**2).sum(axis=0))
        weights[:prefix], weights[prefix:] = small, 0
        start = size + number * kv.chunk
        if number + 1 < rounds:
            chunk = np.arange(kv.chunk)
            weights[prefix + chunk, start + chunk] = 1
    return np.stack(left)


def left_after_rounds(kv: LinearPolicy, left: Float[np.ndarray, "R T"]) -> Float[np.ndarray, "R"]:
    """`survival` of a linear policy: what is left of an entry after 0, 1, ..., R - 1 rounds."""
    rounds, shares = len(left), [1.0]
    place = np.arange(kv.capacity, left.shape[1])
    before = (place - kv.capacity) // kv.chunk + 1
    for through in range(1, rounds):
        followed = before + through <= rounds
        shares.append(left[before[followed] + through - 1, place[followed]].mean())
    return np.array(shares)


def by_bins(values: Float[np.ndarray, "... T"], bins: int) -> Float[np.ndarray, "... bins"]:
    """Means over `bins` ranges of near-equal width along the last axis."""
    edges = np.linspace(0, values.shape[-1], bins + 1).round().astype(int)
    return np.add.reduceat(values, edges[:-1], axis=-1) / np.diff(edges)
