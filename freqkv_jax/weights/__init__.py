"""Real weights: Hugging Face directories and GGUF files, read and written."""

import os
import warnings
from collections.abc import Callable
from typing import Any

from jax.sharding import Mesh

from freqkv_jax.config import LlamaConfig
from freqkv_jax.kv import FreqKVConfig, KVPolicy
from freqkv_jax.model.llama import Llama, check_model_options
from freqkv_jax.weights.load import Source, load_params, open_source
from freqkv_jax.weights.peft import merge_adapter, remembered_policy, save_adapter
from freqkv_jax.weights.save import save_pretrained

__all__ = ["load_pretrained", "read_config", "save_adapter", "save_pretrained"]


def load_pretrained(
    path: str | os.PathLike[str],
    kv: KVPolicy | None = None,
    dtype: str = "bfloat16",
    mesh: Mesh | None = None,
    attention: str = "auto",
    adapter: str | os.PathLike[str] | None = None,
    float32: Callable[[str], bool] = lambda path: False,
) -> tuple[Llama, Any]:
    """Loads a model.

    Args:
      path: a Hugging Face directory (safetensors, in one file or several), a hub id, or a .gguf
        file (dequantised).
      kv: cache policy; None takes the one that the adapter or the model was saved with, else
        FreqKVConfig().
      dtype: of every weight and of activations.
      mesh: spreads the weights by `sharding.RULES`; each host reads only what it holds.
      attention: back end.
      adapter: a PEFT adapter directory (LoRA), merged into the weights.
      float32: of a weight's path ("norm/scale"), whether it alone is kept in float32: what is to
        be trained loses nothing of a float32 file.

    Returns:
      The model and its parameters.

    Raises:
      ValueError: what the path holds is damaged or not a model of this kind; a bad argument;
        an adapter for another base.
      OSError: nothing is there, or the hub cannot be reached.
      MemoryError: the weights do not fit.
    """
    check_model_options(dtype, attention)
    source = open_source(path)
    policy = kv or _remembered(source, adapter) or FreqKVConfig()
    policy.check_dtype(dtype)
    params = load_params(source, dtype, mesh, float32=float32)
    _warn_beyond_window(source.config, policy)
    model = Llama(source.config, policy, dtype, attention)
    return model, params if adapter is None else merge_adapter(adapter, model, params)


def read_config(
    path: str | os.PathLike[str], adapter: str | os.PathLike[str] | None = None
) -> tuple[LlamaConfig, KVPolicy | None]:
    """A model's config and the policy that it, or its adapter, remembers, if any; no weights."""
    source = open_source(path, weights=False)
    return source.config, _remembered(source, adapter)


def _remembered(source: Source, adapter: str | os.PathLike[str] | None) -> KVPolicy | None:
    return (remembered_policy(adapter) if adapter is not None else None) or source.policy


def _warn_beyond_window(config: LlamaConfig, policy: KVPolicy) -> None:
    size, window = policy.capacity, config.max_position_embeddings
    if size is not None and size > window:
        warnings.warn(
            f"cache_size {size} is above the model's max_position_embeddings {window}: positions"
            f" behind {window} are new to it; a cache_size of at most {window} is safe",
            UserWarning,
        )
