"""The step of a fine-tuning run as a case: the program that the loop runs, on random tokens."""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from freqkv_jax.bench import amounts
from freqkv_jax.bench.amounts import Amount
from freqkv_jax.bench.cases import Case, random_tokens
from freqkv_jax.bench.timing import Program
from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import FullConfig
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.llama import maps as model_maps
from freqkv_jax.model.params import init_params
from freqkv_jax.sharding import batch_spec, check_mesh, replicated
from freqkv_jax.training import metrics
from freqkv_jax.training.compile_step import abstract_arguments
from freqkv_jax.training.distributed import run_mesh
from freqkv_jax.training.schema import RunConfig
from freqkv_jax.training.step import (
    abstract_train_state,
    flops_per_step,
    init_state,
    make_train_step,
)

WORK = "train"


def make_train_cases(
    cfg: RunConfig, config: LlamaConfig, lengths: Sequence[int], beside: bool = True
) -> Iterator[Case]:
    """An optimizer step of `cfg` on rows of each length, short ones first.

    Args:
      config: the model's sizes. beside: the same step with the full cache, too.

    Raises:
      ValueError: sizes that the mesh does not divide.
    """
    mesh = run_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    check_mesh(config, mesh, cfg.train.batch_size)
    cfg.train.accumulation(mesh.shape["data"] * mesh.shape["fsdp"])
    policies = [cfg.kv]
    if beside and cfg.kv.capacity is not None:
        policies.append(FullConfig())
    return (
        _case(dataclasses.replace(cfg, kv=kv, train=_of_length(cfg, length)), config, mesh)
        for length in sorted(set(lengths))
        for kv in policies
    )


def _of_length(cfg: RunConfig, length: int) -> Any:
    return dataclasses.replace(cfg.train, seq_len=length)


def _case(cfg: RunConfig, config: LlamaConfig, mesh: Mesh) -> Case:
    model = Llama(config, cfg.kv, cfg.model.dtype, cfg.model.attention)
    rows, length = cfg.train.batch_size, cfg.train.seq_len

    def build(_: Any) -> Program:
        step = make_train_step(cfg, model, mesh)
        # The base is gone when the step begins: only what is frozen and the masters stay.
        params = init_params(model, cfg.run.seed, mesh)
        state, frozen = init_state(cfg, model, params, mesh, own=True)
        del params
        maps = model_maps(model)
        maps = jax.device_put(maps, replicated(maps, mesh))
        where = NamedSharding(mesh, batch_spec())

        def tokens(seed: int) -> Any:
            return jax.device_put(random_tokens(model, rows, length, seed), where)

        def lower(state: Any, frozen: Any, maps: Any, tokens: Any, mask: Any, limit: Any) -> Any:
            batch = {"tokens": tokens, "mask": mask, "limit": limit}
            return step.lower(state, frozen, maps, batch)

        def following(index: int, args: tuple[Any, ...], out: Any) -> tuple[Any, ...]:
            return (out[0], *args[1:3], tokens(index), *args[4:])

        mask = jax.device_put(jnp.ones((rows, length), bool), where)
        first = (state, frozen, maps, tokens(0), mask, np.float32(np.inf))
        shapes = functools.partial(abstract_arguments, cfg, model, mesh)
        return Program(None, first, following, lower=lower, shapes=shapes)

    amount = step_amount(cfg, model, mesh.size)
    peak = metrics.peak_flops(mesh.devices.flat[0])
    return Case(WORK, model, rows, length, rows * length, 1, amount, build, peak)


def step_amount(cfg: RunConfig, model: Llama, num_devices: int) -> Amount:
    """The work of a step, a device's part: FLOPs of `flops_per_step`, and as bytes the state read
    and written once, and the frozen weights read once."""
    rounds = model.kv.num_compressions(cfg.train.seq_len)
    mapped = amounts.map_flops(model.config, model.kv, rounds, cfg.train.batch_size)
    mapped *= 2 * model.config.num_layers  # backward once more
    state, frozen = abstract_train_state(cfg, model)
    moved = 2 * _num_bytes(state) + _num_bytes(frozen)
    useful = flops_per_step(cfg, model) - mapped
    return Amount(useful / num_devices, mapped / num_devices, moved / num_devices)


def _num_bytes(tree: Any) -> int:
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
