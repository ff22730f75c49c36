"""Analytic saliency against autograd: head layouts, biases, rope, probes, padding, precision."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from onnx.reference import ReferenceEvaluator

from tests.support import selections as select_reference
from tests.support.run_graph import Runner, doubled, filled
from tests.support.selection_cases import LAYER, TARGETS, batch_of, random_weights, weights_of
from tests.support.transformers_models import model_config, relative
from trio_deploy.families.base import ModelConfig, RopeConfig
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import inverse_frequencies
from trio_deploy.schedule.methods import METHODS
from trio_deploy.selection.stage import build_select

targets = pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
MODELS = {
    "grouped": {},
    "square projections": {"num_heads": 3, "num_kv_heads": 3},
    "one key for all queries, tied head": {"num_kv_heads": 1, "tie_word_embeddings": True},
    "biases, llama3 rope": {
        "qkv_bias": True,
        "o_bias": True,
        "mlp_bias": True,
        "rope": RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 64),
    },
}


def expected(
    config: ModelConfig, weights: dict[str, np.ndarray], feeds: dict[str, np.ndarray], **probe: Any
) -> np.ndarray:
    result = np.zeros(feeds["visual_mask"].shape)
    frequency = inverse_frequencies(config.text.rope, config.text.head_dim).astype(np.float64)
    for row, n in enumerate(feeds["lengths"]):
        result[row, :n] = select_reference.saliency(
            feeds["hidden_states"][row, :n],
            feeds["position_ids"][row, :n],
            feeds["visual_mask"][row, :n],
            weights,
            config.text,
            LAYER,
            inverse_frequency=frequency,
            **probe,
        )
    return result


def assert_close(actual: np.ndarray, reference: np.ndarray, tolerance: float) -> None:
    assert actual.dtype == np.float32
    assert np.array_equal(actual == 0, reference == 0)
    for row, (a, b) in enumerate(zip(actual, reference, strict=True)):
        assert not b.any() or relative(a, b) < tolerance, f"row {row}"


@targets
@pytest.mark.parametrize("name", MODELS)
def test_saliency_is_the_gradient_norm_of_the_proxy_loss(
    name: str, dialect: Any, runtime: str
) -> None:
    config = model_config(**MODELS[name])
    weights, feeds = weights_of(config), batch_of(config)
    model = build_select(config, LAYER, GraphOptions(dialect=dialect))
    outputs = Runner(model, weights, runtime)(feeds)
    assert_close(outputs["saliency"], expected(config, weights, feeds), 1e-5)


@pytest.mark.parametrize("probe", ["last", "shifted"])
@pytest.mark.parametrize("probes", [1, 3, 6])
def test_probes_are_the_last_text_tokens_or_shifted_by_one(probe: Any, probes: int) -> None:
    """Rows 3 and 4 have one text token: shifted by one, nothing probes, and nothing has a score."""
    config = model_config()
    weights, feeds = weights_of(config), batch_of(config)
    options = GraphOptions(probe=probe, probes=probes)
    outputs = Runner(build_select(config, LAYER, options), weights)(feeds)
    reference = expected(config, weights, feeds, probe=probe, probes=probes)
    assert_close(outputs["saliency"], reference, 1e-5)
    assert outputs["converged"].all()


def test_a_row_does_not_depend_on_its_batch_or_its_padding() -> None:
    config = model_config()
    weights, feeds = weights_of(config), batch_of(config)
    runner = Runner(build_select(config, LAYER, GraphOptions()), weights)
    together = runner(feeds)["saliency"]
    for row, n in enumerate(feeds["lengths"]):
        alone = {k: v[row : row + 1] for k, v in feeds.items() if k != "width"}
        for name in ("hidden_states", "position_ids", "visual_mask"):
            alone[name] = alone[name][:, :n]
        single = runner(alone | {"width": np.array([n])})["saliency"]
        np.testing.assert_allclose(together[row, :n], single[0], rtol=1e-5, atol=1e-9)
        assert not together[row, n:].any()


def test_the_formulas_are_exact_in_double_precision() -> None:
    """The graph itself with every float32 made float64, its constants being exact in both."""
    config = model_config(hidden_size=64, rms_norm_eps=2.0**-17)
    weights, feeds = weights_of(config), batch_of(config)
    model = filled(build_select(config, LAYER, GraphOptions(dialect="primitive")), weights)
    feeds["hidden_states"] = feeds["hidden_states"].astype(np.float64)
    actual = ReferenceEvaluator(doubled(model, "saliency")).run(["saliency"], feeds)[0]
    reference = expected(config, weights, feeds)
    assert np.abs(actual - reference).max() / reference.max() < 1e-12


@targets
@pytest.mark.parametrize("head", [30.0, 120.0])
def test_certain_probes_keep_their_gradient(head: float, dialect: Any, runtime: str) -> None:
    """Softmax minus one-hot would be zero or noise in fp32; then even squares underflow."""
    config = model_config()
    weights, feeds = weights_of(config, lm_head=head), batch_of(config)
    feeds = {name: value[:1] for name, value in feeds.items()}
    reference = expected(config, weights, feeds)
    assert 0 < reference.max() < (1e-6 if head < 100 else 1e-20)
    model = build_select(config, LAYER, GraphOptions(dialect=dialect))
    outputs = Runner(model, weights, runtime)(feeds)
    assert_close(outputs["saliency"], reference, 1e-2)


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
@pytest.mark.parametrize("head", [0.3, 2.0])
def test_half_precision_keeps_small_gradients(dialect: Any, head: float) -> None:
    config = model_config(num_kv_heads=4)
    weights, feeds = weights_of(config, lm_head=head), batch_of(config, dtype="float16")
    weights = {k: v.astype(np.float16).astype(np.float32) for k, v in weights.items()}
    options = GraphOptions(dialect=dialect, dtype="float16")
    outputs = Runner(build_select(config, LAYER, options), weights)(feeds)
    assert outputs["hidden_states_out"].dtype == np.float16
    assert_close(outputs["saliency"], expected(config, weights, feeds), 3e-2)


SHAPES = (
    # hidden size, query heads, key/value heads, head size, inner size of the MLP, vocabulary
    (64, 1, 1, 64, 96, 80),  # every projection of the attention is square
    (64, 4, 1, 64, 96, 80),  # one key/value head as wide as a hidden state
    (64, 2, 2, 64, 96, 80),  # a square per head
    (256, 2, 1, 256, 32, 40),
    (64, 8, 8, 8, 64, 64),  # square as a whole, and so are the MLP and the head
)


def config_of(shape: tuple[int, ...]) -> ModelConfig:
    names = ("hidden_size", "num_heads", "num_kv_heads", "head_dim", "intermediate_size")
    return model_config(**dict(zip((*names, "vocab_size"), shape, strict=True)))


def drawn_shapes(count: int) -> list[tuple[int, ...]]:
    rng = np.random.default_rng(0)
    shapes = []
    for _ in range(count):
        size = int(rng.choice([8, 16, 24, 40, 64, 128, 256]))
        groups = int(rng.choice([1, 1, 2, 3]))
        heads = groups * int(rng.choice([1, 2, 4]))
        hidden = int(rng.choice([size, groups * size, heads * size, 48, 128]))
        inner = int(rng.choice([hidden, 80, 96]))
        vocabulary = int(rng.choice([hidden, 101]))
        shapes.append((hidden, heads, groups, size, inner, vocabulary))
    return shapes


@pytest.mark.parametrize("shape", [*SHAPES, *drawn_shapes(10)], ids=str)
def test_openvino_keeps_the_tokens_of_the_reference_whatever_the_shapes(
    shape: tuple[int, ...],
) -> None:
    """It takes one packing of a matrix for the other where a graph multiplies by both."""
    config = config_of(shape)
    model = build_select(config, LAYER, GraphOptions(dialect="primitive"))
    scale = 1.2 / config.text.hidden_size**0.5
    weights = random_weights(model, norm=1.0, proj=scale, lm_head=scale)
    feeds = batch_of(config)
    outputs = Runner(model, weights, "openvino")(feeds)
    reference = expected(config, weights, feeds)
    for row, visual in enumerate(feeds["visual_mask"]):
        places = np.flatnonzero(visual & (np.arange(len(visual)) < feeds["lengths"][row]))
        keep = min(int(feeds["keep"][row]), len(places))
        hidden = feeds["hidden_states"][row, places]
        chosen = select_reference.greedy(reference[row, places], hidden, keep, 0.8)
        kept = outputs["keep_index"][row]
        kept = kept[(kept >= 0) & visual[kept]]
        assert kept.tolist() == places[chosen].tolist()
    assert_close(outputs["saliency"], reference, 1e-4)


def both_sides(model: ir.Model) -> set[str]:
    """Square weights that a graph multiplies by from the right, both as they are and transposed."""
    ways: dict[str, set[bool]] = {}
    for product in ir.traversal.RecursiveGraphIterator(model.graph):
        if product.op_type != "MatMul":
            continue
        value, transposed = product.inputs[1], False
        while (node := value.producer()) is not None and node.op_type in (
            "Cast", "Reshape", "Transpose"
        ):  # fmt: skip
            transposed ^= node.op_type == "Transpose"
            if len(set(value.shape[-2:])) > 1:
                break
            value = node.inputs[0]
        if value.is_initializer():
            ways.setdefault(value.name, set()).add(transposed)
    return {name for name, found in ways.items() if len(found) == 2}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [SHAPES[0], SHAPES[2], SHAPES[4]], ids=str)
def test_no_graph_for_openvino_has_a_square_weight_on_the_right_both_ways(
    shape: tuple[int, ...], method: str
) -> None:
    options = GraphOptions(dialect="primitive")
    model = build_select(config_of(shape), LAYER, options, method=method)
    assert not both_sides(model)
