"""A stage's name carries no meaning: a bundle whose stages and graphs are renamed works alike."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from trio_deploy import Bundle
from trio_deploy.bench.measure import UNPRUNED
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.cli.main import main

ROOT = Path(__file__).parents[2]
ORIGINAL = ROOT / "tests" / "fixtures" / "schema_1" / "bundle_ort"
NEW_NAMES = ("decode", "prefill_9", "vision", "select_0", "a.b", "embed", "select_x")


@pytest.fixture(scope="module")
def renamed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with golden tensors whose stages swap names and whose graphs are g0, g1, …"""
    folder = Path(shutil.copytree(ORIGINAL, tmp_path_factory.mktemp("renamed") / "b"))
    manifest = Bundle.load(folder).manifest
    stages, files = [], dict(manifest.files)
    for number, (stage, name) in enumerate(zip(manifest.stages, NEW_NAMES, strict=True)):
        file = f"g{number}.onnx"
        (folder / stage.file).rename(folder / file)
        files[file] = files.pop(stage.file)
        stages.append(msgspec.structs.replace(stage, name=name, file=file))
    manifest = msgspec.structs.replace(manifest, stages=tuple(stages), files=files)
    (folder / MANIFEST).write_bytes(manifest.dump())
    return folder


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    def run(*arguments: str | Path) -> str:
        capsys.readouterr()
        status = main([str(argument) for argument in arguments])
        out, error = capsys.readouterr()
        assert status == 0, error
        return out

    return run


def test_it_answers_as_before(renamed: Path, said: Callable[..., str]) -> None:
    question = (
        "--image",
        ROOT / "examples" / "scene.png",
        "--prompt",
        "what color is the circle ?",
    )
    answers = [
        json.loads(said("run", folder, *question, "--budget", "0.6", "--json"))
        for folder in (ORIGINAL, renamed)
    ]
    assert answers[0]["token_ids"] == answers[1]["token_ids"]


def test_it_passes_the_check_and_is_inspected(renamed: Path, said: Callable[..., str]) -> None:
    assert json.loads(said("check", "--golden", renamed, "--json"))["passed"]
    text = said("inspect", "--verify", renamed)
    assert all(f"g{number}.onnx" in text for number in range(len(NEW_NAMES)))


def test_its_stages_are_measured_in_their_groups(
    renamed: Path, said: Callable[..., str], tmp_path: Path
) -> None:
    out = tmp_path / "bench"
    quick = "--runs 1 --warm-up 0 --new-tokens 2 --baselines none --no-memory".split()
    said("bench", renamed, "--out", out, *quick)
    cases = json.loads(out.with_suffix(".json").read_text())["cases"]
    groups = next(case["groups_s"] for case in cases if case["name"] != UNPRUNED)
    assert all(groups[name]["median"] > 0 for name in ("vision", "embed", "layers", "selection"))
