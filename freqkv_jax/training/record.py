"""What a run writes down at each step, and where: one place for all logs."""

import time
from typing import Any

import jax

from freqkv_jax.training import metrics, plots
from freqkv_jax.training.metrics import STEP_KEYS, JsonLines, Progress, TensorBoard, Wandb, note
from freqkv_jax.training.rundir import CURVES, EVENTS, METRICS, SAMPLES, RunDir
from freqkv_jax.training.schema import RunConfig, to_dict
from freqkv_jax.training.setup import Setup
from freqkv_jax.training.step import flops_per_step

DRAW_EVERY_S = 300.0


class Clock:
    """What steps took, and how much of that this host waited for data.

    A step is counted from the end of the one before it, or behind a pause from its own begin; of
    the waits those count that lie in between, whichever step they were for.
    """

    def __init__(self) -> None:
        self.seconds = self.waited = 0.0  # over the steps that are counted
        self._wait = 0.0  # all waits so far
        self._begun = self._mark()
        self._last: tuple[float, float] | None = None  # the end of the last step

    def _mark(self) -> tuple[float, float]:
        return time.monotonic(), self._wait

    def begin(self) -> None:
        """A step's batch is asked for."""
        self._begun = self._mark()

    def got(self) -> float:
        """The batch is there; returns the seconds since `begin`. Once a step."""
        waited = time.monotonic() - self._begun[0]
        self._wait += waited
        return waited

    def sent(self) -> tuple[float, float]:
        """The step was sent off: what `done` is to be given."""
        return self._begun

    def done(self, begun: tuple[float, float], known: bool) -> float | None:
        """The step is done; its seconds, None where these are not `known`, so do not count."""
        start, now = self._last or begun, self._mark()
        self._last = now
        if not known:
            return None
        seconds = max(now[0] - start[0], 1e-9)
        self.seconds += seconds
        self.waited += now[1] - start[1]
        return seconds

    def pause(self) -> None:
        """Something else than steps took time."""
        self._last = None

    @property
    def wait_share(self) -> float | None:
        """Share of the steps' time in which this host waited for data (the device at most so
        long: it works meanwhile on the step before); None before a second step."""
        return self.waited / self.seconds if self.seconds else None


class Recorder:
    """Takes each step's figures to metrics.jsonl, TensorBoard, W&B, curves.png and the terminal.

    A step's figures are read one step later, so that the device always has work.
    """

    def __init__(self, cfg: RunConfig, folder: RunDir, setup: Setup, first: int) -> None:
        """Args: first: steps done so far; what an earlier process wrote of later ones is cut."""
        self.cfg, self.folder = cfg, folder
        lead = jax.process_index() == 0
        behind = first if first else -1  # before any step the measurement of step 0 comes again
        self.lines = JsonLines(folder / METRICS)
        self.samples = JsonLines(folder / SAMPLES) if cfg.log.sample_every else None
        self.past = self.lines.cut(behind)
        if self.samples is not None:
            self.samples.cut(behind)
        local = lead and not folder.remote
        self.board = TensorBoard(
            str(folder / EVENTS) if cfg.log.tensorboard and local else None, first
        )
        if cfg.log.tensorboard and folder.remote:
            note(f"no {EVENTS}/: it is written to local folders only; {METRICS} has the figures")
        self.wandb = Wandb(str(folder.path) if cfg.log.wandb and lead else None, to_dict(cfg))
        self.progress = Progress(cfg.train.steps, first, cfg.log.every, lead)
        self.tokens = cfg.train.batch_size * cfg.train.seq_len
        peak = metrics.peak_flops(setup.mesh.devices.flat[0])
        self.peak_flops = None if peak is None else peak * setup.mesh.size
        self.flops = flops_per_step(cfg, setup.model)
        self._pending: list[tuple[int, Any, float, tuple[float, float]]] = []
        self.clock = Clock()
        self._drawn = time.monotonic()

    def __enter__(self) -> "Recorder":
        return self

    def __exit__(self, *_: object) -> None:
        self.progress.close()
        self._draw()
        for log in (self.lines, self.samples, self.board, self.wandb):
            if log is not None:
                log.close()

    def finished(
        self, step: int, got: Any, waited: float, all_of_them: bool
    ) -> list[dict[str, Any]]:
        """Notes that `step` was sent off; returns the records of steps that are done, written.

        `all_of_them`: this step's, too.
        """
        self._pending.append((step, got, waited, self.clock.sent()))
        records = []
        while len(self._pending) > (0 if all_of_them else 1):
            # The first step compiles. One that is waited for right behind another was at work
            # long before that one was read here. Neither's time is known.
            done, its, wait, begun = self._pending.pop(0)
            known = done > self.progress.first + 1 and not (all_of_them and records)
            loss = float(its["loss"])  # waits for the device
            records.append(self._write(done, loss, its, wait, self.clock.done(begun, known)))
        return records

    def _write(
        self, step: int, loss: float, got: Any, waited: float, seconds: float | None
    ) -> dict[str, Any]:
        speed = mfu = None
        if seconds is not None:
            speed = round(self.tokens / seconds, 1)
            mfu = self.flops / (seconds * self.peak_flops) if self.peak_flops else None
        values = (
            step,
            loss,
            float(got["grad_norm"]),
            float(got["learning_rate"]),
            speed,
            mfu,
            metrics.memory_bytes(),
            round(waited, 6),
            bool(got["finite"]),
        )
        record: dict[str, Any] = dict(zip(STEP_KEYS, values, strict=True))
        self.lines.append(record)
        if step % self.cfg.log.every == 0:
            self.board.scalars(step, record)
            self.wandb.scalars(step, record)
        self.progress.update(record)
        return record

    def pause(self) -> None:
        """Something else than steps took time: the next step's begins with its batch."""
        self.clock.pause()
        if time.monotonic() - self._drawn > DRAW_EVERY_S:
            self._draw()

    def add(self, record: dict[str, Any]) -> None:
        """A line of its own, such as held-out figures."""
        self.lines.append(record)
        self.board.scalars(record["step"], record)
        self.wandb.scalars(record["step"], {k: v for k, v in record.items() if k != "step"})
        if self.progress.shown and record.get("eval_perplexity") is not None:
            figures = [
                f"{name.removeprefix('eval_perplexity_').replace('_', ' ')} {value:.3f}"
                for name, value in record.items()
                if name.startswith("eval_perplexity_") and value is not None
            ]
            whole = f"{record['eval_perplexity']:.3f} ({', '.join(figures)})"
            note(f"step {record['step']}: held-out perplexity {whole}")

    def add_sample(self, step: int, text: str) -> None:
        """A text that the model wrote, into samples.jsonl."""
        if self.samples is not None:
            self.samples.append({"step": step, "text": text})
        if self.progress.shown:
            note(f"step {step} writes: {text}")

    def sync(self) -> None:
        """Sees to it that what a checkpoint stands on is on disk before it."""
        self.lines.sync()
        if self.samples is not None:
            self.samples.sync()

    def _draw(self) -> None:
        if not self.lines.writes:
            return
        self.lines.sync()
        records = metrics.read_lines(self.lines.path)
        try:
            self.folder.put(CURVES, lambda path: plots.draw_curves(records, path))
        except (ImportError, OSError) as error:  # a picture is no reason to stop a run
            note(f"no {CURVES}: {error}")
        self._drawn = time.monotonic()
