"""scripts/gpu_check.py without a GPU: its steps on a simulated TensorRT, its bounds on numbers."""

from __future__ import annotations

import importlib.util
import json
import subprocess
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from tests.simulated_tensorrt import install

ROOT = Path(__file__).parent.parent
SIZE = "d=64,layers=4,vocab=300,image=56,vision_d=32,vision_layers=2,context=512"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_check", ROOT / "scripts" / "gpu_check.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_steps_write_a_report(
    script: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    llava_checkpoint: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    install(monkeypatch, "10.15.1", gpu="Simulated GPU")
    # As on a host without it; tests/parity has the oracle.
    monkeypatch.setattr(script, "torch_is_here", lambda: False)
    arguments = f"--work {tmp_path}/work --out {tmp_path}/out --size {SIZE} --runs 2"
    arguments += f" --tiny {llava_checkpoint} --budget 0.4 --skip tests --skip torch"
    assert script.main(arguments.split()) == 0, capsys.readouterr().out
    found = json.loads((tmp_path / "out" / "gpu-simulated-gpu.json").read_text())
    names = set(found["checks"])
    assert {"tiny float32 separate", "tiny float16 separate"} <= names
    assert {"prefill", "selection", "end to end", "decode"} <= names
    report = (tmp_path / "out" / "gpu-simulated-gpu.md").read_text()
    assert "| no pruning | TensorRT |" in report
    assert "TensorRT 10.15.1, onnx graphs" in report


def test_a_wrong_engine_fails_the_check(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    simulation = install(monkeypatch, "10.15.1", gpu="Simulated GPU")
    simulation.tensorrt.spoiled["prefill_1"] = "hidden_states_out"
    arguments = f"--work {tmp_path}/work --out {tmp_path}/out --size {SIZE} --runs 1"
    arguments += " --budget 0.4 --skip tests --skip tiny --skip torch"
    assert script.main(arguments.split()) == 1
    report = (tmp_path / "out" / "gpu-simulated-gpu.md").read_text()
    assert "**no**" in report
    assert "hidden_states_out differs" in report


def test_torch_is_timed_in_a_process_of_its_own(
    script: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from trio_deploy.bench.synthetic import Size, write_checkpoint
    from trio_deploy.export import export

    checkpoint = write_checkpoint(tmp_path / "ck", Size.parse(SIZE).config(), progress=False)
    bundle = export(checkpoint, tmp_path / "bundle", budget=0.4, link_weights=True, progress=False)
    script.torch_child(str(bundle.path), runs=1)
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["device"] == "cpu"
    for kind in ("transformers", "oracle"):
        assert found[kind]["prefill_s"]["median"] > 0
        assert found[kind]["tokens_per_s"]["median"] > 0


def case(prefill: float, selection: float, first: float, rate: float) -> dict[str, Any]:
    return {
        "prefill_s": {"median": prefill},
        "groups_s": {"selection": {"median": selection}},
        "first_token_s": {"median": first},
        "tokens_per_s": {"median": rate},
    }


def test_bounds_are_judged_on_both_sides(script: ModuleType) -> None:
    unpruned = case(0.45, 0.0, 0.5, 200.0)
    fast = script.judge(unpruned, case(0.1, 0.005, 0.12, 300.0), 10**9, 300e9)
    slow = script.judge(unpruned, case(0.2, 0.02, 0.3, 210.0), 10**9, 300e9)
    assert [name for name, *_ in fast] == ["prefill", "selection", "end to end", "decode"]
    assert all(passed for _, passed, *_ in fast)
    assert not any(passed for _, passed, *_ in slow)


@pytest.mark.parametrize("name", ["gpu_check.sh", "gpu/pack.sh", "gpu/unpack.sh"])
def test_scripts_tell_their_use(name: str) -> None:
    script = ROOT / "scripts" / name
    out = subprocess.run(["bash", str(script), "--help"], capture_output=True, text=True)
    assert f"scripts/{name}" in out.stdout
    assert subprocess.run(["bash", "-n", str(script)]).returncode == 0
