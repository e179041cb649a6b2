"""Low-pass resampling of a sequence: orthonormal DCT-II, first coefficients, inverse DCT."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from freqkv_jax import folding

METHODS = ("matmul", "fft")


def _dirichlet(x: np.ndarray, terms: int) -> np.ndarray:
    """1 + 2 cos(x) + ... + 2 cos((terms - 1) x), in closed form."""
    half = np.sin(x / 2)
    flat = np.abs(half) < 1e-12
    ratio = np.sin((terms - 0.5) * x) / np.where(flat, 1.0, half)
    return np.where(flat, 2.0 * terms - 1.0, ratio)


def lowpass_matrix(span: int, keep: int) -> np.ndarray:
    """The map of one compression as a matrix, float64 [keep, span].

    Orthonormal DCT-II over `span` entries, the first `keep` coefficients, orthonormal inverse DCT
    of length `keep`, times sqrt(keep / span) (the authors' code; arXiv 2505.00570, section 3).
    The product of the two cosine matrices is a sum of cosines over the kept frequencies, which
    has the closed form used here. Rows sum to 1, every singular value is sqrt(keep / span), and
    M[keep-1-i, span-1-j] = M[i, j].
    """
    _check_keep(span, keep)
    if keep == 0:
        return np.zeros((0, span))
    out = np.pi * (2 * np.arange(keep)[:, None] + 1) / (2 * keep)
    at = np.pi * (2 * np.arange(span)[None, :] + 1) / (2 * span)
    return (_dirichlet(out - at, keep) + _dirichlet(out + at, keep)) / (2 * span)


@functools.lru_cache(maxsize=4)
def folded_lowpass(span: int, keep: int) -> tuple[np.ndarray, np.ndarray]:
    """The same map in two halves, float64 [ceil(keep/2), ceil(span/2)] and the floors of both.

    A centrosymmetric matrix maps the even part of its input to the even part of its output and
    the odd part to the odd part, so two matrices of a quarter of the size do all of its work.
    """
    matrix = lowpass_matrix(span, keep)
    rows, cols = (keep + 1) // 2, (span + 1) // 2
    left, right = matrix[:rows, :cols], matrix[:rows, ::-1][:, :cols]
    even, odd = left + right, left - right
    if span % 2:
        even[:, -1] /= 2  # the middle entry is its own mirror image, so it is added twice
    return even, odd[: keep // 2, : span // 2]


def stacked_lowpass(span: int, keep: int) -> np.ndarray:
    """Both halves of `folded_lowpass`, over 2, as one array for one batched product.

    Float64 [2, rows, cols]: zeros lie around the halves where a little more makes the sizes
    multiples of what matrix units like (1023 x 2046 becomes 1024 x 2048).
    """
    halves = folded_lowpass(span, keep)
    stacked = np.zeros((2, *(_aligned(size) for size in halves[0].shape)))
    for place, half in zip(stacked, halves, strict=True):
        place[: half.shape[0], : half.shape[1]] = half / 2
    return stacked


def _aligned(size: int) -> int:
    """`size`, or the next multiple of 128, 64 or 8 if that is at most a sixteenth more."""
    ups = (-(-size // to) * to for to in (128, 64, 8))
    return next((up for up in ups if up - size <= size // 16), size)


def dct(x: Array, axis: int = -1) -> Array:
    """Orthonormal DCT-II along `axis` by `jnp.fft` (Makhoul's even-odd reordering). Real in/out."""
    n = x.shape[axis]
    x = jnp.moveaxis(x, axis, -1)
    spectrum = jnp.fft.fft(jnp.concatenate([x[..., ::2], x[..., 1::2][..., ::-1]], axis=-1))
    turn = _phases(n, -1, x.dtype).reshape((1,) * (x.ndim - 1) + (n,))
    return jnp.moveaxis((spectrum * turn).real * _norms(n, x), -1, axis)


def idct(x: Array, axis: int = -1) -> Array:
    """Inverse of `dct` along `axis`."""
    n = x.shape[axis]
    x = jnp.moveaxis(x, axis, -1)
    x = x / _norms(n, x)
    mirrored = jnp.concatenate([jnp.zeros_like(x[..., :1]), x[..., 1:][..., ::-1]], axis=-1)
    turn = _phases(n, 1, x.dtype).reshape((1,) * (x.ndim - 1) + (n,))
    halves = jnp.fft.ifft(jax.lax.complex(x, -mirrored) * turn).real
    evens, odds = halves[..., : (n + 1) // 2], halves[..., ::-1][..., : n // 2]
    odds = jnp.concatenate([odds, jnp.zeros_like(evens[..., : n % 2])], axis=-1)
    woven = jnp.stack([evens, odds], axis=-1).reshape(*x.shape[:-1], -1)[..., :n]
    return jnp.moveaxis(woven, -1, axis)


def _phases(n: int, sign: int, dtype: jnp.dtype) -> Array:
    turn = np.exp(sign * 1j * np.pi * np.arange(n) / (2 * n))
    return jnp.asarray(turn.astype(np.complex128 if dtype == jnp.float64 else np.complex64))


def _norms(n: int, x: Array) -> Array:
    norms = np.full(n, np.sqrt(2 / n))
    norms[0] = np.sqrt(1 / n)
    return jnp.asarray(norms, x.dtype).reshape((1,) * (x.ndim - 1) + (n,))


def lowpass_fft(x: Array, keep: int, axis: int) -> Array:
    """The readable form of the map: dct, cut, idct, scale. Float32 inside (float64 for float64)."""
    span = x.shape[axis]
    x = jnp.moveaxis(x, axis, -1).astype(_work_dtype(x.dtype))
    if keep:
        x = idct(dct(x)[..., :keep]) * jnp.asarray((keep / span) ** 0.5, x.dtype)
    return jnp.moveaxis(x[..., :keep], -1, axis)


def compress(x: Float[Array, "..."], keep: int, axis: int = -2, method: str = "matmul") -> Array:
    """Resamples `x` along `axis` from n entries to `keep`, keeping the lowest frequencies.

    Args:
      x: any float dtype and shape; n = x.shape[axis].
      keep: entries of the result, 0 <= keep <= n; keep = n returns x.
      axis: the sequence axis.
      method: "matmul" (even/odd folded matrix) or "fft". Inside your own jit the matrix becomes a
        constant of the program (2 n keep bytes): for n in the thousands prefer "fft" there, or
        the models here, which pass their matrices as arguments.

    Returns:
      x's dtype, n replaced by keep. Computed in float32 (float64 for float64).

    Raises:
      ValueError: keep out of range, unknown method, not a floating dtype.

    Source: arXiv 2505.00570, section 3; the factor sqrt(keep / n) as in the authors' code.
    """
    x = jnp.asarray(x)
    if not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"compress takes floating-point arrays, got {x.dtype}; cast it first")
    if not -x.ndim <= axis < x.ndim:
        raise ValueError(f"axis {axis} is out of range for an array of shape {x.shape}")
    span = x.shape[axis]
    check_method(method)
    _check_keep(span, keep)
    if keep == span:
        return x
    wide = x.astype(_work_dtype(x.dtype))
    if method == "fft" or keep == 0:
        return lowpass_fft(wide, keep, axis).astype(x.dtype)
    stacked = jnp.asarray(stacked_lowpass(span, keep), wide.dtype)
    return folding.fold_matmul(stacked, wide, keep, axis).astype(x.dtype)


def check_method(method: str) -> None:
    """ValueError unless `method` names a form of the map."""
    if method not in METHODS:
        raise ValueError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")


def _work_dtype(dtype: jnp.dtype) -> jnp.dtype:
    # Not promote_types, which a program under strict promotion refuses.
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _check_keep(span: int, keep: int) -> None:
    whole = isinstance(keep, (int, np.integer)) and not isinstance(keep, bool)
    if not whole:
        raise ValueError(f"keep must be a whole number, got {keep!r}")
    if not 0 <= keep <= span:
        raise ValueError(f"need 0 <= keep <= n, got keep={keep}, n={span}")
