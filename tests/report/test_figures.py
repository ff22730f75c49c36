"""Figures come from files of this bundle's model, and the bundle's own configuration is found."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import msgspec
import pytest

from tests.support.damage import with_value
from tests.support.page import Page
from tests.support.results import results_of
from trio_deploy import Schedule, TrioError
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.files import sha256_of
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.report.facts import arithmetic, exported, schedule
from trio_deploy.report.figures import accuracy, cost, parity, read_bench, summarise
from trio_deploy.report.page import render
from trio_deploy.verify.compare import ParityRow
from trio_deploy.verify.report import Report


def test_no_headline_where_the_bundles_own_configuration_was_not_measured(bundle):
    """The first configuration of an evaluation may be of another method."""
    rival = results_of(
        bundle.manifest.model.name, ("fastv@1", 0.11, 0.71, Schedule.parse("1:1:fastv"))
    )
    found = summarise(rival, bundle)
    assert found["headline"] is None and not any(row["own"] for row in found["rows"])
    assert "None of these is this bundle as it is (1:8, 2:4;" in found["without"]
    parts = {
        "bundle": exported(bundle),
        "schedule": schedule(bundle),
        "arithmetic": arithmetic(bundle),
        "accuracy": {**found, "quick": False},
        **{part: {"skipped": "no"} for part in ("cost", "parity", "answers")},
    }
    text = Page(render(parts)).text
    assert "Right answers kept" not in text and "None of these is this bundle" in text


@pytest.mark.parametrize(
    ("options", "own"),
    [
        ({}, True),
        ({"threshold": 0.8}, True),
        ({"threshold": 0.7}, False),
        ({"probe": "shifted"}, False),
        ({"positions": "original"}, False),
    ],
)
def test_another_option_is_another_configuration(bundle, options, own):
    found = summarise(
        results_of(bundle.manifest.model.name, ("x", 0.4, 0.9, bundle.schedule, options)), bundle
    )
    assert (found["headline"] == (0.9, 0.4)) is own


def test_options_that_an_evaluation_does_not_name_are_the_measured_bundles_or_the_models(bundle):
    ours = replace(bundle, manifest=msgspec.structs.replace(bundle.manifest, threshold=0.6))
    exported_anew = results_of(ours.manifest.model.name, ("x", 0.4, 0.9, bundle.schedule))
    assert summarise(exported_anew, ours)["headline"] is None
    itself = replace(exported_anew, bundle=sha256_of(bundle.path / MANIFEST))
    assert summarise(itself, ours)["headline"] == (0.9, 0.4)


@pytest.mark.parametrize(
    ("content", "words"),
    [("{}", "no measurements"), ("no json", "f.json is not valid JSON"), (None, "no measurements")],
)
def test_figures_that_are_none_are_refused(bundle, tmp_path, content, words):
    file = tmp_path / "f.json"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrioError, match=words):
        read_bench(file, bundle.manifest.model.name)


def test_figures_say_how_they_ran(bundle, measured):
    (sentence,) = cost(bundle, measured, quick=False)["ran"]
    assert "onnxruntime on CPUExecutionProvider, target cpu, ort graphs in float32" in sentence
    ran = RanAs("openvino", "t", "primitive", "float32", "bfloat16", "CPU")
    results = results_of(bundle.manifest.model.name, ("trio", 0.4, 0.9, bundle.schedule))
    one = replace(results, results=[replace(each, ran_as=ran) for each in results.results])
    assert summarise(one, bundle)["ran"] == [f"Ran as {ran}."]
    assert parity(Report("t", [], ran))["ran"] == [f"Ran as {ran}."]


def test_figures_of_another_model_are_refused(bundle, measured, evaluated, tmp_path):
    raw = json.loads(measured.read_text())
    raw["model"]["name"] = "another"
    (tmp_path / "bench.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match="about another"):
        read_bench(tmp_path / "bench.json", bundle.manifest.model.name)
    raw = json.loads(evaluated.read_text()) | {"model": "another"}
    (tmp_path / "results.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match="about another"):
        accuracy(bundle, tmp_path / "results.json", quick=False)


def test_a_sweep_is_not_what_a_page_shows(bundle, measured, tmp_path):
    raw = json.loads(measured.read_text())
    del raw["cases"]
    (tmp_path / "sweep.json").write_text(json.dumps(raw | {"points": []}))
    with pytest.raises(TrioError, match="no measurements of trio bench"):
        read_bench(tmp_path / "sweep.json", bundle.manifest.model.name)


def test_a_difference_that_is_not_finite_can_be_shown():
    rows = [ParityRow("embed", max_rel=value, problem="x") for value in (math.inf, 0, 2)]
    found = parity(Report("t", rows))["rows"]
    assert [row["relative"] for row in found] == ["inf", "0", "2.0e+00"]


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["cases"], []),
        (["cases", 0, "first_token_s", "q3"], 0),
        (["cases", 0, "first_token_s"], None),
        (["cases", 1, "against_unpruned", "prefill"], -1),
        (["cases", 1, "groups_s"], {}),
        (["cases", 1, "tokens", "keep"], "all"),
        (["machine", "versions"], []),
        (["model"], "tiny"),
        (["workload", "runs"], 1.5),
        (["load_after"], "much"),
    ],
)
def test_damaged_figures_are_one_error(bundle, measured, tmp_path, keys, value):
    file = tmp_path / "bench.json"
    file.write_text(json.dumps(with_value(json.loads(measured.read_text()), keys, value)))
    with pytest.raises(TrioError, match=r"bench\.json holds no measurements of trio bench that"):
        read_bench(file, bundle.manifest.model.name)
