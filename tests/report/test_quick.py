"""Short measurements go through the functions of bench, eval and check, with all options."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from trio_deploy import Report, RuntimeOptions, TrioError
from trio_deploy.report import figures, gather, quick
from trio_deploy.report.gather import ReportOptions
from trio_deploy.verify.compare import ParityRow

OPTIONS = RuntimeOptions(threads=1, low_memory=True)


def test_parity_comes_from_the_reference_or_the_recorded_one(bundle, monkeypatch):
    seen = {}
    rows = [ParityRow("embed"), ParityRow("select_1", overlap=1.0, problem="too far")]

    def check(bundle, options, **kwargs):
        seen.update(kwargs, options=options)
        return Report("a check", rows)

    monkeypatch.setattr(quick, "check", check)
    monkeypatch.setattr(quick, "has_torch", lambda: True)
    found = figures.parity(quick.run_check(bundle, OPTIONS))
    assert seen == {"golden": False, "options": OPTIONS}
    assert found["passed"] == 1 and found["rows"][1]["problem"] == "too far"
    monkeypatch.setattr(quick, "has_torch", lambda: False)
    with pytest.raises(TrioError, match="--record"):
        quick.run_check(bundle, OPTIONS)
    monkeypatch.setattr(quick, "GOLDEN", "manifest.json")  # something that is there
    quick.run_check(bundle, OPTIONS)
    assert seen["golden"] is True


def test_a_quick_accuracy_is_that_of_the_bundles_own_schedule(bundle, tmp_path, monkeypatch):
    asked = {}

    def evaluate_configurations(source, questions, configurations, out, options, **more):
        asked.update(configurations=configurations, questions=questions, options=options)
        raise TrioError("enough")

    monkeypatch.setattr(quick, "evaluate_configurations", evaluate_configurations)
    with pytest.raises(TrioError, match="enough"):
        quick.run_eval(bundle, 2, OPTIONS, tmp_path, progress=False)
    assert asked["options"].runtime == OPTIONS
    own, *more = asked["configurations"]
    assert own.schedule == bundle.schedule and len(asked["questions"]) == 32
    assert own.budget == pytest.approx((16 + 8 + 2 * 4) / 4 / 16)
    assert all(other.budget > own.budget and other.schedule is None for other in more)


def test_without_files_everything_is_measured_and_read(bundle, tmp_path, monkeypatch):
    runs = {}

    def measured(name, content):
        def run(bundle, *args, **kwargs):
            runs[name] = next(arg for arg in args if isinstance(arg, RuntimeOptions))
            file = tmp_path / name
            file.write_text(json.dumps(content))
            return file

        return run

    def run_check(bundle, options):
        runs["check"] = options
        return Report("a check", [ParityRow("embed")])

    monkeypatch.setattr(quick, "run_check", run_check)
    monkeypatch.setattr(quick, "run_bench", measured("bench", {}))
    monkeypatch.setattr(quick, "run_eval", measured("eval", {}))
    monkeypatch.setattr(figures, "cost", lambda *_, quick: {"quick": quick})
    monkeypatch.setattr(figures, "accuracy", lambda *_, quick: {"quick": quick})
    monkeypatch.setattr(gather, "answers", lambda *_: {"examples": [], "seconds": 0.1})
    options = ReportOptions(runtime=RuntimeOptions(threads=1))
    parts = gather.gather(bundle, options, progress=False)
    assert runs == dict.fromkeys(("check", "bench", "eval"), options.runtime)
    assert parts["cost"] == parts["accuracy"] == {"quick": True}
    assert parts["parity"]["passed"] == 1
    runs.clear()
    less = replace(options, check=False, measure=False, scenes=0)
    assert gather.gather(bundle, less, progress=False)["cost"] == {"skipped": "Left out."}
    assert not runs
    monkeypatch.setattr(gather, "answers", lambda *_: {"examples": [], "seconds": 1000.0})
    slow = gather.gather(bundle, replace(options, check=False, measure=False), progress=False)
    assert "would take about" in slow["accuracy"]["skipped"]
