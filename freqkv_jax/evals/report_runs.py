"""Result files as a report reads them: labels, bytes, samples."""

import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

import jax.numpy as jnp

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy
from freqkv_jax.kv.policy import POLICIES, policy_from_dict

# Of a config: what tells apart the rows of one table, and what does not change a result.
ROW_KEYS = {
    "model_path", "adapter", "model", "model_name", "policy", "policy_name",
    "retain_ratio_effective", "batch_size", "mesh", "output",
}  # fmt: skip
NAMES = {"freqkv": "FreqKV", "sink_window": "sink + window", "full": "full attention"}
SHORT = {
    "cache_size": "N", "sink_size": "S", "recent_size": "R", "retain_ratio": "ratio", "chunk": "Q",
}  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One result file.

    Attributes:
      data: the JSON object. path: where it was read.
    """

    path: str
    data: dict[str, Any] = field(repr=False)

    @property
    def task(self) -> str:
        """The task's name."""
        return self.data["task"]

    @property
    def config(self) -> dict[str, Any]:
        """Options, policy and model."""
        return self.data.get("config") or {}

    @property
    def records(self) -> list[dict[str, Any]]:
        """Those that did not fail."""
        return [record for record in self.data.get("records") or [] if "error" not in record]

    @property
    def policy_name(self) -> str:
        """As in the registry."""
        return (self.config.get("policy") or {}).get("policy", "unknown")

    @property
    def policy_label(self) -> str:
        """Of the suite, or the policy's name with the fields that are not its defaults."""
        return self.config.get("policy_name") or policy_label(self.config.get("policy") or {})

    @property
    def model_label(self) -> str:
        """Of the suite, or the model's and the adapter's file names."""
        if name := self.config.get("model_name"):
            return str(name)
        parts: list[Any] = [self.config.get("model_path"), self.config.get("adapter")]
        return " + ".join(Path(part).name for part in parts if part) or "model"

    @property
    def policy(self) -> KVPolicy | None:
        """None where this version does not know it."""
        try:
            return policy_from_dict(self.config.get("policy") or {})
        except (ValueError, TypeError):
            return None

    @property
    def native_window(self) -> int | None:
        """Positions that the model was trained for."""
        return (self.config.get("model") or {}).get("max_position_embeddings")

    @property
    def data_digest(self) -> str:
        """SHA-256 of the data, of several files one over theirs; "" where the result has none."""
        found = (self.data.get("data") or {}).get("sha256") or ""
        if isinstance(found, str):
            return found
        return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()

    def score_words(self, name: str = "") -> str:
        """What a score of a needle test counts, by default its main one: what is most likely after
        the right tokens, or what was written; "" where a result does not say."""
        name = name or str((self.data.get("grid") or {}).get("default") or "")
        pieces = "digits" if self.config.get("variant") == "passkey" else "tokens"
        words = {"greedy": f"{pieces} most likely", "exact": "digits written"}
        return words.get(name) or name.replace("_", " ")

    def kv_bytes(self, length: int) -> int | None:
        """Bytes of keys and values of one text of `length` tokens; None where they are unknown."""
        kv = self.policy
        try:
            config = LlamaConfig.from_hf(self.config["model"])
            dtype = str(jnp.dtype(self.config["dtype"]))
        except (KeyError, TypeError, ValueError):
            return self.data.get("kv_bytes")
        return None if kv is None else kv.kv_bytes(config, dtype, length)

    @property
    def nothing_compressed(self) -> bool:
        """Whether a policy that could have done something never did."""
        kv = self.policy
        if kv is not None and kv.capacity is None:
            return False
        if "nothing_compressed" in self.data:
            return bool(self.data["nothing_compressed"])
        rounds = self.data.get("num_compressions")
        rounds = rounds.get("max") if isinstance(rounds, dict) else rounds
        return rounds == 0

    def beyond_window(self, length: int) -> bool:
        """Whether full attention read more than the model was trained for."""
        kv, window = self.policy, self.native_window
        return kv is not None and kv.capacity is None and window is not None and length > window

    def setting(self, columns: Sequence[str] = ()) -> tuple[Any, ...]:
        """Equal for runs that may stand in one table; `columns` are options that may differ."""
        skip = ROW_KEYS | set(columns)
        options = {key: value for key, value in self.config.items() if key not in skip}
        text = self.data_digest or json.dumps(self.data.get("data") or {}, sort_keys=True)
        # A path says less than the digest of what lies there.
        options.pop("data", None)
        return (
            self.task,
            str(self.data.get("protocol")),
            text,
            json.dumps(options, sort_keys=True, default=str),
        )


def policy_label(policy: dict[str, Any]) -> str:
    """FreqKV N=2048 R=512: name, cache size, and what is not a default."""
    name = policy.get("policy", "unknown")
    cls = POLICIES.get(name)
    defaults = {f.name: f.default for f in dataclasses.fields(cls)} if cls else {}
    parts: list[str] = [NAMES.get(name) or str(name)]
    for key, value in policy.items():
        if key == "policy" or value is None:
            continue
        if key == "cache_size" or value != defaults.get(key):
            text = f"{value:.4g}" if isinstance(value, float) else str(value)
            parts.append(f"{SHORT.get(key, key)}={text}")
    return " ".join(parts)


def load_runs(paths: Iterable[str | os.PathLike[str]]) -> list[Run]:
    """The results in files and, at any depth, in folders (where other JSON files are passed over).

    Raises:
      FileNotFoundError: a path that is not there. ValueError: a file that is no result, or no
        result at all.
    """
    runs: dict[Path, Run] = {}
    for path in map(Path, paths):
        if path.is_dir():
            for file in sorted(path.rglob("*.json")):
                data = _read(file, strict=False)
                if data is not None:
                    runs.setdefault(file.resolve(), Run(str(file), data))
        elif path.is_file():
            data = _read(path, strict=True)
            assert data is not None
            runs.setdefault(path.resolve(), Run(str(path), data))
        else:
            raise FileNotFoundError(f"{path} is neither a result file nor a folder of results")
    if not runs:
        raise ValueError(
            f"no results in {', '.join(map(str, paths)) or 'nothing'}; give files that"
            " `freqkv eval TASK --output FILE.json` wrote, or folders of them"
        )
    return list(runs.values())


def _read(file: Path, strict: bool) -> dict[str, Any] | None:
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        if not strict:
            return None
        raise ValueError(f"{file} is not JSON ({error}); a run that was cut off?") from None
    fit = isinstance(data, dict) and {"task", "protocol", "config"} <= data.keys()
    if fit and isinstance(data["config"], dict):
        return data
    if strict:
        raise ValueError(
            f"{file} is JSON but no result of `freqkv eval` (it lacks task, protocol or config)"
        )
    return None


def finite(value: Any) -> TypeGuard[float]:
    """Whether a value is a number, and no infinity."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
