"""FreqKV's rounds told in two ways, plainly and by kernels for NVIDIA, with their derivatives."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.custom_derivatives import linear_call
from jaxtyping import Array

from freqkv_jax.folding import MAPPED
from freqkv_jax.kv import folding_cuda, folding_cuda_back
from freqkv_jax.kv.folding_cuda import Sizes
from freqkv_jax.kv.policy import Maps, Slots
from freqkv_jax.rope import Rope
from freqkv_jax.sharding import CHUNKS_SPEC, MEMORY_SPEC, P, on_each_device

GIVEN = (MEMORY_SPEC, CHUNKS_SPEC, CHUNKS_SPEC)  # a memory, keys, values
Rounds = Callable[[Slots, Array, Array, Maps], tuple[Array, ...]]


def forms(plain: Rounds, sizes: Sizes, rope: Rope, kept: bool, more: bool = False) -> Rounds:
    """`plain`, linear in all but its maps; where the program is lowered for an NVIDIA GPU,
    `kv.folding_cuda` and, backwards, `kv.folding_cuda_back`. Derivatives cannot be under
    `jax.vmap`, which JAX's `linear_call` does not know.

    Args:
      kept: whether rematerialisation may keep the caches by the name `folding.MAPPED`.
      more: whether `plain` gives the cache behind the chunks, too.
    """

    def cuda(memory: Slots, k: Array, v: Array, maps: Maps) -> tuple[Array, ...]:
        run = functools.partial(folding_cuda.rounds, sizes=sizes, rope=rope, more=more)
        run = on_each_device(run, (*GIVEN, P()), CHUNKS_SPEC)
        return run(memory, k, v, maps["stacked"])

    def along(maps: Maps, given: Any) -> tuple[Array, ...]:
        # By its derivative: `plain` itself has forms for NVIDIA, which cannot be transposed.
        def run(memory: Slots, k: Array, v: Array) -> tuple[Array, ...]:
            return plain(memory, k, v, maps)

        return jax.jvp(run, jax.tree.map(jnp.zeros_like, given), given)[1]

    @jax.custom_jvp
    def rounds(memory: Slots, k: Array, v: Array, maps: Maps) -> tuple[Array, ...]:
        return jax.lax.platform_dependent(memory, k, v, maps, cuda=cuda, default=plain)

    @rounds.defjvp
    def _(primals: Any, tangents: Any) -> tuple[tuple[Array, ...], tuple[Array, ...]]:
        memory, k, v, maps = primals
        caches = rounds(memory, k, v, maps)
        if kept:
            caches = tuple(checkpoint_name(x, MAPPED) for x in caches)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), primals[:3])

        def plain_back(maps: Maps, given: tuple[Array, ...]) -> Any:
            return jax.linear_transpose(functools.partial(along, maps), shapes)(given)[0]

        def cuda_back(maps: Maps, given: tuple[Array, ...]) -> Any:
            sides = {"sizes": sizes, "rope": rope, "capacity": shapes[0].k.shape[2]}
            run = functools.partial(folding_cuda_back.transposed, **sides)
            return on_each_device(run, (CHUNKS_SPEC, P()), GIVEN)(given, maps["stacked"])

        def back(maps: Maps, given: tuple[Array, ...]) -> Any:
            return jax.lax.platform_dependent(maps, given, cuda=cuda_back, default=plain_back)

        return caches, linear_call(along, back, maps, tuple(tangents[:3]))

    return jax.jit(rounds)  # else each layer traces all of this anew: two thirds of a minute
