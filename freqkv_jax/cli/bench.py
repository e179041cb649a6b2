"""`freqkv bench`: how fast this device runs a model, and how fast it could."""

import argparse
import dataclasses
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from freqkv_jax.cli.common import (
    DTYPES,
    add_config_arguments,
    add_policy_arguments,
    add_weights_argument,
    default_dtype,
    describe_policy,
    note,
    policy_from_flags,
)

DESCRIPTION = """\
Times a model with random weights on this device, the full cache beside the chosen policy, and
puts each time beside its roofline: what the same FLOPs and bytes would take at the matmul rate and
the copy bandwidth that are measured in the same run.

forward    final hidden states of whole texts (parallel form, no head)
prefill    texts into a state, as fk.prefill drives it
decode     ms a token over a whole round, its compression included
compress   the cache recurrence of one layer: all chunks' caches
attention  one layer's attention, its caches given
layer      one layer forward and backward: gradients of its input and all its weights
all        all of these
train      an optimizer step of a training config (--config), its state donated, on random tokens"""
EPILOG = """\
examples:
  freqkv bench all --model llama2-7b --json bench.json
  freqkv bench decode --model llama3-8b --batch 8
  freqkv bench forward --model llama2-7b --only 'forward/freqkv/*' --profile traces
  freqkv bench train --config smollm2_8k
  freqkv bench train --config llama2_7b_8k --batch 2 --policy-only --set train.remat=dots
  freqkv bench all --model tiny --cache-size 64 --lengths 124,496

MODEL is a Hugging Face directory, a hub id, a .gguf file (only its shape is used), or a shape by
name: """
DEFAULT_BUDGET = 540.0


def configure(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    from freqkv_jax.bench.cases import WORKS
    from freqkv_jax.config import SHAPES
    from freqkv_jax.model.attention import BACKENDS

    parser.description, parser.epilog = DESCRIPTION, EPILOG + ", ".join(SHAPES)
    parser.add_argument("work", choices=(*WORKS, "all", "train"), help="what to time")
    parser.add_argument("--model", metavar="MODEL", help="path, hub id or shape; not of train")
    add_config_arguments(parser, required=False)
    parser.add_argument(
        "--lengths",
        metavar="T,T,...",
        help="tokens of a text; of decode, what a full cache holds (default: N+2Q,N+14Q,N+62Q; of"
        " train, the config's)",
    )
    parser.add_argument(
        "--batch", type=int, metavar="B", help="rows (default: 1; of train, the config's)"
    )
    parser.add_argument("--layers", type=int, metavar="N", help="of the model, only so many")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        help="default: float32 on a CPU, bfloat16 elsewhere; of train, the config's",
    )
    parser.add_argument("--attention", choices=BACKENDS, help="back end (default: auto)")
    _add_run_arguments(parser)
    add_weights_argument(parser, "decode")
    add_policy_arguments(parser)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Which cases run, how often, how long, and what is written."""
    parser.add_argument(
        "--repeats", type=int, default=5, metavar="R", help="timed calls, 5 at least (default: 5)"
    )
    parser.add_argument(
        "--policy-only", action="store_true", help="leave out the full cache beside the policy"
    )
    parser.add_argument(
        "--only",
        metavar="PATTERN,...",
        help="cases whose name (work/policy/length) matches, for example 'decode/*'",
    )
    parser.add_argument(
        "--budget",
        type=float,
        default=DEFAULT_BUDGET,
        metavar="SECONDS",
        help="skip what would end later (default: %(default)g; compiling cannot be foreseen)",
    )
    parser.add_argument(
        "--peers",
        action="store_true",
        help="Hugging Face torch on the same shape, first (needs torch and transformers)",
    )
    parser.add_argument(
        "--compile-only",
        action="store_true",
        help="compile each case from shapes and time nothing: with JAX_COMPILATION_CACHE_DIR set,"
        " several processes can make ready what one then times",
    )
    parser.add_argument("--json", metavar="FILE", help="write all figures, after every row")
    parser.add_argument("--profile", metavar="DIR", help="write a trace of one more call a case")


@dataclass
class Task:
    """What is to be measured. `cases`: made as they are asked for; `params`: the weights, when the
    first case is due."""

    model: str
    config: Any
    kv: Any
    dtype: str
    cases: Iterable[Any]
    params: Callable[[], Any]
    peers: list[dict[str, Any]]


def run(args: argparse.Namespace) -> int:
    """Measures and prints the table."""
    from freqkv_jax.bench import report, timing
    from freqkv_jax.evals import result
    from freqkv_jax.kv.policy import policy_to_dict

    deadline = time.monotonic() + args.budget
    timing.check_repeats(args.repeats)
    _check_flags(args)
    if args.json:
        result.check_output(args.json)
    task = training_task(args) if args.work == "train" else model_task(args)

    record: dict[str, Any] = result.environment(args.command_line) | {
        "model": task.model,
        "num_params": task.config.num_params,
        "num_layers": task.config.num_layers,
        "weights": args.weights or task.dtype,  # of decode
        "kv": policy_to_dict(task.kv),
        "dtype": task.dtype,
        "rows": [],
        "peers": task.peers,
    }

    def on_row(row: dict[str, Any]) -> None:
        record["rows"].append(row)
        note(f"  {row['case']}: {_told(row)}")
        if args.json:
            result.write_result(args.json, record)

    if args.compile_only:
        rows = report.compile_cases(task.cases, task.params, args.only, on_row)
    else:
        ceilings = _ceilings(task.dtype, record)
        rows = report.run_cases(
            task.cases,
            task.params,
            ceilings,
            args.repeats,
            deadline,
            args.only,
            args.profile,
            on_row,
        )
    if not rows:
        raise ValueError(f"no case of {args.work} is called {args.only or 'anything here'!r}")
    print("\n".join(heading(record, describe_policy(task.kv), args.repeats)))
    print(report.table(rows))
    for peer in task.peers:
        print(_peer_line(peer))
    if args.json:
        print(f"\nwritten to {args.json}")
    return 0


def _ceilings(dtype: str, record: dict[str, Any]) -> Any:
    """What this device can do, measured, and put into the record."""
    from freqkv_jax.bench.ceilings import measure_ceilings

    note(f"measuring this device's matmul rate ({dtype}) and copy bandwidth")
    ceilings = measure_ceilings(dtype)
    record["ceilings"] = {
        "flops_per_s": ceilings.flops_per_s,
        "bytes_per_s": ceilings.bytes_per_s,
        "dtype": dtype,
        "matmul_side": ceilings.sizes.matmul_side,
        "copy_bytes": 4 * ceilings.sizes.copy_elements,
    }
    return ceilings


def _told(row: dict[str, Any]) -> str:
    if "ms" in row:
        return f"{row['ms']:.4g} ms"
    return row.get("skipped") or f"compiled in {row['compile_seconds']:.1f} s"


def _check_flags(args: argparse.Namespace) -> None:
    if args.peers and args.compile_only:
        raise ValueError("--peers times Hugging Face, and --compile-only times nothing: give one")
    if args.work == "train":
        if args.config is None or args.model is not None:
            raise ValueError(
                "bench train takes a training config, which names the model: --config smollm2_8k"
                " [--set train.batch_size=4 ...], and no --model"
            )
        if args.peers:
            raise ValueError("--peers knows forward and decode, not train")
        if args.weights is not None:
            raise ValueError("--weights is decode's")
    elif args.model is None or args.config is not None or args.set:
        raise ValueError(f"bench {args.work} takes --model; --config and --set are train's")


def model_task(args: argparse.Namespace) -> Task:
    """What a model without a config does: every work but train."""
    from freqkv_jax.bench import cases
    from freqkv_jax.cli.compile import read_model
    from freqkv_jax.model.llama import Llama
    from freqkv_jax.model.params import abstract_params, init_params

    config, remembered = read_model(args.model, args.layers)
    kv = policy_from_flags(args) or remembered
    lengths = parse_lengths(args.lengths) or cases.default_lengths(kv)
    works = cases.WORKS if args.work == "all" else (args.work,)
    # Before JAX takes the device's memory.
    peers = run_peers(args, config, lengths, works) if args.peers else []
    dtype = args.dtype or default_dtype()
    model = Llama(config, kv, dtype, args.attention or "auto")
    batch = 1 if args.batch is None else args.batch
    todo = cases.make_cases(works, model, lengths, batch, not args.policy_only, args.weights)
    made: list[Any] = []

    def params() -> Any:
        if args.compile_only:
            return abstract_params(config, dtype)
        if not made:
            note(f"making {config.num_params / 1e9:.3g} billion random weights")
            made.append(init_params(model))
        return made[0]

    return Task(args.model, config, kv, dtype, todo, params, peers)


def training_task(args: argparse.Namespace) -> Task:
    """A step of the config, with what the flags change in it."""
    from freqkv_jax.bench.train_case import make_train_cases
    from freqkv_jax.cli.compile import first_layers
    from freqkv_jax.cli.train import check_packages
    from freqkv_jax.training import schema
    from freqkv_jax.training.plan import planned_config

    check_packages("optax")
    sets = list(args.set)
    for key, value in (
        ("model.dtype", args.dtype),
        ("model.attention", args.attention),
        ("train.batch_size", args.batch),
    ):
        sets += [] if value is None else [f"{key}={value}"]
    cfg = schema.load(args.config, sets)
    cfg = dataclasses.replace(cfg, kv=policy_from_flags(args) or cfg.kv)
    config = first_layers(planned_config(cfg), args.layers)
    lengths = parse_lengths(args.lengths) or (cfg.train.seq_len,)
    todo = make_train_cases(cfg, config, lengths, not args.policy_only)
    return Task(args.config, config, cfg.kv, cfg.model.dtype, todo, lambda: None, [])


def parse_lengths(text: str | None) -> tuple[int, ...] | None:
    """(8188, 32740) of "8188,32740"; ValueError for anything else."""
    if text is None:
        return None
    words = [word.strip() for word in text.split(",")]
    if not all(word.isdigit() and int(word) > 1 for word in words):
        raise ValueError(
            f"--lengths {text!r} is not understood; write numbers of tokens: 8188,32740"
        )
    return tuple(map(int, words))


def heading(record: dict[str, Any], policy: str, repeats: int) -> list[str]:
    """What the table is of."""
    weights = "" if record["weights"] == record["dtype"] else f", weights {record['weights']}"
    lines = [
        f"{record['model']}, {record['num_layers']} layers, random weights, {record['dtype']}"
        f"{weights}, on {record['device']['kind']}, jax {record['versions']['jax']}; {policy}"
    ]
    if "ceilings" in record:
        ceilings = record["ceilings"]
        lines += [
            f"this device, in this run: matmul {ceilings['flops_per_s'] / 1e12:.4g} TFLOP/s"
            f" ({ceilings['matmul_side']} cubed), copy {ceilings['bytes_per_s'] / 1e9:.4g} GB/s",
            f"ms: median of {repeats} calls (decode: a step's mean over a round); spread: slowest"
            " less fastest; share: roofline over median",
        ]
    return [*lines, ""]


def run_peers(
    args: argparse.Namespace, config: Any, lengths: tuple[int, ...], works: tuple[str, ...]
) -> list[dict[str, Any]]:
    """Rows of Hugging Face torch, in a process of its own; ImportError where it is not there."""
    import importlib.util

    missing = [n for n in ("torch", "transformers") if importlib.util.find_spec(n) is None]
    if missing:
        raise ImportError(f"--peers needs {' and '.join(missing)}: pip install {' '.join(missing)}")
    note("measuring Hugging Face torch")
    request = {
        "config": config.to_hf(),
        "lengths": lengths,
        "batch": 1 if args.batch is None else args.batch,
        "dtype": args.dtype,
        "repeats": args.repeats,
        "works": [work for work in works if work in ("forward", "decode")],
        "budget": args.budget / 2,
    }
    command = [sys.executable, "-m", "freqkv_jax.bench.peers", json.dumps(request)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    rows = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    if done.returncode:
        note(f"warning: the peers' process ended with status {done.returncode}")
    return rows


def _peer_line(row: dict[str, Any]) -> str:
    if "skipped" in row:
        return f"{row['case']}: skipped, {row['skipped']}"
    return f"{row['case']}: {row['ms']:.4g} ms, spread {row['spread']:.1%} (torch {row['torch']})"
