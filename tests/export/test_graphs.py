"""build_graphs: which stages there are, that every weight is used, and what building costs."""

from __future__ import annotations

import resource
import time
from dataclasses import replace

import pytest

from tests.support.transformers_models import model_config
from trio_deploy import TrioError
from trio_deploy.export.graphs import build_graphs
from trio_deploy.families.base import ModelConfig, RopeConfig, TextConfig, VisionConfig
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.schedule.methods import METHODS
from trio_deploy.schedule.schedule import PruningPoint

DIALECTS = ("ort", "onnx", "primitive")
dialects = pytest.mark.parametrize("dialect", DIALECTS)


def points(*layers: int) -> tuple[PruningPoint, ...]:
    return tuple(PruningPoint(layer, 0.5) for layer in layers)


LLAVA_NEXT_7B = ModelConfig(
    family="llava_next",
    vision=VisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu", (23,), True),
    text=TextConfig(4096, 11008, 32, 32, 32, 128, 32064, 4096, 1e-5, RopeConfig(10000.0)),
    projector_act="gelu",
    projector_bias=True,
    image_token_id=32000,
    grid_pinpoints=((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008)),
)


@dialects
def test_stages_come_in_the_order_in_which_they_run(dialect: str) -> None:
    names = list(build_graphs(model_config(), points(1, 2), GraphOptions(dialect=dialect)))
    expected = ["vision", "embed", "prefill_0", "select_1", "prefill_1", "select_2", "prefill_2"]
    assert names == expected + (["decode"] if dialect == "onnx" else [])


def test_without_pruning_there_is_one_segment() -> None:
    assert list(build_graphs(model_config(), points(), GraphOptions())) == [
        "vision",
        "embed",
        "prefill_0",
    ]


def test_pruning_before_the_first_layer_leaves_no_empty_segment() -> None:
    graphs = build_graphs(model_config(), points(0, 2), GraphOptions(separate_decode=True))
    assert list(graphs) == [
        "vision",
        "embed",
        "select_1",
        "prefill_1",
        "select_2",
        "prefill_2",
        "decode",
    ]
    assert graphs["prefill_1"].graph.inputs[0].name == "hidden_states"
    positions = next(v for v in graphs["decode"].graph.inputs if v.name == "position_ids")
    assert positions.shape[1] == 2


@pytest.mark.parametrize("layers", [(2, 1), (1, 1), (-1,), (3,), (1, 7)])
def test_layers_out_of_order_or_range_are_an_error(layers: tuple[int, ...]) -> None:
    with pytest.raises(TrioError, match="must increase"):
        build_graphs(model_config(), points(*layers), GraphOptions())


@dialects
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_no_graph_declares_an_input_that_nothing_reads(
    dialect: str, separate: bool, method: str
) -> None:
    """TensorRT and OpenVINO may drop such an input, and what feeds it then fails."""
    places = tuple(replace(point, method=method) for point in points(1, 2))
    options = GraphOptions(dialect=dialect, separate_decode=separate)
    for stage, model in build_graphs(model_config(), places, options).items():
        unread = [value.name for value in model.graph.inputs if not value.uses()]
        assert not unread, stage


@dialects
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_of_the_checkpoint_is_used_and_nothing_else(dialect: str, dtype: str) -> None:
    config = model_config(
        family="llava_next", grid_pinpoints=((28, 56),), qkv_bias=True, o_bias=True
    )
    options = GraphOptions(dialect=dialect, dtype=dtype)
    used = {}
    for model in build_graphs(config, points(1, 2), options).values():
        for name, value in model.graph.initializers.items():
            if value.const_value is None:
                used[name] = tuple(value.shape)
                assert (
                    value.dtype.name
                    == {
                        "float32": "FLOAT",
                        "float16": "FLOAT16",
                        "bfloat16": "BFLOAT16",
                    }[dtype]
                )
    assert used == canonical_tensors(config)


@dialects
def test_tied_embeddings_need_no_head_weight(dialect: str) -> None:
    config = model_config(tie_word_embeddings=True)
    for model in build_graphs(
        config,
        points(
            1,
        ),
        GraphOptions(dialect=dialect),
    ).values():
        assert "lm_head.weight" not in model.graph.initializers


@dialects
@pytest.mark.parametrize(("tied", "scheme"), [(False, None), (True, None), (True, "int4")])
def test_no_stage_has_one_name_twice_or_carries_big_constants(
    tied: bool, scheme: str | None, dialect: str
) -> None:
    for stage, model in build_graphs(
        model_config(tie_word_embeddings=tied),
        points(1, 2),
        GraphOptions(dialect=dialect, quantize=scheme, separate_decode=True),
    ).items():
        names = [v.name for v in (*model.graph.inputs, *model.graph.initializers.values())]
        names += [v.name for node in model.graph.all_nodes() for v in node.outputs]
        assert len(names) == len(set(names)), stage
        for value in model.graph.initializers.values():
            assert value.const_value is None or value.const_value.nbytes <= 1 << 18, value.name


@dialects
def test_llava_next_7b_builds_in_seconds_and_without_weights(dialect: str) -> None:
    start, peak = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    graphs = build_graphs(LLAVA_NEXT_7B, points(1, 10, 15), GraphOptions(dialect=dialect))
    # A second or two of the processor's; more where other work has its caches.
    assert time.process_time() - start < 15
    assert len(graphs) >= 9
    # What it adds to the peak of whatever this process has tested before: some 20 MiB, in KiB.
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 256 << 10
