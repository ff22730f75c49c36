"""The differences between TensorRT's versions: the bindings' names, and a simulation's builds."""

from __future__ import annotations

import contextlib
import enum
import gc
import inspect
import json
import os
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto as T
from onnx import helper

from tests.support.fakes.tensorrt.install import Simulation, install
from trio_deploy import TrioError
from trio_deploy.runtimes.tensorrt.bindings import Bounds, BuildOptions, TensorRT, load

API = json.loads((Path(__file__).parent / "tensorrt_api.json").read_text())
SIMULATED = {
    "8.6.1": "8.6.1",
    "10.0.1": "10.0.1",
    "10.3.0": "10.3.0",
    "10.15.1": "10.15.1.29",
    "11.0.0": "11.0.0.114",
    "11.4.0": "11.4.0.106",
}
OLD, NEW = "8.6.1", "10.3.0"
BINDINGS = os.environ.get("TRIO_TENSORRT_BINDINGS", "")


def names(version: str, kind: str) -> set[str]:
    """What a class of the bindings has, read off the real ones by scripts/tensorrt_api.py."""
    column = API["versions"].index(version)
    return {name for name, marks in API["classes"][kind].items() if marks[column] == "x"}


# -------------------------------------------------------------------------------- the real names


@pytest.mark.parametrize("version", SIMULATED)
def test_the_simulation_has_no_name_that_the_bindings_lack(
    version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What runs on the simulation, then, calls nothing that the real TensorRT does not have."""
    module = install(monkeypatch, version).tensorrt
    public = [getattr(module, name) for name in dir(module) if name[0].isupper()]
    for kind in public:
        if inspect.isclass(kind):
            mine = {name for name in vars(kind) if not name.startswith("_")}
            if issubclass(kind, enum.Enum):
                mine = set(kind.__members__)
            assert mine <= names(SIMULATED[version], kind.__name__), kind.__name__


@pytest.mark.parametrize("version", API["versions"])
def test_what_the_adapter_reaches_for_by_version_is_there(version: str) -> None:
    old, release = version.startswith("8"), tuple(map(int, version.split(".")[:2]))
    flags = names(version, "NetworkDefinitionCreationFlag")
    assert ("EXPLICIT_BATCH" if old else "STRONGLY_TYPED") in flags
    assert ("FP16" in names(version, "BuilderFlag")) == (release < (11, 0))
    assert ("OBEY_PRECISION_CONSTRAINTS" in names(version, "BuilderFlag")) == (release < (11, 0))
    assert ("INT64" in names(version, "DataType")) == (not old)
    assert ("PROFILE_SHARING_0806" in names(version, "PreviewFeature")) == (release < (11, 0))
    assert bool(names(version, "IProgressMonitor")) == (not old)
    assert bool(names(version, "ExecutionContextAllocationStrategy")) == (not old)
    engine = names(version, "ICudaEngine")
    assert ("device_memory_size_v2" in engine) == (release >= (10, 3))
    assert ("device_memory_size" in engine) == (release < (11, 0))
    assert ("get_aliased_input_tensor" in engine) == (release >= (10, 15))
    assert ("add_kv_cache_update" in names(version, "INetworkDefinition")) == (release >= (10, 15))
    layers = names(version, "LayerType")
    assert {"CONSTANT", "SHAPE", "ASSERTION", "CONDITION", "RECURRENCE", "TRIP_LIMIT"} <= layers


def installed() -> list[Path | None]:
    """Folders of bindings that scripts/tensorrt_api.py has kept; None for an installed TensorRT."""
    kept = [file.parent for file in sorted(Path(BINDINGS).glob("*/lib"))] if BINDINGS else []
    try:
        import tensorrt  # noqa: F401
    except ImportError:
        return list(kept)
    return [*kept, None]


def test_real_bindings_take_the_adapters_classes() -> None:
    """Our logger and progress monitor in the real bindings, whose names are the recorded ones."""
    places = installed()
    if not places:
        pytest.skip(
            "no TensorRT bindings are installed: python scripts/tensorrt_api.py --bindings DIR, "
            "then TRIO_TENSORRT_BINDINGS=DIR"
        )
    program = """
import json, sys
try:
    import tensorrt_bindings as trt
except ImportError:
    import tensorrt as trt
from trio_deploy.runtimes.tensorrt.bindings import TensorRT, _monitor
heard = []
wrapped = TensorRT(trt)
wrapped.logger.log(trt.ILogger.ERROR, "a message")
assert "a message" in wrapped.last_errors()
if hasattr(trt, "IProgressMonitor"):
    monitor = _monitor(trt, lambda *told: heard.append(told), [])
    monitor.phase_start("building", None, 3)
    assert monitor.step_complete("building", 0) and heard[-1] == ("building", 1, 3)
if hasattr(trt.LayerType, "ATTENTION_INPUT"):
    assert hasattr(trt.IAttentionInputLayer, "attention")
    assert hasattr(trt.IAttention, "decomposable")
assert wrapped._network_flags() > 0
api = json.loads(sys.argv[1])
if trt.__version__ in api["versions"]:
    column = api["versions"].index(trt.__version__)
    for kind, marks in api["classes"].items():
        there = {name for name in dir(getattr(trt, kind, object)) if not name.startswith("_")}
        assert there == {name for name, mark in marks.items() if mark[column] == "x"}, kind
print(trt.__version__)
"""
    root = str(Path(__file__).parents[3])
    for place in places:
        env = dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join([root, *([str(place)] if place else [])])
        if place is not None:
            env["LD_LIBRARY_PATH"] = str(place / "lib")
        command = [sys.executable, "-c", program, json.dumps(API)]
        out = subprocess.run(command, env=env, capture_output=True, text=True)
        assert out.returncode == 0, out.stderr
        if place is not None:
            assert out.stdout.strip() == place.name


# ------------------------------------------------------------------------------------- building


@dataclass
class Admits:
    """A profile."""

    shapes: dict[str, Bounds]
    values: dict[str, Bounds] = field(default_factory=dict)
    name: str = "default"


def rising(*shapes: tuple[int, ...]) -> Bounds:
    return (shapes[0], shapes[len(shapes) // 2], shapes[-1])


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """x float16 [B,4,C] → x² in float32 → the first `width` entries of the last axis."""
    nodes = [
        helper.make_node("Cast", ["x"], ["wide"], to=T.FLOAT),
        helper.make_node("Mul", ["wide", "wide"], ["squares"]),
        helper.make_node("Cast", ["squares"], ["narrow"], to=T.FLOAT16),
        helper.make_node("Constant", [], ["zero"], value_ints=[0]),
        helper.make_node("Constant", [], ["last"], value_ints=[2]),
        helper.make_node("Slice", ["narrow", "zero", "width", "last"], ["y"]),
    ]
    infos = [
        helper.make_tensor_value_info("x", T.FLOAT16, ["B", 4, "C"]),
        helper.make_tensor_value_info("width", T.INT64, [1]),
    ]
    out = helper.make_tensor_value_info("y", T.FLOAT16, ["B", 4, "W"])
    made = helper.make_graph(nodes, "squares", infos, [out])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = tmp_path / "squares.onnx"
    onnx.save(model, path)
    return path


ADMITS = Admits(
    {"x": rising((1, 4, 8), (2, 4, 8), (3, 4, 8)), "width": rising((1,), (1,), (1,))},
    {"width": rising((1,), (4,), (8,))},
)
Start = Callable[..., tuple[TensorRT, Simulation]]


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Start:
    def start(version: str = NEW) -> tuple[TensorRT, Simulation]:
        simulation = install(monkeypatch, version)
        return load(), simulation

    return start


@pytest.mark.parametrize("version", SIMULATED)
def test_an_engine_is_built_and_describes_itself(start: Start, graph: Path, version: str) -> None:
    tensorrt, simulation = start(version)
    built = tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20, dtype="float16"))
    engine = tensorrt.deserialize(built.plan, "squares.engine")
    found = {tensor.name: tensor for tensor in tensorrt.tensors(engine)}
    assert list(found) == ["x", "width", "y"]
    assert found["x"].dtype == np.float16
    assert found["x"].is_input
    assert not found["y"].is_input
    assert found["x"].shape == (-1, 4, 8), "one size in all profiles is fixed"
    assert found["width"].dtype == (np.int32 if tensorrt.narrows_int64 else np.int64)
    assert found["width"].on_host
    assert not found["x"].on_host
    assert tensorrt.scratch_bytes(engine) > 0
    _, config = simulation.tensorrt.last
    left = [
        source.name for source in simulation.tensorrt.TacticSource if config.sources >> source & 1
    ]
    assert left == ["EDGE_MASK_CONVOLUTIONS", "JIT_CONVOLUTIONS"]


def test_before_strong_typing_float32_layers_are_told_to_stay(start: Start, graph: Path) -> None:
    tensorrt, simulation = start(OLD)
    tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20, dtype="float16"))
    network, config = simulation.tensorrt.last
    trt = simulation.tensorrt
    assert {trt.BuilderFlag.FP16, trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS} <= config.flags
    layers = {layer.get_output(0).name: layer for layer in network.layers}
    told = {name: layer.precision for name, layer in layers.items() if layer.precision is not None}
    assert told == {"squares": trt.DataType.FLOAT}, "a cast has no precision"
    stored = {name: layer.output_types for name, layer in layers.items() if layer.output_types}
    assert stored == {name: {0: trt.DataType.FLOAT} for name in ("wide", "squares")}


def test_how_many_layers_keep_float32_is_in_the_log(start: Start, graph: Path) -> None:
    tensorrt, _ = start(OLD)
    said: list[tuple[str, str]] = []
    tensorrt.build(
        graph,
        [ADMITS],
        BuildOptions(workspace=1, dtype="float16"),
        log=lambda *line: said.append(line),
    )
    assert ("INFO", "2 of 6 layers of squares.onnx keep float32") in said


@dataclass
class Tensor:
    """An ITensor."""

    dtype: Any
    is_shape_tensor: bool = False
    name: str = "a tensor"


class Layer:
    """An ILayer that remembers what it is told."""

    def __init__(self, kind: Any, inputs: list[Tensor | None], outputs: list[Tensor]) -> None:
        self.type, self._inputs, self._outputs = kind, inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)
        self.precision: Any = None
        self.stored: list[int] = []

    def get_input(self, number: int) -> Tensor | None:
        return self._inputs[number]

    def get_output(self, number: int) -> Tensor:
        return self._outputs[number]

    def set_output_type(self, number: int, kind: Any) -> None:
        self.stored.append(number)


def test_only_layers_that_compute_in_float32_are_told_a_precision(
    start: Start, graph: Path
) -> None:
    tensorrt, simulation = start(OLD)
    types, layers = simulation.tensorrt.DataType, simulation.tensorrt.LayerType
    wide, half = Tensor(types.FLOAT), Tensor(types.HALF)
    index, mask = Tensor(types.INT32), Tensor(types.BOOL)
    size, shape = Tensor(types.FLOAT, True), Tensor(types.INT32, True)
    kind = layers.ELEMENTWISE
    cases = {
        "an addition": (Layer(kind, [wide, wide], [wide]), True, [0]),
        "one with an input left out": (Layer(kind, [wide, None], [wide]), True, [0]),
        "a comparison": (Layer(kind, [wide, wide], [mask]), True, []),
        "the largest and where they are": (Layer(kind, [wide], [wide, index]), True, [0]),
        "a choice between numbers": (Layer(kind, [mask, wide, wide], [wide]), True, [0]),
        "a new shape": (Layer(kind, [wide, shape], [wide]), True, [0]),
        "a cast to float32": (Layer(layers.CAST, [index], [wide]), False, [0]),
        "a cast of float32": (Layer(layers.CAST, [wide], [half]), False, []),
        "float16": (Layer(kind, [half, half], [half]), False, []),
        "indices": (Layer(kind, [index, index], [index]), False, []),
        "a size": (Layer(kind, [size], [size]), False, []),
        "an entry of a shape": (Layer(kind, [shape, index], [wide]), False, []),
        "a constant": (Layer(layers.CONSTANT, [], [wide]), False, []),
        "a shape": (Layer(layers.SHAPE, [wide], [index]), False, []),
        "a loop's state": (Layer(layers.RECURRENCE, [wide, wide], [wide]), False, []),
    }
    made = [layer for layer, _, _ in cases.values()]
    tensorrt._keep_float32(
        SimpleNamespace(num_layers=len(made), get_layer=lambda number: made[number]), graph
    )
    for what, (layer, precision, stored) in cases.items():
        assert (layer.precision == types.FLOAT) == precision, what
        assert layer.stored == stored, what


@pytest.mark.parametrize("turned", [False, True])
def test_products_that_would_run_in_float32_unasked_are_refused(
    start: Start, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, turned: bool
) -> None:
    """Were all results between inputs and outputs called float32, all would be held to it."""
    weight = onnx.numpy_helper.from_array(np.ones((8, 8), np.float16), "proj.weight")
    nodes = [
        helper.make_node("Transpose", ["proj.weight"], ["turned"], perm=[1, 0]),
        helper.make_node("MatMul", ["x", "turned" if turned else "proj.weight"], ["product"]),
        helper.make_node("Relu", ["product"], ["y"]),
    ]
    ends = [helper.make_tensor_value_info(name, T.FLOAT16, ["B", 8]) for name in "xy"]
    made = helper.make_graph(nodes, "product", ends[:1], ends[1:], [weight])
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    onnx.save(model, tmp_path / "product.onnx")
    admits = Admits({"x": rising((1, 8), (2, 8), (3, 8))})
    tensorrt, simulation = start(OLD)

    def build() -> None:
        tensorrt.build(
            tmp_path / "product.onnx", [admits], BuildOptions(workspace=1, dtype="float16")
        )

    build()
    network, _ = simulation.tensorrt.last
    assert all(layer.precision is None for layer in network.layers)
    parser = simulation.tensorrt.OnnxParser
    parse = parser.parse

    def called_float32(self: Any, *arguments: Any) -> bool:
        parsed: bool = parse(self, *arguments)
        for layer in self._network.layers:
            layer.get_output(0).dtype = simulation.tensorrt.DataType.FLOAT
        return parsed

    monkeypatch.setattr(parser, "parse", called_float32)
    with pytest.raises(TrioError, match=r"product with proj\.weight in product\.onnx for float32"):
        build()


def test_strongly_typed_networks_are_told_nothing(start: Start, graph: Path) -> None:
    tensorrt, simulation = start(NEW)
    tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20, dtype="float16"))
    network, config = simulation.tensorrt.last
    assert config.flags == set()
    assert all(layer.precision is None for layer in network.layers)


def test_bfloat16_needs_tensorrt_10(start: Start, graph: Path) -> None:
    tensorrt, _ = start(OLD)
    with pytest.raises(TrioError, match=r"8\.6\.1 has no bfloat16: export with --dtype float16"):
        tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20, dtype="bfloat16"))


@pytest.mark.parametrize(("version", "where"), [(OLD, "node 0"), (NEW, "node a_node, AnOperator")])
def test_what_cannot_be_parsed_is_listed(
    start: Start, graph: Path, version: str, where: str
) -> None:
    model = onnx.load(graph)
    model.graph.node[1].domain = "com.microsoft"
    onnx.save(model, graph)
    tensorrt, _ = start(version)
    with pytest.raises(TrioError, match=rf"cannot parse squares\.onnx: Plugin not.*\({where}\)"):
        tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20))


def test_axes_of_one_size_are_fixed_before_a_graph_is_parsed(start: Start, graph: Path) -> None:
    """KVCacheUpdate wants a fixed capacity when it is added to the network."""
    tensorrt, simulation = start()
    tensorrt.build(
        graph,
        [Admits({"x": rising((1, 4, 8), (2, 4, 8))}, ADMITS.values)],
        BuildOptions(workspace=1),
    )
    network, _ = simulation.tensorrt.last
    assert next(t.shape for t in network.inputs if t.name == "x") == (-1, 4, 8)


@pytest.mark.parametrize(
    ("profile", "message"),
    [
        (Admits({}), "profile default of squares.onnx has no shapes for the input x"),
        (Admits(ADMITS.shapes), "has no values for the input width"),
    ],
)
def test_a_profile_must_bound_every_input(
    start: Start, graph: Path, profile: Admits, message: str
) -> None:
    tensorrt, _ = start()
    with pytest.raises(TrioError, match=message):
        tensorrt.build(graph, [profile], BuildOptions(workspace=1 << 20))


def test_bounds_that_tensorrt_does_not_take_are_an_error(start: Start, graph: Path) -> None:
    tensorrt, _ = start()
    falling = Admits({"x": ((2, 4, 8), (1, 4, 8), (2, 4, 8))}, ADMITS.values)
    with pytest.raises(TrioError, match=r"rejects x .* in profile default of squares\.onnx: bound"):
        tensorrt.build(graph, [falling], BuildOptions(workspace=1 << 20))


def test_a_build_that_fails_says_what_tensorrt_said(start: Start, graph: Path) -> None:
    tensorrt, _ = start()
    with pytest.raises(TrioError, match=r"could not build squares\.onnx: .*needs a profile"):
        tensorrt.build(graph, [], BuildOptions(workspace=1 << 20))


def test_scratch_memory_has_a_ceiling_only_where_one_is_given(start: Start, graph: Path) -> None:
    tensorrt, simulation = start()
    tensorrt.build(graph, [ADMITS])
    assert simulation.tensorrt.last[1].pools == {}
    tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20))
    pool = simulation.tensorrt.MemoryPoolType.WORKSPACE
    assert simulation.tensorrt.last[1].pools == {pool: 1 << 20}


@pytest.mark.parametrize("version", SIMULATED)
def test_a_build_that_lacks_scratch_memory_says_how_much_to_allow(
    start: Start, graph: Path, version: str
) -> None:
    tensorrt, simulation = start(version)
    simulation.tensorrt.needs["squares"] = (3 << 29) + 1
    tensorrt.build(graph, [ADMITS])
    with pytest.raises(
        TrioError,
        match=r"Could not find any implementation.*requested 1\.5 GiB of scratch memory, beyond "
        r"workspace_gib 1 of the target: raise workspace_gib to at least 2, or leave it out",
    ):
        tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 30))
    simulation.tensorrt.needs["squares"] = 3 << 30  # beyond the GPU's 2 GiB
    with pytest.raises(TrioError, match="3 GiB of scratch memory, more than the GPU had free: end"):
        tensorrt.build(graph, [ADMITS])


@pytest.mark.parametrize(
    ("says", "asked"),
    [
        # of TensorRT 8.2 about a fused node, 8.4 and 10.3; "insuficient" is theirs
        ("Skipping tactic 0 due to insuficient memory on requested size of 1170309120 det", "1.09"),
        ("Skipping tactic 8 due to insufficient memory on requested size of 3273 detected", "3.2"),
        ("Tactic Device request: 2600MB Available: 302MB. Device memory is insufficient", "2.54"),
    ],
)
def test_what_a_tactic_asked_for_is_read_in_bytes_or_mebibytes(
    start: Start, graph: Path, says: str, asked: str
) -> None:
    tensorrt, simulation = start()
    trt = simulation.tensorrt
    ends = "Could not find any implementation for node {ForeignNode[a...b]}."
    trt.says += [(trt.ILogger.WARNING, says), (trt.ILogger.ERROR, ends)]
    narrowing = Admits({"x": rising((1, 4, 8), (2, 4, 8))}, ADMITS.values)
    trt.Builder.build_serialized_network = failing(trt.Builder.build_serialized_network)
    with pytest.raises(TrioError, match=rf"a tactic requested {asked} GiB of scratch memory, beyo"):
        tensorrt.build(graph, [narrowing], BuildOptions(workspace=1 << 30))
    trt.says.pop(0)
    with pytest.raises(TrioError, match="workspace_gib 1 of the target may be too little for it"):
        tensorrt.build(graph, [narrowing], BuildOptions(workspace=1 << 30))


def failing(build: Callable[..., Any]) -> Callable[..., None]:
    """A build that says what it says and makes nothing."""

    def fail(*arguments: Any) -> None:
        build(*arguments)

    return fail


def test_progress_and_messages_are_handed_on(start: Start, graph: Path) -> None:
    tensorrt, _ = start()
    told: list[tuple[str, int, int]] = []
    said: list[tuple[str, str]] = []
    tensorrt.build(
        graph,
        [ADMITS],
        BuildOptions(workspace=1 << 20),
        progress=lambda *steps: told.append(steps),
        log=lambda *line: said.append(line),
    )
    assert told == [("building", done, 2) for done in (0, 1, 2, 2)]
    assert said == [("INFO", "built squares.onnx")]
    tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20))
    assert len(said) == 1, "a build is heard by its own log alone"


def test_an_interrupt_ends_the_build(start: Start, graph: Path) -> None:
    tensorrt, _ = start()

    def interrupt(phase: str, done: int, steps: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20), progress=interrupt)


@pytest.mark.parametrize("version", [OLD, NEW])
def test_an_interrupt_while_a_message_is_heard_is_not_lost(
    start: Start, graph: Path, version: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bindings print what a logger raises, and go on."""
    tensorrt, _ = start(version)
    ours = tensorrt.logger.log

    def swallowing(severity: int, message: str) -> None:
        with contextlib.suppress(BaseException):
            ours(severity, message)

    def interrupt(severity: str, message: str) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(tensorrt.logger, "log", swallowing)
    with pytest.raises(KeyboardInterrupt):
        tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20), log=interrupt)
    tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20))


def test_the_logger_outlives_who_made_it(start: Start) -> None:
    """TensorRT writes to the first logger of a process, whoever still has it."""
    _, simulation = start()
    logger = weakref.ref(TensorRT(simulation.tensorrt).logger)
    gc.collect()
    assert logger() is not None


def test_attention_may_be_split_where_no_fused_kernel_fits(start: Start) -> None:
    tensorrt, _ = start("10.15.1")
    tensorrt.module.LayerType = enum.IntEnum("LayerType", ["CONSTANT", "ATTENTION_INPUT"])
    tensorrt.module.IAttentionInputLayer = type("IAttentionInputLayer", (), {})
    plain, entry = (type("ILayer", (), {"type": kind})() for kind in tensorrt.module.LayerType)
    entry.attention = SimpleNamespace(decomposable=False)
    tensorrt._allow_decomposition(
        SimpleNamespace(num_layers=2, get_layer=lambda number: (plain, entry)[number])
    )
    assert entry.attention.decomposable
    assert isinstance(entry, tensorrt.module.IAttentionInputLayer)
    assert not hasattr(plain, "attention")


def test_a_timing_cache_is_handed_from_build_to_build(start: Start, graph: Path) -> None:
    tensorrt, _ = start()
    first = tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20)).timing_cache
    second = tensorrt.build(
        graph, [ADMITS], BuildOptions(workspace=1 << 20), timing_cache=first
    ).timing_cache
    assert (first, second) == (b"+", b"++")
    foreign = tensorrt.build(
        graph, [ADMITS], BuildOptions(workspace=1 << 20), timing_cache=b"other GPU"
    )
    assert foreign.timing_cache == b"+", "one of another GPU is not taken"


def test_a_builder_that_does_not_start_is_an_error(start: Start, graph: Path) -> None:
    """Without a GPU the bindings' constructors raise TypeError."""
    tensorrt, simulation = start()

    def none(*_: Any) -> None:
        tensorrt.logger.log(simulation.tensorrt.ILogger.ERROR, "CUDA initialization failure: 35")
        raise TypeError("pybind11::init(): factory function returned nullptr")

    simulation.tensorrt.Builder = none
    with pytest.raises(
        TrioError, match="does not start on this machine: CUDA initialization .* 35"
    ):
        tensorrt.build(graph, [ADMITS], BuildOptions(workspace=1 << 20))


@pytest.fixture
def ahead(monkeypatch: pytest.MonkeyPatch) -> tuple[TensorRT, Simulation]:
    simulation = install(monkeypatch, "1.7.1.116")
    return load("rtx"), simulation


def test_a_compiler_ahead_of_time_is_known_by_its_names(
    ahead: tuple[TensorRT, Simulation], graph: Path
) -> None:
    """TensorRT-RTX counts from 1, which must not be read as older than TensorRT 8.6."""
    tensorrt, simulation = ahead
    assert tensorrt.name == "TensorRT-RTX 1.7.1.116"
    assert tensorrt.compiles_ahead and tensorrt.strongly_typed and tensorrt.updates_in_place
    listed = BuildOptions(compute_capabilities=("8.9", "12.0"), detailed=True)
    built = tensorrt.build(graph, [ADMITS], listed, timing_cache=b"of another")
    assert built.timing_cache == b""
    trt, (_, config) = simulation.tensorrt, simulation.tensorrt.last
    assert config.capabilities == ["SM89", "SM120"] and config.cache is None
    assert config.flags == {trt.BuilderFlag.REQUIRE_USER_ALLOCATION}
    assert config.profiling_verbosity == trt.ProfilingVerbosity.DETAILED


def test_gpus_that_are_not_compiled_for_are_named(
    ahead: tuple[TensorRT, Simulation], start: Start, graph: Path
) -> None:
    with pytest.raises(
        TrioError, match=r"not compile for compute capability 8\.7: it has 7\.5, 8\.0"
    ):
        ahead[0].build(graph, [ADMITS], BuildOptions(compute_capabilities=("8.7",)))
    with pytest.raises(TrioError, match=r"TensorRT 10\.3\.0 builds for this machine's GPU alone"):
        start()[0].build(graph, [ADMITS], BuildOptions(compute_capabilities=("8.6",)))


def test_a_flavour_that_is_not_installed_says_how_to_get_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt_rtx_bindings", None)
    with pytest.raises(TrioError, match=r"TensorRT-RTX is not installed: pip install .*\[rtx\]"):
        load("rtx")
