"""The driver: batches, resuming, failing items, limits, and what the result says."""

import dataclasses
import json
from typing import ClassVar

import jax
import pytest

import freqkv_jax as fk
from freqkv_jax.evals import drive
from freqkv_jax.evals.drive import Run, batches, compressions, covered, limited, run_task
from freqkv_jax.evals.ledger import ledger_path
from freqkv_jax.evals.task import Item
from tests.evals.fakes import MODEL, FakeEngine, FakeTask, stopping
from tests.tiny import tiny_config

CHANGING = ("seconds", "tokens_per_second", "compile_seconds", "command", "code_revision")


@pytest.fixture(autouse=True)
def no_git(monkeypatch):
    monkeypatch.setattr("freqkv_jax.evals.result.code_revision", lambda: None)


def settings(output=None, **changes):
    return Run(model_path="org/model", output=output and str(output), **changes)


def stable(result):
    return {key: value for key, value in result.items() if key not in CHANGING}


def test_result(tmp_path):
    task, engine = FakeTask(), FakeEngine()
    got = run_task(
        task, engine, settings(tmp_path / "a.json", batch_size=3, names={"model_name": "m"})
    )
    assert json.loads((tmp_path / "a.json").read_text()) == got
    assert [path.name for path in tmp_path.iterdir()] == ["a.json"], "the ledger is gone"
    assert [record["key"] for record in got["records"]] == [f"k0/{i}" for i in range(7)]
    assert got["score"] == pytest.approx(sum(i**2 / 7 for i in range(7)))
    assert (
        got["task"] == "fake" and got["protocol"] == "fake-v1" and got["data"] == {"sha256": "abc"}
    )
    config = got["config"]
    assert config["count"] == 7 and config["bad"] == [] and config["model_name"] == "m"
    assert config["policy"]["cache_size"] == 16 and config["batch_size"] == 3
    assert "stop_at" not in config and "log" not in config
    assert got["num_items"] == 7 and got["num_failed"] == 0
    lengths = [10 + (5 * i) % 13 for i in range(7)]
    assert got["num_tokens"] == sum(lengths) + 7 * 3
    rounds = [MODEL.kv.num_compressions(length + 3) for length in lengths]
    assert [record["compressions"] for record in got["records"]] == rounds
    assert got["num_compressions"] == {
        "min": min(rounds),
        "mean": sum(rounds) / 7,
        "max": max(rounds),
    }
    assert not got["nothing_compressed"] and not got["beyond_native_window"]
    assert 0 <= got["compile_seconds"] <= got["seconds"]


def test_batches_are_of_one_group_and_near_length():
    task = FakeTask(count=20, kinds=3)
    got = batches(task.items(None), 4)
    assert sorted(item.key for batch in got for item in batch) == sorted(
        item.key for item in task.items(None)
    )
    assert all(len({item.group for item in batch}) == 1 and len(batch) <= 4 for batch in got)
    for kind in "012":
        lengths = [i.length for batch in got for i in batch if i.group == kind]
        assert lengths == sorted(lengths)
    assert len(got) == 6  # 7, 7 and 6 items


@pytest.mark.parametrize("torn", [b"", b'{"record": {"key": "k0/'])
@pytest.mark.parametrize("done", [0, 1, 2])
def test_goes_on_after_a_kill(tmp_path, done, torn):
    output, task = tmp_path / "a.json", FakeTask()
    whole = run_task(task, FakeEngine(), settings(batch_size=3))
    with pytest.raises(KeyboardInterrupt):
        run_task(stopping(task, done), FakeEngine(), settings(output, batch_size=3))
    assert not output.exists()
    with open(f"{output}.partial", "ab") as file:
        file.write(torn)
    rest, notes = FakeTask(), []
    got = run_task(rest, FakeEngine(), settings(output, batch_size=3, note=notes.append))
    assert stable(got) == stable(whole) and len(got["records"]) == 7
    assert rest.log == task.log[done:], "the batches are those of an unbroken run"
    assert any("going on: " in note for note in notes) == (done > 0)
    # And once more: it is there, and nothing runs.
    again = FakeTask()
    ledger_path(output).write_text("left behind")
    assert run_task(again, FakeEngine(), settings(output, batch_size=2)) == got
    assert not again.log and not ledger_path(output).exists()
    run_task(again, FakeEngine(), settings(output, batch_size=3, force=True))
    assert sum(map(len, again.log)) == 7


def test_a_batch_that_is_half_recorded(tmp_path):
    output, task = tmp_path / "a.json", FakeTask()
    with pytest.raises(KeyboardInterrupt):
        run_task(stopping(task, 2), FakeEngine(), settings(output, batch_size=3))
    lines = ledger_path(output).read_bytes().splitlines(keepends=True)
    assert len(lines) == 1 + 2 * (3 + 1), "records and a line of times for each batch"
    ledger_path(output).write_bytes(b"".join(lines[:-3]))
    rest = FakeTask()
    got = run_task(rest, FakeEngine(), settings(output, batch_size=3))
    run_task(task, FakeEngine(), settings(batch_size=3))
    assert rest.log == task.log[1:], "the half batch is run whole, as in an unbroken run"
    assert len(got["records"]) == 7 and got["num_failed"] == 0


def test_another_run_is_not_overwritten(tmp_path):
    output = tmp_path / "a.json"
    run_task(FakeTask(), FakeEngine(), settings(output))
    before = output.read_bytes()
    others = [
        (FakeTask(count=6), FakeEngine(), {}),
        (FakeTask(), FakeEngine(), {"limit": 2}),
        (FakeTask(), FakeEngine(MODEL.clone(kv=fk.FullConfig())), {}),
        (FakeTask(), FakeEngine(MODEL.clone(dtype="bfloat16")), {}),
    ]
    for task, engine, changes in others:
        with pytest.raises(FileExistsError, match="--force"):
            run_task(task, engine, settings(output, **changes))
        assert output.read_bytes() == before and not task.log
    run_task(FakeTask(count=6), FakeEngine(), settings(output, force=True))
    assert json.loads(output.read_text())["num_items"] == 6


@dataclasses.dataclass(frozen=True, kw_only=True)
class TimedTask(FakeTask):
    measures_time: ClassVar[bool] = True


def test_times_of_other_devices_are_another_run(tmp_path, monkeypatch):
    output = tmp_path / "a.json"
    got = run_task(TimedTask(), FakeEngine(), settings(output))
    assert drive.finished(TimedTask(), FakeEngine(), settings(output)) == got
    general = {"num_tokens", "tokens_per_second", "kv_bytes"}
    assert not general & got.keys() and "seconds" in got, "its records have rates of their own"
    for changes in ({"mesh": "data=2"}, {"mesh": None, "count": 1}):
        count = changes.pop("count", jax.device_count())
        monkeypatch.setattr(drive.jax, "device_count", lambda count=count: count)
        with pytest.raises(FileExistsError, match="the result of another run"):
            run_task(TimedTask(), FakeEngine(), settings(output, **changes))
    monkeypatch.undo()
    untimed = tmp_path / "b.json"
    got = run_task(FakeTask(), FakeEngine(), settings(untimed))
    assert general <= got.keys()
    assert run_task(FakeTask(), FakeEngine(), settings(untimed, mesh="data=2")) == got


def test_timed_results_of_before_are_known_by_their_device(tmp_path):
    output = tmp_path / "a.json"
    got = run_task(TimedTask(), FakeEngine(), settings(output))
    # Of the same options, policy and data, without a word on the device.
    before = run_task(FakeTask(), FakeEngine(), settings())["run_id"]
    assert before != got["run_id"]
    output.write_text(json.dumps(got | {"run_id": before}))
    assert drive.finished(TimedTask(), FakeEngine(), settings(output)) is not None
    other = got["device"] | {"kind": "H100"}
    output.write_text(json.dumps(got | {"run_id": before, "device": other}))
    with pytest.raises(FileExistsError, match="the result of another run"):
        drive.finished(TimedTask(), FakeEngine(), settings(output))


def test_failing_items(tmp_path):
    output, task, notes = tmp_path / "a.json", FakeTask(bad=(1, 5)), []
    got = run_task(task, FakeEngine(), settings(output, batch_size=4, note=notes.append))
    failed = [record for record in got["records"] if "error" in record]
    assert [record["key"] for record in failed] == ["k0/1", "k0/5"]
    assert failed[0]["error"] == "ValueError: 1 is bad" and got["num_failed"] == 2
    assert got["score"] == pytest.approx(sum(i**2 / 7 for i in (0, 2, 3, 4, 6)))
    assert "k0/1 failed: ValueError: 1 is bad" in notes


def test_failed_items_are_tried_again_by_the_next_start(tmp_path):
    output = tmp_path / "a.json"
    with pytest.raises(KeyboardInterrupt):
        # Four tries: the batch of two fails, then each alone, then the next batch.
        run_task(stopping(FakeTask(bad=(0,)), 4), FakeEngine(), settings(output, batch_size=2))
    lines = [json.loads(line) for line in ledger_path(output).read_text().splitlines()]
    assert any("error" in line.get("record", {}) for line in lines)
    mended = FakeTask(bad=(0,))
    object.__setattr__(mended, "run", lambda engine, batch: [{"score": 1.0} for _ in batch])
    got = run_task(mended, FakeEngine(), settings(output, batch_size=2))
    assert got["num_failed"] == 0 and len(got["records"]) == 7


def test_all_fail(tmp_path):
    with pytest.raises(ValueError, match="all 2 items failed; the first: ValueError: 0 is bad"):
        run_task(FakeTask(count=2, bad=(0, 1)), FakeEngine(), settings(tmp_path / "a.json"))
    assert not (tmp_path / "a.json").exists()


@pytest.mark.parametrize("record", [{"score": float("nan")}, {"score": object()}])
def test_a_record_that_json_cannot_hold(record):
    task = FakeTask(count=3)
    good = {"score": 1.0}
    object.__setattr__(
        task, "run", lambda engine, batch: [record if i.key == "k0/1" else good for i in batch]
    )
    got = run_task(task, FakeEngine(), settings(batch_size=3))
    assert got["num_failed"] == 1 and "error" in got["records"][1]


def test_a_missing_package_stops_the_run():
    task = FakeTask()

    def run(engine, batch):
        raise ImportError("pip install 'freqkv-jax[eval]'")

    object.__setattr__(task, "run", run)
    with pytest.raises(ImportError, match="eval"):
        run_task(task, FakeEngine(), settings())


def test_limit():
    items = FakeTask(count=20, kinds=3).items(None)
    got = limited(items, 2)
    assert [item.key for item in got] == ["k0/0", "k1/1", "k2/2", "k0/3", "k1/4", "k2/5"]
    assert limited(items, None) == items
    with pytest.raises(ValueError, match="no items"):
        limited([], 3)
    for name in ("limit", "batch_size"):
        with pytest.raises(
            ValueError, match=f"--{name.replace('_', '-')} must be at least 1, got 0"
        ):
            settings(**{name: 0})


def test_flags_of_a_result():
    short, long = [{"key": "a", "length": 16}], [{"key": "a", "length": 5000}]
    assert compressions(FakeEngine(), short)["nothing_compressed"]
    full = MODEL.clone(kv=fk.FullConfig())
    assert compressions(FakeEngine(full), long)["beyond_native_window"]
    assert not compressions(FakeEngine(), long)["beyond_native_window"], "16 slots, 4096 positions"
    small = dataclasses.replace(tiny_config(), max_position_embeddings=15)
    assert compressions(FakeEngine(MODEL.clone(config=small)), long)["beyond_native_window"]


def test_compile_time_is_counted_once_where_it_nests():
    assert covered([]) == 0
    assert covered([(0, 4), (1, 2), (3, 6), (10, 11)]) == 7


def test_compile_time_is_seen():
    import jax

    with drive._stopwatch() as times:
        jax.jit(lambda x: x * 3 + 1)(2.0)
    assert 0 < times["compile_seconds"] <= times["seconds"]


def test_output_is_checked_first(tmp_path):
    task = FakeTask()
    with pytest.raises(OSError, match="is a folder"):
        run_task(task, FakeEngine(), settings(tmp_path))
    assert not task.log


def test_items_have_different_keys():
    with pytest.raises(AssertionError):
        limited([Item(key="a", length=1), Item(key="a", length=2)], None)
