"""The folder of a run: its config, and whether the run is done."""

import json
import secrets
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from freqkv_jax.evals.result import environment
from freqkv_jax.files import write_text
from freqkv_jax.sharding import wait_for_all
from freqkv_jax.training import distributed, schema

CONFIG, METRICS, SAMPLES, CURVES = "config.yaml", "metrics.jsonl", "samples.jsonl", "curves.png"
CHECKPOINTS, EVENTS, EXPORT, ADAPTER = "checkpoints", "tensorboard", "export", "adapter"
FINISHED = "finished.json"
SEEN_WITHIN_S = 10.0  # a network disk may show a new file late


class RunDir:
    """Names of what a run writes; local or remote (gs://)."""

    def __init__(self, path: str) -> None:
        from etils import epath

        self.remote = "://" in path
        self.path = epath.Path(path) if self.remote else epath.Path(path).expanduser().resolve()

    def __truediv__(self, name: str) -> Any:
        return self.path / name

    def write(self, name: str, text: str) -> None:
        """Writes a small file, whole or not at all; process 0 only."""
        if jax.process_index() == 0:
            if self.remote:
                (self / name).write_text(text)
            else:
                write_text(self / name, text)

    def check_shared(self) -> None:
        """Sees to it that all processes have the same folder; every process calls it.

        Raises:
          ValueError: in every process, if one of them does not see what process 0 writes.
        """
        if jax.process_count() == 1:
            return
        from jax.experimental import multihost_utils

        word = np.asarray(secrets.randbits(31), np.int32)
        name = f".shared-{int(multihost_utils.broadcast_one_to_all(word))}"
        failed: OSError | None = None
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self.write(name, "seen by every process of the run\n")
        except OSError as error:  # raised when all know
            failed = error
        wait_for_all("shared.written")
        begin = time.monotonic()
        while not (seen := (self / name).exists()) and time.monotonic() - begin < SEEN_WITHIN_S:
            time.sleep(0.2)
        lost = distributed.any_process(failed is not None or not seen)
        if jax.process_index() == 0:
            (self / name).unlink(missing_ok=True)
        if lost:
            raise ValueError(
                f"run.dir {self.path} is not one folder for all {jax.process_count()} processes:"
                " one of them does not see what process 0 writes there"
                + (f" ({failed})" if failed else "")
                + "; name a folder on a disk that all hosts share, or gs://BUCKET/NAME"
            )

    def put(self, name: str, make: Callable[[Path], Any]) -> None:
        """Lets `make` write a file or folder of that name; a remote one by way of a local copy."""
        if not self.remote:
            make(Path(self / name))
            return
        with tempfile.TemporaryDirectory() as temporary:
            local = Path(temporary, name)
            make(local)
            if jax.process_index():
                return
            for file in [local] if local.is_file() else sorted(local.rglob("*")):
                if file.is_file():
                    target = self / str(file.relative_to(temporary))
                    target.parent.mkdir(parents=True, exist_ok=True)
                    target.write_bytes(file.read_bytes())

    def finished_step(self) -> int:
        """The step up to which everything is done, the export too; 0 if it is not."""
        if not (self / FINISHED).exists():
            return 0
        return int(json.loads((self / FINISHED).read_text())["step"])

    def recorded(self) -> dict[str, Any]:
        """Versions, devices and code revision of the process that ran here last."""
        import yaml

        return yaml.safe_load((self / CONFIG).read_text())[schema.RECORDED]

    def check_config(self, config: schema.RunConfig) -> bool:
        """Compares with the config that the folder has; returns whether it has one.

        Raises:
          ValueError: they differ in what a resume may not change; or the file is not readable.
        """
        if not (self / CONFIG).exists():
            return False
        import yaml

        try:
            old = yaml.safe_load((self / CONFIG).read_text())
            old.pop(schema.RECORDED, None)
        except (yaml.YAMLError, AttributeError) as error:
            raise ValueError(f"{self / CONFIG} is damaged ({error}); choose another run.dir") from (
                error
            )
        differences = schema.resume_differences(old, schema.to_dict(config))
        if differences:
            raise ValueError(
                f"{self.path} holds a run with another config: {'; '.join(differences)}. Give the"
                " same values to go on with it, or choose another run.dir"
            )
        return True

    def write_config(self, config: schema.RunConfig) -> None:
        """Writes the resolved config, with versions, devices and code revision."""
        import yaml

        about = environment(sys.argv)
        whole = schema.to_dict(config) | {schema.RECORDED: about}
        self.write(CONFIG, yaml.safe_dump(whole, sort_keys=False))
