import contextlib
import resource
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from freqkv_jax.sharding import make_mesh
from freqkv_jax.training.checkpoint import Checkpoints, ReadError, SaveError, flat


def state(step, mesh=None, spec=None):
    tree = {
        "params": {"w": jnp.full((4, 8), step, jnp.float32)},
        "count": jnp.int32(step),
        "moments": (jnp.full((8,), step / 3, jnp.bfloat16),),
    }
    if mesh is None:
        return tree
    tree["params"]["w"] = jax.device_put(tree["params"]["w"], NamedSharding(mesh, spec))
    return tree


def save_steps(folder, steps, keep=2, keep_best=False):
    saved = Checkpoints(folder, keep, keep_best)
    for step, score in steps:
        saved.save(step, state(step), {"step": step}, score)
    saved.close()


def folders(path):
    return sorted(p.name for p in path.iterdir())


def assert_is(got, step):
    want = flat(state(step))
    for name, array in flat(got).items():
        assert array.dtype == want[name].dtype
        np.testing.assert_array_equal(np.asarray(array), np.asarray(want[name]))


def test_keeps_the_latest_and_the_best_and_restores_the_last(tmp_path):
    steps = [(1, 3.0), (2, 1.0), (3, 2.0), (4, None)]
    save_steps(tmp_path, steps, keep=1, keep_best=True)
    assert folders(tmp_path) == ["2", "4"]
    # The score of 2 is known only from disk now.
    save_steps(tmp_path, [(5, 1.5), (6, 7.0)], keep=1, keep_best=True)
    assert folders(tmp_path) == ["2", "6"]
    saved = Checkpoints(tmp_path, 2)
    got, about = saved.restore(state(0))
    saved.close()
    assert_is(got, 6)
    assert about["step"] == 6


def test_nothing_saved_is_none(tmp_path):
    saved = Checkpoints(tmp_path, 2)
    assert saved.restore(state(0)) is None
    saved.close()


def test_onto_another_mesh(tmp_path):
    save_steps(tmp_path, [(3, None)])
    mesh = make_mesh(1, 2, 2)
    spec = PartitionSpec("fsdp", "tensor")
    saved = Checkpoints(tmp_path, 2)
    got, _ = saved.restore(state(0, mesh, spec))
    saved.close()
    assert_is(got, 3)
    assert got["params"]["w"].sharding.spec == spec


def truncate(step_folder):
    for file in (step_folder / "state").rglob("*"):
        if file.is_file() and "/d/" in str(file):
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2])


@pytest.mark.parametrize("tear", ["truncated", "empty", "no arrays", "no about"])
def test_torn_is_skipped_kept_aside_and_written_again(tmp_path, tear):
    save_steps(tmp_path, [(1, None), (2, None)])
    if tear == "truncated":
        truncate(tmp_path / "2")
    elif tear == "empty":
        shutil.rmtree(tmp_path / "2")
        (tmp_path / "2").mkdir()
    else:
        shutil.rmtree(tmp_path / "2" / ("about" if tear == "no about" else "state"))
    saved = Checkpoints(tmp_path, 2)
    with pytest.warns(UserWarning, match="step 2 is torn and skipped"):
        got, _ = saved.restore(state(0))
    assert_is(got, 1)
    assert folders(tmp_path) == ["1", "torn-2"]
    saved.save(2, state(2), {"step": 2})
    saved.close()
    assert folders(tmp_path) == ["1", "2", "torn-2"]


def test_all_torn(tmp_path):
    save_steps(tmp_path, [(1, None)])
    truncate(tmp_path / "1")
    saved = Checkpoints(tmp_path, 2)
    with pytest.warns(UserWarning, match="torn"):
        assert saved.restore(state(0)) is None  # one: as if it had been killed in its first save
    saved.close()
    save_steps(tmp_path, [(2, None), (3, None)])
    for step in "23":
        truncate(tmp_path / step)
    saved = Checkpoints(tmp_path, 2)
    with pytest.raises(ValueError, match="none of the 2 checkpoints"):
        saved.restore(state(0))
    saved.close()
    assert {"2", "3"} <= set(folders(tmp_path)), "nothing is moved where nothing can be read"


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError("read timed out"),
        PermissionError(13, "Permission denied"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Out of memory allocating 17 bytes"),
        ValueError("NOT_FOUND: Error reading local file [OS error 5: EIO Input/output error]"),
    ],
)
def test_what_may_pass_is_no_torn_checkpoint(tmp_path, monkeypatch, error):
    """One checkpoint: taken for torn, training would begin at 0 and cut the metrics."""
    save_steps(tmp_path, [(1, None)])
    saved = Checkpoints(tmp_path, 2)

    def restore(*_, **__):
        raise RuntimeError("reading an array") from error

    with monkeypatch.context() as patch:
        patch.setattr(saved._manager, "restore", restore)
        with pytest.raises(ReadError, match=r"step 1 in .* it is left as it is"):
            saved.restore(state(0))
    assert folders(tmp_path) == ["1"]
    got, _ = saved.restore(state(0))
    assert_is(got, 1)
    saved.close()


def test_other_arrays_are_no_torn_checkpoint(tmp_path, monkeypatch):
    save_steps(tmp_path, [(1, None)])
    saved = Checkpoints(tmp_path, 2)
    with pytest.raises(ValueError, match="other arrays than this run needs"):
        saved.restore(state(0) | {"more": jnp.zeros(3)})

    def restore(*_, **__):  # its own words; the real one leaves reads behind that complain
        raise ValueError("Requested shape: (5,) is not compatible with the stored shape: ().")

    monkeypatch.setattr(saved._manager, "restore", restore)
    with pytest.raises(ValueError, match="other arrays than this run needs"):
        saved.restore(state(0))
    saved.close()
    assert folders(tmp_path) == ["1"]


@contextlib.contextmanager
def small_files():
    """Files may grow to 16 KiB only: what a full disk does to a save, in this process alone."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 14, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_save_that_fails_leaves_the_earlier_one(tmp_path):
    """With keep=1 the old checkpoint goes only when the new one is whole."""
    big = {"w": np.random.default_rng(0).normal(size=(1 << 18,)).astype(np.float32)}
    big = jax.tree.map(jnp.asarray, big)
    saved = Checkpoints(tmp_path, 1)
    saved.save(1, big, {"step": 1})
    saved.wait()
    with small_files(), pytest.raises(SaveError, match=r"step 2 could not .* that of step 1 is"):
        saved.save(2, big, {"step": 2})
        saved.wait()
    assert "1" in folders(tmp_path) and "2" not in folders(tmp_path)
    saved.close()
    again = Checkpoints(tmp_path, 1)
    got, about = again.restore(big)
    assert about["step"] == 1
    np.testing.assert_array_equal(np.asarray(got["w"]), np.asarray(big["w"]))
    again.save(2, big, {"step": 2})
    again.close()
    assert folders(tmp_path) == ["2"], "what the failed save left is cleared away"
