"""What is measured: each case names its work, counts it, and builds its program when it is due."""

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from freqkv_jax import programs
from freqkv_jax.bench import amounts
from freqkv_jax.bench.amounts import Amount
from freqkv_jax.bench.timing import Program
from freqkv_jax.compile_options import many_tokens
from freqkv_jax.decode import prefill as read_texts
from freqkv_jax.kv import FreqKVConfig, FullConfig, KVState
from freqkv_jax.kv.policy import KVPolicy
from freqkv_jax.kv.state import empty_state
from freqkv_jax.model.attention import attend, attend_behind
from freqkv_jax.model.fused import fuse, pays
from freqkv_jax.model.llama import Block, Llama, row_padding
from freqkv_jax.reading import placed_maps
from freqkv_jax.sampling import Draw, Sampling

WORKS = ("forward", "prefill", "decode", "compress", "attention", "layer")
CHUNKS = (2, 14, 62)  # behind the cache's first filling, where no lengths are given
FULL_STEPS = 256  # that a full cache decodes; it has no rounds to average over


@dataclass(frozen=True)
class Case:
    """One row of the table.

    Attributes:
      length: tokens of a row's text; in decode the entries that an unbounded cache holds in the
        end, 0 for a bounded one (its time is the same at any length).
      tokens: read or written by a call, over all rows. steps: of decode, else 1.
      build: the program, or for a driver on the host a function of the call's index; its arrays
        are made when it is called.
      peak_flops: the makers' figure for the device, where a share of it is to be shown.
    """

    work: str
    model: Llama
    batch: int
    length: int
    tokens: int
    steps: int
    amount: Amount
    build: Callable[[Any], Program | Callable[[int], Any]]
    peak_flops: float | None = None

    @property
    def name(self) -> str:
        """What --only is matched against: work/policy/length."""
        return f"{self.work}/{self.model.kv.name}/{self.length or 'any'}"


def default_lengths(kv: KVPolicy) -> tuple[int, ...]:
    """N+2Q, N+14Q and N+62Q of the policy, of FreqKV's defaults where it has no N."""
    if kv.capacity is None:
        kv = FreqKVConfig()
    assert kv.capacity is not None
    return tuple(kv.capacity + count * kv.chunk for count in CHUNKS)


def make_cases(
    works: Sequence[str],
    model: Llama,
    lengths: Sequence[int],
    batch: int,
    beside: bool = True,
    weights: str | None = None,
) -> Iterator[Case]:
    """The cases of `works`, short ones first; if `beside`, the full cache beside the policy.

    Args:
      weights: how decode has them (fk.fuse).

    Raises:
      ValueError: a length, batch or work that is none; weights of a work that has no use for them.
    """
    if batch < 1 or not lengths or min(lengths) < 2:
        raise ValueError(f"need batch >= 1 and lengths >= 2, got {batch} and {list(lengths)}")
    for work in works:
        if work not in WORKS:
            raise ValueError(f"no work is named {work!r}; allowed: {', '.join(WORKS)}")
    if weights is not None and list(works) != ["decode"]:
        raise ValueError(f"weights {weights!r} are for decode alone, not {', '.join(works)}")
    models = [model]
    if beside and model.kv.capacity is not None:
        models.append(model.clone(kv=FullConfig()))
    return _cases(works, models, sorted(set(lengths)), batch, weights)


def _cases(
    works: Sequence[str],
    models: Sequence[Llama],
    lengths: Sequence[int],
    batch: int,
    weights: str | None,
) -> Iterator[Case]:
    for work in works:
        bounded = False
        for length in lengths:
            for model in models:
                capped = model.kv.capacity is not None
                if work == "decode":
                    if not (capped and bounded):
                        yield _decode(model, batch, 0 if capped else length, weights)
                    bounded = bounded or capped
                elif work == "compress":
                    # A full cache has none, and a text that fits the cache neither.
                    if capped and model.kv.num_compressions(length):
                        yield _compress(model, batch, length)
                else:
                    yield _MAKERS[work](model, batch, length)


def random_tokens(model: Llama, batch: int, length: int, seed: int) -> Array:
    """Token ids int32 [B, T], made on the device."""
    return jax.random.randint(
        jax.random.key(seed), (batch, length), 0, model.config.vocab_size, jnp.int32
    )


def _variables(model: Llama, params: Any) -> dict[str, Any]:
    return {"params": params, "maps": placed_maps(model.kv, None)}


def _forward(model: Llama, batch: int, length: int) -> Case:
    def forward(variables: Any, tokens: Array) -> Array:
        return model.apply(variables, tokens, method="hidden")  # pyright: ignore[reportReturnType]

    def build(params: Any) -> Program:
        def following(index: int, args: tuple[Any, ...], _: Any) -> tuple[Any, ...]:
            return args[0], random_tokens(model, batch, length, index)

        first = (_variables(model, params), random_tokens(model, batch, length, 0))
        return Program(forward, first, following, options=many_tokens())

    amount = amounts.forward(model.config, model.kv, model.dtype, batch, length)
    return Case("forward", model, batch, length, batch * length, 1, amount, build)


def _prefill(model: Llama, batch: int, length: int) -> Case:
    def build(params: Any) -> Callable[[int], Any]:
        def prefill(index: int) -> Any:
            rng = np.random.default_rng(index)
            tokens = rng.integers(0, model.config.vocab_size, (batch, length), np.int32)
            return read_texts(model, params, tokens)

        return prefill

    amount = amounts.prefill(model.config, model.kv, model.dtype, batch, length)
    return Case("prefill", model, batch, length, batch * length, 1, amount, build)


def _decode(model: Llama, batch: int, length: int, weights: str | None) -> Case:
    """A whole round behind a full cache, or the last steps that fit an unbounded one."""
    kv = model.kv
    capped = kv.capacity is not None
    steps = kv.chunk if capped else min(FULL_STEPS, length // 2)
    start = length - steps if kv.capacity is None else kv.capacity

    def decode(variables: Any, state: KVState, logits: Array) -> Any:
        if capped:
            state = programs.make_room(model, variables, state)
        rule, draw = Sampling(True, None, False), Draw(None, None, None)
        return programs.decode_steps(
            model, variables, state, logits, draw, None, rule, steps, uniform=True
        )

    def build(params: Any) -> Program:
        def following(_: int, args: tuple[Any, ...], out: Any) -> tuple[Any, ...]:
            _, logits, state = out
            return args[0], _with_fill(state, start), logits

        shape = (batch, model.config.vocab_size)
        logits = jax.random.normal(jax.random.key(1), shape)
        state = _with_fill(random_state(model, batch, length), start)
        # As `freqkv generate` has them, which frees the plain ones; here both copies are held.
        if weights is not None or pays(params, batch):
            params = fuse(params, weights=weights)
        return Program(decode, (_variables(model, params), state, logits), following, (1, 2))

    amount = amounts.decode(model.config, kv, model.dtype, batch, steps, length, weights)
    return Case("decode", model, batch, length, batch * steps, steps, amount, build)


def _with_fill(state: KVState, fill: int) -> KVState:
    counters = [jnp.full((state.batch,), fill, jnp.int32) for _ in range(2)]
    return dataclasses.replace(state, fill=counters[0], seen=counters[1])


def random_state(model: Llama, batch: int, slots: int) -> KVState:
    """A state whose memories hold random numbers; `slots` is for unbounded policies."""
    size = slots if model.kv.capacity is None else None
    state = empty_state(model.config, model.kv, batch, model.dtype, size)
    return dataclasses.replace(state, layers=_randomised(state.layers, 7))


def _randomised(tree: Any, seed: int) -> Any:
    leaves, form = jax.tree.flatten(tree)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    made = [
        jax.random.normal(key, leaf.shape, leaf.dtype)
        for key, leaf in zip(keys, leaves, strict=True)
    ]
    return jax.tree.unflatten(form, made)


def _normal(shape: tuple[int, ...], dtype: str, seed: int) -> Array:
    return jax.random.normal(jax.random.key(seed), shape, jnp.dtype(dtype))


def _compress(model: Llama, batch: int, length: int) -> Case:
    """The recurrence of one layer: all chunks' caches, as attention reads them."""
    c, kv, dtype = model.config, model.kv, model.dtype
    assert kv.capacity is not None
    capacity, rounds = kv.capacity, kv.num_compressions(length)

    def compress(maps: Any, memory: Any, k: Array, v: Array, seen: Array) -> Any:
        return kv.chunk_caches(memory, k, v, None, model.rope, maps, seen)

    def build(_: Any) -> Program:
        shape = (batch, rounds, kv.chunk, c.num_kv_heads, c.head_dim)
        memory = _randomised(kv.init(batch, c.num_kv_heads, c.head_dim, jnp.dtype(dtype)), 3)
        seen = jnp.full((batch,), capacity, jnp.int32)
        maps = placed_maps(kv, None)["kv"]
        first = (maps, memory, _normal(shape, dtype, 1), _normal(shape, dtype, 2), seen)

        def following(_: int, args: tuple[Any, ...], __: Any) -> tuple[Any, ...]:
            maps, memory, k, v, seen = args
            return maps, memory, v, k, seen

        return Program(compress, first, following, options=many_tokens())

    amount = amounts.compress(c, kv, dtype, batch, rounds)
    tokens = rounds * kv.chunk
    return Case("compress", model, batch, capacity + tokens, batch * tokens, 1, amount, build)


def _attention(model: Llama, batch: int, length: int) -> Case:
    """One layer's attention, its caches given: the first N tokens, then all chunks at once."""
    c, kv, dtype = model.config, model.kv, model.dtype
    rounds = kv.num_compressions(length)
    if kv.capacity is not None and rounds:
        length = kv.capacity + rounds * kv.chunk
    head = length if kv.capacity is None else min(length, kv.capacity)

    def attention(first: Any, chunks: Any) -> list[Array]:
        q, k, v = first
        out = [attend(q, k, v, model.attention)]
        if chunks is not None:
            q, old, new = chunks
            out.append(attend_behind(q, old, new, model.attention))
        return out

    def inputs(seed: int) -> tuple[Any, Any]:
        count = itertools.count(10 * seed)

        def normal(rows: int, length: int, heads: int) -> Array:
            return _normal((rows, length, heads, c.head_dim), dtype, next(count))

        def entries(rows: int, length: int) -> tuple[Array, Array]:
            return normal(rows, length, c.num_kv_heads), normal(rows, length, c.num_kv_heads)

        first = (normal(batch, head, c.num_heads), *entries(batch, head))
        if not rounds:
            return first, None
        rows = batch * rounds
        queries = normal(rows, kv.chunk, c.num_heads)
        return first, (queries, entries(rows, kv.prefix), entries(rows, kv.chunk))

    def build(_: Any) -> Program:
        def following(index: int, *_: Any) -> Any:
            return inputs(index)

        return Program(attention, inputs(0), following, options=many_tokens())

    amount = amounts.attention(c, kv, dtype, batch, length)
    return Case("attention", model, batch, length, batch * length, 1, amount, build)


def _layer(model: Llama, batch: int, length: int) -> Case:
    """One layer, forward and backward: gradients of its input and of all its weights."""
    dtype = model.dtype
    block = Block(model.config, model.kv, dtype, model.attention)
    rows = length + row_padding(length, dtype)

    def layer(params: Any, maps: Any, x: Array, grad: Array) -> Any:
        def run(params: Any, x: Array) -> Array:
            return block.apply({"params": params}, x, model.rope, maps, length)  # pyright: ignore[reportReturnType]

        return jax.vjp(run, params, x)[1](grad)

    def build(params: Any) -> Program:
        def following(_: int, args: tuple[Any, ...], __: Any) -> tuple[Any, ...]:
            params, maps, x, grad = args
            return params, maps, grad, x

        shape = (batch, rows, model.config.hidden_size)
        x, grad = (_normal(shape, dtype, seed) for seed in (1, 2))
        maps = placed_maps(model.kv, None)["kv"]
        first = (params["layers_0"], maps, x, grad)
        return Program(layer, first, following, options=many_tokens())

    amount = amounts.layer(model.config, model.kv, dtype, batch, length)
    return Case("layer", model, batch, length, batch * length, 1, amount, build)


_MAKERS = {
    "forward": _forward,
    "layer": _layer,
    "prefill": _prefill,
    "attention": _attention,
}
