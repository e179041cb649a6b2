"""How the processes of a run come together, without any: environments, meshes, barriers."""

import types

import jax
import numpy as np
import pytest
from jax.experimental import multihost_utils

from freqkv_jax.sharding import make_mesh
from freqkv_jax.training import distributed, rundir

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


@pytest.fixture
def one_of_two(monkeypatch):
    """Process 1 of 2, whose barriers stand open and whose partner agrees with all it says."""
    passed = []
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    monkeypatch.setattr(multihost_utils, "broadcast_one_to_all", lambda x: x * 0 + 7)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda x: [x, x])
    monkeypatch.setattr(multihost_utils, "sync_global_devices", passed.append)
    return passed


def test_a_folder_that_is_not_shared(tmp_path, one_of_two, monkeypatch):
    monkeypatch.setattr(rundir, "SEEN_WITHIN_S", 0.0)
    folder = rundir.RunDir(str(tmp_path / "run"))
    with pytest.raises(ValueError, match="not one folder for all 2 processes.* all hosts share"):
        folder.check_shared()
    assert one_of_two == ["freqkv_jax.shared.written"]
    (tmp_path / "run" / ".shared-7").touch()  # by process 0
    folder.check_shared()


def test_addresses_and_clusters():
    env = {"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"}
    want = {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1}
    assert distributed.addresses(env) == want
    assert distributed.addresses({}) is None
    for wrong in ({"JAX_PROCESS_ID": "2"}, {"JAX_COORDINATOR_ADDRESS": "host"}):
        with pytest.raises(ValueError, match="HOST:PORT of process 0"):
            distributed.addresses(env | wrong)
    assert distributed.in_cluster({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2"})
    assert not distributed.in_cluster({"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"})
    assert distributed.in_cluster({"TPU_WORKER_HOSTNAMES": "a,b"})
    assert distributed.start(False, {}) is False


def fake_devices(slices, each):
    kind = {"platform": "fake", "device_kind": "fake"}
    return [
        types.SimpleNamespace(id=s * each + i, slice_index=s, process_index=s, **kind)
        for s in range(slices)
        for i in range(each)
    ]


def test_hybrid_mesh_keeps_tensor_inside_a_slice():
    devices = fake_devices(2, 4)
    for sizes in ((2, 2, 2), (1, 4, 2), (4, 1, 2)):
        grid = distributed.hybrid_grid(devices, sizes)
        assert grid.shape == sizes
        assert all(len({d.slice_index for d in row}) == 1 for row in grid.reshape(-1, sizes[2]))
    with pytest.raises(ValueError, match="multiple of 2"):
        distributed.hybrid_grid(devices, (1, 1, 8))


def test_batch_share_of_one_process():
    assert distributed.batch_share(make_mesh(2, 2, 2), 8) == (0, 1)
    got = distributed.global_batch(make_mesh(2, 2, 2), {"tokens": np.arange(16).reshape(8, 2)}, 8)
    assert np.asarray(got["tokens"]).tolist() == np.arange(16).reshape(8, 2).tolist()
