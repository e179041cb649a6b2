"""The low-pass as a folded product: a span as sums and differences of its halves, and back.

On NVIDIA the sums are told to XLA in another way (the forms called `cuda`): joins and pads
become branches in its kernels, which then load number by number. Places that are reckoned, and
signs that are multiplied, load in wide words: 105 instructions for four numbers of a fold in place
of 632 (docs/performance_log.md). The gradients are those of the plain way. For the usual
sizes `kv.folding_cuda` has kernels in their place; these here are for the rest.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from freqkv_jax.rope import Rope

MAPPED = "mapped entries"  # the name by which rematerialisation knows what the product gives


def fold_matmul(stacked: Float[Array, "2 rows cols"], x: Array, keep: int, axis: int) -> Array:
    """Applies the map of `spectral.stacked_lowpass` along `axis`, in x's dtype."""
    x = jnp.moveaxis(x, axis, 0)
    half = (x.shape[0] + 1) // 2
    halves = product(stacked, fold([x[:half]], [x[::-1][:half]], stacked.shape[2]))
    return jnp.moveaxis(unfold(halves[:, :, 0], keep), 0, axis)


def fold(lows: Sequence[Array], highs: Sequence[Array], cols: int) -> Array:
    """Even and odd part of spans of one shape, [2, cols, spans, ...] with zeros behind both.

    lows, highs: their first halves and their second ones, which run backwards, [ceil(n/2), ...]; a
    middle entry is in both. The sums are float32 (or float64), the result is in their dtype.
    """
    folded = []
    for low, high in zip(lows, highs, strict=True):
        low_wide, high_wide = _wide(low), _wide(high)
        parts = jnp.stack([low_wide + high_wide, low_wide - high_wide])
        folded.append(parts.astype(low.dtype))
    halves = jnp.stack(folded, axis=2)
    more = cols - halves.shape[1]
    return jnp.pad(halves, ((0, 0), (0, more)) + ((0, 0),) * (halves.ndim - 2))


def product(stacked: Float[Array, "2 rows cols"], folded: Array) -> Array:
    """Even and odd part of the results, [2, rows, ...], from those of the spans [2, cols, ...].

    All spans go through one product: XLA would join products that share the map anyhow, but by
    copies of what goes in, what comes out, and the gradients.
    """
    dtype = folded.dtype
    # float32 must be float32 on a GPU or TPU too, where the default is tf32 or bfloat16.
    wide = dtype in (jnp.float32, jnp.float64)
    precision = jax.lax.Precision.HIGHEST if wide else jax.lax.Precision.DEFAULT
    # Half precision is rounded here already: units add in float32, and float32 halves would be
    # twice the bytes to write and to keep for the backward pass.
    halves = jax.lax.dot_general(
        stacked.astype(dtype),
        folded,
        (((2,), (1,)), ((0,), (0,))),
        precision=precision,
        preferred_element_type=dtype,
    )
    return checkpoint_name(halves, MAPPED)


def unfold(halves: Array, keep: int) -> Array:
    """A result [keep, ...]: entries i and keep-1-i are sum and difference of its parts."""
    even, odd = _wide(halves[0]), _wide(halves[1])
    first, last = (even + odd)[: (keep + 1) // 2], (even - odd)[: keep // 2]
    return jnp.concatenate([first, last[::-1]]).astype(halves.dtype)


def fold_parts(lows: tuple[Array, Array], raw: tuple[Array, Array], cols: int) -> Array:
    """`fold` of the two spans [low | raw], all parts of one length."""
    keep = raw[0].shape[0]

    def plain(*parts: Array) -> Array:
        return fold(parts[:2], [part[::-1] for part in parts[2:]], cols)

    def cuda(*parts: Array) -> Array:
        place = _places(keep, cols)
        return _signed(_picked(parts[:2], place), parts[2:], place, keep)

    return linear_forms(plain, cuda, *lows, *raw)


def refold(halves: Array, raw: tuple[Array, Array], cols: int) -> Array:
    """`fold` of the two spans [unfolded halves | raw], all parts of one length."""
    keep = raw[0].shape[0]

    def plain(halves: Array, *raw: Array) -> Array:
        lows = [unfold(halves[:, :, i], keep) for i in range(2)]
        return fold(lows, [part[::-1] for part in raw], cols)

    def cuda(halves: Array, *raw: Array) -> Array:
        place = _places(keep, cols)
        low = _entries_at(halves, place, keep).astype(halves.dtype)
        return _signed(low, raw, place, keep)

    return linear_forms(plain, cuda, halves, *raw)


def _places(keep: int, cols: int) -> Array:
    # What stands behind the span meets zeros of the map: any entry will do.
    return jnp.minimum(jnp.arange(cols, dtype=jnp.int32), keep - 1)


def _signed(low: Array, raw: Sequence[Array], place: Array, keep: int) -> Array:
    low_wide, high = _wide(low), _wide(_picked(raw, keep - 1 - place))
    signs = jnp.asarray([1, -1], high.dtype).reshape(2, *([1] * low.ndim))
    return (low_wide[None] + signs * high[None]).astype(low.dtype)


def _picked(pair: Sequence[Array], place: Array) -> Array:
    """Both arrays' entries at some places, side by side on a new axis 1."""
    first, second = (jnp.take(x, place, axis=0, mode="clip")[:, None] for x in pair)
    shape = (first.shape[0], 2, *first.shape[2:])
    # Chosen, not joined: both stand in the cache of the kernel's processor.
    which = jax.lax.broadcasted_iota(jnp.int32, shape, 1)
    return jnp.where(which == 0, first, second)


def entries_turned(halves: Array, keep: int, rope: Rope | None, first: int = 0) -> Array:
    """`unfold`; as keys [keep, B, K, D] turned to the slots from `first` on, if `rope` is given."""

    def angles() -> Array:
        assert rope is not None  # and traced where it is used: no function closes over an array
        return rope.angles(first + jnp.arange(keep, dtype=jnp.int32))[:, None, None, :]

    def plain(halves: Array) -> Array:
        entries = unfold(halves, keep)
        return entries if rope is None else rope.rotate(entries, angles())

    def cuda(halves: Array) -> Array:
        place = jnp.arange(keep, dtype=jnp.int32)
        entries = _entries_at(halves, place, keep).astype(halves.dtype)
        return entries if rope is None else _turned(entries, angles())

    return linear_forms(plain, cuda, halves)


def _turned(x: Array, angles: Array) -> Array:
    """`Rope.rotate` without a join of the two halves."""
    planes = _wide(x).reshape(*x.shape[:-1], 2, -1)
    angles = angles[..., None, :]
    signs = jnp.asarray([-1, 1], planes.dtype).reshape(*([1] * (planes.ndim - 2)), 2, 1)
    turned = planes * jnp.cos(angles) + jnp.flip(planes, -2) * (signs * jnp.sin(angles))
    return turned.reshape(x.shape).astype(x.dtype)


def _entries_at(halves: Array, place: Array, keep: int) -> Array:
    """`unfold` at some places, not rounded."""
    mirrored = jnp.minimum(place, keep - 1 - place)
    even, odd = (jnp.take(_wide(half), mirrored, axis=0, mode="clip") for half in halves)
    signs = jnp.where(place < (keep + 1) // 2, 1, -1).astype(even.dtype)
    return even + signs.reshape(-1, *([1] * (even.ndim - 1))) * odd


def linear_forms(plain: Callable[..., Array], cuda: Callable[..., Array], *args: Array) -> Array:
    """A linear function of `args` told in two ways, the second one for NVIDIA.

    Neither may close over a traced array: the derivative is taken when that is gone.

    Derivatives are of the first, so that its transposed form is a sum of slices.
    """

    @jax.custom_jvp
    def form(*args: Array) -> Array:
        return jax.lax.platform_dependent(*args, cuda=cuda, default=plain)

    @form.defjvp
    def _(primals: Any, tangents: Any) -> tuple[Array, Array]:
        return form(*primals), plain(*tangents)

    return form(*args)


def _wide(x: Array) -> Array:
    # Not promote_types, which a program under strict promotion refuses.
    return x.astype(jnp.float64 if x.dtype == jnp.float64 else jnp.float32)
