"""Questions on the page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.bundles import make_speechless
from tests.support.pictures import make_picture
from trio_deploy import Pipeline, TrioError
from trio_deploy.report.examples import SCENES, Asked, answers, asked_about, default_questions


def test_questions_and_pictures_go_together():
    a, b = Path("a.png"), Path("b.png")
    assert [(q.images, q.prompt) for q in asked_about([a, b], ["x"])] == [((a,), "x"), ((b,), "x")]
    assert [q.prompt for q in asked_about([a], ["x", "y"])] == ["x", "y"]
    assert asked_about([], []) == []
    for images, prompts in (([a], []), ([], ["x"]), ([a, b, a], ["x", "y"])):
        with pytest.raises(TrioError, match="do not go together"):
            asked_about(images, prompts)


def test_answers_on_the_page_are_greedy_whatever_the_checkpoint_says(
    bundles, llava_checkpoint, tmp_path
):
    bundle = make_speechless(bundles.copy(tmp_path / "b", llava_checkpoint, schedule="1:0.5"))
    shown = answers(Pipeline.open(bundle, threads=1), [Asked("what ?", (make_picture(),))])
    assert [each["prompt"] for each in shown["examples"]] == ["what ?"]


def test_the_default_questions_are_about_the_test_split():
    from trio_deploy.evaluation.scenes import TEST_SEEDS

    asked = default_questions()
    assert len(asked) == 4 and asked[0].images == asked[1].images
    assert asked[0].prompt != asked[1].prompt and all(q.truth for q in asked)
    assert all(seed in TEST_SEEDS for seed, _, _ in SCENES)
