"""Whether a model fits, reckoned before anything is loaded."""

import math
from pathlib import Path
from typing import Any

import jax


def check_memory(shapes: Any, dtype: str, shardings: Any = None) -> None:
    """Raises MemoryError if weights of these shapes exceed the free memory of a device or host.

    Args:
      shapes: tree of ShapeDtypeStruct. dtype: what the message calls theirs.
      shardings: tree of NamedSharding, or None for one device.
    """
    leaves = jax.tree.leaves(shapes)
    total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves)
    if shardings is None:
        devices = [jax.local_devices()[0]]
        share = total
    else:
        placed = jax.tree.leaves(shardings)
        devices = placed[0].mesh.local_devices
        share = sum(
            math.prod(sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, sharding in zip(leaves, placed, strict=True)
        )
    on_cpu = devices[0].platform == "cpu"
    # Devices of a CPU share the host's memory.
    needed = share * len(devices) if on_cpu else share
    free = free_host_bytes() if on_cpu else min(map(_free_device_bytes, devices))
    if needed > free:
        place = "this host" if on_cpu else f"a device ({devices[0].device_kind})"
        raise MemoryError(
            f"the weights need {_gigabytes(needed)} in {dtype}, and {place} has"
            f" {_gigabytes(free)} free; use a 2-byte dtype (bfloat16), a smaller model, or spread"
            " it over more devices with a mesh (fsdp, tensor)"
        )


def _gigabytes(num_bytes: float) -> str:
    return f"{num_bytes / 1e9:.2f} GB"


def _free_device_bytes(device: Any) -> float:
    stats = device.memory_stats() or {}
    if "bytes_limit" not in stats:
        return math.inf
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def free_host_bytes() -> float:
    """Memory that this process may still take, as far as the system says; else infinity."""
    return min(_available(Path("/proc/meminfo")), _left_in_group(Path("/sys/fs/cgroup")))


def _available(meminfo: Path) -> float:
    try:
        lines = meminfo.read_text().splitlines()
        fields = next(line.split() for line in lines if line.startswith("MemAvailable:"))
        return float(int(fields[1]) * 1024)
    except (OSError, StopIteration, ValueError, IndexError):
        return math.inf


def _left_in_group(group: Path) -> float:
    """What a container's limit (cgroup 2) leaves; cached pages of files count as free."""
    try:
        limit = int((group / "memory.max").read_text())
        used = int((group / "memory.current").read_text())
        stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        return float(limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):  # no such group, or the limit is "max"
        return math.inf
