"""Writing a Hugging Face directory that transformers loads, whole or not at all."""

import contextlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy, policy_to_dict
from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import gather, tree_path, wait_for_all
from freqkv_jax.weights.hf import CONFIG, INDEX, POLICY_KEY, SINGLE
from freqkv_jax.weights.load import OnProgress
from freqkv_jax.weights.table import Target, targets

MAX_SHARD_BYTES = 5 * 10**9
GENERATION = "generation_config.json"
FLOATS = ("float64", "float32", "bfloat16", "float16")  # the first one used is config.json's


def save_pretrained(
    model: Llama, params: Any, path: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Writes a Hugging Face directory that transformers and `load_pretrained` read.

    Each array keeps its dtype; a tied model gets no lm_head. config.json also remembers the
    model's policy. The folder is created; what it held of an earlier model is replaced, other
    files stay. Nothing changes unless everything could be written.

    Args:
      params: the parameters, or any tree of that shape (gradients, say), sharded or not.
      tokenizer: of `load_tokenizer`, saved into the same directory.

    Raises:
      ValueError: the tree is not that of the model (missing, extra, wrong shapes: all listed).
      OSError: the directory cannot be written.
    """
    write_folder(model.config, params, path, model.kv, tokenizer)


def write_folder(
    config: LlamaConfig,
    params: Any,
    path: str | os.PathLike[str],
    policy: KVPolicy | None = None,
    tokenizer: Any = None,
    on_progress: OnProgress | None = None,
) -> None:
    """`save_pretrained` for a config; without a policy none is remembered."""
    pairs = _pair(config, params)
    folder = Path(path).expanduser()
    if folder.exists() and not folder.is_dir():
        raise FileExistsError(f"{folder} is a file; name a directory to write the model into")
    with _staged(folder.resolve()) as stage:
        _write_weights(stage, pairs, on_progress)
        if stage is not None:
            if tokenizer is not None:
                tokenizer.save(stage)
            ids = {
                "bos_token_id": config.bos_token_id,
                "eos_token_id": config.to_hf()["eos_token_id"],
            }
            ids = {name: value for name, value in ids.items() if value is not None}
            _write_json(stage / GENERATION, ids)
            _write_json(stage / CONFIG, _config_json(config, pairs, policy))
    wait_for_all("save_pretrained")


def _pair(config: LlamaConfig, params: Any) -> list[tuple[Target, Any]]:
    """Every weight of the model with its array, in the order of the table."""
    leaves = {tree_path(path): x for path, x in jax.tree_util.tree_flatten_with_path(params)[0]}
    wanted = {target.path: target for target in targets(config, "hf").values()}
    problems = [f"missing {path}" for path in wanted if path not in leaves]
    for path, leaf in leaves.items():
        if path not in wanted:
            problems.append(f"extra {path}")
        elif np.shape(leaf) != wanted[path].shape:
            expected = list(wanted[path].shape)
            problems.append(f"{path} has shape {list(np.shape(leaf))}, the model {expected}")
        elif str(leaf.dtype) not in FLOATS:
            problems.append(f"{path} is {leaf.dtype} (allowed: {', '.join(FLOATS)})")
    if problems:
        raise ValueError(
            f"these are not the parameters of the model: {'; '.join(problems)}. Give the tree of"
            " load_pretrained or init_params, or one shaped like it"
        )
    return [(target, leaves[path]) for path, target in wanted.items()]


def _config_json(
    config: LlamaConfig, pairs: list[tuple[Target, Any]], policy: KVPolicy | None
) -> dict[str, Any]:
    found = {str(array.dtype) for _, array in pairs}
    dtype = next(name for name in FLOATS if name in found)
    # transformers 4 reads torch_dtype, 5 reads dtype.
    raw = config.to_hf() | {"dtype": dtype, "torch_dtype": dtype}
    return raw if policy is None else raw | {POLICY_KEY: policy_to_dict(policy)}


def _write_json(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2) + "\n", encoding="utf-8")


def _write_weights(
    stage: Path | None, pairs: list[tuple[Target, Any]], on_progress: OnProgress | None
) -> None:
    """Writes the tensors into files of at most MAX_SHARD_BYTES, with an index if there are several.

    Hosts other than the first have no stage: they only take part in gathering the arrays.
    """
    shards: list[list[tuple[Target, Any]]] = [[]]
    size = 0
    for target, array in pairs:
        if shards[-1] and size + array.nbytes > MAX_SHARD_BYTES:
            shards.append([])
            size = 0
        shards[-1].append((target, array))
        size += array.nbytes
    index: dict[str, str] = {}
    done = 0
    for number, shard in enumerate(shards, 1):
        name = SINGLE if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        tensors = {}
        for target, array in shard:
            whole = gather(array)
            done += 1
            if stage is not None:
                stored = whole.T if target.transposed else whole
                tensors[target.name] = np.ascontiguousarray(stored)
                index[target.name] = name
            if on_progress is not None:
                on_progress(done)
        if stage is not None:
            from safetensors.numpy import save_file

            save_file(tensors, stage / name, metadata={"format": "pt"})
    if stage is not None and len(shards) > 1:
        total = sum(array.nbytes for _, array in pairs)
        _write_json(stage / INDEX, {"metadata": {"total_size": total}, "weight_map": index})


@contextlib.contextmanager
def _staged(folder: Path) -> Iterator[Path | None]:
    """A directory to write into, whose files become those of `folder` at the end.

    None on hosts other than the first, which must not write.
    """
    if jax.process_index() != 0:
        yield None
        return
    # Beside a new folder, inside an old one: on the same file system in both cases.
    existed = folder.exists()
    parent = folder if existed else folder.parent
    parent.mkdir(parents=True, exist_ok=True)
    stage = parent / f".{folder.name}.tmp-{os.getpid()}"
    stage.mkdir()
    try:
        yield stage
        if existed:
            _replace_model(folder, stage)
        else:
            stage.rename(folder)
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def _replace_model(folder: Path, stage: Path) -> None:
    """Moves the staged files into `folder`; config.json goes first and comes last.

    Without it the folder is no model, so one that is broken off here is not taken for whole.
    """
    (folder / CONFIG).unlink(missing_ok=True)
    for old in [*folder.glob("model*.safetensors"), folder / INDEX]:
        old.unlink(missing_ok=True)
    for file in sorted(stage.iterdir(), key=lambda file: file.name == CONFIG):
        file.replace(folder / file.name)
