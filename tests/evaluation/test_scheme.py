"""What quantised weights cost: kept tokens and answers beside those of the float weights."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from trio_deploy import Pipeline, Request, TrioError, evaluate, export_model
from trio_deploy.cli.main import main
from trio_deploy.evaluation import scheme as schemes
from trio_deploy.evaluation.ask import Answer, Measured
from trio_deploy.evaluation.configurations import Configuration
from trio_deploy.evaluation.questions import Question, scene_set
from trio_deploy.evaluation.results import Results
from trio_deploy.evaluation.scheme import BARS, SchemeResults, compare_schemes, table_of
from trio_deploy.schedule.schedule import Schedule

ASKED = {"threads": 1, "progress": False}


def measured(name: str, *answers: tuple[str, float, list[list[int]]]) -> Measured:
    """Answers of a configuration: their text, score, and tokens kept at each point."""
    what = Configuration(name, Schedule(), 0.5)
    return Measured(what, [[Answer(t, s, 0.0, True, kept) for t, s, kept in answers]], 0.0)


def compared(
    mine: list[Measured], floats: list[Measured], scheme: str = "int4", answered: bool = True
) -> SchemeResults:
    count = len(mine[0].answers[0])
    questions = [
        Question(str(n), "?", (), f"p{n}", "kind", "red" if answered else None)
        for n in range(count)
    ]
    shares = [0.5] * len(mine)
    return compare_schemes(mine, floats, shares, questions, scheme=scheme, against="floats")


def test_kept_tokens_and_answers_are_compared_question_by_question():
    mine = measured("a", ("red", 1, [[0, 1, 2, 3], [0, 9]]), ("blue", 0, [[4, 5, 6, 7], [4, 5]]))
    floats = measured("a", ("red", 1, [[0, 1, 2, 3], [0, 1]]), ("red", 1, [[0, 1, 6, 7], [4, 5]]))
    (row,) = compared([mine], [floats]).rows
    assert [one.value for one in row.overlap] == [0.75, 0.75]
    assert row.agreement.value == 0.5
    assert (row.accuracy.value, row.gained.value) == (1.0, -0.5)
    (row,) = compared([mine], [floats], answered=False).rows
    assert row.accuracy is None and row.gained is None


def test_questions_without_a_picture_count_for_answers_alone():
    mine = measured("a", ("red", 1, [[0, 1]]), ("red", 1, [[]]))
    floats = measured("a", ("red", 1, [[0, 1]]), ("red", 1, [[]]))
    (row,) = compared([mine], [floats]).rows
    assert row.overlap[0].value == 1 and row.agreement.value == 1


def test_results_of_questions_without_pictures_are_read_as_they_were_written(tmp_path):
    mine, floats = (measured("a", ("red", 1, [[], []]), ("red", 1, [[], []])) for _ in range(2))
    found = compared([mine], [floats])
    assert found.rows[0].overlap == (None, None) and "| –, – |" in "\n".join(table_of(found))
    results = Results("m", "d", "exact", {}, 2, 0, [], 2, scheme=found)
    results.save(tmp_path)
    assert "NaN" not in (tmp_path / "results.json").read_text()
    assert Results.load(tmp_path / "results.json") == results


@pytest.mark.parametrize(
    ("scheme", "kept", "text", "score", "missed"),
    [
        ("int4", [0, 1, 2, 3], "red", 1, ""),
        ("int4", [0, 1, 2, 9], "red", 1, "75.0% of the kept tokens agree at point 1, below 95%"),
        ("int4", [0, 1, 2, 3], "rot", 1, "0.0% of the answers, below 98%"),
        ("int4", [0, 1, 2, 3], "red", 0, "100.0 points of accuracy lost, above 1"),
        ("int8", [0, 1, 2, 3], "red", 0, ""),  # it has no bar for accuracy
        ("int8", [0, 1, 2, 9], "red", 1, "75.0% of the kept tokens agree at point 1, below 98%"),
    ],
)
def test_a_scheme_is_judged_by_its_bars(scheme, kept, text, score, missed, monkeypatch):
    mine = measured("a", *[(text, score, [kept])] * 4)
    floats = measured("a", *[("red", 1, [[0, 1, 2, 3]])] * 4)
    few = compared([mine], [floats], scheme)
    assert not few.judged and few.passed and "640 questions or more" in few.verdict
    monkeypatch.setattr(schemes, "ENOUGH", 4)
    found = compared([mine], [floats], scheme)
    assert found.judged and found.passed == (not missed)
    assert "; ".join(found.rows[0].problems) == missed
    assert ("missed by 1 of 1" if missed else "met by every") in found.verdict
    # A scheme without bars is shown alone.
    other = compared([mine], [floats], "other")
    assert not other.judged and other.passed and "no bars for other" in other.verdict


def test_bars_hold_at_their_ends(monkeypatch):
    monkeypatch.setattr(schemes, "ENOUGH", 1)
    wanted = list(range(100))
    for scheme, bars in BARS.items():
        least = round(100 * bars.overlap)
        for count, passes in ((least, True), (least - 1, False)):
            kept = [*range(count), *range(200, 300 - count)]
            mine, floats = (measured("a", ("red", 1, [each])) for each in (kept, wanted))
            assert compared([mine], [floats], scheme).passed == passes


def test_a_quantised_bundle_is_compared_with_its_float_bundle(bundles, tmp_path):
    mine = bundles.path("tiny", quantize="int8")
    floats = bundles.path("tiny")
    found = evaluate(mine, 1, tmp_path / "out", budgets="own", floats=floats, blind=True, **ASKED)
    assert found.scheme is not None and found.passed and not found.scheme.judged
    assert (found.scheme.scheme, found.scheme.against) == ("int8", "tiny")
    assert [row.name for row in found.scheme.rows] == ["unpruned", found.results[1].name]
    whole, row = found.scheme.rows
    assert whole.overlap == () and len(row.overlap) == 3

    questions = scene_set(1).questions
    asked = [Request(q.prompt, list(q.images), max_new_tokens=8) for q in questions]
    ours, theirs = (Pipeline.open(each, threads=1).generate_batch(asked) for each in (mine, floats))
    for point, estimate in enumerate(row.overlap):
        shares = [
            len(np.intersect1d(a.kept_visual[point], b.kept_visual[point]))
            / len(b.kept_visual[point])
            for a, b in zip(ours, theirs, strict=True)
        ]
        assert estimate.value == pytest.approx(np.mean(shares))
    same = [a.text.strip() == b.text.strip() for a, b in zip(ours, theirs, strict=True)]
    assert row.agreement.value == np.mean(same)

    text = (tmp_path / "out" / "results.md").read_text()
    assert "Is the scheme good enough?" in text and "`trio check` answers" in text
    assert "weights in int8" in text and "The floats ran as" in text
    assert Results.load(tmp_path / "out" / "results.json") == found


def test_a_model_that_is_quantised_at_export_is_compared_with_itself(tmp_path, monkeypatch):
    asked = {**ASKED, "schedules": "mixed=0:44:divprune,6:19"}
    plain = evaluate("tiny", 1, tmp_path / "out", **asked)
    assert plain.scheme is None
    answers = {file: file.read_bytes() for file in (tmp_path / "out" / "answers").iterdir()}
    found = evaluate("tiny", 1, tmp_path / "out", quantize="int4", **asked)
    assert found.scheme is not None and found.scheme.scheme == "int4"
    assert [row.name for row in found.scheme.rows] == ["unpruned", "mixed"]
    assert found.results[1].ran_as.quantized == "int4"
    assert found.scheme.ran_as == plain.results[1].ran_as
    # The float answers are those of the plain run, with kept tokens beside them.
    assert all(file.read_bytes().startswith(lines) for file, lines in answers.items())
    assert len(list((tmp_path / "out" / "bundles").iterdir())) == 4

    def fail(*_: object) -> None:
        raise AssertionError("it was asked again")

    monkeypatch.setattr(Pipeline, "generate_batch", fail)
    again = evaluate("tiny", 1, tmp_path / "out", quantize="int4", **asked)
    assert again.scheme == found.scheme
    alone = evaluate("tiny", 1, tmp_path / "out", quantize="int4", floats="none", **asked)
    assert alone.scheme is None and alone.results[1].ran_as.quantized == "int4"


def test_a_bundle_is_compared_with_the_model_it_was_exported_from(tmp_path):
    bundle = export_model(
        "tiny", tmp_path / "b", schedule="0:44:divprune,6:19", probe="shifted", quantize="int8",
        progress=False,
    )  # fmt: skip
    found = evaluate(bundle, 1, tmp_path / "out", budgets="own", floats="tiny", **ASKED)
    (float_bundle,) = (
        one
        for folder in (tmp_path / "out" / "bundles").iterdir()
        if (one := json.loads((folder / "manifest.json").read_text()))["schedule"]
    )
    assert (
        float_bundle["probe"] == "shifted" and float_bundle["schedule"] == bundle.manifest.schedule
    )
    assert found.scheme is not None and min(e.value for e in found.scheme.rows[1].overlap) > 0.9


def test_floats_of_another_kind_are_refused_before_anything_is_asked(bundles, tmp_path):
    quantised, floats = bundles.path("tiny", quantize="int8"), bundles.path("tiny")
    other = bundles.path("tiny", schedule="0:0.2:divprune,6:0.1")
    out = tmp_path / "out"
    for model, beside, words, more in (
        (floats, floats, "the weights of tiny are float already", {}),
        (quantised, quantised, "the weights of tiny are in int8", {}),
        (quantised, other, "prunes otherwise at", {}),
        ("tiny", floats, "is a bundle, which has one schedule", {"quantize": "int8"}),
        (floats, None, "has weights in floats: leave --quantize out", {"quantize": "int8"}),
        ("tiny", None, "unknown quantisation 'int3'", {"quantize": "int3"}),
    ):
        with pytest.raises(TrioError, match=words):
            evaluate(model, 1, out, floats=beside, **more, **ASKED)
    assert not out.exists()


def test_the_command_fails_where_a_bar_is_missed(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(schemes, "ENOUGH", 16)
    command = (
        f"eval {bundles.path('tiny', quantize='int4')} --out {tmp_path} --scenes 1 --threads 1 "
        f"--no-plot --budgets own --float {bundles.path('tiny')}"
    ).split()
    monkeypatch.setitem(BARS, "int4", replace(BARS["int4"], overlap=0.5, agreement=0.0, lost=1.0))
    assert main(command) == 0
    assert "met by every configuration" in capsys.readouterr().out
    monkeypatch.setitem(BARS, "int4", replace(BARS["int4"], overlap=1.1))
    assert main(command) == 1
    captured = capsys.readouterr()
    assert "below 110%" in captured.out and "missed by 1 of 2 configurations" in captured.out
    assert main([*command, "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["scheme"]["passed"] is False
