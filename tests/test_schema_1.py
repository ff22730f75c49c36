"""What an older commit wrote still opens and answers as it did: bundles, a Triton repository.

scripts/make_schema_1_fixtures.py says how the files came to be. Only the command line and the
import paths in the repository's model.py files are used.
"""

from __future__ import annotations

import importlib.util
import json
import re
import sys
import uuid
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fakes import triton as fake_utils
from tests.support.fakes.triton import Asked
from trio_deploy.cli.main import main
from trio_deploy.errors import TrioError

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests" / "fixtures" / "schema_1"
REPOSITORY = FIXTURES / "triton_repository"
ANSWERS = json.loads((FIXTURES / "answers.json").read_text(encoding="utf-8"))
BUNDLES = ("bundle_ort", "bundle_primitive")

Trio = Callable[..., str]


@pytest.fixture
def trio(capsys: pytest.CaptureFixture[str]) -> Trio:
    """Run a command that must succeed; returns what it printed."""

    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        said = capsys.readouterr()
        assert status == 0, said.err
        return said.out

    return run


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model at its default budget, exported by today's code."""
    folder = tmp_path_factory.mktemp("bundle") / "tiny"
    assert main(["export", "--model", "tiny", "--out", str(folder)]) == 0
    return folder


def requests(model: str) -> list[dict[str, Any]]:
    """List the recorded requests to a model."""
    return [request for request in ANSWERS["run"] if request["model"] == model]


def answer(trio: Trio, folder: Path, request: Mapping[str, Any], *more: str) -> dict[str, Any]:
    """Ask as recorded; returns what was recorded of the answer."""
    image = ROOT / "examples" / request["image"]
    said = json.loads(trio("run", folder, "--image", image, *request["options"], "--json", *more))
    return {key: said[key] for key in request["answer"]}


@pytest.mark.parametrize("more", [(), ("--low-memory",)], ids=["plain", "low-memory"])
@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundle_answers_as_when_it_was_made(trio: Trio, name: str, more: tuple[str, ...]) -> None:
    for request in requests(name):
        assert answer(trio, FIXTURES / name, request, *more) == request["answer"]


@pytest.mark.parametrize("name", BUNDLES)
def test_a_bundles_files_have_their_checksums(trio: Trio, name: str) -> None:
    said = trio("inspect", "--verify", FIXTURES / name)
    found = re.search(r"(\d+) of (\d+) files have their checksum", said)
    assert found and found[1] == found[2]


def test_golden_tensors_are_met(trio: Trio) -> None:
    report = json.loads(trio("check", "--golden", FIXTURES / "bundle_ort", "--json"))
    assert report["passed"]


@pytest.mark.parametrize("picture", ["scene.png", "scene-2.png", "scene-smooth.png"])
def test_the_shipped_model_answers_as_before(trio: Trio, tiny: Path, picture: str) -> None:
    asked = [request for request in requests("tiny") if request["image"] == picture]
    assert len(asked) == 10
    for request in asked:
        assert answer(trio, tiny, request) == request["answer"], request["options"]


def test_the_shipped_models_answers_about_scenes_are_as_before(
    trio: Trio, tiny: Path, tmp_path: Path
) -> None:
    recorded = ANSWERS["eval"]
    trio("eval", tiny, "--out", tmp_path / "out", *recorded["options"])
    found = []
    for file in (tmp_path / "out" / "answers").iterdir():
        lines = map(json.loads, file.read_text(encoding="utf-8").splitlines())
        found.append({line["id"]: line["text"] for line in lines})
    assert sorted(found, key=by_content) == sorted(recorded["answers"], key=by_content)


def by_content(answers: Mapping[str, str]) -> str:
    """Return what sorts configurations, whose files are named after what may change."""
    return json.dumps(answers, sort_keys=True)


@pytest.fixture
def backend(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Let models import a stand-in for Triton; what they imported with it is forgotten."""
    monkeypatch.setitem(sys.modules, "triton_python_backend_utils", fake_utils.module())
    before, switch = set(sys.modules), sys.getswitchinterval()
    yield
    sys.setswitchinterval(switch)
    for name in set(sys.modules) - before:
        if name.startswith("trio_deploy."):
            del sys.modules[name]


def load_model(name: str) -> Any:
    """Load a model's model.py as Triton does; returns an instance that is not initialised."""
    file = REPOSITORY / name / "1" / "model.py"
    spec = importlib.util.spec_from_file_location(f"{name}_{uuid.uuid4().hex}", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.TritonPythonModel()


def arguments(name: str, **changed: str) -> dict[str, str]:
    """Give a model what Triton does, with the parameters of its config.pbtxt."""
    text = (REPOSITORY / name / "config.pbtxt").read_text(encoding="utf-8")
    pattern = r'parameters \{\s*key: "(\w+)"\s*value \{\s*string_value: "([^"]*)"'
    parameters = dict(re.findall(pattern, text)) | changed
    outputs = re.findall(r'output \{\s*name: "(\w+)"', text)
    config = {
        "parameters": {key: {"string_value": v} for key, v in parameters.items()},
        "output": [{"name": name} for name in outputs],
    }
    return {
        "model_config": json.dumps(config),
        "model_repository": str(REPOSITORY / name),
        "model_name": name,
        "model_version": "1",
    }


def ask(model: Any, request: Mapping[str, Any]) -> list[int]:
    """Send a recorded request; returns the tokens of its answer."""
    given = dict(zip(request["options"][::2], request["options"][1::2], strict=True))
    picture = (ROOT / "examples" / request["image"]).read_bytes()
    tensors = {
        "prompt": np.array([given["--prompt"].encode()], np.object_),
        "images": np.array([picture], np.object_),
        "max_tokens": np.array([int(given["--max-new-tokens"])], np.int32),
    }
    if "--budget" in given:
        tensors["budget"] = np.array([float(given["--budget"])], np.float64)
    asked = Asked(tensors)
    model.execute([asked])
    return asked.token_ids()


@pytest.mark.usefixtures("backend")
def test_a_written_triton_repository_serves_its_model() -> None:
    model = load_model("trio_vlm")
    assert type(model).__name__ == "TritonPythonModel"
    model.initialize(arguments("trio_vlm", watch="false"))
    try:
        for request in requests("bundle_ort"):
            assert ask(model, request) == request["answer"]["token_ids"]
        # An output that its configuration lacks, such as warnings, would be an error in Triton.
        unknown = Asked({"prompt": np.array([b"a giraffe ?"], np.object_)})
        model.execute([unknown])
        assert "warnings" not in unknown.outputs()[-1]
    finally:
        model.finalize()


@pytest.mark.usefixtures("backend")
def test_the_model_of_a_written_repository_that_was_removed_says_what_to_do() -> None:
    with pytest.raises(TrioError, match="removed in .* 0.2: delete its folder .* or `trio serve`"):
        load_model("trio_vlm_complete")
