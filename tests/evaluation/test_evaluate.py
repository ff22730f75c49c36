"""An evaluation: every configuration asked, and compared with the unpruned model."""

import json
from dataclasses import replace

import numpy as np
import pytest

from tests.support.bundles import make_speechless
from tests.support.evaluation import ONE_THREAD, requests_asked, run
from trio_deploy import (
    Pipeline,
    Request,
    TrioError,
    evaluate,
    export_model,
)
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.evaluation.ask import AnswerLine, AnswerLog
from trio_deploy.evaluation.comparison import Comparison
from trio_deploy.evaluation.configurations import (
    Source,
    as_exported,
    grid,
    named,
    used,
)
from trio_deploy.evaluation.questions import scene_questions
from trio_deploy.evaluation.results import SAME_BUDGET


def test_results_are_those_of_the_pipeline(results, questions, source, tmp_path):
    mixed = next(one for one in results.results if one.name == "mixed")
    bundle = export_model("tiny", tmp_path / "b", schedule=mixed.schedule, progress=False)
    answers = Pipeline.open(bundle, threads=1).generate_batch(
        [Request(q.prompt, list(q.images), max_new_tokens=8) for q in questions]
    )
    right = [a.text.strip() == q.reference for a, q in zip(answers, questions, strict=True)]
    assert mixed.overall.accuracy.value == pytest.approx(np.mean(right))
    assert sum(kind.questions for kind in mixed.kinds.values()) == len(questions)


def test_answers_are_greedy_whatever_the_checkpoint_says(bundles, questions, tmp_path, monkeypatch):
    seen = requests_asked(monkeypatch)
    bundle = make_speechless(bundles.copy(tmp_path / "b", "tiny", schedule="0:44:divprune,6:19"))
    own = Source.open(bundle.path)
    found = run(own, questions[:2], [as_exported(own)], tmp_path / "out")
    assert len(found.results) == 2 and len(seen) >= 4
    assert all({"seed"} == set(request.to_json()) for request in seen)  # for random points


def test_the_unpruned_model_is_what_everything_is_compared_with(results):
    whole, mixed, other, without = results.results
    assert (whole.name, whole.share, whole.agreement.value) == ("unpruned", 1.0, 1.0)
    assert whole.overall.kl == pytest.approx(0, abs=1e-4)
    assert whole.overall.retention.value == 1.0
    assert mixed.behind is None and other.behind is not None  # the first of its budget
    assert (mixed.against, other.against, without.against) == (None, "mixed", None)
    assert other.behind.value == pytest.approx(
        mixed.overall.retention.value - other.overall.retention.value
    )
    assert 0.1 < mixed.share < 0.112 and mixed.overall.kl < without.overall.kl
    assert without.overall.accuracy.value < 0.7  # it cannot see


def test_a_reference_that_does_not_fit_is_refused_before_anything_is_asked(
    source, questions, tmp_path, monkeypatch
):
    seen = requests_asked(monkeypatch)
    wrong = [*questions[:-1], replace(questions[-1], reference=["yes"] * 9)]
    unlabelled = [replace(q, reference=None) for q in wrong[:-1]]
    with pytest.raises(TrioError, match=f"question {wrong[-1].id}: textvqa takes 10"):
        run(source, [*unlabelled, wrong[-1]], [], tmp_path / "out", scorer="textvqa")
    assert seen == [] and not (tmp_path / "out").exists()


def test_schedules_are_compared_with_the_first_within_half_a_point_of_budget(
    source, questions, out
):
    texts = ["a=0:44:divprune,6:19", "b=0:0.111:divprune", "c=0:0.222:divprune"]
    found = run(source, questions, [named(source, text) for text in texts], out)
    budgets = [one.budget for one in found.results[1:]]
    assert budgets[0] != budgets[1] and budgets == pytest.approx([0.111, 0.111, 0.222], abs=0.004)
    assert [one.against for one in found.results] == [None, None, "a", None]
    assert found.results[2].behind.value == pytest.approx(
        found.results[1].overall.retention.value - found.results[2].overall.retention.value
    )


def test_of_a_first_with_near_budgets_the_nearest_is_compared(source, questions, out):
    texts = ["a=0:8:dart", "b=0:9:divprune", "a=0:9:dart", "b=0:8:divprune"]
    found = run(source, questions, [named(source, text) for text in texts], out)
    one, wide, other, narrow = found.results[1:]
    assert one.budget != other.budget and abs(one.budget - other.budget) < SAME_BUDGET
    assert one.behind is None and other.behind is None
    retained = [each.overall.retention.value for each in (one, other)]
    assert retained[0] != retained[1]  # else it could not be seen which was compared
    for compared, mine in ((narrow, retained[0]), (wide, retained[1])):
        assert compared.behind.value == pytest.approx(mine - compared.overall.retention.value)


def test_a_bundle_is_measured_at_any_budget(tmp_path, questions):
    bundle = export_model("tiny", tmp_path / "b", schedule="0:0.2:divprune,6:0.1", progress=False)
    opened = Source.open(bundle.path)
    configurations, _ = grid(opened, [], [0.111, 0.5])
    found = run(opened, questions, configurations, tmp_path / "out")
    assert [one.budget for one in found.results] == [1.0, 0.111, 0.5]
    assert not (tmp_path / "out" / "bundles").exists()
    pipeline = Pipeline.open(bundle, threads=1)
    for one in found.results:
        assert one.schedule is not None
        answer = pipeline.generate(Request("?", list(questions[0].images), budget=one.budget))
        kept = one.schedule.resolve(answer.visual_tokens)
        assert list(kept) == answer.keep_counts[: len(kept)]
        assert one.share == one.schedule.average(256, 16) / 256
        assert f"| {one.schedule} |" in found.to_text()
    assert found.results[1].schedule.layers == (0, 6)
    reached, refused = grid(opened, [], [0.5, 2.0])
    assert [one.budget for one in reached] == [0.5]
    assert [sentence.split(" is left out")[0] for sentence in refused] == ["200.0%"]
    recipe = export_model("tiny", tmp_path / "r", graphs_only=True, progress=False)
    (known,), _ = grid(Source.open(recipe.path), [], [0.222])
    assert used(Source.open(recipe.path), known) == load_recipe("tiny").schedules["0.222"]
    with pytest.raises(TrioError, match="a bundle has its methods"):
        grid(opened, ["trio"], [0.111])
    with pytest.raises(TrioError, match="a bundle has its schedule"):
        named(opened, "0:0.1")


def test_a_bundles_own_schedule_is_asked_as_it_was_exported(tmp_path, questions):
    bundle = export_model("tiny", tmp_path / "b", schedule="0:0.2:divprune,8:0.1", progress=False)
    opened = Source.open(bundle.path)
    found = run(opened, questions, [as_exported(opened)], tmp_path / "out").results[1]
    answers = Pipeline.open(bundle, threads=1).generate_batch(
        [Request(q.prompt, list(q.images), max_new_tokens=8) for q in questions]
    )
    right = [a.text.strip() == q.reference for a, q in zip(answers, questions, strict=True)]
    assert found.schedule == bundle.schedule
    assert found.overall.accuracy.value == pytest.approx(np.mean(right))


def test_random_selections_are_averaged_over_seeds(source, questions, tmp_path):
    configurations, _ = grid(source, ["random@0"], [0.1], seeds=(0, 1))
    found = run(source, questions, configurations, tmp_path)
    files = sorted((tmp_path / "answers").iterdir())
    assert len(files) == 3  # unpruned, and two seeds
    texts = [[e.text for e in AnswerLog(f, AnswerLine).entries] for f in files if "-1" in f.name]
    assert len(texts) == 1 and found.results[1].overall.accuracy.value < 1


def test_a_bundle_or_model_and_a_file_or_scenes_are_enough(tmp_path, source):
    bundle = export_model("tiny", tmp_path / "b", schedule="0:0.2:divprune,8:0.1", progress=False)
    found = evaluate(bundle, 1, tmp_path / "out", budgets="own,0.5", threads=1, progress=False)
    assert [one.schedule for one in found.results][1] == bundle.schedule
    assert (found.questions, found.data) == (16, "busy scenes 10000 to 10000 of the test seeds")
    same = Comparison(budgets=["own", 0.5])
    again = evaluate(
        str(bundle.path), 1, str(tmp_path / "again"), ONE_THREAD, comparison=same, progress=False
    )
    assert [one.overall for one in again.results] == [one.overall for one in found.results]

    (question,) = scene_questions(1, each=1)
    question.images[0].save(tmp_path / "x.png")
    line = {"question_id": 7, "image": "x.png", "text": question.prompt, "answer": "a unicorn"}
    (tmp_path / "q.jsonl").write_text(json.dumps(line))
    asked = {"schedules": "mixed=0:44:divprune,6:19", "threads": 1, "progress": False}
    found = evaluate("tiny", tmp_path / "q.jsonl", tmp_path / "file", max_new_tokens=4, **asked)
    assert [one.name for one in found.results] == ["unpruned", "mixed"]
    assert (found.questions, found.data) == (1, "q.jsonl")


def test_configurations_that_are_not_possible_are_said(tmp_path):
    asked = {"methods": "dart@0,fastv@2", "budgets": 0.111, "threads": 1, "progress": False}
    with pytest.warns(UserWarning, match="fastv@2 at 11.1% is left out"):
        found = evaluate("tiny", 1, tmp_path, **asked)
    assert [one.name for one in found.results] == ["unpruned", "dart@0"]
    with pytest.raises(TypeError, match="budget"):
        evaluate("tiny", 1, tmp_path, budget=0.1)
