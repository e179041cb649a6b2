"""Reports of made-up results: who is compared with whom, what the intervals say, what is marked."""

import re

import numpy as np
import pytest
from scipy.special import stdtrit

from freqkv_jax.evals import report, report_sections, report_stats
from freqkv_jax.evals.report_blocks import Figure, Heading, Paragraph, Table, bytes_text
from freqkv_jax.evals.report_compare import Comparison, compare, difference_text, natural, series_of
from freqkv_jax.evals.report_runs import Run, policy_label
from freqkv_jax.evals.report_stats import Difference, paired_difference
from tests.evals.results import POLICIES, passkey, perplexity, result, runs_of


def only(comparisons) -> Comparison:
    (comparison,) = comparisons
    return comparison


# Intervals


def test_pairs_take_out_what_samples_have_in_common():
    rng = np.random.default_rng(0)
    hard = rng.normal(0, 10, 400)
    ours = {"a": dict(zip(map(str, range(400)), hard + rng.normal(0.5, 0.1, 400), strict=True))}
    theirs = {"a": dict(zip(map(str, range(400)), hard, strict=True))}
    got = paired_difference(ours, theirs)
    assert got.count == 400 and got.low < got.mean < got.high and got.is_clear
    # The interval of a mean of 400 differences of standard deviation 0.1.
    assert 0.8 < (got.high - got.low) / (2 * 1.96 * 0.1 / 20) < 1.2
    assert abs(got.mean - 0.5) < 0.02
    assert paired_difference(ours, theirs) == got, "the same samples give the same interval"


def test_only_shared_samples_count_and_parts_count_alike():
    ours = {"a": {"1": 1.0, "2": 5.0}, "b": {"1": 9.0}, "c": {"1": 100.0}}
    theirs = {"a": {"1": 0.0, "2": 0.0, "3": 7.0}, "b": {"1": 1.0}}
    got = paired_difference(ours, theirs)
    assert (got.mean, got.count) == ((3 + 8) / 2, 3)
    assert got.low is None and not got.is_clear, "three samples are too few for an interval"
    assert paired_difference({"a": {"1": 1.0}}, {"a": {"2": 1.0}}) is None


def test_windows_that_overlap_widen_the_interval():
    walk = np.repeat(np.random.default_rng(1).normal(size=50), 8)
    ours = {"a": {str(i): x for i, x in enumerate(walk)}}
    theirs = {"a": dict.fromkeys(ours["a"], 0.0)}
    alone, together = (paired_difference(ours, theirs, block) for block in (1, 8))
    assert (together.high - together.low) > 2 * (alone.high - alone.low)
    series = series_of(runs_of(perplexity("freqkv", config={"stride": 16}))[0])[0]
    assert series.block == 1
    overlapping = perplexity("freqkv")
    for i, record in enumerate(overlapping["records"]):
        record["start"] = 16 * i
    assert series_of(runs_of(overlapping)[0])[0].block == 8
    old = {name: value for name, value in overlapping.items() if name != "records"}
    old |= {"window_starts": [16 * i for i in range(40)], "window_losses": [3.0] * 40}
    assert series_of(runs_of(old)[0])[0].block == 8
    assert paired_difference(ours, theirs, 400).low is None, "one block is no sample"
    # Neighbours that cancel out do so within a block.
    signs = {"a": {str(i): (-1.0) ** i for i in range(400)}}
    alone, together = (paired_difference(signs, theirs, block) for block in (1, 20))
    assert together.high - together.low < 0.1 * (alone.high - alone.low)


@pytest.mark.parametrize("block", [1, 8])
def test_resampling_in_pieces_is_the_same(monkeypatch, block):
    pairs = np.arange(1000.0)
    whole = report_stats._resampled_means(pairs, block, 50, np.random.default_rng(0))
    assert whole.shape == (50,) and abs(whole.mean() - 499.5) < 20
    for at_once in (1, 7001):  # a row a piece, and seven with a last piece that is short
        monkeypatch.setattr(report_stats, "AT_ONCE", at_once)
        pieces = report_stats._resampled_means(pairs, block, 50, np.random.default_rng(0))
        assert (pieces == whole).all()


def test_windows_of_two_documents_do_not_overlap():
    data = perplexity("freqkv", seq_len=128)
    # Documents of 100 tokens, a window each; then one whose windows share half of their tokens.
    for i, record in enumerate(data["records"]):
        record |= {"document": i, "start": 100 * i, "length": 100}
    data["window_starts"] = [record["start"] for record in data["records"]]
    assert series_of(runs_of(data)[0])[0].block == 1
    for i, record in enumerate(data["records"][30:]):
        record |= {"document": 30, "start": 3000 + 50 * i}
    assert series_of(runs_of(data)[0])[0].block == 2


@pytest.mark.parametrize(("parts", "size"), [(1, 8), (1, 16), (6, 4), (8, 1)])
def test_intervals_cover_as_often_as_they_say(parts, size):
    """Differences of mean 0, of another spread in each part; plain percentiles cover 84 to 92 %."""
    rng, trials, held = np.random.default_rng(0), 600, 0
    none = {str(part): dict.fromkeys(map(str, range(size)), 0.0) for part in range(parts)}
    for trial in range(trials):
        drawn = rng.normal(0, 1 + np.arange(parts)[:, None], (parts, size))
        ours = {str(p): {str(i): x for i, x in enumerate(row)} for p, row in enumerate(drawn)}
        got = paired_difference(ours, none, resamples=300, seed=trial)
        held += got.low <= 0 <= got.high
    # Chance moves the share by 0.9 % (one standard deviation).
    assert 0.93 <= held / trials <= 0.975


@pytest.mark.parametrize("freedom", [1, 1.5, 3, 15, 200])
def test_quantiles_of_student(freedom):
    ratio = report_stats._student_ratio([2.0], [freedom])
    assert ratio == pytest.approx(stdtrit(freedom, 0.975) / stdtrit(1e9, 0.975), rel=1e-3)


def test_degrees_of_freedom_are_those_of_the_parts_that_vary():
    ratio = report_stats._student_ratio
    assert ratio([1.0, 1.0], [7, 7]) == pytest.approx(ratio([1.0], [14]))
    assert ratio([1.0, 0.0], [7, 99]) == ratio([1.0], [7])
    assert ratio([0.0], [7]) == ratio([1.0], [0]) == 1


@pytest.mark.parametrize(("count", "clear", "words"), [(7, False, "few"), (8, True, "all alike")])
def test_differences_that_are_all_alike_have_no_interval(count, clear, words):
    ours = {"a": dict.fromkeys(map(str, range(count)), 0.3)}
    theirs = {"a": dict.fromkeys(ours["a"], 0.1)}
    got = paired_difference(ours, theirs)
    assert got.is_clear == clear and words in difference_text(got)
    assert difference_text(got).startswith("+0.20 [")


@pytest.mark.parametrize(
    ("variant", "score", "words"),
    [("passkey", "greedy", "digits most likely"), ("sandwich", "greedy", "tokens most likely"),
     ("passkey", "exact", "digits written"), ("sandwich", "word_recall", "word recall")],
)  # fmt: skip
def test_titles_say_what_a_needles_score_counts(variant, score, words):
    values = {score: {"higher_is_better": True, "values": [[0.5]]}}
    grid = {"lengths": [64], "depths": [50], "default": score, "metrics": values}
    records = [{"key": f"64/50/{i}", "length_target": 64, "depth": 50, "score": 0.5, "length": 64,
                "nats_per_digit": 1.0} for i in range(2)]  # fmt: skip
    data = result("needle", "freqkv", records, config={"variant": variant}, grid=grid)
    blocks = report.build(runs_of(data))
    titles = [block.text for block in blocks if isinstance(block, Heading)]
    captions = [block.caption for block in blocks if isinstance(block, (Figure, Table))]
    assert f"Score of 100, {words}" in titles
    assert any(text.startswith(f"score of 100, {words} (higher is better); ") for text in captions)
    assert any(text.startswith(f"{words.capitalize()} by length and depth") for text in captions)


def test_all_alike_is_said_and_explained():
    def needle(policy, score):
        records = [
            {"key": f"64/{depth}/{i}", "length": 64, "length_target": 64, "depth": depth,
             "score": score * (depth > 0)}
            for depth in (0, 50) for i in range(4)
        ]  # fmt: skip
        return result("needle", policy, records)

    comparison = only(compare(runs_of(needle("freqkv", 0.0), needle("window", 1.0))))
    differences = comparison.differences()
    assert differences.rows[0][2] == "-50.00 [all alike]"
    assert any(note.startswith("all alike: ") for note in differences.notes)
    assert "wins (50.0; +50.00 points [all alike]" in comparison.verdicts()[0][0]
    clear = only(compare(runs_of(perplexity("freqkv"), perplexity("window", seed=2))))
    assert not any("alike" in note for note in clear.differences().notes)


# Who is compared with whom


def test_perplexities_and_differences_in_percent():
    comparison = only(compare(runs_of(*(perplexity(p) for p in POLICIES))))
    table = comparison.values()
    assert table.columns == ["policy", "KV bytes", "128"]
    rows = {row[0]: row[1:] for row in table.rows}
    assert list(rows)[0] == "full attention"
    per_token = 2 * 2 * 2 * 8 * 4
    assert rows["FreqKV N=64"][0] == bytes_text(64 * per_token)
    assert rows["full attention"][0] == bytes_text(128 * per_token)
    mean = np.mean([r["loss"] for r in perplexity("freqkv")["records"]])
    assert rows["FreqKV N=64"][1] == f"{np.exp(mean):.2f}"
    differences = {row[0]: row[1:] for row in comparison.differences().rows}
    # FreqKV N=128 is the baseline of its size, which is that of full attention here.
    assert set(differences) == {"full attention", "FreqKV N=64"}
    against, text = differences["FreqKV N=64"]
    assert against == "sink + window N=64" and "\u2260" not in text
    assert 9.5 < float(text.split()[0]) < 11.5  # exp(0.1) - 1 in percent
    assert differences["full attention"][0] == "FreqKV N=128"
    assert "\u2260" not in differences["full attention"][1]


def test_one_alone_at_its_size_is_compared_and_marked():
    comparison = only(compare(runs_of(perplexity("full"), perplexity("window"))))
    (row,) = comparison.differences().rows
    assert row[:2] == ["full attention", "sink + window N=64"] and row[2].endswith("\u2260")
    assert any("not of equal size" in note for note in comparison.differences().notes)
    assert not comparison.verdicts(), "only equal sizes have a winner"


def test_a_baseline_can_be_named():
    runs = runs_of(*(perplexity(p) for p in ("full", "freqkv", "window")))
    comparison = only(compare(runs, "full"))
    assert {row[1] for row in comparison.differences().rows} == {"full attention"}
    with pytest.raises(ValueError, match="no result has the baseline 'sink'"):
        report.build(runs, baseline="sink")


def test_verdicts_say_only_what_is_clear():
    clear = only(compare(runs_of(perplexity("freqkv"), perplexity("window"))))
    ((line,),) = clear.verdicts()
    assert re.search(r"^16 KiB, 128 tokens: sink \+ window N=64 wins \(.*; -9\.\d+ % \[", line)
    same = perplexity("window", offset=0.1, seed=5)
    unclear = only(compare(runs_of(perplexity("freqkv"), same)))
    ((line,),) = unclear.verdicts()
    assert "no clear winner" in line
    short = [perplexity(p) for p in ("freqkv", "window")]
    for data in short:
        data["records"] = data["records"][:3]
    ((line,),) = only(compare(runs_of(*short))).verdicts()
    assert "too few samples to tell" in line
    apart = [perplexity(p) for p in ("freqkv", "window")]
    for record in apart[0]["records"]:
        record["key"] += "x"
    ((line,),) = only(compare(runs_of(*apart))).verdicts()
    assert "no samples are shared" in line


def test_in_short_every_size_has_its_verdict():
    small = {"policy": {"policy": "sink_window", "cache_size": 128}}
    policies = [perplexity(p) for p in ("freqkv", "window", "large")]
    longer = [perplexity(p, 256, seed=2) for p in ("freqkv", "window", "large")]
    runs = runs_of(*policies, *longer, *(perplexity("window", n, config=small) for n in (128, 256)))
    blocks = report.build(runs)
    (short,) = (b.items for a, b in zip(blocks, blocks[1:], strict=False)
                if isinstance(a, Heading) and a.text.startswith("In short"))  # fmt: skip
    assert sorted(line.partition(" KiB")[0] for line in short) == [
        "Perplexity of long text: 16", "Perplexity of long text: 32",
    ]  # fmt: skip
    assert all("256 tokens" in line for line in short), "the longest texts"


def test_a_winner_among_those_who_guess_is_none():
    known = only_nats(passkey("freqkv", 0.5), passkey("window", 1.0))
    assert "is best" in known[0][0] and "no better than guessing" in known[1][0]
    assert "freqkv" not in known[1][0] and "FreqKV N=64 has 2.50" in known[1][0]


def only_nats(*results):
    (found,) = (c for c in compare(runs_of(*results)) if c.metric.field == "nats_per_digit")
    return found.verdicts()


def test_models_are_not_compared_with_each_other():
    tuned = [perplexity(p, config={"model_name": "tuned"}) for p in ("freqkv", "window")]
    plain = [perplexity(p, config={"model_name": "plain"}) for p in ("freqkv", "window")]
    comparison = only(compare(runs_of(*tuned, *plain)))
    pairs = {(row[0], row[1]) for row in comparison.differences().rows}
    assert pairs == {
        ("tuned: FreqKV N=64", "tuned: sink + window N=64"),
        ("plain: FreqKV N=64", "plain: sink + window N=64"),
    }
    assert [len(lines) for lines in comparison.verdicts()] == [2]


def test_scores_by_part_and_length():
    def ruler(policy, good):
        records = [
            {"key": f"{task}/{n}/{i}", "subtask": task, "length_target": n, "length": n - 3,
             "score": float(i < good), "answer_compressions": [0, i]}
            for task in ("vt", "cwe") for n in (1024, 512) for i in range(6)
        ]  # fmt: skip
        records.append({"key": "vt/512/6", "error": "no room", "score": 1.0})
        return result("ruler", policy, records, config={"lengths": [512, 1024]})

    comparison = only(compare(runs_of(ruler("freqkv", 2), ruler("window", 5))))
    assert comparison.columns == ["512", "1K"]
    assert comparison.values().rows[0][2:] == ["33.3", "33.3"]
    assert comparison.differences().rows[0][2].startswith("-50.00 [")
    parts = comparison.parts()
    assert parts.rows == [["cwe", "33.3", "83.3"], ["vt", "33.3", "83.3"]]
    assert comparison.cells["FreqKV N=64"]["512"].count == 12, "failed records are left out"
    rounds = report_sections._by_rounds(comparison)
    assert rounds.columns == ["policy", "0", "1", "2 to 3", "4 to 7"]
    assert rounds.rows[1] == ["sink + window N=64", "100.0", "100.0", "100.0", "50.0"]
    level = only(compare(runs_of(ruler("freqkv", 2), ruler("window", 2))))
    assert all("are level (33.3)" in line for lines in level.verdicts() for line in lines)


# What is marked


def test_marks_of_nothing_compressed_and_beyond_the_window():
    idle = perplexity("freqkv", seq_len=64, nothing_compressed=True)
    far = perplexity("full", seq_len=512)
    table = only(compare(runs_of(idle, far))).values()
    cells = {row[0]: row[2:] for row in table.rows}
    assert cells["FreqKV N=64"][0].endswith("\u2020") and cells["full attention"][1].endswith(
        "\u2021"
    )
    assert len(table.notes) == 2
    never = perplexity("full", nothing_compressed=True)
    assert not Run("x", never).nothing_compressed, "full attention has nothing to compress"
    old = perplexity("freqkv", num_compressions=0)
    assert Run("x", old).nothing_compressed
    (line,) = report._warnings(runs_of(idle, never))
    assert line.startswith("Nothing was compressed") and line.endswith(": 0.json.")


def test_labels():
    assert policy_label(POLICIES["freqkv"]) == "FreqKV N=64"
    assert policy_label({"policy": "freqkv", "cache_size": 8, "retain_ratio": 0.25}) == (
        "FreqKV N=8 ratio=0.25"
    )
    assert policy_label({"policy": "full"}) == "full attention"
    assert policy_label({"policy": "of_tomorrow", "cache_size": 3}) == "of_tomorrow N=3"
    run = Run("x", perplexity("freqkv", config={"policy_name": "ours", "adapter": "/a/lora"}))
    assert run.policy_label == "ours" and run.model_label == "tiny + lora"
    assert run.kv_bytes(100) == 64 * 256
    unknown = Run("x", result("perplexity", "full", config={"policy": {"policy": "of_tomorrow"}}))
    assert unknown.kv_bytes(100) is None and unknown.policy is None
    assert sorted(["vt/10", "vt/9", "a"], key=natural) == ["a", "vt/9", "vt/10"]
    assert bytes_text(94371840) == "90 MiB" and bytes_text(1023 * 1024, 3) == "1023 KiB"
    assert difference_text(None) == "no shared samples"
    assert difference_text(Difference(1.0, None, None, 2), "%") == "+1.00 % [few samples]"


def test_unlike_settings_stand_in_tables_of_their_own():
    other = perplexity("freqkv", config={"stride": 7})
    blocks = report.build(runs_of(perplexity("freqkv"), other))
    titles = [block.text for block in blocks if isinstance(block, Heading)]
    assert "Perplexity of long text (stride=64)" in titles
    assert "Perplexity of long text (stride=7)" in titles
    lengths = report.build(runs_of(perplexity("freqkv"), perplexity("freqkv", seq_len=256)))
    titles = [block.text for block in lengths if isinstance(block, Heading)]
    assert titles.count("Perplexity of long text") == 1, "lengths are columns"


def test_costs_of_more_texts_at_once_stand_apart(monkeypatch):
    drawn = []
    monkeypatch.setattr(report_sections, "curves_figure", lambda panels: drawn.append(panels))

    def cost(rows, peak, earlier):
        one = {"tokens_read": 64, "rows": rows, "first_token_s": 1.0, "peak_bytes": peak,
               "peak_of": "device", "peak_is_of_earlier": earlier}  # fmt: skip
        if earlier is None:
            del one["peak_is_of_earlier"]
        return result("cost", "freqkv", [one], costs=[one])

    blocks = report.build(runs_of(cost(1, 7, False), cost(16, 7, True)))
    titles = [block.text for block in blocks if isinstance(block, Heading) and block.level == 3]
    assert len(titles) == 2 and titles[1] == f"{titles[0]}, 16 texts at once"
    # A peak that an earlier run of the process reached is not this run's.
    report.build(runs_of(cost(1, 7, False), cost(1, 9, True)))
    assert [sum("peak" in panel.y_label for panel in panels) for panels in drawn] == [1, 0, 0]
    # Nor is one of which an old result does not say whose it is.
    report.build(runs_of(cost(1, 7, None)))
    assert not any("peak" in panel.y_label for panel in drawn[-1])


def test_more_curves_than_can_be_told_apart_are_not_drawn():
    named = [perplexity("freqkv", config={"policy_name": f"own-{i:02}"}) for i in range(17)]
    for many in (16, 17):
        blocks = report.build(runs_of(*named[:many]))
        drawn = [block.name for block in blocks if isinstance(block, Figure)]
        told = [b.text for b in blocks if isinstance(b, Paragraph) and "cannot be told" in b.text]
        assert bool(told) == (many == 17) and ("perplexity_position" in drawn) == (many == 16)
        assert all("No curves: 17" in text for text in told)
