"""A Hugging Face directory: config.json and safetensors, in one file or several."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy, policy_from_dict
from freqkv_jax.weights.table import Index, Stored

CONFIG = "config.json"
SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
POLICY_KEY = "freqkv_jax"  # transformers ignores keys that it does not know


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds one object; ValueError naming the file if it is damaged."""
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # not JSON, or not UTF-8
        raise ValueError(f"{path} is truncated or corrupted: {error}") from error
    if not isinstance(data, dict):
        raise ValueError(f"{path} must hold one JSON object, got a {type(data).__name__}")
    return data


def read_config(folder: Path) -> tuple[LlamaConfig, KVPolicy | None]:
    """The model's config and the policy that `save_pretrained` wrote, if any."""
    path = folder / CONFIG
    if not path.is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG}: it is not a Hugging Face model")
    raw = read_json(path)
    try:
        config = LlamaConfig.from_hf(raw)
        remembered = raw.get(POLICY_KEY)
        return config, None if remembered is None else policy_from_dict(remembered)
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"{path}: {error}") from error


def config_dtype(folder: Path) -> str | None:
    """The dtype that config.json names, in the spelling of transformers 4 or 5."""
    raw = read_json(folder / CONFIG)
    named = raw.get("dtype") or raw.get("torch_dtype")
    return named if isinstance(named, str) else None


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold the model; none that merely lie beside them.

    Raises:
      FileNotFoundError: the directory has no weights, or its index names files that are not there.
      ValueError: the index is damaged.
    """
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    index = folder / INDEX
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} has neither {SINGLE} nor {INDEX}; save the model with safetensors first"
        )
    names = read_json(index).get("weight_map")
    if not isinstance(names, dict) or not all(isinstance(v, str) for v in names.values()):
        raise ValueError(f"{index} is corrupted: it has no weight_map from tensor to file")
    files = [folder / name for name in sorted(set(names.values()))]
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise FileNotFoundError(f"{index} names files that are not there: {', '.join(absent)}")
    return files


def stored_tensors(folder: Path) -> list[Stored]:
    """Every tensor of the directory's weight files; headers are read, data is not.

    Raises ValueError naming the file where one is truncated or corrupted.
    """
    return [tensor for file in weight_files(folder) for tensor in _tensors_of(file)]


def _tensors_of(file: Path) -> list[Stored]:
    import ml_dtypes  # noqa: F401  (teaches NumPy bfloat16, which safetensors then finds)
    from safetensors import SafetensorError, safe_open

    with open(file, "rb") as head:  # a missing right to read is reported as what it is
        pointer = head.read(40).startswith(b"version https://git-lfs")
    if pointer:
        raise ValueError(f"{file} is a Git LFS pointer, not weights; run `git lfs pull` there")
    try:
        handle = safe_open(file, framework="np")
        tensors = []
        for name in handle.keys():  # noqa: SIM118  (no mapping: keys() is all that it has)
            part = handle.get_slice(name)
            shape = tuple(part.get_shape())
            tensors.append(Stored(name, shape, part.get_dtype(), file, _reader(file, part)))
    except SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or corrupted: it cannot be read as safetensors ({error});"
            " fetch it again"
        ) from error
    return tensors


def _reader(file: Path, part: Any) -> Callable[[Index], np.ndarray]:
    from safetensors import SafetensorError

    def read(index: Index) -> np.ndarray:
        try:
            return part[index]
        except SafetensorError as error:
            raise ValueError(f"{file} is truncated or corrupted ({error})") from error

    return read
