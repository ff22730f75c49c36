"""The README's picture shows what its text says: the question moves the kept tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.bundles import Bundles
from trio_deploy import Pipeline, Request, Schedule
from trio_deploy.pipeline.draw import draw_questions

ROOT = Path(__file__).parents[2]


@pytest.fixture
def figures(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import readme_figures

    return readme_figures


@pytest.fixture
def hero(figures, bundles: Bundles) -> Pipeline:
    return Pipeline.open(bundles.path("tiny", schedule=figures.HERO), threads=1)


def test_questions_share_all_tokens_where_none_is_read_and_fewer_where_one_is(
    figures, hero: Pipeline, bundles: Bundles
) -> None:
    blind = bundles.path("tiny", schedule=Schedule.parse("0:0.13:divprune"))
    pairs, shared = figures.shared_tokens(Pipeline.open(blind, threads=1), 2)
    assert pairs == 2 * 16 * 15 // 2 and shared == 1
    _, read = figures.shared_tokens(hero, 2)
    assert 0 < read < 0.8


def test_the_picture_has_a_panel_per_question_with_its_own_tokens(figures, hero: Pipeline) -> None:
    image = ROOT / "examples" / "scene.png"
    answers = [hero.generate(Request(text, image)) for text in figures.QUESTIONS]
    pixels = np.asarray(draw_questions(figures.QUESTIONS, answers), np.float32).mean(axis=2)
    left, gap, side = 8, 8, 336
    panels = [pixels[8 : 8 + side, left + i * (side + gap) :][:, :side] for i in range(3)]
    lit = [panel > 60 for panel in panels]
    assert lit[0].mean() > 0.8 > 0.1 > lit[1].mean() > 0.01
    assert (lit[1] != lit[2]).any(), "both questions light the same patches"
