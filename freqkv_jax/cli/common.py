"""Flags and start-up that several commands share."""

import argparse
import hashlib
import os
import platform
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MODEL_HELP = "Hugging Face directory, hub id, or .gguf file"
DTYPES = ("float32", "bfloat16", "float16")


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """--model, --adapter, --dtype and --mesh."""
    parser.add_argument("--model", required=True, metavar="PATH", help=MODEL_HELP)
    parser.add_argument(
        "--adapter", metavar="DIR", help="PEFT adapter directory (LoRA) to merge into the model"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere"
    )
    parser.add_argument(
        "--mesh",
        metavar="data=A,fsdp=B,tensor=C",
        help="spread the model over A*B*C devices (default: one device)",
    )


def add_weights_argument(parser: argparse.ArgumentParser, what: str) -> None:
    """--weights."""
    parser.add_argument(
        "--weights",
        choices=("int8",),
        help=f"{what} with integers for weights: half of bfloat16's bytes, not exact; one device",
    )


def add_config_arguments(parser: argparse.ArgumentParser, required: bool = True) -> None:
    """--config and --set of a fine-tuning run."""
    parser.add_argument(
        "--config",
        required=required,
        metavar="FILE",
        help="a YAML file or a packaged config's name",
    )
    parser.add_argument(
        "--set",
        action="extend",
        nargs="+",
        default=[],
        metavar="KEY=VALUE",
        help="changes keys of the config, e.g. train.steps=100 run.dir=runs/a",
    )


def add_policy_arguments(parser: argparse.ArgumentParser) -> None:
    """--policy and what a policy is made of."""
    from freqkv_jax.kv.policy import POLICIES

    group = parser.add_argument_group(
        "cache policy",
        "Without any of these flags the policy that the model remembers is used, else freqkv with"
        " its defaults; with any of them, what they and the policy's own defaults say. A policy"
        " takes the flags that it has use for.",
    )
    group.add_argument("--policy", choices=list(POLICIES), help="default: freqkv")
    group.add_argument("--cache-size", type=int, metavar="N", help="slots (default: 4096)")
    group.add_argument(
        "--sink-size", type=int, metavar="S", help="first tokens kept as they are (default: 4)"
    )
    group.add_argument(
        "--recent-size",
        type=int,
        metavar="R",
        help="last tokens kept as they are (default: 0; half of the cache if entries are chosen)",
    )
    group.add_argument(
        "--retain-ratio",
        type=float,
        metavar="G",
        help="share of the rest kept (freqkv, freqkv_values, sink_window; default: 0.5)",
    )
    group.add_argument(
        "--compress-method",
        choices=("matmul", "fft"),
        help="how to filter (freqkv; default: matmul)",
    )
    _add_choosing_arguments(group)


def _add_choosing_arguments(group: Any) -> None:
    """What policies that choose entries are made of."""
    group.add_argument(
        "--chunk",
        type=int,
        metavar="Q",
        help="entries freed in a round (policies that choose; default: an eighth of the cache)",
    )
    group.add_argument(
        "--bands", type=int, metavar="B", help="frequencies of the low-pass (novelty; default: 1)"
    )
    group.add_argument(
        "--value-share",
        type=float,
        metavar="V",
        help="share of the chosen entries that the values choose (novelty; default: 0)",
    )
    group.add_argument(
        "--recency",
        type=float,
        metavar="W",
        help="what the newest entry's score is ahead of the oldest's (novelty; default: 0)",
    )
    group.add_argument(
        "--shared-heads",
        action="store_const",
        const=True,
        help="all kv heads of a layer keep the same entries (novelty)",
    )
    group.add_argument(
        "--window",
        type=int,
        metavar="W",
        help="last queries before a round, which choose (snapkv; default: 32, at most the chunk)",
    )
    group.add_argument(
        "--pool-size",
        type=int,
        metavar="K",
        help="neighbours over which their votes are averaged (snapkv; default: 5)",
    )


# Flag to field of a policy.
_POLICY_FIELDS = {
    "cache_size": "cache_size",
    "sink_size": "sink_size",
    "recent_size": "recent_size",
    "retain_ratio": "retain_ratio",
    "compress_method": "method",
    "chunk": "chunk",
    "bands": "bands",
    "value_share": "value_share",
    "recency": "recency",
    "shared_heads": "shared_heads",
    "window": "window",
    "pool_size": "pool_size",
}


def policy_from_flags(args: argparse.Namespace) -> Any:
    """The policy that the flags ask for; None where none of them is given."""
    from freqkv_jax.kv.policy import policy_from_args

    given = {
        field: value
        for flag, field in _POLICY_FIELDS.items()
        if (value := getattr(args, flag)) is not None
    }
    if args.policy is None and not given:
        return None
    return policy_from_args(args.policy or "freqkv", **given)


def default_dtype() -> str:
    """float32 on a CPU, bfloat16 elsewhere."""
    import jax

    return "float32" if jax.devices()[0].platform == "cpu" else "bfloat16"


def parse_mesh(text: str) -> dict[str, Any]:
    """{"data": 2, ...} of "data=2,fsdp=2"; ValueError if it is not of that form."""
    axes: dict[str, int] = {}
    for part in text.split(","):
        name, _, size = part.strip().partition("=")
        if name not in ("data", "fsdp", "tensor") or name in axes or not size.lstrip("-").isdigit():
            raise ValueError(
                f"--mesh {text!r} is not understood at {part!r}; write data=A,fsdp=B,tensor=C with"
                " whole numbers, each axis at most once (one of them may be -1: all that is left)"
            )
        axes[name] = int(size)
    return axes


def load_model(args: argparse.Namespace) -> tuple[Any, Any]:
    """Model and parameters that the flags ask for."""
    import freqkv_jax as fk

    kv = policy_from_flags(args)
    axes = parse_mesh(args.mesh) if args.mesh else None
    enable_compile_cache()
    mesh = None
    if axes is not None:
        from freqkv_jax.sharding import make_mesh

        mesh = make_mesh(**axes)
    dtype = args.dtype or default_dtype()
    with_adapter = f" with {args.adapter}" if args.adapter else ""
    note(f"loading {args.model}{with_adapter} ({dtype})")
    return fk.load_pretrained(args.model, kv=kv, dtype=dtype, mesh=mesh, adapter=args.adapter)


def describe_policy(kv: Any) -> str:
    """A policy in one line: its name and its fields."""
    from freqkv_jax.kv.policy import policy_to_dict

    fields = policy_to_dict(kv)
    return " ".join([fields.pop("policy"), *(f"{name}={v}" for name, v in fields.items())])


def note(text: str) -> None:
    """A remark to whoever watches, apart from the command's output."""
    print(text, file=sys.stderr, flush=True)


def size_text(num_bytes: float) -> str:
    """Bytes in words: 98304 -> "96.0 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if abs(num_bytes) < 1024 or unit == "TiB":
            break
        num_bytes /= 1024
    return f"{num_bytes:.0f} {unit}" if unit == "B" else f"{num_bytes:.1f} {unit}"


def compile_cache_dir(env: Mapping[str, str]) -> Path | None:
    """Where compiled programs are kept between runs; None if FREQKV_NO_COMPILE_CACHE is set.

    JAX_COMPILATION_CACHE_DIR, which JAX reads by itself, also gives None: it has the last word.
    """
    if env.get("FREQKV_NO_COMPILE_CACHE") or env.get("JAX_COMPILATION_CACHE_DIR"):
        return None
    base = env.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    # Programs for a CPU use what that CPU can do: a home shared by several machines must not mix.
    return Path(base) / "freqkv_jax" / f"xla-{_cpu_digest()}"


def enable_compile_cache() -> None:
    """Lets a second run start without compiling again what an earlier one compiled."""
    import jax

    folder = compile_cache_dir(os.environ)
    if folder is not None:
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.3)


def _cpu_digest() -> str:
    about = platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        about += next((line for line in lines if line.startswith(("flags", "Features"))), "")
    except OSError:
        about += platform.processor()
    return hashlib.sha256(about.encode()).hexdigest()[:12]
