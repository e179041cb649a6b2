"""Products of one row with a large kernel as Triton kernels (Pallas): what a GEMM does not fuse.

A program sums a few rows of a kernel [out, in]; the norm before, and what is done to the outputs
behind, are part of it. JAX deprecates Pallas' Triton backend: `fused` has XLA's form beside it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float

from freqkv_jax import nvidia
from freqkv_jax.nvidia import triton

WIDTH = 1024  # columns that a program reads at a time
PROGRAMS = 264  # at least, where a kernel has so many rows: two for each processor of a Hopper
MOST_ROWS = 4

Finish = Callable[..., Sequence[Array]]


def normed_pairs(
    x: Float[Array, "E"],
    norm: Float[Array, "E"],
    eps: float,
    rows: Float[Array, "F E"],
    pairs: tuple[int, int, int],
    finish: Finish,
    extras: Sequence[Float[Array, "a b"]] = (),
) -> Float[Array, "a n b"]:
    """RMSNorm(x) times a kernel with outputs `pairs` [a, 2, b], finished; in x's dtype.

    Args:
      finish: makes n arrays of one shape of both float32 outputs of some pairs, and of what
        `extras` say of these. Elementwise: it sees a part of [a, b] at a time.
    """
    many, _, out = pairs
    size = _rows(out, many)
    pair = jax.ShapeDtypeStruct((many, out), jnp.float32)
    num_out = len(jax.eval_shape(finish, pair, pair, *extras))
    whole = pl.BlockSpec((x.size,), lambda i, j: (0,))
    some = pl.BlockSpec((None, size), lambda i, j: (i, j))
    half = (None, None, size, x.size)
    halves = [
        pl.BlockSpec(half, lambda i, j: (i, 0, j, 0)),
        pl.BlockSpec(half, lambda i, j: (i, 1, j, 0)),
    ]
    rows = rows.reshape(*pairs, x.size)
    return nvidia.call_in_blocks(
        functools.partial(_pairs, finish=finish, eps=eps),
        (many, out // size),
        jax.ShapeDtypeStruct((many, num_out, out), x.dtype),
        in_specs=[whole, whole, *halves, *[some] * len(extras)],
        out_specs=pl.BlockSpec((None, num_out, size), lambda i, j: (i, 0, j)),
    )(x, norm, rows, rows, *extras)


def _pairs(
    x_ref: Any,
    norm_ref: Any,
    first_ref: Any,
    second_ref: Any,
    *refs: Any,
    finish: Finish,
    eps: float,
) -> None:
    """One program's pairs: `first_ref`, `second_ref` [size, E], extras [size], out [n, size]."""
    size, width = first_ref.shape
    zeros = jnp.zeros((size, _width(width)), jnp.float32)

    def part(index: Any, carry: Any) -> Any:
        first, second, squares = carry
        here, inside = _here(index, width)
        x = _wide(x_ref.at[here], inside)
        y = (x * _wide(norm_ref.at[here], inside))[None]
        mask = jnp.broadcast_to(inside[None], zeros.shape)
        first = first + _wide(first_ref.at[:, here], mask) * y
        second = second + _wide(second_ref.at[:, here], mask) * y
        return first, second, squares + x * x

    carry = zeros, zeros, jnp.zeros(zeros.shape[1], jnp.float32)
    first, second, squares = _over(width, part, carry)
    rate = jax.lax.rsqrt(jnp.sum(squares) / width + eps)
    first, second = jnp.sum(first, axis=1) * rate, jnp.sum(second, axis=1) * rate
    *extra_refs, out_ref = refs
    extras = [ref[...] for ref in extra_refs]
    for place, value in enumerate(finish(first, second, *extras)):
        out_ref[place, :] = value.astype(out_ref.dtype)


def plus_product(
    x: Float[Array, "E"],
    rows: Float[Array, "E F"],
    y: Float[Array, "F"],
) -> Float[Array, "E"]:
    """x + y @ kernel, in x's dtype."""
    size = _rows(x.size, 1)
    some = pl.BlockSpec((size,), lambda i: (i,))
    return nvidia.call_in_blocks(
        _plus,
        (x.size // size,),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[
            some,
            pl.BlockSpec((size, y.size), lambda i: (i, 0)),
            pl.BlockSpec((y.size,), lambda i: (0,)),
        ],
        out_specs=some,
    )(x, rows, y)


def _plus(x_ref: Any, rows_ref: Any, y_ref: Any, out_ref: Any) -> None:
    """One program's outputs: `x_ref`, `out_ref` [size], `rows_ref` [size, F]."""
    size, width = rows_ref.shape
    zeros = jnp.zeros((size, _width(width)), jnp.float32)

    def part(index: Any, total: Array) -> Array:
        here, inside = _here(index, width)
        y = _wide(y_ref.at[here], inside)[None]
        return total + _wide(rows_ref.at[:, here], jnp.broadcast_to(inside[None], zeros.shape)) * y

    product = jnp.sum(_over(width, part, zeros), axis=1)
    out_ref[...] = (x_ref[...].astype(jnp.float32) + product).astype(out_ref.dtype)


def _width(width: int) -> int:
    return min(WIDTH, pl.next_power_of_2(width))


def _here(index: Any, width: int) -> tuple[Any, Array]:
    """The columns of part `index`, and which of them there are."""
    size = _width(width)
    columns = nvidia.places(index * size, size)
    return pl.ds(index * size, size), columns < width


def _over(width: int, part: Callable[[Any, Any], Any], carry: Any) -> Any:
    parts = -(-width // _width(width))
    return part(0, carry) if parts == 1 else jax.lax.fori_loop(0, parts, part, carry)


def _wide(ref: Any, mask: Array) -> Array:
    return triton.load(ref, mask=mask, other=0).astype(jnp.float32)


def _rows(out: int, many: int) -> int:
    """Outputs of a program: a power of two that divides them."""
    size = 1
    while size < MOST_ROWS and out % (2 * size) == 0 and many * out // (2 * size) >= PROGRAMS:
        size *= 2
    return size
