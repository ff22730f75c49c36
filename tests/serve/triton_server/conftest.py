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
def model_module(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of `trio_vlm`, imported with the stand-in."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_utils.module())
    names = tuple(
        f"trio_deploy.serve.triton_server.{name}" for name in ("model", "answer", "backend")
    )
    switch = sys.getswitchinterval()
    yield importlib.import_module(names[0])
    sys.setswitchinterval(switch)
    for name in names:
        del sys.modules[name]


@pytest.fixture
def load(model_module: ModuleType, bundle: Path) -> Iterator[Callable[..., Any]]:
    loaded = []

    def load(**parameters: str) -> Any:
        model = model_module.TritonPythonModel()
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
