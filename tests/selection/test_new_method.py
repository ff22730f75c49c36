"""How to add a selection method, shown with one written in this file alone.

1. Write a module in selection/, named after the method. Its docstring names the paper and says
   what differs. It imports neither torch nor ONNX, and has four functions:

   - `graph(op, site) -> Choice` writes the graph. `op` writes plain operators; inputs, the next
     layer, the model's gradient, loops and operators that differ between dialects come from the
     `Site` (selection/site.py). Ties go to the earlier token.
   - `reference(view)` is the method as the paper states it, for one row in numpy: the places of
     the visual tokens kept, in any order, and the scores, 0 where not visual. A `View`
     (schedule/view.py) holds the row; the oracle computes it.
   - `rule(selected)` is whether the tokens that a graph kept follow from the scores that it
     reports: `trio check` asks where rounding may have changed a rank. None if scores alone do not
     tell; `selection.arrays.keeps_greatest` if a method keeps its greatest scores.
   - `flops(text, sizes)` counts multiply-adds, for `trio plan`.

   A method that averages dropped tokens into kept ones has `merge(view, index)`, too.
2. Add a row to `schedule.methods.METHODS` with the module's name and what the method needs: arrays
   of `ARRAYS`, which the oracle then computes, and `seed` or `threshold`, if it reads them.
3. Describe it in docs/architecture.md. The tests of all methods run over the table.

Nothing else changes: schedules, exports, runs, plans, evaluations and checks know the name.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from trio_deploy import Pipeline, Request, Schedule, TrioError, check, export_model
from trio_deploy.cost.flops import account
from trio_deploy.schedule.methods import METHODS, Method, PointSizes
from trio_deploy.schedule.view import View
from trio_deploy.selection.arrays import cosine_distances, greatest, keeps_greatest
from trio_deploy.selection.choice import Choice
from trio_deploy.verify.examples import default_examples
from trio_deploy.verify.report import format_report

SCHEDULE = "0:0.6:nearest,2:0.3:nearest"


def graph(op: Any, site: Any) -> Choice:
    """Keep the visual tokens whose hidden states have the greatest cosine with the last token's."""
    tokens = site.tokens
    unit = site.unit_rows(op, site.float32(op, tokens.x), tokens.squares)
    last = op.Add(op.Unsqueeze(op.Sub(site.lengths, 1), [1]), tokens.offset)  # [B,1]
    row = op.Gather(op.Reshape(unit, [-1, site.text.hidden_size]), last, axis=0)  # [B,1,d]
    cosines = op.Squeeze(op.MatMul(unit, op.Transpose(row, perm=[0, 2, 1])), [2])
    return site.by_score(op, op.Add(cosines, 1.0))  # scores are not negative


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Compare every token with the last one in fp64."""
    scores = (2.0 - cosine_distances(view.hidden, view.hidden[-1])) * view.visual
    return greatest(scores, view.visual, view.keep), scores


rule = keeps_greatest


def flops(text: Any, sizes: PointSizes) -> tuple[int, int]:
    """Cosines of all tokens with one."""
    return 0, sizes.tokens * text.hidden_size


@pytest.fixture(autouse=True)
def _nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(METHODS, "nearest", Method(__name__))


@pytest.fixture
def bundle(llava_next_checkpoint, tmp_path):
    return export_model(llava_next_checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)


def test_it_exports_runs_and_passes_the_check(bundle):
    assert bundle.schedule.methods == ("nearest", "nearest")
    example = default_examples()[0]
    pipeline = Pipeline.open(bundle, threads=2)
    answer = pipeline.generate(Request(example.prompt, example.pictures, max_new_tokens=2))
    assert answer.keep_counts[0] < answer.visual_tokens
    report = check(bundle, threads=2)
    assert report.passed, format_report(report)
    selections = [row for row in report.rows if row.stage.startswith("select_")]
    assert [row.overlap for row in selections] == [1.0, 1.0]


def test_a_wrong_reference_fails_the_check(bundle, monkeypatch):
    def farthest(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
        scores = cosine_distances(view.hidden, view.hidden[-1]) * view.visual
        return greatest(scores, view.visual, view.keep), scores

    monkeypatch.setattr(sys.modules[__name__], "reference", farthest)
    report = check(bundle, threads=2)
    wrong = {row.stage: row.problem for row in report.rows if not row.passed}
    assert {"select_1", "select_2"} <= wrong.keys() and "saliency differs" in wrong["select_1"]


def test_a_graph_that_does_not_follow_its_rule_fails_the_check(bundle, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "rule", lambda selected: False)
    wrong = [row.problem for row in check(bundle, threads=2).rows if not row.passed]
    assert len(wrong) == 2 and all("does not keep what the rule picks" in said for said in wrong)


def test_its_operations_are_counted(bundle):
    text = bundle.config.text
    cost = account(text, Schedule.parse("2:10:nearest"), 40, 10, item_bytes=4, probes=4)
    assert (cost.saliency, cost.similarity) == (0, 50 * text.hidden_size)


def test_the_name_is_unknown_without_its_row(monkeypatch):
    monkeypatch.delitem(METHODS, "nearest")
    with pytest.raises(TrioError, match="nearest"):
        Schedule.parse(SCHEDULE).validate(4)
