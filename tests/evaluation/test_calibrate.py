"""Calibration over questions, and exports in fp8 by what it measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from safetensors.numpy import load_file, save_file

from tests.support import bundles as shared
from tests.support.checkpoints import make_llava
from tests.support.quantised_checkpoints import quantise_checkpoint
from trio_deploy import ExportOptions, TrioError, calibrate, export_model
from trio_deploy.cli.main import main
from trio_deploy.config.options import Calibration
from trio_deploy.evaluation.configurations import Bundles, Source


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "red.png")
    entry = {"question_id": 1, "image": "red.png", "text": "Which colour is it?"}
    file = folder / "mine.jsonl"
    file.write_text(json.dumps(entry) + "\n")
    return file


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LLaVA-1.5 of 4 layers."""
    return make_llava(tmp_path_factory.mktemp("llava") / "c")


def test_every_matrix_of_every_layer_is_measured(questions: Path) -> None:
    found = calibrate("tiny", questions, progress=False)
    assert (found.source, found.questions) == ("mine.jsonl", 1)
    assert len(found.greatest) == 16 * 7 and all(most > 0 for most in found.greatest.values())
    layer = "language_model.layers.0.mlp"
    assert found.greatest[f"{layer}.gate_proj.weight"] == found.greatest[f"{layer}.up_proj.weight"]


@pytest.mark.parametrize(
    ("content", "said"),
    [(None, "there are no questions at"), ("", "holds no questions"), ("{", "line 1")],
)
def test_questions_that_cannot_be_read_are_refused(
    tmp_path: Path, content: str | None, said: str
) -> None:
    file = tmp_path / "questions.jsonl"
    if content is not None:
        file.write_text(content)
    with pytest.raises(TrioError, match=said):
        calibrate("tiny", file, progress=False)


def test_a_picture_that_cannot_be_read_is_named_with_its_question(
    questions: Path, tmp_path: Path
) -> None:
    (tmp_path / "red.png").write_bytes(b"no picture")
    file = tmp_path / "mine.jsonl"
    file.write_text(questions.read_text())
    with pytest.raises(TrioError, match="question 1: .*red.png"):
        calibrate("tiny", file, progress=False)


def made_up() -> Calibration:
    """One greatest value for all matrices of the shipped model's layers."""
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    greatest = {f"language_model.layers.{i}.{n}.weight": 8.0 for i in range(16) for n in names}
    return Calibration("mine.jsonl", 3, greatest)


@pytest.mark.parametrize("target", ["l4", "rtx-40"])
def test_engines_of_fp8_can_be_built_as_far_as_a_dry_run_says(target: str, tmp_path: Path) -> None:
    fp8: dict[str, Any] = {"quantize": "fp8", "target": target, "progress": False}
    export_model("tiny", tmp_path / "b", calibration=lambda _: made_up(), **fp8)
    assert main(["build", str(tmp_path / "b"), "--dry-run"]) == 0


def test_what_was_measured_is_recorded_and_needed(tmp_path: Path) -> None:
    found = made_up()
    fp8 = {"quantize": "fp8", "target": "l4", "progress": False}
    bundle = export_model("tiny", tmp_path / "b", calibration=lambda _: found, **fp8)
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.calibration == found
    other = Calibration("mine.jsonl", 3, dict(list(found.greatest.items())[1:]))
    for options, said in (
        (fp8, "have to be measured over questions .*trio export MODEL --target l4 --quantize fp8"),
        (fp8 | {"calibration": other}, "it is one of another model"),
        (fp8 | {"calibration": found, "quantize": "int8"}, "fp8 alone rounds"),
        (fp8 | {"calibration": found, "target": "rtx-30"}, "capability 8.6. does not take"),
        (fp8 | {"calibration": found, "target": "cpu"}, "no products with weights in fp8"),
    ):
        with pytest.raises(TrioError, match=said):
            export_model("tiny", tmp_path / "c", **options)
        assert not (tmp_path / "c").exists()


def test_a_recipe_that_names_fp8_is_calibrated_with_the_pruning_points_of_its_export(
    questions: Path, checkpoint: Path, tmp_path: Path
) -> None:
    """Unpruned, deep layers see other tokens, whose activations may be larger."""
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"description: in fp8\ncheckpoint: {checkpoint}\nquantize: fp8\n")
    asked: list[ExportOptions] = []

    def measure(options: ExportOptions) -> Calibration:
        asked.append(options)
        return calibrate(recipe, questions, options, progress=False)

    fp8 = {"calibration": measure, "target": "l4", "progress": False}
    found = {}
    for name, schedule in (("few", "1:0.05"), ("all", "3:1.0")):
        bundle = export_model(str(recipe), tmp_path / name, schedule=schedule, **fp8)
        assert bundle.manifest.quantization is not None
        found[name] = bundle.manifest.quantization.calibration
        assert str(asked[-1].schedule) == schedule
    few, whole = found["few"].greatest, found["all"].greatest
    differ = {int(name.split(".")[2]) for name in few if few[name] != whole[name]}
    assert differ and 0 not in differ  # layer 0 is before both points
    again = calibrate(recipe, questions, ExportOptions(schedule="1:0.05"), progress=False)
    assert again == found["few"]  # though another one was exported since


@pytest.mark.parametrize("command", ["eval", "tune"])
def test_commands_that_calibrate_nothing_say_what_does(
    command: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = f"{command} tiny --out {tmp_path / 'out'} --scenes 1 --quantize fp8"
    assert main([*asked.split(), "--target", "l4"]) == 1
    assert "--quantize fp8 --calibrate QUESTIONS --out OUT`" in capsys.readouterr().err
    assert main(asked.split()) == 1
    assert "ONNX Runtime does not take weights in fp8" in capsys.readouterr().err
    assert not list(tmp_path.rglob("manifest.json"))


def test_a_recipe_that_names_fp8_is_evaluated_in_floats_where_asked(
    checkpoint: Path, tmp_path: Path
) -> None:
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"description: in fp8\ncheckpoint: {checkpoint}\nquantize: fp8\n")
    bundles = Bundles(Source.open(recipe), tmp_path / "out", quantize="none")
    assert bundles.scheme is None


def test_what_is_quantised_or_a_bundle_is_refused(
    questions: Path, checkpoint: Path, tmp_path: Path, bundles: shared.Bundles
) -> None:
    quantised, _ = quantise_checkpoint(checkpoint, tmp_path, "awq", block=64)
    for model, said in (
        (quantised, "is quantised already, and calibration measures a float model"),
        (bundles.path("tiny", quantize="int8"), "is a bundle, and calibration exports one of its"),
    ):
        with pytest.raises(TrioError, match=said):
            calibrate(model, questions, progress=False)


def test_activations_that_are_not_numbers_are_refused_with_their_layer(
    questions: Path, checkpoint: Path, tmp_path: Path
) -> None:
    damaged = Path(shutil.copytree(checkpoint, tmp_path / "c"))
    file = damaged / "model.safetensors"
    tensors = load_file(file)
    (name,) = (n for n in tensors if n.endswith("layers.2.mlp.down_proj.weight"))
    tensors[name][0, 0] = np.nan
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(TrioError, match=r"layers\.3\..*is multiplied by is not finite"):
        calibrate(damaged, questions, ExportOptions(schedule="1:0.5"), progress=False)
