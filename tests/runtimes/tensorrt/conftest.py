"""Bundles of the shipped tiny model and of full-size graphs, each exported once."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from tests.support.exported import Export
from trio_deploy import Bundle, export_model


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """`exported(model, target, …)` as `export` has it; do not change what it returns."""

    @cache
    def make(model: str, target: str, **options: object) -> Bundle:
        folder: Path = tmp_path_factory.mktemp("exported") / "bundle"
        return export_model(model, folder, target=target, progress=False, **options)  # type: ignore[arg-type]

    return make
