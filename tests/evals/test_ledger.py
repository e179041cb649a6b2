"""What a killed run leaves behind: whole lines count, a torn one does not."""

import json

import pytest

from freqkv_jax.evals.ledger import Ledger, finished_result, ledger_path

RUN = {"task": "fake", "options": {"n": 1}}


def record(key, value=1):
    return {"key": key, "score": value}


def filled(path, *batches):
    ledger = Ledger(path, RUN)
    with ledger.open():
        for batch in batches:
            ledger.add(batch, {"seconds": 1.5})
    return path.read_bytes()


def test_goes_on(tmp_path):
    path = tmp_path / "a.json.partial"
    filled(path, [record("a"), record("b")])
    filled(path, [record("c")], [record("a", 2)])
    got = Ledger(path, RUN)
    assert got.records == {"a": record("a", 2), "b": record("b"), "c": record("c")}
    assert got.times == {"seconds": 4.5}
    got.remove()
    assert not path.exists()


def test_a_kill_at_any_byte(tmp_path):
    path = tmp_path / "a.json.partial"
    first = filled(path, [record("a"), record("b")], [record("c")])
    for size in range(len(first)):
        path.write_bytes(first[:size])
        ledger = Ledger(path, RUN)
        held = list(ledger.records)
        assert held == ["a", "b", "c"][: len(held)]
        missing = [record(key) for key in "abc" if key not in held]
        with ledger.open():
            ledger.add(missing, {})
        lines = path.read_bytes().splitlines()
        assert [json.loads(line) for line in lines], "every line is whole again"
        again = Ledger(path, RUN).records
        assert list(again) == ["a", "b", "c"]
        keys = [value["record"]["key"] for line in lines if "record" in (value := json.loads(line))]
        assert sorted(keys) == ["a", "b", "c"], "nothing is lost or there twice"


def test_another_run(tmp_path):
    path = tmp_path / "a.json.partial"
    filled(path, [record("a")])
    other = {"task": "fake", "options": {"n": 2}}
    with pytest.raises(FileExistsError, match=r"another run \(other options\).*--force"):
        Ledger(path, other)
    forced = Ledger(path, other, force=True)
    assert not forced.records
    with forced.open():
        forced.add([record("b")], {})
    assert list(Ledger(path, other).records) == ["b"]
    path.write_text('{"something": "else"}\n')
    with pytest.raises(FileExistsError, match="beginning of another run: choose"):
        Ledger(path, RUN)


def test_without_a_file_and_without_writing(tmp_path):
    ledger = Ledger(None, RUN)
    with ledger.open():
        ledger.add([record("a")], {"seconds": 1})
    ledger.remove()
    assert ledger.records == {"a": record("a")}
    path = tmp_path / "a"
    ledger = Ledger(path, RUN)
    with ledger.open(writes=False):
        ledger.add([record("a")], {})
    assert ledger.records and not path.exists()


def test_nothing_that_is_not_json(tmp_path):
    ledger = Ledger(tmp_path / "a", RUN)
    with ledger.open(), pytest.raises(ValueError):
        ledger.add([record("a", float("nan"))], {})


def test_finished_result(tmp_path):
    file = tmp_path / "a.json"

    def found(run_id, force=False):
        return finished_result(file, lambda result: result["run_id"] == run_id, force)

    assert found("id") is None
    file.write_text(json.dumps({"run_id": "id", "score": 1}))
    assert found("id") == {"run_id": "id", "score": 1}
    assert found("id", force=True) is None
    with pytest.raises(FileExistsError, match="result of another run.*--force"):
        found("other")
    file.write_text("a letter to my aunt")
    with pytest.raises(FileExistsError, match="is no result file.*--force"):
        found("id")
    assert ledger_path("x/a.json").as_posix() == "x/a.json.partial"
