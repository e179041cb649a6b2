"""What a run writes down while it trains: metrics.jsonl, TensorBoard, W&B, a progress line."""

import contextlib
import hashlib
import importlib
import json
import math
import os
import re
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from freqkv_jax.files import write_text

STEP_KEYS = (
    "step", "loss", "grad_norm", "learning_rate", "tokens_per_second", "mfu", "memory_bytes",
    "data_wait_seconds", "finite",
)  # fmt: skip
# Dense bfloat16 FLOP/s of one device as jax counts devices, by its kind: the makers' data sheets.
PEAK_FLOPS = (
    (r"H100 PCIe", 756e12),
    (r"H100|H200|GH200", 989e12),
    (r"A100", 312e12),
    (r"B200|B100", 2250e12),
    (r"TPU v4", 137.5e12),  # one of a chip's two cores is a device unless they are joined
    (r"TPU v5 lite|TPU v5e", 197e12),
    (r"TPU v5", 459e12),
    (r"TPU v6", 918e12),
    (r"TPU7x|TPU v7", 1153.5e12),
)
REPORT_EVERY_S = 10.0  # where stderr is no terminal


def peak_flops(device: Any) -> float | None:
    """The device's peak bfloat16 FLOP/s; None where it is not known (a CPU)."""
    if device.platform == "cpu":
        return None
    for pattern, flops in PEAK_FLOPS:
        if re.search(pattern, device.device_kind):
            return flops
    return None


def memory_bytes() -> int | None:
    """The most bytes that this process's devices have held so far, on the fullest of them."""
    found = [(device.memory_stats() or {}) for device in jax.local_devices()]
    peaks = [stats["peak_bytes_in_use"] for stats in found if "peak_bytes_in_use" in stats]
    return max(peaks) if peaks else None


class JsonLines:
    """A file of JSON objects, one a line, written by process 0 alone.

    On a local disk each line is in the file when `append` returns. A remote file (gs://) cannot
    be appended to: it is written anew by `sync`.
    """

    def __init__(self, path: Any, writes: bool | None = None) -> None:
        """Args: writes: whether this process writes. None: if it is process 0."""
        self.path, self.remote = path, "://" in str(path)
        self.writes = jax.process_index() == 0 if writes is None else writes
        self.lines: list[str] = []
        self._file: Any = None

    def cut(self, step: int) -> list[dict[str, Any]]:
        """Drops lines of later steps, and what a kill left half written; returns what stays."""
        kept = [record for record in read_lines(self.path) if record["step"] <= step]
        if self.writes:
            text = "".join(_line(record) for record in kept)
            if self.remote:
                self.lines = [text] if text else []
                self._epath().write_text(text)
            else:
                write_text(self.path, text)
                self._file = open(self.path, "a", encoding="utf-8")  # noqa: SIM115
        return kept

    def append(self, record: Mapping[str, Any]) -> None:
        """Adds a line; numbers that JSON does not know (NaN, infinity) become null."""
        if not self.writes:
            return
        if self.remote:
            self.lines.append(_line(record))
            return
        self._file.write(_line(record))
        self._file.flush()

    def sync(self) -> None:
        """Sees to it that all lines outlive this machine's memory."""
        if not self.writes:
            return
        if self.remote:
            self._epath().write_text("".join(self.lines))
        else:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Writes what is left."""
        if self.writes and (self.remote or self._file is not None):
            self.sync()
        if self._file is not None:
            self._file.close()
            self._file = None

    def _epath(self) -> Any:
        from etils import epath

        return epath.Path(str(self.path))


def read_lines(path: Any) -> list[dict[str, Any]]:
    """The records of a metrics file; lines that are not whole are left out. [] if there is none."""
    if "://" in str(path):
        from etils import epath

        file: Any = epath.Path(str(path))
    else:
        file = Path(path)
    if not file.exists():
        return []
    records = []
    for line in file.read_text().splitlines():
        with contextlib.suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                records.append(record)
    return records


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in record.items()}) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


class TensorBoard:
    """Event files in `folder`; without a folder nothing happens."""

    def __init__(self, folder: str | None, step: int) -> None:
        """Args: step: where this run begins; what an earlier one wrote behind it is discarded."""
        self._writer: Any = None
        if folder is None:
            return
        try:
            from tensorboard.summary.writer.event_file_writer import EventFileWriter
        except ImportError as error:
            raise ImportError(
                "log.tensorboard needs tensorboard: pip install 'freqkv-jax[train]', or set"
                " log.tensorboard=false"
            ) from error
        # Their classes are made when they are imported, so no type checker knows them.
        self._events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        self._writer = EventFileWriter(folder)
        log = self._events.SessionLog
        self._add(step, session_log=log(status=log.START))

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the values that are numbers."""
        if self._writer is None:
            return
        numbers = [
            {"tag": _tag(name), "simple_value": float(value)}
            for name, value in values.items()
            if name != "step" and isinstance(value, (int, float))
        ]
        self._add(step, summary={"value": numbers})

    def _add(self, step: int, **what: Any) -> None:
        self._writer.add_event(self._events.Event(step=step, wall_time=time.time(), **what))

    def close(self) -> None:
        """Writes what is left."""
        if self._writer is not None:
            self._writer.close()


def _tag(name: str) -> str:
    return f"eval/{name[5:]}" if name.startswith("eval_") else f"train/{name}"


class Wandb:
    """A Weights & Biases run that goes on after a restart; off unless asked for."""

    def __init__(self, folder: str | None, config: Mapping[str, Any]) -> None:
        """Args: folder: of the run: its last name is shown, the whole path tells runs apart."""
        self._run: Any = None
        if folder is None:
            return
        try:
            import wandb  # type: ignore[import-not-found]
        except ImportError as error:
            raise ImportError("log.wandb needs wandb: pip install wandb") from error
        name = folder.rstrip("/").rpartition("/")[2]
        self._run = wandb.init(
            project="freqkv_jax",
            id=wandb_id(folder),
            name=name,
            config=dict(config),
            resume="allow",
        )

    def scalars(self, step: int, values: Mapping[str, Any]) -> None:
        """Adds the values of a step."""
        if self._run is not None:
            self._run.log({k: v for k, v in values.items() if v is not None}, step=step)

    def close(self) -> None:
        """Ends the upload."""
        if self._run is not None:
            self._run.finish()


def wandb_id(folder: str) -> str:
    """The run's id: its folder's name, and a digest of the path, for names repeat."""
    path = folder.rstrip("/")
    key = re.sub(r"[^A-Za-z0-9_-]+", "-", path.rpartition("/")[2]).strip("-")
    return f"{key}-{hashlib.sha256(path.encode()).hexdigest()[:8]}"


class Progress:
    """A bar with loss and time left on a terminal; in a log a line now and then."""

    def __init__(self, total: int, first: int, every: int = 1, shown: bool = True) -> None:
        """Args: first: steps done before this process began. every: steps between two updates."""
        self.total, self.first, self.every, self.shown = total, first, every, shown
        self.begin = self.reported = time.monotonic()
        self._bars: Any = None
        if shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
            from rich.progress import Progress as Bars

            columns = (TextColumn("training"), BarColumn(), MofNCompleteColumn())
            console = Console(stderr=True)
            self._bars = Bars(*columns, TextColumn("{task.description}"), console=console)
            self._task = self._bars.add_task("", total=total, completed=first)
            self._bars.start()

    def update(self, record: Mapping[str, Any]) -> None:
        """Shows a step's record."""
        step, now = record["step"], time.monotonic()
        if not self.shown or (step % self.every and step != self.total):
            return
        text = self.text(record, now)
        if self._bars is not None:
            self._bars.update(self._task, completed=step, description=text)
        elif now - self.reported >= REPORT_EVERY_S or step in (self.first + 1, self.total):
            print(f"step {step}/{self.total}: {text}", file=sys.stderr, flush=True)
            self.reported = now

    def text(self, record: Mapping[str, Any], now: float) -> str:
        """Loss, speed and time left."""
        done = record["step"] - self.first
        parts = [f"loss {record['loss']:.4f}"]
        if record["tokens_per_second"] is not None:
            parts.append(f"{record['tokens_per_second']:,.0f} tokens/s")
        if record["mfu"] is not None:
            parts.append(f"MFU {record['mfu']:.1%}")
        if done > 1:
            left = (now - self.begin) * (self.total - record["step"]) / done
            parts.append(f"{duration(left)} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Takes the bar off the terminal."""
        if self._bars is not None:
            self._bars.stop()


def duration(seconds: float) -> str:
    """Seconds in words: 3700 -> "1 h 01 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"


def note(text: str) -> None:
    """A remark to whoever watches; of process 0 only."""
    if jax.process_index() == 0:
        print(text, file=sys.stderr, flush=True)
