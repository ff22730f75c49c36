"""scripts/gpu_check.py without a GPU: its parts on a simulated TensorRT, its bounds on numbers."""

from __future__ import annotations

import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from scripts import gpu_check
from scripts.gpu import parts
from scripts.gpu.report import speed_bounds
from tests.support.fakes.tensorrt.install import install

ROOT = Path(__file__).parents[2]
SIZE = "d=64,layers=4,vocab=300,image=56,vision_d=32,vision_layers=2,context=512"


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The script, whose parts find a simulated TensorRT."""
    monkeypatch.setattr(gpu_check, "CHILD", [str(ROOT / "tests" / "support" / "gpu_child.py")])
    simulate(monkeypatch)
    return gpu_check


def simulate(monkeypatch: pytest.MonkeyPatch, **what: Any) -> None:
    monkeypatch.setenv("SIMULATED", json.dumps({"version": "10.15.1", **what}))


def run(script: ModuleType, folder: Path, *more: str, budget: float = 0.4) -> int:
    arguments = f"--work {folder}/work --out {folder}/out --size {SIZE} --runs 1"
    return script.main([*arguments.split(), "--budget", str(budget), *more])


def report(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "out" / "gpu-simulated-gpu.json").read_text())


def test_all_parts_write_a_report_and_are_not_repeated(
    script: ModuleType,
    tmp_path: Path,
    llava_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options = ["--tiny", str(llava_checkpoint), "--skip", "tests", "--skip", "torch"]
    options += ["--skip", "quantised"]  # whose sizes a simulation does not have
    assert run(script, tmp_path, *options) == 0, capsys.readouterr().out
    found = report(tmp_path)
    names = set(found["checks"])
    assert {"tiny float32 separate", "tiny float16 separate"} <= names
    assert {"build decode", "prefill", "selection", "end to end", "decode"} <= names
    assert sum(name.endswith("parity") for name in names) == len(found["built"].popitem()[1])
    assert found["copy_gb_per_s"] > 0
    page = (tmp_path / "out" / "gpu-simulated-gpu.md").read_text()
    assert "| no pruning | TensorRT |" in page
    assert "TensorRT 10.15.1, onnx graphs" in page
    said = capsys.readouterr().out
    assert "will run tiny float32 separate" in said
    assert "SKIPPED torch: not asked for" in said

    assert run(script, tmp_path, *options) == 0
    said = capsys.readouterr().out
    for part in ("tiny float32 separate", "times", "parity"):
        assert f"kept {part}: passed before" in said
    again = report(tmp_path)
    for part in ("tiny float32 separate", "times", "parity"):
        assert again["parts"][part] == found["parts"][part]
    figures = [page["parts"]["build"]["figures"] for page in (found, again)]
    assert figures[0] == figures[1], "no engine is built again"
    assert set(again["checks"]) == names


def test_tensorrt_rtx_alone_is_checked_with_weights_as_inputs_and_as_constants(
    script: ModuleType,
    tmp_path: Path,
    llava_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    simulate(monkeypatch, version="", rtx="1.7.1.116")
    options = ["--tiny", str(llava_checkpoint), "--only", "rtx"]
    assert run(script, tmp_path, *options) == 0, capsys.readouterr().out
    found = report(tmp_path)
    checks = found["checks"]
    assert checks["host"]["text"] == "Simulated GPU, TensorRT-RTX 1.7.1.116"
    assert "comparisons with ONNX Runtime" in checks["rtx, parity"]["text"]
    assert checks["rtx, weights as inputs, prefill"]["value"] > 0
    assert "times that of constants" in checks["rtx, weights as inputs, decode, tokens/s"]["text"]


def test_quantised_engines_are_compared_in_size_and_values(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The simulation's engines hold no weights: the check of their sizes fails, as it should."""
    assert run(script, tmp_path, "--only", "quantised") == 1
    checks = report(tmp_path)["checks"]
    schemes = [name.split(", ")[1] for name in checks if name.endswith("size")]
    assert schemes == ["int8", "int4", "fp8"]  # of a GPU of compute capability 9.0
    for scheme in schemes:
        assert checks[f"quantised, {scheme}, parity"]["passed"], capsys.readouterr().out
        size = checks[f"quantised, {scheme}, size"]
        assert not size["passed"] and "of float16's bytes" in size["text"]


def test_the_report_is_of_earlier_calls_too_but_not_of_other_engines(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page = tmp_path / "out" / "gpu-simulated-gpu.md"
    assert run(script, tmp_path, "--only", "build", "--only", "times") == 0
    assert run(script, tmp_path, "--only", "parity") == 0
    assert "| no pruning | TensorRT |" in page.read_text()
    checks = list(report(tmp_path)["checks"])
    assert checks.index("host") < checks.index("build decode") < checks.index("end to end")
    assert checks[-1].endswith("parity")

    next((tmp_path / "work").rglob("decode.engine")).unlink()
    assert run(script, tmp_path, "--only", "build", "--only", "parity") == 0
    said = capsys.readouterr().out
    assert "earlier times is not used: it is of other engines" in said
    assert "kept parity" not in said
    assert "times" not in report(tmp_path)["parts"]
    assert "| no pruning | TensorRT |" not in page.read_text()

    (mark,) = (tmp_path / "work").rglob("exported.json")
    before = json.loads(mark.read_text())
    mark.write_text(json.dumps({**before, "sources": "others"}))
    check = script.Check(script.parse(["--work", f"{tmp_path}/work", "--size", SIZE]))
    check.args.budget = 0.4
    check.run("export")
    assert {**json.loads(mark.read_text()), "export": before["export"]} == before
    assert set(check.state) == {"host", "export"}


def test_what_a_bundle_is_made_of_is_told_by_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [
        tmp_path / name
        for name in ("trio_deploy/methods.py", "trio_deploy/bench/synthetic.py", "export/a.yaml")
    ]
    for file in files:
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("")
    monkeypatch.setattr(parts, "ROOT", tmp_path)
    seen = {parts._sources()}
    for file in files:
        file.write_text("changed")
        seen.add(parts._sources())
    assert len(seen) == 1 + len(files)


def test_what_raises_or_dies_keeps_no_other_part_from_running(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A RuntimeError of the bindings in one engine's build, a crash of the process in another's."""
    simulate(monkeypatch, dies=["select_1"], raises=["vision"])
    options = ["--only", "build", "--only", "times", "--only", "parity"]
    assert run(script, tmp_path, *options) == 1
    checks = report(tmp_path)["checks"]
    assert "SIGSEGV" in checks["build select_1"]["text"]
    assert checks["build vision"]["text"] == "RuntimeError: the bindings say no"
    assert "build_or_not" in checks["build vision"]["traceback"]
    assert checks["build decode"]["passed"]
    name = report(tmp_path)["large"]["name"]
    assert checks[f"{name} decode parity"]["passed"]
    assert not checks[f"{name} vision parity"]["passed"]
    assert not checks["times"]["passed"]

    simulate(monkeypatch, dies_at_once=["parity"])
    assert run(script, tmp_path, "--only", "parity") == 1
    checks = report(tmp_path)["checks"]
    assert "SIGSEGV" in checks["parity"]["text"]
    assert checks[f"{name} decode parity"]["passed"], "kept"

    simulate(monkeypatch)  # the next run builds what is missing
    assert run(script, tmp_path, *options) == 0
    checks = report(tmp_path)["checks"]
    assert {"prefill", "build select_1"} <= set(checks)
    assert "parity" not in checks


def test_a_wrong_engine_fails_the_check(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulate(monkeypatch, spoiled={"prefill_1": "hidden_states_out"})
    assert run(script, tmp_path, "--only", "build", "--only", "parity") == 1
    page = (tmp_path / "out" / "gpu-simulated-gpu.md").read_text()
    assert "**no**" in page
    assert "hidden_states_out differs" in page


def test_a_part_that_the_time_does_not_suffice_for_is_gone_on_with(
    script: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(script, tmp_path, "--only", "build") == 0
    ahead = report(tmp_path)["built"]
    options = ["--only", "build", "--again", "--minutes", "0.00001"]
    assert run(script, tmp_path, *options) == 1, "not even the GPU could be looked at"
    assert "gpu_check" in capsys.readouterr().err
    check = script.Check(script.parse(["--work", f"{tmp_path}/work", "--again"]))
    simulate(monkeypatch, hangs=["build"])
    check.deadline = time.monotonic() + 0.3
    check.run("build")
    check.run("times")
    assert check.unfinished == ["build", "times"]
    assert "run it again" in check.found()["checks"]["build, all of it"]["text"]
    assert "run it again" in check.found()["checks"]["times, all of it"]["text"]
    simulate(monkeypatch)
    assert run(script, tmp_path, "--only", "build") == 0
    assert report(tmp_path)["built"] == ahead, "kept from the first run"


def test_the_oracle_is_asked_in_torchs_python_where_this_one_has_none(
    script: ModuleType,
    tmp_path: Path,
    llava_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """torch's Python writes the oracle's tensors into the bundle, for TensorRT's to compare."""
    simulate(monkeypatch, no_torch=True)
    check = script.Check(script.parse(["--work", f"{tmp_path}/work"]))
    check.args.tiny, check.args.budget = str(llava_checkpoint), 0.4
    check.run("host")
    check.run("tiny float32 separate")
    found = check.found()["checks"]
    assert found["tiny float32 separate"]["passed"], found
    assert "with the oracle and ONNX Runtime" in found["tiny float32 separate"]["text"]


def test_torch_that_cannot_be_timed_fails_the_check_and_says_what_is_missing(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Unless it is left out."""
    assert run(script, tmp_path, "--only", "torch") == 1
    text = report(tmp_path)["checks"]["torch"]["text"]
    assert "not run: torch" in text and "finds no GPU" in text
    bare = tmp_path / "python"
    bare.write_text(f'#!/bin/sh\nexec {sys.executable} -S "$@"\n')
    bare.chmod(0o755)
    monkeypatch.setattr(script, "CHILD", ["-m", "scripts.gpu.parts"])
    check = script.Check(script.parse(["--work", f"{tmp_path}/w", "--torch-python", str(bare)]))
    check.run("torch host", python=str(bare))
    assert "lacks torch, transformers" in check.found()["checks"]["torch's Python"]["text"]


def test_what_was_found_without_tensorrt_is_kept_and_of_another_gpu_is_not(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = {"checks": {"torch, oracle": {"passed": True, "text": ""}}, "figures": {}, "done": True}
    about = {"gpu": "Simulated GPU", "size": SIZE, "budget": 0.4, "runs": 1, "tiny": "tiny"}
    elsewhere = tmp_path / "found.json"
    for tensorrt, gpu, kept in (
        (None, "Simulated GPU", True),
        ("10.15.1", "Simulated GPU", True),
        ("8.6.1", "Simulated GPU", False),
        ("10.15.1", "another GPU", False),
    ):
        found = {"about": {**about, "tensorrt": tensorrt, "gpu": gpu}, "parts": {"torch": done}}
        elsewhere.write_text(json.dumps(found))
        work = tmp_path / f"{tensorrt}-{gpu}"
        line = f"--size {SIZE} --budget 0.4 --runs 1 --skip torch --only tests"
        options = script.parse([*line.split(), "--work", str(work), "--resume", str(elsewhere)])
        check = script.Check(options)
        check.plan()
        assert check.passed("torch") is kept, (tensorrt, gpu)


def test_torch_is_timed_in_a_process_of_its_own(
    script: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    simulate(monkeypatch, version="")  # torch takes a look at any tensorrt that there is
    check = script.Check(script.parse(["--work", f"{tmp_path}/work", "--runs", "1"]))
    check.args.size, check.args.budget = SIZE, 0.4
    check.run("export")
    check.run("torch")
    found = check.found()
    assert found["large"]["torch"]["device"] == "cpu"
    for kind in ("transformers", "oracle"):
        assert found["large"]["torch"][kind]["prefill_s"]["median"] > 0
        assert found["large"]["torch"][kind]["tokens_per_s"]["median"] > 0
        assert not found["checks"][f"torch, {kind}"]["passed"], "not on a GPU"


def test_measuring_the_bandwidth_keeps_no_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    simulation = install(monkeypatch, "10.15.1")
    from trio_deploy.runtimes.tensorrt.device import Device

    device = Device()
    assert parts.bandwidth(device) > 0
    assert simulation.cuda.used() == 0


def case(prefill: float, selection: float, first: float, rate: float) -> dict[str, Any]:
    return {
        "prefill_s": {"median": prefill},
        "groups_s": {"selection": {"median": selection}},
        "first_token_s": {"median": first},
        "tokens_per_s": {"median": rate},
    }


def test_bounds_are_judged_on_both_sides() -> None:
    unpruned = case(0.45, 0.0, 0.5, 200.0)
    fast = speed_bounds(unpruned, case(0.1, 0.005, 0.12, 300.0), 10**9, 300e9)
    slow = speed_bounds(unpruned, case(0.2, 0.02, 0.3, 210.0), 10**9, 300e9)
    assert [name for name, *_ in fast] == ["prefill", "selection", "end to end", "decode"]
    assert all(passed for _, passed, *_ in fast)
    assert not any(passed for _, passed, *_ in slow)


@pytest.mark.parametrize(
    "name", ["gpu_check.sh", "gpu/pack.sh", "gpu/pack_python.sh", "gpu/unpack.sh"]
)
def test_scripts_tell_their_use(name: str) -> None:
    script = ROOT / "scripts" / name
    out = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert f"scripts/{name}" in out.stdout
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0


def test_an_interpreter_is_packed_without_the_rest_of_its_prefix(tmp_path: Path) -> None:
    """Debian's is in /usr, of which all would be many gigabytes."""
    script = ROOT / "scripts" / "gpu" / "pack_python.sh"
    system = Path("/usr/bin/python3")
    python = str(system) if system.exists() else sys.executable
    out = subprocess.run(
        ["bash", str(script), python, str(tmp_path)], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert {entry.name for entry in tmp_path.iterdir()} == {"bin", "lib"}
    (packed,) = (tmp_path / "bin").iterdir()
    assert sum(file.stat().st_size for file in tmp_path.rglob("*") if file.is_file()) < 300 << 20
    env = {"PYTHONHOME": str(tmp_path), "LD_LIBRARY_PATH": str(tmp_path / "lib")}
    program = "import ctypes, json, lzma, sys, zlib; print(json.__file__)"
    out = subprocess.run([str(packed), "-c", program], env=env, capture_output=True, text=True)
    assert out.stdout.startswith(str(tmp_path)), out.stderr


def test_parts_are_put_together_and_one_that_lacks_is_said(tmp_path: Path) -> None:
    inside, packed = tmp_path / "in" / "trio-gpu", tmp_path / "parts"
    inside.mkdir(parents=True)
    packed.mkdir()
    (inside / "env.sh").write_text("")
    (inside / "weights").write_bytes(random.Random(0).randbytes(300_000))
    split = f"tar -C {tmp_path}/in -cf - trio-gpu | xz | split -b 100K -d - {packed}/trio-gpu."
    subprocess.run(split, shell=True, check=True)
    command = ["bash", str(ROOT / "scripts" / "gpu" / "unpack.sh"), str(packed), f"{tmp_path}/to"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    found = tmp_path / "to" / "trio-gpu" / "weights"
    assert found.read_bytes() == (inside / "weights").read_bytes()
    max(packed.iterdir()).unlink()
    command[-1] = f"{tmp_path}/again"
    out = subprocess.run(command, capture_output=True, text=True)
    assert out.returncode == 1 and "is not whole" in out.stderr
    assert not (tmp_path / "again" / "trio-gpu").exists()
