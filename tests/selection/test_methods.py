"""Every method's graph against its reference: which tokens are kept, and by which scores."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections.abc import Iterator
from functools import cache
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from tests.support.run_graph import Runner
from tests.support.selection_cases import TARGETS, batch_of
from tests.support.transformers_models import language_model, model_config, relative, text_weights
from tests.support.waiting import WAIT_S
from trio_deploy import TrioError
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.reference.oracle import Oracle, Point
from trio_deploy.schedule.methods import ARRAYS, METHODS, SEEDS, load
from trio_deploy.schedule.view import View
from trio_deploy.selection import random
from trio_deploy.selection.stage import build_select

CONFIG = model_config(qkv_bias=True, o_bias=True)
targets = pytest.mark.parametrize(("dialect", "runtime"), TARGETS)
methods = pytest.mark.parametrize("method", METHODS)
LOOPING = ("trio", "dart", "divprune", "cdpruner")


@cache
def model() -> Any:
    lm = language_model(CONFIG)
    lm.set_attn_implementation("sdpa")  # without a mask, causal
    return lm


@cache
def oracle() -> Oracle:
    lm = model()
    vision = SimpleNamespace(image_size=32)
    whole = SimpleNamespace(
        config=SimpleNamespace(model_type="llava", image_token_id=0, vision_config=vision),
        model=SimpleNamespace(language_model=lm.model),
        lm_head=lm.lm_head,
        parameters=lm.parameters,
        eval=lambda: whole,
    )
    return Oracle(whole)


@cache
def runner(
    method: str, dialect: Any, runtime: str, layer: int, block: int = 256, dtype: Any = "float32"
) -> Runner:
    options = GraphOptions(dialect=dialect, dtype=dtype)
    graph = build_select(CONFIG, layer, options, method=method, block=block)
    return Runner(graph, text_weights(model(), CONFIG), runtime)


def batch(keep: list[int], seed: int = 0, **features: np.ndarray) -> dict[str, np.ndarray]:
    """`batch_of` with what the methods take besides, and the width that belongs to `keep`."""
    rng = np.random.default_rng(seed)
    feeds = batch_of(CONFIG, seed) | {"keep": np.array(keep)} | features
    visual = feeds["visual_mask"] & (np.arange(19) < feeds["lengths"][:, None])
    seen = visual.sum(1)
    feeds["width"] = np.array([(feeds["lengths"] - seen + np.minimum(keep, seen)).max()])
    patch = visual & (rng.random(visual.shape) < 0.8)  # the others are image_newline
    local = rng.integers(1, 5, visual.shape) + 0.999 * rng.random(visual.shape)
    return feeds | {
        "seed": rng.integers(SEEDS, size=len(keep)),
        "prior": np.where(patch, rng.random(visual.shape), 0).astype(np.float32),
        "prior_local": np.where(patch, local, 0).astype(np.float32),
    }


def points(feeds: dict[str, np.ndarray], layer: int):
    """Each row as the oracle has it."""
    for b, length in enumerate(feeds["lengths"]):
        visual = torch.tensor(feeds["visual_mask"][b, :length])
        yield Point(
            layer,
            torch.tensor(feeds["hidden_states"][b, :length])[None],
            torch.tensor(feeds["position_ids"][b, :length])[None],
            visual,
            min(int(feeds["keep"][b]), int(visual.sum())),
            seed=int(feeds["seed"][b]),
            encoder={
                name: torch.tensor(feeds[name][b, :length]) for name in ("prior", "prior_local")
            },
        )


def assert_same(feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray], method: str, layer):
    assert outputs["converged"].all()
    for b, point in enumerate(points(feeds, layer)):
        with torch.no_grad():
            pruned = oracle().select(method, point)
        index, scores = pruned.index, pruned.scores
        length = len(index)
        assert outputs["lengths_out"][b] == length
        assert outputs["keep_index"][b, :length].tolist() == index.tolist(), (method, b)
        assert (outputs["keep_index"][b, length:] == -1).all()
        expected = np.zeros(outputs["saliency"].shape[1])
        expected[: len(scores)] = scores
        if expected.any():
            assert relative(outputs["saliency"][b], expected) < 1e-4
        else:
            assert not outputs["saliency"][b].any()
        got = outputs["hidden_states_out"][b]
        assert not got[length:].any()
        if METHODS[method].merges:
            assert relative(got[:length], pruned.hidden[0].numpy()) < 1e-6
        else:
            np.testing.assert_array_equal(got[:length], point.hidden[0, index])


@targets
@methods
@pytest.mark.parametrize("layer", [0, 2])
def test_a_graph_keeps_what_the_reference_keeps(
    method: str, dialect: Any, runtime: str, layer: int
) -> None:
    """Rows with one image, two, none, with and without text in front; some prune, some do not."""
    run = runner(method, dialect, runtime, layer)
    for seed, keep in enumerate([[4, 3, 2, 5, 2], [9, 99, 0, 0, 1], [1, 7, 3, 8, 8]]):
        feeds = batch(keep, seed)
        assert_same(feeds, run(feeds), method, layer)


@methods
@pytest.mark.parametrize("block", [1, 4])
def test_blocks_of_ranks_change_nothing(method: str, block: int) -> None:
    feeds = batch([7, 6, 1, 3, 5], seed=7)
    assert_same(feeds, runner(method, "ort", "ort", 1, block)(feeds), method, 1)


@pytest.mark.parametrize("method", LOOPING)
def test_a_round_number_of_shape_one_changes_nothing(method: str) -> None:
    """TensorRT's older parsers give a Loop's body its number as [1], where ONNX has a scalar."""
    run = runner(method, "primitive", "ort", 1)
    feeds = batch([7, 6, 1, 3, 5], seed=7)
    expected = run(feeds)
    proto = onnx.ModelProto.FromString(run.proto.SerializeToString())
    assert count_in_vectors(proto.graph)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    outputs = session.run(run.outputs, {name: feeds[name] for name in run.inputs})
    for name, array in zip(run.outputs, outputs, strict=True):
        np.testing.assert_array_equal(array, expected[name], err_msg=name)


def count_in_vectors(graph: onnx.GraphProto) -> int:
    """Makes the round number of every Loop in a graph a vector; returns how many there are."""
    loops = 0
    for node in graph.node:
        for body in [entry.g for entry in node.attribute if entry.name == "body"]:
            scalar, vector = body.input[0].name, f"{body.input[0].name}.vector"
            for inner in body.node:
                inner.input[:] = [vector if name == scalar else name for name in inner.input]
            axes = onnx.numpy_helper.from_array(np.array([0]), f"{vector}.axes")
            body.initializer.append(axes)
            widen = onnx.helper.make_node("Unsqueeze", [scalar, axes.name], [vector])
            body.node.insert(0, widen)
            del body.value_info[:]
            loops += 1 + count_in_vectors(body)
    return loops


@pytest.mark.parametrize("method", LOOPING)
def test_rounds_too_many_change_nothing(method: str) -> None:
    """TensorRT's parser has run a Loop once more than it should (onnx-tensorrt's issue 891)."""
    run = runner(method, "primitive", "ort", 1, 4)
    feeds = batch([9, 99, 0, 3, 1], seed=7)
    proto = onnx.ModelProto.FromString(run.proto.SerializeToString())
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(True), "always"))
    proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(12), "too many"))
    go_on_for_ever(proto.graph)
    session = onnxruntime.InferenceSession(proto.SerializeToString())
    outputs = session.run(run.outputs, {name: feeds[name] for name in run.inputs})
    for name, array in zip(run.outputs, outputs, strict=True):
        np.testing.assert_array_equal(array, run(feeds)[name], err_msg=name)


@pytest.mark.parametrize("method", LOOPING)
def test_a_row_that_is_not_finite_ends_and_leaves_the_others_alone(method: str) -> None:
    run = runner(method, "ort", "ort", 1)
    feeds = batch([7, 6, 1, 3, 5], seed=7)
    expected = run(feeds)
    feeds["hidden_states"][0] = np.nan
    options = onnxruntime.RunOptions()
    ended = threading.Timer(WAIT_S, setattr, (options, "terminate", True))
    ended.start()
    session = onnxruntime.InferenceSession(run.proto.SerializeToString())
    outputs = session.run(run.outputs, {name: feeds[name] for name in run.inputs}, options)
    ended.cancel()
    for name, array in zip(run.outputs, outputs, strict=True):
        if array.ndim:
            np.testing.assert_array_equal(array[1:], expected[name][1:], err_msg=name)


@targets
@methods
@pytest.mark.parametrize("what", [np.nan, np.inf, -np.inf])
def test_a_row_that_is_not_finite_keeps_its_budget_at_most_and_is_refused(
    method: str, dialect: Any, runtime: str, what: float
) -> None:
    """Runtimes compare such scores differently, with themselves, too."""
    run = runner(method, dialect, runtime, 1)
    feeds = batch([7, 6, 1, 3, 5], seed=7)
    expected = run(feeds)
    for name in {"hidden_states", "prior", "prior_local"} & set(run.inputs):
        for places in (slice(None), slice(3, 5)):
            array = feeds[name].copy()
            array[0, places] = what
            outputs = run(feeds | {name: array})
            assert outputs["lengths_out"][0] <= expected["lengths_out"][0], (name, places)
            assert not outputs["converged"][0], (name, places)
            assert outputs["converged"][1:].all()
            for output in ("keep_index", "lengths_out", "hidden_states_out"):
                np.testing.assert_array_equal(outputs[output][1:], expected[output][1:])


def go_on_for_ever(graph: onnx.GraphProto) -> None:
    """Lets every Loop in a graph that ends by its data run too many rounds."""
    for node in graph.node:
        for body in [entry.g for entry in node.attribute if entry.name == "body"]:
            go_on_for_ever(body)
            if not node.input[1]:
                continue  # its rounds are counted
            node.input[:2], go_on = ["too many", "always"], body.output[0].name
            for inner in body.node:
                inner.output[:] = [f"{o}.unused" if o == go_on else o for o in inner.output]
            body.node.append(onnx.helper.make_node("Identity", ["always"], [go_on]))


@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
@methods
def test_a_loop_depends_on_data_after_its_rounds_alone(method: str, dialect: Any) -> None:
    """TensorRT's host waits wherever data decide: not before a loop, and not in a counted one."""
    graph = runner(method, dialect, "ort", 1).proto.graph
    constants = {tensor.name for tensor in graph.initializer}
    for node in loops(graph):
        trips, start = node.input[:2]
        assert trips in constants and (not start or start in constants), node.name
    assert any(True for _ in loops(graph)) == (method in LOOPING)


def loops(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    """The Loops of a graph, those in bodies among them."""
    for node in graph.node:
        for body in [entry.g for entry in node.attribute if entry.name == "body"]:
            yield node
            yield from loops(body)


@targets
@pytest.mark.parametrize("method", ["divprune", "dart", "cdpruner"])
def test_more_picks_than_one_round_makes_are_those_of_the_reference(
    method: str, dialect: Any, runtime: str
) -> None:
    """Rows of 45 visual tokens, many of them copies, that keep 0 to 45."""
    run, rng = runner(method, dialect, runtime, 0), np.random.default_rng(0)
    visual = np.zeros((6, 60), bool)
    visual[:, 5:50] = True
    for keep in ([1, 15, 16, 17, 18, 40], [31, 32, 33, 34, 44, 45]):
        hidden = rng.normal(size=(6, 60, 48)).astype(np.float32)
        hidden[:3, 8:45] = hidden[:3, rng.integers(8, 45, size=37)]
        feeds = {
            "hidden_states": hidden,
            "position_ids": np.tile(np.arange(60), (6, 1)),
            "lengths": np.full(6, 60),
            "visual_mask": visual,
            "keep": np.array(keep),
            "width": np.array([15 + max(keep)]),
        }
        index = run(feeds)["keep_index"]
        for row, count in enumerate(keep):
            view = View(0, hidden[row].astype(np.float64), visual[row], count, 0.8)
            kept, _ = load(method).reference(view)
            expected = np.sort(np.concatenate([kept, np.flatnonzero(~visual[row])]))
            assert index[row][index[row] >= 0].tolist() == expected.tolist(), (row, count)


@methods
def test_copies_of_a_token_are_told_apart_by_their_place(method: str) -> None:
    """Newline rows are copies of each other: of equal ones the first is kept."""
    feeds = batch([6, 5, 2, 4, 3], seed=3)
    hidden = feeds["hidden_states"]
    hidden[:, 2:12:3] = hidden[:, 2:3]
    assert_same(feeds, runner(method, "ort", "ort", 0)(feeds), method, 0)


@methods
def test_a_row_keeps_the_same_alone_and_in_a_batch(method: str) -> None:
    run = runner(method, "ort", "ort", 1)
    feeds = batch([4, 3, 2, 5, 2])
    together = run(feeds)
    for b, length in enumerate(feeds["lengths"]):
        alone = {
            name: value[b : b + 1, :length] if value.ndim > 1 else value[b : b + 1]
            for name, value in feeds.items()
            if name != "width"
        }
        out = run(alone | {"width": together["lengths_out"][b : b + 1]})
        n = int(together["lengths_out"][b])
        assert out["keep_index"][0].tolist() == together["keep_index"][b, :n].tolist()


@methods
def test_a_row_that_cannot_be_trusted_says_so(method: str) -> None:
    run = runner(method, "ort", "ort", 1)
    feeds = batch([4, 3, 2, 5, 2])
    lengths = run(feeds)["lengths_out"]
    feeds["width"] = feeds["width"] - 1
    assert np.array_equal(run(feeds)["converged"], lengths < lengths.max())


@pytest.mark.parametrize("method", ["topk-gradient", "fastv", "divprune", "dart"])
def test_hidden_states_that_are_no_numbers_are_noticed(method: str) -> None:
    feeds = batch([4, 3, 2, 5, 2])
    feeds["hidden_states"][3, 4, 0] = np.nan
    converged = runner(method, "ort", "ort", 1)(feeds)["converged"]
    assert converged.tolist() == [True, True, True, False, True]


@methods
@pytest.mark.parametrize("dialect", ["ort", "onnx", "primitive"])
def test_float16_graphs_keep_nearly_the_same(method: str, dialect: Any) -> None:
    agree = total = 0
    for seed in range(4):
        feeds = batch([4, 3, 2, 5, 2], seed)
        feeds["hidden_states"] = feeds["hidden_states"].astype(np.float16)
        outputs = runner(method, dialect, "ort", 1, dtype="float16")(feeds)
        exact = feeds | {"hidden_states": feeds["hidden_states"].astype(np.float32)}
        for b, point in enumerate(points(exact, 1)):
            with torch.no_grad():
                index = oracle().select(method, point).index
            agree += len(set(index.tolist()) & set(outputs["keep_index"][b].tolist()))
            total += len(index)
    assert agree / total > 0.95


@methods
@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
def test_graphs_pass_the_checker_with_shapes_inferred(method: str, dialect: Any) -> None:
    proto = runner(method, dialect, "ort", 1).proto
    onnx.checker.check_model(proto, full_check=True)
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in inferred.graph.output
    }
    assert shapes["keep_index"] == ["B", "W"]
    assert shapes["hidden_states_out"] == ["B", "W", 48]
    assert shapes["saliency"] == ["B", "S"]


def test_an_unknown_method_is_refused() -> None:
    with pytest.raises(TrioError, match="best"):
        build_select(CONFIG, 1, GraphOptions(), method="best")


def test_methods_import_neither_torch_nor_onnx() -> None:
    """A device without them checks a bundle by a method's rule."""
    program = (
        "import sys; from trio_deploy.schedule.methods import METHODS, load\n"
        "for name in METHODS:\n"
        "    module = load(name)\n"
        "    assert all(callable(getattr(module, f)) for f in "
        "('graph', 'reference', 'rule', 'flops')), name\n"
        "    assert hasattr(module, 'merge') == METHODS[name].merges, name\n"
        "heavy = {'torch', 'onnx', 'onnx_ir', 'onnxscript', 'trio_deploy.graphs'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_needs_are_arrays_that_the_oracle_knows() -> None:
    known = {*ARRAYS, "seed", "threshold"}
    assert all(set(method.needs) <= known for method in METHODS.values())
    assert random.PRIME**2 == SEEDS
