"""The train step on abstract arrays, to be compiled for machines that are not here."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding

from freqkv_jax.compile_check import (
    Chip,
    Work,
    analyse,
    attention_flops,
    compile_work,
    is_cache_gather,
)
from freqkv_jax.config import LlamaConfig
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.llama import maps as model_maps
from freqkv_jax.model.params import abstract_state
from freqkv_jax.sharding import (
    P,
    batch_spec,
    check_mesh,
    param_shardings,
    replicated,
    state_shardings,
)
from freqkv_jax.training import step as train_step
from freqkv_jax.training.plan import planned_config
from freqkv_jax.training.schema import RunConfig

NAMES = ("state", "frozen", "maps", "tokens", "mask", "limit")


def model_of(cfg: RunConfig, config: LlamaConfig | None = None) -> Llama:
    """The model of a config, its sizes only; of other sizes, where `config` is given."""
    config = config or planned_config(cfg)
    return Llama(config, cfg.kv, cfg.model.dtype, cfg.model.attention)


def abstract_arguments(cfg: RunConfig, model: Llama, mesh: Mesh) -> tuple[Any, ...]:
    """Shapes of what the jitted step takes (NAMES), with their shardings on `mesh`."""
    state, frozen = train_step.abstract_train_state(cfg, model)
    maps = jax.eval_shape(lambda: model_maps(model))
    shape = (cfg.train.batch_size, cfg.train.seq_len)
    rows = NamedSharding(mesh, batch_spec())
    return (
        _on(state, train_step.state_shardings(state, mesh)),
        _on(frozen, param_shardings(frozen, mesh)),
        _on(maps, replicated(maps, mesh)),
        jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows),
        jax.ShapeDtypeStruct(shape, jnp.bool_, sharding=rows),
        jax.ShapeDtypeStruct((), jnp.float32, sharding=NamedSharding(mesh, P())),
    )


def build_work(cfg: RunConfig, model: Llama, mesh: Mesh) -> Work:
    """The step that training runs, and its abstract arguments with their shardings on `mesh`."""
    check_mesh(model.config, mesh, cfg.train.batch_size)
    arguments = abstract_arguments(cfg, model, mesh)
    where, here = jax.tree.map(lambda x: x.sharding, arguments[0]), NamedSharding(mesh, P())
    step = train_step.make_train_step(cfg, model, mesh)
    return Work(step._jitted, arguments, NAMES, donate=(0,), out_shardings=(where, here))


def report(cfg: RunConfig, config: LlamaConfig, mesh: Mesh, chip: Chip | None) -> dict[str, Any]:
    """Compiles the step of a config for `mesh`; what it takes, as `analyse` tells it.

    Args:
      config: the model's sizes.
      chip: what one device is, None off TPU.

    Raises:
      ValueError: sizes that the mesh does not divide, or a program that cannot fit.
    """
    model, train = model_of(cfg, config), cfg.train
    work = build_work(cfg, model, mesh)
    compiled = compile_work(work, mesh)
    slots = train.seq_len if model.kv.capacity is None else None
    state = abstract_state(model, train.batch_size, slots)
    memory = jax.tree.leaves(_on(state, state_shardings(state, mesh)).layers)
    is_cache = is_cache_gather("forward", model.kv, memory, model.config.head_dim)
    flops = train_step.flops_per_step(cfg, model)
    # Backward takes twice forward; where layers are recomputed, the kernel runs forward again.
    passes = 4 if train.remat == "full" else 3
    attention = passes * attention_flops(
        model.config, model.kv, "forward", train.batch_size, train.seq_len, train.seq_len
    )
    found = analyse(compiled, work.argument_names(), chip, mesh.size, flops, attention, is_cache)
    parts = train.accumulation(mesh.shape["data"] * mesh.shape["fsdp"])
    return found | {"weight_gathers": weight_gathers(found["all_gathers"], parts)}


def weight_gathers(gathers: Sequence[dict[str, Any]], parts: int) -> dict[str, dict[str, float]]:
    """How often each weight is gathered in one of `parts` micro-batches, {path: {"forward": n,
    "backward": m}}; what is gathered once for all of them has 1/parts forward."""
    counts: dict[str, dict[str, float]] = {}
    for gather in gathers:
        if gather["origin"] == "computed":
            continue
        # By this word jax names what the backward pass does, recomputation included.
        passing = "backward" if "transpose(" in gather["op_name"] else "forward"
        weight = counts.setdefault(gather["origin"], {"forward": 0.0, "backward": 0.0})
        weight[passing] += gather["runs"] / parts
    return counts


def _on(tree: Any, shardings: Any) -> Any:
    def place(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(place, tree, shardings)
