"""An evaluation: every configuration asked once, resumed, compared, written down."""

import json
from pathlib import Path

import numpy as np
import pytest

from trio_deploy.cli import main
from trio_deploy.errors import TrioError
from trio_deploy.evaluate import evaluate
from trio_deploy.evaluate.configurations import (
    Bundles,
    Configuration,
    RuntimeOptions,
    Source,
    blind,
    grid,
    named,
    used,
)
from trio_deploy.evaluate.plot import draw
from trio_deploy.evaluate.questions import scene_questions
from trio_deploy.evaluate.results import Results
from trio_deploy.evaluate.run import AnswerLog
from trio_deploy.export import export
from trio_deploy.recipe import load_recipe
from trio_deploy.runtime.pipeline import Request, TrioPipeline
from trio_deploy.schedule import Schedule

ONE_THREAD = RuntimeOptions(threads=1)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source.open("tiny")


@pytest.fixture(scope="module")
def questions():
    return scene_questions(2, split="tuning", each=6)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="module")
def results(source, questions, out) -> Results:
    mixed = named(source, "mixed=0:44:divprune,6:19")
    rivals, _ = grid(source, ["divprune@0"], [mixed.budget])
    return run(source, questions, [mixed, *rivals, blind(source)], out)


def run(source, questions, configurations, out, **more) -> Results:
    settings = {"options": ONE_THREAD, "max_new_tokens": 8, "data": "scenes", "progress": False}
    return evaluate(source, questions, configurations, out, **{**settings, **more})


def asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that reach a pipeline from now on."""
    seen: list[Request] = []
    generate = TrioPipeline.generate_batch

    def recording(self, requests):
        seen.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(TrioPipeline, "generate_batch", recording)
    return seen


def test_results_are_those_of_the_pipeline(results, questions, source, tmp_path):
    mixed = next(one for one in results.results if one.name == "mixed")
    bundle = export("tiny", tmp_path / "b", schedule=mixed.schedule, progress=False)
    answers = TrioPipeline.from_bundle(bundle, threads=1).generate_batch(
        [Request(q.prompt, list(q.images), max_new_tokens=8) for q in questions]
    )
    right = [a.text.strip() == q.reference for a, q in zip(answers, questions, strict=True)]
    assert mixed.overall.accuracy.value == pytest.approx(np.mean(right))
    assert sum(kind.questions for kind in mixed.kinds.values()) == len(questions)


def test_the_unpruned_model_is_what_everything_is_compared_with(results):
    whole, mixed, rival, without = results.results
    assert (whole.name, whole.share, whole.agreement.value) == ("unpruned", 1.0, 1.0)
    assert whole.overall.kl == pytest.approx(0, abs=1e-4)
    assert whole.overall.retention.value == 1.0
    assert mixed.behind is None and rival.behind is not None  # the first of its budget
    assert rival.behind.value == pytest.approx(
        mixed.overall.retention.value - rival.overall.retention.value
    )
    assert 0.1 < mixed.share < 0.112 and mixed.overall.kl < without.overall.kl
    assert without.overall.accuracy.value < 0.7  # it cannot see


def test_a_rerun_asks_nothing_and_finds_the_same(results, source, questions, out, monkeypatch):
    seen = asked(monkeypatch)
    configurations = [named(source, "mixed=0:44:divprune,6:19")]
    again = run(source, questions, configurations, out)
    assert seen == [] and again.results[1] == results.results[1]


def test_more_questions_are_added_to_what_was_asked(results, source, questions, out, monkeypatch):
    seen = asked(monkeypatch)
    more = [*questions, *scene_questions(1, split="tuning", each=6, first=10_002)]
    run(source, more, [named(source, "mixed=0:44:divprune,6:19")], out)
    assert len(seen) == 2 * 6  # the new scene's, by the unpruned model and by the mixed one


def test_an_answer_to_another_question_is_not_taken(results, source, questions, out, monkeypatch):
    seen = asked(monkeypatch)
    changed = scene_questions(1, split="tuning", each=6)
    changed[0] = type(changed[0])(**{**changed[0].__dict__, "prompt": "how many stars are there?"})
    run(source, changed, [], out)
    assert [request.prompt for request in seen] == ["how many stars are there?"]


def test_a_line_that_was_cut_short_is_asked_again(tmp_path):
    file = tmp_path / "answers.jsonl"
    file.write_text('{"id": "a"}\n{"id": "b"}\n{"id": ', encoding="utf-8")
    log = AnswerLog(file)
    assert [entry["id"] for entry in log.entries] == ["a", "b"]
    with log:
        log.add({"id": "c"})
    assert [json.loads(line)["id"] for line in file.read_text().splitlines()] == ["a", "b", "c"]


def test_results_are_written_read_and_drawn(results, out, tmp_path):
    assert Results.load(out / "results.json").model == "tiny"
    results.save(tmp_path)
    assert Results.load(tmp_path / "results.json") == results
    text = (tmp_path / "results.md").read_text(encoding="utf-8")
    assert "| mixed | 0:44:divprune, 6:19 |" in text and "| plate |" in text.replace(" | ", " | ")
    draw(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").read_bytes().startswith(b"\x89PNG")
    (tmp_path / "results.json").write_text('{"schema": 99}')
    with pytest.raises(TrioError, match="another version"):
        Results.load(tmp_path / "results.json")


def test_questions_without_answers_are_judged_by_agreement(source, questions, out, tmp_path):
    unlabelled = [type(q)(**{**q.__dict__, "reference": None}) for q in questions]
    found = run(source, unlabelled, [named(source, "mixed=0:44:divprune,6:19")], out)
    assert found.results[1].overall.accuracy is None and found.results[1].behind is None
    assert 0.5 < found.results[1].agreement.value <= 1
    draw(found, tmp_path / "plot.png")
    assert "Agreement a kind" in found.to_text()


def test_a_model_that_is_never_right_is_judged_by_agreement(source, questions, out, tmp_path):
    wrong = [type(q)(**{**q.__dict__, "reference": "a unicorn"}) for q in questions]
    two = [named(source, "a=0:44:divprune,6:19"), named(source, "b=0:44:divprune,6:19")]
    found = run(source, wrong, two, out)
    for one in found.results:
        assert one.overall.accuracy.value == 0
        assert one.overall.retention is None and one.behind is None
    draw(found, tmp_path / "plot.png")
    assert "nan" not in found.to_text().lower()


def test_a_bundle_is_measured_at_any_budget(tmp_path, questions):
    bundle = export("tiny", tmp_path / "b", schedule="0:0.2:divprune,6:0.1", progress=False)
    opened = Source.open(bundle.path)
    configurations, _ = grid(opened, [], [0.111, 0.5])
    found = run(opened, questions, configurations, tmp_path / "out")
    assert [one.budget for one in found.results] == [1.0, 0.111, 0.5]
    assert not (tmp_path / "out" / "bundles").exists()
    pipeline = TrioPipeline.from_bundle(bundle, threads=1)
    for one in found.results:
        assert one.schedule is not None
        answer = pipeline.generate(list(questions[0].images), "?", budget=one.budget)
        kept = one.schedule.resolve(answer.visual_tokens)
        assert list(kept) == answer.keep_counts[: len(kept)]
        assert one.share == one.schedule.average(256, 16) / 256
        assert f"| {one.schedule} |" in found.to_text()
    assert found.results[1].schedule.layers == (0, 6)
    reached, refused = grid(opened, [], [0.5, 2.0])
    assert [one.budget for one in reached] == [0.5]
    assert [sentence.split(" is left out")[0] for sentence in refused] == ["200.0%"]
    recipe = export("tiny", tmp_path / "r", graphs_only=True, progress=False)
    (known,), _ = grid(Source.open(recipe.path), [], [0.222])
    assert used(Source.open(recipe.path), known) == load_recipe("tiny").schedules["0.222"]
    with pytest.raises(TrioError, match="a bundle has its methods"):
        grid(opened, ["trio"], [0.111])
    with pytest.raises(TrioError, match="a bundle has its schedule"):
        named(opened, "0:0.1")


def test_methods_go_into_schedules(source):
    found, refused = grid(
        source,
        ["recipe", "fastv", "dart@0", "fastv@2", "dart@recipe", "random@1+4"],
        [0.111],
        seeds=(0, 1, 2),
    )
    by_name = {one.name: one for one in found}
    assert by_name["recipe"].schedule == source.recipe_schedules["0.111"]
    assert set(by_name["fastv"].schedule.methods) == {"fastv"}
    assert by_name["dart@recipe"].schedule == by_name["recipe"].schedule.with_method("dart")
    assert by_name["dart@0"].schedule == Schedule.parse("0:0.111:dart")
    assert by_name["random@1+4"].schedule.layers == (1, 4)
    assert by_name["random@1+4"].seeds == (0, 1, 2) and by_name["fastv"].seeds == (0,)
    assert "fastv@2" not in by_name and "fastv@2 at 11.1% is left out" in refused[0]
    options, _ = grid(source, ["trio"], [0.222], thresholds=[0.7, 0.8], probes=["last", "shifted"])
    assert len({one.key for one in options}) == 4 == len({one.name for one in options})
    with pytest.raises(TrioError, match="unknown method 'best'"):
        grid(source, ["best"], [0.111])
    with pytest.raises(TrioError, match="METHOD@LAYER"):
        grid(source, ["trio@x"], [0.111])


def test_bundles_share_one_copy_of_the_weights(source, tmp_path):
    bundles = Bundles(source, tmp_path, ONE_THREAD)
    paths = [
        bundles.bundle(Configuration(text, Schedule.parse(text), 0.1)).path
        for text in ("0:0.2", "1:0.1", "0:0.2")
    ]
    assert paths[0] == paths[2] != paths[1]
    nodes = [{file.stat().st_ino for file in (p / "weights").iterdir()} for p in paths[:2]]
    assert nodes[0] == nodes[1]


def test_random_selections_are_averaged_over_seeds(source, questions, tmp_path):
    configurations, _ = grid(source, ["random@0"], [0.1], seeds=(0, 1))
    found = run(source, questions, configurations, tmp_path)
    files = sorted((tmp_path / "answers").iterdir())
    assert len(files) == 3  # unpruned, and two seeds
    texts = [[e["text"] for e in AnswerLog(f).entries] for f in files if "-1" in f.name]
    assert len(texts) == 1 and found.results[1].overall.accuracy.value < 1


def test_the_command_evaluates_and_says_what_it_wrote(tmp_path, capsys):
    status = main(
        f"eval tiny --out {tmp_path} --scenes 1 --threads 1 --split tuning --batch 16 --schedule "
        "mixed=0:44:divprune,6:19 --methods fastv@2 --budgets 0.111".split()
    )
    captured = capsys.readouterr()
    assert status == 0 and "| mixed |" in captured.out
    assert "fastv@2 at 11.1% is left out" in captured.err
    assert {"results.json", "results.md", "retention.png"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--images .", "--images belongs to --questions"),
        ("--append x --limit 3 --scorer pope", "--append and --limit and --scorer belong to --que"),
        (
            "--questions q --scenes 3 --split test",
            "--scenes and --split belong to generated scenes",
        ),
        ("--scorer foo", "unknown scorer 'foo'"),
        ("--max-new-tokens 0", "an answer has 1 token or more"),
        ("--seeds 0", "run once or more"),
        ("--scenes 0", "0 scenes hold no question"),
        ("--first 99999", "no scenes 99999 to 100062 of the test split"),
        ("--methods fastv@2 --budgets 0.111", "nothing is left to measure"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_written(
    options, words, tmp_path, capsys
):
    assert main(f"eval tiny --out {tmp_path / 'out'} {options}".split()) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()


def test_what_is_no_result_is_named_with_what_to_pass(tmp_path):
    with pytest.raises(TrioError, match=r"gone\.json .*\(No such file.*\): pass the results\.json"):
        Results.load(tmp_path / "gone.json")
    (tmp_path / "manifest.json").write_text('{"schema": 1}')
    with pytest.raises(TrioError, match=r"manifest\.json .*\(it is something else\)"):
        Results.load(tmp_path / "manifest.json")
