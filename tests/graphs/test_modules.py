"""Building blocks: what onnxscript.nn would get wrong in silence is an error here."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from tests.support.run_graph import run
from tests.support.transformers_models import language_model, model_config, relative, text_weights
from trio_deploy import TrioError
from trio_deploy.families.base import RopeConfig
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.modules import MLP, Embedding, Linear, RMSNorm, activation
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import inverse_frequencies, rotary_angles
from trio_deploy.graphs.values import FLOAT, INT64, constant
from trio_deploy.graphs.weight import Weight

DIALECTS = ("ort", "onnx", "primitive")
dialects = pytest.mark.parametrize("dialect", DIALECTS)
CONFIG = model_config()
NAME = "language_model.layers.0.self_attn.q_proj"


def stage(dialect: str = "ort", dtype: str = "float32") -> Stage:
    return Stage("test", GraphOptions(dialect=dialect, dtype=dtype).make_dialect())


@dialects
@pytest.mark.parametrize("rank", [2, 3, 4])
def test_linear_forward_and_backward_share_one_untransposed_weight(dialect: str, rank: int) -> None:
    s = stage(dialect)
    lead, sizes = ("A", "B", "C")[: rank - 1], (2, 3, 5)[: rank - 1]
    x = s.input("x", FLOAT, [*lead, 48])
    layer = Linear(s.d, NAME, 64, 48)
    y = layer(s.op, x)
    s.output("y", y, FLOAT, [*lead, 64])
    s.output("back", layer.backward(s.op, y), FLOAT, [*lead, 48])
    model = s.finish(CONFIG)
    assert [n for n, v in model.graph.initializers.items() if v.const_value is None] == [
        f"{NAME}.weight"
    ]
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((64, 48)).astype(np.float32)
    array = rng.standard_normal((*sizes, 48)).astype(np.float32)
    out = run(model, {f"{NAME}.weight": weight}, {"x": array})
    assert relative(out["y"], array @ weight.T) < 1e-5
    assert relative(out["back"], array @ weight.T @ weight) < 1e-5


@dialects
def test_rotation_is_undone_by_its_inverse(dialect: str) -> None:
    s = stage(dialect)
    x = s.input("x", FLOAT, ["B", 4, "S", 16])
    positions = s.input("positions", INT64, ["B", "S"])
    angles = rotary_angles(s.op, s.d, CONFIG.text, positions)
    turned = s.d.rope(s.op, x, angles)
    s.output("turned", turned, FLOAT, ["B", 4, "S", 16])
    back = s.d.rope(s.op, turned, angles, inverse=True)
    s.output("back", back, FLOAT, ["B", 4, "S", 16])
    array = np.random.default_rng(0).standard_normal((2, 4, 3, 16)).astype(np.float32)
    feeds = {"x": array, "positions": np.array([[0, 1, 2], [5, 9, 2000]])}
    out = run(s.finish(CONFIG), {}, feeds)
    np.testing.assert_allclose(out["back"], array, atol=1e-5)
    assert np.abs(out["turned"][1] - array[1]).max() > 0.1


@pytest.mark.parametrize(
    "rope",
    [
        RopeConfig(10000.0),
        RopeConfig(500000.0, "llama3", 8.0, 1.0, 4.0, 8192),
        RopeConfig(1e6, "linear", 4.0),
    ],
)
def test_angles_far_into_the_context_equal_transformers(rope: RopeConfig) -> None:
    """At position 100000 an error of one part in 10⁷ in a frequency would already show."""
    config = model_config(rope=rope, head_dim=128)
    s = stage()
    positions = s.input("positions", INT64, ["B", "S"])
    angles = rotary_angles(s.op, s.d, config.text, positions)
    for name, value in zip(("cos", "sin"), angles, strict=True):
        s.output(name, value, FLOAT, ["B", "S", 64])
    where = np.array([[0, 1, 17, 4095, 100_000]])
    got = run(s.finish(config), {}, {"positions": where})
    model = language_model(config)
    cos, sin = LlamaRotaryEmbedding(model.config)(torch.zeros(1), torch.tensor(where))
    np.testing.assert_allclose(got["cos"][0, :4], cos[0, :4, :64], atol=5e-4)
    np.testing.assert_allclose(got["sin"][0, :4], sin[0, :4, :64], atol=5e-4)
    np.testing.assert_allclose(got["cos"], cos[..., :64], atol=1e-2)


def test_unknown_rotary_scaling_is_an_error() -> None:
    with pytest.raises(TrioError, match="yarn"):
        inverse_frequencies(RopeConfig(10000.0, "yarn"), 64)


def test_unknown_activation_is_an_error() -> None:
    s = stage()
    with pytest.raises(TrioError, match="relu6"):
        activation(s.op, "relu6", s.input("x", FLOAT, [1]))


@dialects
@pytest.mark.parametrize("length", [1, 127, 128, 129, 2944])
def test_a_running_sum_counts_exactly_up_to_each_place(dialect: str, length: int) -> None:
    s = stage(dialect)
    flags = s.input("flags", FLOAT, ["B", "L"])
    s.output("sums", s.d.running_sum(s.op, flags), FLOAT, ["B", "L"])
    array = np.random.default_rng(0).integers(0, 2, (3, length)).astype(np.float32)
    out = run(s.finish(CONFIG), {}, {"flags": array})
    assert np.array_equal(out["sums"], np.cumsum(array, 1))


@dialects
def test_backward_of_a_norm_and_its_length_equal_autograd(dialect: str) -> None:
    s = stage(dialect)
    x, g = s.input("x", FLOAT, ["B", 3, 48]), s.input("g", FLOAT, ["B", 3, 48])
    squares, along = s.input("squares", FLOAT, ["B", 3, 1]), s.input("along", FLOAT, ["B", 3, 1])
    norm = RMSNorm(s.d, "language_model.norm", 48, 1e-5)
    s.output("back", norm.backward(s.op, x, g), FLOAT, ["B", 3, 48])
    s.output("length", norm.backward_norm(s.op, squares, g, along), FLOAT, ["B", 3, 1])
    rng = np.random.default_rng(0)
    weight, rows, upper = (
        rng.standard_normal(shape).astype(np.float32) for shape in ((48,), (2, 3, 48), (2, 3, 48))
    )
    leaf = torch.tensor(rows, requires_grad=True)
    y = leaf * torch.rsqrt(leaf.pow(2).mean(-1, keepdim=True) + 1e-5) * torch.tensor(weight)
    y.backward(torch.tensor(upper))
    feeds = {
        "x": rows,
        "g": upper,
        "squares": (rows**2).sum(-1, keepdims=True),
        "along": (y.detach().numpy() * upper).sum(-1, keepdims=True),
    }
    out = run(s.finish(CONFIG), {"language_model.norm.weight": weight}, feeds)
    expected = leaf.grad.numpy()
    assert relative(out["back"], expected) < 1e-5
    assert relative(out["length"], np.linalg.norm(expected, axis=-1, keepdims=True)) < 1e-4


@dialects
def test_backward_of_the_mlp_equals_autograd(dialect: str) -> None:
    s = stage(dialect)
    text, name = CONFIG.text, "language_model.layers.0.mlp"
    size, inner = text.hidden_size, text.intermediate_size
    x, g = s.input("x", FLOAT, ["B", 3, size]), s.input("g", FLOAT, ["B", 3, size])
    mlp = MLP(s.d, name, text)
    y, gates = mlp.forward_probes(s.op, x)
    s.output("y", y, FLOAT, ["B", 3, size])
    s.output("back", mlp.backward_probes(s.op, gates, g), FLOAT, ["B", 3, size])
    rng = np.random.default_rng(0)
    gate, up = (rng.standard_normal((inner, size)).astype(np.float32) * 0.2 for _ in range(2))
    down = rng.standard_normal((size, inner)).astype(np.float32) * 0.2
    rows, upper = (rng.standard_normal((2, 3, size)).astype(np.float32) for _ in range(2))
    leaf = torch.tensor(rows, requires_grad=True)
    hidden = torch.nn.functional.silu(leaf @ torch.tensor(gate).T) * (leaf @ torch.tensor(up).T)
    expected = hidden @ torch.tensor(down).T
    expected.backward(torch.tensor(upper))
    weights = {
        f"{name}.gate_proj.weight": gate,
        f"{name}.up_proj.weight": up,
        f"{name}.down_proj.weight": down,
    }
    out = run(s.finish(CONFIG), weights, {"x": rows, "g": upper})
    assert relative(out["y"], expected.detach().numpy()) < 1e-5
    assert relative(out["back"], leaf.grad.numpy()) < 1e-4


@pytest.mark.parametrize("dialect", ["ort", "primitive"])
def test_norm_of_large_half_precision_values_does_not_overflow(dialect: str) -> None:
    """600² is beyond fp16: the square must be taken in fp32."""
    s = stage(dialect, "float16")
    x = s.input("x", s.d.dtype, ["B", 48])
    y = RMSNorm(s.d, "language_model.norm", 48, 1e-5)(s.op, x)
    s.output("y", y, s.d.dtype, ["B", 48])
    feeds = {"x": np.full((1, 48), 600, np.float16)}
    out = run(s.finish(CONFIG), {"language_model.norm.weight": np.ones(48)}, feeds)
    np.testing.assert_allclose(out["y"], np.ones((1, 48)), atol=1e-3)


def test_a_module_in_a_second_graph_is_an_error() -> None:
    first, second = stage(), stage()
    layer = Linear(first.d, NAME, 64, 48)
    layer(first.op, first.input("x", FLOAT, ["B", 48]))
    with pytest.raises(RuntimeError, match="another graph"):
        layer(second.op, second.input("x", FLOAT, ["B", 48]))


def test_two_modules_for_one_weight_are_an_error() -> None:
    s = stage()
    x = s.input("x", FLOAT, ["B", 48])
    Linear(s.d, NAME, 64, 48)(s.op, x)
    with pytest.raises(RuntimeError, match="two modules"):
        Linear(s.d, NAME, 64, 48)(s.op, x)


def test_a_weight_used_without_its_module_is_an_error() -> None:
    s = stage()
    layer = Linear(s.d, NAME, 64, 48)
    y = s.op.MatMul(s.input("x", FLOAT, ["B", 64]), layer.weight)
    s.output("y", y, FLOAT, ["B", 48])
    with pytest.raises(RuntimeError, match="never registered"):
        s.finish(CONFIG)


def test_an_initializer_that_the_checkpoint_does_not_have_is_an_error() -> None:
    s = stage()
    ids = s.input("ids", INT64, ["B"])
    y = Embedding(s.d, "language_model.embed_tokens", 7, 48)(s.op, ids)
    s.output("y", y, FLOAT, ["B", 48])
    with pytest.raises(RuntimeError, match="embed_tokens"):
        s.finish(CONFIG)


def test_a_weight_may_be_registered_by_hand_and_from_any_scope() -> None:
    s = stage()
    weight = Weight("image_newline", [48], FLOAT)
    assert weight.into(s.op) is weight.into(s.op)
    config = replace(CONFIG, newline=True)
    s.output("y", s.op.Identity(weight), FLOAT, [48])
    assert "image_newline" in s.finish(config).graph.initializers


def test_two_constants_of_one_name_must_be_equal() -> None:
    s = stage()
    one = constant(s.op, np.ones(2), "pair")
    assert constant(s.op, np.ones(2), "pair") is one
    with pytest.raises(RuntimeError, match="pair"):
        constant(s.op, np.zeros(2), "pair")


def test_weights_of_the_reference_carry_canonical_names() -> None:
    from trio_deploy.graphs.weights import canonical_tensors

    config = model_config(qkv_bias=True, o_bias=True, mlp_bias=True)
    text = {n for n in canonical_tensors(config) if n.startswith(("language_model", "lm_head"))}
    assert set(text_weights(language_model(config), config)) == text
