"""Charts: points inside the frame, labels apart, crowded lines spread out, all plain SVG."""

from __future__ import annotations

import math
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from tests.support.results import results_of_lines
from trio_deploy.report.charts import (
    SIZES,
    Retention,
    bars,
    bench_chart,
    geometry,
    retention,
    retention_chart,
    scale,
    sweep,
)

SVG = "{http://www.w3.org/2000/svg}"


def drawn_at(lines, size="wide"):
    return geometry(Retention(lines, scored=True), *SIZES[size])


def lines_of(count, shares=(0.109, 0.11, 0.111, 0.222, 0.333)):
    """Lines between 50 and 100 %, some of them crowded at the top."""
    return {
        f"method {i}": [
            (share + 0.0004 * i, value, value - 0.01, min(1.0, value + 0.01))
            for share in shares
            for value in [0.995 - 0.001 * share - (0.45 * i / count if i > 3 else 0.001 * i)]
        ]
        for i in range(count)
    }


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("count", [1, 2, 11, 20])
def test_the_accuracy_chart_holds_every_point_inside_its_frame(count, size):
    drawn = drawn_at(lines_of(count), size)
    assert len(drawn["lines"]) == count and drawn["lines"][-1]["first"]
    for line in drawn["lines"]:
        for point in line["points"]:
            assert drawn["left"] <= point["x"] <= drawn["right"]
            for key in ("y", "low", "high"):
                assert drawn["top"] <= point[key] <= drawn["bottom"]
    assert any(tick["whole"] for tick in drawn["y_ticks"])


def test_a_chart_of_one_point_has_a_height():
    whole = drawn_at({"trio": [(0.1, 1.0, 1.0, 1.0)]})
    assert whole and [tick["text"] for tick in whole["y_ticks"]] == ["99 %", "100 %"]
    bare = drawn_at({"trio": [(0.1, 1.0, math.nan, math.nan)]})
    assert bare["lines"][0]["points"][0]["low"] is None
    shown = Retention({"trio": [(0.1, 1.0, math.nan, math.nan)]}, True)
    assert "nan" not in retention(shown, "wide").inline().lower()
    assert drawn_at({}) is None
    assert "nothing was pruned" in retention(Retention({}, True), "wide").inline()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize(
    "shares",
    [
        (0.109, 0.11, 0.111, 0.222, 0.333),
        tuple(0.05 + 0.01 * i for i in range(60)),
        (0.1, 0.13, 0.16, 0.9),
        (0.02, 0.98),
    ],
)
def test_labels_of_the_chart_do_not_touch(shares, size):
    drawn = drawn_at(lines_of(6, shares), size)
    ticks = drawn["x_ticks"]
    for one, other in pairwise(ticks):
        assert other["at"] - one["at"] >= 40
        assert other["at"] - other["half"] > one["at"] + one["half"]
    assert all(t["at"] - t["half"] >= 0 and t["at"] + t["half"] <= drawn["width"] for t in ticks)
    heights = sorted(tick["at"] for tick in drawn["y_ticks"])
    assert all(lower - upper >= 14 for upper, lower in pairwise(heights))


def test_budgets_that_are_nearly_equal_share_a_label():
    drawn = drawn_at(lines_of(1))
    assert [tick["text"] for tick in drawn["x_ticks"]] == ["10.9–11.1 %", "22.2 %", "33.3 %"]


def test_lines_that_crowd_at_the_top_are_spread_out():
    drawn = drawn_at(lines_of(11))
    assert drawn["stretched"] is not None
    assert drawn["stretched"] > (drawn["top"] + drawn["bottom"]) / 2
    alone = drawn_at({"a": [(0.1, 0.6, 0.5, 0.7), (0.3, 0.99, 0.9, 1)]})
    assert alone["stretched"] is None


def test_the_first_configuration_lies_over_the_others():
    results = results_of_lines({f"m{i}": [0.99, 1.0] for i in range(11)})
    tree = ElementTree.fromstring(retention_chart(results))
    groups = [g for g in tree.iter(f"{SVG}g") if g.find(f"{SVG}path[@class='mark']") is not None]
    lines = [g for g in groups if g.find(f"{SVG}line[@class='range']") is not None]
    assert len(lines) == 11
    assert ["first" in g.get("class") for g in lines] == [False] * 10 + [True]


def test_lines_close_to_100_are_spread_out_if_others_fall_far_below():
    crowd = {"recipe": [0.994, 0.998], "divprune": [0.997, 0.998], "random": [0.6, 0.8]}
    assert "stretched above 95%" in retention_chart(results_of_lines(crowd))
    assert "stretched" not in retention_chart(results_of_lines({"recipe": [0.6, 0.9]}))
    together = {"recipe": [0.98, 0.99], "divprune": [0.96, 0.97]}
    assert "stretched" not in retention_chart(results_of_lines(together))


def test_the_scale_is_continuous_and_rises():
    to_height = scale(0.4, 1.01, stretch=True)
    heights = [to_height(0.4 + 0.001 * i) for i in range(611)]
    assert heights == sorted(heights) and heights[0] == pytest.approx(0)
    assert heights[-1] == pytest.approx(1)
    assert to_height(0.95) == pytest.approx(to_height(0.95 + 1e-9), abs=1e-6)


def test_values_without_an_interval_are_drawn_without_whiskers():
    results = results_of_lines({"recipe": [0.99, 1.0], "random": [0.5, 0.6]}, math.nan)
    chart = retention_chart(results)
    assert 'class="mark"' in chart and 'class="range"' not in chart and "nan" not in chart


def test_a_file_is_whole_names_what_it_shows_and_loads_nothing():
    results = results_of_lines({"<recipe> & co": [0.9, 0.95], "random": [0.5, 0.6]})
    chart = retention_chart(results)
    tree = ElementTree.fromstring(chart)  # well-formed, names escaped
    said = "".join(tree.itertext())
    assert "<recipe> & co" in said and "tiny: 20 questions, made up" in said
    assert "prefers-color-scheme: dark" in chart
    assert "http" not in chart.replace('xmlns="http://www.w3.org/2000/svg"', "")
    assert "url(" not in chart and "<script" not in chart


def case(name, first, **more):
    def spread(median):
        return {"median": median, "q1": 0.9 * median, "q3": 1.1 * median}

    groups = {"preprocess": 0.01, "vision": 0.2, "embed": 0.0, "layers": 0.5, "selection": 0.02}
    return {
        "name": name,
        "kind": "trio",
        "runtime": "onnxruntime",
        "precision": "float32",
        "first_token_s": spread(first),
        "groups_s": {group: spread(first * share) for group, share in groups.items()},
        "prefill_s": spread(0.8 * first),
        "flops": {"prefill": round(1e12 * first)},
        "kv_bytes": round(2**20 * 50 * first),
        "against_unpruned": {"first_token": 2.0},
        **more,
    }


RESULT = {
    "model": {"name": "tiny"},
    "workload": {"visual_tokens": 256, "text_tokens": 64},
    "cases": [
        case("no pruning", 1.0),
        case("11.1 %", 0.25),
        case("OpenVINO GenAI, no pruning", 0.9, kind="genai", groups_s=None),
    ],
}
SWEEP = {
    "model": {"name": "tiny"},
    "points": [
        {
            "workload": {"visual_tokens": 256 * n},
            "cases": [case("no pruning", n), case("11 %", n / 4)],
        }
        for n in (1, 2, 3)
    ],
}


@pytest.mark.parametrize("size", SIZES)
def test_bars_are_as_long_as_the_time_they_show(size):
    drawn = bars(RESULT, size)
    tree = ElementTree.fromstring(drawn.file())
    parts = [r for r in tree.iter(f"{SVG}rect") if "part" in r.get("class") and r.get("x")]
    end: dict[str, float] = {}
    for part in parts:
        assert 0 <= float(part.get("x")) <= float(part.get("x")) + float(part.get("width"))
        at = part.get("y")
        end[at] = max(end.get(at, 0.0), float(part.get("x")) + float(part.get("width")))
    whole, pruned, genai = (length - 12 for length in end.values())
    assert pruned / whole == pytest.approx(0.25, abs=0.01)
    assert genai / whole == pytest.approx(0.9, abs=0.01)
    said = "".join(tree.itertext())
    assert "0.25 s  (2.00x)" in said and "torch" not in said and "openvino genai" in said
    assert "256 visual + 64 text" in said and "quartiles" in said


def test_a_sweep_has_a_panel_per_quantity_and_a_line_per_budget():
    drawn = sweep(SWEEP)
    tree = ElementTree.fromstring(drawn.file())
    lines = [p for p in tree.iter(f"{SVG}path") if p.get("class") == "line"]
    assert len(lines) == 3 * 2 + 2  # and two samples in the legend
    assert len([p for p in tree.iter(f"{SVG}path") if p.get("class") == "band"]) == 2
    said = "".join(tree.itertext())
    for words in ("seconds of prefill", "multiply-adds of prefill (T)", "KV cache (MiB)", "768"):
        assert words in said
    assert bench_chart(SWEEP) == drawn.file() and bench_chart(RESULT) == bars(RESULT).file()
