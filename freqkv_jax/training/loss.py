"""The training loss: summed -log p of the tokens that count, without [B, T, V] logits.

The head and the loss go through the sequence in blocks. Where gradients are wanted, a block's are
made together with its loss, so that no logits are kept and none are made twice.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import BATCH_AXES, P, constrain

# Float32 logits that one device holds at once (256 MiB).
LOGITS_AT_ONCE = 1 << 26


def sum_loss(
    model: Llama,
    variables: dict[str, Any],
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    logits_at_once: int = LOGITS_AT_ONCE,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """(sum of -log p(token | tokens before it) over the tokens in `mask`, their number).

    Args:
      mask: which tokens count as predicted; the first of a row never does.
      logits_at_once: bound on the float32 logits a device holds; the result does not change.

    Returns:
      Two float32 scalars; divide sums by sums to average over any number of batches.
    """
    hidden = model.apply(variables, tokens, method="hidden")
    # The last position predicts nothing. It is read all the same: an even length is faster.
    targets = jnp.pad(tokens[:, 1:], ((0, 0), (0, 1)))
    weights = jnp.pad(mask[:, 1:], ((0, 0), (0, 1))).astype(jnp.float32)
    params = variables["params"]
    tied = model.config.tie_word_embeddings
    head = params["embed"]["embedding"].T if tied else params["lm_head"]["kernel"]
    blocks = _num_blocks(tokens.shape, model.config.vocab_size, logits_at_once)
    with jax.named_scope("loss"):
        return _nll(head, hidden, targets, weights, blocks), jnp.sum(weights)


def _mesh_size() -> tuple[int, int]:
    """(devices, groups of rows) of the mesh that is set."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh is None or mesh.empty:
        return 1, 1
    return mesh.size, math.prod(mesh.shape.get(axis, 1) for axis in BATCH_AXES)


def _num_blocks(shape: tuple[int, ...], vocab_size: int, logits_at_once: int) -> int:
    batch, length = shape
    return min(length, -(-batch * length * vocab_size // (logits_at_once * _mesh_size()[0])))


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _nll(head: Array, hidden: Array, targets: Array, weights: Array, blocks: int) -> Array:
    return _run(head, hidden, targets, weights, blocks, False, False)[0]


def _run(
    head: Array,
    hidden: Array,
    targets: Array,
    weights: Array,
    blocks: int,
    want_hidden: bool,
    want_head: bool,
) -> tuple[Array, Array | None, Array | None]:
    """The loss, and its gradients for hidden [B, T, E] and head [E, V] where wanted."""
    batch, length, width = hidden.shape
    groups = _mesh_size()[1]
    groups = groups if batch % groups == 0 else 1
    size = -(-length // blocks)
    # Gathered here once, not in every block. Its gradient stays float32 where the head is.
    head = constrain(head.astype(hidden.dtype), P(None, "tensor"))
    xs = tuple(_cut(x, size, blocks) for x in (hidden, targets, weights))
    # Each group of rows sums its own part, so that devices meet once at the end.
    grad = None
    if want_head:
        grad = constrain(
            jnp.zeros((groups, width, head.shape[1]), jnp.float32), P(BATCH_AXES, None, "tensor")
        )

    def block(carry: Any, xs: Any) -> tuple[Any, Array | None]:
        total, grad = carry
        h, target, weight = xs
        logits = _dot(h, head, jnp.float32)
        ids = jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
        hit = ids == target[..., None]
        log_norm = jax.nn.logsumexp(logits, axis=-1)
        # A masked sum, not a gather: it stays local where the vocabulary is sharded.
        nll = log_norm - jnp.sum(jnp.where(hit, logits, 0.0), axis=-1)
        # Positions of weight 0 may hold anything, an infinity too.
        total = total + jnp.sum(jnp.where(weight > 0, nll * weight, 0.0))
        if not (want_hidden or want_head):
            return (total, grad), None
        wrong = jnp.exp(logits - log_norm[..., None]) - hit.astype(jnp.float32)
        wrong = (wrong * weight[..., None]).astype(h.dtype)
        if grad is not None:
            split = [x.reshape(groups, -1, x.shape[-1]) for x in (h, wrong)]
            grad = grad + _outer(*split)
        return (total, grad), _dot(wrong, head.T, h.dtype) if want_hidden else None

    (total, grad), back = jax.lax.scan(block, (jnp.float32(0), grad), xs)
    if back is not None:
        back = jnp.moveaxis(back, 0, 1).reshape(batch, -1, width)[:, :length]
    return total, back, None if grad is None else jnp.sum(grad, axis=0)


def _cut(x: Array, size: int, blocks: int) -> Array:
    """[B, T, ...] to [blocks, B, size, ...], zeros behind the end."""
    pad = size * blocks - x.shape[1]
    x = jnp.pad(x, ((0, 0), (0, pad)) + ((0, 0),) * (x.ndim - 2))
    return jnp.moveaxis(x.reshape(x.shape[0], blocks, size, *x.shape[2:]), 1, 0)


def _precision(x: Array) -> Any:
    return jax.lax.Precision.HIGHEST if x.dtype == jnp.float32 else None


def _dot(x: Array, y: Array, dtype: Any) -> Array:
    """x [B, t, m] @ y [m, n], accumulated in float32."""
    return jnp.einsum(
        "btm,mn->btn", x, y, precision=_precision(x), preferred_element_type=jnp.float32
    ).astype(dtype)


def _outer(x: Array, y: Array) -> Array:
    """x [g, n, E], y [g, n, V] to [g, E, V], float32."""
    return jnp.einsum(
        "gne,gnv->gev", x, y, precision=_precision(x), preferred_element_type=jnp.float32
    )


def _forward(head: Any, hidden: Any, targets: Any, weights: Any, blocks: Any) -> Any:
    # A frozen head costs no gradient.
    args = (head.value, hidden.value, targets.value, weights.value, blocks)
    total, *grads = _run(*args, hidden.perturbed, head.perturbed)
    return total, (grads, jnp.zeros((0,), head.value.dtype))


def _backward(blocks: int, kept: Any, g: Array) -> tuple[Array | None, ...]:
    (hidden, head), like = kept
    if hidden is not None:
        hidden = (hidden * g.astype(hidden.dtype)).astype(hidden.dtype)
    if head is not None:
        head = (head * g).astype(like.dtype)
    # Tokens and weights are data: None is a zero gradient.
    return head, hidden, None, None


_nll.defvjp(_forward, _backward, symbolic_zeros=True)
