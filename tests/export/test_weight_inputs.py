"""Weights as inputs of the graphs: the same answers, from one copy of the matrices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.pictures import make_picture
from trio_deploy import Bundle, Pipeline, Request, TrioError, export_model, plan
from trio_deploy.bundle.describe import inspect
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.cli.main import main
from trio_deploy.export.attach import attach_weights
from trio_deploy.runtimes.registry import open_engine
from trio_deploy.serve.triton_server.repository import Options, write_repository

SCHEDULE = "0:0.7:divprune,1:0.4,2:0.2"


def exported(checkpoint: Path, out: Path, weights: str, **options: Any) -> Bundle:
    return export_model(
        checkpoint,
        out,
        schedule=SCHEDULE,
        dialect="onnx",
        weights=weights,
        progress=False,
        **options,
    )


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory, llava_next_checkpoint: Path) -> Bundle:
    return exported(llava_next_checkpoint, tmp_path_factory.mktemp("inputs") / "bundle", "inputs")


def requests() -> list[Request]:
    """Rows with one picture, with none."""
    picture = {"type": "image"}
    text = {"type": "text", "text": "what color is the circle ?"}
    return [
        Request([{"role": "user", "content": [picture, text]}], [make_picture(90, 60)]),
        Request([{"role": "user", "content": [text]}], []),
    ]


def test_answers_are_those_of_weights_as_constants(
    bundle: Bundle, tmp_path: Path, llava_next_checkpoint: Path
) -> None:
    constants = exported(llava_next_checkpoint, tmp_path / "constants", "constants")
    answers = [
        Pipeline.open(each, threads=1).generate_batch(requests()) for each in (bundle, constants)
    ]
    for mine, theirs in zip(*answers, strict=True):
        assert len(mine.token_ids) > 1
        assert mine.token_ids == theirs.token_ids
        assert all(map(np.array_equal, mine.kept, theirs.kept))


def test_matrices_are_inputs_and_vectors_constants(bundle: Bundle) -> None:
    for stage in bundle.manifest.stages:
        graph = onnx.load(bundle.graph(stage.name), load_external_data=False).graph
        shapes = {
            entry.name: [dim.dim_value for dim in entry.type.tensor_type.shape.dim]
            for entry in graph.input
        }
        names = [entry.name for entry in graph.input]
        assert names == [tensor.name for tensor in stage.inputs] + list(stage.weight_inputs)
        for name, place in bundle.places(stage.name).items():
            assert (name in stage.weight_inputs) == (len(place.shape) > 1)
            if name in stage.weight_inputs:
                assert tuple(shapes[name]) == place.shape
        outside = {
            tensor.name
            for tensor in graph.initializer
            if tensor.data_location == onnx.TensorProto.EXTERNAL
        }
        assert outside == set(stage.constants)


def test_stages_read_one_copy_of_a_matrix(bundle: Bundle) -> None:
    pipeline = Pipeline.open(bundle, threads=1)
    one, other = (pipeline.engine(name)._bound for name in ("select_2", "prefill_2"))  # type: ignore[attr-defined]
    assert set(one) & set(other)
    for name in set(one) & set(other):
        assert one[name].data_ptr() == other[name].data_ptr()


def test_an_engine_opened_alone_takes_its_weights_as_feeds(bundle: Bundle) -> None:
    stage = bundle.stages["embed"]
    assert set(stage.weight_inputs) < set(open_engine(bundle.graph("embed")).inputs)


def test_graphs_get_their_weights_later(
    bundle: Bundle, tmp_path: Path, llava_next_checkpoint: Path
) -> None:
    out = tmp_path / "graphs"
    exported(llava_next_checkpoint, out, "inputs", graphs_only=True)
    completed = attach_weights(out, llava_next_checkpoint, progress=False)
    answers = [
        Pipeline.open(each, threads=1).generate_batch(requests()) for each in (completed, bundle)
    ]
    assert [a.token_ids for a in answers[0]] == [a.token_ids for a in answers[1]]


def test_inspect_says_how_many_weights_are_inputs(bundle: Bundle) -> None:
    count = len(bundle.stages["decode"].weight_inputs)
    assert f"{count} weights, which the runtime binds" in inspect(bundle)
    bundle.check_places()


def test_a_manifest_that_names_another_input_is_refused(bundle: Bundle) -> None:
    raw = json.loads((bundle.path / MANIFEST).read_bytes())
    raw["stages"][0]["weight_inputs"].append("nothing.weight")
    with pytest.raises(TrioError, match="takes nothing.weight as an input, which is not among"):
        type(bundle.manifest).from_json(raw)


@pytest.mark.parametrize("dialect", ["ort", "primitive"])
def test_graphs_that_would_transpose_them_at_every_run_are_refused(
    tmp_path: Path, dialect: str
) -> None:
    with pytest.raises(TrioError, match=f"{dialect} graphs cannot take their weights as inputs"):
        export_model("tiny", tmp_path / "out", dialect=dialect, weights="inputs", progress=False)
    assert not (tmp_path / "out").exists()


def test_a_target_chooses_them(tmp_path: Path, llava_next_checkpoint: Path) -> None:
    target = tmp_path / "mine.yaml"
    target.write_text("runtime: onnxruntime\ndialect: onnx\ndtype: float32\nweights: inputs\n")
    made = export_model(
        llava_next_checkpoint, tmp_path / "out", target=target, schedule=SCHEDULE, progress=False
    )
    assert made.stages["prefill_2"].weight_inputs


def test_triton_is_not_given_stages_that_need_their_weights_with_each_request(
    bundle: Bundle, tmp_path: Path
) -> None:
    with pytest.raises(TrioError, match="leave out --stages"):
        write_repository(bundle, tmp_path / "out", Options(stages=True))


def test_the_oracle_finds_no_difference(
    bundle: Bundle, llava_next_checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["check", str(bundle.path), "--checkpoint", str(llava_next_checkpoint)]) == 0


def test_a_plan_counts_a_matrix_once_for_all_engines(tmp_path: Path) -> None:
    """LLaVA-NeXT-7B in float16: 13.2 GiB, where `separate` engines hold 27 GiB."""
    from trio_deploy.runtimes.tensorrt.memory import Memory

    text = 'runtime: tensorrt\ntensorrt: "10.15"\ndialect: onnx\ndtype: float16\nmemory_gib: 24\n'
    found: dict[str, Memory] = {}
    for weights in ("constants", "inputs"):
        target = tmp_path / f"{weights}.yaml"
        target.write_text(f"{text}weights: {weights}\n")
        fit = plan("llava-next-7b", target=target).fit
        assert fit is not None
        found[weights] = fit.layouts[0]
    held = 7_060_000_000 * 2  # parameters of the tower's used layers, connector and model
    assert found["inputs"].all_weights == pytest.approx(held, rel=0.02)
    assert found["constants"].all_weights > 1.9 * found["inputs"].all_weights
