"""The training loop, from the config to the exported model, on one page."""

import contextlib
import json
import warnings
from typing import Any

import numpy as np

from freqkv_jax.model.llama import Llama
from freqkv_jax.sharding import wait_for_all
from freqkv_jax.training import distributed, monitor
from freqkv_jax.training.checkpoint import Checkpoints
from freqkv_jax.training.data import Batches
from freqkv_jax.training.export import export
from freqkv_jax.training.metrics import note
from freqkv_jax.training.record import Recorder
from freqkv_jax.training.resume import start
from freqkv_jax.training.rundir import CHECKPOINTS, FINISHED, RunDir
from freqkv_jax.training.schema import RunConfig
from freqkv_jax.training.setup import Setup, prepare
from freqkv_jax.training.stop import Stop
from freqkv_jax.training.trainable import merge


def train(cfg: RunConfig) -> int:
    """Trains, or goes on training, what `cfg` says; returns the exit status.

    The same call after a kill at any moment goes on from the last checkpoint and ends with the
    same losses and weights. SIGTERM saves and returns 0.

    Raises:
      ValueError: bad config or data, a run.dir of another run, or a bad loss. OSError: files.
    """
    clustered = distributed.start(cfg.run.distributed)
    folder = RunDir(cfg.run.dir)
    folder.check_shared()
    resumed = folder.check_config(cfg)
    if resumed and folder.finished_step() >= cfg.train.steps:
        note(f"{folder.path}: all {cfg.train.steps} steps are done; nothing is left to do")
        return 0
    with contextlib.ExitStack() as stack:
        stop = stack.enter_context(Stop(clustered))
        setup = prepare(cfg, folder)
        note(distributed.describe(setup.mesh))
        keep = cfg.checkpoint
        saved = Checkpoints(folder / CHECKPOINTS, keep.keep, keep.keep_best)
        stack.callback(saved.close)
        state, frozen, first, about = start(cfg, setup, saved)
        folder.write_config(cfg)
        record = stack.enter_context(Recorder(cfg, folder, setup, first))
        guard = monitor.LossGuard(cfg.train.spike_ratio, record.past)
        batches = Batches(setup.source, cfg.train.batch_size, cfg.run.seed, *setup.batch_share)
        stack.callback(batches.close)
        if first == 0 and setup.held_out is not None:
            record.add({"step": 0} | setup.held_out(state.trainable, frozen, setup.maps))

        for step in range(first + 1, cfg.train.steps + 1):
            record.clock.begin()
            rows = batches.at(step - 1)
            batch = distributed.global_batch(setup.mesh, rows, cfg.train.batch_size)
            waited = record.clock.got()
            batch["limit"] = np.float32(guard.limit(step))
            state, metrics = setup.step(state, frozen, setup.maps, batch)
            stopping = stop.asked(saved, step) and step < cfg.train.steps
            save, look, show = due_at(step, cfg, stopping)
            # The device works on this step while the one before is written down.
            for done in record.finished(step, metrics, waited, all_of_them=save or look or show):
                problem = guard.problem(done["step"], done["loss"], done["finite"])
                if problem is not None:
                    bad_loss(cfg, saved, problem)
            if stopping:  # first of all: there may be little time
                record.sync()
                saved.save(step, state, about | {"step": step})
                saved.wait()
            score = None
            if look and setup.held_out is not None:
                measured = setup.held_out(state.trainable, frozen, setup.maps)
                record.add({"step": step} | measured)
                score = measured["eval_loss"]
            if save and not stopping:
                record.sync()
                saved.save(step, state, about | {"step": step}, score)
            if show:
                record.add_sample(step, sample(cfg, setup, state, frozen))
            if save or look or show:
                record.pause()
            if stopping:
                note(f"stopped after step {step}, which is saved; the same command goes on")
                return stop.status()
        saved.wait()
        finish(cfg, folder, setup, state, frozen)
        share = record.clock.wait_share
        waited = "" if share is None else f"; {share:.2%} of the steps' time was waiting for data"
        note(f"done: {cfg.train.steps} steps in {folder.path}{waited}")
    return 0


def finish(cfg: RunConfig, folder: RunDir, setup: Setup, state: Any, frozen: Any) -> None:
    """Exports what was trained and marks the run as done; no process returns before that."""
    export(cfg, folder, setup, state, frozen)
    folder.write(FINISHED, json.dumps({"step": cfg.train.steps}) + "\n")
    # jax's own barrier at the end gives up after 5 minutes; an upload may take longer.
    wait_for_all("finished")


def due_at(step: int, cfg: RunConfig, stopping: bool) -> tuple[bool, bool, bool]:
    """Whether to save, to measure held-out text and to write a sample behind `step`."""
    save = stopping or due(step, cfg.checkpoint.every, cfg)
    best = save and cfg.checkpoint.keep_best and not stopping
    return save, due(step, cfg.log.eval_every, cfg) or best, due(step, cfg.log.sample_every, cfg)


def due(step: int, every: int, cfg: RunConfig) -> bool:
    """Whether something is to happen at `step`: every so many steps (0: never), and at the end."""
    return bool(every) and (step % every == 0 or step == cfg.train.steps)


def bad_loss(cfg: RunConfig, saved: Checkpoints, problem: str) -> None:
    """Warns where a bad batch is to be skipped (the step has not applied it); else raises."""
    if cfg.train.on_bad_loss == "skip":
        warnings.warn(f"{problem}; its batch is skipped")
        return
    saved.wait()
    steps = saved.steps()
    good = f"the last good checkpoint is {saved.folder / str(steps[-1])}" if steps else "none saved"
    raise monitor.BadLossError(
        f"{problem}; {good}. Lower optimizer.learning_rate, look at the data of this step, or set"
        " train.on_bad_loss=skip (in a new run.dir)"
    )


def sample(cfg: RunConfig, setup: Setup, state: Any, frozen: Any) -> str:
    """What the model now writes behind log.sample_prompt."""
    params = merge(state.trainable, frozen, setup.scale, cfg.model.dtype)
    tokenizer = setup.tokenizer()
    prompt = tokenizer.encode(cfg.log.sample_prompt)
    model: Llama = setup.model
    # Each position of the batch axes has a row; all are the same.
    prompts = [prompt] * (setup.mesh.shape["data"] * setup.mesh.shape["fsdp"])
    return monitor.sample(model, params, prompts, cfg.log.sample_tokens, tokenizer.decode)
