"""Engines against ONNX Runtime by Polygraphy; TensorRT is simulated."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from tests.support.engines import KINDS, build, export_for, make_target
from tests.support.fakes.tensorrt.install import Simulation, install
from trio_deploy import Bundle, RuntimeOptions, TrioError, check
from trio_deploy.cli import main as cli
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.openvino import OvRuntime
from trio_deploy.runtimes.registry import load_target, open_runtime
from trio_deploy.runtimes.tensorrt.profiles import profiles
from trio_deploy.verify.compare import TOLERANCES
from trio_deploy.verify.engines import compare_engines

SCHEDULE = "1:0.4,2:0.2"
CORNERS = ("min", "opt", "max")
CHECKED = [KINDS[0], KINDS[1], KINDS[3]]


class Built:
    """A bundle with engines, for each kind of target made once."""

    def __init__(self, folder: Path, checkpoint: Path) -> None:
        self._folder, self._checkpoint = folder, checkpoint
        self._made: dict[tuple[str, str, str], tuple[Bundle, Path]] = {}

    def get(
        self, kind: tuple[str, str, str], patch: pytest.MonkeyPatch
    ) -> tuple[Bundle, Path, Simulation]:
        simulation = install(patch, kind[0])
        if kind not in self._made:
            folder = self._folder / "-".join(kind)
            folder.mkdir()
            target = make_target(folder, *kind)
            bundle = export_for(self._checkpoint, folder, target, SCHEDULE)
            build(bundle, target, simulation)
            self._made[kind] = bundle, target
        return *self._made[kind], simulation


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, llava_next_checkpoint: Path) -> Built:
    return Built(tmp_path_factory.mktemp("checked"), llava_next_checkpoint)


@pytest.mark.parametrize("kind", CHECKED, ids="-".join)
def test_right_engines_pass_at_three_shapes_a_profile(
    built: Built, monkeypatch: pytest.MonkeyPatch, kind: tuple[str, str, str]
) -> None:
    bundle, _, _ = built.get(kind, monkeypatch)
    report = check(bundle, runtime="tensorrt")
    assert report.passed, [row for row in report.rows if not row.passed]
    rows = [row.stage for row in report.rows]
    for stage in bundle.stages:
        turns = kind[2] == "shared" and (stage == "embed" or stage.startswith("prefill_"))
        for which in ("prefill ", "decode ") if turns else ("",):
            assert all(f"{stage} [{which}{corner}]" in rows for corner in CORNERS)
    assert "against ONNX Runtime" in report.title
    assert {"answer 0", "answer 1", "answer 2", "answer 0, alone"} <= set(rows)


WRONG = [
    (KINDS[1], "vision", "image_features"),
    (KINDS[1], "embed", "inputs_embeds"),
    (KINDS[1], "prefill_1", "hidden_states_out"),
    (KINDS[1], "prefill_2", "logits"),
    (KINDS[1], "select_1", "saliency"),
    (KINDS[3], "prefill_0", "present.0.value"),
    (KINDS[3], "decode", "logits"),
]


@pytest.mark.parametrize(("kind", "stage", "tensor"), WRONG)
def test_a_wrong_engine_fails_and_its_tensor_is_named(
    built: Built,
    monkeypatch: pytest.MonkeyPatch,
    kind: tuple[str, str, str],
    stage: str,
    tensor: str,
) -> None:
    bundle, target, simulation = built.get(kind, monkeypatch)
    simulation.tensorrt.spoiled[stage] = tensor
    reference, engines = OrtRuntime(threads=1), open_runtime(RuntimeOptions("tensorrt"), bundle)
    rows = compare_engines(
        profiles(bundle, load_target(target)),
        lambda stage: reference.open(bundle.graph(stage)),
        lambda stage: engines.open(bundle.graph(stage)),
        TOLERANCES["float32"],
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
    )
    failed = {row.stage: row for row in rows if not row.passed}
    assert {name.split(" ")[0] for name in failed} == {stage}, "the wrong engine alone"
    for corner in ("opt", "max"):
        row = next(row for name, row in failed.items() if corner in name)
        assert tensor in row.problem


def test_the_command_line_says_so_by_its_exit_status(
    tmp_path: Path,
    llava_checkpoint: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    simulation = install(monkeypatch, KINDS[1][0])
    target = make_target(tmp_path, *KINDS[1])
    bundle = export_for(llava_checkpoint, tmp_path, target, SCHEDULE)
    build(bundle, target, simulation)
    arguments = ["check", str(bundle.path), "--runtime", "tensorrt", "--target", target.stem]
    assert cli.main([*arguments, "--record"]) == 0
    assert "prefill_0 [" in capsys.readouterr().out
    simulation.tensorrt.spoiled["prefill_1"] = "hidden_states_out"
    assert cli.main([*arguments, "--golden", "--json"]) == 1
    problems = [row["problem"] for row in json.loads(capsys.readouterr().out)["rows"]]
    assert any("hidden_states_out differs" in problem for problem in problems)


def test_openvino_is_compared_in_the_same_way(tmp_path: Path, llava_next_checkpoint: Path) -> None:
    """An independent runtime for the same graphs, and no simulation."""
    target = make_target(tmp_path, *KINDS[1])
    bundle = export_for(llava_next_checkpoint, tmp_path, target, SCHEDULE)
    found = profiles(bundle, load_target(target))
    reference, openvino = OrtRuntime(threads=1), OvRuntime(threads=1)
    rows = compare_engines(
        found,
        lambda stage: reference.open(bundle.graph(stage)),
        lambda stage: openvino.open(bundle.graph(stage)),
        TOLERANCES["float32"],
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
    )
    assert len(rows) >= 3 * sum(map(len, found.values()))
    assert all(row.passed for row in rows), [row for row in rows if not row.passed]


def test_without_polygraphy_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "polygraphy.backend.base", None)
    with pytest.raises(
        TrioError, match=r"needs Polygraphy .*pip install 'trio-deploy\[tensorrt\]'"
    ):
        compare_engines({}, None, None, TOLERANCES["float32"], threshold=0.8, stages={})
