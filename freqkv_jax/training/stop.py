"""Being asked to stop: SIGTERM, Ctrl-C, or the cluster's notice of preemption."""

import signal
import threading
from typing import Any

from freqkv_jax.training.checkpoint import Checkpoints
from freqkv_jax.training.metrics import note


class Stop:
    """While it is entered, SIGTERM and Ctrl-C ask for a stop behind the step that runs.

    A second Ctrl-C stops at once. In a cluster jax's own service hears SIGTERM on any host and
    tells all of them to stop behind the same step.
    """

    def __init__(self, clustered: bool) -> None:
        self.clustered = clustered
        self._signal: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Stop":
        # A handler of ours would replace the service's; and only a main thread may have one.
        if not self.clustered and threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _hear(self, number: int, _: object) -> None:
        if self._signal is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._signal = number
        note("asked to stop: saving behind the step that runs")

    def asked(self, saved: Checkpoints, step: int) -> bool:
        """Whether to stop behind `step`; every process asks at every step."""
        if self.clustered:
            return saved.reached_preemption(step)
        return self._signal is not None

    def status(self) -> int:
        """The exit status of a run that was stopped: 0, for Ctrl-C 130."""
        return 130 if self._signal == signal.SIGINT else 0
