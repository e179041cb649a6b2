"""The parts of a decoder layer that know nothing of a cache: products, norms, MLP, embedding."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array

from freqkv_jax import sharding
from freqkv_jax.config import LlamaConfig
from freqkv_jax.sharding import P

COLUMNS, ROWS = P("fsdp", "tensor"), P("tensor", "fsdp")  # of kernels [in, out]


class Linear(nn.Module):
    """x @ kernel in the compute dtype, float32 kept exact on every platform.

    Where the collection "lora" has a and b for it, (x @ a) @ b is added (freqkv_jax.model.lora).
    In a fused tree (freqkv_jax.model.fused) the kernel is `rows` [out, in].
    `spec`: how the kernel lies on a mesh, as sharding.RULES have it.
    """

    features: int
    dtype: str
    spec: P = COLUMNS

    @nn.compact
    def __call__(self, x: Array, out_dtype: Any = None) -> Array:
        if self.has_variable("params", "rows"):
            return self._rows_product(x, out_dtype or x.dtype)
        shape = (x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.lecun_normal(), shape, jnp.dtype(self.dtype))
        # For few tokens (decoding) the compiler may rather move them than the weights.
        many = x.size > kernel.size
        kernel = kernel.astype(x.dtype)
        y = matmul(x, sharding.gathered(kernel, self.spec) if many else kernel, out_dtype)
        if self.has_variable("lora", "a"):
            a, b = (self.get_variable("lora", name).astype(x.dtype) for name in "ab")
            if many:  # small, as their gradients are
                a = sharding.whole(a, P(self.spec[0], None))
                b = sharding.whole(b, P(None, self.spec[1]))
            y = y + matmul(matmul(x, a), b, out_dtype)
        return y

    def _rows_product(self, x: Array, out_dtype: Any) -> Array:
        kernel = self.get_variable("params", "rows").astype(x.dtype).T
        if not self.has_variable("params", "scale"):
            return matmul(x, kernel, out_dtype)
        return scaled(
            matmul(x, kernel, jnp.float32), self.get_variable("params", "scale"), out_dtype
        )


def matmul(x: Array, kernel: Array, out_dtype: Any = None) -> Array:
    """x [..., in] @ kernel [in, out], accumulated in float32; in x's dtype or `out_dtype`."""
    # On GPU and TPU the default for float32 is tf32 or bfloat16, which is not float32.
    precision = jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return jax.lax.dot_general(
        x,
        kernel,
        (((x.ndim - 1,), (0,)), ((), ())),
        precision=precision,
        preferred_element_type=out_dtype or x.dtype,
    )


def scaled(y: Array, scale: Array, dtype: Any) -> Array:
    """y [..., out] of an int8 kernel times the factors of its outputs."""
    return (y * scale.reshape((1,) * (y.ndim - 1) + (-1,))).astype(dtype)


class RMSNorm(nn.Module):
    """Root mean square norm, float32 inside."""

    eps: float
    dtype: str

    @nn.compact
    def __call__(self, x: Array) -> Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],), jnp.dtype(self.dtype))
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.eps)
        # Hugging Face rounds to the compute dtype before it scales.
        scale = scale.astype(x.dtype).reshape((1,) * (x.ndim - 1) + (-1,))
        return wide.astype(x.dtype) * scale


class MLP(nn.Module):
    """SwiGLU feed-forward."""

    config: LlamaConfig
    dtype: str

    def setup(self) -> None:
        self.gate = Linear(self.config.intermediate_size, self.dtype)
        self.up = Linear(self.config.intermediate_size, self.dtype)
        self.gate_up = Linear(2 * self.config.intermediate_size, self.dtype)  # of a fused tree
        self.down = Linear(self.config.hidden_size, self.dtype, ROWS)

    def __call__(self, x: Array) -> Array:
        if self.has_variable("params", "gate_up"):
            gate, up = jnp.split(self.gate_up(x), 2, axis=-1)
        else:
            gate, up = self.gate(x), self.up(x)
        return self.down(nn.silu(gate) * up)


class Embed(nn.Module):
    """Token embedding, and the head of a tied model."""

    config: LlamaConfig
    dtype: str

    def setup(self) -> None:
        shape = (self.config.vocab_size, self.config.hidden_size)
        init = nn.initializers.normal(0.02)
        self.embedding = self.param("embedding", init, shape, jnp.dtype(self.dtype))

    def __call__(self, tokens: Array, gather: bool = False) -> Array:
        # Many rows: one gather of the table over fsdp, else all devices look up all rows.
        table = sharding.gathered_table(self.embedding, ROWS) if gather else self.embedding
        rows = jnp.take(table, tokens, axis=0).astype(jnp.dtype(self.dtype))
        if not self.has_variable("params", "scale"):
            return rows
        scale = jnp.take(self.get_variable("params", "scale"), tokens, axis=0)
        return (rows.astype(jnp.float32) * scale[..., None]).astype(rows.dtype)

    def logits(self, x: Array) -> Array:
        logits = matmul(x, self.embedding.astype(x.dtype).T, jnp.float32)
        if not self.has_variable("params", "scale"):
            return logits
        return scaled(logits, self.get_variable("params", "scale"), jnp.float32)
