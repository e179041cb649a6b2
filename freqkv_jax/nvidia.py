"""What this process can trace for NVIDIA GPUs, and Triton kernels (Pallas) for them.

JAX deprecates Pallas' Triton backend: every kernel has a plain form beside it, which takes over
where the backend is gone.
"""

import contextlib
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array

from freqkv_jax.sharding import splits_evenly

INTERPRET = False  # tests set it: kernels then run on a CPU, slowly

triton: Any = None
with contextlib.suppress(ImportError):
    from jax.experimental.pallas import triton as _backend

    triton = _backend


@functools.cache
def present() -> bool:
    """Whether kernels for NVIDIA can be traced here (the platform is chosen later, at lowering)."""
    try:
        return bool(jax.devices("cuda"))
    except RuntimeError:
        return False


def suits(x: Array, heads: int) -> bool:
    """Whether the kernels of caches take entries like x [B, ..., D], whose axis `heads` is
    that of the kv heads: half precision, heads that Triton's blocks fit, with an NVIDIA GPU here.
    On a mesh each device runs them on its own rows and heads."""
    half = x.dtype in (jnp.bfloat16, jnp.float16) and x.shape[-1] in (64, 128, 256)
    return bool(half and splits_evenly(x.shape[0], x.shape[heads]) and triton and present())


class _Call(NamedTuple):
    """All that `call` is told, to be compared."""

    function: Any
    keywords: tuple[tuple[str, Any], ...]
    grid: tuple[int, ...]
    out_shape: Any
    aliases: tuple[tuple[int, int], ...]
    interpret: bool


def call(
    kernel: functools.partial[Any],
    grid: tuple[int, ...],
    out_shape: Any,
    input_output_aliases: dict[int, int] | None = None,
) -> Any:
    """`pallas_call` for Triton, arguments and results whole arrays; several are a tuple.

    Triton compiles while a program is lowered, which no cache of compiled programs saves: what
    was called in one layer as in another is lowered once.
    """
    outs = tuple(out_shape) if isinstance(out_shape, list) else out_shape
    words, aliases = sorted(kernel.keywords.items()), sorted((input_output_aliases or {}).items())
    what = _Call(kernel.func, tuple(words), grid, outs, tuple(aliases), INTERPRET)
    return functools.partial(_once, what)


@functools.partial(jax.jit, static_argnums=0)
def _once(what: _Call, *args: Array) -> Any:
    kernel = functools.partial(what.function, **dict(what.keywords))
    options = {"input_output_aliases": dict(what.aliases)}
    return call_in_blocks(kernel, what.grid, what.out_shape, **options)(*args)


def call_in_blocks(kernel: Any, grid: tuple[int, ...], out_shape: Any, **options: Any) -> Any:
    """`pallas_call` for Triton, with blocks of arguments and results as `options` say."""
    if triton and not INTERPRET:
        options["compiler_params"] = triton.CompilerParams(num_warps=4, num_stages=3)
    return pl.pallas_call(kernel, grid=grid, out_shape=out_shape, interpret=INTERPRET, **options)


def exact_dot(a: Array, b: Array, trans_a: bool = False) -> Array:
    """In a kernel, a product of float32 matrices as exact as float32's: in three parts on tensor
    cores, which take a quarter of the time. (A CPU has no such parts.)"""
    parts = jax.lax.DotAlgorithmPreset.TF32_TF32_F32_X3
    precision = jax.lax.Precision.HIGHEST if INTERPRET else parts
    sides = ((0,) if trans_a else (1,), (0,))
    return jax.lax.dot_general(a, b, (sides, ((), ())), precision, jnp.float32)


def places(first: int | Array, width: int) -> Array:
    """In a kernel, places `first`, `first` + 1, ..., int32 [width]."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (width,), 0)


def columns(first: int | Array, width: int) -> Array:
    """Places `first`, `first` + 1, ... [1, width] beside others that are reckoned: of these and of
    slices together Pallas' interpreter takes none."""
    return first + jax.lax.broadcasted_iota(jnp.int32, (1, width), 1)


def masked(place: Array, mask: Array) -> Array:
    """Places of a store: where it has none, one that Pallas' interpreter drops."""
    return jnp.where(mask, place, 1 << 30)


def load(ref: Any, mask: Array, shape: tuple[int, ...] | None = None) -> Array:
    """What there is of `ref`, zeros elsewhere; `mask` is one a row where `shape` is given."""
    if shape is not None:
        mask = jnp.broadcast_to(mask[:, None], shape)
    return triton.load(ref, mask=mask, other=0)


def store(ref: Any, x: Array, mask: Array) -> None:
    """Writes the rows of x [n, width] for which `mask` [n] holds, in ref's dtype."""
    triton.store(ref, x.astype(ref.dtype), mask=jnp.broadcast_to(mask[:, None], x.shape))


def turned(low: Array, high: Array, cos: Array, sin: Array) -> tuple[Array, Array]:
    """`Rope.rotate` of both halves of vectors, which a kernel loads one by one."""
    return low * cos - high * sin, high * cos + low * sin
