"""A pipeline and a batcher for the tests of batching."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from trio_deploy import Batcher, Pipeline


@pytest.fixture(scope="session")
def pipeline(bundles: Bundles) -> Pipeline:
    return opened(bundles)


@pytest.fixture
def batcher(pipeline: Pipeline) -> Iterator[Batcher]:
    with Batcher(pipeline, max_rows=4, max_queue=100) as batcher:
        yield batcher
