"""What a config takes of each device's memory, reckoned from shapes; nothing is compiled.

Weights, moments and gradients are exact. What lives only during a step is reckoned from the model's
arithmetic, as the comments say; the compiler may need somewhat less or more.
"""

import dataclasses
import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import AbstractMesh, AxisType

from freqkv_jax.config import LlamaConfig, shape_named
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import AXES, check_mesh, param_shardings
from freqkv_jax.training.loss import LOGITS_AT_ONCE
from freqkv_jax.training.schema import RunConfig
from freqkv_jax.training.setup import is_shape, read_model_config
from freqkv_jax.training.step import abstract_train_state, state_shardings

# Share of a device's memory that a plan may use: the rest is for the program itself, collectives'
# buffers and fragmentation.
USABLE = 0.92


@dataclass(frozen=True)
class Plan:
    """Bytes a device, by part.

    Attributes:
      mesh: (data, fsdp, tensor). rows: of the batch that a device has at once.
      accumulation: micro-batches a step.
      parts: name -> bytes; their sum is the peak.
    """

    mesh: tuple[int, int, int]
    rows: int
    accumulation: int
    parts: dict[str, int]

    @property
    def total(self) -> int:
        """Bytes a device at the peak."""
        return sum(self.parts.values())


def planned_config(cfg: RunConfig) -> LlamaConfig:
    """The model's sizes: of a local model, of `model.shape` for what is not here, else fetched."""
    if cfg.model.shape is not None and not planned_path_is_here(cfg):
        return shape_named(cfg.model.shape)
    return read_model_config(cfg.model.path)


def planned_path_is_here(cfg: RunConfig) -> bool:
    """Whether `model.path` tells the sizes without being fetched."""
    return Path(cfg.model.path).expanduser().exists() or is_shape(cfg.model.path)


def stand_in(cfg: RunConfig) -> str | None:
    """A remark where the sizes are those of `model.shape`, whatever `model.path` names."""
    if cfg.model.shape is None or planned_path_is_here(cfg):
        return None
    return (
        f"warning: the sizes are those of model.shape {cfg.model.shape}; model.path"
        f" {cfg.model.path} is not here and was not looked at. If it is another model, --set"
        " model.shape=null, or the name of its shape"
    )


def make_plan(cfg: RunConfig, config: LlamaConfig, num_devices: int) -> Plan:
    """The plan of a config on so many devices.

    Raises:
      ValueError: the mesh does not fit the devices, or does not divide model or batch.
    """
    sizes = cfg.mesh.sizes(num_devices)
    if math.prod(sizes) > num_devices:
        raise ValueError(
            f"mesh data={sizes[0]}, fsdp={sizes[1]}, tensor={sizes[2]} needs"
            f" {math.prod(sizes)} devices, got {num_devices}; say --devices {math.prod(sizes)} or"
            " lower the mesh"
        )
    mesh = AbstractMesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    check_mesh(config, mesh, cfg.train.batch_size)  # type: ignore[arg-type]
    accumulation = cfg.train.accumulation(sizes[0] * sizes[1])
    rows = cfg.train.batch_size // (sizes[0] * sizes[1]) // accumulation
    parts = _resident(cfg, config, mesh, accumulation) | _passing(cfg, config, sizes, rows)
    return Plan(sizes, rows, accumulation, parts)


def _resident(cfg: RunConfig, config: LlamaConfig, mesh: Any, accumulation: int) -> dict[str, int]:
    """Weights, moments and gradients: exact, by the sharding tables."""
    # All layers are alike: one and two of them tell what each adds, and are quick to trace.
    one, two = (_state_bytes(cfg, config, mesh, layers) for layers in (1, 2))
    more = config.num_layers - 1
    masters, moments, frozen = (a + more * (b - a) for a, b in zip(one, two, strict=True))
    width = jnp.dtype(cfg.model.dtype).itemsize
    return {
        "frozen weights": frozen,
        "trained weights (float32)": masters,
        "moments": moments,
        # With accumulation, the sum and a micro-batch's own.
        "gradients (float32)": masters * (2 if accumulation > 1 else 1),
        "trained weights as used": masters * width // 4 if width < 4 else 0,
    }


def _state_bytes(
    cfg: RunConfig, config: LlamaConfig, mesh: Any, num_layers: int
) -> tuple[int, int, int]:
    """(masters, moments, frozen weights) of the first layers, embeddings and head with them."""
    config = dataclasses.replace(config, num_layers=num_layers)
    state, frozen = abstract_train_state(cfg, Llama(config, cfg.kv, cfg.model.dtype))
    where = state_shardings(state, mesh)
    return (
        _tree_bytes(state.trainable, where.trainable),
        _tree_bytes(state.opt_state, where.opt_state),
        _tree_bytes(frozen, param_shardings(frozen, mesh)),
    )


def _tree_bytes(tree: Any, shardings: Any) -> int:
    def leaf_bytes(leaf: Any, sharding: Any) -> int:
        return math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize

    return sum(jax.tree.leaves(jax.tree.map(leaf_bytes, tree, shardings)))


def _passing(
    cfg: RunConfig, config: LlamaConfig, sizes: tuple[int, int, int], rows: int
) -> dict[str, int]:
    """What lives during a step only."""
    _, fsdp, tensor = sizes
    width = jnp.dtype(cfg.model.dtype).itemsize
    tokens = rows * cfg.train.seq_len
    e, f = config.hidden_size, config.intermediate_size // tensor
    q, kv = (n * config.head_dim // tensor for n in (config.num_heads, config.num_kv_heads))
    kernels = e * (2 * q + 2 * kv + 3 * f)
    # Products with weights: q, k, v, o, gate, up, down; "none" also keeps what norms, rotation,
    # attention and activation gave.
    dots = q + 2 * kv + e + 2 * f + e
    everything = dots + 3 * e + 2 * q + kv + 2 * f
    caches = _cache_entries(cfg, rows) * kv
    kept_of_a_layer = {
        "full": tokens * e,
        "dots": tokens * (e + dots),
        "attention": tokens * (e + dots + q),
        "none": tokens * (e + everything) + 3 * caches,
    }[cfg.train.remat]
    vocab = config.vocab_size // tensor
    # Logits, their softmax and its gradient, float32, at most LOGITS_AT_ONCE at a time.
    block = 3 * 4 * min(tokens * vocab, LOGITS_AT_ONCE)
    head_gradient = 4 * e * vocab if _trains_head(cfg, config) else 0
    # Under fsdp a layer's weights are gathered, the next one's while it runs; the head once.
    gathered = width * (2 * kernels + e * vocab) if fsdp > 1 else 0
    looped = config.num_layers * kernels // fsdp * width if cfg.train.scan_layers else 0
    return {
        f"activations kept (remat {cfg.train.remat})": config.num_layers * kept_of_a_layer * width,
        # The layer that is run backward: its values and their gradients.
        "one layer at work": 2 * tokens * everything * width,
        # Keys before and after rotation and values, and their gradients.
        "caches of the recurrence": 2 * 3 * caches * width,
        "logits block": block + head_gradient + 2 * tokens * e * width,
        "weights gathered": gathered,
        "layers' weights side by side": looped,
    }


def _trains_head(cfg: RunConfig, config: LlamaConfig) -> bool:
    tied = config.tie_word_embeddings and cfg.train.mode == "lora" and cfg.train.train_embeddings
    return cfg.train.mode == "full" or tied


def _cache_entries(cfg: RunConfig, rows: int) -> int:
    """Slots of the caches of all chunks, a layer; 0 where nothing is compressed."""
    rounds = cfg.kv.num_compressions(cfg.train.seq_len)
    return 0 if not rounds else rows * rounds * (cfg.kv.capacity or 0)


def remedies(cfg: RunConfig, config: LlamaConfig, num_devices: int) -> list[tuple[str, int]]:
    """Changes of the config that need less memory, as (--set text, bytes a device), best first."""
    now = make_plan(cfg, config, num_devices).total
    found = []
    for section, changes in _changes(cfg, config):
        part = getattr(cfg, section)
        text = " ".join(f"{section}.{k}={str(v).lower()}" for k, v in changes.items())
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                part = dataclasses.replace(part, **changes)
                changed = dataclasses.replace(cfg, **{section: part})
                total = make_plan(changed, config, num_devices).total
            except ValueError:  # does not divide: no remedy
                continue
        if total < now:
            found.append((text, total))
    return sorted(found, key=lambda item: item[1])


def _changes(cfg: RunConfig, config: LlamaConfig) -> list[tuple[str, dict[str, Any]]]:
    train = cfg.train
    tensor = 2 * max(cfg.mesh.tensor, 1)
    changes: list[tuple[str, dict[str, Any]]] = [
        ("train", {"micro_batch": 1}),
        ("train", {"remat": "full"}),
        ("mesh", {"data": 1, "fsdp": -1, "tensor": 1}),
        ("mesh", {"data": 1, "fsdp": -1, "tensor": tensor}),
        ("train", {"seq_len": train.seq_len // 2}),
        ("model", {"dtype": "bfloat16"}),
    ]
    if train.mode == "full":
        changes += [("train", {"mode": "lora"}), ("optimizer", {"name": "adafactor"})]
    if train.mode == "lora" and train.train_embeddings:
        changes.append(("train", {"train_embeddings": False}))
    return [(s, c) for s, c in changes if any(getattr(getattr(cfg, s), k) != c[k] for k in c)]
