"""The one schema of a fine-tuning run: frozen sections, checked before anything is computed."""

import dataclasses
import typing
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from freqkv_jax.config import SHAPES
from freqkv_jax.kv import POLICIES, FreqKVConfig, KVPolicy, policy_from_args, policy_to_dict
from freqkv_jax.model.llama import check_model_options
from freqkv_jax.training.sections import Section, allowed, build, instead
from freqkv_jax.training.yaml_file import read_config

# A top-level section that a run adds to the config it writes (versions, devices, code revision):
# kept for people, ignored when the file is read again.
RECORDED = "environment"
LORA_TARGETS = ("q", "k", "v", "o", "gate", "up", "down")
DATA_KINDS = ("auto", "text", "jsonl", "tokens", "hf", "tfds", "chat", "alpaca", "generated")
# Token files may hold answers; those that do not are refused when they are opened.
ANSWER_KINDS = ("auto", "chat", "alpaca", "tokens")


@dataclass(frozen=True)
class RunSection(Section):
    """Where a run lives. `dir` may be gs://; `distributed` starts jax.distributed."""

    dir: str
    seed: int = allowed(0, low=0)
    distributed: bool = False


@dataclass(frozen=True)
class ModelSection(Section):
    """The base.

    Attributes:
      path: directory, hub id, GGUF file, or a shape's name (random weights).
      shape: the shape that a hub id has: `freqkv plan` and --compile-only then fetch nothing.
      adapter: PEFT adapter directory to start from.
    """

    path: str
    shape: str | None = allowed(None, choices=tuple(SHAPES))
    dtype: str = "bfloat16"
    attention: str = "auto"
    adapter: str | None = None


@dataclass(frozen=True)
class Source(Section):
    """One source of a mixture.

    Attributes:
      path: file, folder or tfds name; for kind "generated", any word, which seeds the text.
      weight: share in the mixture, relative to the other sources.
      kind: what the path holds; "auto" looks.
      field: the record's field that holds the text.
    """

    path: str = ""
    weight: float = allowed(1.0, above=0)
    kind: str = allowed("auto", choices=DATA_KINDS)
    field: str = "text"

    short: ClassVar[str] = "path"


@dataclass(frozen=True)
class DataSection(Section):
    """Training and held-out texts; tokenizer (default: the model's); how rows are made."""

    train: tuple[Source, ...]
    eval: tuple[Source, ...] = ()
    tokenizer: str | None = None
    pack: str = allowed("documents", choices=("documents", "concat"))
    answers_only: bool = False


@dataclass(frozen=True)
class MeshSection(Section):
    """Axis sizes; one may be -1, for the devices that are left."""

    data: int = 1
    fsdp: int = 1
    tensor: int = 1

    def sizes(self, num_devices: int) -> tuple[int, int, int]:
        """(data, fsdp, tensor) on so many devices, -1 filled in; ValueError if it cannot be."""
        sizes = (self.data, self.fsdp, self.tensor)
        known = 1
        for size in sizes:
            known *= 1 if size == -1 else size
        if -1 in sizes and num_devices % known:
            raise ValueError(
                f"mesh: {known} (the axes given) does not divide the {num_devices} devices; choose"
                " sizes whose product does"
            )
        data, fsdp, tensor = (num_devices // known if size == -1 else size for size in sizes)
        return data, fsdp, tensor


@dataclass(frozen=True)
class OptimizerSection(Section):
    """optax's optimizer and schedule. `final_ratio`: last rate over the peak (cosine, linear,
    wsd); `decay_ratio`: share of the steps in which wsd decays; clip_norm null: no clipping."""

    name: str = allowed("adamw", choices=("adamw", "adafactor", "lion"))
    learning_rate: float = allowed(2e-5, above=0)
    schedule: str = allowed("constant", choices=("constant", "cosine", "linear", "wsd"))
    warmup_steps: int = allowed(20, low=0)
    final_ratio: float = allowed(0.0, low=0, high=1)
    decay_ratio: float = allowed(0.1, above=0, high=1)
    weight_decay: float = allowed(0.0, low=0)
    b1: float = allowed(0.9, low=0, below=1)
    b2: float = allowed(0.95, low=0, below=1)
    eps: float = allowed(1e-8, above=0)
    clip_norm: float | None = allowed(1.0, above=0)


@dataclass(frozen=True)
class TrainSection(Section):
    """What is trained, and how much of it at a time.

    Attributes:
      mode: "lora" (adapters, with embeddings and norms if asked for), "full" or "norms".
      steps: optimizer steps. batch_size: rows of the global batch. seq_len: tokens of a row.
      micro_batch: rows that one data or fsdp position takes in one forward and backward pass;
        gradients are accumulated over the rest. None: all at once.
      scan_layers: the layers are a loop in the program: it compiles as fast as one layer, and
        holds a second copy of their weights.
      on_bad_loss: what to do when the loss is not finite, or is `spike_ratio` times its recent
        median (None: spikes are let be).
    """

    steps: int = allowed(low=1)
    batch_size: int = allowed(low=1)
    seq_len: int = allowed(low=2)
    mode: str = allowed("lora", choices=("lora", "full", "norms"))
    lora_rank: int = allowed(8, low=1)
    lora_alpha: float = allowed(16.0, above=0)
    lora_targets: tuple[str, ...] = allowed(("q", "k", "v", "o"), choices=LORA_TARGETS)
    train_embeddings: bool = True
    train_norms: bool = True
    micro_batch: int | None = allowed(None, low=1)
    remat: str = allowed("full", choices=("none", "attention", "dots", "full"))
    scan_layers: bool = False
    on_bad_loss: str = allowed("stop", choices=("stop", "skip"))
    spike_ratio: float | None = allowed(None, above=1)

    def accumulation(self, row_shards: int) -> int:
        """Micro-batches a step where rows lie on `row_shards` (data * fsdp) positions.

        Raises ValueError where batch, positions and micro-batch do not divide.
        """
        rows, rest = divmod(self.batch_size, row_shards)
        if rest or not rows:
            raise ValueError(
                f"train.batch_size {self.batch_size} must be a multiple of mesh.data * mesh.fsdp ="
                f" {row_shards}; change one of them"
            )
        micro = min(self.micro_batch or rows, rows)
        if rows % micro:
            raise ValueError(
                f"train.micro_batch {micro} does not divide the {rows} rows that each of"
                f" {row_shards} data positions has of train.batch_size {self.batch_size}; allowed:"
                f" {', '.join(str(n) for n in range(1, rows + 1) if rows % n == 0)}"
            )
        return rows // micro


@dataclass(frozen=True)
class CheckpointSection(Section):
    """Steps between saves; how many of the newest to keep, and whether the best one too."""

    every: int = allowed(100, low=1)
    keep: int = allowed(2, low=1)
    keep_best: bool = False


@dataclass(frozen=True)
class LogSection(Section):
    """Steps between lines, held-out measurements and samples (0: never), and where they go."""

    every: int = allowed(1, low=1)
    eval_every: int = allowed(0, low=0)
    eval_rows: int = allowed(8, low=1)
    sample_every: int = allowed(0, low=0)
    sample_prompt: str = ""
    sample_tokens: int = allowed(64, low=1)
    tensorboard: bool = True
    wandb: bool = False


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """A whole run. Frozen and hashable; built by `load` or `from_dict`, checked when built."""

    run: RunSection
    model: ModelSection
    kv: KVPolicy = FreqKVConfig()
    data: DataSection
    mesh: MeshSection = MeshSection()
    optimizer: OptimizerSection = OptimizerSection()
    train: TrainSection
    checkpoint: CheckpointSection = CheckpointSection()
    log: LogSection = LogSection()

    def __post_init__(self) -> None:
        _check_together(self)


def load(config: str | Path, sets: Sequence[str] = ()) -> RunConfig:
    """Reads and checks a config: a file or a packaged name, with "a.b=value" settings on top.

    Raises:
      OSError: there is no such file or packaged config.
      ValueError: invalid YAML, an unknown key, a wrong type or value, or keys that contradict
        each other; says which key, what was given and what is allowed.
    """
    cfg = from_dict(read_config(config, sets))
    capacity = cfg.kv.capacity
    if capacity is not None and cfg.train.seq_len <= capacity:
        warnings.warn(
            f"train.seq_len {cfg.train.seq_len} fits into the cache (kv.cache_size {capacity}):"
            " nothing will be compressed, so the model learns nothing about compressed caches;"
            " raise train.seq_len or lower kv.cache_size",
            UserWarning,
        )
    return cfg


def from_dict(raw: dict[str, Any]) -> RunConfig:
    """The config that a mapping of sections means; ValueError as `load`."""
    raw = {key: value for key, value in raw.items() if key != RECORDED}
    sections = {f.name: f for f in dataclasses.fields(RunConfig)}
    for key in raw:
        if key not in sections:
            raise ValueError(f"unknown section {key!r}{instead(key, sections)}")
    hints = typing.get_type_hints(RunConfig)
    built = {}
    for name in sections:
        value = raw.get(name)
        value = {} if value is None else value
        built[name] = _policy(value) if name == "kv" else build(hints[name], value, name)
    return RunConfig(**built)


def to_dict(cfg: RunConfig) -> dict[str, Any]:
    """The resolved config as plain YAML values, every key written out; inverse of `from_dict`."""
    values = dataclasses.asdict(cfg) | {"kv": policy_to_dict(cfg.kv)}
    return _plain(values)


def resume_differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """What differs between two resolved configs and may not differ in a resume, a line each.

    `run`, `mesh`, `checkpoint`, `log` and what was recorded may change; `train.steps` may rise.
    """
    free = ("run", "mesh", "checkpoint", "log", RECORDED)
    before, after = (
        dict(_flat({k: v for k, v in d.items() if k not in free}, "")) for d in (old, new)
    )
    differences = []
    for key in sorted(before.keys() | after.keys()):
        was, now = before.get(key, _ABSENT), after.get(key, _ABSENT)
        if was == now or (key == "train.steps" and now >= was):
            continue
        note = " (it may only rise)" if key == "train.steps" else ""
        differences.append(f"{key}: was {was!r}, now {now!r}{note}")
    if old.get("run", {}).get("seed") != new.get("run", {}).get("seed"):
        warnings.warn("run.seed differs from the run that is resumed: rows come in another order")
    return differences


class _Absent:
    def __repr__(self) -> str:
        return "absent"


_ABSENT = _Absent()


def _flat(value: Any, path: str) -> Iterable[tuple[str, Any]]:
    """(dotted key, plain value) of every leaf; empty lists and mappings are leaves."""
    if not isinstance(value, (dict, list)) or not value:
        return [(path, value)]
    items = value.items() if isinstance(value, dict) else enumerate(value)
    start = f"{path}." if path else ""
    return [leaf for key, inner in items for leaf in _flat(inner, f"{start}{key}")]


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    return [_plain(inner) for inner in value] if isinstance(value, tuple) else value


def _policy(raw: Any) -> KVPolicy:
    """The cache policy; a field that only another policy has is ignored, as flags are."""
    if not isinstance(raw, dict):
        raise ValueError(f"kv must be a section with keys below it, got {raw!r}")
    known = ["policy", *{f.name: 0 for cls in POLICIES.values() for f in dataclasses.fields(cls)}]
    for key in raw:
        if key not in known:
            raise ValueError(f"unknown key kv.{key}{instead(key, known)}")
    fields = {key: value for key, value in raw.items() if key != "policy"}
    try:
        return policy_from_args(raw.get("policy", FreqKVConfig.name), **fields)
    except ValueError as error:
        raise ValueError(f"kv: {error}") from None


def _check_together(cfg: RunConfig) -> None:
    """What no section can see alone."""
    section = "model"
    try:
        check_model_options(cfg.model.dtype, cfg.model.attention)
        section = "kv"
        cfg.kv.check_dtype(cfg.model.dtype)
    except ValueError as error:
        raise ValueError(f"{section}: {error}") from None
    for problem in _contradictions(cfg):
        raise ValueError(problem)
    mesh = (cfg.mesh.data, cfg.mesh.fsdp)
    if -1 not in mesh:
        cfg.train.accumulation(mesh[0] * mesh[1])


def _contradictions(cfg: RunConfig) -> Iterable[str]:
    train, data, log = cfg.train, cfg.data, cfg.log
    sizes = dataclasses.asdict(cfg.mesh)
    if any(n < 1 and n != -1 for n in sizes.values()) or list(sizes.values()).count(-1) > 1:
        yield f"mesh: sizes must be 1 or more, and at most one of them -1, got {sizes}"
    for name in ("dir", "path"):
        section, key = (cfg.run, "run.dir") if name == "dir" else (cfg.model, "model.path")
        if not getattr(section, name).strip():
            yield f"{key} is empty"
    if not data.train:
        yield "data.train is empty; name at least one source"
    if train.mode == "lora" and not train.lora_targets:
        yield f"train.lora_targets is empty; allowed: {', '.join(LORA_TARGETS)}"
    kinds = {source.kind for source in data.train}
    if data.answers_only and not kinds & set(ANSWER_KINDS):
        yield (
            f"data.answers_only needs records with answers (kind {', '.join(ANSWER_KINDS)}),"
            f" got {', '.join(sorted(kinds))}"
        )
    for key in ("eval_every",) * bool(log.eval_every) + ("keep_best",) * cfg.checkpoint.keep_best:
        if not data.eval:
            name = "log.eval_every" if key == "eval_every" else "checkpoint.keep_best"
            yield f"{name} needs held-out data: name sources in data.eval"
    if cfg.checkpoint.keep_best and not log.eval_every:
        yield "checkpoint.keep_best needs log.eval_every: the best is the one measured best"
    if log.sample_every and not log.sample_prompt:
        yield "log.sample_every needs log.sample_prompt"
