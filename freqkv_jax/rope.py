"""Rotary position embedding: frequencies (plain, linear, llama3) and half-split rotation."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from freqkv_jax.config import RopeConfig


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """Radians a position for each of the head_dim/2 planes, float32.

    Rounded to float32 where Hugging Face rounds: the last bit matters, since it is multiplied by
    positions in the thousands.
    """
    exponent = np.arange(0, head_dim, 2, dtype=np.float32) / np.float32(head_dim)
    # NumPy's own float32 power is off by a bit here and there; rounded from float64 it is not.
    power = np.power(rope.theta, exponent.astype(np.float64)).astype(np.float32)
    freq = np.float32(1) / power
    if rope.rope_type == "linear":
        return (freq / np.float32(rope.factor)).astype(np.float32)
    if rope.rope_type == "llama3":
        return _llama3_frequencies(rope, freq)
    return freq


def _llama3_frequencies(rope: RopeConfig, freq: np.ndarray) -> np.ndarray:
    """Llama 3.1's rule: long waves are slowed by `factor`, short ones kept, a ramp between."""
    assert rope.factor and rope.low_freq_factor and rope.high_freq_factor
    assert rope.original_max_position_embeddings
    # Operation by operation as Hugging Face's torch code rounds (a number over a tensor is the
    # number times the rounded reciprocal there), so that the frequencies agree to the last bit.
    one, factor = np.float32(1), np.float32(rope.factor)
    low, high = np.float32(rope.low_freq_factor), np.float32(rope.high_freq_factor)
    wavelength = one / freq * np.float32(2 * math.pi)
    turns = one / wavelength * np.float32(rope.original_max_position_embeddings)
    ramp = np.clip((turns - low) / (high - low), 0, 1).astype(np.float32)
    return (one - ramp) * freq / factor + ramp * freq


class Rope:
    """The rotation of one model: angles from positions, and vectors turned by angles."""

    def __init__(self, rope: RopeConfig, head_dim: int) -> None:
        self.frequencies = inverse_frequencies(rope, head_dim)

    def angles(self, positions: Int[Array, "*n"]) -> Float[Array, "*n half"]:
        """Float32 angles of shape positions.shape + [D/2]."""
        freq = jnp.asarray(self.frequencies).reshape((1,) * positions.ndim + (-1,))
        return positions[..., None].astype(jnp.float32) * freq

    def turns(self, positions: Int[Array, "*n"]) -> tuple[Array, Array]:
        """Cosine and sine of `angles`."""
        angles = self.angles(positions)
        return jnp.cos(angles), jnp.sin(angles)

    @staticmethod
    def rotate(x: Array, angles: Array, inverse: bool = False) -> Array:
        """Turns x [..., D] by angles [..., D/2] (same rank); float32 inside, x's dtype out.

        `inverse` turns back. Plane i is the pair (x[i], x[i + D/2]), as in Hugging Face.
        """
        cos, sin = jnp.cos(angles), jnp.sin(-angles if inverse else angles)
        first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
        turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
        return turned.astype(x.dtype)

    def rotate_tokens(self, x: Array, positions: Array) -> Array:
        """Turns x [..., T, heads, D] by positions [..., T] (leading axes broadcast)."""
        angles = self.angles(positions)[..., None, :]
        return self.rotate(x, angles.reshape((1,) * (x.ndim - angles.ndim) + angles.shape))

    def rotate_slots(self, x: Array, inverse: bool = False) -> Array:
        """Turns x [..., n, D], entry j at position j."""
        angles = self.angles(jnp.arange(x.shape[-2]))
        return self.rotate(x, angles.reshape((1,) * (x.ndim - 2) + angles.shape), inverse)
