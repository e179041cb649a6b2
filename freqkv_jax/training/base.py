"""Whether a resume stands on the base model that the run began with."""

from typing import Any

import numpy as np

from freqkv_jax.training.schema import RunConfig
from freqkv_jax.weights.peft import _base_sample

# Relative distance of two samples: another mesh may round a merged adapter otherwise.
SAME = 1e-3


def base_sample(cfg: RunConfig, frozen: Any) -> dict[str, list[float]] | None:
    """Corners of frozen kernels, which tell the base again; None where no kernel is frozen."""
    return None if cfg.train.mode == "full" else _base_sample(frozen)


def check_base(cfg: RunConfig, was: dict[str, list[float]] | None, now: Any) -> None:
    """Compares the samples of a checkpoint and of the model that was read.

    Args:
      was: None where the checkpoint has none.

    Raises:
      ValueError: they are of different weights.
    """
    if was is None or now is None:
        return
    before = np.concatenate([np.asarray(values) for values in was.values()])
    here = np.concatenate([np.asarray(now.get(name, np.zeros(len(x)))) for name, x in was.items()])
    distance = float(np.linalg.norm(here - before) / max(np.linalg.norm(before), 1e-30))
    if not distance <= SAME:
        raise ValueError(
            f"model.path {cfg.model.path} holds another base than that on which {cfg.run.dir} was"
            f" trained: its weights differ by {distance:.1%}. Put the old weights back, or choose"
            " another run.dir"
        )
