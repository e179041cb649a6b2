"""How the processes of a run come together, without any: environments, meshes, barriers."""

import jax
import pytest

from freqkv_jax.sharding import make_mesh
from freqkv_jax.training import distributed

SLURM = {"SLURM_PROCID": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NUM_NODES": "2"}
GPUS = {"SLURM_GPUS_ON_NODE": "8"}


@pytest.fixture
def initialized(monkeypatch):
    """The arguments with which jax.distributed would have been started."""
    given = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda **args: given.append(args))
    return given


def test_the_only_task_of_a_node_drives_all_of_its_gpus(initialized):
    assert distributed.start(False, SLURM | GPUS)
    own = {
        "JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1",
    }  # fmt: skip
    assert distributed.start(False, SLURM | GPUS | own)
    assert [args["local_device_ids"] for args in initialized] == [[*range(8)]] * 2
    assert initialized[1]["coordinator_address"] == "host:1"


@pytest.mark.parametrize(
    "env, want",
    [
        (SLURM | GPUS | {"CUDA_VISIBLE_DEVICES": "2,3,5"}, [0, 1, 2]),
        (SLURM | GPUS | {"SLURM_STEP_NUM_TASKS": "16"}, None),  # each has one
        (SLURM | GPUS | {"JAX_LOCAL_DEVICE_IDS": "0,1"}, None),
        (SLURM, None),
        (GPUS, None),
        ({}, None),
    ],
)
def test_devices_of_a_process(env, want):
    assert distributed.local_devices(env) == want


def test_a_pod_that_nobody_asked_for(monkeypatch):
    """Outside jax.distributed only libtpu knows of other hosts; Orbax would fail much later."""
    monkeypatch.setattr(jax, "process_count", lambda: 4)
    with pytest.raises(ValueError, match=r"4 hosts .*run\.distributed=true on every host"):
        distributed.start(False, {})


def test_a_mesh_with_idle_devices_is_told():
    text = distributed.describe(make_mesh(1, 2, 2))
    assert text.startswith("mesh data=1, fsdp=2, tensor=2: 4 of 8 devices (cpu), 1 host.")
    assert "4 idle" in text and "mesh.fsdp=-1" in text
    assert "idle" not in distributed.describe(make_mesh(2, 2, 2))
