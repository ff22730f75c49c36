"""Bundles of the shipped tiny model and of full-size graphs, each exported once."""

from __future__ import annotations

from functools import cache

import pytest

from tests.support.bundles import Bundles
from tests.support.exported import Export
from trio_deploy import Bundle


@pytest.fixture(scope="session")
def exported(bundles: Bundles) -> Export:
    """`exported(model, target, …)` as `export` has it; do not change what it returns."""

    @cache
    def make(model: str, target: str, **options: object) -> Bundle:
        return Bundle.load(bundles.path(model, target=target, **options))

    return make
