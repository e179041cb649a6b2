"""tiny.yaml, all of it, through the real loop: in bfloat16, and on a mesh of eight devices.

A few steps of a smaller model: test_step.py (bfloat16) and test_loop.py (a mesh).
"""

import numpy as np
import pytest

from freqkv_jax.training import schema
from freqkv_jax.training.loop import train
from freqkv_jax.training.metrics import read_lines
from tests.tolerances import BF16_LOSS, SHARDED_LOSS

pytestmark = pytest.mark.slow
QUIET = ("log.eval_every=0", "log.tensorboard=false")


def losses(folder, *sets):
    cfg = schema.load("tiny", [f"run.dir={folder}", *QUIET, *sets])
    assert train(cfg) == 0
    lines = read_lines(folder / "metrics.jsonl")
    return np.array([line["loss"] for line in lines if "loss" in line])


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return losses(tmp_path_factory.mktemp("whole"))


def test_the_whole_config_in_bfloat16(whole, tmp_path):
    got = losses(tmp_path, "model.dtype=bfloat16")
    assert len(got) == 60 and got[-1] < 2.0
    np.testing.assert_allclose(got, whole, rtol=BF16_LOSS)


def test_the_whole_config_on_a_mesh(whole, tmp_path):
    got = losses(tmp_path, "mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2")
    np.testing.assert_allclose(got, whole, atol=SHARDED_LOSS, rtol=0)
