"""Graphs with quantised matrices against float graphs with the values that the codes stand for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from tests.support import qwen_models
from tests.support.quantised import quantised
from tests.support.run_graph import Runner, filled
from tests.support.selection_cases import LAYER, batch_of, random_weights
from tests.support.transformers_models import model_config, relative
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_decode, build_embed, build_prefill, build_vision
from trio_deploy.graphs.weight import PartValue
from trio_deploy.quant.schemes import StoredMatrix
from trio_deploy.runtimes.openvino import OvRuntime
from trio_deploy.selection.stage import build_select

DIALECTS = ("ort", "onnx", "primitive")
MODELS = {
    # Rows of 48 and 80: short blocks in `ort`, 8 bit in the others; of 64: blocks of 64.
    "llava": lambda: model_config(num_layers=2),
    "biases, tied": lambda: model_config(
        num_layers=2, hidden_size=128, head_dim=32, intermediate_size=192,
        qkv_bias=True, o_bias=True, mlp_bias=True, tie_word_embeddings=True,
    ),
    "qwen2_5_vl": lambda: qwen_models.model_config(
        "qwen2_5_vl", num_layers=2, hidden_size=128, intermediate_size=256
    ),
    "qwen3_vl": lambda: qwen_models.model_config(
        "qwen3_vl", num_layers=2, hidden_size=128, intermediate_size=256
    ),
}  # fmt: skip
CASES = [*((model, "int4") for model in MODELS), *(("llava", s) for s in ("int8", "int4-g32"))]
#: Error of logits where activations are rounded to 8 bit, for random weights of this size.
ROUNDED = 0.1


def options(dialect: str, scheme: str | None, config: ModelConfig, **more: Any) -> GraphOptions:
    positions = "renumber" if config.text.rope.axes is None else "original"
    return GraphOptions(dialect=dialect, quantize=scheme, positions=positions, **more)  # type: ignore[arg-type]


def prompt(config: ModelConfig, dtype: str = "float32") -> dict[str, np.ndarray]:
    """Feeds of a segment of all layers, and of a selection: three rows of a prompt."""
    feeds = {name: values[:3] for name, values in batch_of(config).items() if name != "width"}
    feeds |= {"width": np.array([19]), "past_lengths": np.zeros(3, np.int64)}
    feeds["inputs_embeds"] = feeds["hidden_states"].astype(dtype)
    feeds["hidden_states"] = feeds["inputs_embeds"]
    if config.text.rope.axes is not None:
        feeds["position_ids"] = np.repeat(feeds["position_ids"][:, None], 3, axis=1)
    empty = np.zeros((3, config.text.num_kv_heads, 0, config.text.head_dim), dtype)
    for layer in range(2):
        feeds |= {f"past.{layer}.key": empty, f"past.{layer}.value": empty}
        feeds[f"deepstack.{layer}"] = np.zeros((0, config.text.hidden_size), dtype)
    feeds["feature_index"] = np.full((3, 19), -1)
    return feeds


def pair(
    build: Any, dialect: str, scheme: str, config: ModelConfig, **more: Any
) -> tuple[ir.Model, dict[str, np.ndarray], ir.Model, dict[str, np.ndarray]]:
    """A quantised graph and its arrays, and a float one with the values that they stand for."""
    plain, coded = (build(options(dialect, each, config, **more)) for each in (None, scheme))
    arrays, values = quantised(coded, random_weights(plain, 1))
    return coded, arrays, plain, values


def segment(config: ModelConfig) -> Any:
    return lambda made: build_prefill(config, 0, 0, 2, made)


def selection(config: ModelConfig) -> Any:
    return lambda made: build_select(config, LAYER, made)


@pytest.mark.parametrize(("model", "scheme"), CASES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_segment_computes_with_the_values_of_its_codes(
    model: str, dialect: str, scheme: str
) -> None:
    config = MODELS[model]()
    coded, arrays, plain, values = pair(segment(config), dialect, scheme, config)
    feeds = prompt(config)
    got, want = Runner(coded, arrays)(feeds), Runner(plain, values)(feeds)
    bound = ROUNDED if dialect == "ort" else 1e-5
    assert relative(got["logits"], want["logits"]) < bound
    assert relative(got["present.0.key"], want["present.0.key"]) < bound


@pytest.mark.parametrize(("model", "scheme"), CASES)
@pytest.mark.parametrize("dialect", DIALECTS)
def test_a_selection_scores_with_the_values_of_its_codes(
    model: str, dialect: str, scheme: str
) -> None:
    config = MODELS[model]()
    coded, arrays, plain, values = pair(selection(config), dialect, scheme, config)
    feeds = prompt(config)
    got, want = Runner(coded, arrays)(feeds), Runner(plain, values)(feeds)
    assert relative(got["saliency"], want["saliency"]) < 1e-5
    assert np.array_equal(got["keep_index"], want["keep_index"])


@pytest.mark.parametrize(
    ("model", "scheme"), [("llava", "int8"), ("biases, tied", "int4"), ("qwen3_vl", "int4")]
)
def test_openvino_computes_with_the_values_of_the_codes(
    model: str, scheme: str, tmp_path: Path
) -> None:
    config, runtime = MODELS[model](), OvRuntime(threads=1)
    feeds = prompt(config)
    for name, build, bound, output in (
        ("prefill", segment(config), ROUNDED, "logits"),
        # Folded to float: products of codes with W, un-transposed, come out wrong.
        ("select", selection(config), 1e-5, "saliency"),
    ):
        coded, arrays, plain, values = pair(build, "primitive", scheme, config)
        file = tmp_path / f"{name}.onnx"
        onnx.save(filled(coded, arrays), file)
        engine = runtime.open(file, keep_precision=name == "select")
        got = engine.run({each: feeds[each] for each in engine.inputs})
        want = Runner(plain, values)(feeds)
        assert relative(got[output], want[output]) < bound
        assert engine.execution.activations == (None if name == "select" else "int8")


def names(model: ir.Model) -> dict[str, ir.Value]:
    graph = model.graph
    return {str(v.name): v for v in graph.initializers.values() if isinstance(v, PartValue)}


def test_segments_have_the_bits_of_the_scheme_and_selections_eight() -> None:
    config = MODELS["biases, tied"]()
    made = options("primitive", "int4", config)
    layers, select = names(segment(config)(made)), names(selection(config)(made))
    q_proj, head = "language_model.layers.1.self_attn.q_proj", "language_model.embed_tokens"
    assert layers[f"{q_proj}.weight.int4"].dtype == ir.DataType.INT4
    assert select[f"{q_proj}.weight.int8"].dtype == ir.DataType.INT8
    assert f"{head}.weight.int8" in layers and f"{head}.weight.int8" in select
    assert f"{head}.weight" not in layers
    assert layers[f"{q_proj}.bias"].dtype == ir.DataType.FLOAT


def test_towers_and_embeddings_stay_float() -> None:
    config = MODELS["qwen2_5_vl"]()
    made = options("ort", "int4", config)
    for model in (build_vision(config, made), build_embed(config, made)):
        assert {part.dtype for part in names(model).values()} == {ir.DataType.FLOAT}


@pytest.mark.parametrize("dialect", DIALECTS)
@pytest.mark.parametrize("size", [48, 128, 192])  # 48, 192: `ort` has a short last block
def test_tokens_are_looked_up_in_the_codes_of_a_tied_head(dialect: str, size: int) -> None:
    config = model_config(num_layers=2, hidden_size=size, tie_word_embeddings=True)
    coded, arrays, _, values = pair(lambda made: build_embed(config, made), dialect, "int4", config)
    table = "language_model.embed_tokens.weight"
    assert table not in names(coded) and f"{table}.int8" in names(coded)
    ids = np.array([[3, 0, config.text.vocab_size - 1], [5, 5, 1]])
    feeds = {
        "input_ids": ids,
        "image_features": np.full((1, size), 2, np.float32),
        "source_index": np.array([[0, 1, 2], [3, 1, 0]]),  # one place is the picture's
    }
    want = values[table][ids[[[0], [1]], feeds["source_index"] % 3]]
    want[1, 0] = 2
    for runtime in ("ort", "openvino") if dialect == "primitive" else ("ort",):
        got = Runner(coded, arrays, runtime)(feeds)["inputs_embeds"]
        np.testing.assert_array_equal(got, want.astype(np.float32))


def test_a_decode_graph_has_a_tied_table_once() -> None:
    config = MODELS["biases, tied"]()
    for dialect, scheme in (("primitive", "int4"), ("onnx", "nvfp4"), ("ort", "int8")):
        made = options(dialect, scheme, config, separate_decode=True)
        table = {
            name
            for name in names(build_decode(config, [(0, 1), (1, 2)], made))
            if name.startswith("language_model.embed_tokens")
        }
        assert table == {f"language_model.embed_tokens.weight.int8{end}" for end in ("", ".scale")}


def test_only_graphs_with_codes_of_4_bit_need_opset_21() -> None:
    config = MODELS["biases, tied"]()
    made = options("primitive", "int4", config)
    built = (segment(config)(made), selection(config)(made), build_embed(config, made))
    assert [model.graph.opset_imports[""] for model in built] == [21, 17, 17]
    made = options("primitive", "int8", config)
    assert segment(config)(made).graph.opset_imports[""] == 17


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
@pytest.mark.parametrize("dialect", DIALECTS)
def test_graphs_in_16_bit_have_the_types_of_their_operators(dialect: str, dtype: Any) -> None:
    config = MODELS["biases, tied"]()
    for build in (segment(config), selection(config), lambda made: build_embed(config, made)):
        model = build(options(dialect, "int4", config, dtype=dtype))
        arrays, _ = quantised(model, random_weights(build(options(dialect, None, config)), 1))
        onnx.checker.check_model(filled(model, arrays), full_check=dialect != "ort")


def test_a_weight_is_dequantised_once_per_selection() -> None:
    """With a scale per row of codes: ONNX Runtime is slow where blocks are named."""
    config = MODELS["llava"]()
    model = selection(config)(options("ort", "int8", config))
    nodes = [node for node in model.graph if node.op_type == "DequantizeLinear"]
    assert len(nodes) == 8  # seven matrices of the layer, and the head
    assert not any("block_size" in node.attributes for node in nodes)
    assert "MatMulNBits" not in {node.op_type for node in model.graph}


@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_graphs_dequantise_floats_of_4_bit_to_the_values_of_their_codes(
    dialect: str, dtype: Any
) -> None:
    """To the bit in float32, by onnx's own evaluator: ONNX Runtime has no such type."""
    config = MODELS["biases, tied"]()
    coded, arrays, plain, values = pair(segment(config), dialect, "nvfp4", config, dtype=dtype)
    proto = filled(coded, arrays)
    assert proto.opset_import[0].version == 23
    onnx.checker.check_model(proto, full_check=True)
    found = {value.name: value for value in plain.graph.initializers.values()}
    for layer in (0, 1):
        name = f"language_model.layers.{layer}.mlp.down_proj.weight"
        matrix = ReferenceEvaluator(part_of(proto, name)).run(None, {})[0]
        assert matrix.shape == tuple(found[name].shape)
        assert np.array_equal(matrix, values[name].astype(dtype))


def part_of(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """What computes one value of constants alone, as a model."""
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    needed, nodes = [output], []
    for node in reversed(model.graph.node):
        if set(node.output) & set(needed):
            nodes.insert(0, node)
            needed.extend(node.input)
    made = onnx.helper.make_graph(
        nodes,
        "part",
        [],
        [onnx.helper.make_value_info(output, onnx.TypeProto())],
        [constants[name] for name in dict.fromkeys(needed) if name in constants],
    )
    return onnx.helper.make_model(made, opset_imports=model.opset_import, ir_version=11)


@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
def test_products_in_fp8_round_what_they_multiply(dialect: str) -> None:
    """A Q/DQ pair per product, with the scale that belongs to its matrix."""
    config = MODELS["biases, tied"]()
    name = "language_model.layers.1.mlp.down_proj.weight"
    made = options(dialect, "fp8", config, inputs={name: 89.6})
    coded, plain = segment(config)(made), segment(config)(options(dialect, None, config))
    arrays, _ = quantised(coded, random_weights(plain, 1))
    proto = filled(coded, arrays)
    onnx.checker.check_model(proto, full_check=True)
    rounded = [node for node in proto.graph.node if node.op_type == "QuantizeLinear"]
    assert len(rounded) == 2 * 7
    constants = {tensor.name: tensor for tensor in proto.graph.initializer}
    scale = onnx.numpy_helper.to_array(constants[f"const.{name}.input_scale"])
    assert scale == np.float32(0.2)


def test_floats_of_4_bit_are_not_for_graphs_of_onnx_runtime() -> None:
    with pytest.raises(TrioError, match="no products with weights in nvfp4: choose the dialect"):
        GraphOptions(dialect="ort", quantize="nvfp4")


def test_weights_as_inputs_are_not_quantised() -> None:
    options = {"dialect": "onnx", "weights": "inputs", "quantize": "int4"}
    stored = {"language_model.layers.0.mlp.up_proj.weight": StoredMatrix(4, 128, False)}
    for has, way in ((None, "leave out quantize"), (stored, "use a float checkpoint")):
        with pytest.raises(TrioError, match=f"of their graphs.*choose weights constants, or {way}"):
            GraphOptions(**options, stored=has)


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(TrioError, match="unknown quantisation 'int3': choose one of int8, int4"):
        GraphOptions(quantize="int3")
