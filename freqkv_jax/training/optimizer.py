"""The optimizer and its learning rate, from the config's section."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array

from freqkv_jax.sharding import tree_path

if TYPE_CHECKING:
    from freqkv_jax.training.schema import OptimizerSection

Schedule = Callable[[Any], Array]


def make_optimizer(
    section: "OptimizerSection", steps: int
) -> tuple[optax.GradientTransformation, Schedule]:
    """The optax transformation, and the learning rate of step s (0 is the first).

    The chain clips by global norm, then AdamW, Adafactor or Lion. Norms and biases do not decay.
    """
    schedule = make_schedule(section, steps)
    decay = section.weight_decay
    if section.name == "adamw":
        core = optax.adamw(
            schedule, section.b1, section.b2, section.eps, weight_decay=decay, mask=decay_mask
        )
    elif section.name == "lion":
        core = optax.lion(schedule, section.b1, section.b2, weight_decay=decay, mask=decay_mask)
    elif section.name == "adafactor":
        core = _adafactor(schedule, decay)
    else:
        raise ValueError(
            f"optimizer.name {section.name!r} is unknown; allowed: adamw, adafactor, lion"
        )
    if section.clip_norm is not None:
        core = optax.chain(optax.clip_by_global_norm(section.clip_norm), core)
    return _lenient(core), schedule


def _lenient(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner` under JAX's standard promotion: optax mixes ints and floats, whatever is set."""

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
            return inner.update(updates, state, params)

    return optax.GradientTransformation(inner.init, update)


def _adafactor(schedule: Schedule, decay: float) -> optax.GradientTransformation:
    # Not optax.adafactor: its steps scale with the weights (LoRA's b starts at zero) and its decay
    # does not follow the learning rate.
    return optax.chain(
        optax.scale_by_factored_rms(),
        optax.clip_by_block_rms(1.0),
        optax.add_decayed_weights(decay, mask=decay_mask),
        optax.scale_by_learning_rate(schedule),
    )


def make_schedule(section: "OptimizerSection", steps: int) -> Schedule:
    """The learning rate by step: a linear warm-up, then the named shape down to the last step."""
    warmup, floor = section.warmup_steps, section.final_ratio
    decay_start = {
        "constant": steps,
        "cosine": warmup,
        "linear": warmup,
        "wsd": max(warmup, steps - round(section.decay_ratio * steps)),
    }
    if section.schedule not in decay_start:
        raise ValueError(
            f"optimizer.schedule {section.schedule!r} is unknown; allowed: {', '.join(decay_start)}"
        )
    start = decay_start[section.schedule]

    def rate(step: Any) -> Array:
        step = jnp.asarray(step, jnp.float32)
        warm = jnp.minimum((step + 1.0) / max(warmup, 1), 1.0)
        done = jnp.clip((step - start) / max(steps - 1 - start, 1), 0.0, 1.0)
        if section.schedule == "cosine":
            done = (1.0 - jnp.cos(jnp.pi * done)) / 2.0
        if section.schedule == "constant":
            done = jnp.zeros_like(done)
        return section.learning_rate * warm * (1.0 - (1.0 - floor) * done)

    return rate


def decay_mask(tree: Any) -> Any:
    """True where weight decay applies: everything but norms and biases."""

    def decays(path: tuple[Any, ...], leaf: Any) -> bool:
        return leaf.ndim > 1 and tree_path(path).rpartition("/")[2] not in ("scale", "bias")

    return jax.tree_util.tree_map_with_path(decays, tree)
