"""The wheel alone, without torch or transformers, exports and runs with the same tokens."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trio_deploy import Request

ROOT = Path(__file__).parent.parent
SCENE = ROOT / "examples" / "scene.png"
PROMPT = "what color is the circle?"


def run(*command: object, cwd: Path) -> str:
    """Runs a command outside the checkout, so that only what is installed is found."""
    env = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        [str(part) for part in command], cwd=cwd, env=env, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def venv(tmp_path_factory):
    """Scripts folder of a new environment with the wheel and its `cpu` extra, nothing else."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"  # a copy: building leaves files behind, which the next build takes
    everywhere = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__")
    on_top = shutil.ignore_patterns("build", "dist", "out")  # trio_deploy/build is a room

    def left_out(folder: str, names: list[str]) -> set[str]:
        return everywhere(folder, names) | (on_top(folder, names) if folder == str(ROOT) else set())

    shutil.copytree(ROOT, source, ignore=left_out)
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    run(*pip, "wheel", "--no-deps", "--no-build-isolation", "-w", folder, source, cwd=folder)
    (wheel,) = folder.glob("*.whl")
    run(sys.executable, "-m", "venv", "--without-pip", folder / "venv", cwd=folder)
    scripts = folder / "venv" / ("Scripts" if os.name == "nt" else "bin")
    tested = ROOT / "requirements" / "tested.txt"
    run(*pip, "--python", scripts / "python", "install", "--no-compile", "-c", tested,
        f"{wheel}[cpu]", cwd=folder)  # fmt: skip
    return scripts


def test_the_base_install_has_neither_torch_nor_transformers(venv, tmp_path):
    listing = run(sys.executable, "-m", "pip", "--python", venv / "python", "list",
                  "--format=json", cwd=tmp_path)  # fmt: skip
    installed = {package["name"].lower() for package in json.loads(listing)}
    assert "trio-deploy" in installed
    assert not installed & {"torch", "transformers", "safetensors", "torchvision"}


def test_a_bundle_exported_and_run_there_gives_the_same_tokens(venv, tmp_path):
    run(venv / "trio-export", "--model", "tiny", "--budget", "0.111", "--out", "bundle",
        cwd=tmp_path)  # fmt: skip
    out = run(venv / "trio", "run", "bundle", "--image", SCENE, "--prompt", PROMPT,
              "--show", "kept.png", "--json", cwd=tmp_path)  # fmt: skip
    there = json.loads(out)
    assert (tmp_path / "kept.png").stat().st_size > 0

    from trio_deploy import Pipeline

    here = Pipeline.open(tmp_path / "bundle").generate(Request(PROMPT, [SCENE]))
    assert there["token_ids"] == list(here.token_ids)
    assert there["text"] == here.text


def test_measuring_and_the_page_need_no_more_than_that(venv, tmp_path):
    run(venv / "trio-export", "--model", "tiny", "--out", "bundle", cwd=tmp_path)
    quick = "--runs 1 --warm-up 0 --new-tokens 2 --no-memory --out figures".split()
    out = run(venv / "trio", "bench", "bundle", *quick, cwd=tmp_path)
    assert "transformers: torch is not installed" in out
    assert {path.name for path in tmp_path.glob("figures*")} == {"figures.json", "figures.md"}
    run(venv / "trio", "report", "bundle", "--bench", "figures.json", "--scenes", "0",
        cwd=tmp_path)  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not checked" in page and "data:image/jpeg" in page


def test_recipes_and_targets_are_in_the_wheel(venv, tmp_path):
    for model in ("tiny", "llava-1.5-7b", "llava-next-7b"):
        out = run(venv / "trio", "plan", "--model", model, "--budget", "0.222", "--json",
                  cwd=tmp_path)  # fmt: skip
        assert json.loads(out)["model"] == model
