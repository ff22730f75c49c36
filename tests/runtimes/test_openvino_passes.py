"""What OpenVINO is given in place of the graphs as they are written, against these."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.support.bundles import Bundles
from tests.support.run_graph import Runner, filled
from tests.support.selection_cases import batch_of, weights_of
from tests.support.transformers_models import model_config, relative
from trio_deploy import Bundle
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.stages import build_prefill
from trio_deploy.graphs.values import FLOAT
from trio_deploy.runtimes import openvino_passes
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.registry import open_engine
from trio_deploy.schedule.methods import METHODS
from trio_deploy.selection.stage import build_select

openvino = pytest.importorskip("openvino")
PRIMITIVE = GraphOptions(dialect="primitive")
needs_bfloat16 = pytest.mark.skipif(
    "BF16" not in openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES"),
    reason="this CPU has no bfloat16 arithmetic",
)


def opened(folder: Path, model: ir.Model, weights: dict[str, np.ndarray], **options: Any) -> Engine:
    path = folder / "graph.onnx"
    onnx.save(filled(model, weights), path)
    return open_engine(path, "openvino", threads=1, **options)


def random_weights(model: ir.Model) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {
        name: 0.3 * rng.standard_normal(tuple(value.shape))
        for name, value in model.graph.initializers.items()
        if value.const_value is None
    }


def prompt(config: Any, rows: int, length: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(length)
    none = np.zeros((rows, config.text.num_kv_heads, 0, config.text.head_dim), np.float32)
    hidden = rng.standard_normal((rows, length, config.text.hidden_size))
    return {
        "inputs_embeds": hidden.astype(np.float32),
        "position_ids": np.tile(np.arange(length), (rows, 1)),
        "lengths": np.maximum(length - np.arange(rows), 1),
        "past_lengths": np.zeros(rows, np.int64),
        **{f"past.{i}.{part}": none for i in range(2) for part in ("key", "value")},
    }


def next_token(
    feeds: dict[str, np.ndarray], outputs: dict[str, np.ndarray], dtype: Any = np.float32
) -> dict[str, np.ndarray]:
    """One token more for each row, with three slots free."""
    step = {name: feeds[name][:, :1].copy() for name in ("inputs_embeds", "position_ids")}
    room = [(0, 0), (0, 0), (0, 3), (0, 0)]
    past = {
        name.replace("present", "past"): np.pad(array.astype(np.float32), room).astype(dtype)
        for name, array in outputs.items()
        if name.startswith("present")
    }
    lengths = feeds["lengths"]
    return {**step, **past, "lengths": np.ones_like(lengths), "past_lengths": lengths}


@pytest.mark.parametrize("length", [1, 2, 4, 7, 30])
def test_queries_in_parts_give_what_they_give_at_once(tmp_path: Path, length: int) -> None:
    """Prefill and a step of decoding, rows of different lengths, shared keys."""
    config = model_config()
    model = build_prefill(config, 0, 0, 2, PRIMITIVE)
    weights = random_weights(model)
    whole, parts = Runner(model, weights, "openvino"), opened(tmp_path, model, weights)
    feeds = prompt(config, 3, length)
    expected = whole(feeds)
    step = next_token(feeds, expected)
    for given, want in ((feeds, expected), (step, whole(step))):
        got = parts.run(given)
        for name, array in want.items():
            assert relative(got[name], array) < 1e-6, name


@pytest.mark.parametrize("index", [0, 1])
def test_segments_behind_a_pruning_point_read_prompts_in_parts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, index: int
) -> None:
    """With a point before layer 0 they alone have layers, and without pruning they see it all."""
    seen: list[str] = []
    monkeypatch.setattr(
        openvino_passes.Passes, "split_queries", lambda passes, model: seen.append("layers")
    )
    config = model_config()
    segment = build_prefill(config, index, 0, 2, PRIMITIVE)
    opened(tmp_path, segment, random_weights(segment))
    selection = build_select(config, 1, PRIMITIVE)
    opened(tmp_path, selection, weights_of(config))
    assert seen == ["layers"]


def test_numbers_that_passes_add_to_a_graph_are_copies(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Overwritten before the model is compiled, as freed memory would be."""
    made: list[np.ndarray] = []
    monkeypatch.setattr(
        openvino_passes, "_at", lambda *numbers: made.append(np.array(numbers)) or made[-1]
    )
    config = model_config()
    model = build_prefill(config, 0, 0, 2, PRIMITIVE)
    weights = random_weights(model)
    onnx.save(filled(model, weights), tmp_path / "graph.onnx")
    changed = openvino.Core().read_model(tmp_path / "graph.onnx")
    openvino_passes.Passes().split_queries(changed)
    assert made
    for array in made:
        array[:] = 99
    compiled = openvino.Core().compile_model(changed, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    feeds = prompt(config, 2, 9)
    got = compiled(feeds)
    for name, array in Runner(model, weights, "openvino")(feeds).items():
        assert relative(got[name], array) < 1e-6, name


#: Times that a method's graph ranks tokens, in bodies of loops too.
RANKINGS = {
    "trio": 1,
    "topk-gradient": 1,
    "fastv": 1,
    "dart": 3,
    "divprune": 0,
    "random": 1,
    "cls-attention": 1,
    "vscan": 2,
    "cdpruner": 1,
}


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_sorts_and_keeps_what_it_keeps_by_comparing(
    tmp_path: Path, method: str
) -> None:
    config = model_config()
    model = build_select(config, 1, PRIMITIVE, method=method)
    weights = random_weights(model)
    compares = Runner(model, weights, "openvino")
    onnx.save(filled(model, weights), tmp_path / "graph.onnx")
    from trio_deploy.runtimes.openvino import OvRuntime

    sorts = OvRuntime(threads=1).open(tmp_path / "graph.onnx", keep_precision=True)
    changed = openvino.Core().read_model(tmp_path / "graph.onnx")
    openvino_passes.Passes().sort_ranks(changed)
    assert sorted_twice(changed) == RANKINGS[method]
    for seed in range(3):
        rng = np.random.default_rng(seed)
        feeds = batch_of(config, seed)
        shape = feeds["visual_mask"].shape
        feeds["seed"] = rng.integers(1000, size=len(feeds["keep"]))
        feeds["prior"] = rng.integers(4, size=shape).astype(np.float32)  # with ties
        feeds["prior_local"] = rng.integers(4, size=shape).astype(np.float32)
        got = sorts.run({name: feeds[name] for name in sorts.inputs})
        for name, array in compares(feeds).items():
            np.testing.assert_array_equal(got[name], array, err_msg=name)


def sorted_twice(model: Any) -> int:
    """Rankings by sorting in a model and in the bodies of its loops, two TopKs each."""
    found = 0
    for node in model.get_ops():
        if node.get_type_name() == "Loop":
            found += 2 * sorted_twice(node.get_function())
        found += node.get_type_name() == "TopK"
    return found // 2


@pytest.mark.parametrize("length", [1, 2, 19, 300])
def test_ranks_by_sorting_are_those_of_a_stable_sort(length: int) -> None:
    stage = Stage("ranks", PRIMITIVE.make_dialect())
    score = stage.input("score", FLOAT, ["B", "S"])
    index = stage.op.Range(0, stage.op.Squeeze(stage.op.Shape(score, start=1, end=2), [0]), 1)
    stage.output("rank", stage.d.ranks(stage.op, score, index), FLOAT, ["B", "S"])
    core = openvino.Core()
    model = core.read_model(filled(stage.finish(model_config()), {}).SerializeToString(), b"")
    openvino_passes.Passes().sort_ranks(model)
    assert sorted_twice(model) == 1
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    for seed, most in enumerate((1, 3, 1000)):
        scores = np.random.default_rng(seed).integers(most, size=(3, length)).astype(np.float32)
        order = np.argsort(-scores, axis=1, kind="stable")
        np.testing.assert_array_equal(compiled([scores])["rank"], np.argsort(order, axis=1))


@needs_bfloat16
def test_in_bfloat16_the_cache_is_bfloat16_and_holds_what_float32_holds(tmp_path: Path) -> None:
    config = model_config()
    model = build_prefill(config, 0, 0, 2, PRIMITIVE)
    weights = random_weights(model)
    whole = Runner(model, weights, "openvino")
    narrow = opened(tmp_path, model, weights, precision="bfloat16")
    kinds = {name: spec.dtype for name, spec in {**narrow.inputs, **narrow.outputs}.items()}
    assert {name for name, dtype in kinds.items() if dtype == ml_dtypes.bfloat16} == {
        f"{side}.{i}.{part}"
        for side in ("past", "present")
        for i in range(2)
        for part in ("key", "value")
    }
    feeds = prompt(config, 2, 9)
    rounded = {name: array.astype(kinds[name]) for name, array in feeds.items()}
    expected, got = whole(feeds), narrow.run(rounded)
    step, rounded = next_token(feeds, expected), next_token(feeds, got, ml_dtypes.bfloat16)
    for want, have in ((expected, got), (whole(step), narrow.run(rounded))):
        for name, array in want.items():
            assert relative(have[name].astype(np.float32), array) < 0.03, name


@needs_bfloat16
def test_one_thread_computes_in_bfloat16(tmp_path: Path) -> None:
    """Of sizes that OpenVINO fuses an MLP of, which would end this process."""
    config = model_config(hidden_size=64, intermediate_size=128)
    model = build_prefill(config, 0, 0, 2, PRIMITIVE)
    weights = random_weights(model)
    narrow = opened(tmp_path, model, weights, precision="bfloat16")
    feeds = prompt(config, 2, 9)
    expected = Runner(model, weights, "openvino")(feeds)["hidden_states"]
    rounded = {name: array.astype(narrow.inputs[name].dtype) for name, array in feeds.items()}
    assert relative(narrow.run(rounded)["hidden_states"], expected) < 0.03


@needs_bfloat16
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_a_selection_with_narrowed_products_keeps_what_float32_keeps(
    tmp_path: Path, kv_heads: int
) -> None:
    """Square and other weights, read forwards and backwards."""
    config = model_config(num_kv_heads=kv_heads)
    model = build_select(config, 1, PRIMITIVE)
    weights = weights_of(config)
    whole = Runner(model, weights, "openvino")
    onnx.save(filled(model, weights), tmp_path / "graph.onnx")
    from trio_deploy.runtimes.openvino import OvRuntime

    runtime = OvRuntime(threads=1, precision="bfloat16")
    narrow = runtime.open(tmp_path / "graph.onnx", keep_precision=True)
    feeds = batch_of(config)
    expected, got = whole(feeds), narrow.run({name: feeds[name] for name in narrow.inputs})
    error = relative(got["saliency"], expected["saliency"])
    assert 1e-5 < error < 0.05, error
    kept = [{*row[row >= 0]} for row in expected["keep_index"]]
    found = [{*row[row >= 0]} for row in got["keep_index"]]
    common = sum(len(a & b) for a, b in zip(kept, found, strict=True))
    assert common >= 0.9 * sum(map(len, kept))


_NARROWED = """
import sys
import numpy as np, openvino
from trio_deploy.runtimes.openvino_passes import Passes

model = openvino.Core().read_model(sys.argv[1])
Passes().narrow_products(model)
other = [np.full((64, 64), 7, np.uint16) for _ in range(500)]  # takes what memory was freed
held = [
    node.data.view(np.uint16).astype(np.uint32) << 16
    for node in model.get_ordered_ops()
    if node.get_type_name() == "Constant" and node.get_element_type() == openvino.Type.bf16
]
np.savez(sys.argv[2], *[bits.view(np.float32) for bits in held])
"""


def test_narrowed_square_weights_own_their_memory(tmp_path: Path) -> None:
    """In a process of its own, whose memory nothing before has filled with the same values."""
    config = model_config(hidden_size=64, num_kv_heads=4)
    model = build_select(config, 1, PRIMITIVE)
    weights = weights_of(config)
    onnx.save(filled(model, weights), tmp_path / "graph.onnx")
    subprocess.run(
        [sys.executable, "-c", _NARROWED, tmp_path / "graph.onnx", tmp_path / "held.npz"],
        check=True,
    )
    with np.load(tmp_path / "held.npz") as held:
        found = list(held.values())
    # The two square matrices that the backward pass multiplies from the other side, and the one of
    # the MLP that is multiplied from the left.
    for part in ("self_attn.k_proj", "self_attn.o_proj", "mlp.up_proj"):
        weight = weights[f"language_model.layers.1.{part}.weight"].astype(np.float32)
        rounded = weight.astype(ml_dtypes.bfloat16).astype(np.float32)
        assert any(np.array_equal(rounded, array) for array in found), part
    assert len(found) == 3


def test_passes_know_quantised_matrices(bundles: Bundles) -> None:
    """By the name of the weight that the codes stand for, as they know floats."""
    bundle = Bundle.load(bundles.path("tiny", target="cpu-openvino", quantize="int4"))
    core, passes = openvino.Core(), openvino_passes.Passes()
    select = core.read_model(str(bundle.graph("select_3")))
    assert sum(openvino_passes.is_coded(node) for node in select.get_ops()) == 8
    passes.dequantise(select)
    assert not any(openvino_passes.is_coded(node) for node in select.get_ops())
    passes.narrow_products(select)
    products = [node for node in select.get_ops() if node.get_type_name() == "MatMul"]
    narrow = [p for p in products if p.get_input_element_type(0).get_type_name() == "bf16"]
    assert len(narrow) == 13
    segment = core.read_model(str(bundle.graph("prefill_3")))
    passes.unfuse_mlps(segment)
    layers = len(bundle.stages["prefill_3"].layers)
    assert sum(node.get_type_name() == "Clamp" for node in segment.get_ops()) == layers
