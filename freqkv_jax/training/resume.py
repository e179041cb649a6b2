"""Where a run begins: at its last checkpoint, if data and base are those that it has seen."""

from typing import Any

import jax

from freqkv_jax.training.checkpoint import Checkpoints
from freqkv_jax.training.metrics import note
from freqkv_jax.training.schema import RunConfig
from freqkv_jax.training.setup import Setup, abstract_of, first_state
from freqkv_jax.weights.peft import base_sample, samples_apart

# Relative distance of two samples: another mesh may round a merged adapter otherwise.
SAME = 1e-3


def start(cfg: RunConfig, setup: Setup, saved: Checkpoints) -> tuple[Any, Any, int, dict[str, Any]]:
    """(state, frozen, steps done) from the latest whole checkpoint, or from the beginning; and
    what a checkpoint says of data and base."""
    state, frozen = first_state(cfg, setup)
    own = {"data": setup.source.fingerprint, "base": sample_of(cfg, frozen)}
    if not saved.steps():
        return state, frozen, 0, own
    like = abstract_of(state, setup.mesh)
    for leaf in jax.tree.leaves(state):
        leaf.delete()  # the restored arrays take their place
    restored = saved.restore(like)
    if restored is None:
        state, frozen = first_state(cfg, setup)
        return state, frozen, 0, own
    state, about = restored
    check_base(cfg, about.get("base"), own["base"])
    if about["data"] != own["data"]:
        raise ValueError(
            f"the data differ from those that {cfg.run.dir} was trained on until step"
            f" {about['step']}; put them back as they were, or choose another run.dir"
        )
    if about["step"] > cfg.train.steps:
        raise ValueError(
            f"{cfg.run.dir} is at step {about['step']}, beyond train.steps {cfg.train.steps}"
        )
    note(f"going on from step {about['step']}")
    return state, frozen, about["step"], own


def sample_of(cfg: RunConfig, frozen: Any) -> dict[str, list[float]] | None:
    """Corners of frozen kernels, which tell the base again; None where no kernel is frozen."""
    return None if cfg.train.mode == "full" else base_sample(frozen)


def check_base(cfg: RunConfig, was: dict[str, list[float]] | None, now: Any) -> None:
    """Compares the samples of a checkpoint and of the model that was read.

    Args:
      was: None where the checkpoint has none.

    Raises:
      ValueError: they are of different weights.
    """
    if was is None or now is None:
        return
    distance = samples_apart(was, now)
    if not distance <= SAME:
        raise ValueError(
            f"model.path {cfg.model.path} holds another base than that on which {cfg.run.dir} was"
            f" trained: its weights differ by {distance:.1%}. Put the old weights back, or choose"
            " another run.dir"
        )
