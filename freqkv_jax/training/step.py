"""One optimizer step as one jitted program, on one device or a mesh."""

import contextlib
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding
from jaxtyping import Array

from freqkv_jax.compile_options import many_tokens
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import (
    BATCH_AXES,
    TRAINABLE_RULES,
    P,
    batch_spec,
    check_mesh,
    constrain,
    match_specs,
    param_shardings,
    trainable_shardings,
    tree_path,
)
from freqkv_jax.training.loss import sum_loss
from freqkv_jax.training.optimizer import make_optimizer
from freqkv_jax.training.trainable import (
    abstract_split,
    fresh_adapters,
    lora_scale,
    split,
    variables,
)

if TYPE_CHECKING:
    from freqkv_jax.training.schema import RunConfig

Batch = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """All that a step changes. `step`: int32, steps done; `trainable`: float32 masters."""

    step: Any
    trainable: Any
    opt_state: Any


def init_state(
    cfg: "RunConfig", model: Llama, params: Any, mesh: Mesh | None = None, own: bool = False
) -> tuple[TrainState, Any]:
    """(state of step 0, frozen weights), placed on `mesh` if one is given.

    Args:
      params: the base, on the mesh already or not. Its arrays are not donated, unless `own` gives
        them away: then float32 masters are its arrays and no copies.
    """
    adapters = fresh_adapters(model.config, cfg.train, cfg.run.seed, mesh)
    trainable, frozen = split(cfg.train, params, model.dtype, adapters, copy=not own)
    optimizer, _ = make_optimizer(cfg.optimizer, cfg.train.steps)
    if mesh is None:
        return TrainState(jnp.int32(0), trainable, jax.jit(optimizer.init)(trainable)), frozen
    trainable = jax.device_put(trainable, trainable_shardings(trainable, mesh))
    frozen = jax.device_put(frozen, param_shardings(frozen, mesh))
    where = state_shardings(abstract_train_state(cfg, model)[0], mesh)
    opt_state = jax.jit(optimizer.init, out_shardings=where.opt_state)(trainable)
    return TrainState(jax.device_put(jnp.int32(0), where.step), trainable, opt_state), frozen


def abstract_train_state(cfg: "RunConfig", model: Llama) -> tuple[TrainState, Any]:
    """`init_state` in shapes: nothing is computed or allocated."""
    trainable, frozen = abstract_split(model.config, cfg.train, model.dtype)
    optimizer, _ = make_optimizer(cfg.optimizer, cfg.train.steps)
    opt_state = jax.eval_shape(optimizer.init, trainable)
    return TrainState(jax.ShapeDtypeStruct((), jnp.int32), trainable, opt_state), frozen


def state_shardings(state: TrainState, mesh: Mesh) -> TrainState:
    """The NamedSharding of every leaf of a state: moments lie where their weight does.

    What has another shape than the weight (counters, factored moments) is replicated.
    """
    specs = match_specs(state.trainable, TRAINABLE_RULES)
    known = {
        tree_path(path): (leaf.shape, spec)
        for (path, leaf), spec in zip(
            jax.tree_util.tree_flatten_with_path(state.trainable)[0],
            jax.tree.leaves(specs, is_leaf=lambda x: isinstance(x, P)),
            strict=True,
        )
    }

    def moment(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        parts = tree_path(path).split("/")
        for start in range(len(parts)):
            shape, spec = known.get("/".join(parts[start:]), (None, P()))
            if shape == leaf.shape:
                return NamedSharding(mesh, spec)
        return NamedSharding(mesh, P())

    return TrainState(
        NamedSharding(mesh, P()),
        trainable_shardings(state.trainable, mesh),
        jax.tree_util.tree_map_with_path(moment, state.opt_state),
    )


class TrainStep:
    """step(state, frozen, maps, batch) -> (state, metrics). The state given is donated."""

    def __init__(self, jitted: Any, mesh: Mesh | None) -> None:
        self._jitted, self._mesh = jitted, mesh

    def __call__(
        self, state: TrainState, frozen: Any, maps: Any, batch: Batch
    ) -> tuple[TrainState, dict[str, Array]]:
        with self._where():
            return self._jitted(state, frozen, maps, *_parts(batch))

    def lower(self, state: TrainState, frozen: Any, maps: Any, batch: Batch) -> Any:
        """The step lowered for these arguments, which may be shapes."""
        with self._where():
            return self._jitted.lower(state, frozen, maps, *_parts(batch))

    def _where(self) -> Any:
        return contextlib.nullcontext() if self._mesh is None else jax.set_mesh(self._mesh)


def _parts(batch: Batch) -> tuple[Any, Any, Any]:
    return batch["tokens"], batch["mask"], batch.get("limit", np.float32(np.inf))


def make_train_step(cfg: "RunConfig", model: Llama, mesh: Mesh | None = None) -> TrainStep:
    """Compiles (at its first call) one optimizer step.

    The batch is {"tokens": int32 [B, T], "mask": bool [B, T], "limit": float32, optional}. A loss
    or gradient that is not finite, or a loss above the limit, changes no weight and no moment;
    the step is counted all the same.

    Metrics (scalars): loss (mean over the tokens that count), grad_norm (before clipping),
    learning_rate, tokens (that count), finite (whether the update was applied).

    Raises:
      ValueError: the mesh does not divide the model, or the batch not the mesh.
    """
    model = model.clone(remat=cfg.train.remat, scan_layers=cfg.train.scan_layers)
    optimizer, schedule = make_optimizer(cfg.optimizer, cfg.train.steps)
    shards = 1 if mesh is None else math.prod(mesh.shape[axis] for axis in BATCH_AXES)
    num_micro = cfg.train.accumulation(shards)
    scale = lora_scale(cfg.train)

    def loss_of(trainable: Any, frozen: Any, maps: Any, tokens: Array, mask: Array) -> Array:
        tree = variables(model, trainable, frozen, maps, scale)
        return sum_loss(model, tree, tokens, mask)[0]

    def step(
        state: TrainState, frozen: Any, maps: Any, tokens: Array, mask: Array, limit: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        total, grads = _accumulate(
            jax.value_and_grad(loss_of), num_micro, state.trainable, frozen, maps, tokens, mask
        )
        count = jnp.sum(mask[:, 1:].astype(jnp.float32))
        # The sum over the global batch over its count: neither micro-batches nor devices, which
        # may hold different numbers of counted tokens, change the result.
        loss = total / jnp.maximum(count, 1.0)
        grads = jax.tree.map(lambda g: g / jnp.maximum(count, 1.0), grads)
        norm = optax.tree.norm(grads)
        good = jnp.isfinite(loss) & jnp.isfinite(norm) & (loss <= limit)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.trainable)
        new = optax.apply_updates(state.trainable, updates)
        trainable, opt_state = _choose(good, (new, opt_state), (state.trainable, state.opt_state))
        metrics = {
            "loss": loss,
            "grad_norm": norm,
            "learning_rate": schedule(state.step),
            "tokens": count,
            "finite": good,
        }
        return TrainState(state.step + 1, trainable, opt_state), metrics

    if mesh is None:
        options = many_tokens()
        return TrainStep(jax.jit(step, donate_argnums=0, compiler_options=options), None)
    return TrainStep(_sharded(step, cfg, model, mesh), mesh)


def _sharded(step: Any, cfg: "RunConfig", model: Llama, mesh: Mesh) -> Any:
    """The step under jit, its arguments and results where they lie on the mesh."""
    check_mesh(model.config, mesh, cfg.train.batch_size)
    shapes, frozen = abstract_train_state(cfg, model)
    where, here = state_shardings(shapes, mesh), NamedSharding(mesh, P())
    rows = NamedSharding(mesh, batch_spec())
    return jax.jit(
        step,
        in_shardings=(where, param_shardings(frozen, mesh), here, rows, rows, here),
        out_shardings=(where, here),
        donate_argnums=0,
        compiler_options=many_tokens(mesh),
    )


def _accumulate(
    grad_of: Any, num_micro: int, trainable: Any, frozen: Any, maps: Any, tokens: Array, mask: Array
) -> tuple[Array, Any]:
    """Loss and gradients, summed over `num_micro` parts of the rows."""
    if num_micro == 1:
        return grad_of(trainable, frozen, maps, tokens, mask)

    def cut(x: Array) -> Array:
        # Every device takes a part of its own rows: nothing moves.
        x = jnp.swapaxes(x.reshape(-1, num_micro, x.shape[-1]), 0, 1)
        return constrain(x, P(None, BATCH_AXES))

    def add(carry: Any, xs: tuple[Array, Array]) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, carry, grad_of(trainable, frozen, maps, *xs)), None

    zero = (jnp.float32(0), jax.tree.map(jnp.zeros_like, trainable))
    return jax.lax.scan(add, zero, (cut(tokens), cut(mask)))[0]


def _choose(good: Array, new: Any, old: Any) -> Any:
    """`new` where good, else `old`; but counters go on, so that the schedule keeps to the step."""

    def leaf(a: Array, b: Array) -> Array:
        return a if jnp.issubdtype(a.dtype, jnp.integer) else jnp.where(good, a, b)

    return jax.tree.map(leaf, new, old)


def flops_per_step(cfg: "RunConfig", model: Llama) -> float:
    """Useful FLOPs of one step: nothing that is recomputed, nothing behind a mask.

    4 a frozen weight and token (forward, and backward to its input), 6 a trained one; attention
    over the slots that each token sees; the folded map. The lookup of an embedding is free.
    """
    c, train = model.config, cfg.train
    trainable, frozen = abstract_split(c, train, model.dtype)
    weights = 4 * _matmul_weights(frozen, c.tie_word_embeddings)
    weights += 6 * _matmul_weights(trainable, c.tie_word_embeddings)
    slots, rounds = _slots_seen(model.kv, train.seq_len)
    # Scores and averages: 2 multiply-adds a slot and channel; backward takes twice forward.
    attention = 12 * slots * c.num_heads * c.head_dim * c.num_layers
    # L x n matrix in two halves of a quarter each, for K and V; backward once more.
    span, keep = (getattr(model.kv, name, 0) for name in ("span", "keep"))
    folded = 2 * span * keep * 2 * c.num_kv_heads * c.head_dim
    a_row = weights * train.seq_len + attention + rounds * folded * c.num_layers
    return float(a_row) * train.batch_size


def _matmul_weights(tree: Any, tied: bool) -> int:
    total = 0
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        if len(leaf.shape) > 1 and (tied or not tree_path(path).endswith("embedding")):
            total += math.prod(leaf.shape)
    return total


def _slots_seen(kv: Any, length: int) -> tuple[int, int]:
    """(slots that the tokens of a row see in all, compressions of a row)."""
    seen = np.arange(1, length + 1, dtype=np.int64)
    if kv.capacity is not None:
        rounds = np.maximum(0, -(-(seen - kv.capacity) // kv.chunk))
        seen = seen - rounds * kv.chunk
    return int(seen.sum()), kv.num_compressions(length)
