"""The result file: one JSON object per run that says what was measured, of what, and with what."""

import hashlib
import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freqkv_jax.files import edges, write_text
from freqkv_jax.kv.policy import policy_to_dict
from freqkv_jax.model.llama import Llama

PACKAGES = ("freqkv-jax", "jax", "jaxlib", "flax", "numpy", "tokenizers", "safetensors", "gguf")

# Files of a model's folder that change its prompts or answers, as weights do.
BESIDE = (
    "config.json", "tokenizer.json", "adapter_config.json", "tokenizer_config.json",
    "special_tokens_map.json", "chat_template.jinja", "chat_template.json",
    "generation_config.json",
)  # fmt: skip


def check_output(path: str | os.PathLike[str]) -> None:
    """Creates the folder of a result file and sees that it can be written, before a long run.

    Raises OSError (a folder of that name, no permission, ...).
    """
    file = Path(path)
    if file.is_dir():
        raise IsADirectoryError(f"--output {file} is a folder; give a file name")
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=file.parent):
        pass


def write_result(path: str | os.PathLike[str], record: dict[str, Any]) -> None:
    """Writes `record` as JSON: the whole file appears at once, or not at all."""
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def environment(command: Sequence[str]) -> dict[str, Any]:
    """Versions, device, code revision and command line of this run."""
    import jax

    device = jax.devices()[0]
    return {
        "versions": versions(),
        "device": {
            "platform": device.platform,
            "kind": device.device_kind,
            "count": jax.device_count(),
            "num_hosts": jax.process_count(),
        },
        "code_revision": code_revision(),
        "command": shlex.join(command),
    }


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on."""
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def code_revision() -> str | None:
    """The git commit of this source tree, with "+changes" if it was edited; None outside git."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *args: str) -> str:
    command = ["git", "-C", str(root), *args]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def model_fingerprint(path: str | os.PathLike[str]) -> str | None:
    """SHA-256 that tells one checkpoint from another without reading all of it.

    Covers name, size, first and last MiB of each weight file, of the configuration and of what
    makes prompts and ends answers (BESIDE); of an adapter's folder, its weights and configuration.
    None where `path` is not on this disk (a hub id).
    """
    root = Path(path)
    if root.is_file():
        files = [root]
    elif root.is_dir():
        beside = [root / name for name in BESIDE if (root / name).is_file()]
        files = sorted(
            [*root.glob("model*.safetensors"), *root.glob("adapter*.safetensors"), *beside]
        )
    else:
        return None
    digest = hashlib.sha256()
    for file in files:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}\n".encode())
        digest.update(edges(file))
    return digest.hexdigest()


def describe_model(model: Llama) -> dict[str, Any]:
    """What a result file says about model and policy."""
    kept = getattr(model.kv, "keep", None)
    span = getattr(model.kv, "span", None)
    return {
        "policy": policy_to_dict(model.kv),
        "retain_ratio_effective": kept / span if kept is not None and span else None,
        "dtype": model.dtype,
        "model": model.config.to_hf(),
    }
