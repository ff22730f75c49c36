"""What a wheel, an sdist and an editable install promise, each in an environment of its own."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import stat
import subprocess
import sys
import sysconfig
import tempfile
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import trio_deploy

ROOT = Path(__file__).parent.parent
SCENE = ROOT / "examples" / "scene.png"
RECORDED = ROOT / "tests" / "fixtures" / "schema_1" / "bundle_ort"
PROMPT = "what color is the circle?"
PIP = (sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check")
QUICK = "--runs 1 --warm-up 0 --new-tokens 2 --no-memory".split()


def attempt(*command: object, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command outside the checkout, so that only what is installed is found."""
    inherited = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    words = [str(part) for part in command]
    return subprocess.run(words, cwd=cwd, env=inherited | env, capture_output=True, text=True)


def run(*command: object, cwd: Path, **env: str) -> str:
    done = attempt(*command, cwd=cwd, **env)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the checkout, which building and installing may write to."""
    folder = tmp_path_factory.mktemp("source") / "trio-deploy"
    left_out = shutil.ignore_patterns(".*", "*.egg-info", "__pycache__", "out", "dist", "tests")
    shutil.copytree(ROOT, folder, ignore=left_out)
    return folder


@pytest.fixture(scope="module")
def dist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the sdist and of the wheel built from it, which so holds all that it needs."""
    folder = tmp_path_factory.mktemp("dist")
    run(sys.executable, "-m", "build", "--no-isolation", "--outdir", folder, source, cwd=folder)
    return folder


@pytest.fixture(scope="module")
def wheel(dist: Path) -> Path:
    (file,) = dist.glob("*.whl")
    return file


def environment(folder: Path, *requirements: object) -> Path:
    """Return the folder of programs of a new environment with these packages and nothing else."""
    run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder.parent)
    programs = folder / ("Scripts" if os.name == "nt" else "bin")
    tested = ROOT / "requirements" / "tested.txt"
    if requirements:
        run(*PIP, "--python", programs / "python", "install", "--no-compile", "-c", tested,
            *requirements, cwd=folder)  # fmt: skip
    return programs


@pytest.fixture(scope="module")
def device(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a device installs: the wheel with `[cpu]`."""
    return environment(tmp_path_factory.mktemp("device") / "venv", f"{wheel}[cpu]")


@pytest.fixture(scope="module")
def workstation(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What exporting takes: the wheel with `[cpu,export]`."""
    return environment(tmp_path_factory.mktemp("workstation") / "venv", f"{wheel}[cpu,export]")


@pytest.fixture(scope="module")
def bundle(workstation: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle of the shipped model, exported by an installed wheel."""
    folder = tmp_path_factory.mktemp("exported")
    run(workstation / "trio-export", "--model", "tiny", "--budget", "0.111", "--out", "bundle",
        cwd=folder)  # fmt: skip
    return folder / "bundle"


def installed(programs: Path, cwd: Path) -> set[str]:
    listing = run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        programs / "python",
        "list",
        "--format=json",
        cwd=cwd,
    )
    return {package["name"].lower() for package in json.loads(listing)}


def test_the_distributions_are_of_this_version_and_fit_for_an_index(dist: Path) -> None:
    files = sorted(path.name for path in dist.iterdir())
    named = f"trio_deploy-{trio_deploy.__version__}"
    assert files == [f"{named}-py3-none-any.whl", f"{named}.tar.gz"]
    run(sys.executable, "-m", "twine", "check", "--strict", *files, cwd=dist)


def dockerfile(name: str = "Dockerfile") -> list[tuple[str, str]]:
    """Instructions of a file for containers, in order, each with its text on one line."""
    text = (ROOT / "deploy" / name).read_text(encoding="utf-8").replace("\\\n", " ")
    lines = [line.split(maxsplit=1) for line in text.splitlines()]
    return [(line[0], line[1]) for line in lines if line and not line[0].startswith("#")]


@pytest.fixture
def container(wheel: Path, bundle: Path) -> Iterator[tuple[Path, Path]]:
    """An environment as the image's steps make it, and a bundle, which others may read."""
    extras = dict(text.split("=", 1) for name, text in dockerfile() if name == "ARG")["EXTRAS"]
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        root.chmod(0o755)
        programs = environment(root / "venv", f"{wheel}[{extras}]")
        shutil.copytree(bundle, root / "bundle")
        yield programs, root / "bundle"


def test_the_image_is_built_of_what_there_is() -> None:
    steps = dockerfile()
    copied = [
        name
        for instruction, text in steps
        if instruction == "COPY" and not text.startswith("--from")
        for name in text.split()[:-1]
    ]
    assert copied and all((ROOT / name).exists() for name in copied)
    (user,) = [text for instruction, text in steps if instruction == "USER"]
    assert all(int(number) > 0 for number in user.split(":"))
    last = max(number for number, (instruction, _) in enumerate(steps) if instruction == "RUN")
    assert last < [instruction for instruction, _ in steps].index("USER")


def test_the_images_command_serves_as_nobody_with_nothing_to_write(
    container: tuple[Path, Path],
) -> None:
    """The steps of deploy/Dockerfile in a clean folder, since no builder runs in tests."""
    programs, bundle = container
    steps = dict(dockerfile())  # the last of each
    user, group = map(int, steps["USER"].split(":"))
    command = json.loads(steps["ENTRYPOINT"])
    check = json.loads(re.findall(r"CMD (\[.*\])", steps["HEALTHCHECK"])[0])
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [{"/bundle": str(bundle), "8000": port}.get(word, word) for word in command]
    check = [word.replace(":8000", f":{port}") for word in check]
    variables = dict(word.split("=", 1) for word in steps["ENV"].split())
    as_nobody: dict[str, Any] = {"cwd": "/", "env": variables | {"PATH": str(programs)}}
    python = (programs / "python").resolve()
    if os.geteuid() == 0 and all(each.stat().st_mode & stat.S_IXOTH for each in python.parents):
        as_nobody |= {"user": user, "group": group, "extra_groups": []}
    arguments = [programs / command[0], *command[1:], "--name", "tiny", "--no-auth"]
    files = {path: path.stat().st_mtime_ns for path in bundle.parent.rglob("*")}
    with subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, **as_nobody) as server:
        try:
            assert server.stdout is not None and "serves tiny at" in server.stdout.readline()
            health = [programs / check[0], *check[1:]]
            assert subprocess.run(health, **as_nobody).returncode == 0
            body = {"model": "tiny", "messages": [{"role": "user", "content": PROMPT}]}
            asked = urllib.request.Request(
                f"http://127.0.0.1:{port}/v1/chat/completions",
                json.dumps(body).encode(),
                {"Content-Type": "application/json"},
            )
            with urllib.request.urlopen(asked, timeout=60) as reply:
                assert json.load(reply)["choices"][0]["finish_reason"]
            server.terminate()
            assert server.wait(60) == 0
        finally:
            server.kill()
    assert files == {path: path.stat().st_mtime_ns for path in bundle.parent.rglob("*")}


def test_no_install_brings_torch_and_a_device_needs_no_onnx(
    device: Path, workstation: Path, tmp_path: Path
) -> None:
    torch = {"torch", "transformers", "safetensors", "torchvision"}
    assert not installed(workstation, tmp_path) & torch
    assert not installed(device, tmp_path) & (torch | {"onnx", "onnx-ir", "onnxscript"})
    assert "trio-deploy" in installed(device, tmp_path)


def test_a_bundle_runs_on_a_device_with_the_same_tokens(
    bundle: Path, device: Path, tmp_path: Path
) -> None:
    out = run(device / "trio", "run", bundle, "--image", SCENE, "--prompt", PROMPT,
              "--show", "kept.png", "--json", cwd=tmp_path)  # fmt: skip
    there = json.loads(out)
    assert (tmp_path / "kept.png").stat().st_size > 0

    from trio_deploy import Pipeline, Request

    here = Pipeline.open(bundle).generate(Request(PROMPT, [SCENE]))
    assert there["token_ids"] == list(here.token_ids)
    assert there["text"] == here.text


def test_a_device_checks_inspects_and_plans(bundle: Path, device: Path, tmp_path: Path) -> None:
    run(device / "trio", "check", RECORDED, "--golden", cwd=tmp_path)
    assert "verified" in run(device / "trio", "inspect", bundle, "--verify", cwd=tmp_path)
    out = run(device / "trio", "plan", "--model", "llava-next-7b", "--json", cwd=tmp_path)
    assert json.loads(out)["model"] == "llava-next-7b"


def test_a_device_measures_and_writes_the_page(bundle: Path, device: Path, tmp_path: Path) -> None:
    out = run(device / "trio", "bench", bundle, *QUICK, "--out", "figures", cwd=tmp_path)
    assert "transformers: torch is not installed" in out
    assert {"figures.json", "figures.md"} <= {path.name for path in tmp_path.glob("figures*")}
    run(device / "trio", "report", bundle, "--bench", "figures.json", "--scenes", "0",
        cwd=tmp_path)  # fmt: skip
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "Not checked" in page and "data:image/jpeg" in page


def test_a_device_evaluates_and_writes_a_triton_repository(
    bundle: Path, device: Path, tmp_path: Path
) -> None:
    run(device / "trio", "eval", bundle, "--scenes", "1", "--budgets", "own", "--out", "eval",
        cwd=tmp_path)  # fmt: skip
    assert json.loads((tmp_path / "eval" / "results.json").read_text())["results"]
    run(device / "trio", "triton", bundle, "--out", "repository", cwd=tmp_path)
    assert (tmp_path / "repository" / "trio_vlm" / "config.pbtxt").is_file()


@pytest.mark.parametrize(
    ("command", "extra"),
    [
        ("export --model tiny --out b", "export"),
        ("attach-weights BUNDLE CHECKPOINT", "export"),
        ("plan --model llava-next-7b --target jetson-orin-nx-16gb", "export"),
        ("build BUNDLE --target jetson-orin-nx-16gb --dry-run", "export"),
        ("bench --size d=64,layers=2,vocab=300", "export"),
        ("eval tiny --scenes 1 --out e", "export"),
        ("tune tiny --scenes 1 --out t", "export"),
        ("check BUNDLE", "reference"),
        ("run BUNDLE --prompt x --runtime openvino", "openvino"),
        ("serve BUNDLE", "serve"),
    ],
)
def test_a_command_without_its_extra_names_it(
    command: str, extra: str, bundle: Path, device: Path, tmp_path: Path
) -> None:
    checkpoint = ROOT / "trio_deploy" / "data" / "tiny"
    words = [
        {"BUNDLE": str(bundle), "CHECKPOINT": str(checkpoint)}.get(word, word)
        for word in command.split()
    ]
    done = attempt(device / "trio", *words, cwd=tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"trio-deploy[{extra}]" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("model", ["tiny", "llava-1.5-7b", "llava-next-7b"])
def test_recipes_and_targets_are_in_the_wheel(
    model: str, workstation: Path, tmp_path: Path
) -> None:
    out = run(workstation / "trio", "plan", "--model", model, "--budget", "0.222",
              "--target", "h200", "--json", cwd=tmp_path)  # fmt: skip
    assert json.loads(out)["model"] == model


def test_an_editable_install_sees_a_changed_recipe_and_a_new_one(
    source: Path, tmp_path: Path
) -> None:
    programs = environment(tmp_path / "venv")
    dependencies = sysconfig.get_path("purelib")  # of the tests' own environment
    run(*PIP, "--python", programs / "python", "install", "--no-deps", "--no-build-isolation",
        "--editable", source, cwd=tmp_path, PYTHONPATH=dependencies)  # fmt: skip

    def plan(model: str) -> dict[str, object]:
        out = run(programs / "trio", "plan", "--model", model, "--budget", "0.111", "--json",
                  cwd=tmp_path, PYTHONPATH=dependencies)  # fmt: skip
        return json.loads(out)

    before = plan("tiny")
    recipe = source / "export" / "tiny.yaml"
    recipe.write_text(
        recipe.read_text().replace("{layer: 8, keep: 0.070312}", "{layer: 8, keep: 0.05}")
    )
    shutil.copy(recipe, source / "export" / "mine.yaml")
    assert plan("tiny") != before
    assert plan("mine")["model"] == "mine"
