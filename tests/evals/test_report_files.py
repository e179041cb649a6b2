"""Reports as they are read and written: files, the command, pictures of policies side by side."""

import importlib.resources
import json
import re

import numpy as np
import pytest

from freqkv_jax.cli import main
from freqkv_jax.evals import report, report_trade
from freqkv_jax.evals.report_blocks import (
    Figure,
    Heading,
    Table,
    to_html,
    to_markdown,
)
from freqkv_jax.evals.report_compare import series_of
from freqkv_jax.evals.report_runs import Run, load_runs
from freqkv_jax.evals.report_stats import paired_difference
from freqkv_jax.evals.suite import read_suite
from tests.evals.results import MEANS, POLICIES, passkey, perplexity, result, runs_of
from tests.tolerances import FLOAT64, assert_close


def test_reading_files_and_folders(tmp_path):
    (tmp_path / "deep").mkdir()
    good = tmp_path / "deep" / "a.json"
    good.write_text(json.dumps(perplexity("freqkv")))
    (tmp_path / "b.json").write_text('{"other": 1}')
    (tmp_path / "c.json").write_text('{"torn')
    assert [run.path for run in load_runs([tmp_path, good])] == [str(good)]
    with pytest.raises(ValueError, match=r"b\.json is JSON but no result"):
        load_runs([tmp_path / "b.json"])
    with pytest.raises(ValueError, match=r"c\.json is not JSON"):
        load_runs([tmp_path / "c.json"])
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load_runs([tmp_path / "nowhere"])
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match="no results in"):
        load_runs([tmp_path / "empty"])


def test_names_from_files_are_no_markup():
    blocks = [
        Heading(1, "a<b>"),
        Table(["x|y", "n"], [["*_[`", "1"]], "c"),
        Figure("f", 'say "hi" <', b"\x89PNG"),
    ]
    text = to_markdown(blocks)
    assert "| x\\|y | n |" in text and "\\*\\_\\[\\`" in text and "(figures/f.png)" in text
    assert "|---|---:|" in text
    page = to_html("t<", blocks)
    assert "<b>" not in page and "a&lt;b&gt;" in page and '<td class="n">1</td>' in page
    assert "data:image/png;base64,iVBORw==" in page and "&quot;hi&quot;" in page


def test_the_whole_report(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    folder = tmp_path / "results"
    folder.mkdir()
    values = {"exact": {"higher_is_better": True, "values": [[1.0, 0.5]]}}
    needle = [
        {"key": f"needle/{n}/0/{i}", "depth": 0, "length_target": n, "score": 0.5}
        for n in (64, 256) for i in range(3)
    ]  # fmt: skip
    costs = [
        {"tokens_read": n, "first_token_s": 0.1 * n, "ms_per_token": 1.0, "kv_bytes_measured": n,
         "peak_bytes": None}
        for n in (64, 128)
    ]  # fmt: skip
    shown = {"columns": ["tokens read"], "rows": [["64"], ["128"]]}
    energy = np.full((2, 3, 2, 20), 1 / 20).tolist()
    results = {
        "ppl-1": perplexity("freqkv"),
        "ppl-2": perplexity("window"),
        "ppl-3": perplexity("full", seq_len=256),
        "needle": result(
            "needle", "freqkv", needle, num_failed=1,
            grid={"lengths": [64, 256], "depths": [0], "default": "exact", "metrics": values},
        ),
        "cost": result("cost", "freqkv", costs, costs=costs, table=shown),
        "spectrum": result(
            "spectrum", "freqkv", energy=energy, kinds=["key", "key_rotated", "value"],
            num_frequencies=20, kept_by_ratio={"0.5": np.full((2, 3, 2), 0.5).tolist()},
            left_after={"energy": [1.0] * 9, "largest": [1.0] * 9, "slots": [1.0] * 9},
        ),
        "lm-eval": result("lm-eval", "freqkv", table={"columns": ["task"], "rows": [["arc"]]}),
    }  # fmt: skip
    for name, data in results.items():
        (folder / f"{name}.json").write_text(json.dumps(data))
    status = main(["report", str(folder), "--output", str(tmp_path / "out"), "--title", "Tiny"])
    said = capsys.readouterr()
    assert status == 0, said.err
    assert "report.html" in said.out
    text = (tmp_path / "out" / "report.md").read_text()
    page = (tmp_path / "out" / "report.html").read_text()
    pictures = re.findall(r"\]\((figures/\w+\.png)\)", text)
    assert len(pictures) == len(set(pictures)) >= 9
    for picture in pictures:
        assert (tmp_path / "out" / picture).read_bytes()[:4] == b"\x89PNG"
    assert page.count('src="data:image/png;base64,') == len(pictures)
    assert not re.search(r'(src|href)="(?!data:)', page), "the page needs no other file"
    for words in ("# Tiny", "## In short", "1 of 6 samples failed", "lm-eval", "| arc |"):
        assert words in text, words


def test_the_command_says_what_is_wrong(tmp_path, capsys):
    assert main(["report", str(tmp_path / "no"), "--output", str(tmp_path / "out")]) == 2
    assert "neither a result file nor a folder" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


SUITES = sorted(
    file.name
    for file in (importlib.resources.files("freqkv_jax") / "configs" / "suites").iterdir()
    if file.name.endswith(".yaml")
)


@pytest.mark.parametrize("name", SUITES)
def test_packaged_suites_are_read(name):
    file = importlib.resources.files("freqkv_jax") / "configs" / "suites" / name
    text = file.read_text(encoding="utf-8")
    flags = {} if name == "paper.yaml" else {"model": "MODEL"}
    suite = read_suite(text, name, flags)
    tasks = {cell.task.name for cell in suite.cells}
    if name in ("cache_study_choices.yaml", "cache_study_recency.yaml"):  # pick settings
        assert tasks == {"perplexity", "needle"}
    else:
        assert {"perplexity", "needle", "ruler", "cost", "spectrum"} <= tasks
    if name == "paper.yaml":
        assert {"longbench", "longgenbench"} <= tasks
    assert text.startswith("# ") and "Command:" in text and "Time:" in text


def test_text_and_keys_in_one_picture(monkeypatch):
    drawn = []
    monkeypatch.setattr(report_trade, "trade_figure", lambda points: drawn.append(points) or b"x")
    runs = runs_of(
        *(perplexity(p, perplexity=MEANS[p]) for p in POLICIES),
        *(perplexity(p, 256, perplexity=9.0) for p in ("full", "window")),
        *(passkey(p, i + 1.0) for i, p in enumerate(POLICIES)),
    )
    heading, _, figure = report_trade.section(runs)
    assert heading.text == "Text and keys" and figure.name == "trade_0"
    assert "of 128 tokens, and nats a digit of a pass-key in texts of 128 tokens" in figure.caption
    # The larger cache is left out; at 128 tokens, which both tests have, nats are not the mean.
    (points,) = drawn
    got = [(run.policy_name, x, round(y, 6)) for run, x, y in points]
    assert got == [("full", 3.0, 1.0), ("freqkv", 3.2, 2.0), ("sink_window", 3.1, 3.0)]
    assert report_trade.section(runs[:6]) == [] == report_trade.section(runs[:2] + runs[6:8])


def test_names_of_points_do_not_meet():
    runs = runs_of(*(perplexity(p) for p in POLICIES))
    assert report_trade.trade_figure([(run, 3.0, 2.3) for run in runs]).startswith(b"\x89PNG")
    assert report_trade._meet((0, 0, 2, 2), (1, 1, 3, 3))
    assert not report_trade._meet((0, 0, 2, 2), (2, 0, 3, 3))


def test_a_few_policies_of_many(tmp_path):
    for policy in POLICIES:
        label = {"config": {"policy_name": policy, "seq_len": 128}}
        (tmp_path / f"{policy}.json").write_text(json.dumps(perplexity(policy, **label)))

    def labels(*asked):
        return sorted(r.policy_label for r in report._chosen(load_runs([tmp_path]), asked))

    assert labels() == sorted(POLICIES)
    assert labels("freqkv", "sink_window") == ["freqkv", "window"], "a label beats a name"
    with pytest.raises(ValueError, match=r"no result has the policies \['novel'\]; there are: "):
        report.write_report([tmp_path], tmp_path / "out", policies=["novel"])


def test_means_are_those_of_the_records():
    records = [{"key": f"a/{i}", "score": x} for i, x in enumerate((0.0, 1.0))]
    records += [{"key": "b/0", "score": 1.0}]
    (series,) = series_of(Run("x", result("of_tomorrow", "freqkv", records)))
    assert_close(series.mean, 0.75, FLOAT64)
    assert series.column == "all" and series.count == 3


def test_parts_of_one_sample_are_drawn_among_themselves():
    values = [0.0, 1.0, 2.0, 5.0, 2.0, 3.0, 1.0, 4.0]
    ours = {f"part {i}": {"0": value} for i, value in enumerate(values)}
    theirs = {part: {"0": 0.0} for part in ours}
    alone = paired_difference(ours, theirs)
    joined = paired_difference(
        {"all": {str(i): v for i, v in enumerate(values)}},
        {"all": dict.fromkeys(map(str, range(len(values))), 0.0)},
    )
    assert alone == joined and alone.low < alone.mean < alone.high
