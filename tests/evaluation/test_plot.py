"""The plot: lines that can be told apart, the first one on top, the crowd at 100 % spread out."""

from __future__ import annotations

import importlib.util
import math

import pytest

from trio_deploy.evaluation import plot
from trio_deploy.evaluation.results import KindResult, Result, Results
from trio_deploy.evaluation.statistics import Estimate

pytestmark = pytest.mark.skipif(
    not importlib.util.find_spec("matplotlib"), reason="needs matplotlib"
)


def made_up(values: dict[str, list[float]], spread: float = 0.01) -> Results:
    """Results of methods at rising shares of the tokens."""

    def result(name, share, value):
        estimate = Estimate(value, value - spread, value + spread)
        kind = KindResult(20, value, 0.1, estimate, estimate)
        return Result(name, share, share, None, {}, kind, estimate, {"colour": kind}, None)

    found = [result("unpruned", 1.0, 1.0)]
    for name, line in values.items():
        found += [result(name, 0.1 * (i + 1), value) for i, value in enumerate(line)]
    return Results("tiny", "made up", "exact", {}, 20, 5, found, scored=20)


def drawn(results: Results):
    from matplotlib import pyplot

    pyplot.switch_backend("Agg")
    return plot._figure(pyplot, results)


def test_a_dozen_lines_differ_in_colour_and_hundred_in_style():
    styles = [plot.style(number) for number in range(100)]
    assert len({one["color"] for one in styles[:14]}) == 14
    assert len({one["marker"] for one in styles[:12]}) == 12
    assert len({tuple(map(str, one.values())) for one in styles}) == 100


def test_the_first_configuration_lies_over_the_others():
    results = made_up({f"m{i}": [0.99, 1.0] for i in range(11)})
    axes = drawn(results).axes[0]
    named = [c for c in axes.containers if c.get_label().startswith("m")]
    first, *others = [container.lines[0] for container in named]
    assert all(first.zorder > line.zorder for line in others)
    assert first.get_linewidth() > max(line.get_linewidth() for line in others)
    assert first.get_color() not in {line.get_color() for line in others}


def test_lines_close_to_100_are_spread_out_where_others_fall_far_below():
    crowd = {"recipe": [0.994, 0.998], "divprune": [0.997, 0.998], "random": [0.6, 0.8]}
    axes = drawn(made_up(crowd)).axes[0]

    def height(value):
        return axes.transAxes.inverted().transform(axes.transData.transform((10, value)))[1]

    assert height(95) < 0.5 < height(97.5) and height(59) >= 0 and height(100) < 1
    assert "stretched above 95%" in axes.get_ylabel()
    alone = drawn(made_up({"recipe": [0.6, 0.9]})).axes[0]
    assert "stretched" not in alone.get_ylabel()
    together = drawn(made_up({"recipe": [0.98, 0.99], "divprune": [0.96, 0.97]})).axes[0]
    assert "stretched" not in together.get_ylabel()


def test_the_scale_is_continuous_and_rises():
    to_height = plot.scale(0.4, 1.01, stretch=True)
    heights = [to_height(0.4 + 0.001 * i) for i in range(611)]
    assert heights == sorted(heights) and heights[0] == pytest.approx(0)
    assert heights[-1] == pytest.approx(1)
    assert to_height(0.95) == pytest.approx(to_height(0.95 + 1e-9), abs=1e-6)


def test_values_without_an_interval_are_drawn_without_whiskers(tmp_path):
    results = made_up({"recipe": [0.99, 1.0], "random": [0.5, 0.6]}, math.nan)
    axes = drawn(results).axes[0]
    low, high = axes.get_ylim()
    assert low < 50 and high >= 100
    plot.draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000
