"""Looking at a run while it goes: bad losses, held-out perplexity, a generated sample."""

import math
import statistics
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from freqkv_jax.generate import generate
from freqkv_jax.model.llama import Llama
from freqkv_jax.training.distributed import batch_share, global_batch
from freqkv_jax.training.loss import sum_loss
from freqkv_jax.training.rows import RowSource
from freqkv_jax.training.trainable import variables

HISTORY = 50  # losses that a spike is measured against
MIN_HISTORY = 10  # no spike is called before so many
BUCKETS = ("inside", "behind", "last_quarter")


class BadLossError(ValueError):
    """The loss is not a number, or has jumped, and the run stops."""


class LossGuard:
    """Says which loss is bad: not a number, or far above the median of the last ones."""

    def __init__(
        self, spike_ratio: float | None, records: Iterable[Mapping[str, Any]] = ()
    ) -> None:
        """Args: records: lines of metrics.jsonl before a resume, so that it goes on the same."""
        self.spike_ratio = spike_ratio
        self._losses: deque[tuple[int, float]] = deque(maxlen=HISTORY + 1)
        for record in records:
            if record.get("loss") is not None:
                self.problem(record["step"], record["loss"], record.get("finite", True))

    def limit(self, step: int) -> float:
        """A loss of `step` above it is a spike; infinity where none is called yet.

        The loss of the step before is left out: it is not known yet when a step is sent off.
        """
        known = [loss for at, loss in self._losses if at < step - 1][-HISTORY:]
        if self.spike_ratio is None or len(known) < MIN_HISTORY:
            return math.inf
        return self.spike_ratio * statistics.median(known)

    def problem(self, step: int, loss: float, finite: bool = True) -> str | None:
        """What is wrong with a step's loss, None if nothing; good ones are remembered."""
        if not math.isfinite(loss):
            return f"the loss of step {step} is {loss}"
        limit = self.limit(step)
        if loss > limit:
            return (
                f"the loss of step {step} is {loss:.4f}, above {limit:.4f}: train.spike_ratio"
                f" {self.spike_ratio} times the median of the last {HISTORY}"
            )
        if not finite:
            return f"a gradient of step {step} is not a finite number"
        self._losses.append((step, loss))
        return None


class HeldOut:
    """Perplexity of fixed held-out rows, by position: in the window, behind it, last quarter."""

    def __init__(
        self,
        model: Llama,
        mesh: Mesh,
        source: RowSource,
        num_rows: int,
        batch_size: int,
        scale: float,
    ) -> None:
        """Args: source: `num_rows` of its rows, evenly spread, are taken; `batch_size` at a time.
        scale: of `trainable.lora_scale`.
        """
        self.model, self.mesh, self.batch_size = model, mesh, batch_size
        count = min(num_rows, source.num_rows)
        self.rows = np.linspace(0, source.num_rows - 1, count).round().astype(np.int64)
        self.source = source
        self.share = batch_share(mesh, batch_size)

        def losses(trainable: Any, frozen: Any, maps: Any, batch: Any) -> Any:
            return sum_loss(
                model,
                variables(model, trainable, frozen, maps, scale),
                batch["tokens"],
                batch["mask"],
            )

        self._losses = jax.jit(losses)

    def __call__(self, trainable: Any, frozen: Any, maps: Any) -> dict[str, float | None]:
        """eval_loss, eval_perplexity, and both for each bucket; null where no token falls in."""
        sums: dict[tuple[int, ...], np.ndarray] = {}
        for batch in self._batches():
            places = np.arange(batch["tokens"].shape[1])
            for key, span in self._pieces(len(places)).items():
                mask = batch["mask"] & span
                data = global_batch(self.mesh, batch | {"mask": mask}, self.batch_size)
                with jax.set_mesh(self.mesh):
                    got = self._losses(trainable, frozen, maps, data)
                sums[key] = sums.get(key, np.zeros(2)) + [float(value) for value in got]
        result: dict[str, float | None] = {}
        for number, name in enumerate(("", *(f"_{bucket}" for bucket in BUCKETS))):
            total = sum((s for key, s in sums.items() if number in key), np.zeros(2))
            loss = float(total[0] / total[1]) if total[1] else None
            result[f"eval_loss{name}"] = loss
            # Not a number where there is no loss, or one so large that exp overflows.
            perplexity = math.exp(loss) if loss is not None and loss < 700 else None
            result[f"eval_perplexity{name}"] = perplexity
        return result

    def _pieces(self, length: int) -> dict[tuple[int, ...], np.ndarray]:
        """Positions [length] that belong to the same figures, by the numbers of these figures."""
        places = np.arange(length)
        window = self.model.kv.capacity or length
        inside = places <= window  # the token behind a full cache is predicted before compression
        member = (places >= 0, inside, ~inside, places >= length - length // 4)
        pieces: dict[tuple[int, ...], np.ndarray] = {}
        for place in places[1:]:
            key = tuple(n for n, span in enumerate(member) if span[place])
            pieces.setdefault(key, np.zeros(length, bool))[place] = True
        return pieces

    def _batches(self) -> Iterable[dict[str, np.ndarray]]:
        index, count = self.share
        size = self.batch_size // count
        for first in range(0, len(self.rows), self.batch_size):
            rows = self.rows[first : first + self.batch_size]
            filled = np.concatenate([rows, np.full(self.batch_size - len(rows), rows[-1])])
            real = np.arange(self.batch_size) < len(rows)
            own = slice(index * size, (index + 1) * size)
            batch = self.source.rows(filled[own])
            yield {"tokens": batch["tokens"], "mask": batch["mask"] & real[own, None]}


def sample(
    model: Llama,
    params: Mapping[str, Any],
    prompts: list[list[int]],
    num_tokens: int,
    decode: Callable[[list[int]], str],
) -> str:
    """What the model writes behind the first of the prompts, greedily."""
    return decode(generate(model, params, prompts, num_tokens)[0])
