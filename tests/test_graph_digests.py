"""Exported graphs compute what they did, and the digests that say so see what they should."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, helper, numpy_helper

from trio_deploy.config.recipe import list_recipes
from trio_deploy.schedule.methods import METHODS

SCRIPT = Path(__file__).parent.parent / "scripts" / "graph_digests.py"
FLOAT = TensorProto.FLOAT


@pytest.fixture(scope="module")
def digests() -> ModuleType:
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("graph_digests", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    "only",
    [
        *("tiny/ort-shared/float32/encoder", "tiny/primitive-shared/float16/cdpruner"),
        *("float32/every-method", "float16/every-method", "qwen3-vl-2b", "qwen2.5-vl-3b"),
    ],
)
def test_graphs_of_the_tiny_model_and_of_two_large_ones_are_what_they_were(
    digests: ModuleType, only: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert digests.main(["--only", only]) == 0, capsys.readouterr().out


def test_the_table_has_every_case(digests: ModuleType) -> None:
    assert list(digests.read_table(digests.TABLE)) == [case.name for case in digests.cases()]


def test_every_recipe_and_every_method_is_in_the_table(digests: ModuleType) -> None:
    named = {name.partition("/")[0] for name in digests.read_table(digests.TABLE)}
    assert named == set(list_recipes())
    assert set(digests.METHODS) == set(METHODS)


def test_differences_are_named(digests: ModuleType) -> None:
    known = {stage: digests.Digests("1", "1") for stage in ("a", "b", "c")}
    found = {
        "b": digests.Digests("2", "1"),
        "c": digests.Digests("1", "2"),
        "d": digests.Digests("1", "1"),
    }
    said = list(digests.differences(known, found, "tiny/ort"))
    assert said == ["missing  tiny/ort/a", "differs  tiny/ort/b", "new      tiny/ort/d"]


def external(name: str, offset: int = 64) -> TensorProto:
    tensor = TensorProto(name=name, data_type=FLOAT, dims=[2, 2])
    tensor.data_location = TensorProto.EXTERNAL
    for key, value in (("location", "weights/a"), ("offset", offset), ("length", 16)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def body() -> onnx.GraphProto:
    """A loop's body that reads `c`, a value of the graph around it."""
    return helper.make_graph(
        [
            helper.make_node("Identity", ["going"], ["going_on"]),
            helper.make_node("Mul", ["state", "c"], ["scaled"]),
        ],
        "body",
        [
            helper.make_tensor_value_info("step", TensorProto.INT64, []),
            helper.make_tensor_value_info("going", TensorProto.BOOL, []),
            helper.make_tensor_value_info("state", FLOAT, [2, 2]),
        ],
        [
            helper.make_tensor_value_info("going_on", TensorProto.BOOL, []),
            helper.make_tensor_value_info("scaled", FLOAT, [2, 2]),
        ],
    )


def model() -> ModelProto:
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "w"], ["a"], name="first"),
            helper.make_node("Softmax", ["x"], ["b"], axis=0),
            helper.make_node("Sub", ["a", "b"], ["c"]),
            helper.make_node("Add", ["c", "half"], ["d"]),
            helper.make_node("Loop", ["count", "", "d"], ["y"], body=body()),
        ],
        "graph",
        [helper.make_tensor_value_info("x", FLOAT, ["rows", 2])],
        [helper.make_tensor_value_info("y", FLOAT, ["rows", 2])],
        [
            external("w"),
            numpy_helper.from_array(np.array(0.5, np.float32), "half"),
            numpy_helper.from_array(np.array(3, np.int64), "count"),
        ],
    )
    return helper.make_model(
        graph, producer_name="one", opset_imports=[helper.make_opsetid("", 20)], ir_version=9
    )


def reorder(m: ModelProto) -> None:
    nodes = list(m.graph.node)
    del m.graph.node[:]
    m.graph.node.extend([nodes[1], nodes[0], *nodes[2:]])


def reorder_constants(m: ModelProto) -> None:
    constants = list(m.graph.initializer)[::-1]
    del m.graph.initializer[:]
    m.graph.initializer.extend(constants)


def rename(m: ModelProto) -> None:
    """Rename values inside the graph and its body, and an inline constant."""
    inside = m.graph.node[4].attribute[0].g
    for node in (*m.graph.node, *inside.node):
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                if name and name not in ("x", "y", "w"):
                    names[index] = f"{name}_renamed"
        node.name = "renamed"
    for value in (*inside.input, *inside.output, *m.graph.initializer[1:]):
        value.name += "_renamed"
    inside.name = m.graph.name = "renamed"


def describe(m: ModelProto) -> None:
    m.producer_name, m.producer_version, m.doc_string = "two", "9.9", "words"
    m.graph.node[0].doc_string = "words"
    m.graph.node[0].metadata_props.add(key="module", value="elsewhere")
    m.metadata_props.add(key="made", value="today")


def repack_constant(m: ModelProto) -> None:
    """Store the numbers of a constant in the field of their type instead of as bytes."""
    m.graph.initializer[1].CopyFrom(helper.make_tensor("half", FLOAT, [], [0.5]))


def compute_twice(m: ModelProto) -> None:
    """Make one value by two equal nodes."""
    m.graph.node.insert(1, helper.make_node("MatMul", ["x", "w"], ["again"]))
    m.graph.node[3].input[0] = "again"


@pytest.mark.parametrize(
    "change", [reorder, reorder_constants, rename, describe, repack_constant, compute_twice]
)
def test_what_computes_the_same_has_the_same_digest(
    digests: ModuleType, change: Callable[[ModelProto], None]
) -> None:
    changed = model()
    change(changed)
    assert changed != model()
    assert digests.model_digest(changed) == digests.model_digest(model())


def swap(names: list[str]) -> None:
    names[0], names[1] = names[1], names[0]


def external_entry(m: ModelProto, key: str) -> onnx.StringStringEntryProto:
    (entry,) = (e for e in m.graph.initializer[0].external_data if e.key == key)
    return entry


def inner(m: ModelProto) -> onnx.GraphProto:
    return m.graph.node[4].attribute[0].g


CHANGES: dict[str, Callable[[ModelProto], object]] = {
    "attribute": lambda m: setattr(m.graph.node[1].attribute[0], "i", 1),
    "attribute left out": lambda m: m.graph.node[1].ClearField("attribute"),
    "operator": lambda m: setattr(m.graph.node[2], "op_type", "Add"),
    "domain": lambda m: setattr(m.graph.node[2], "domain", "com.microsoft"),
    "order of operands": lambda m: swap(m.graph.node[2].input),
    "other operand": lambda m: m.graph.node[3].input.__setitem__(0, "a"),
    "constant": lambda m: setattr(m.graph.initializer[1], "raw_data", b"\0\0\0\0"),
    "shape of a constant": lambda m: m.graph.initializer[1].dims.append(1),
    "name of a tensor": lambda m: (
        setattr(m.graph.initializer[0], "name", "v"),
        m.graph.node[0].input.__setitem__(1, "v"),
    ),
    "shape of a tensor": lambda m: m.graph.initializer[0].dims.append(1),
    "type of a tensor": lambda m: setattr(m.graph.initializer[0], "data_type", TensorProto.INT32),
    "file": lambda m: setattr(external_entry(m, "location"), "value", "weights/b"),
    "offset": lambda m: setattr(external_entry(m, "offset"), "value", "128"),
    "length": lambda m: setattr(external_entry(m, "length"), "value", "8"),
    "a tensor nobody reads": lambda m: m.graph.initializer.append(external("v", 80)),
    "a node nobody reads": lambda m: m.graph.node.append(helper.make_node("Neg", ["d"], ["e"])),
    "name of an input": lambda m: (
        setattr(m.graph.input[0], "name", "z"),
        m.graph.node[0].input.__setitem__(0, "z"),
        m.graph.node[1].input.__setitem__(0, "z"),
    ),
    "shape of an input": lambda m: setattr(
        m.graph.input[0].type.tensor_type.shape.dim[0], "dim_param", "batch"
    ),
    "type of an input": lambda m: setattr(
        m.graph.input[0].type.tensor_type, "elem_type", TensorProto.FLOAT16
    ),
    "name of an output": lambda m: (
        setattr(m.graph.output[0], "name", "z"),
        m.graph.node[4].output.__setitem__(0, "z"),
    ),
    "more outputs": lambda m: m.graph.output.append(
        helper.make_tensor_value_info("d", FLOAT, ["rows", 2])
    ),
    "operand in a body": lambda m: inner(m).node[1].input.__setitem__(1, "a"),
    "order in a body": lambda m: swap(inner(m).node[1].input),
    "output of a body": lambda m: setattr(inner(m).output[1], "name", "state"),
    "operator set": lambda m: setattr(m.opset_import[0], "version", 21),
    "format": lambda m: setattr(m, "ir_version", 10),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_may_compute_something_else_has_another_digest(digests: ModuleType, name: str) -> None:
    changed = model()
    CHANGES[name](changed)
    assert changed != model()
    assert digests.model_digest(changed) != digests.model_digest(model())


def test_a_value_without_a_source_is_refused(digests: ModuleType) -> None:
    changed = model()
    changed.graph.node[2].input[0] = "nowhere"
    with pytest.raises(digests.UnsupportedGraph, match="nowhere"):
        digests.model_digest(changed)
