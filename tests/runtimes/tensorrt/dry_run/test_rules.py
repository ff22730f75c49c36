"""The dry run: shipped and full-size graphs pass it, and what a version cannot take is an error."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from tests.support.exported import Export
from trio_deploy import Pipeline, Request, TrioError, export_model
from trio_deploy.cli.main import main
from trio_deploy.config.target import list_targets
from trio_deploy.runtimes.base import TensorSpec
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.dry_run.operators import operator_table
from trio_deploy.runtimes.tensorrt.dry_run.rules import Finding, check_graph, dry_run, read_graph
from trio_deploy.runtimes.tensorrt.dry_run.shapes import UnknownShape, resolve
from trio_deploy.runtimes.tensorrt.first_run import example_feeds
from trio_deploy.runtimes.tensorrt.profiles import Bounds, Profile, profiles
from trio_deploy.schedule.methods import METHODS

JETSON, NANO, H200 = "jetson-agx-orin-64gb", "jetson-orin-nano-8gb", "h200"
FLOAT, HALF, INT64 = TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.INT64

TENSORRT_TARGETS = [name for name in list_targets() if load_target(name).tensorrt]


def errors(findings: Sequence[Finding]) -> list[str]:
    return [finding.message for finding in findings if finding.error]


# ------------------------------------------------------------------------------- what is shipped


@pytest.mark.parametrize(
    ("target", "version"),
    [(NANO, "8.6"), (NANO, "10.3"), (NANO, "11.4"), (H200, "10.15"), (H200, "11.4")],
)
def test_the_tiny_model_passes(exported: Export, target: str, version: str) -> None:
    report = dry_run(exported("tiny", target), load_target(target), tensorrt=version)
    assert report.passed, report.to_text()
    assert not any(finding.message.startswith("CumSum") for finding in report.findings)


@pytest.mark.parametrize("model", ["llava-1.5-7b", "llava-next-7b"])
@pytest.mark.parametrize(
    ("target", "versions"), [(JETSON, ["8.6", "10.3"]), (H200, ["10.15", "11.4"])]
)
def test_full_size_graphs_pass(
    exported: Export, model: str, target: str, versions: list[str]
) -> None:
    bundle = exported(model, target, graphs_only=True)
    for version in versions:
        report = dry_run(bundle, load_target(target), tensorrt=version)
        assert report.passed, report.to_text()
        assert len(report.stages) == len(bundle.stages)


@pytest.mark.parametrize("target", TENSORRT_TARGETS)
def test_every_target_takes_what_is_exported_for_it(exported: Export, target: str) -> None:
    bundle = exported("llava-next-7b", target, graphs_only=True)
    device = load_target(target)
    assert bundle.manifest.decode == device.decode_layout
    report = dry_run(bundle, device)
    assert report.passed, report.to_text()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes(exported: Export, method: str) -> None:
    for target, version in ((NANO, "8.6"), (H200, "10.15")):
        bundle = exported("tiny", target, method=method)
        report = dry_run(bundle, load_target(target), tensorrt=version)
        assert report.passed, report.to_text()


def test_sizes_are_those_that_onnx_runtime_makes(exported: Export) -> None:
    """The sizes of every output of every stage, against a run."""
    bundle = exported("tiny", NANO, dtype="float32")
    for stage, found in profiles(bundle, load_target(NANO)).items():
        session = onnxruntime.InferenceSession(str(bundle.graph(stage)))
        specs = {
            entry.name: TensorSpec(
                entry.name,
                np.dtype({"tensor(int64)": "int64", "tensor(bool)": "bool"}.get(entry.type, "f4")),
                tuple(entry.shape),
            )
            for entry in session.get_inputs()
        }
        model = read_graph(bundle.graph(stage))
        for profile in found:
            feeds = example_feeds(bundle.stages[stage], specs, profile)
            shapes = {name: array.shape for name, array in feeds.items()}
            values = {"width": feeds["width"]} if "width" in feeds else {}
            resolved = resolve(model, shapes, values)
            for entry, array in zip(session.get_outputs(), session.run(None, feeds), strict=True):
                assert resolved.tensors[entry.name].shape == array.shape, (stage, entry.name)
                if array.dtype.kind == "f":
                    assert np.isfinite(array).all()


def test_the_dry_run_needs_neither_weights_nor_tensorrt_nor_a_gpu(
    exported: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported("llava-next-7b", JETSON, graphs_only=True)
    command = ["build", str(bundle.path), "--dry-run"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert (
        "graphs: passed, 9 of them at" in text
        and "(57 in all)" in text
        and "ScatterElements" in text
    )
    assert main([*command, "--json", "--tensorrt", "8.6"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["passed"] and "onnx-tensorrt" in raw["operator_table"]["source"]
    corner = raw["stages"]["prefill_3"]["corners"]["prefill max"]
    assert corner["logits"] == [1, 32064] and corner["present.31.key"] == [1, 32, 3440, 128]


def test_the_dry_run_of_one_stage_leaves_the_others_alone(
    exported: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported("tiny", NANO)
    command = ["build", str(bundle.path), "--dry-run", "--stage", "embed", "--json"]
    assert main([*command, "--stage", "vision"]) == 0
    assert list(json.loads(capsys.readouterr().out)["stages"]) == ["vision", "embed"]
    assert main([*command, "--stage", "decoder"]) == 1
    assert "no stage 'decoder'; it has vision" in capsys.readouterr().err


def test_activations_beyond_the_workspace_are_remarked_upon(exported: Export) -> None:
    bundle = exported("llava-next-7b", JETSON, graphs_only=True)
    target = load_target(JETSON)
    assert not dry_run(bundle, target).findings
    report = dry_run(bundle, replace(target, workspace_gib=1))
    remarks = {finding.stage: finding.message for finding in report.findings}
    assert "prefill_0" in remarks and "embed" not in remarks and report.passed
    assert re.search(
        r"up to 3\.\d+ GiB, beyond workspace_gib 1 .*raise it to 4", remarks["prefill_0"]
    )
    assert not dry_run(bundle, replace(target, workspace_gib=None)).findings


def test_a_bundle_in_the_other_dialect_says_how_to_export(
    exported: Export, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = exported("tiny", H200)
    assert main(["build", str(bundle.path), "--target", NANO, "--dry-run"]) == 1
    said = capsys.readouterr().err
    assert "onnx dialect, but TensorRT 10.3 reads primitive" in said and "--dialect" in said


def test_a_target_without_tensorrt_is_refused(exported: Export) -> None:
    with pytest.raises(TrioError, match="cpu runs onnxruntime.*runtime: tensorrt"):
        dry_run(exported("tiny", NANO), load_target("cpu"))


@pytest.mark.parametrize(
    ("version", "says"), [("8.5", "8.5 is too old: 8.6"), ("new", "'new' is no version")]
)
def test_a_version_that_will_not_do_is_named(exported: Export, version: str, says: str) -> None:
    with pytest.raises(TrioError, match=says):
        dry_run(exported("tiny", NANO), load_target(NANO), tensorrt=version)


def test_openvino_reads_and_runs_what_tensorrt_is_given(exported: Export) -> None:
    """An independent reader of the graphs for TensorRT before 10.15, where none of it can run."""
    pytest.importorskip("openvino")
    bundle = exported("tiny", NANO, dtype="float32")
    picture = Path(__file__).parents[4] / "examples" / "scene.png"
    answers = []
    for runtime in ("openvino", "onnxruntime"):
        pipeline = Pipeline.open(bundle, runtime=runtime, threads=2)
        asked = pipeline.generate(Request("what color is the circle?", [picture], max_new_tokens=4))
        answers.append(asked.token_ids)
    assert answers[0] == answers[1] and answers[0]


def test_bfloat16_is_not_for_tensorrt_8(exported: Export) -> None:
    bundle = exported("tiny", NANO, dtype="bfloat16")
    assert dry_run(bundle, load_target(NANO), tensorrt="10.3").passed
    report = dry_run(bundle, load_target(NANO), tensorrt="8.6")
    assert any("does not support bfloat16" in message for message in errors(report.findings))


def test_too_large_tensors_are_found_at_the_corner_where_they_are(exported: Export) -> None:
    target = load_target(JETSON)
    target = replace(target, limits=replace(target.limits, max_batch=8))
    report = dry_run(exported("llava-next-7b", JETSON, graphs_only=True), target)
    large = [f for f in report.findings if "elements at prefill max" in f.message]
    assert {f.stage for f in large} == {"prefill_0", "prefill_1", "prefill_2", "prefill_3"}
    assert all("lower the target's limits" in f.message for f in large)


# ----------------------------------------------------------------------------- what is not taken


def graph(
    nodes: Sequence[object],
    inputs: dict[str, tuple[int, Sequence[int | str]]],
    outputs: dict[str, int],
    constants: dict[str, np.ndarray] | None = None,
    opset: int = 17,
) -> ModelProto:
    made = helper.make_graph(
        list(nodes),
        "test",
        [helper.make_tensor_value_info(name, *info) for name, info in inputs.items()],
        [helper.make_tensor_value_info(name, dtype, None) for name, dtype in outputs.items()],
        [numpy_helper.from_array(array, name) for name, array in (constants or {}).items()],
    )
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", opset)])


def found(
    model: ModelProto,
    version: str = "8.6",
    shapes: dict[str, Sequence[Sequence[int]]] | None = None,
) -> list[str]:
    bounds = {
        entry.name: Bounds(*(tuple(shape) for shape in (shapes or {})[entry.name]))
        if entry.name in (shapes or {})
        else Bounds(*[tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim)] * 3)
        for entry in model.graph.input
    }
    _, findings = check_graph("s", model, [Profile("p", bounds)], operator_table(version))
    return errors(findings)


ONE = np.array([1], np.int64)
CACHE = (HALF, (1, 2, 8, 4))


def cumsum() -> ModelProto:
    node = helper.make_node("CumSum", ["x", "axis"], ["y"])
    return graph([node], {"x": (INT64, [4])}, {"y": INT64}, {"axis": np.array(0)})


def topk(count: int, **attributes: int) -> ModelProto:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], **attributes)
    outputs = {"v": FLOAT, "i": INT64}
    return graph([node], {"x": (FLOAT, [5000])}, outputs, {"k": np.array([count])})


def attention(*more: str, opset: int = 24) -> ModelProto:
    node = helper.make_node("Attention", ["q", "k", "v", *more], ["y"])
    inputs = {name: (HALF, (1, 2, 8, 4)) for name in "qkv"} | {"n": (INT64, (1,))}
    return graph([node], inputs, {"y": HALF}, opset=opset)


def scatter(out: str = "y", dtype: int = HALF, at: int = INT64) -> ModelProto:
    nodes = [
        helper.make_node("TensorScatter", ["past", "new", "at"], ["made"], axis=-2),
        helper.make_node("Identity", ["made"], ["y"]),
    ]
    if out == "y":
        nodes = [helper.make_node("TensorScatter", ["past", "new", "at"], ["y"], axis=-2)]
    cache = (dtype, CACHE[1])
    inputs = {"past": cache, "new": (dtype, (1, 2, 1, 4)), "at": (at, (1,))}
    return graph(nodes, inputs, {"y": dtype}, opset=24)


def loop(grows: bool = False, collects: bool = False) -> ModelProto:
    body_out = ["go_out", "s_out"] + (["each"] if collects else [])
    nodes = [
        helper.make_node("Identity", ["go"], ["go_out"]),
        helper.make_node("Concat", ["s", "s"], ["s_out"], axis=0)
        if grows
        else helper.make_node("Abs", ["s"], ["s_out"]),
    ]
    if collects:
        nodes.append(helper.make_node("Identity", ["s"], ["each"]))
    body = helper.make_graph(
        nodes,
        "body",
        [
            helper.make_tensor_value_info("i", INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            helper.make_tensor_value_info("s", FLOAT, None),
        ],
        [helper.make_tensor_value_info(name, FLOAT, None) for name in body_out],
    )
    outputs = ["y"] + (["all"] if collects else [])
    node = helper.make_node("Loop", ["trips", "", "x"], outputs, body=body)
    return graph([node], {"x": (FLOAT, [4])}, dict.fromkeys(outputs, FLOAT), {"trips": np.array(3)})


def unary(operator: str, dtype: int, out: int, **attributes: int) -> ModelProto:
    node = helper.make_node(operator, ["x"], ["y"], **attributes)
    return graph([node], {"x": (dtype, [2, 4])}, {"y": out})


@pytest.mark.parametrize(
    ("model", "version", "says"),
    [
        (cumsum(), "8.6", "CumSum does not support int64"),
        (cumsum(), "10.15", "CumSum does not support int64"),
        (topk(2000), "8.6", "takes 2000 of at most 1024"),
        (topk(3840), "10.15", "takes 3840 of at most 3839"),
        (topk(16, sorted=0), "10.3", "must sort"),
        (unary("ReduceSum", INT64, INT64), "8.6", "ReduceSum does not support int64"),
        (unary("NonZero", FLOAT, INT64), "10.3", "NonZero its output's sizes depend on data"),
        (unary("Bernoulli", FLOAT, FLOAT), "10.3", "Bernoulli is not supported"),
        (unary("BitwiseNot", INT64, INT64), "10.3", "is not an operator of ONNX, opset 17"),
        (unary("Abs", TensorProto.DOUBLE, TensorProto.DOUBLE), "10.3", "does not support float64"),
        (attention(opset=24), "10.3", "opset 24; opsets 9 to 20 are supported"),
        (attention("", "", "", "n"), "10.15", "nonpad_kv_seqlen"),
        (scatter("elsewhere"), "10.15", "not an input and an output"),
        (scatter(dtype=INT64), "10.15", "TensorScatter does not support int64"),
        (scatter(at=FLOAT), "10.15", "places to write to in float32|TensorScatter .*at"),
        (loop(grows=True), "8.6", r"carries a value of sizes \(4,\) that become \(8,\)"),
        (loop(collects=True), "8.6", "collects outputs over its rounds"),
    ],
)
def test_what_a_version_cannot_take_is_named(model: ModelProto, version: str, says: str) -> None:
    messages = found(model, version)
    assert any(re.search(says, message) for message in messages), messages


@pytest.mark.parametrize(
    ("model", "version"),
    [
        (topk(1024), "8.6"),
        (topk(3840), "10.3"),
        (attention(), "10.15"),
        (scatter(), "10.15"),
        (scatter(dtype=FLOAT), "10.15"),
        (scatter(dtype=TensorProto.BFLOAT16), "11.4"),
        (loop(), "8.6"),
        (unary("ReduceSum", INT64, INT64), "10.3"),
    ],
)
def test_what_a_version_takes_passes(model: ModelProto, version: str) -> None:
    assert found(model, version) == []


def test_a_cache_updated_in_place_must_have_one_capacity() -> None:
    shapes = {"past": [(1, 2, 4, 4), (1, 2, 8, 4), (1, 2, 8, 4)]}
    assert any("one fixed capacity" in message for message in found(scatter(), "10.15", shapes))


def test_inputs_that_no_node_uses_are_remarked_upon() -> None:
    """Whether TensorRT keeps them as inputs of the engine is not documented."""
    node = helper.make_node("Abs", ["x"], ["y"])
    model = graph([node], {"x": (FLOAT, [2]), "spare": (INT64, [2])}, {"y": FLOAT})
    bounds = {name: Bounds((2,), (2,), (2,)) for name in ("x", "spare")}
    _, findings = check_graph("s", model, [Profile("p", bounds)], operator_table("10.3"))
    assert findings == [Finding("s", "no node uses the input spare", False)]


def test_no_stage_has_an_input_that_no_node_uses(exported: Export) -> None:
    for target in (NANO, H200):
        report = dry_run(exported("tiny", target), load_target(target))
        assert not [f for f in report.findings if "no node uses" in f.message], report.to_text()


def test_a_plugins_domain_is_refused() -> None:
    node = helper.make_node("GroupQueryAttention", ["x"], ["y"], domain="com.microsoft")
    model = graph([node], {"x": (FLOAT, [2])}, {"y": FLOAT})
    model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    messages = found(model, "10.3")
    assert any("com.microsoft, which need plugins" in message for message in messages)


def test_sizes_may_not_be_computed_with_anything() -> None:
    """TensorRT's documentation names the layers that compute sizes; a choice is none of them."""
    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Equal", ["shape", "one"], ["same"]),
        helper.make_node("Where", ["same", "one", "shape"], ["chosen"]),
        helper.make_node("ConstantOfShape", ["chosen"], ["y"]),
    ]
    model = graph(nodes, {"x": (FLOAT, [2])}, {"y": FLOAT}, {"one": ONE})
    messages = found(model, "10.3")
    assert messages, "a size that depends on a choice is neither known nor allowed"


def test_constants_beyond_int32_are_found_where_int64_is_narrowed() -> None:
    node = helper.make_node("Add", ["x", "big"], ["y"])
    big = np.array([2**40], np.int64)
    model = graph([node], {"x": (INT64, [1])}, {"y": INT64}, {"big": big})
    assert any("beyond int32" in message for message in found(model, "8.6"))
    assert found(model, "10.3") == []


def test_a_damaged_graph_is_named(tmp_path: Path) -> None:
    file = tmp_path / "prefill_0.onnx"
    file.write_bytes(b"not a graph")
    with pytest.raises(TrioError, match="prefill_0.onnx cannot be read as ONNX"):
        read_graph(file)


def test_a_missing_value_of_a_size_is_named() -> None:
    node = helper.make_node("Range", ["start", "x", "step"], ["y"])
    constants = {"start": np.array(0), "step": np.array(1)}
    model = graph([node], {"x": (INT64, [])}, {"y": INT64}, constants)
    with pytest.raises(UnknownShape, match="sizes depend on data"):
        resolve(model, {"x": ()})
    assert resolve(model, {"x": ()}, {"x": 7}).tensors["y"].shape == (7,)  # type: ignore[dict-item]


# ------------------------------------------------------------------------------------- the tables


def test_the_newest_table_that_is_no_newer_holds() -> None:
    assert [
        operator_table(v).version for v in ("8.6.1", "9.2", "10.3", "10.14", "10.15", "11.4")
    ] == [
        "8.6",
        "8.6",
        "10.0",
        "10.8",
        "10.15",
        "10.15",
    ]


def test_every_table_names_its_source_and_takes_what_older_ones_took() -> None:
    tables = [operator_table(version) for version in ("8.6", "10.0", "10.15")]
    for table in tables:
        assert "operators.md" in table.source
        assert all(set(types) <= set("FfIB") for types in table.operators.values())
    for older, newer in pairwise(tables):
        assert set(older.operators) <= set(newer.operators)


# ------------------------------------------------------------------------------ quantised weights


def test_graphs_of_floats_of_4_bit_pass(exported: Export) -> None:
    thor = load_target("jetson-thor")
    bundle = exported("tiny", "jetson-thor", quantize="nvfp4")
    report = dry_run(bundle, thor)
    assert report.passed, report.to_text()
    assert any("opset 23, which codes of 4 bit need" in each.message for each in report.findings)
    older = dry_run(bundle, thor, tensorrt="10.7")
    assert any("does not keep weights in float4e2m1" in each for each in errors(older.findings))


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize(("target", "version"), [(JETSON, "10.3"), (H200, "10.15")])
def test_quantised_graphs_pass(exported: Export, target: str, version: str, scheme: str) -> None:
    report = dry_run(
        exported("tiny", target, quantize=scheme), load_target(target), tensorrt=version
    )
    assert report.passed, report.to_text()
    noted = [
        each for each in report.findings if "opset 21, which codes of 4 bit need" in each.message
    ]
    assert bool(noted) == (scheme == "int4" and version == "10.3")


def test_versions_before_10_keep_no_codes(exported: Export) -> None:
    report = dry_run(exported("tiny", JETSON, quantize="int8"), load_target(JETSON), tensorrt="8.6")
    assert any("does not keep weights in int8" in each for each in errors(report.findings))
    old = replace(load_target(JETSON), tensorrt="8.6", quantize="int8")
    with pytest.raises(TrioError, match=r"TensorRT 8.6 does not take weights in int8: leave"):
        load_target(old)


def test_blocks_of_32_are_refused_for_targets_with_engines(tmp_path: Path) -> None:
    small = replace(load_target(H200), quantize="int4-g32")
    with pytest.raises(TrioError, match="weights in int4-g32: choose int8, int4 or fp8"):
        load_target(small)
    with pytest.raises(TrioError, match="does not take weights in int4-g32"):
        export_model("tiny", tmp_path / "b", target=H200, quantize="int4-g32", progress=False)


@pytest.mark.parametrize(
    ("dtype", "shape", "attributes", "zero", "expected"),
    [
        (TensorProto.INT8, (4, 6), {"axis": 0}, False, ""),
        (TensorProto.INT4, (4, 128), {"axis": 1, "block_size": 64}, False, ""),
        (TensorProto.INT4, (4, 64), {"axis": 1, "block_size": 32}, False, "blocks of 32"),
        (TensorProto.INT8, (4, 128), {"axis": 1, "block_size": 64}, False, "8 bit in blocks"),
        (TensorProto.INT8, (4, 6), {"axis": 0}, True, "has zero points"),
        (TensorProto.UINT4, (4, 128), {"axis": 1, "block_size": 64}, False, "weights in uint4"),
        (TensorProto.FLOAT4E2M1, (4, 32), {"axis": 1, "block_size": 16}, False, ""),
        (
            TensorProto.FLOAT4E2M1,
            (4, 32),
            {"axis": 1, "block_size": 32},
            False,
            "not of 16: export with --quantize nvfp4",
        ),
    ],
)
def test_what_a_quantised_matrix_may_be(
    dtype: int, shape: tuple[int, int], attributes: dict[str, int], zero: bool, expected: str
) -> None:
    block = attributes.get("block_size")
    scales = (shape[0],) if block is None else (shape[0], shape[1] // block)
    halves = (TensorProto.INT4, TensorProto.UINT4, TensorProto.FLOAT4E2M1)
    count = shape[0] * shape[1] // (2 if dtype in halves else 1)
    initializers = [
        helper.make_tensor("q", dtype, shape, b"\0" * count, raw=True),
        numpy_helper.from_array(np.ones(scales, np.float32), "s"),
    ]
    inputs = ["q", "s"]
    if zero:
        initializers.append(numpy_helper.from_array(np.zeros(scales, np.int8), "z"))
        inputs.append("z")
    graph = helper.make_graph(
        [
            helper.make_node("DequantizeLinear", inputs, ["w"], **attributes),
            helper.make_node("MatMul", ["w", "x"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", FLOAT, [shape[1], 2])],
        [helper.make_tensor_value_info("y", FLOAT, [shape[0], 2])],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)])
    _, findings = check_graph("g", model, [Profile("all", {}, {})], operator_table("10.15"))
    found = errors(findings)
    assert [expected in each for each in found] == ([True] if expected else [])
