"""Numeric sizes of every tensor of a graph, for given sizes of its inputs.

onnx's own inference stops where sizes are computed (Shape, arithmetic, Reshape …) and at a Loop.
Here each node is inferred on its own, from known sizes, and computations on sizes are evaluated:
small integers are propagated with their values, including inputs that a profile has values for. A
size that is still unknown depends on data.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import reduce

import numpy as np
import onnx
from onnx import (
    AttributeProto,
    GraphProto,
    ModelProto,
    NodeProto,
    TensorProto,
    TypeProto,
    helper,
    numpy_helper,
)

from trio_deploy.errors import TrioError

#: Operator → numbers of the inputs that are sizes or positions, not elements to compute with.
SHAPE_INPUTS: Mapping[str, tuple[int, ...]] = {
    "Reshape": (1,),
    "Expand": (1,),
    "ConstantOfShape": (0,),
    "Range": (0, 1, 2),
    "Slice": (1, 2, 3, 4),
    "Split": (1,),
    "Tile": (1,),
    "Loop": (0,),
    "Pad": (1,),
    "TopK": (1,),
    "Squeeze": (1,),
    "Unsqueeze": (1,),
}

_SMALL = 4096  # elements; larger tensors are never sizes
_VIEWS = {"Reshape", "Squeeze", "Unsqueeze", "Identity", "Flatten"}

Array = np.ndarray


@dataclass(frozen=True)
class Known:
    """A tensor whose sizes are known.

    Attributes:
        dtype: element type, an onnx.TensorProto.DataType.
        shape: sizes.
        value: elements, if they follow from sizes and constants and are few.
        constant: whether it is a weight, or computed from weights alone.
    """

    dtype: int
    shape: tuple[int, ...]
    value: Array | None = None
    constant: bool = False

    @property
    def elements(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.elements * np.dtype(helper.tensor_dtype_to_np_dtype(self.dtype)).itemsize


@dataclass(frozen=True)
class Step:
    """A node with its inputs and outputs; `inside`: number of loops around it."""

    node: NodeProto
    inputs: tuple[Known | None, ...]
    outputs: tuple[Known, ...]
    inside: int


@dataclass
class Resolved:
    """A graph with all sizes.

    Attributes:
        tensors: name → tensor, tensors of loop bodies included (names are unique).
        steps: nodes in execution order, a loop's body after its Loop node.
    """

    tensors: dict[str, Known] = field(default_factory=dict)
    steps: list[Step] = field(default_factory=list)


class UnknownShape(TrioError):
    """The sizes of a node's output do not follow from those of the graph's inputs."""

    def __init__(self, node: NodeProto, reason: str) -> None:
        super().__init__(reason)
        self.node = node


def resolve(
    model: ModelProto,
    shapes: Mapping[str, Sequence[int]],
    values: Mapping[str, Sequence[int]] | None = None,
) -> Resolved:
    """Resolve the sizes of all tensors.

    Args:
        model: a graph without the data of its weights (`load_external_data=False`).
        shapes: input → shape; inputs of one fixed shape, such as weights, need none.
        values: input that sizes are computed from → values.

    Raises:
        UnknownShape: a size depends on data, a node does not fit its inputs, or a loop's state
            changes its size.
    """
    found = Resolved()
    graph = model.graph
    for tensor in graph.initializer:
        found.tensors[tensor.name] = _initializer(tensor)
    for entry in graph.input:
        if entry.name in found.tensors:
            continue
        value: Array | None = None
        dtype = entry.type.tensor_type.elem_type
        if values and entry.name in values:
            value = np.asarray(values[entry.name], helper.tensor_dtype_to_np_dtype(dtype))
        fixed = tuple(dim.dim_value for dim in entry.type.tensor_type.shape.dim)
        found.tensors[entry.name] = Known(dtype, tuple(shapes.get(entry.name, fixed)), value)
    _Walk(model, found).graph(graph, found.tensors, 0)
    return found


def activation_bytes(model: ModelProto, resolved: Resolved, *, split_attention: bool = True) -> int:
    """Maximum bytes of intermediate results in use at once, if every node wrote its result.

    TensorRT fuses nodes and usually needs less; weights, inputs and outputs are not counted, and
    views take nothing. A loop's body counts all that it writes.

    Args:
        split_attention: count the intermediate results of an Attention node that becomes several
            kernels; else as if it were one kernel.
    """
    outside = {entry.name for entry in (*model.graph.input, *model.graph.output)}
    nodes = list(model.graph.node)
    owner: dict[str, str] = {}  # view → the tensor whose memory it uses
    last: dict[str, int] = {}
    for place, node in enumerate(nodes):
        if node.op_type in _VIEWS:
            owner[node.output[0]] = owner.get(node.input[0], node.input[0])
        for name in _reads(node):
            last[owner.get(name, name)] = place
    inner: dict[str, int] = {}  # first output of a loop → bytes written in its body
    outer = ""
    for step in resolved.steps:
        if step.inside == 0:
            outer = step.node.output[0]
            if split_attention and step.node.op_type == "Attention":
                inner[outer] = _attention_bytes(step)
        elif step.node.op_type not in _VIEWS:
            inner[outer] = inner.get(outer, 0) + sum(t.nbytes for t in step.outputs)
    alive: dict[str, int] = {}
    most = 0
    for place, node in enumerate(nodes):
        for name in node.output:
            tensor = resolved.tensors.get(name)
            if tensor is None or tensor.constant or name in outside or name in owner:
                continue
            alive[name] = tensor.nbytes
        most = max(most, sum(alive.values()) + inner.get(node.output[0], 0))
        for name in [name for name in alive if last.get(name, place) <= place]:
            del alive[name]
    return most


def _attention_bytes(step: Step) -> int:
    """Bytes of the scores before and after the softmax, in float32 as in `primitive` graphs, and of
    keys and values repeated per head if several heads share them."""
    query, key, value = step.inputs[:3]
    assert query is not None and key is not None and value is not None
    if len(query.shape) != 4 or len(key.shape) != 4:  # a finding of its own
        return 0
    batch, heads, queries, _ = query.shape
    scores = batch * heads * queries * key.shape[2] * 4
    repeats = heads // key.shape[1]
    return 2 * scores + (repeats * (key.nbytes + value.nbytes) if repeats > 1 else 0)


def shape_path(graph: GraphProto, resolved: Resolved) -> dict[str, NodeProto]:
    """Output → node that computes sizes, traced back from the use of sizes to `Shape`."""
    makers = {
        name: step.node
        for step in resolved.steps
        for name in step.node.output
        if step.node.op_type != "Loop"
    }
    path: dict[str, NodeProto] = {}
    open_ends = [
        step.node.input[i]
        for step in resolved.steps
        for i in SHAPE_INPUTS.get(step.node.op_type, ())
        if i < len(step.node.input) and step.node.input[i]
    ]
    while open_ends:
        name = open_ends.pop()
        node = makers.get(name)
        if node is None or name in path or resolved.tensors[name].constant:
            continue
        path[name] = node
        if node.op_type != "Shape":
            open_ends += [each for each in node.input if each]
    return path


def reads(graph: GraphProto) -> Iterator[str]:
    """Names that the nodes of a graph read, their bodies included."""
    for node in graph.node:
        yield from _reads(node)


def _reads(node: NodeProto) -> Iterator[str]:
    """Names that a node reads, its bodies included."""
    yield from node.input
    for attribute in node.attribute:
        if attribute.type == AttributeProto.GRAPH:
            yield from reads(attribute.g)
            yield from (entry.name for entry in attribute.g.output)  # may be of the outer graph


def _initializer(tensor: TensorProto) -> Known:
    shape = tuple(tensor.dims)
    small = tensor.data_location != TensorProto.EXTERNAL and math.prod(shape) <= _SMALL
    value = numpy_helper.to_array(tensor) if small else None
    return Known(tensor.data_type, shape, value, constant=True)


class _Walk:
    """Walk over the nodes of a model and of its loops' bodies."""

    def __init__(self, model: ModelProto, found: Resolved) -> None:
        self._found = found
        self._opsets = list(model.opset_import)
        self._versions = {entry.domain: entry.version for entry in model.opset_import}
        self._ir_version = model.ir_version

    def graph(self, graph: GraphProto, tensors: dict[str, Known], inside: int) -> None:
        """Add the outputs of a graph's nodes to `tensors`."""
        for node in graph.node:
            inputs = tuple(tensors[name] if name else None for name in node.input)
            step = len(self._found.steps)
            self._found.steps.append(Step(node, inputs, (), inside))
            if node.op_type == "Loop":
                outputs = self._loop(node, inputs, tensors, inside)
            else:
                outputs = self._plain(node, inputs)
            self._found.steps[step] = Step(node, inputs, outputs, inside)
            for name, tensor in zip(node.output, outputs, strict=True):
                if name:
                    tensors[name] = tensor
                    self._found.tensors[name] = tensor

    def _plain(self, node: NodeProto, inputs: tuple[Known | None, ...]) -> tuple[Known, ...]:
        if node.op_type == "Constant":
            given_value = numpy_helper.to_array(helper.get_node_attr_value(node, "value"))
            dtype = helper.np_dtype_to_tensor_dtype(given_value.dtype)
            return (Known(dtype, given_value.shape, given_value, constant=True),)
        given = [tensor for tensor in inputs if tensor is not None]
        constant = bool(given) and all(tensor.constant for tensor in given)
        types = self._infer(node, inputs)
        value = _compute(node, inputs)
        outputs = []
        for name in node.output:
            if not name:
                outputs.append(Known(TensorProto.UNDEFINED, ()))
                continue
            kind = types[name].tensor_type if name in types else None
            if kind is None or not kind.HasField("shape"):
                raise UnknownShape(node, "its output's sizes depend on data")
            sizes = []
            for dim in kind.shape.dim:
                if not dim.HasField("dim_value"):
                    raise UnknownShape(node, "its output's sizes depend on data")
                sizes.append(dim.dim_value)
            shape = tuple(sizes)
            if value is not None and value.shape != shape:
                raise UnknownShape(node, f"computes sizes {value.shape} where {shape} is inferred")
            outputs.append(Known(kind.elem_type, shape, value, constant))
        return tuple(outputs)

    def _infer(self, node: NodeProto, inputs: tuple[Known | None, ...]) -> dict[str, TypeProto]:
        version = self._versions.get(node.domain, 0)
        try:
            schema = onnx.defs.get_schema(node.op_type, version, node.domain)
        except onnx.defs.SchemaError:
            where = f"{node.domain or 'ONNX'}, opset {version}"
            raise UnknownShape(node, f"is not an operator of {where}") from None
        types: dict[str, TypeProto] = {}
        data: dict[str, TensorProto] = {}
        for name, tensor in zip(node.input, inputs, strict=True):
            if tensor is None:
                continue
            types[name] = helper.make_tensor_type_proto(tensor.dtype, tensor.shape)
            if tensor.value is not None:
                data[name] = numpy_helper.from_array(tensor.value, name)
        try:
            return onnx.shape_inference.infer_node_outputs(
                schema, node, types, data, opset_imports=self._opsets, ir_version=self._ir_version
            )
        except Exception as error:  # onnx's InferenceError, and what its schemas raise
            raise UnknownShape(node, str(error).strip().splitlines()[-1]) from error

    def _loop(
        self,
        node: NodeProto,
        inputs: tuple[Known | None, ...],
        outer: Mapping[str, Known],
        inside: int,
    ) -> tuple[Known, ...]:
        body: GraphProto = helper.get_node_attr_value(node, "body")
        states = [tensor for tensor in inputs[2:] if tensor is not None]
        tensors = dict(outer)
        for tensor in body.initializer:
            tensors[tensor.name] = _initializer(tensor)
        before = [Known(TensorProto.INT64, ()), Known(TensorProto.BOOL, ())]
        before += [Known(state.dtype, state.shape) for state in states]
        for entry, known in zip(body.input, before, strict=True):
            tensors[entry.name] = known
            self._found.tensors[entry.name] = known
        self.graph(body, tensors, inside + 1)
        carried = [tensors[entry.name] for entry in body.output]
        if len(carried) > 1 + len(states):
            raise UnknownShape(node, "collects outputs over its rounds, whose number is not known")
        for state, after in zip(states, carried[1:], strict=True):
            if (state.dtype, state.shape) != (after.dtype, after.shape):
                raise UnknownShape(
                    node, f"carries a value of sizes {state.shape} that become {after.shape}"
                )
        return tuple(Known(state.dtype, state.shape) for state in states)


def _compute(node: NodeProto, inputs: tuple[Known | None, ...]) -> Array | None:
    """Result of a node on known integers; None if it does not compute sizes."""
    attributes = {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}
    if node.op_type == "Shape" and inputs[0] is not None:
        shape = inputs[0].shape
        start, end = attributes.get("start", 0), attributes.get("end", len(shape))
        return np.array(shape[start:end], np.int64)
    function = _FUNCTIONS.get(node.op_type)
    values = [tensor.value if tensor is not None else None for tensor in inputs]
    if function is None or not values or values[0] is None:
        return None
    if any(t is not None and t.value is None for t in inputs):
        return None
    if any(v is not None and v.dtype.kind not in "ib" for v in values) and node.op_type != "Cast":
        return None
    result = np.asarray(function(attributes, *values))
    return result if result.size <= _SMALL else None


def _cast(attributes: Mapping[str, int], x: Array) -> Array:
    return x.astype(helper.tensor_dtype_to_np_dtype(attributes["to"]))


def _slice(
    _: Mapping[str, int],
    x: Array,
    starts: Array,
    ends: Array,
    axes: Array | None = None,
    steps: Array | None = None,
) -> Array:
    chosen = [slice(None)] * x.ndim
    places = range(len(starts)) if axes is None else axes
    strides = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(places, starts, ends, strides, strict=True):
        chosen[int(axis)] = slice(int(start), int(end), int(step))
    return x[tuple(chosen)]


def _reshape(attributes: Mapping[str, int], x: Array, shape: Array) -> Array:
    sizes = [x.shape[i] if n == 0 else int(n) for i, n in enumerate(shape)]
    return x.reshape(sizes)


def _divide(_: Mapping[str, int], a: Array, b: Array) -> Array:
    return (np.sign(a) * np.sign(b) * (np.abs(a) // np.abs(b))).astype(a.dtype)


def _squeeze(_: Mapping[str, int], x: Array, axes: Array | None = None) -> Array:
    return np.squeeze(x, None if axes is None else tuple(int(axis) for axis in axes))


_FUNCTIONS: Mapping[str, Callable[..., Array]] = {
    "Identity": lambda _, x: x,
    "Cast": _cast,
    "Add": lambda _, a, b: a + b,
    "Sub": lambda _, a, b: a - b,
    "Mul": lambda _, a, b: a * b,
    "Div": _divide,
    "Max": lambda _, *all: reduce(np.maximum, all),
    "Min": lambda _, *all: reduce(np.minimum, all),
    "Concat": lambda attributes, *all: np.concatenate(all, attributes["axis"]),
    "Gather": lambda attributes, x, i: np.take(x, i, attributes.get("axis", 0)),
    "Unsqueeze": lambda _, x, axes: np.expand_dims(x, tuple(int(axis) for axis in axes)),
    "Squeeze": _squeeze,
    "Reshape": _reshape,
    "Slice": _slice,
    "ReduceMax": lambda a, x, *axes: np.max(x, keepdims=bool(a.get("keepdims", 1))),
    "ReduceProd": lambda a, x, *axes: np.prod(x, keepdims=bool(a.get("keepdims", 1))),
}
