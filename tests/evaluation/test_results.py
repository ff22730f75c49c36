"""Results: scored, written, read and drawn."""

import json

import pytest

from tests.support.damage import with_value
from tests.support.evaluation import run
from trio_deploy import (
    TrioError,
)
from trio_deploy.evaluation.ask import Answer, Measured
from trio_deploy.evaluation.configurations import (
    Configuration,
    named,
    unpruned,
)
from trio_deploy.evaluation.questions import Question
from trio_deploy.evaluation.results import Results, collect
from trio_deploy.evaluation.scorers import pope
from trio_deploy.report.charts import retention_chart


def test_results_are_written_read_and_drawn(results, out, tmp_path):
    assert Results.load(out / "results.json").model == "tiny"
    results.save(tmp_path)
    assert Results.load(tmp_path / "results.json") == results
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| mixed | 0:44:divprune, 6:19 |" in text and "| plate |" in text.replace(" | ", " | ")
    assert retention_chart(results).startswith("<svg")
    (tmp_path / "results.json").write_text('{"schema": 99, "results": []}')
    with pytest.raises(TrioError, match="another version"):
        Results.load(tmp_path / "results.json")


def test_questions_without_answers_are_scored_by_agreement(source, questions, out, tmp_path):
    unlabelled = [type(q)(**{**q.__dict__, "reference": None}) for q in questions]
    found = run(source, unlabelled, [named(source, "mixed=0:44:divprune,6:19")], out)
    assert found.results[1].overall.accuracy is None and found.results[1].behind is None
    assert 0.5 < found.results[1].agreement.value <= 1
    assert "nan" not in retention_chart(found)
    assert "Agreement by kind" in found.to_text()


def test_questions_that_have_an_answer_are_scored_and_counted(source, questions, out):
    some = [
        type(q)(**{**q.__dict__, "reference": None}) if n % 3 == 0 else q
        for n, q in enumerate(questions)
    ]
    others = [named(source, "mixed=0:44:divprune,6:19"), named(source, "b=0:40:divprune,6:20")]
    found = run(source, some, others, out)
    known = [q for q in some if q.reference is not None]
    whole = run(source, known, others, out)
    assert found.scored == len(known) < found.questions
    for one, other in zip(found.results, whole.results, strict=True):
        assert one.overall.accuracy == other.overall.accuracy
        assert one.overall.retention == other.overall.retention
        assert (one.behind is None) == (other.behind is None)
        if one.behind is not None:
            assert one.behind.value == other.behind.value
    assert f"{len(known)} of them with an answer and scored by `exact`" in found.to_text()


def test_results_of_the_first_schema_lose_their_intervals(results, tmp_path):
    raw = {**results.to_json(), "schema": 1}
    del raw["scored"], raw["bundle"]
    for one in raw["results"]:
        del one["against"]
        one["extra"] = {"f1": 0.5}
        one["agreement"].update(low=1.0, high=1.0)
    (tmp_path / "old.json").write_text(json.dumps(raw))
    old = Results.load(tmp_path / "old.json")
    assert old.scored == old.questions and old.results[0].extra == {"all": {"f1": 0.5}}
    assert not any(one.agreement.known for one in old.results)
    assert [one.agreement.value for one in old.results] == [
        one.agreement.value for one in results.results
    ]


def test_pope_is_reported_by_category_and_over_all_seeds(source, tmp_path):
    asked_of = [("random", "yes"), ("random", "no"), ("popular", "yes"), ("popular", "no")]
    questions = [
        Question(str(n), "?", (), f"p{n}", kind, label) for n, (kind, label) in enumerate(asked_of)
    ]

    def measured(configuration: Configuration, *runs: str) -> Measured:
        return Measured(
            configuration,
            [[Answer(text, pope(text, q.reference), 0.0, True)
              for text, q in zip(run.split(), questions, strict=True)] for run in runs],
            0.0,
        )  # fmt: skip

    found = collect(
        source,
        questions,
        [
            measured(unpruned(source), "yes no yes no"),
            measured(named(source, "0:0.2:random"), "yes yes no no", "yes no no no"),
        ],
        data="",
        scorer="pope",
        machine={},
    )
    perfect, random = (one.extra for one in found.results)
    assert list(perfect) == ["popular", "random", "mean"] and perfect["mean"]["f1"] == 1
    assert random["random"]["f1"] == pytest.approx((2 / 3 + 1) / 2)
    assert random["random"]["yes_ratio"] == pytest.approx((1 + 0.5) / 2)
    assert random["popular"]["f1"] == 0
    assert random["mean"]["f1"] == pytest.approx((2 / 3 + 1) / 4)
    assert "| 0:0.2:random | 20.0% | mean |" in found.to_text().replace("19.9%", "20.0%")


def test_a_model_that_is_never_right_is_scored_by_agreement(source, questions, out, tmp_path):
    wrong = [type(q)(**{**q.__dict__, "reference": "a unicorn"}) for q in questions]
    two = [named(source, "a=0:44:divprune,6:19"), named(source, "b=0:44:divprune,6:19")]
    found = run(source, wrong, two, out)
    for one in found.results:
        assert one.overall.accuracy.value == 0
        assert one.overall.retention is None and one.behind is None
    assert "nan" not in retention_chart(found)
    assert "nan" not in found.to_text().lower()


def test_what_is_no_result_is_named_with_what_to_pass(tmp_path):
    with pytest.raises(TrioError, match=r"no results .* at .*gone\.json: pass the results\.json"):
        Results.load(tmp_path / "gone.json")
    (tmp_path / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(TrioError, match=r"manifest\.json holds no .*\(it is something else\)"):
        Results.load(tmp_path / "manifest.json")


@pytest.mark.parametrize(
    ("keys", "value"),
    [
        (["questions"], "many"),
        (["machine"], None),
        (["results", 0, "kl"], "x"),
        (["results", 1, "schedule", 0, "layer"], "first"),
        (["results", 1, "kinds"], {}),
        (["results", 1, "agreement"], 0.5),
        (["results", 1, "ran_as"], {"runtime": "onnxruntime"}),
        (["results", 1, "surprise"], 1),
        (["results"], [7]),
    ],
)
def test_damaged_results_are_one_error(results, tmp_path, keys, value):
    file = tmp_path / "results.json"
    file.write_text(json.dumps(with_value(results.to_json(), keys, value)))
    with pytest.raises(TrioError, match=r"results\.json holds no results of trio eval .*measure"):
        Results.load(file)
