"""Pictures: they are made, they say what they must, and the same input gives the same bytes."""

import pytest

pytest.importorskip("matplotlib")

from freqkv_jax.evals import plots
from freqkv_jax.evals.plots import Curve, HeatMap, Panel

CURVES = [
    Curve("FreqKV", [1024, 2048], [10.0, 11.0], [0.1, None]),
    Curve("full attention", [1024, 2048], [9.0, 400.0], is_full=True),
]


@pytest.fixture
def figures(monkeypatch):
    """Keeps the figures that are drawn."""
    kept = []
    monkeypatch.setattr(plots, "png", lambda figure: kept.append(figure) or b"png")
    return kept


def texts(axes):
    return [text.get_text() for text in axes.texts]


def test_the_same_input_gives_the_same_picture():
    panel = Panel(CURVES, "tokens", "perplexity")
    first = plots.curves_figure([panel])
    assert first == plots.curves_figure([panel])
    assert first[:8] == b"\x89PNG\r\n\x1a\n" and len(first) < 200_000


def test_lines_differ_in_more_than_colour():
    many = [Curve(str(i), [1], [1.0]) for i in range(6)]
    looks = plots.looks([*many, *CURVES])
    assert len({colour for colour, _, _ in looks.values()}) == len(looks)
    assert len({(str(line), marker) for _, line, marker in looks.values()}) == len(looks)
    assert looks["full attention"] == plots.FULL


def test_what_shoots_up_does_not_flatten_the_rest(figures):
    top = plots.top_of(CURVES)
    assert 11 < top < 15
    assert plots.top_of(CURVES[:1]) is None
    assert plots.top_of([CURVES[0], Curve("full", [1], [12.0], is_full=True)]) is None
    panel = Panel(CURVES, "tokens", "perplexity", marks=[(1500, "cache is full")], top=top)
    plots.curves_figure([panel])
    axes = figures[0].axes[0]
    assert axes.get_ylim()[1] == top and axes.get_ylim()[0] > 8
    assert "↑ 400" in texts(axes) and "cache is full" in texts(axes)
    assert axes.get_xlabel() == "tokens" and axes.get_ylabel() == "perplexity"
    assert [label.get_text() for label in axes.get_xticklabels()] == ["1K", "2K"]


def test_bytes_are_written_as_bytes(figures):
    curve = Curve("a", [1024, 2048], [2.0**20, 2.0**30])
    plots.curves_figure([Panel([curve], "tokens", "bytes", log_y=True, bytes_y=True)])
    labels = [label.get_text() for label in figures[0].axes[0].get_yticklabels()]
    assert any("MiB" in label for label in labels)
    plots.points_figure([curve], "score", "title")
    assert figures[1].axes[0].get_xscale() == "log"


def test_small_heat_maps_have_numbers_and_lines_where_the_cache_ends(figures):
    one = HeatMap(
        "FreqKV", [0, 100], [1000, 2000, 3000], [[1.0, 0.25, None], [0.5, 0.0, 1.0]],
        [(2000, "cache is full"), (8192, "native window")],
    )  # fmt: skip
    plots.needle_figure([one], "found")
    axes = figures[0].axes[0]
    shown = texts(axes)
    assert {"1.00", ".25", ".50", ".00", "cache is full"} <= set(shown)
    assert "native window" not in shown, "it is beyond the map"
    lines = {float(line.get_xdata()[0]) for line in axes.lines if line.get_linewidth() > 1}
    assert lines == {1.5}, "behind the column of 2000 tokens"
    assert axes.get_title() == "FreqKV: mean 0.55"
    red, green = (axes.images[0].cmap(axes.images[0].norm(x)) for x in (0.0, 1.0))
    assert red[0] > 0.9 and green[1] > 0.8 and green[0] < 0.1


def test_large_heat_maps_have_crosses_and_low_can_be_good(figures):
    lengths = list(range(1000, 31000, 1000))
    values = [[0.1] * 29 + [2.2], [None] * 30]
    plots.needle_figure([HeatMap("a", [0, 100], lengths, values)], "nats", best=0.0, worst=2.3)
    axes = figures[0].axes[0]
    assert not texts(axes)
    crosses = [line for line in axes.lines if line.get_marker() == "x"]
    assert [(line.get_xdata()[0], line.get_ydata()[0]) for line in crosses] == [(29, 0)]
    image = axes.images[0]
    assert image.cmap(image.norm(0.0))[1] > 0.8, "green is good"


def test_without_matplotlib_it_is_said_what_to_install(monkeypatch):
    import builtins

    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ImportError, match=r"pip install 'freqkv-jax\[eval\]'"):
        plots.curves_figure([Panel(CURVES, "x", "y")])
