"""Several processes as one run: starting them, their mesh, and each one's share of a batch."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding

from freqkv_jax.sharding import AXES, batch_spec, make_mesh

ADDRESS, PROCESSES, PROCESS = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def start(wanted: bool, env: Mapping[str, str] | None = None) -> bool:
    """Joins the other processes of the run, before anything else uses jax.

    Args:
      wanted: `run.distributed`: there are others, find them (TPU pod, SLURM, Open MPI).
      env: the environment. Without `wanted` it decides: JAX_COORDINATOR_ADDRESS with
        JAX_NUM_PROCESSES and JAX_PROCESS_ID, a SLURM step of several tasks, or a TPU pod.

    Returns:
      Whether this process is one of a cluster.

    Raises:
      ValueError: the others cannot be found, or are there and were not asked for.
    """
    env = os.environ if env is None else env
    if jax.distributed.is_initialized():
        return True
    given = addresses(env)
    if given is None and not wanted and not in_cluster(env):
        if jax.process_count() > 1:
            raise ValueError(
                f"this process sees the devices of {jax.process_count()} hosts (a TPU pod), but"
                " the run is not distributed; add --set run.distributed=true on every host"
            )
        return False
    try:
        jax.distributed.initialize(**(given or {}), local_device_ids=local_devices(env))
    except (ValueError, RuntimeError) as error:
        raise ValueError(
            f"the processes of this run did not find each other ({error}); start one process a"
            f" host under SLURM or on a TPU pod, or set {ADDRESS}=HOST:PORT, {PROCESSES} and"
            f" {PROCESS} for each, or run.distributed=false for one process"
        ) from error
    return True


def addresses(env: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments of jax.distributed.initialize that the environment spells out, or None.

    Raises ValueError where they are incomplete or not numbers.
    """
    if not env.get(ADDRESS) or (PROCESSES not in env and PROCESS not in env):
        return None
    try:
        count, number = int(env[PROCESSES]), int(env[PROCESS])
    except (KeyError, ValueError):
        count, number = 0, -1
    if not 0 <= number < count or ":" not in env[ADDRESS]:
        raise ValueError(
            f"{ADDRESS}={env[ADDRESS]!r}, {PROCESSES}={env.get(PROCESSES)!r},"
            f" {PROCESS}={env.get(PROCESS)!r}: give HOST:PORT of process 0, the number of"
            " processes, and this one's number from 0"
        )
    return {"coordinator_address": env[ADDRESS], "num_processes": count, "process_id": number}


def local_devices(env: Mapping[str, str]) -> list[int] | None:
    """The GPUs that this process drives: all of its node, where it is the node's only SLURM task.

    None leaves it to jax, which gives each SLURM task the one device of its number on the node.
    """
    tasks, nodes = env.get("SLURM_STEP_NUM_TASKS"), env.get("SLURM_STEP_NUM_NODES")
    if "SLURM_PROCID" not in env or tasks is None or tasks != nodes:
        return None
    if env.get("JAX_LOCAL_DEVICE_IDS"):
        return None
    visible = [name for name in env.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    count = env.get("SLURM_GPUS_ON_NODE", "")
    number = len(visible) or (int(count) if count.isdigit() else 0)
    return list(range(number)) or None


def in_cluster(env: Mapping[str, str]) -> bool:
    """Whether the environment is that of one task of several: a SLURM step, a TPU pod."""
    tasks = env.get("SLURM_STEP_NUM_TASKS", "1")
    if "SLURM_PROCID" in env and tasks.isdigit() and int(tasks) > 1:
        return True
    return "," in env.get("TPU_WORKER_HOSTNAMES", "")


def run_mesh(data: int, fsdp: int, tensor: int) -> Mesh:
    """`make_mesh`; where the devices are several TPU slices, their slow network carries data.

    Raises ValueError.
    """
    devices = jax.devices()
    if len(slices_of(devices)) < 2:
        mesh = make_mesh(data, fsdp, tensor)
        if jax.process_count() > 1 and mesh.size != len(devices):
            raise ValueError(
                f"mesh data={data},fsdp={fsdp},tensor={tensor} uses {mesh.size} of the"
                f" {len(devices)} devices, so some processes would have none; make data*fsdp*tensor"
                f" {len(devices)} (-1 fills one of them in)"
            )
        return mesh
    sizes = make_mesh(data, fsdp, tensor, devices).shape  # fills -1 in, checks the product
    grid = hybrid_grid(devices, tuple(sizes[axis] for axis in AXES))
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def describe(mesh: Mesh) -> str:
    """The mesh, and how many devices of how many hosts are in it; what to do about idle ones."""
    axes = ", ".join(f"{axis}={size}" for axis, size in mesh.shape.items())
    count, hosts = jax.device_count(), jax.process_count()
    kind = mesh.devices.flat[0].device_kind
    text = f"mesh {axes}: {mesh.size} of {count} devices ({kind}), {hosts} host{'s' * (hosts > 1)}"
    if mesh.size == count:
        return text
    return f"{text}. WARNING: {count - mesh.size} idle; --set mesh.fsdp=-1 uses all that are left"


def slices_of(devices: Sequence[Any]) -> list[int]:
    """The TPU slices that devices belong to, each once."""
    return sorted({getattr(device, "slice_index", 0) for device in devices})


def hybrid_grid(devices: Sequence[Any], sizes: tuple[int, int, int]) -> np.ndarray:
    """Devices of several slices as [data, fsdp, tensor]: only data, or else fsdp, spans slices."""
    count = len(slices_of(devices))
    data, fsdp, tensor = sizes
    if data % count == 0:
        across, inside = (count, 1, 1), (data // count, fsdp, tensor)
    elif fsdp % count == 0:
        across, inside = (1, count, 1), (data, fsdp // count, tensor)
    else:
        raise ValueError(
            f"mesh data={data},fsdp={fsdp},tensor={tensor} does not fit {count} slices: make data"
            f" (or fsdp) a multiple of {count}, so that tensor stays inside a slice"
        )
    return mesh_utils.create_hybrid_device_mesh(
        inside, across, devices, allow_split_physical_axes=True
    )


def batch_share(mesh: Mesh, batch_size: int) -> tuple[int, int]:
    """Which part of a batch this process reads: (index, count) of `count` equal parts.

    Processes that hold the same rows (where tensor spans hosts) get the same index.

    Raises:
      ValueError: the devices of one process do not hold an equal part.
    """
    sharding = NamedSharding(mesh, batch_spec())
    rows: dict[int, set[int]] = {}
    for device, index in sharding.devices_indices_map((batch_size,)).items():
        rows.setdefault(device.process_index, set()).update(range(*index[0].indices(batch_size)))
    parts = sorted({tuple(sorted(own)) for own in rows.values()})
    if len({row for part in parts for row in part}) != sum(len(part) for part in parts) or any(
        len(part) != len(parts[0]) for part in parts
    ):
        raise ValueError(
            f"mesh {dict(mesh.shape)} cuts a batch of {batch_size} rows unevenly between"
            " processes; make data*fsdp a multiple of the number of processes, or a divisor of it"
        )
    return parts.index(tuple(sorted(rows[jax.process_index()]))), len(parts)


def global_batch(mesh: Mesh, local: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Any]:
    """The arrays of all processes as one, rows on data and fsdp."""
    sharding = NamedSharding(mesh, batch_spec())
    return {
        name: jax.make_array_from_process_local_data(
            sharding, array, (batch_size, *array.shape[1:])
        )
        for name, array in local.items()
    }


def any_process(flag: bool) -> bool:
    """Whether `flag` is set in any process; all call it at the same place."""
    if jax.process_count() == 1:
        return flag
    from jax.experimental import multihost_utils

    return bool(np.any(multihost_utils.process_allgather(np.asarray(flag))))
