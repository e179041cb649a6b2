"""Products of one row with a large kernel as Triton kernels (Pallas): what a GEMM does not fuse.

A program sums a few rows of a kernel [out, in]; the norm before, and what is done to the outputs
behind, are part of it. JAX deprecates Pallas' Triton backend: `fused` has XLA's form beside it.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Shaped

from freqkv_jax import nvidia
from freqkv_jax.nvidia import triton

PROGRAMS = 264  # at least, where a kernel has so many rows: two for each processor of a Hopper
MOST_PARTS = 16  # of a row, that are read without a loop


class Launch(NamedTuple):
    """How a kernel is cut: what an H200 read fastest of some 130 (docs/performance_log.md)."""

    width: int  # columns that a program reads at a time
    most_rows: int
    straight: bool  # whether the parts of a row are read without a loop, if they are few


def _pairs_launch(dtype: Any) -> Launch:
    return Launch(4096 if dtype == jnp.int8 else 1024, 4, True)


def _plus_launch(dtype: Any) -> Launch:
    return Launch(1024, 1, True) if dtype == jnp.int8 else Launch(1024, 4, False)


Finish = Callable[..., Sequence[Array]]


def normed_pairs(
    x: Float[Array, "E"],
    norm: Float[Array, "E"],
    eps: float,
    rows: Shaped[Array, "F E"],
    pairs: tuple[int, int, int],
    finish: Finish,
    extras: Sequence[Float[Array, "a b"]] = (),
    scale: Float[Array, "F"] | None = None,
) -> Float[Array, "a n b"]:
    """scale * (RMSNorm(x) @ kernel), with outputs `pairs` [a, 2, b], finished; in x's dtype.

    Args:
      finish: makes n arrays of one shape of both float32 outputs of some pairs, and of what
        `extras` say of these. Elementwise: it sees a part of [a, b] at a time.
    """
    if scale is not None:
        finish = functools.partial(_scaled, finish)
        extras = (*jnp.moveaxis(scale.reshape(pairs), 1, 0), *extras)
    many, _, out = pairs
    launch = _pairs_launch(rows.dtype)
    size = _rows(out, many, launch.most_rows)
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
        functools.partial(_pairs, finish=finish, eps=eps, launch=launch),
        (many, out // size),
        jax.ShapeDtypeStruct((many, num_out, out), x.dtype),
        in_specs=[whole, whole, *halves, *[some] * len(extras)],
        out_specs=pl.BlockSpec((None, num_out, size), lambda i, j: (i, 0, j)),
    )(x, norm, rows, rows, *extras)


def _scaled(
    finish: Finish, first: Array, second: Array, one: Array, other: Array, *extras: Array
) -> Sequence[Array]:
    return finish(first * one, second * other, *extras)


def _pairs(
    x_ref: Any,
    norm_ref: Any,
    first_ref: Any,
    second_ref: Any,
    *refs: Any,
    finish: Finish,
    eps: float,
    launch: Launch,
) -> None:
    """One program's pairs: `first_ref`, `second_ref` [size, E], extras [size], out [n, size]."""
    size, width = first_ref.shape
    columns = _columns(width, launch)
    zeros = jnp.zeros((size, columns), jnp.float32)

    def part(index: Any, carry: Any) -> Any:
        first, second, squares = carry
        here, inside = _here(index, columns, width)
        x = _wide(x_ref.at[here], inside)
        y = (x * _wide(norm_ref.at[here], inside))[None]
        mask = jnp.broadcast_to(inside[None], zeros.shape)
        first = first + _wide(first_ref.at[:, here], mask) * y
        second = second + _wide(second_ref.at[:, here], mask) * y
        return first, second, squares + x * x

    carry = zeros, zeros, jnp.zeros(columns, jnp.float32)
    first, second, squares = _over(width, columns, part, carry, launch.straight)
    rate = jax.lax.rsqrt(jnp.sum(squares) / width + eps)
    first, second = jnp.sum(first, axis=1) * rate, jnp.sum(second, axis=1) * rate
    *extra_refs, out_ref = refs
    extras = [ref[...] for ref in extra_refs]
    for place, value in enumerate(finish(first, second, *extras)):
        out_ref[place, :] = value.astype(out_ref.dtype)


def plus_product(
    x: Float[Array, "E"],
    rows: Shaped[Array, "E F"],
    y: Float[Array, "F"],
    scale: Float[Array, "E"] | None = None,
) -> Float[Array, "E"]:
    """x + scale * (y @ kernel), in x's dtype."""
    launch = _plus_launch(rows.dtype)
    size = _rows(x.size, 1, launch.most_rows)
    some = pl.BlockSpec((size,), lambda i: (i,))
    scales = () if scale is None else (scale,)
    return nvidia.call_in_blocks(
        functools.partial(_plus, launch=launch),
        (x.size // size,),
        jax.ShapeDtypeStruct(x.shape, x.dtype),
        in_specs=[
            some,
            pl.BlockSpec((size, y.size), lambda i: (i, 0)),
            pl.BlockSpec((y.size,), lambda i: (0,)),
            *[some] * len(scales),
        ],
        out_specs=some,
    )(x, rows, y, *scales)


def _plus(x_ref: Any, rows_ref: Any, y_ref: Any, *refs: Any, launch: Launch) -> None:
    """One program's outputs: `x_ref`, the scale if any, out [size], `rows_ref` [size, F]."""
    *scale_refs, out_ref = refs
    size, width = rows_ref.shape
    columns = _columns(width, launch)
    zeros = jnp.zeros((size, columns), jnp.float32)

    def part(index: Any, total: Array) -> Array:
        here, inside = _here(index, columns, width)
        y = _wide(y_ref.at[here], inside)[None]
        return total + _wide(rows_ref.at[:, here], jnp.broadcast_to(inside[None], zeros.shape)) * y

    product = jnp.sum(_over(width, columns, part, zeros, launch.straight), axis=1)
    for scale_ref in scale_refs:
        product = product * scale_ref[...]
    out_ref[...] = (x_ref[...].astype(jnp.float32) + product).astype(out_ref.dtype)


def _columns(width: int, launch: Launch) -> int:
    return min(launch.width, pl.next_power_of_2(width))


def _here(index: Any, columns: int, width: int) -> tuple[Any, Array]:
    """The columns of part `index`, and which of them there are."""
    return pl.ds(index * columns, columns), nvidia.places(index * columns, columns) < width


def _over(
    width: int, columns: int, part: Callable[[Any, Any], Any], carry: Any, straight: bool
) -> Any:
    parts = -(-width // columns)
    if parts > 1 and not (straight and parts <= MOST_PARTS):
        return jax.lax.fori_loop(0, parts, part, carry)
    for index in range(parts):
        # Pallas lets no place that it knows lead out of the columns, though these are masked.
        past = parts > 1 and (index + 1) * columns > width
        carry = part(index + 0 * pl.program_id(0) if past else index, carry)
    return carry


def _wide(ref: Any, mask: Array) -> Array:
    return triton.load(ref, mask=mask, other=0).astype(jnp.float32)


def _rows(out: int, many: int, most: int) -> int:
    """Outputs of a program: a power of two that divides them."""
    size = 1
    while size < most and out % (2 * size) == 0 and many * out // (2 * size) >= PROGRAMS:
        size *= 2
    return size
