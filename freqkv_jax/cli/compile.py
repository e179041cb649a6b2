"""`freqkv compile`: what a program would take on a TPU, without one."""

import argparse
import dataclasses
import time
from typing import Any

from freqkv_jax.cli.common import (
    DTYPES,
    add_policy_arguments,
    describe_policy,
    note,
    parse_mesh,
    policy_from_flags,
    size_text,
)

DESCRIPTION = """\
Compiles a model's program for a TPU that is not here, with the real TPU compiler (libtpu, in the
extra 'tpu'), and prints what one chip would need: memory, FLOPs, collectives, whether a cache is
gathered, and the compiler's estimate of the time. No weights are read or made.

forward  the parallel form on --seq-len tokens a row, all logits
prefill  whole chunks read behind a full cache, one block of a long prompt
decode   one compression of every cache, then --steps greedy steps"""
EPILOG = """\
examples:
  freqkv compile --target tpu:v5e:4x4 --model llama2-7b --what decode
  freqkv compile --target tpu:v5p:2x2x2 --model MODEL --what forward --seq-len 32768 \\
    --mesh fsdp=2,tensor=4 --json report.json
  freqkv compile --target cpu:8 --model tiny --what prefill --cache-size 64

MODEL is a Hugging Face directory, a hub id, a .gguf file, or a shape by name: """


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    from freqkv_jax.compile_check import WHATS
    from freqkv_jax.compile_work import DEFAULT_STEPS
    from freqkv_jax.config import SHAPES
    from freqkv_jax.model.attention import BACKENDS

    shapes = ", ".join(SHAPES)
    parser.description, parser.epilog = DESCRIPTION, EPILOG + shapes
    parser.add_argument(
        "--target",
        required=True,
        metavar="tpu:GENERATION:TOPOLOGY",
        help="machine to compile for, e.g. tpu:v5e:4x4, tpu:v5p:2x2x2 (or cpu:8: fake devices)",
    )
    parser.add_argument("--model", required=True, metavar="MODEL", help="path, hub id or shape")
    parser.add_argument("--what", required=True, choices=WHATS, help="program to compile")
    parser.add_argument(
        "--seq-len",
        type=int,
        metavar="T",
        help="tokens a row (default: 8192; prefill: four chunks, and always whole chunks); in"
        " decode with --policy full, slots of the cache",
    )
    parser.add_argument("--batch", type=int, metavar="B", help="rows (default: data*fsdp)")
    parser.add_argument(
        "--steps", type=int, default=DEFAULT_STEPS, help="of decode (default: %(default)s)"
    )
    parser.add_argument(
        "--layers", type=int, metavar="N", help="of the model, only so many (compiles faster)"
    )
    parser.add_argument(
        "--mesh",
        metavar="data=A,fsdp=B,tensor=C",
        help="one of them may be -1 (default: tensor as large as the heads allow, up to 8; the"
        " rest fsdp, in decode data where the weights fit)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="default: %(default)s")
    parser.add_argument(
        "--attention", choices=BACKENDS, default="auto", help="back end (auto: splash on TPU)"
    )
    parser.add_argument("--json", metavar="FILE", help="write the whole report there, too")
    add_policy_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Compiles and prints the report."""
    from freqkv_jax import compile_check, compile_work
    from freqkv_jax.evals import result

    # All that can be wrong is found before the compiler starts.
    target = compile_check.Target.parse(args.target)
    kv_flags = policy_from_flags(args)
    config, kv = read_model(args.model, args.layers)
    if args.json:
        result.check_output(args.json)
    compile_check.prepare(args.target)
    devices = target.devices()
    chip = compile_check.device_chip(target, devices)
    plan = compile_work.make_plan(
        args.what,
        config,
        kv_flags or kv,
        devices,
        chip,
        parse_mesh(args.mesh) if args.mesh else None,
        args.batch,
        args.seq_len,
        args.steps,
        args.dtype,
        args.attention,
    )
    note(f"compiling for {len(devices)} devices of {args.target}; large models take minutes")
    begin = time.monotonic()
    report = compile_work.report(plan, chip)
    report = describe(args, plan, time.monotonic() - begin) | report
    if args.json:
        result.write_result(args.json, report | {"versions": compile_check.compiler_versions()})
    print("\n".join(lines(report)))
    if args.json:
        print(f"written          {args.json}")
    return 0


def read_model(name: str, layers: int | None) -> tuple[Any, Any]:
    """The config and the policy of a shape or of a model on disk or on the hub.

    Raises:
      ValueError: a name that is neither, or a number of layers that the model has not.
    """
    from pathlib import Path

    from freqkv_jax.config import SHAPES, shape_named
    from freqkv_jax.kv import FreqKVConfig

    kv = None
    if name in SHAPES:
        config = shape_named(name)
    elif "/" not in name and not Path(name).exists():
        raise ValueError(
            f"--model {name!r} is no file or folder here and no shape; shapes: {', '.join(SHAPES)}"
        )
    else:
        from freqkv_jax import weights

        config, kv = weights.read_config(name)
    return first_layers(config, layers), kv or FreqKVConfig()


def first_layers(config: Any, layers: int | None) -> Any:
    """The config with its first layers only (None: all); ValueError for a number it has not."""
    if layers is None:
        return config
    if not 1 <= layers <= config.num_layers:
        raise ValueError(f"--layers must be 1 to {config.num_layers} here, got {layers}")
    return dataclasses.replace(config, num_layers=layers)


def describe(args: argparse.Namespace, plan: Any, seconds: float) -> dict[str, Any]:
    """What was compiled, as plain data."""
    from freqkv_jax.kv.policy import policy_to_dict

    config = plan.model.config
    return {
        "target": args.target,
        "model": args.model,
        "what": args.what,
        "program": plan.describe(),
        "num_params": config.num_params,
        "num_layers": config.num_layers,
        "mesh": dict(plan.mesh.shape),
        "num_devices": plan.mesh.size,
        "batch": plan.batch,
        "seq_len": plan.seq_len,
        "steps": plan.steps if args.what == "decode" else None,
        "dtype": plan.model.dtype,
        "attention": plan.model.attention,
        "kv": policy_to_dict(plan.model.kv),
        "policy_line": describe_policy(plan.model.kv),
        "compile_seconds": round(seconds, 1),
    }


def lines(report: dict[str, Any]) -> list[str]:
    """The report for people; sizes are one device's unless it says otherwise."""
    mesh = ",".join(f"{axis}={size}" for axis, size in report["mesh"].items())
    flops = report["flops"]
    return [
        f"program          {report['what']}: {report['program']}",
        f"model            {report['model']}, {report['num_params'] / 1e9:.2f} billion weights,"
        f" {report['num_layers']} layers, {report['dtype']}",
        f"policy           {report['policy_line']}",
        f"devices          {report['num_devices']} of {report['target']}, mesh {mesh}",
        "",
        "memory of a device",
        *_memory_lines(report["memory"]),
        "",
        f"FLOPs            {flops['useful_total']:.4g} useful in all,"
        f" {flops['useful_per_device']:.4g} a device"
        f" (the compiler counts {flops['cost_analysis_per_device']:.4g}, each loop once)",
        f"kernels          {report['num_kernels']} runs of Pallas kernels",
        *_collective_lines(report),
        "",
        *_estimate_lines(report["estimate"], report["what"]),
        f"compiled in      {report['compile_seconds']:.0f} s",
    ]


def _memory_lines(memory: dict[str, Any]) -> list[str]:
    rows = [
        f"  {name:<14} {size_text(memory[name])}"
        for name in ("arguments", "outputs", "temporaries", "code")
    ]
    rows.insert(2, f"  {'  in place':<14} {size_text(memory['aliased'])} of the outputs")
    total = size_text(memory["total"])
    if memory["hbm"]:
        total += f" of {size_text(memory['hbm'])} HBM ({memory['hbm_share']:.1%})"
    return [*rows, f"  {'total':<14} {total}"]


def _collective_lines(report: dict[str, Any]) -> list[str]:
    rows = ["collectives      (instructions, runs with loops multiplied out, bytes of all runs)"]
    for row in report["collectives"]:
        rows.append(
            f"  {row['kind']:<20} {row['instructions']:>5} {row['runs']:>7} "
            f" {size_text(row['bytes'])}"
        )
    if len(rows) == 1:
        rows.append("  none")
    for loop in report["unknown_loops"]:
        rows.append(f"  a loop of unknown length counted once: {loop}")
    caches = [g for g in report["all_gathers"] if g["touches_cache"]]
    rows.append(f"cache gathered   {'YES' if caches else 'no'}")
    rows += [f"  {g['output']} ({g['origin']}) in {g['op_name']}" for g in caches]
    return rows


def _estimate_lines(estimate: dict[str, Any] | None, what: str) -> list[str]:
    if estimate is None:
        return ["estimate         none off TPU"]
    cycles = f"{estimate['cycles']:,} cycles by the compiler"
    if estimate["kernel_cycles"]:
        cycles += f" + {estimate['kernel_cycles']:,} for the kernels"
    mfu = "-" if estimate["mfu"] is None else f"{estimate['mfu']:.1%}"
    rows = [f"estimate         {cycles} = {estimate['seconds'] * 1e3:.3f} ms, MFU {mfu}"]
    if what == "decode" and (loop := estimate["longest_loop"]):
        turn = loop["cycles"] / estimate["clock_hz"] * 1e3
        rows.append(f"  of it          {loop['runs']} steps of {turn:.3f} ms")
    return [*rows, f"  ({estimate['note']})"]
