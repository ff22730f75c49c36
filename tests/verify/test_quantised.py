"""`trio check` of bundles with quantised weights, in every family."""

from __future__ import annotations

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import trio_deploy
from tests.support.bundles import Bundles
from tests.support.checkpoints import make_llava, make_llava_next
from tests.support.pictures import make_picture
from tests.support.quantised import calibration_of
from tests.support.qwen_checkpoints import make_qwen
from trio_deploy import Bundle, Pipeline, TrioError, check, export_model
from trio_deploy.cli.main import main
from trio_deploy.reference import restore
from trio_deploy.verify.check import record
from trio_deploy.verify.report import format_report

TINY = Path(trio_deploy.__file__).parent / "data" / "tiny"

#: Model, what it is exported with, runtime; what activations are rounded to.
CASES: dict[str, tuple[Any, dict[str, Any], dict[str, Any], str, str | None]] = {
    "llava, tied": (
        make_llava,
        {"tie": True},
        {"quantize": "int4", "dialect": "ort"},
        "onnxruntime",
        "int8",
    ),
    "llava_next": (
        make_llava_next,
        {"mistral": True, "layout": "hub", "dtype": "bfloat16"},
        {"quantize": "int8", "target": "cpu-openvino", "dtype": "float32"},
        "openvino",
        "int8",
    ),
    "llava, tied, float selections": (  # with a float copy of the table for the head
        make_llava,
        {"tie": True},
        {"quantize": "int4", "selections": "float", "dialect": "ort"},
        "onnxruntime",
        "int8",
    ),
    "qwen2_vl, tied": (  # its steps are a graph that has the table, too
        lambda to, **more: make_qwen(to, "qwen2_vl", **more),
        {"tie": True},
        {"quantize": "int4", "dialect": "onnx"},
        "onnxruntime",
        None,
    ),
    "qwen2_5_vl, float selections": (
        lambda to, **more: make_qwen(to, "qwen2_5_vl", **more),
        {},
        {
            "quantize": "int8",
            "selections": "float",
            "target": "cpu-openvino",
            "dtype": "float32",
        },
        "openvino",
        "int8",
    ),
    "qwen2_5_vl, tied": (
        lambda to, **more: make_qwen(to, "qwen2_5_vl", **more),
        {"tie": True},
        {"quantize": "int4-g32", "dialect": "ort"},
        "onnxruntime",
        "int8",
    ),
    "qwen3_vl": (
        lambda to, **more: make_qwen(to, "qwen3_vl", **more),
        {},
        {"quantize": "int4", "dialect": "primitive"},
        "onnxruntime",
        None,
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_a_quantised_bundle_agrees_with_the_values_of_its_codes(name: str, tmp_path: Path) -> None:
    make, model, options, runtime, activations = CASES[name]
    make(tmp_path / "checkpoint", **model)
    bundle = export_model(
        tmp_path / "checkpoint", tmp_path / "b", schedule="1:0.5,2:0.3", progress=False, **options
    )
    report = check(bundle, runtime=runtime, threads=1)
    assert report.passed, format_report(report)
    assert report.ran_as is not None
    assert report.ran_as.quantized == options["quantize"]
    assert report.ran_as.activations == activations
    assert f"the values of its {options['quantize']} weights" in report.title
    selections = [row for row in report.rows if row.stage.startswith("select")]
    assert len(selections) == 2 and all(row.max_rel < 1e-5 for row in selections)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_graphs_that_round_activations_agree_without_that_rounding(
    family: str, tmp_path: Path
) -> None:
    """By scales that were measured over a question, as `trio export --calibrate` does."""
    make_qwen(tmp_path / "checkpoint", family)
    make_picture(64, 48).save(tmp_path / "picture.png")
    entry = {"question_id": 1, "image": "picture.png", "text": "what color ?"}
    (tmp_path / "questions.jsonl").write_text(json.dumps(entry))
    recipe = tmp_path / "recipe.yaml"
    points = "[{layer: 0, keep: 0.15, method: divprune}, {layer: 2, keep: 0.085}]"
    recipe.write_text(f"checkpoint: {tmp_path / 'checkpoint'}\nschedules: {{'0.111': {points}}}\n")
    words = f"export {recipe} --out {tmp_path / 'b'}"
    words += f" --quantize fp8 --calibrate {tmp_path / 'questions.jsonl'} --target l4"
    assert main([*words.split(), "--dtype", "float32"]) == 0
    report = check(tmp_path / "b", runtime="onnxruntime", threads=1)
    assert report.passed, format_report(report)
    assert report.ran_as is not None and report.ran_as.activations == "fp8"
    floats = [row for row in report.rows if row.stage.endswith(", float activations")]
    assert {row.stage.partition("_")[0] for row in floats} == {"prefill"}
    assert len(floats) == 4 and all(row.max_rel < 1e-5 for row in floats)


@pytest.mark.parametrize(
    ("options", "runtime"),
    [
        ({"quantize": "int8"}, "onnxruntime"),
        ({"quantize": "int4"}, "onnxruntime"),
        ({"quantize": "int8", "target": "cpu-openvino", "dtype": "float32"}, "openvino"),
        ({"quantize": "fp8", "target": "l4", "dtype": "float32"}, "onnxruntime"),
        ({"quantize": "fp8", "target": "l4"}, "onnxruntime"),
    ],
)
def test_a_tenth_of_a_matrix_that_is_wrong_is_noticed(
    options: dict[str, Any], runtime: str, bundles: Bundles, tmp_path: Path
) -> None:
    """Of the matrix that moves least, where activations are rounded to 8 bit anyway."""
    if options["quantize"] == "fp8":
        options = options | {"calibration": calibration_of(TINY)}
    bundle = record(bundles.copy(tmp_path / "b", "tiny", **options), runtime=runtime, threads=1)
    assert check(bundle, golden=True, runtime=runtime, threads=1).passed
    name = f"language_model.layers.8.mlp.gate_proj.weight.{options['quantize']}"
    place = bundle.manifest.tensors[name]
    codes = np.memmap(bundle.path / place.file, np.uint8, "r+", place.offset, (place.nbytes // 10,))
    rng, narrow = np.random.default_rng(0), options["quantize"] == "fp8"
    codes[:] = rng.permutation(codes) if narrow else rng.integers(0, 256, codes.shape)  # no NaN
    codes.flush()
    report = check(bundle, golden=True, runtime=runtime, threads=1)
    damaged = next(s.label for s in bundle.of_kind("prefill") if 8 in s.layers)
    failed = {row.stage.partition(" (")[0] for row in report.rows if not row.passed}
    if narrow:  # the rounding of activations hides it
        damaged += ", float activations"
    assert damaged in failed  # and the selection that reads the same codes, if there is one


@pytest.mark.parametrize("selections", ["int8", "float"])
def test_selections_are_compared_with_their_own_values(
    selections: str, bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reference of a selection has codes of 8 bit, or floats, where its layer has 4."""
    monkeypatch.setattr(restore, "selection_weights", lambda *_: lambda layer: nullcontext())
    report = check(bundles.path("tiny", quantize="int4", selections=selections), threads=1)
    failed = [row.stage for row in report.rows if not row.passed]
    assert failed == ["select_3"]  # those before it read no matrix


def test_the_cost_of_a_scheme_is_shown_beside_the_graphs(bundles: Bundles) -> None:
    report = check(bundles.path("tiny", quantize="int8"), checkpoint=TINY, threads=1)
    assert report.passed, format_report(report)
    points = [row for row in report.rows if row.stage.startswith("scheme, point")]
    assert len(points) == 3
    assert points[0].overlap == 1 and all(row.overlap > 0.9 for row in points)
    assert {row.stage for row in report.rows} >= {"processor", "scheme, answer 0"}


def test_low_memory_is_refused(bundles: Bundles) -> None:
    bundle = Bundle.load(bundles.path("tiny", quantize="int4"))
    with pytest.raises(TrioError, match="quantised weights cannot be kept in the page cache alone"):
        Pipeline.open(bundle, low_memory=True)
