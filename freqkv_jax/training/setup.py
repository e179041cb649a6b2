"""Everything that a run needs before its first step, checked before anything is compiled."""

import contextlib
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from freqkv_jax import weights
from freqkv_jax.config import SHAPES, LlamaConfig, shape_named
from freqkv_jax.model.llama import Llama
from freqkv_jax.model.llama import maps as model_maps
from freqkv_jax.model.params import init_params
from freqkv_jax.sharding import check_mesh, replicated
from freqkv_jax.tokenizer import load_tokenizer
from freqkv_jax.tokenizer.base import NoTokenizerError
from freqkv_jax.training import distributed
from freqkv_jax.training.data import open_data
from freqkv_jax.training.monitor import HeldOut
from freqkv_jax.training.rows import RowSource
from freqkv_jax.training.rundir import RunDir
from freqkv_jax.training.schema import RunConfig
from freqkv_jax.training.step import init_state, make_train_step, state_shardings
from freqkv_jax.training.trainable import is_trained, lora_scale


@dataclass
class Setup:
    """The parts of a run.

    Attributes:
      tokenizer: gives the tokenizer; raises where there is none.
      held_out: measures held-out perplexity; None where none is asked for.
      scale: of the adapters.
    """

    mesh: Mesh
    model: Llama
    maps: Any
    tokenizer: Callable[[], Any]
    source: RowSource
    held_out: HeldOut | None
    step: Any
    scale: float
    batch_share: tuple[int, int]


def is_shape(path: str) -> bool:
    """Whether `model.path` names a shape (random weights) and not a model."""
    return path in SHAPES and not Path(path).exists()


def read_model_config(path: str) -> LlamaConfig:
    """The sizes of the model at `model.path`; nothing else is read."""
    return shape_named(path) if is_shape(path) else weights.read_config(path)[0]


def prepare(cfg: RunConfig, folder: RunDir) -> Setup:
    """Opens data and lays out the mesh. Raises ValueError or OSError for what is wrong."""
    config = read_model_config(cfg.model.path)
    mesh = distributed.run_mesh(cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    check_mesh(config, mesh, cfg.train.batch_size)
    row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    accumulation = cfg.train.accumulation(row_shards)
    share = distributed.batch_share(mesh, cfg.train.batch_size)
    model = Llama(config, cfg.kv, cfg.model.dtype, cfg.model.attention)
    tokenizer = _tokenizer(cfg)
    if cfg.log.sample_every:
        tokenizer()  # where there is none, that is said now and not at the first sample

    def rows(split: str) -> RowSource:
        cache = None if folder.remote else Path(folder / "data")
        seed, length = cfg.run.seed, cfg.train.seq_len
        return open_data(cfg.data, length, config.vocab_size, tokenizer, seed, split, cache)

    source, held_out = rows("train"), None
    scale = lora_scale(cfg.train)
    if cfg.log.eval_every:
        at_once = cfg.train.batch_size // accumulation
        at_once = min(at_once, -(-cfg.log.eval_rows // row_shards) * row_shards)
        looped = model.clone(scan_layers=cfg.train.scan_layers)
        held_out = HeldOut(looped, mesh, rows("eval"), cfg.log.eval_rows, at_once, scale)
    maps = model_maps(model)
    maps = jax.device_put(maps, replicated(maps, mesh))
    step = make_train_step(cfg, model, mesh)
    return Setup(mesh, model, maps, tokenizer, source, held_out, step, scale, share)


def first_state(cfg: RunConfig, setup: Setup) -> tuple[Any, Any]:
    """(state, frozen) before the first step: weights read, adapters and moments made.

    What is trained is read in float32, so that masters have the file's values, the rest in
    model.dtype; there is one copy of each.
    """
    model, mesh = setup.model, setup.mesh
    if is_shape(cfg.model.path):
        params = init_params(model, cfg.run.seed, mesh)
    else:
        _, params = weights.load_pretrained(
            cfg.model.path,
            kv=cfg.kv,
            dtype=cfg.model.dtype,
            mesh=mesh,
            attention=cfg.model.attention,
            float32=lambda path: is_trained(cfg.train, path),
            **({} if cfg.model.adapter is None else {"adapter": cfg.model.adapter}),
        )
    return init_state(cfg, model, params, mesh, own=True)


def abstract_of(state: Any, mesh: Mesh) -> Any:
    """A state's shapes with the shardings that it has on `mesh`."""

    def shape(leaf: Any, sharding: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(shape, state, state_shardings(state, mesh))


def _tokenizer(cfg: RunConfig) -> Callable[[], Any]:
    found: list[Any] = []

    def load() -> Any:
        if not found:
            path = cfg.data.tokenizer or cfg.model.path
            if cfg.data.tokenizer is None and is_shape(path):
                raise NoTokenizerError(
                    f"model.path {path!r} is a shape without a tokenizer; name one in"
                    " data.tokenizer (a directory, hub id or .gguf file)"
                )
            found.append(load_tokenizer(path))
        return found[0]

    return load


def tokenizer_if_any(setup: Setup) -> Any:
    """The tokenizer, None where model and config have none."""
    with warnings.catch_warnings(), contextlib.suppress(ValueError, OSError):
        return setup.tokenizer()
    return None
