"""Reading weights: open a source, pair its tensors with the tree, and place them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding

from freqkv_jax import sources
from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import KVPolicy
from freqkv_jax.sharding import check_mesh, param_shardings
from freqkv_jax.weights import gguf, hf
from freqkv_jax.weights.memory import check_memory
from freqkv_jax.weights.table import Names, Stored, Target, match, nest, targets

OnProgress = Callable[[int], None]  # gets how many tensors are done


@dataclass(frozen=True)
class Source:
    """An opened model whose data has not been read. `policy` is the one that it remembers."""

    path: Path
    config: LlamaConfig
    policy: KVPolicy | None
    names: Names
    reader: Any = None  # of a GGUF file

    def tensors(self) -> list[Stored]:
        """The tensors that are stored; ValueError or OSError if the files are damaged or absent."""
        if self.names == "gguf":
            return gguf.stored_tensors(self.path, self.reader, self.config)
        return hf.stored_tensors(self.path)

    @property
    def num_tensors(self) -> int:
        """How many weights the model has."""
        return len(targets(self.config, self.names))


def open_source(path: str | Any, weights: bool = True) -> Source:
    """Opens a Hugging Face directory, a hub id or a GGUF file (see `sources.resolve`)."""
    local = sources.resolve(path, weights)
    if local.is_dir():
        return Source(local, *hf.read_config(local), "hf")
    reader = sources.open_gguf(local)
    return Source(local, gguf.read_config(local, reader), None, "gguf", reader)


def stored_dtype(source: Source) -> str:
    """The dtype of what is stored: float32 for GGUF (dequantised), else that of most weights."""
    if source.names == "gguf":
        return "float32"
    counts: dict[str, int] = {}
    for _, tensor in match(source.tensors(), source.config, source.names, source.path):
        counts[tensor.dtype] = counts.get(tensor.dtype, 0) + tensor.num_elements
    names = {"BF16": "bfloat16", "F16": "float16"}
    return names.get(max(counts, key=lambda kind: counts[kind]), "float32")


def load_params(
    source: Source,
    dtype: str,
    mesh: Mesh | None = None,
    on_progress: OnProgress | None = None,
    float32: Callable[[str], bool] = lambda path: False,
) -> dict[str, Any]:
    """The parameter tree in `dtype`; on a mesh, each host reads only the slices that it holds.

    Args:
      float32: of a weight's path, whether it is kept in float32 instead.

    Raises:
      ValueError: damaged files, tensors that are not those of the config, or a mesh that does not
        divide the model.
      MemoryError: the weights do not fit.
    """
    pairs = match(source.tensors(), source.config, source.names, source.path)
    dtypes = {t.path: "float32" if float32(t.path) else dtype for t, _ in pairs}
    shapes = nest(
        {t.path: jax.ShapeDtypeStruct(t.shape, jnp.dtype(dtypes[t.path])) for t, _ in pairs}
    )
    shardings = None
    if mesh is not None:
        check_mesh(source.config, mesh)
        shardings = param_shardings(shapes, mesh)
    check_memory(shapes, dtype, shardings)
    leaves = {}
    for done, (target, stored) in enumerate(pairs, 1):
        sharding = None
        if shardings is not None:
            sharding = shardings
            for part in target.path.split("/"):
                sharding = sharding[part]
        leaves[target.path] = _place(target, stored, dtypes[target.path], sharding)
        if on_progress is not None:
            on_progress(done)
    return nest(leaves)


def _place(target: Target, stored: Stored, dtype: str, sharding: NamedSharding | None) -> jax.Array:
    """One weight as a jax array, in the tree's layout."""

    def part(index: Sequence[slice]) -> np.ndarray:
        index = tuple(index[::-1] if target.transposed else index)
        data = stored.read(index).astype(jnp.dtype(dtype), copy=False)
        return data.T if target.transposed else data

    everything = (slice(None),) * len(target.shape)
    if sharding is None:
        return jnp.asarray(part(everything))
    # Copies of a shard (a weight lies on every row of "data") are read once.
    read: dict[tuple, np.ndarray] = {}

    def shard(index: tuple[slice, ...] | None) -> np.ndarray:
        index = everything if index is None else index
        key = tuple((s.start, s.stop) for s in index)
        if key not in read:
            read[key] = part(index)
        return read[key]

    return jax.make_array_from_callback(target.shape, sharding, shard)
