"""Figures and ratios: what is divided by what."""

from __future__ import annotations

import json

import pytest

from trio_deploy import RuntimeOptions, Schedule
from trio_deploy.bench.case import Case, Run
from trio_deploy.bench.results import Spread, case_figures, compare, cost_of
from trio_deploy.bench.table import split
from trio_deploy.cost.flops import account


def run(**changes):
    values = {
        "stages": {"preprocess": 0.1, "vision": 0.2, "embed": 0.1, "prefill_0": 0.3,
                   "select_1": 0.1, "prefill_1": 0.2},
        "first_token_s": 1.1,
        "tokens_per_s": 10.0,
        "prompt_tokens": 40,
        "visual_tokens": 16,
        "keep": (8, 4),
        "layer_ranges": ((0, 1, 40), (1, 3, 32), (3, 6, 28)),
        "kv_bytes": 1000,
        "precision": "float32",
    }  # fmt: skip
    return Run(**{**values, **changes})


CASE = Case("11 %", "trio", "b", None, RuntimeOptions("onnxruntime"))


def test_a_spread_is_median_and_quartiles():
    spread = Spread.of([5.0, 1.0, 3.0, 2.0, 4.0])
    assert (spread.median, spread.q1, spread.q3) == (3, 2, 4)
    assert (spread.least, spread.most, spread.runs) == (1, 5, 5)
    assert Spread.of([2.0]) == Spread(2, 2, 2, 2, 2, 1)
    assert json.loads(json.dumps(spread.to_json()))["q3"] == 4


def test_stages_add_up_to_the_first_token():
    groups = run().groups
    assert groups["layers"] == pytest.approx(0.5)
    assert groups["selection"] == pytest.approx(0.1)
    assert groups["other"] == pytest.approx(0.1)
    assert sum(groups.values()) == pytest.approx(run().first_token_s)
    assert run().prefill_s == pytest.approx(0.7)


def test_operations_are_those_of_the_tokens_that_each_layer_had(random_bundle):
    cost = cost_of(run(), random_bundle)
    text = random_bundle.config.text
    expected = account(text, Schedule.parse("1:8,3:4"), 16, 24, item_bytes=4, probes=4)
    assert cost == expected
    figures = case_figures(CASE, [run(), run()], random_bundle, tiles=1)
    flops = figures["flops"]
    parts = ("layers", "saliency", "suppression_at_most", "lm_head")
    assert flops["prefill"] == sum(flops[part] for part in parts) == expected.prefill
    assert figures["kv_bytes_counted"] == expected.kv_bytes


def test_no_pruning_counts_every_token_at_every_layer(random_bundle):
    whole = cost_of(run(keep=(16, 16), layer_ranges=((0, 6, 40),)), random_bundle)
    text = random_bundle.config.text
    assert whole == account(text, Schedule.parse("1:16,3:16"), 16, 24, item_bytes=4, probes=4)
    assert whole.selection == 0


def test_ratios_are_how_many_times_better_than_no_pruning():
    def figures(first, prefill, flops, speed, kv, peak):
        def median(value):
            return value and {"median": value}

        return {
            "name": "x",
            "first_token_s": median(first),
            "prefill_s": median(prefill),
            "tokens_per_s": median(speed),
            "kv_bytes": kv,
            "peak_mib": peak,
            "flops": flops and {"prefill": flops, "layers": flops // 2, "lm_head": 0},
        }

    ours = figures(2.0, 1.0, 100, 20.0, 50, 10.0)
    ratios = compare(ours, figures(8.0, 6.0, 800, 10.0, 200, 5.0))
    assert ratios["first_token"] == 4 and ratios["prefill"] == 6
    assert ratios["flops_limit"] == 8 and ratios["flops_limit_free_selection"] == 16
    assert ratios["of_limit"] == pytest.approx(0.75)
    assert ratios["tokens_per_s"] == 2 and ratios["kv_bytes"] == 4 and ratios["peak_mib"] == 0.5
    unknown = compare(figures(2.0, None, None, None, None, None), ours)
    assert unknown["first_token"] == 1
    assert {unknown[key] for key in ("prefill", "flops_limit", "of_limit", "peak_mib")} == {None}


def test_a_baseline_that_does_not_tell_stages_apart_has_none(random_bundle):
    bare = run(stages={}, keep=(), layer_ranges=(), kv_bytes=None)
    figures = case_figures(CASE, [bare], random_bundle, tiles=1)
    assert figures["groups_s"] is figures["prefill_s"] is figures["flops"] is None
    assert figures["first_token_s"]["median"] == 1.1


@pytest.mark.parametrize("whole", [1.0, 0.9, 0.5])
def test_a_bar_is_as_long_as_its_label_says(whole):
    """Stage medians come to 0.9 here, whatever the median of the whole is."""
    medians = {"preprocess": 0.1, "vision": 0.2, "embed": 0.1, "layers": 0.4, "selection": 0.1,
               "other": 0.3}  # fmt: skip
    case = {
        "first_token_s": {"median": whole},
        "groups_s": {group: {"median": seconds} for group, seconds in medians.items()},
    }
    parts = split(case)
    assert sum(parts.values()) == pytest.approx(whole)
    assert parts["other"] == pytest.approx(max(0.0, whole - 0.9), abs=1e-12)
    assert parts["layers"] / parts["vision"] == pytest.approx(2)
    assert split({"first_token_s": {"median": whole}, "groups_s": None}) == {"other": whole}
