"""Compiles a model's programs for machines that are not here, and reports what they would take.

A TPU is not needed to compile for one: libtpu (extra `tpu`) holds the compiler, and
`jax.experimental.topologies` describes the machine. See docs/tpu_compile.md.
"""

import importlib.metadata
import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh

from freqkv_jax.config import LlamaConfig
from freqkv_jax.hlo import Collective, Program
from freqkv_jax.kv.policy import KVPolicy
from freqkv_jax.sharding import tree_path

WHATS = ("forward", "prefill", "decode")
ESTIMATE_NOTE = (
    "estimate by the compiler's own cost model, not a measurement; Pallas kernels are counted at"
    " peak FLOP/s, collectives not at all, so the real MFU is lower"
)
GIB = 1024**3


# Without them libtpu looks for the TPU machine that it would run on, and complains, and only one
# process at a time may load it.
LIBTPU_SETTINGS = {
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_ACCELERATOR_TYPE": "v5litepod-16",
}


@dataclass(frozen=True)
class Chip:
    """One TPU chip: memory in bytes, bf16 multiply-adds counted as 2 FLOPs.

    `flops_per_cycle` is what its matrix units do in one of the compiler's cycles.
    """

    hbm_bytes: int
    peak_flops: float
    flops_per_cycle: int

    @property
    def clock_hz(self) -> float:
        """Cycles a second at which the matrix units reach the published peak."""
        return self.peak_flops / self.flops_per_cycle


# HBM and peak bf16 FLOP/s a chip: the system architecture pages of Google Cloud's TPU
# documentation (cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x); jax's own table, in
# jax/_src/pallas/mosaic/tpu_info.py, agrees to 2 %. FLOPs a cycle: number of matrix units
# times their size, 2 * 128 * 128 each up to v5p; for v6e and tpu7x the figure that the
# compiler's cycles for large matmuls point to.
CHIPS = {
    "v4": Chip(32 * GIB, 275e12, 2 * 131072),
    "v5e": Chip(16 * GIB, 197e12, 131072),
    "v5p": Chip(95 * GIB, 459e12, 2 * 131072),
    "v6e": Chip(32 * GIB, 918e12, 524288),
    "tpu7x": Chip(192 * GIB, 2307e12, 2 * 524288),
}


@dataclass(frozen=True)
class Target:
    """What to compile for: a TPU topology, or fake CPU devices."""

    text: str
    generation: str  # a key of CHIPS, or "cpu"
    topology: str

    @classmethod
    def parse(cls, text: str) -> "Target":
        """Reads "tpu:v5e:4x4" or "cpu:8"; ValueError if it is neither."""
        parts = text.split(":")
        if len(parts) == 2 and parts[0] == "cpu" and parts[1].isdigit() and int(parts[1]):
            return cls(text, "cpu", parts[1])
        if len(parts) != 3 or parts[0] != "tpu" or parts[1] not in CHIPS:
            raise ValueError(
                f"target {text!r} is not understood; write tpu:GENERATION:TOPOLOGY with a"
                f" generation of {', '.join(CHIPS)}, for example tpu:v5e:4x4 or tpu:v5p:4x4x4"
                " (or cpu:8 for 8 fake CPU devices)"
            )
        sizes = parts[2].split("x")
        if not all(size.isdigit() and int(size) for size in sizes):
            raise ValueError(
                f"topology {parts[2]!r} of target {text!r} is not understood; write chips an axis,"
                " for example 4x4 (v5e, v6e) or 4x4x4 (v4, v5p, tpu7x)"
            )
        return cls(text, parts[1], parts[2])

    def devices(self) -> list[Any]:
        """The devices to compile for.

        Raises:
          ImportError: libtpu is missing. ValueError: there is no such topology.
        """
        if self.generation == "cpu":
            return _cpu_devices(int(self.topology))
        if importlib.util.find_spec("libtpu") is None:
            raise ImportError(
                f"compiling for {self.text} needs libtpu, which the extra 'tpu' brings:"
                " pip install 'freqkv-jax[tpu]'"
            )
        try:
            found = topologies.get_topology_desc(
                platform="tpu", topology_name=f"{self.generation}:{self.topology}"
            )
        except Exception as error:  # libtpu raises many kinds
            reason = str(error).strip().split("\n")[0]
            raise ValueError(
                f"libtpu knows no topology {self.topology} of {self.generation} ({reason});"
                " take one that can be rented, for example 2x2, 4x4, 8x8 (v5e, v6e) or 2x2x1,"
                " 2x2x2, 4x4x4 (v4, v5p, tpu7x)"
            ) from error
        return list(found.devices)


def prepare(target: str) -> None:
    """Keeps jax away from accelerators in this process; call it before anything starts jax.

    Compiling uses no accelerator, and libtpu on a machine without a TPU is slow to find that out.
    """
    parsed = Target.parse(target)
    jax.config.update("jax_platforms", "cpu")
    if parsed.generation != "cpu":
        for name, value in LIBTPU_SETTINGS.items():
            os.environ.setdefault(name, value)
        return
    try:
        jax.config.update("jax_num_cpu_devices", int(parsed.topology))
    except RuntimeError:
        pass  # jax runs already; _cpu_devices sees whether it has enough devices


def _cpu_devices(count: int) -> list[Any]:
    devices = jax.devices("cpu")
    if len(devices) < count:
        raise ValueError(
            f"target cpu:{count} needs {count} CPU devices, jax was started with {len(devices)};"
            f" set XLA_FLAGS=--xla_force_host_platform_device_count={count}"
        )
    return devices[:count]


@dataclass(frozen=True)
class Work:
    """A program to compile: a function, its abstract arguments with shardings, and their names."""

    function: Callable[..., Any]
    arguments: tuple[Any, ...]
    names: tuple[str, ...]
    donate: tuple[int, ...] = ()
    out_shardings: Any = None

    def argument_names(self) -> list[str]:
        """A name for every array argument, in the order of the compiled program's parameters."""
        names = []
        for name, argument in zip(self.names, self.arguments, strict=True):
            for path, _ in jax.tree_util.tree_flatten_with_path(argument)[0]:
                names.append(f"{name}/{tree_path(path)}".rstrip("/"))
        return names


def compile_work(work: Work, mesh: Mesh) -> Any:
    """Compiles for the devices of `mesh`; ValueError in the compiler's words if it cannot fit."""
    # Unused arguments stay, so that a parameter's number says which argument it is.
    jitted = jax.jit(
        work.function,
        donate_argnums=work.donate,
        keep_unused=True,
        **({} if work.out_shardings is None else {"out_shardings": work.out_shardings}),
    )
    try:
        with jax.set_mesh(mesh):
            return jitted.lower(*work.arguments).compile()
    except jax.errors.JaxRuntimeError as error:
        text = str(error)
        if "RESOURCE_EXHAUSTED" not in text:
            raise
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        raise ValueError(
            f"the program does not fit the device's memory: {' '.join(lines[:2])[:300]};"
            " take more chips, a larger fsdp or tensor axis, a smaller batch or seq_len"
        ) from error


def analyse(
    compiled: Any,
    argument_names: Sequence[str],
    chip: Chip | None,
    num_devices: int,
    useful_flops: float,
    kernel_flops: float = 0.0,
    is_cache: Callable[[Collective], bool] = lambda _: False,
) -> dict[str, Any]:
    """What a compiled program takes, as plain data (bytes, FLOPs, cycles; per device unless said).

    Args:
      compiled: of `jax.jit(..., keep_unused=True).lower(...).compile()`.
      argument_names: one for each array argument.
      chip: the device (a chip, or the part of it that is one device); None off TPU.
      useful_flops: of the whole program, on all devices together.
      kernel_flops: those of them that Pallas kernels do, if there are any in the program.
      is_cache: whether an all-gather gathers a cache.
    """
    program = Program(compiled.as_text())
    collectives = program.collectives()
    moved = [_describe(c, argument_names, is_cache) for c in collectives if c.kind != "all-reduce"]
    gathers = [m for m in moved if m["kind"] == "all-gather"]
    cost = compiled.cost_analysis() or {}
    work = (useful_flops / num_devices, kernel_flops / num_devices)
    return {
        "memory": _memory(compiled.memory_analysis(), chip),
        "flops": {
            "useful_total": float(useful_flops),
            "useful_per_device": work[0],
            "cost_analysis_per_device": float(cost.get("flops", 0.0)),
        },
        "collectives": _by_kind(collectives),
        "all_gathers": gathers,
        "num_cache_all_gathers": sum(g["touches_cache"] for g in gathers),
        "other_moves": [m for m in moved if m["kind"] != "all-gather"],
        "num_kernels": program.num_kernels(),
        "estimate": None if chip is None else _estimate(program, chip, *work),
        "unknown_loops": sorted(program.unknown_loops),
    }


def _memory(stats: Any, chip: Chip | None) -> dict[str, Any]:
    parts = {
        "arguments": stats.argument_size_in_bytes,
        "outputs": stats.output_size_in_bytes,
        "aliased": stats.alias_size_in_bytes,
        "temporaries": stats.temp_size_in_bytes,
        "code": stats.generated_code_size_in_bytes,
    }
    total = sum(parts.values()) - 2 * parts["aliased"]  # an output in an argument's place is free
    hbm = chip.hbm_bytes if chip else None
    return parts | {"total": total, "hbm": hbm, "hbm_share": total / hbm if hbm else None}


def _by_kind(collectives: Sequence[Collective]) -> list[dict[str, Any]]:
    rows = []
    for kind in sorted({c.kind for c in collectives}):
        same = [c for c in collectives if c.kind == kind]
        rows.append(
            {
                "kind": kind,
                "instructions": len(same),
                "runs": sum(c.runs for c in same),
                "bytes": sum(c.total_bytes for c in same),
            }
        )
    return rows


def _describe(
    gather: Collective, names: Sequence[str], is_cache: Callable[[Collective], bool]
) -> dict[str, Any]:
    origin = gather.origin
    if origin.startswith("parameter "):
        origin = names[int(origin.removeprefix("parameter "))]
    return {
        "kind": gather.kind,
        "output": ", ".join(f"{a.dtype}[{','.join(map(str, a.dims))}]" for a in gather.output),
        "bytes": gather.num_bytes,
        "runs": gather.runs,
        "op_name": gather.op_name,
        "origin": origin,
        "touches_cache": origin.startswith("state/layers")
        or (origin == "computed" and is_cache(gather)),
    }


def _estimate(
    program: Program, chip: Chip, useful_flops: float, kernel_flops: float
) -> dict[str, Any]:
    """Cycles, and the time and MFU that follow from them; FLOPs are one device's."""
    counts = program.estimated_cycles()
    # The compiler prices no kernel; it takes at least as long as its FLOPs at the peak.
    kernel_cycles = round(kernel_flops / chip.flops_per_cycle) if program.num_kernels() else 0
    seconds = (counts["cycles"] + kernel_cycles) / chip.clock_hz
    return {
        "note": ESTIMATE_NOTE,
        **counts,
        "kernel_cycles": kernel_cycles,
        "longest_loop": program.longest_loop(),
        "clock_hz": chip.clock_hz,
        "seconds": seconds,
        "mfu": useful_flops / (chip.peak_flops * seconds) if seconds else None,
    }


def is_cache_gather(what: str, kv: KVPolicy, leaves: Sequence[Any], head_dim: int) -> Any:
    """A test for gathers of computed values: is this a cache?

    In decode nothing else is as large as one device's part of a cache leaf, so size decides. In
    the parallel form activations are, so the output must also have a cache's slots and head_dim.

    Args:
      leaves: the memory leaves, ShapeDtypeStructs with shardings, each [B, K, ...].
    """
    smallest = min(math.prod(leaf.sharding.shard_shape(leaf.shape)) for leaf in leaves)
    lengths = {leaf.shape[2] for leaf in leaves if len(leaf.shape) > 2}
    if kv.capacity is not None:
        lengths |= {kv.capacity, kv.prefix, kv.chunk}

    def test(gather: Collective) -> bool:
        for array in gather.output:
            if array.size >= smallest and (
                what == "decode" or (head_dim in array.dims and lengths & set(array.dims))
            ):
                return True
        return False

    return test


def useful_flops(
    config: LlamaConfig, kv: KVPolicy, what: str, batch: int, seq_len: int, slots: int
) -> float:
    """FLOPs of the model's matmuls and of attention over the entries each token sees.

    Counted from shapes, once, whatever the program does: masked slots, compression, norms and
    softmax count as overhead. Logits count for every token, in prefill for the last one.

    Args:
      seq_len: the number of tokens of a row, in decode the steps.
      slots: of an unbounded policy's cache.
    """
    c = config
    weights = c.hidden_size * c.head_dim * 2 * (c.num_heads + c.num_kv_heads)
    weights += 3 * c.hidden_size * c.intermediate_size
    logits = 2 * c.vocab_size * c.hidden_size * (1 if what == "prefill" else seq_len)
    attention = attention_flops(config, kv, what, batch, seq_len, slots)
    return float(batch * (c.num_layers * 2 * weights * seq_len + logits)) + attention


def attention_flops(
    config: LlamaConfig, kv: KVPolicy, what: str, batch: int, seq_len: int, slots: int
) -> float:
    """The attention's part of `useful_flops`: scores and averages, 4 H D for each entry seen."""
    seen = attended_entries(kv, what, seq_len, slots)
    return 4.0 * batch * config.num_layers * config.num_heads * config.head_dim * seen


def attended_entries(kv: KVPolicy, what: str, seq_len: int, slots: int) -> int:
    """Cache entries that the tokens of one row read, summed over its tokens.

    Forward begins with an empty cache, prefill with a full one (an unbounded policy's: an empty
    one). Decode begins with the room just made (an unbounded policy's ends with a full cache).
    """
    if kv.capacity is None:
        start = slots - seq_len if what == "decode" else 0
        return sum(range(start + 1, start + seq_len + 1))
    if what == "forward":
        return sum(kv.fill_after(t) for t in range(1, seq_len + 1))
    return sum(kv.prefix + 1 + t % kv.chunk for t in range(seq_len))


def device_chip(target: Target, devices: Sequence[Any]) -> Chip | None:
    """The share of a chip that one device is: a v4 or tpu7x chip shows as two devices."""
    if target.generation == "cpu":
        return None
    chip = CHIPS[target.generation]
    parts = len(devices) // len({tuple(d.coords) for d in devices})
    return Chip(chip.hbm_bytes // parts, chip.peak_flops / parts, chip.flops_per_cycle // parts)


def compiler_versions() -> dict[str, str | None]:
    """Versions of what compiled: jax, jaxlib and libtpu."""
    found: dict[str, str | None] = {}
    for name in ("jax", "jaxlib", "libtpu"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found
