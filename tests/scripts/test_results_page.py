"""docs/results.md says what was measured, and which of the project's bars it does not reach."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trio_deploy.evaluation.statistics import Estimate

ROOT = Path(__file__).parents[2]


@pytest.fixture
def page(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import results_page

    return results_page


def test_the_page_shows_the_bars_as_they_were_measured(page):
    assert page.bars() in page.PAGE.read_text(encoding="utf-8")


def test_readme_and_page_say_where_reading_the_question_pays_as_it_was_measured(page):
    for file in (ROOT / "README.md", page.PAGE):
        assert page.pays() in file.read_text(encoding="utf-8")
    assert "+14.2 (+12.6 to +15.8) points over DivPrune with 1 %" in page.pays()


def test_a_bar_is_met_where_the_interval_says_so(page, monkeypatch):
    loaded = page.loaded

    def rows(name, **changes):
        def changed(evaluation):
            found = loaded(evaluation)
            results = [replace(r, **changes) if r.name == name else r for r in found.results]
            return replace(found, results=results)

        monkeypatch.setattr(page, "loaded", changed)
        return page.bars().splitlines()

    level = next(row for row in rows("fastv", behind=Estimate(0.3, -0.1, 0.5)) if "fastv:" in row)
    assert "published shape" in level and "**not met**: level" in level
    above = rows("divprune@recipe", behind=Estimate(0.02, 0.01, 0.03))
    assert not any("not met" in row for row in above)
    below = rows("dart@0", behind=Estimate(-0.02, -0.03, -0.01))
    assert any("below no other method" in row and "**not met**" in row for row in below)


def test_a_busy_machine_is_said(page, monkeypatch, tmp_path):
    monkeypatch.setattr(page, "MEASURED", tmp_path)
    result = json.loads((ROOT / "docs" / "measurements" / "bench-tiny.json").read_text())
    for load, said in ((12.3, True), (0.2, False), (None, False)):
        (tmp_path / "bench-tiny.json").write_text(json.dumps({**result, "load_before": load}))
        text = page.cost("bench-tiny")
        assert ("**Other work ran on the machine** (load average 12.3" in text) is said
        assert "Command: `trio bench tiny " in text and not text.startswith("#")
