"""Pruning: exact against sequential greedy suppression, and the sequence that is left."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import onnx
import pytest

from tests.support.run_graph import Runner
from tests.support.selection_cases import LAYER, TARGETS, batch_of, weights_of
from tests.support.selections import greedy
from tests.support.transformers_models import model_config
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.values import BOOL, FLOAT, INT64
from trio_deploy.selection.saliency import Tokens
from trio_deploy.selection.stage import build_select
from trio_deploy.selection.suppression import Suppression

THRESHOLD = 0.8
SIZE = 6
FEATURES = ("random", "clusters", "identical", "duplicates", "zeros", "chain", "huge", "tiny")


@cache
def suppressor(dialect: Any, runtime: str, block: int, threshold: float = THRESHOLD) -> Runner:
    """A graph of the suppression alone, its scores an input."""
    d = GraphOptions(dialect=dialect).make_dialect()
    stage = Stage("select", d)
    op = stage.op
    tokens = Tokens.of(
        op,
        stage.input("hidden_states", FLOAT, ["B", "S", SIZE]),
        stage.input("position_ids", INT64, ["B", "S"]),
        stage.input("lengths", INT64, ["B"]),
        stage.input("visual_mask", BOOL, ["B", "S"]),
    )
    scores = stage.input("scores", FLOAT, ["B", "S"])
    keep, width = stage.input("keep", INT64, ["B"]), stage.input("width", INT64, [1])
    mask, converged = Suppression(d, tokens, keep, width, threshold, block).select(op, scores)
    stage.output("mask", mask, BOOL, ["B", "S"])
    stage.output("converged", converged, BOOL, ["B"])
    del stage._graph.inputs[1]  # positions play no part
    return Runner(stage.finish(model_config()), {}, runtime)


def features(rng: np.random.Generator, kind: str, n: int) -> np.ndarray:
    if kind in ("random", "huge", "tiny"):
        return rng.normal(size=(n, SIZE)) * {"random": 1, "huge": 1e6, "tiny": 1e-6}[kind]
    if kind == "clusters":
        centres = rng.normal(size=(max(2, n // 7), SIZE))
        return centres[rng.integers(len(centres), size=n)] + rng.normal(size=(n, SIZE)) * 0.3
    if kind == "identical":
        return np.repeat(rng.normal(size=(1, SIZE)), n, 0)
    if kind == "duplicates":
        return rng.normal(size=(max(1, n // 3), SIZE))[rng.integers(max(1, n // 3), size=n)]
    if kind == "zeros":
        return rng.normal(size=(n, SIZE)) * (rng.random((n, 1)) < 0.5)
    angles = np.arange(n) * 0.9 * np.arccos(THRESHOLD)  # each suppresses its neighbours alone
    chain = np.zeros((n, SIZE))
    chain[:, 0], chain[:, 1] = np.cos(angles), np.sin(angles)
    return chain


def case(seed: int, kind: str) -> dict[str, np.ndarray]:
    """Up to three rows of one kind of features; scores falling, random or with many ties."""
    rng = np.random.default_rng([seed, FEATURES.index(kind)])
    rows, length = int(rng.integers(1, 4)), int(rng.integers(1, 60))
    lengths = rng.integers(1, length + 1, size=rows)
    visual = rng.random((rows, length)) < rng.choice([0.0, 0.4, 0.9, 1.0])
    scores = rng.random((rows, length)) if seed % 2 else rng.integers(0, 5, (rows, length)) / 4
    if seed % 3 == 0:
        scores = -np.sort(-scores, axis=1)
    keep = rng.integers(0, length + 2, size=rows)
    if seed % 5 == 0:
        keep = np.minimum(keep, 3)
    return {
        "hidden_states": np.stack([features(rng, kind, length) for _ in range(rows)]).astype("f4"),
        "lengths": lengths,
        "visual_mask": visual,
        "scores": np.where(visual, scores, 0).astype(np.float32),
        "keep": keep,
        "width": np.array([length]),
    }


def expected_mask(feeds: dict[str, np.ndarray], scores: np.ndarray) -> np.ndarray:
    """The visual tokens that stay."""
    visual = feeds["visual_mask"] & (np.arange(scores.shape[1]) < feeds["lengths"][:, None])
    mask = np.zeros_like(visual)
    for row, candidates in enumerate(map(np.flatnonzero, visual)):
        keep = min(int(feeds["keep"][row]), len(candidates))
        x = feeds["hidden_states"][row, candidates].astype(np.float64)
        mask[row, candidates[greedy(scores[row, candidates], x, keep, THRESHOLD)]] = True
    return mask


@pytest.mark.parametrize("kind", FEATURES)
@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
@pytest.mark.parametrize("block", [1, 4, 16, 64])
def test_suppression_equals_sequential_greedy(
    block: int, dialect: Any, runtime: str, kind: str
) -> None:
    run = suppressor(dialect, runtime, block)
    for seed in range(12 if runtime == "openvino" else 30):
        feeds = case(seed, kind)
        outputs = run(feeds)
        assert outputs["converged"].all(), seed
        assert np.array_equal(outputs["mask"], expected_mask(feeds, feeds["scores"])), seed


@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
@pytest.mark.parametrize("block", [1, 4])  # compared with what was kept before, and in a block
def test_a_cosine_equal_to_the_threshold_suppresses(block: int, dialect: Any, runtime: str) -> None:
    rows = np.zeros((1, 3, SIZE), np.float32)
    rows[0, :2, :4] = [[1, 1, 1, 1], [1, 1, 1, -1]]  # their cosine is 2 / (2 · 2), exactly
    rows[0, 2, 4] = 1
    feeds = {
        "hidden_states": rows,
        "lengths": np.array([3]),
        "visual_mask": np.ones((1, 3), bool),
        "scores": np.array([[3, 2, 1]], np.float32),
        "keep": np.array([2]),
        "width": np.array([2]),
    }
    mask = suppressor(dialect, runtime, block, threshold=0.5)(feeds)["mask"]
    assert mask.tolist() == [[True, False, True]]


@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
def test_a_long_chain_takes_many_rounds_and_converges(dialect: Any, runtime: str) -> None:
    """Falling scores along a chain: every round settles one or two tokens."""
    rng, n = np.random.default_rng(0), 250
    feeds = {
        "hidden_states": features(rng, "chain", n)[None].astype(np.float32),
        "lengths": np.array([n]),
        "visual_mask": np.ones((1, n), bool),
        "scores": np.arange(n, 0, -1, dtype=np.float32)[None],
        "keep": np.array([n // 3]),
        "width": np.array([n // 3]),
    }
    outputs = suppressor(dialect, runtime, 256)(feeds)
    assert outputs["converged"].all()
    assert np.array_equal(outputs["mask"], expected_mask(feeds, feeds["scores"]))


def prepared(options: GraphOptions, block: int = 256, runtime: str = "ort") -> Runner:
    config = model_config()
    return Runner(build_select(config, LAYER, options, block=block), weights_of(config), runtime)


def mixed_batch(runner: Runner) -> dict[str, np.ndarray]:
    """Rows that prune, keep everything, have no image, drop everything, and keep one."""
    feeds = batch_of(model_config())
    feeds["keep"] = np.array([4, 99, 0, 0, 1])
    visual = feeds["visual_mask"] & (np.arange(19) < feeds["lengths"][:, None])
    n = visual.sum(1)
    feeds["width"] = np.array([(feeds["lengths"] - n + np.minimum(feeds["keep"], n)).max()])
    return feeds


@pytest.mark.parametrize("positions", ["renumber", "original"])
@pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
def test_what_is_left_is_all_text_and_the_chosen_tokens_in_order(
    dialect: Any, runtime: str, positions: Any
) -> None:
    runner = prepared(GraphOptions(dialect=dialect, positions=positions), 4, runtime)
    feeds = mixed_batch(runner)
    outputs = runner(feeds)
    assert outputs["converged"].all()
    chosen = expected_mask(feeds, outputs["saliency"])
    assert chosen.sum(1).tolist() == [4, 8, 0, 0, 1]
    for row, length in enumerate(feeds["lengths"]):
        text = ~feeds["visual_mask"][row] & (np.arange(19) < length)
        index = np.flatnonzero(chosen[row] | text)
        n, padding = len(index), int(feeds["width"][0]) - len(index)
        old = feeds["position_ids"][row, index]
        new = np.arange(n) if positions == "renumber" else old
        assert outputs["lengths_out"][row] == n
        assert outputs["keep_index"][row].tolist() == index.tolist() + [-1] * padding
        assert outputs["position_ids_out"][row].tolist() == new.tolist() + [0] * padding
        mask = feeds["visual_mask"][row, index].tolist() + [False] * padding
        assert outputs["visual_mask_out"][row].tolist() == mask
        hidden = np.zeros((n + padding, 48), np.float32)
        hidden[:n] = feeds["hidden_states"][row, index]
        assert np.array_equal(outputs["hidden_states_out"][row], hidden)


def test_a_batch_with_nothing_to_prune_passes_unchanged() -> None:
    runner = prepared(GraphOptions(positions="original"))
    feeds = batch_of(model_config())
    feeds |= {"keep": np.full(5, 50), "visual_mask": np.zeros_like(feeds["visual_mask"])}
    outputs = runner(feeds)
    valid = np.arange(19) < feeds["lengths"][:, None]
    assert outputs["converged"].all() and not outputs["saliency"].any()
    assert np.array_equal(outputs["keep_index"], np.where(valid, np.arange(19), -1))
    assert np.array_equal(
        outputs["hidden_states_out"], np.where(valid[..., None], feeds["hidden_states"], 0)
    )


def test_a_row_that_cannot_be_trusted_says_so_and_spares_the_others() -> None:
    """A hidden state that is not a number; a width that is too small for a row."""
    runner = prepared(GraphOptions())
    feeds = mixed_batch(runner)
    feeds["hidden_states"][3, 0, 0] = np.nan
    assert runner(feeds)["converged"].tolist() == [True, True, True, False, True]
    feeds = mixed_batch(runner)
    lengths = runner(feeds)["lengths_out"]
    feeds["width"] = feeds["width"] - 1
    assert np.array_equal(runner(feeds)["converged"], lengths < lengths.max())


@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_graphs_pass_the_checker_with_shapes_inferred(dialect: Any, dtype: Any) -> None:
    runner = prepared(GraphOptions(dialect=dialect, dtype=dtype))
    onnx.checker.check_model(runner.proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(runner.proto, strict_mode=True, data_prop=True)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in inferred.graph.output
    }
    assert shapes == {
        "keep_index": ["B", "W"],
        "hidden_states_out": ["B", "W", 48],
        "position_ids_out": ["B", "W"],
        "lengths_out": ["B"],
        "visual_mask_out": ["B", "W"],
        "saliency": ["B", "S"],
        "converged": ["B"],
    }
