"""`freqkv train`: fine-tune a model as a config says; run again, it goes on where it stopped."""

import argparse
import time
from typing import Any

from freqkv_jax.cli.common import add_config_arguments, describe_policy, enable_compile_cache, note

DESCRIPTION = """\
Fine-tunes a model as a config says and writes metrics, checkpoints, curves and the tuned model
(for transformers and, in mode lora, for peft) into run.dir. The same command again goes on where
an earlier one was stopped or killed. SIGTERM saves and ends with status 0."""
EPILOG = """\
examples:
  freqkv train --config tiny
  freqkv train --config my.yaml --set run.dir=runs/a train.steps=200
  freqkv train --config llama2_7b_8k --compile-only tpu:v5e:4x4

FILE is a YAML file or the name of a packaged config: """


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    from freqkv_jax.training.yaml_file import packaged_configs

    parser.description, parser.epilog = DESCRIPTION, EPILOG + ", ".join(packaged_configs())
    add_config_arguments(parser)
    parser.add_argument(
        "--compile-only",
        metavar="tpu:GENERATION:TOPOLOGY",
        help="trains nothing: compiles the step for this machine (e.g. tpu:v5e:16x16, or cpu:8)"
        " and prints memory, collectives and FLOPs; mesh sizes of the config apply (-1: the rest)",
    )
    parser.add_argument("--json", metavar="FILE", help="with --compile-only: write the report too")
    parser.add_argument(
        "--layers",
        type=int,
        metavar="N",
        help="with --compile-only: of the model, only so many (compiles faster)",
    )


def run(args: argparse.Namespace) -> int:
    """Trains, or compiles only."""
    from freqkv_jax.training import schema

    if args.json and not args.compile_only:
        raise ValueError("--json belongs to --compile-only; metrics are in run.dir/metrics.jsonl")
    if args.layers is not None and not args.compile_only:
        raise ValueError("--layers belongs to --compile-only; training needs the whole model")
    cfg = schema.load(args.config, args.set)
    if args.compile_only:
        return compile_only(args, cfg)
    check_packages("optax", "orbax.checkpoint", "etils.epath")
    enable_compile_cache()
    from freqkv_jax.training.loop import train

    return train(cfg)


def check_packages(*packages: str) -> None:
    """ImportError that says what to install where one of them is missing."""
    import importlib

    for package in packages:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(
                f"training needs {package.split('.')[0]}: pip install 'freqkv-jax[train]'"
            ) from error


def compile_only(args: argparse.Namespace, cfg: Any) -> int:
    """Compiles the train step for `--compile-only` and prints what `freqkv compile` prints."""
    from freqkv_jax import compile_check
    from freqkv_jax.cli import compile as printed
    from freqkv_jax.evals import result
    from freqkv_jax.sharding import make_mesh
    from freqkv_jax.training.plan import planned_config, stand_in

    target = compile_check.Target.parse(args.compile_only)
    if args.json:
        result.check_output(args.json)
    check_packages("optax")
    from freqkv_jax.training import compile_step

    compile_check.prepare(args.compile_only)
    devices = target.devices()
    chip = compile_check.device_chip(target, devices)
    data, fsdp, tensor = cfg.mesh.sizes(len(devices))
    mesh = make_mesh(data, fsdp, tensor, devices)
    if remark := stand_in(cfg):
        note(remark)
    note(f"compiling for {len(devices)} devices of {args.compile_only}; large models take minutes")
    begin = time.monotonic()
    config = printed.first_layers(planned_config(cfg), args.layers)
    report = compile_step.report(cfg, config, mesh, chip)
    seconds = time.monotonic() - begin
    report = describe(args.compile_only, cfg, config, mesh, seconds) | report
    if args.json:
        result.write_result(args.json, report | {"versions": compile_check.compiler_versions()})
    print("\n".join([*printed.lines(report), *gather_lines(report)]))
    if args.json:
        print(f"written          {args.json}")
    return 0


def gather_lines(report: dict[str, Any]) -> list[str]:
    """How often weights are gathered."""
    counts = report["weight_gathers"].values()
    if not counts:
        return ["weights gathered none"]
    most = [max(count[name] for count in counts) for name in ("forward", "backward")]
    return [
        f"weights gathered {len(counts)}; a micro-batch gathers one at most {most[0]:g} times"
        f" forward and {most[1]:g} backward"
    ]


def describe(target: str, cfg: Any, config: Any, mesh: Any, seconds: float) -> dict[str, Any]:
    """What was compiled, as plain data."""
    from freqkv_jax.kv.policy import policy_to_dict

    train = cfg.train
    row_shards = mesh.shape["data"] * mesh.shape["fsdp"]
    parts = train.accumulation(row_shards)
    return {
        "target": target,
        "model": cfg.model.path,
        "what": "train step",
        "program": f"{train.mode}, {train.batch_size} rows of {train.seq_len} tokens in {parts}"
        f" micro-batch{'es' * (parts > 1)}, remat {train.remat}, {cfg.optimizer.name}",
        "num_params": config.num_params,
        "num_layers": config.num_layers,
        "mesh": dict(mesh.shape),
        "num_devices": mesh.size,
        "batch": train.batch_size,
        "seq_len": train.seq_len,
        "micro_batches": parts,
        "dtype": cfg.model.dtype,
        "attention": cfg.model.attention,
        "kv": policy_to_dict(cfg.kv),
        "policy_line": describe_policy(cfg.kv),
        "compile_seconds": round(seconds, 1),
    }
