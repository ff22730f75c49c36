"""A small evaluation of the tiny model, made once for all files."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.evaluation import run
from trio_deploy.evaluation.configurations import Source, blind, grid, named
from trio_deploy.evaluation.questions import scene_questions
from trio_deploy.evaluation.results import Results


@pytest.fixture(scope="session")
def source() -> Source:
    return Source.open("tiny")


@pytest.fixture(scope="session")
def questions():
    return scene_questions(2, split="tuning", each=6)


@pytest.fixture(scope="session")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("evaluation")


@pytest.fixture(scope="session")
def results(source, questions, out) -> Results:
    mixed = named(source, "mixed=0:44:divprune,6:19")
    others, _ = grid(source, ["divprune@0"], [mixed.budget])
    return run(source, questions, [mixed, *others, blind(source)], out)
