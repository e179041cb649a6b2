"""`freqkv plan --config FILE`: what training takes of each device's memory, by part."""

import argparse
import math
from typing import Any

from freqkv_jax.cli.common import add_config_arguments, note, size_text

DESCRIPTION = """\
Reckons from a config's shapes what each device must hold during training: weights, moments,
gradients, activations, caches, logits. Says whether that fits, and what to lower if not. Nothing
is compiled and no weights are read (of a hub id its config.json, unless model.shape names a shape).
`freqkv train --compile-only` gives the compiler's own figures for a TPU."""
EPILOG = """\
examples:
  freqkv plan --config llama2_7b_8k --devices 8 --hbm 80
  freqkv plan --config my.yaml --hbm v5e --set train.micro_batch=2"""
GIB = 1024**3
# Memory that a program can use, by name of the device.
GPUS = {"a100": 79 * GIB, "h100": 79 * GIB, "h200": 139 * GIB}


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the arguments."""
    parser.description, parser.epilog = DESCRIPTION, EPILOG
    add_config_arguments(parser)
    parser.add_argument(
        "--devices",
        type=int,
        metavar="N",
        help="devices to plan for (default: as many as the mesh says; those here if it has a -1)",
    )
    parser.add_argument(
        "--hbm",
        metavar="GIB",
        help="a device's memory in GiB, or its name: a100, h100, h200, v4, v5e, v5p, v6e, tpu7x"
        " (default: that of the accelerator here)",
    )


def run(args: argparse.Namespace) -> int:
    """Prints the table and the verdict; 1 if it does not fit."""
    try:
        from freqkv_jax.training import plan, schema
    except ImportError as error:
        raise ImportError(f"{error}: pip install 'freqkv-jax[train]'") from None

    hbm = None if args.hbm is None else parse_hbm(args.hbm)
    cfg = schema.load(args.config, args.set)
    config = plan.planned_config(cfg)
    num_devices = _num_devices(args.devices, cfg)
    if hbm is None:
        hbm = _memory_here()
    made = plan.make_plan(cfg, config, num_devices)
    if remark := plan.stand_in(cfg):
        note(remark)
    print("\n".join(_table(cfg, made)))
    if hbm is None:
        print("\nGive --hbm (GiB a device) to see whether it fits.")
        return 0
    usable = int(hbm * plan.USABLE)
    print(f"\nof {size_text(hbm)}  {made.total / hbm:.0%} (up to {plan.USABLE:.0%} is safe)")
    if made.total <= usable:
        print("It fits.")
        return 0
    print("It does not fit. What would help, alone (bytes a device then):")
    for text, total in plan.remedies(cfg, config, num_devices):
        fits = "fits" if total <= usable else "not enough alone"
        print(f"  --set {text:40} {size_text(total):>10}  {fits}")
    print("More devices with mesh.fsdp=-1 divide weights, moments and rows further.")
    return 1


def parse_hbm(text: str) -> int:
    """Bytes of "80" (GiB) or of a device's name; ValueError if it is neither."""
    from freqkv_jax.compile_check import CHIPS

    names = GPUS | {name: chip.hbm_bytes for name, chip in CHIPS.items()}
    if text.lower() in names:
        return names[text.lower()]
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(
            f"--hbm {text!r} is not understood; give GiB a device, as 80, or one of"
            f" {', '.join(names)}"
        )
    return int(size * GIB)


def _num_devices(given: int | None, cfg: Any) -> int:
    if given is not None:
        if given < 1:
            raise ValueError(f"--devices must be at least 1, got {given}")
        return given
    sizes = (cfg.mesh.data, cfg.mesh.fsdp, cfg.mesh.tensor)
    if -1 not in sizes:
        return math.prod(sizes)
    import jax

    return jax.device_count()


def _memory_here() -> int | None:
    """Bytes that the accelerator here has; None for a CPU."""
    import jax

    device = jax.local_devices()[0]
    stats = None if device.platform == "cpu" else device.memory_stats()
    return (stats or {}).get("bytes_limit")


def _table(cfg: Any, made: Any) -> list[str]:
    data, fsdp, tensor = made.mesh
    lines = [
        f"model            {cfg.model.path}, {cfg.train.mode}, {cfg.model.dtype}",
        f"mesh             data={data}, fsdp={fsdp}, tensor={tensor}"
        f" ({data * fsdp * tensor} devices)",
        f"batch            {cfg.train.batch_size} rows of {cfg.train.seq_len:,} tokens;"
        f" {made.rows} a device at once, {made.accumulation} micro-batches a step",
        "",
        "bytes a device",
    ]
    lines += [f"  {name:36} {size_text(size):>10}" for name, size in made.parts.items() if size]
    return [*lines, f"  {'total at the peak (reckoned)':36} {size_text(made.total):>10}"]
