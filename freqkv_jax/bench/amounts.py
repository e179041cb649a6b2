"""How much work a measurement is: FLOPs and bytes counted from shapes.

FLOPs are those of the model's matmuls, of attention over the entries each token sees, and of the
policy's map (as folded); bytes are each input read once and each result written once. Whatever
else a program does is its own loss.
"""

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp

from freqkv_jax.compile_check import attended_entries, useful_flops
from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv.policy import KVPolicy


@dataclass(frozen=True)
class Amount:
    """FLOPs of model and attention (`useful`), of the policy's map, and bytes."""

    useful_flops: float
    map_flops: float
    num_bytes: float


def map_flops(config: LlamaConfig, kv: KVPolicy, rounds: int, batch: int) -> float:
    """Of `rounds` rounds in one layer, keys and values."""
    if not rounds:
        return 0.0
    entries = sum(array.size for array in kv.constants().values())
    return 2.0 * entries * 2 * config.num_kv_heads * config.head_dim * rounds * batch


def num_weights(config: LlamaConfig, head: bool) -> int:
    """Weights that a call reads in full: all layers, and the head's if it is used."""
    tables = config.vocab_size * config.hidden_size
    layers = config.num_params - tables * (1 if config.tie_word_embeddings else 2)
    return layers + (tables if head else 0)


def forward(config: LlamaConfig, kv: KVPolicy, dtype: str, batch: int, length: int) -> Amount:
    """Final hidden states of `length` tokens a row, from an empty cache, without the head."""
    logits = 2.0 * batch * length * config.vocab_size * config.hidden_size
    useful = useful_flops(config, kv, "forward", batch, length, length) - logits
    mapped = config.num_layers * map_flops(config, kv, kv.num_compressions(length), batch)
    hidden = batch * length * config.hidden_size
    size = jnp.dtype(dtype).itemsize
    return Amount(useful, mapped, size * (num_weights(config, head=False) + hidden))


def prefill(config: LlamaConfig, kv: KVPolicy, dtype: str, batch: int, length: int) -> Amount:
    """`length` tokens a row into a state, and the last one's logits; weights count once."""
    base = forward(config, kv, dtype, batch, length)
    logits = 2.0 * batch * config.vocab_size * config.hidden_size
    state = batch * kv.kv_bytes(config, dtype, length)
    weights = jnp.dtype(dtype).itemsize * num_weights(config, head=True)
    return Amount(base.useful_flops + logits, base.map_flops, weights + state)


def layer(config: LlamaConfig, kv: KVPolicy, dtype: str, batch: int, length: int) -> Amount:
    """One layer forward and backward, gradients of its input and of all its weights.

    Backward is twice the forward's FLOPs, once the map's. Bytes: weights read twice, their
    gradients and the input's written, both hidden states and the result's gradient read.
    """
    config = dataclasses.replace(config, num_layers=1)
    once = forward(config, kv, dtype, batch, length)
    hidden = jnp.dtype(dtype).itemsize * batch * length * config.hidden_size
    weights = once.num_bytes - hidden
    return Amount(3 * once.useful_flops, 2 * once.map_flops, 3 * weights + 4 * hidden)


def decode(
    config: LlamaConfig,
    kv: KVPolicy,
    dtype: str,
    batch: int,
    steps: int,
    slots: int,
    weights: str | None = None,
) -> Amount:
    """A round and `steps` steps: weights (as `fuse` stores them) once a step, and the entries that
    each token sees."""
    rounds = 0 if kv.capacity is None else 1
    seen = attended_entries(kv, "decode", steps, slots)
    size = jnp.dtype(dtype).itemsize
    stored = 1 if weights == "int8" else size
    entry = size * 2 * config.num_layers * config.num_kv_heads * config.head_dim
    return Amount(
        useful_flops(config, kv, "decode", batch, steps, slots),
        config.num_layers * map_flops(config, kv, rounds, batch),
        stored * steps * num_weights(config, head=True) + entry * batch * seen,
    )


def compress(config: LlamaConfig, kv: KVPolicy, dtype: str, batch: int, rounds: int) -> Amount:
    """The caches of `rounds` chunks of one layer, out of a full cache and the chunks' tokens."""
    assert kv.capacity is not None
    entries = kv.capacity + rounds * (kv.chunk + kv.capacity)
    channels = 2 * config.num_kv_heads * config.head_dim
    size = jnp.dtype(dtype).itemsize
    return Amount(0.0, map_flops(config, kv, rounds, batch), size * batch * entries * channels)


def attention(config: LlamaConfig, kv: KVPolicy, dtype: str, batch: int, length: int) -> Amount:
    """One layer's attention of a text of `length` tokens, its caches given."""
    c = config
    seen = attended_entries(kv, "forward", length, length)
    first = length if kv.capacity is None else min(length, kv.capacity)
    keys = first
    if kv.capacity is not None:
        keys += kv.num_compressions(length) * kv.capacity
    elements = 2 * length * c.num_heads + 2 * keys * c.num_kv_heads
    return Amount(
        4.0 * batch * c.num_heads * c.head_dim * seen,
        0.0,
        jnp.dtype(dtype).itemsize * batch * c.head_dim * elements,
    )
