"""The written configurations against Triton's own message definition and the graphs themselves.

This needs tritonclient, which the Triton server's environment has (`make server-tests`). Its server
has no onnxruntime backend, so the stages' models are opened by ONNX Runtime from where they lie.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from tests.support.bundles import Bundles
from trio_deploy import Bundle, Pipeline, Request, RuntimeOptions
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.prompt import collate
from trio_deploy.runtimes.registry import open_engine
from trio_deploy.serve.triton_server.repository import Options, write_repository

model_config = pytest.importorskip(
    "tritonclient.grpc.model_config_pb2",
    reason="tritonclient is in the Triton server's environment: make server-tests",
)
text_format = pytest.importorskip("google.protobuf.text_format")
onnx = pytest.importorskip("onnx")


@pytest.fixture(scope="module", params=["ort", "primitive"])
def served(
    request, tmp_path_factory: pytest.TempPathFactory, bundles: Bundles
) -> tuple[Bundle, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    bundle = Bundle.load(bundles.path("tiny", budget=0.111, dialect=request.param))
    write_repository(
        bundle,
        folder / "models",
        Options(stages=True, runtime=RuntimeOptions(runtime="onnxruntime")),
    )
    return bundle, folder / "models"


def read(folder: Path):
    """The model's configuration, as Triton reads it: an unknown field or value is an error."""
    return text_format.Parse((folder / "config.pbtxt").read_text(), model_config.ModelConfig())


def tensors(entries) -> dict[str, tuple[str, list[int]]]:
    name = model_config.DataType.Name
    return {entry.name: (name(entry.data_type), list(entry.dims)) for entry in entries}


def test_every_configuration_is_valid_and_named_after_its_folder(served):
    _, models = served
    for folder in (f for f in models.iterdir() if f.is_dir()):
        assert read(folder).name == folder.name
        assert (folder / "1").is_dir()


def test_stage_configurations_say_what_the_graphs_take_and_give(served):
    bundle, models = served
    kinds = {1: "TYPE_FP32", 7: "TYPE_INT64", 9: "TYPE_BOOL", 10: "TYPE_FP16"}

    def of_graph(values) -> dict[str, tuple[str, list[int]]]:
        return {
            v.name: (
                kinds[v.type.tensor_type.elem_type],
                [-1 if d.dim_param else d.dim_value for d in v.type.tensor_type.shape.dim],
            )
            for v in values
        }

    for stage in bundle.stages:
        config = read(models / f"trio_{stage}")
        file = models / f"trio_{stage}" / "1" / "model.onnx" / "model.onnx"
        graph = onnx.load(file, load_external_data=False).graph
        assert tensors(config.input) == of_graph(graph.input)
        assert tensors(config.output) == of_graph(graph.output)
        assert config.backend == "onnxruntime"
        assert config.max_batch_size == 0


def test_the_model_that_answers_streams_and_needs_no_input(served):
    _, models = served
    config = read(models / "trio_vlm")
    assert config.model_transaction_policy.decoupled
    assert config.input and all(entry.optional for entry in config.input)


def test_the_ensemble_connects_tensors_of_equal_type_and_shape(served):
    _, models = served
    ensemble = read(models / "trio_embeddings")
    known = tensors(ensemble.input)
    for step in ensemble.ensemble_scheduling.step:
        model = read(models / step.model_name)
        for inner, outer in step.input_map.items():
            assert tensors(model.input)[inner][0] == known[outer][0]
            assert len(tensors(model.input)[inner][1]) == len(known[outer][1])
        assert set(step.input_map) == set(tensors(model.input))
        for inner, outer in step.output_map.items():
            known[outer] = tensors(model.output)[inner]
    assert set(tensors(ensemble.output)) <= set(known)


def test_stages_run_from_their_folders_and_lead_to_the_pipelines_first_token(served):
    """Composed by hand, as a client of the single models would, in the order of the stages."""
    bundle, models = served
    scene = scenes.generate(scenes.TEST_SEEDS[0])
    request = Request(scene.questions[0].text, [scene.image], max_new_tokens=1)
    pipeline = Pipeline.open(bundle, runtime="onnxruntime")
    prepared = pipeline.prepare(request)
    prompt, (image,) = prepared.prompt, prepared.processed
    expected = pipeline.generate_batch([request])[0]

    def run(stage: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
        engine = open_engine(models / f"trio_{stage}" / "1" / "model.onnx" / "model.onnx")
        none = {
            name: np.zeros((1, spec.shape[1], 0, spec.shape[3]), spec.dtype)
            for name, spec in engine.inputs.items()
            if name.startswith("past.")
        }
        return engine.run(none | feeds)

    features = run("vision", pixel_values=image.feeds["pixel_values"])["image_features"]
    batch = collate([prompt], [[image]])
    hidden = run(
        "embed",
        input_ids=batch.input_ids,
        image_features=features,
        source_index=batch.source_index,
    )["inputs_embeds"]
    positions, lengths, visual = batch.position_ids, batch.lengths, batch.visual_mask
    zero = np.zeros(1, np.int64)
    keeps = iter(bundle.schedule.resolve(prompt.visual_tokens))
    for stage in list(bundle.stages)[2:]:
        if stage.startswith("select_"):
            keep = np.array([next(keeps)])
            width = lengths - visual.sum() + keep
            out = run(
                stage,
                hidden_states=hidden,
                position_ids=positions,
                lengths=lengths,
                visual_mask=visual,
                keep=keep,
                width=width,
            )
            hidden, positions = out["hidden_states_out"], out["position_ids_out"]
            lengths, visual = out["lengths_out"], out["visual_mask_out"]
        else:
            name = "inputs_embeds" if stage == "prefill_0" else "hidden_states"
            out = run(
                stage,
                **{name: hidden},
                position_ids=positions,
                lengths=lengths,
                past_lengths=zero,
            )
            hidden = out.get("hidden_states_out", out.get("hidden_states"))
    assert out["logits"].argmax() == expected.token_ids[0]
