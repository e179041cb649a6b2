import json
import math
import sys
import types

import pytest

from freqkv_jax.training import metrics
from freqkv_jax.training import record as recording
from freqkv_jax.training.metrics import JsonLines, Progress, TensorBoard, duration, peak_flops
from freqkv_jax.training.plots import draw_curves


def record(step, **values):
    return dict.fromkeys(metrics.STEP_KEYS) | {"step": step, "loss": 1.0 / step} | values


def test_the_share_of_waiting(monkeypatch):
    """The first batch after a pause takes 10 s, the step 1 s and the next batch none."""
    now = [0.0]
    monkeypatch.setattr(recording.time, "monotonic", lambda: now[0])
    clock = recording.Clock()

    def batch(seconds):
        clock.begin()
        now[0] += seconds
        assert clock.got() == seconds
        return clock.sent()

    one = batch(10)
    two = batch(0)
    now[0] += 1
    assert clock.done(one, known=True) == 11
    now[0] += 1
    assert clock.done(two, known=True) == 1
    assert clock.wait_share == 10 / 12
    clock.pause()
    # The wait for a batch passes while the step before is counted, or while nothing is.
    one = batch(3)
    two = batch(50)
    assert clock.done(one, known=False) is None
    now[0] += 2
    assert clock.done(two, known=True) == 2
    assert clock.wait_share == 10 / 14


def test_wandb_tells_folders_of_one_name_apart(monkeypatch):
    begun = []
    fake = types.SimpleNamespace(init=lambda **what: begun.append(what))
    monkeypatch.setitem(sys.modules, "wandb", fake)
    for folder in ("/exp_a/run 1", "/exp_b/run 1", "/exp_b/run 1/"):
        metrics.Wandb(folder, {})
    assert [what["name"] for what in begun] == ["run 1"] * 3
    a, b, again = (what["id"] for what in begun)
    assert a != b == again and a.startswith("run-1-") and metrics.wandb_id("/exp_a/run 1") == a


def open_lines(path, step=-1):
    lines = JsonLines(path, writes=True)
    kept = lines.cut(step)
    return lines, kept


def test_cut_back_to_the_restored_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines, kept = open_lines(path)
    assert kept == []
    for step in (1, 2, 3):
        lines.append(record(step))
        assert len(path.read_text().splitlines()) == step, "a kill loses no line"
    lines.append({"step": 3, "eval_loss": 2.0})
    lines.close()
    with path.open("a") as file:
        file.write('{"step": 4, "lo')  # a kill in the middle of a line
    lines, kept = open_lines(path, 2)
    assert [r["step"] for r in kept] == [1, 2]
    lines.append(record(3, loss=math.nan, grad_norm=math.inf))
    lines.close()
    got = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["step"] for r in got] == [1, 2, 3]
    assert list(got[0]) == list(metrics.STEP_KEYS)
    assert got[2]["loss"] is None and got[2]["grad_norm"] is None
    assert [p.name for p in tmp_path.iterdir()] == ["metrics.jsonl"]


def test_a_cut_that_fails_leaves_the_file(tmp_path, monkeypatch):
    path = tmp_path / "metrics.jsonl"
    lines, _ = open_lines(path)
    lines.append(record(1))
    lines.close()
    before = path.read_text()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("freqkv_jax.files.os.replace", full)
    with pytest.raises(OSError, match="No space"):
        open_lines(path, 0)
    assert path.read_text() == before


def test_other_processes_write_nothing(tmp_path):
    lines = JsonLines(tmp_path / "metrics.jsonl", writes=False)
    lines.cut(0)
    lines.append(record(1))
    lines.sync()
    lines.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("kind", "want"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H200", 989e12),
        ("TPU v5 lite", 197e12),
        ("TPU v5p", 459e12),
        ("TPU v5", 459e12),
        ("an unknown one", None),
    ],
)
def test_peak_flops(kind, want):
    assert peak_flops(types.SimpleNamespace(platform="x", device_kind=kind)) == want


def test_a_cpu_has_no_peak():
    assert peak_flops(types.SimpleNamespace(platform="cpu", device_kind="H100")) is None


def test_progress_line_has_loss_speed_and_time_left(capsys):
    progress = Progress(total=10, first=4)
    begin = progress.begin
    text = progress.text(record(6, tokens_per_second=1234.0, mfu=0.5, loss=2.0), begin + 20)
    assert text == "loss 2.0000, 1,234 tokens/s, MFU 50.0%, 40 s left"
    progress.update(record(5, loss=2.0))
    assert capsys.readouterr().err == "step 5/10: loss 2.0000\n"
    progress.update(record(6, loss=2.0))  # too soon for a log
    assert capsys.readouterr().err == ""


def test_duration():
    assert [duration(s) for s in (5, 600, 7300)] == ["5 s", "10 min", "2 h 02 min"]


def test_tensorboard_discards_what_lies_behind_a_resume(tmp_path):
    board = TensorBoard(str(tmp_path), 7)
    board.scalars(8, record(8) | {"eval_loss": 3.0})
    board.close()
    from tensorboard.backend.event_processing.event_file_loader import EventFileLoader

    (file,) = tmp_path.iterdir()
    events = list(EventFileLoader(str(file)).Load())
    starts = [e.step for e in events if e.WhichOneof("what") == "session_log"]
    tags = [v.tag for e in events for v in e.summary.value]
    assert starts == [7] and tags == ["train/loss", "eval/loss"]


def test_curves(tmp_path):
    records = [record(s, grad_norm=1.0, learning_rate=1e-3) for s in range(1, 5)]
    records[2]["loss"] = None
    records.append({"step": 4, "eval_loss": 1.0, "eval_loss_behind": None})
    draw_curves(records, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").read_bytes()[:4] == b"\x89PNG"
    draw_curves([], tmp_path / "none.png")
