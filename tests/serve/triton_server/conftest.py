"""Models as Triton loads them, with a stand-in for Triton.

Nothing here imports hypothesis: the tests in the server's environment do without.
"""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.support.fakes import triton as fake_utils
from tests.support.fakes.triton import arguments
from tests.support.questions import SCHEDULE
from trio_deploy import Pipeline, export_model


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, told that a token ends answers which it does not give."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    export_model("tiny", folder, schedule=SCHEDULE, progress=False)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["generation"]["eos_token_ids"] = [60]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


@pytest.fixture(scope="session")
def pipeline(bundle: Path) -> Pipeline:
    return Pipeline.open(bundle, threads=1)


@pytest.fixture
def modules(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[ModuleType, ModuleType]]:
    """The modules of `trio_vlm` and `trio_vlm_complete`, imported with the stand-in."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_utils.module())
    names = tuple(
        f"trio_deploy.serve.triton_server.{name}" for name in ("model", "complete", "backend")
    )
    switch = sys.getswitchinterval()
    model, complete, _ = (importlib.import_module(name) for name in names)
    yield model, complete
    sys.setswitchinterval(switch)
    for name in names:
        del sys.modules[name]


@pytest.fixture
def load(modules: tuple[ModuleType, ModuleType], bundle: Path) -> Iterator[Callable[..., Any]]:
    loaded = []

    def load(**parameters: str) -> Any:
        model = modules[0].TritonPythonModel()
        given = {
            "bundle": bundle.name,
            "threads": "1",
            "warm_up": "false",
            "watch": "false",
        } | parameters
        model.initialize(arguments(bundle.parent, **given))
        loaded.append(model)
        return model

    yield load
    for model in loaded:
        model.finalize()
