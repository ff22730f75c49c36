"""The search for a schedule: inside the budget, resumable, no worse than where it began."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from tests.support.evaluation import requests_asked
from trio_deploy import Pipeline, Request, RuntimeOptions, Schedule, TrioError, export_model
from trio_deploy.config.recipe import TunedSchedule
from trio_deploy.evaluation.ask import AskOptions
from trio_deploy.evaluation.configurations import Bundles, Source
from trio_deploy.evaluation.questions import scene_questions
from trio_deploy.evaluation.statistics import Estimate
from trio_deploy.evaluation.tune import (
    Candidate,
    Space,
    Tuner,
    coarse,
    level,
    neighbours,
    realise,
    recipe_text,
    tune,
)

ONE_THREAD = AskOptions(RuntimeOptions(threads=1), batch=10, max_new_tokens=8, progress=False)


@pytest.fixture(scope="module")
def source() -> Source:
    return Source.open("tiny")


@pytest.mark.parametrize("budget", [0.111, 0.222, 0.5])
@pytest.mark.parametrize(("layers", "visual"), [(16, 256), (32, 576), (28, 1000)])
def test_candidates_use_the_budget_and_never_exceed_it(budget, layers, visual):
    found = [realise(c, budget, layers, visual) for c in coarse(Space(), budget, layers)]
    schedules = [one.schedule for one in found if one is not None]
    assert len(schedules) >= 20
    for schedule in schedules:
        schedule.validate(layers, visual)
        share = schedule.average(visual, layers) / visual
        assert share <= budget + 1e-9
        assert share > 0.96 * budget, schedule
        kept = (visual, *schedule.resolve(visual))
        assert all(after < before for before, after in pairwise(kept))


def test_a_candidate_that_cannot_reach_the_budget_is_none():
    late = Candidate(((4, 1.0, "trio"),), 0.8, None, None)
    assert realise(late, 0.111, 16, 256) is None
    assert realise(late, 0.5, 16, 256) is not None


@pytest.mark.parametrize("budget", [0.05, 0.075, 0.111])
def test_the_first_candidates_have_tight_last_keeps_and_late_layers(budget):
    found = [realise(c, budget, 16, 256) for c in coarse(Space(), budget, 16)]
    last = {(s.layers[-1], s.resolve(256)[-1]) for c in found if c and (s := c.schedule)}
    assert {keep for layer, keep in last if layer == 8} >= {2, 5}  # of 256: 1 and 2 %
    assert {10, 13} <= {layer for layer, _ in last}
    assert any(keep <= 10 for layer, keep in last if layer >= 13)


def test_a_search_for_one_method_in_the_last_place_stays_there():
    space = Space(methods=("divprune",), last=("fastv",))
    found = coarse(space, 0.111, 16)
    assert {len(one.points) for one in found} == {1, 2, 3}
    found += [near for one in found for near in neighbours(one, space, 16)]
    for one in found:
        *before, last = (method for _, _, method in one.points)
        assert last == "fastv" and set(before) <= {"divprune"}
    grown = neighbours(Candidate(((0, 1.0, "fastv"),), 0.8, None, None), space, 16)
    assert [m for _, _, m in next(c for c in grown if len(c.points) == 2).points] == [
        "divprune",
        "fastv",
    ]
    with pytest.raises(TrioError, match="unknown method"):
        Space(last=("best",))


def test_neighbours_differ_in_one_thing_and_stay_inside_the_space():
    space = Space(methods=("trio", "divprune"), probes=(None, "shifted"))
    candidate = Candidate(((0, 1.0, "divprune"), (6, 0.5, "trio")), 0.8, None, None)
    found = set(neighbours(candidate, space, 16))
    assert Candidate(((0, 1.0, "divprune"), (5, 0.5, "trio")), 0.8, None, None) in found
    assert Candidate(((0, 1.0, "trio"), (6, 0.5, "trio")), 0.8, None, None) in found
    assert Candidate(candidate.points, 0.7, None, None) in found
    assert Candidate(candidate.points, 0.8, "shifted", None) in found
    assert {len(one.points) for one in found} == {2, 3}
    assert {1, 2} >= {len(one.points) for one in neighbours(candidate, Space(points=2), 16)}
    with pytest.raises(TrioError, match="unknown method"):
        Space(methods=("best",))


def test_what_no_point_heeds_makes_no_second_candidate():
    points = ((0, 1.0, "divprune"), (6, 0.5, "divprune"))
    found = [
        realise(Candidate(points, tau, probe, None), 0.111, 16, 256)
        for tau in (0.7, 0.8)
        for probe in (None, "shifted")
    ]
    assert len({one.key for one in found if one}) == 1
    assert found[0] is not None and found[0].threshold is None and found[0].probe is None
    ranked = realise(Candidate(((0, 1.0, "topk-gradient"),), 0.7, "shifted", None), 0.111, 16, 256)
    assert ranked is not None and (ranked.threshold, ranked.probe) == (None, "shifted")
    heeding = realise(Candidate(((0, 1.0, "trio"),), 0.7, "shifted", None), 0.111, 16, 256)
    assert heeding is not None and (heeding.threshold, heeding.probe) == (0.7, "shifted")


def test_level_with_the_best_is_what_the_interval_cannot_tell_apart():
    assert level(Estimate(0.01, -0.001, 0.02)) and level(Estimate(0.01))
    assert not level(Estimate(0.01, 0.001, 0.02))


@pytest.fixture(scope="module")
def asked() -> Iterator[list[Request]]:
    """What this file's pipelines are asked."""
    with pytest.MonkeyPatch.context() as patch:
        yield requests_asked(patch)


@pytest.fixture(scope="module")
def searched(source, asked, tmp_path_factory: pytest.TempPathFactory):
    out = tmp_path_factory.mktemp("tuning")
    return out, search(source, out)


def search(source: Source, out: Path):
    return tune(
        source,
        scene_questions(2, split="tuning", each=5),
        0.111,
        out,
        ONE_THREAD,
        space=Space(points=2),
        limit=2,
        start=[TunedSchedule(Schedule.parse("0:0.17:divprune,6:0.07"))],
    )


def test_the_best_schedule_is_in_recipe_form_and_can_be_exported(searched, source, tmp_path):
    out, tuned = searched
    assert [one.loss for one in tuned.ranking] == sorted(one.loss for one in tuned.ranking)
    assert all(one.asked == 10 for one in tuned.ranking) and tuned.tried > 3
    written = yaml.safe_load((out / "schedule.yaml").read_text(encoding="utf-8"))
    schedule = Schedule.from_json(written["schedules"]["0.111"])
    assert schedule == tuned.best.schedule
    assert written.get("threshold") == tuned.best.threshold
    assert schedule.average(source.visual, source.layers) <= 0.111 * source.visual
    export_model("tiny", tmp_path / "b", schedule=schedule, progress=False)


def test_answers_to_tune_by_are_greedy_whatever_the_checkpoint_says(searched, asked):
    chosen = [request for request in asked if not request.forced]
    assert chosen and not any(request.bundle_sampling for request in chosen)
    assert all(request.to_json() == {} for request in chosen)


def test_the_result_says_what_was_asked_of_how_many_and_of_which_questions(searched):
    _, tuned = searched
    assert tuned.rounds == [(tuned.tried, 10)]
    assert f"{tuned.tried} schedules were asked all 10 questions" in tuned.text
    assert "on the questions that it was chosen by" in " ".join(tuned.text.split("\n# "))
    assert "too few pictures to tell the finalists apart" in tuned.text
    assert not tuned.loss.known and tuned.behind[0].value == 0


def test_finalists_that_are_level_with_the_best_are_named(searched, source):
    _, tuned = searched
    losses = tuned.ranking[1:]
    behind = [Estimate(0.0, 0.0, 0.0), Estimate(0.0, -0.1, 0.1)]
    behind += [Estimate(0.2, 0.1, 0.3)] * (len(tuned.ranking) - 2)
    said = replace(tuned, behind=behind, loss=Estimate(0.1, 0.05, 0.2), rounds=[(9, 5), (4, 10)])
    assert said.level == losses[:1]
    text = recipe_text(said)
    assert f"1 of the {len(losses)} other finalists.\n#   {losses[0].configuration.name}" in text
    assert "# trio tune: 9 schedules were asked 5 questions or more, 4 of them all 10." in text
    assert yaml.safe_load(text)["schedules"]


def test_losses_of_another_model_target_prompt_or_picture_are_not_taken(
    searched, source, monkeypatch
):
    out, tuned = searched
    questions = scene_questions(2, split="tuning", each=5)

    class Asked(Exception):
        pass

    def asking(*_):
        raise Asked

    monkeypatch.setattr(Bundles, "pipeline", asking)

    def taken(source=source, options=ONE_THREAD, questions=questions) -> bool:
        try:
            tuner = Tuner(source, questions, out, options)
            tuner.losses(tuned.best)
        except (Asked, KeyError):
            return False
        return True

    assert taken()
    assert not taken(replace(source, fingerprint="another"))
    assert not taken(options=replace(ONE_THREAD, dtype="float16"))
    assert not taken(options=replace(ONE_THREAD, runtime=RuntimeOptions("openvino", threads=1)))
    assert not taken(questions=[replace(questions[0], prompt="?"), *questions[1:]])
    other = (scene_questions(1, split="tuning", first=10_005)[0].images[0],)
    assert not taken(questions=[replace(questions[0], images=other), *questions[1:]])


def test_a_search_goes_on_where_it_stopped(searched, source, monkeypatch):
    out, tuned = searched

    def refuse(*_):
        raise AssertionError("it was asked before")

    monkeypatch.setattr(Pipeline, "generate_batch", refuse)
    assert search(source, out).text == tuned.text


def test_files_without_how_the_engines_ran_are_read_and_asked_again(searched, source, tmp_path):
    out, tuned = searched
    older = shutil.copytree(out, tmp_path / "older")
    for file in older.glob("*.jsonl"):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
        assert all(line.pop("ran") for line in lines)
        file.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    tuner = Tuner(source, scene_questions(2, split="tuning", each=5), older, ONE_THREAD)
    assert tuner.ran_as == tuned.ran_as
    with pytest.raises(KeyError):
        tuner.losses(tuned.best)


def test_the_loss_is_the_chance_of_another_answer(source, searched):
    out, tuned = searched
    questions = scene_questions(2, split="tuning", each=5)
    tuner = Tuner(source, questions, out, ONE_THREAD)
    losses = tuner.losses(tuned.best)
    assert ((losses >= 0) & (losses <= 1)).all()
    assert losses.mean() == pytest.approx(tuned.ranking[0].loss)
