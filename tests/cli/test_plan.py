"""`freqkv plan`."""

import pytest

from freqkv_jax.cli import main
from freqkv_jax.cli.plan import GIB, parse_hbm


def plan(capsys, *args, status=0):
    assert main(["plan", *args]) == status
    return capsys.readouterr()


def test_it_fits(capsys):
    out = plan(capsys, "--config", "llama2_7b_8k", "--devices", "16", "--hbm", "v5e").out
    assert "data=1, fsdp=16, tensor=1 (16 devices)" in out
    for part in ("frozen weights", "trained weights (float32)", "moments", "gradients", "logits"):
        assert part in out
    assert "caches of the recurrence" in out and "activations kept (remat full)" in out
    assert "of 16.0 GiB" in out and out.endswith("It fits.\n")


def test_a_shape_that_stands_in_is_told(capsys):
    """The packaged config names the shape of its own model; another path may be another model."""
    args = ["--config", "llama2_7b_8k", "--devices", "8", "--set", "model.path=org/other"]
    assert "model.shape llama2-7b; model.path org/other is not here" in plan(capsys, *args).err
    assert not plan(capsys, *args, "model.path=llama2-7b").err


def test_it_does_not_fit(capsys):
    args = ["--config", "llama2_7b_8k", "--devices", "1", "--hbm", "16"]
    out = plan(capsys, *args, "--set", "train.micro_batch=2", "train.remat=dots", status=1).out
    assert "It does not fit." in out
    assert "--set train.micro_batch=1" in out and "--set train.remat=full" in out
    assert "not enough alone" in out
    # Of the remedies listed one fits.
    small = plan(capsys, "--config", "tiny", "--hbm", "0.02", status=1).out
    assert "  fits\n" in small


def test_without_hbm(capsys):
    out = plan(capsys, "--config", "tiny").out
    assert "total at the peak (reckoned)" in out and "Give --hbm" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config", "nothing"], "neither a file nor a packaged config"),
        (["--config", "tiny", "--set", "train.stpes=1"], "did you mean 'steps'?"),
        (["--config", "tiny", "--hbm", "much"], "--hbm 'much' is not understood"),
        (["--config", "tiny", "--hbm", "-1"], "--hbm '-1' is not understood"),
        (["--config", "tiny", "--devices", "0"], "--devices must be at least 1"),
        (["--config", "llama2_7b_8k", "--devices", "3"], "must be a multiple of data*fsdp"),
    ],
)
def test_errors_are_one_line(capsys, args, message):
    error = plan(capsys, *args, status=2).err
    assert message in error and len(error.splitlines()) == 1


def test_hbm_by_name():
    assert parse_hbm("v5e") == 16 * GIB and parse_hbm("V5P") == 95 * GIB
    assert parse_hbm("80") == 80 * GIB and parse_hbm("h200") > parse_hbm("h100")
