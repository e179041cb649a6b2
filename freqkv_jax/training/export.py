"""What a finished run leaves: a Hugging Face directory, and the adapter for peft."""

from typing import Any

from freqkv_jax import weights
from freqkv_jax.training.metrics import note
from freqkv_jax.training.rundir import ADAPTER, EXPORT, RunDir
from freqkv_jax.training.schema import RunConfig
from freqkv_jax.training.setup import Setup, is_shape, tokenizer_if_any
from freqkv_jax.training.trainable import merge


def export(cfg: RunConfig, folder: RunDir, setup: Setup, state: Any, frozen: Any) -> None:
    """Writes run.dir/export (merged weights) and, in mode lora, run.dir/adapter. Raises OSError.

    The adapter of a run that began with `model.adapter` belongs to a base that nobody has: the
    model with that one merged. None is written.
    """
    trainable = state.trainable
    if cfg.train.mode == "lora" and cfg.model.adapter is not None:
        note(
            f"no {ADAPTER}/: the new adapter fits {cfg.model.path} with {cfg.model.adapter} merged"
            f" into it, not {cfg.model.path} alone; {EXPORT}/ holds both, merged"
        )
    elif cfg.train.mode == "lora":
        from freqkv_jax.weights.peft import save_adapter

        base = None if is_shape(cfg.model.path) else cfg.model.path
        rank, alpha = cfg.train.lora_rank, cfg.train.lora_alpha

        def write_adapter(path: Any) -> None:
            save_adapter(setup.model, trainable, frozen, path, rank, alpha, base=base)

        folder.put(ADAPTER, write_adapter)
        note(f"adapter (peft): {folder / ADAPTER}")
    params = merge(trainable, frozen, setup.scale, cfg.model.dtype)
    tokenizer = tokenizer_if_any(setup)
    folder.put(EXPORT, lambda path: weights.save_pretrained(setup.model, params, path, tokenizer))
    note(f"merged model (Hugging Face): {folder / EXPORT}")
