"""What the page says of quantised weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.support.results import results_of
from trio_deploy import export_model
from trio_deploy.evaluation.scheme import SchemeResults, SchemeRow
from trio_deploy.evaluation.statistics import Estimate
from trio_deploy.report.gather import ReportOptions, gather
from trio_deploy.report.page import render


@pytest.mark.parametrize("problem", ["", "91.0% of the kept tokens agree at point 1, below 95%"])
def test_the_page_shows_both_questions_of_quantised_weights(tmp_path: Path, problem: str) -> None:
    bundle = export_model("tiny", tmp_path / "b", quantize="int4", graphs_only=True, progress=False)
    without = render(gather(bundle, ReportOptions()))
    assert "Is it right?" in without and "Are int4 weights good enough?" in without
    assert "Not compared with float weights" in without
    row = SchemeRow("trio", 0.111, (Estimate(0.91),), Estimate(0.99), None, Estimate(0.002),
                    (problem,) if problem else ())  # fmt: skip
    results = results_of("tiny", ("trio", 0.111, 0.9, bundle.schedule))
    compared = SchemeResults("int4", "the floats", True, (row,))
    replace(results, scheme=compared).save(tmp_path)
    page = render(gather(bundle, ReportOptions(evaluation=tmp_path / "results.json")))
    assert "91.0%" in page and "+0.2 (–)" in page and "the floats" in page
    assert ("No." if problem else "Yes.") in page and (problem or "met") in page
    assert "Not compared with float weights" not in page


def test_the_page_of_float_weights_has_no_such_question(tmp_path: Path) -> None:
    bundle = export_model("tiny", tmp_path / "b", graphs_only=True, progress=False)
    assert "good enough" not in render(gather(bundle, ReportOptions()))
