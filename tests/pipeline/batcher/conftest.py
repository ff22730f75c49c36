"""A pipeline and a batcher for the tests of batching."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.batching import opened
from trio_deploy import Batcher, Pipeline


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("tiny")


@pytest.fixture(scope="session")
def pipeline(folder: Path) -> Pipeline:
    return opened(folder)


@pytest.fixture
def batcher(pipeline: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipeline, max_rows=4, max_queue=100) as batcher:
        yield batcher
