"""Saliency of the Qwen families against fp64 autograd on transformers' own layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from onnx.reference import ReferenceEvaluator

from tests.support.qwen_models import model_config, new_model, weights_of
from tests.support.qwen_prompts import row_of
from tests.support.run_graph import Runner, doubled, filled
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import inverse_frequencies
from trio_deploy.reference.oracle import Oracle
from trio_deploy.selection.stage import build_select

TARGETS = [("ort", "ort"), ("onnx", "ort"), ("primitive", "ort"), ("primitive", "openvino")]
PROMPTS = ((3, (4, 5), 9), ((3, 2), 5, (2, 9), 4), (6,))
REAL_SIZES = ((3, (36, 36), 9), ((3, 2), 5, (36, 40), 4))
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases, chunked axes": ("qwen2_5_vl", {}),
    "key norm, interleaved axes": ("qwen3_vl", {}),
    "key norm and biases": ("qwen3_vl", {"attention_bias": True}),
}
EPS = 2.0**-20  # the same number in fp32 and fp64


class Double:
    """Rotary angles in fp64, which transformers computes in fp32."""

    def __init__(self, config: Any) -> None:
        frequency = inverse_frequencies(config.text.rope, config.text.head_dim)
        self.frequency = torch.from_numpy(frequency.astype(np.float64))
        self.axes = list(config.text.rope.axes)

    def __call__(self, hidden: torch.Tensor, positions: torch.Tensor) -> Any:
        angle = positions[:, self.axes].double().transpose(1, 2) * self.frequency
        return angle.cos().repeat(1, 1, 2), angle.sin().repeat(1, 1, 2)


def case(
    kind: str, layer: int, seed: int, prompts: Any = PROMPTS
) -> tuple[Any, dict, dict, np.ndarray]:
    """Configuration, weights, feeds of a padded batch, and the oracle's saliency in fp64."""
    family, extra = KINDS[kind]
    model = new_model(family, seed=seed, text={"rms_norm_eps": EPS, **extra})
    config = model_config(family, rms_norm_eps=EPS)
    if extra:
        config = model_config(family, rms_norm_eps=EPS, qkv_bias=True, o_bias=True)
    oracle = Oracle(model.double(), family=family, positions="original")
    oracle.adapter.rotary = Double(config)  # type: ignore[method-assign]
    rows = [row_of(family, parts, seed + i) for i, parts in enumerate(prompts)]
    width = max(len(row.input_ids) for row in rows)
    feeds: dict[str, np.ndarray] = {
        "hidden_states": np.zeros((len(rows), width, 64)),
        "position_ids": np.zeros((len(rows), 3, width), np.int64),
        "visual_mask": np.zeros((len(rows), width), bool),
        "feature_index": np.full((len(rows), width), -1),
        "lengths": np.array([len(row.input_ids) for row in rows]),
        "keep": np.array([5] * len(rows)),
        "width": np.array([width]),
    }
    scores = np.zeros((len(rows), width))
    random = np.random.default_rng(seed)
    for i, row in enumerate(rows):
        length = len(row.input_ids)
        hidden = random.standard_normal((1, length, 64)).astype(np.float32).astype(np.float64)
        positions = oracle.adapter.positions(row)
        visual = torch.as_tensor(row.input_ids) == oracle.adapter.image_token_id
        found = oracle.saliency(layer, torch.from_numpy(hidden), positions, visual)
        feeds["hidden_states"][i, :length] = hidden[0]
        feeds["position_ids"][i, :, :length] = positions[0].numpy()
        feeds["visual_mask"][i, :length] = visual.numpy()
        scores[i, :length] = found.numpy()
    return config, weights_of(model), feeds, scores


def worst(got: np.ndarray, want: np.ndarray) -> float:
    """The greatest relative error of a token's score."""
    some = want > 0
    assert np.array_equal(got > 0, some)
    return float((np.abs(got[some] - want[some]) / want[some]).max())


@pytest.mark.parametrize("layer", [0, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_the_formulas_are_exact_in_double_precision(kind: str, layer: int) -> None:
    config, weights, feeds, want = case(kind, layer, seed=layer)
    options = GraphOptions(dialect="primitive", positions="original")
    model = filled(build_select(config, layer, options), weights)
    got = ReferenceEvaluator(doubled(model, "saliency")).run(["saliency"], feeds)[0]
    assert worst(got, want) < 1e-12


@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_close_for_every_token(kind: str, dialect: str, runtime: str) -> None:
    config, weights, feeds, want = case(kind, 1, seed=5)
    feeds["hidden_states"] = feeds["hidden_states"].astype(np.float32)
    model = build_select(config, 1, GraphOptions(dialect=dialect, positions="original"))
    got = Runner(model, weights, runtime)(feeds)["saliency"]
    assert worst(got, want) < 3e-5
    assert np.abs(got - want).max() < 1e-5 * want.max()


@pytest.mark.parametrize(
    ("kind", "dialect", "runtime"),
    [("biases, chunked axes", *TARGETS[0]), ("key norm, interleaved axes", *TARGETS[3])],
)
def test_single_precision_is_close_among_more_than_a_thousand_tokens(
    kind: str, dialect: str, runtime: str
) -> None:
    config, weights, feeds, want = case(kind, 1, seed=5, prompts=REAL_SIZES)
    feeds["hidden_states"] = feeds["hidden_states"].astype(np.float32)
    model = build_select(config, 1, GraphOptions(dialect=dialect, positions="original"))
    got = Runner(model, weights, runtime)(feeds)["saliency"]
    assert worst(got, want) < 3e-5
    assert np.abs(got - want).max() < 1e-5 * want.max()
