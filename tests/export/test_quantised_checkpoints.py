"""Quantised checkpoints from export to answers: their codes, their values, and what is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.checkpoints import make_llava
from tests.support.pictures import make_picture
from tests.support.quantised_checkpoints import DECODER, FORMS, quantise_checkpoint
from tests.support.qwen_checkpoints import make_qwen
from trio_deploy import Bundle, Pipeline, Request, check, export_model, plan
from trio_deploy.errors import TrioError
from trio_deploy.export.attach import attach_weights
from trio_deploy.quant.matrix import dequantised, round_to_nearest
from trio_deploy.quant.schemes import coded_part, decode
from trio_deploy.quant.stored_weight import Part
from trio_deploy.verify.report import format_report

SCHEDULE = "1:0.5,2:0.25"
GATE = "language_model.layers.1.mlp.gate_proj.weight"


@pytest.fixture(scope="module")
def folders(llava_checkpoint: Path, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Quantised and float checkpoints of the same values, by form."""
    root = tmp_path_factory.mktemp("quantised")
    return {f: quantise_checkpoint(llava_checkpoint, root / f, f) for f in FORMS}


def export(checkpoint: Path, out: Path, **options: Any) -> Bundle:
    options = {"schedule": SCHEDULE, "progress": False} | options
    return export_model(checkpoint, out, **options)


def answers(bundle: Bundle) -> list[list[int]]:
    pipeline = Pipeline.open(bundle, threads=1)
    questions = ("what color is the circle ?", "how many ?")
    requests = [
        Request(text, [make_picture(seed=i)], max_new_tokens=8, ignore_eos=True)
        for i, text in enumerate(questions)
    ]
    return [list(pipeline.generate(each).token_ids) for each in requests]


def with_rounded_head(plain: Path, out: Path) -> Path:
    """A float checkpoint whose head is what a quantised bundle's is, with a scale per row."""
    folder = Path(shutil.copytree(plain, out))
    tensors = load_file(folder / "model.safetensors")
    (name,) = (name for name in tensors if name.endswith("lm_head.weight"))
    tensors[name] = dequantised(round_to_nearest(tensors[name], 8, tensors[name].shape[1]))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("form", FORMS)
def test_codes_run_on_onnx_runtime_and_agree_with_their_values(folders, form, tmp_path) -> None:
    bundle = export(folders[form][0], tmp_path / "b")
    said = bundle.manifest.quantization
    assert said is not None and (said.scheme, said.bits, said.block) == ("int4-g32", 4, 32)
    assert (said.source, said.symmetric) == (form, form != "awq")
    tensors = bundle.manifest.tensors
    assert tensors[f"{GATE}.int4"].dtype == "uint8" and GATE not in tensors
    assert (f"{GATE}.int4.zero" in tensors) == (form == "awq")
    assert tensors["lm_head.weight.int8"].dtype == "uint8"
    report = check(bundle, checkpoint=folders[form][0], threads=1)
    assert report.passed, format_report(report)
    selections = [row for row in report.rows if row.stage.startswith("select")]
    assert selections and all(row.max_rel < 1e-5 for row in selections)
    # Its codes are the checkpoint's own, which transformers cannot load without other libraries.
    assert not any(row.stage.startswith("scheme") for row in report.rows)


def test_a_float_bundle_is_not_compared_with_a_quantised_checkpoint(folders, tmp_path) -> None:
    quantised, plain = folders["awq"]
    bundle = export(plain, tmp_path / "b")
    with pytest.raises(TrioError, match="the reference loads float checkpoints alone"):
        check(bundle, checkpoint=quantised, threads=1)


@pytest.mark.parametrize("dialect", ["ort", "primitive"])
def test_embeddings_that_are_quantised_and_tied_are_the_head_to_the_same_values(
    dialect, tmp_path
) -> None:
    source = make_llava(tmp_path / "source", tie=True)
    quantised, _ = quantise_checkpoint(
        source,
        tmp_path,
        "compressed-tensors",
        which=lambda name: DECODER.fullmatch(name) or name.endswith("embed_tokens.weight"),
    )
    bundle = export(quantised, tmp_path / "b", dialect=dialect)
    assert bundle.manifest.quantization is not None and bundle.manifest.quantization.head == "int4"

    def part(end: str) -> np.ndarray:
        place = bundle.manifest.tensors[f"language_model.embed_tokens.weight{end}"]
        raw = np.fromfile(bundle.path / place.file, np.uint8, place.nbytes, offset=place.offset)
        if place.dtype == "float32":
            return raw.view(np.float32).reshape(place.shape)
        return raw.reshape(coded_part(Part("", place.shape, place.dtype))[1])

    columns = bundle.config.text.hidden_size
    table, head = (
        decode(part(f".int{bits}"), part(f".int{bits}.scale"), bits, columns) for bits in (8, 4)
    )
    assert np.array_equal(head, table)


@pytest.mark.parametrize("embeddings", ["device", "host"])
def test_a_decode_graph_has_embeddings_that_are_quantised_and_tied(embeddings, tmp_path) -> None:
    """In 4 bit, of which the table in 8 bit is a copy."""
    source = make_llava(tmp_path / "source", tie=True)
    quantised, _ = quantise_checkpoint(
        source,
        tmp_path,
        "compressed-tensors",
        which=lambda name: DECODER.fullmatch(name) or name.endswith("embed_tokens.weight"),
    )
    bundle = export(quantised, tmp_path / "b", dialect="onnx", embeddings=embeddings)
    assert "decode" in bundle.stages
    report = check(bundle, runtime="onnxruntime", threads=1)
    assert report.passed, format_report(report)


@pytest.mark.parametrize("form", ["compressed-tensors", "awq"])
@pytest.mark.parametrize("dialect", ["primitive", "onnx"])
def test_graphs_in_floats_answer_as_the_float_checkpoint(folders, form, dialect, tmp_path) -> None:
    quantised, plain = folders[form]
    ours = export(quantised, tmp_path / "ours", dialect=dialect)
    report = check(ours, threads=1)
    assert report.passed, format_report(report)
    wanted = export(with_rounded_head(plain, tmp_path / "c"), tmp_path / "plain", dialect=dialect)
    assert answers(ours) == answers(wanted)


def test_openvino_answers_as_the_values_of_an_asymmetric_checkpoint(folders, tmp_path) -> None:
    bundle = export(folders["awq"][0], tmp_path / "b", target="cpu-openvino")
    assert f"{GATE}.int4.offset" in bundle.manifest.tensors
    report = check(bundle, runtime="openvino", threads=1)
    selections = [row for row in report.rows if row.stage.startswith("select")]
    assert selections and all(row.passed and row.max_rel < 1e-5 for row in selections)


def test_a_qwen_checkpoint_in_awq_as_on_the_hub(tmp_path) -> None:
    source = make_qwen(tmp_path / "source", "qwen2_vl", layout="hub")
    quantised, _ = quantise_checkpoint(source, tmp_path, "awq")
    bundle = export(quantised, tmp_path / "b", schedule="1:0.5")
    assert bundle.manifest.quantization is not None
    layers = bundle.config.text.num_layers
    coded = [name for name in bundle.manifest.tensors if name.endswith("proj.weight.int4")]
    assert len(coded) == 7 * layers
    report = check(bundle, threads=1)
    assert report.passed, format_report(report)


def test_what_is_float_stays_float(llava_checkpoint, tmp_path) -> None:
    def which(name: str) -> bool:
        return bool(DECODER.fullmatch(name)) and "layers.1.mlp" not in name

    source, _ = quantise_checkpoint(
        llava_checkpoint, tmp_path, "compressed-tensors", bits=8, block=64, which=which
    )
    bundle = export(source, tmp_path / "b", dialect="primitive")
    said, tensors = bundle.manifest.quantization, bundle.manifest.tensors
    assert said is not None and (said.scheme, said.bits, said.block) == ("int8", 8, 64)
    assert tensors[GATE].dtype == "float32"
    other = GATE.replace("layers.1", "layers.2")
    assert tensors[f"{other}.int8"].dtype == "int8" and other not in tensors
    report = check(bundle, threads=1)
    assert report.passed, format_report(report)


def test_a_scheme_beside_a_quantised_checkpoint_must_be_its_own(folders, tmp_path) -> None:
    source = folders["gptq"][0]
    export(source, tmp_path / "b", quantize="int4-g32")
    for other in ("int8", "int4", "none"):
        with pytest.raises(TrioError, match=f"--quantize {other} cannot .* quantised as int4-g32"):
            export(source, tmp_path / "c", quantize=other)
        with pytest.raises(TrioError, match=f"--quantize {other} cannot .* quantised as int4-g32"):
            plan(source, quantize=other, budget=0.5)
    assert plan(source, quantize="int4-g32", budget=0.5).fit.target.quantize == "int4-g32"
    with pytest.raises(TrioError, match="--link-weights keeps the checkpoint's files"):
        export(source, tmp_path / "c", link_weights=True)
    assert not (tmp_path / "c").exists()


def test_a_quantised_checkpoint_has_no_float_selections(folders, tmp_path) -> None:
    """A recipe or target that names them means float checkpoints."""
    with pytest.raises(TrioError, match="use the float checkpoint it was made from"):
        export(folders["awq"][0], tmp_path / "b", selections="float")
    assert not (tmp_path / "b").exists()
    target = tmp_path / "mine.yaml"
    target.write_text("runtime: onnxruntime\ndtype: float32\nselections: float\n")
    said = export(folders["awq"][0], tmp_path / "b", target=str(target)).manifest.quantization
    assert said is not None and said.selections == "int8"


def test_graphs_alone_take_the_weights_that_they_were_made_for(folders, tmp_path) -> None:
    quantised, plain = folders["awq"]
    graphs = export(quantised, tmp_path / "b", graphs_only=True)
    with pytest.raises(TrioError, match="made for a checkpoint in awq, not in float"):
        attach_weights(graphs, plain, progress=False)
    whole = attach_weights(graphs, quantised, progress=False)
    assert whole.manifest.tensors == export(quantised, tmp_path / "c").manifest.tensors
    alone = tmp_path / "alone"
    alone.mkdir()
    for file in quantised.iterdir():
        if file.suffix == ".json":
            (alone / file.name).write_bytes(file.read_bytes())
    with pytest.raises(TrioError, match="which of its matrices are is known from its weights"):
        export(alone, tmp_path / "d", graphs_only=True)
    with pytest.raises(TrioError, match="which of its matrices are is known from its weights"):
        plan(alone, budget=0.5)


def test_forms_that_cannot_be_read_are_refused_before_anything_is_written(
    folders, tmp_path
) -> None:
    folder = Path(shutil.copytree(folders["awq"][0], tmp_path / "c"))
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match=r"cannot be read \('?bitsandbytes'?\): use the fp32"):
        export(folder, tmp_path / "b")
    assert not (tmp_path / "b").exists()
