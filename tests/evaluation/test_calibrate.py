"""Calibration over questions, and exports in fp8 by what it measured."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from trio_deploy import export_model
from trio_deploy.config.options import Calibration
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.calibrate import calibrate


@pytest.fixture(scope="module")
def questions(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    Image.new("RGB", (64, 48), (200, 30, 30)).save(folder / "red.png")
    entry = {"question_id": 1, "image": "red.png", "text": "Which colour is it?"}
    file = folder / "mine.jsonl"
    file.write_text(json.dumps(entry) + "\n")
    return file


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


def test_what_was_measured_is_recorded_and_needed(tmp_path: Path) -> None:
    names = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
    names += ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
    found = Calibration(
        "mine.jsonl",
        3,
        {f"language_model.layers.{i}.{n}.weight": 8.0 for i in range(16) for n in names},
    )
    fp8 = {"quantize": "fp8", "target": "l4", "progress": False}
    bundle = export_model("tiny", tmp_path / "b", calibration=lambda: found, **fp8)
    assert bundle.manifest.quantization is not None
    assert bundle.manifest.quantization.calibration == found
    other = Calibration("mine.jsonl", 3, dict(list(found.greatest.items())[1:]))
    for options, said in (
        (fp8, "have to be measured: pass a file of questions"),
        (fp8 | {"calibration": other}, "it is one of another model"),
        (fp8 | {"calibration": found, "quantize": "int8"}, "fp8 alone rounds"),
        (fp8 | {"calibration": found, "target": "rtx-30"}, "capability 8.6. does not take"),
        (fp8 | {"calibration": found, "target": "cpu"}, "no products with weights in fp8"),
    ):
        with pytest.raises(TrioError, match=said):
            export_model("tiny", tmp_path / "c", **options)
        assert not (tmp_path / "c").exists()
