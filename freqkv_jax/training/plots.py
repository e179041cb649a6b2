"""curves.png: what metrics.jsonl says, as a picture."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from freqkv_jax.files import write_whole

PANELS = (
    ("loss", "loss (nats a token)"),
    ("grad_norm", "gradient norm"),
    ("learning_rate", "learning rate"),
    ("tokens_per_second", "tokens a second"),
)


def draw_curves(records: Sequence[dict[str, Any]], path: str | Path) -> None:
    """Draws losses (held-out ones too), gradient norm, learning rate and speed over the steps.

    Args: records: lines of metrics.jsonl. Raises OSError; ImportError where matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("curves.png needs matplotlib: pip install 'freqkv-jax[train]'") from error
    # A Figure of its own: pyplot would look for a screen and keep every figure.
    figure = Figure(figsize=(10, 6.5), layout="constrained")
    for axes, (key, label) in zip(figure.subplots(2, 2).flat, PANELS, strict=True):
        steps, values = _series(records, key)
        axes.plot(steps, values, linewidth=1, label="training")
        if key == "loss":
            _held_out(axes, records)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        axes.grid(alpha=0.3)
    write_whole(path, lambda name: figure.savefig(name, dpi=120, format="png"))


def _held_out(axes: Any, records: Sequence[dict[str, Any]]) -> None:
    drawn = False
    for key, label in (("eval_loss", "held out"), ("eval_loss_behind", "held out, behind window")):
        steps, values = _series(records, key)
        if steps:
            axes.plot(steps, values, marker="o", markersize=3, label=label)
            drawn = True
    if drawn:
        axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1), ncols=3, fontsize=8, frameon=False)


def _series(records: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    found = [(r["step"], r[key]) for r in records if isinstance(r.get(key), (int, float))]
    return [step for step, _ in found], [value for _, value in found]
