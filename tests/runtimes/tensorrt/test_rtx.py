"""Every stage compiled by TensorRT-RTX, and what its compiler says of the engines.

`make rtx-tests` runs this file alone, since a compile wants both cores of a small machine. Nothing
here runs on a GPU: kernels, their tensors and their memory are read from the compiler's log.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import prod
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from tests.support.bundles import Bundles
from tests.support.rtx import (
    AWQ,
    SMALL,
    SMALL_QWEN,
    TIED,
    Case,
    Compiler,
    Stage,
    in_full_runs,
    require_compiler,
    require_known,
)
from tests.support.weights_as_inputs import with_matrices_as_inputs
from trio_deploy import TrioError
from trio_deploy.runtimes.tensorrt.ahead import compile_ahead
from trio_deploy.runtimes.tensorrt.bindings import load
from trio_deploy.runtimes.tensorrt.compiler_log import names_of
from trio_deploy.runtimes.tensorrt.memory import stored_bytes
from trio_deploy.runtimes.tensorrt.profiles import Bounds, Profile, profiles
from trio_deploy.schedule.methods import METHODS

Tensors = dict[str, tuple[int, list[int | str]]]

pytestmark = pytest.mark.rtx

TINY_STAGES = (
    *("vision", "embed", "select_1", "prefill_1", "select_2", "prefill_2", "select_3"),
    "prefill_3",
)
NEXT_STAGES = (
    *("vision", "embed", "prefill_0", "select_1", "prefill_1", "select_2", "prefill_2"),
    *("select_3", "prefill_3"),
)
QWEN_STAGES = ("vision", "embed", "select_1", "prefill_1", "select_2", "prefill_2")
QWEN_SCHEDULE = "0:0.4:divprune,2:0.2"  # as their recipes: at the encoder, before a middle layer
FORMS = (("primitive", "shared"), ("primitive", "separate"), ("onnx", "separate"))
#: Bytes held per byte that the plan counts, where it is more than 1.02: a convolution's 3 channels
#: are stored as 4, and a selection of Qwen2.5-VL holds the keys' matrix in a layout for each
#: direction (in the primitive dialect, where the batch is fixed).
HELD = {
    ("tiny", "vision"): 1.08,
    ("qwen2_5_vl", "select_2"): 1.07,
}

#: Scratch memory of the full-size stages in MiB, at the limits of a 24 GB card. Matrices are inputs
#: here, which the primitive dialect transposes at every run: with constants it takes less.
ACTIVATIONS = {
    ("llava-next-7b", "onnx"): {
        "vision": 80,
        "embed": 1,
        "prefill_0": 290,
        "select_1": 235,
        "prefill_1": 210,
        "select_2": 190,
        "prefill_2": 175,
        "select_3": 160,
        "prefill_3": 100,
        "decode": 25,
    },
    ("llava-next-7b", "primitive"): {
        "vision": 75,
        "embed": 1,
        "prefill_0": 590,
        "select_1": 420,
        "prefill_1": 305,
        "select_2": 390,
        "prefill_2": 240,
        "select_3": 370,
        "prefill_3": 190,
    },
    ("llava-1.5-7b", "onnx"): {
        "vision": 25,
        "embed": 1,
        "prefill_0": 105,
        "select_1": 140,
        "prefill_1": 90,
        "select_2": 135,
        "prefill_2": 90,
        "select_3": 130,
        "prefill_3": 60,
        "decode": 25,
    },
    ("qwen2.5-vl-7b", "onnx"): {
        "vision": 165,
        "embed": 1,
        "select_1": 90,
        "prefill_1": 160,
        "select_2": 210,
        "prefill_2": 100,
        "decode": 25,
    },
    ("qwen3-vl-8b", "onnx"): {
        "vision": 150,
        "embed": 1,
        "select_1": 100,
        "prefill_1": 125,
        "select_2": 165,
        "prefill_2": 80,
        "decode": 30,
    },
}
#: The same for small models, whichever stage. In float32, where no attention is fused, it is four
#: times as much, and in a tower of patches all scores of both heads before and after the softmax.
SMALL_ACTIVATIONS = 40
SCORES_OF_PATCHES = 470

#: Copies to the host, for each of which it waits: one in the body of a loop that data end.
HOST_WAITS = {
    "trio": 2,  # at every block of ranks, and at every two rounds of a block's fixed point
    "topk-gradient": 0,
    "fastv": 0,
    "dart": 0,
    "divprune": 1,  # at every sixteen picks
    "random": 0,
    "cls-attention": 0,
    "vscan": 0,
    "cdpruner": 1,  # at every sixteen picks
}


def _cases() -> Iterator[object]:
    for dialect, layout in FORMS:
        decode = ("decode",) if layout == "separate" else ()
        for dtype in ("float16", "bfloat16", "float32"):
            stages = (*TINY_STAGES, *decode)
            case = Case("tiny", dialect, layout, dtype)
            yield from _params(case, stages, stages if dtype == "float16" else ())
            for family in SMALL_QWEN:
                case = Case(family, dialect, layout, dtype, QWEN_SCHEDULE)
                here = (dialect, dtype) == ("primitive", "float16") and layout == "shared"
                yield from _params(case, (*QWEN_STAGES, *decode), QWEN_STAGES if here else ())
    case = Case("llava-next-7b", "onnx", "separate")
    yield from _params(case, (*NEXT_STAGES, "decode"), (*NEXT_STAGES, "decode"))
    case = Case("llava-1.5-7b", "onnx", "separate")
    yield from _params(case, (*NEXT_STAGES, "decode"), ())
    case = Case("llava-next-7b", "primitive", "shared")
    yield from _params(case, NEXT_STAGES, ("prefill_0", "select_1", "prefill_1"))
    case = Case("qwen3-vl-8b", "onnx", "separate")
    yield from _params(case, (*QWEN_STAGES, "decode"), ("vision", "select_1"))
    case = Case("qwen2.5-vl-7b", "onnx", "separate")
    yield from _params(case, (*QWEN_STAGES, "decode"), ())


def _params(case: Case, stages: Sequence[str], here: Sequence[str]) -> Iterator[object]:
    """Stages of a case; those that are not `here` run in full runs."""
    for stage in stages:
        marks = () if stage in here else (in_full_runs,)
        yield pytest.param((case, stage), id=f"{case}-{stage}", marks=marks)


@pytest.fixture(scope="module")
def compiler(tmp_path_factory: pytest.TempPathFactory, bundles: Bundles) -> Compiler:
    require_compiler()
    return Compiler(tmp_path_factory.mktemp("rtx"), bundles)


@pytest.fixture(scope="module", params=_cases())
def stage(request: pytest.FixtureRequest, compiler: Compiler) -> Stage:
    """A stage of a case, compiled; its failure is that of the tests below."""
    case, name = request.param
    return compiler.compile(case, name)


def test_the_compiler_is_one_whose_kernels_are_known(compiler: Compiler) -> None:
    names_of(load("rtx").version)


def test_attention_is_one_kernel_per_layer_in_16_bit_and_none_in_float32(stage: Stage) -> None:
    report, config = stage.report, stage.bundle.config
    require_known(report)
    if stage.info.kind not in ("prefill", "decode", "vision"):
        return
    if stage.info.kind == "decode" and stage.case.dtype == "float32":
        return  # the scores of one query are no matter of memory: some head sizes are fused
    layers = stage.count("Attention", "Softmax")
    assert layers > 0
    heads = config.vision.num_heads if stage.info.kind == "vision" else config.text.num_heads
    if stage.case.dtype == "float32":
        assert report.attentions == 0 and report.scores(heads)
    else:
        assert report.attentions == layers
        assert report.scores(heads) == [], "nothing holds every head's scores"


def test_weights_are_held_once(stage: Stage) -> None:
    if stage.case.model not in SMALL:
        return  # its weights are inputs
    counted = stored_bytes(stage.graph)
    held = HELD.get((stage.case.model, stage.info.name), 1.02)
    # Kernels may hold single numbers as their own, and some selections have no others.
    slack = 4096
    assert 0.98 * counted - slack <= stage.report.weight_bytes <= held * counted + slack


def test_scratch_memory_stays_within_what_it_was(stage: Stage) -> None:
    if stage.case.model in SMALL:
        full = stage.case.dtype == "float32"
        most = SMALL_ACTIVATIONS * (4 if full else 1)
        if full and stage.info.kind == "vision" and stage.case.model in SMALL_QWEN:
            most = SCORES_OF_PATCHES
    else:
        most = ACTIVATIONS[stage.case.model, stage.case.dialect][stage.info.name]
    assert stage.report.activation_bytes <= most * 2**20


def test_a_decode_step_of_the_onnx_dialect_copies_no_cache(stage: Stage) -> None:
    """At head size 128, that of every large model; for the tiny model's 64 other kernels do."""
    if stage.info.kind != "decode" or stage.case.dialect != "onnx":
        return
    ends = [*stage.info.inputs, *stage.info.outputs]
    outside = [tensor.name for tensor in ends]
    written = [output for kernel in stage.report.kernels for output in kernel.outputs]
    caches = {prod(each.sizes) for each in written if each.name.startswith("present.")}
    assert caches and min(caches) > 0, "capacities are fixed"
    copies = stage.report.copies(sorted(caches), outside)
    assert bool(copies) == (stage.bundle.config.text.head_dim != 128), copies


def test_a_selection_waits_for_the_host_no_more_often_than_it_did(stage: Stage) -> None:
    require_known(stage.report)
    if stage.info.kind == "select":
        assert stage.report.host_waits <= HOST_WAITS[str(stage.info.method)]
    else:
        assert stage.report.host_waits == 0


# ------------------------------------------------------------------- methods and capabilities


def _every_method(dialect: str) -> Case:
    points = (f"{i + 1}:{0.9 - 0.1 * i:.1f}:{name}" for i, name in enumerate(HOST_WAITS))
    return Case(dialect=dialect, layout="separate", schedule=",".join(points))


def test_every_method_is_among_those_compiled() -> None:
    assert set(HOST_WAITS) == set(METHODS)


@pytest.mark.parametrize("dialect", ["onnx", pytest.param("primitive", marks=in_full_runs)])
@pytest.mark.parametrize("method", HOST_WAITS)
def test_every_methods_selection_compiles(compiler: Compiler, method: str, dialect: str) -> None:
    made = compiler.compile(_every_method(dialect), f"select_{list(HOST_WAITS).index(method) + 1}")
    assert made.info.method == method
    require_known(made.report)
    assert made.report.host_waits <= HOST_WAITS[method]


@pytest.mark.parametrize(
    "method",
    [
        *("divprune", "vscan"),
        *(pytest.param(each, marks=in_full_runs) for each in ("trio", "cls-attention", "random")),
    ],
)
def test_a_selection_before_the_first_layer_compiles(compiler: Compiler, method: str) -> None:
    case = Case(dialect="onnx", layout="separate", schedule=f"0:0.5:{method}")
    made = compiler.compile(case, "select_1")
    assert made.info.method == method and made.report.kernels


@pytest.mark.parametrize(
    "capabilities", [("8.6",), ("8.9",), ("12.0",), ("12.1",), ("8.6", "8.9", "12.0")], ids="+".join
)
def test_every_gpu_is_compiled_for_and_several_at_once(
    compiler: Compiler, capabilities: tuple[str, ...]
) -> None:
    case = Case(dialect="onnx", layout="separate")
    anywhere = compiler.compile(case, "prefill_1").report
    made = compiler.compile(case, "prefill_1", capabilities).report
    assert (made.launches, made.attentions) == (anywhere.launches, anywhere.attentions)


def test_turing_is_refused(compiler: Compiler) -> None:
    """Compute capability 7.5 has no float32 products, which scores are computed with."""
    with pytest.raises(TrioError, match="FP32 GEMM is not supported"):
        compiler.compile(Case(dialect="onnx", layout="separate"), "select_3", ("7.5",))


@in_full_runs
def test_a_crash_of_the_compiler_is_that_stages_failure(compiler: Compiler, tmp_path: Path) -> None:
    """One layer with the profile of decode alone ends the process of TensorRT-RTX 1.7."""
    bundle, target = compiler.bundle(Case("llava-next-7b"))
    graph = with_matrices_as_inputs(bundle.graph("prefill_0"), tmp_path / "prefill_0.onnx")
    (both,) = profiles(bundle, target)["prefill_0"]
    decode = next(use for use in both.uses if use.name == "decode")
    with pytest.raises(TrioError, match=r"prefill_0\.onnx: .* ended by SIGSEGV"):
        compile_ahead(graph, [decode], dtype="float16")


# ------------------------------------------------------------------------- what must be refused


def _graph(
    nodes: list[onnx.NodeProto], inputs: Tensors, outputs: Tensors, *weights: onnx.TensorProto
) -> onnx.ModelProto:
    """A graph of opset 24 with named inputs and outputs of (type, sizes)."""
    ends = [
        [helper.make_tensor_value_info(name, *about) for name, about in each.items()]
        for each in (inputs, outputs)
    ]
    made = helper.make_graph(nodes, "refused", *ends, list(weights))
    opset = [helper.make_opsetid("", 24), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(made, opset_imports=opset, ir_version=11)


def _node(operator: str, inputs: str, outputs: str = "y", **attributes: object) -> onnx.NodeProto:
    return helper.make_node(operator, inputs.split(), outputs.split(), **attributes)


def _missing_weight() -> onnx.TensorProto:
    weight = onnx.TensorProto(
        name="w", data_type=T.FLOAT, dims=[4, 4], data_location=onnx.TensorProto.EXTERNAL
    )
    for key, value in (("location", "no such file"), ("offset", "0"), ("length", "64")):
        weight.external_data.add(key=key, value=value)
    return weight


def _short_weight() -> onnx.TensorProto:
    return onnx.TensorProto(name="w", data_type=T.FLOAT, dims=[4, 4], raw_data=bytes(60))


def _growing_loop() -> onnx.ModelProto:
    """A Loop whose state has one more row after each of its three rounds."""
    body = helper.make_graph(
        [_node("Identity", "go", "go_on"), _node("Concat", "s x", "longer", axis=0)],
        "body",
        [
            helper.make_tensor_value_info("i", T.INT64, []),
            helper.make_tensor_value_info("go", T.BOOL, []),
            helper.make_tensor_value_info("s", T.FLOAT, None),
        ],
        [
            helper.make_tensor_value_info("go_on", T.BOOL, []),
            helper.make_tensor_value_info("longer", T.FLOAT, None),
        ],
    )
    loop = helper.make_node("Loop", ["trips", "yes", "x"], ["y"], body=body)
    yes = onnx.numpy_helper.from_array(np.array(True), "yes")
    trips = onnx.numpy_helper.from_array(np.array(3), "trips")
    return _graph([loop], {"x": X}, {"y": (T.FLOAT, ["N", 4])}, trips, yes)


def _attention(mask: int) -> onnx.ModelProto:
    """Attention in float16, whose mask has an element type of its own."""
    heads: tuple[int, list[int | str]] = (T.FLOAT16, [1, 2, "S", 64])
    return _graph(
        [_node("Attention", "q k v m")],
        {"q": heads, "k": heads, "v": heads, "m": (mask, [1, 1, "S", "S"])},
        {"y": heads},
    )


X, Y = (T.FLOAT, ["B", 4]), (T.FLOAT, ["B", 4])
CACHE = {"past": (T.FLOAT, [1, 2, "C", 4]), "new": (T.FLOAT, [1, 2, 1, 4]), "at": (T.INT64, [1])}
FIXED = (T.FLOAT, [1, 2, 16, 4])
ANYTHING = "cannot parse|could not build|is not valid|rejects"
REFUSED = {
    "another domain's operator": (
        _graph([_node("FastGelu", "x", domain="com.microsoft")], {"x": X}, {"y": Y}),
        "cannot parse",
    ),
    "an operator without an importer": (
        _graph([_node("Unique", "x")], {"x": X}, {"y": (T.FLOAT, ["N"])}),
        "cannot parse",
    ),
    "types mixed in a product": (
        _graph([_node("MatMul", "x h")], {"x": X, "h": (T.FLOAT16, [4, 4])}, {"y": Y}),
        "cannot parse|could not build",
    ),
    "weights without a file": (
        _graph([_node("MatMul", "x w")], {"x": X}, {"y": Y}, _missing_weight()),
        "cannot parse",
    ),
    "a cache of dynamic capacity": (
        _graph(
            [_node("TensorScatter", "past new at", axis=-2)],
            CACHE,
            {"y": (T.FLOAT, [1, 2, "C", 4])},
        ),
        "cannot parse|could not build",
    ),
    "more of the largest than it sorts": (
        _graph(
            [_node("TopK", "long k", "y i")],
            {"long": (T.FLOAT, ["B", 6000])},
            {"y": (T.FLOAT, ["B", 5000])},
            onnx.numpy_helper.from_array(np.array([5000]), "k"),
        ),
        "exceeds|3840",
    ),
    "types mixed in a choice": (
        _graph(
            [_node("Where", "c x h")],
            {"c": (T.BOOL, ["B", 4]), "x": X, "h": (T.FLOAT16, ["B", 4])},
            {"y": Y},
        ),
        ANYTHING,
    ),
    "a weight of another size than its bytes": (
        _graph([_node("MatMul", "x w")], {"x": X}, {"y": Y}, _short_weight()),
        "cannot parse",
    ),
    "a cache that is no input": (
        _graph(
            [_node("Neg", "past", "other"), _node("TensorScatter", "other new at", axis=-2)],
            CACHE | {"past": FIXED},
            {"y": FIXED},
        ),
        ANYTHING,
    ),
    "a cache that is not returned as it is": (
        _graph(
            [_node("TensorScatter", "past new at", "other", axis=-2), _node("Neg", "other")],
            CACHE | {"past": FIXED},
            {"y": FIXED},
        ),
        ANYTHING,
    ),
    "a state that grows in a loop": (_growing_loop(), ANYTHING),
    "a mask of another type than its attention": (_attention(T.FLOAT), ANYTHING),
    "sizes that count what is found": (
        _graph([_node("NonZero", "x")], {"x": X}, {"y": (T.INT64, [2, "N"])}),
        ANYTHING,
    ),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_tensorrt_does_not_take_is_refused(
    compiler: Compiler, tmp_path: Path, what: str
) -> None:
    """Negative controls: a compiler that took these would prove nothing about our graphs."""
    model, says = REFUSED[what]
    with pytest.raises(TrioError, match=says):
        _compile(model, _bounds(model), tmp_path)


def _bounds(model: onnx.ModelProto) -> dict[str, Bounds]:
    """Sizes of 1 to 3 on each dynamic axis."""

    def shape(entry: onnx.ValueInfoProto, named: int) -> tuple[int, ...]:
        dims = entry.type.tensor_type.shape.dim
        return tuple(dim.dim_value or named for dim in dims)

    return {
        entry.name: Bounds(shape(entry, 1), shape(entry, 2), shape(entry, 3))
        for entry in model.graph.input
        if any(not dim.dim_value for dim in entry.type.tensor_type.shape.dim)
    }


def _compile(model: onnx.ModelProto, bounds: dict[str, Bounds], folder: Path) -> None:
    onnx.save(model, folder / "control.onnx")
    compile_ahead(folder / "control.onnx", [Profile("default", bounds)], dtype="float32")


SUM = _graph([_node("Add", "x z")], {"x": X, "z": X}, {"y": Y})
FOLDED = _graph(
    [_node("Reshape", "x shape")],
    {"x": X},
    {"y": (T.FLOAT, ["N", 8])},
    onnx.numpy_helper.from_array(np.array([-1, 8]), "shape"),
)
ROWS = Bounds((1, 4), (2, 4), (3, 4))
REFUSED_PROFILES = {
    "a least size beyond the typical one": (SUM, {"x": Bounds((3, 4), (2, 4), (3, 4)), "z": ROWS}),
    "inputs that agree in no size": (SUM, {"x": ROWS, "z": Bounds((5, 4), (6, 4), (7, 4))}),
    "an input without sizes": (SUM, {"x": ROWS}),
    "sizes that cannot be arranged so": (FOLDED, {"x": Bounds((3, 4), (3, 4), (3, 4))}),
}


@pytest.mark.parametrize("what", REFUSED_PROFILES)
def test_profiles_that_a_graph_does_not_admit_are_refused(
    compiler: Compiler, tmp_path: Path, what: str
) -> None:
    model, bounds = REFUSED_PROFILES[what]
    with pytest.raises(TrioError, match="control.onnx"):
        _compile(model, bounds, tmp_path)


UNNOTICED = {
    "sizes that come from data": _graph(
        [
            _node("ReduceMax", "n", "most", keepdims=0),
            _node("Range", "zero most one"),
        ],
        {"n": (T.INT64, ["B"])},
        {"y": (T.INT64, ["N"])},
        onnx.numpy_helper.from_array(np.array(0), "zero"),
        onnx.numpy_helper.from_array(np.array(1), "one"),
    ),
    "an index out of range": _graph(
        [_node("Gather", "x far", axis=1)],
        {"x": X},
        {"y": (T.FLOAT, ["B", 1])},
        onnx.numpy_helper.from_array(np.array([9]), "far"),
    ),
}


@pytest.mark.parametrize("what", UNNOTICED)
def test_what_the_compiler_does_not_notice_is_known(
    compiler: Compiler, tmp_path: Path, what: str
) -> None:
    """For these `trio build --dry-run` keeps rules of its own."""
    _compile(UNNOTICED[what], _bounds(UNNOTICED[what]), tmp_path)


FLOATS = {"fp8": ("8.9", "8.6"), "nvfp4": ("12.0", "8.9")}
"""Scheme of narrow floats → a GPU that has them, and one that has not."""


@pytest.mark.parametrize(("scheme", "gpu"), [("fp8", "8.9"), ("fp8", "12.0"), ("nvfp4", "12.0")])
@pytest.mark.parametrize(("dialect", "layout"), [("primitive", "shared"), ("onnx", "separate")])
def test_plans_of_narrow_floats_are_narrow(
    compiler: Compiler, dialect: str, layout: str, scheme: str, gpu: str
) -> None:
    sizes, held, stored = {}, {}, {}
    for each in ("", scheme):
        case = Case("qwen2_5_vl", dialect, layout, schedule=QWEN_SCHEDULE, quantize=each, gpu=gpu)
        made = compiler.compile(case, "prefill_1", (gpu,))
        sizes[each] = made.done.compiled.plan_bytes
        held[each], stored[each] = made.report.weight_bytes, stored_bytes(made.graph)
    saved = stored[""] - stored[scheme]
    assert held[""] - held[scheme] > 0.98 * saved
    assert sizes[""] - sizes[scheme] > 0.6 * saved  # its kernels are larger


@pytest.mark.parametrize("scheme", FLOATS)
def test_gpus_without_narrow_floats_are_refused_by_the_compiler_too(
    compiler: Compiler, scheme: str
) -> None:
    gpu, other = FLOATS[scheme]
    case = Case("qwen2_5_vl", schedule=QWEN_SCHEDULE, quantize=scheme, gpu=gpu)
    with pytest.raises(TrioError, match="HW-specific datatypes"):
        compiler.compile(case, "prefill_1", (other,))


@pytest.mark.parametrize(("dialect", "layout"), [("primitive", "shared"), ("onnx", "separate")])
def test_plans_of_quantised_weights_are_narrow(
    compiler: Compiler, dialect: str, layout: str
) -> None:
    """The compiler keeps the codes: engines lose the bytes that graphs lose."""
    sizes, held, stored = {}, {}, {}
    for scheme in ("", "int8", "int4"):
        case = Case("qwen2_5_vl", dialect, layout, schedule=QWEN_SCHEDULE, quantize=scheme)
        made = {name: compiler.compile(case, name) for name in ("prefill_1", "select_2")}
        sizes[scheme] = made["prefill_1"].done.compiled.plan_bytes
        held[scheme] = {name: stage.report.weight_bytes for name, stage in made.items()}
        stored[scheme] = {name: stored_bytes(stage.graph) for name, stage in made.items()}
    for scheme in ("int8", "int4"):
        saved = {name: held[""][name] - held[scheme][name] for name in made}
        graphs = {name: stored[""][name] - stored[scheme][name] for name in made}
        assert sizes[""] - sizes[scheme] > 0.8 * graphs["prefill_1"]
        assert saved["prefill_1"] > 0.98 * graphs["prefill_1"]
        # Its plan is kernels for the most part. In onnx a matrix that is multiplied from both sides
        # is held in a layout for each.
        assert saved["select_2"] > 0.8 * graphs["select_2"]


@pytest.mark.parametrize(
    ("dialect", "layout", "stage"),
    [
        ("primitive", "shared", "embed"),
        ("onnx", "separate", "embed"),
        ("onnx", "separate", "decode"),
    ],
)
def test_tokens_are_looked_up_in_codes_that_stay_narrow(
    compiler: Compiler, dialect: str, layout: str, stage: str
) -> None:
    """Those of a tied head: its table is gathered from before it is made floats."""
    held, stored = {}, {}
    for scheme in ("", "int8"):
        case = Case(TIED, dialect, layout, schedule=QWEN_SCHEDULE, quantize=scheme)
        made = compiler.compile(case, stage)
        held[scheme], stored[scheme] = made.report.weight_bytes, stored_bytes(made.graph)
    assert stored["int8"] < 0.6 * stored[""]
    assert held["int8"] < 0.6 * held[""]


@pytest.mark.parametrize(
    ("dialect", "layout", "stage"),
    [("primitive", "shared", "embed"), ("onnx", "separate", "decode")],
)
def test_engines_hold_no_table_that_is_on_the_host(
    compiler: Compiler, dialect: str, layout: str, stage: str
) -> None:
    held, stored = {}, {}
    for place in ("", "host"):
        case = Case("qwen2_5_vl", dialect, layout, schedule=QWEN_SCHEDULE, embeddings=place)
        made = compiler.compile(case, stage)
        held[place], stored[place] = made.report.weight_bytes, stored_bytes(made.graph)
    text = made.bundle.config.text
    table = 2 * text.vocab_size * text.hidden_size
    assert stored[""] - stored["host"] == table
    assert held[""] - held["host"] >= table


@pytest.mark.parametrize(("dialect", "layout"), [("primitive", "shared"), ("onnx", "separate")])
def test_zero_points_of_a_checkpoint_cost_their_offsets_alone(
    compiler: Compiler, dialect: str, layout: str
) -> None:
    """The codes of an asymmetric matrix stay narrow beside the sums that stand for its offsets."""
    held, stored, sums = {}, {}, {}
    for model in ("qwen2_5_vl", AWQ):
        made = compiler.compile(Case(model, dialect, layout, schedule=QWEN_SCHEDULE), "prefill_1")
        held[model], stored[model] = made.report.weight_bytes, stored_bytes(made.graph)
        sums[model] = made.count("ReduceSum")
    layers = len(made.info.layers)
    assert sums[AWQ] - sums["qwen2_5_vl"] == 7 * layers, "sums of blocks of every product"
    saved = stored["qwen2_5_vl"] - stored[AWQ]
    assert saved > 0.6 * stored["qwen2_5_vl"]
    assert held["qwen2_5_vl"] - held[AWQ] > 0.95 * saved
