"""What TensorRT reads off a graph when it builds an engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx
from onnx import TensorProto

#: Operators that pass values on to a shape.
_PASS_ON = set(
    "Add Sub Mul Div Cast Concat Gather Identity Max Min Reshape Squeeze Unsqueeze".split()
)
#: Operator → its inputs that are shapes.
_TAKE_SHAPE = {
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "TopK": (1,),
}


def names_read(graph: onnx.GraphProto) -> set[str]:
    """Names that nodes read, those of loops included, and names of outputs."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= names_read(attribute.g)
    return names | {output.name for output in graph.output}


def shape_inputs(graph: onnx.GraphProto) -> set[str]:
    """Inputs of fixed size whose values become shapes."""
    known: dict[str, set[str]] = {
        info.name: {info.name}
        for info in graph.input
        if info.type.tensor_type.elem_type == TensorProto.INT64
        and all(d.HasField("dim_value") for d in info.type.tensor_type.shape.dim)
    }
    found: set[str] = set()

    def walk(nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            for place in _TAKE_SHAPE.get(node.op_type, ()):
                if place < len(node.input):
                    found.update(known.get(node.input[place], ()))
            if node.op_type in _PASS_ON:
                origins = set().union(*(known.get(name, set()) for name in node.input))
                known.update({name: origins for name in node.output if origins})
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g.node)

    walk(graph.node)
    return found


def in_place_outputs(graph: onnx.GraphProto) -> dict[str, str]:
    """Output of each cache update → the input that it updates."""
    return {node.output[0]: node.input[0] for node in graph.node if node.op_type == "TensorScatter"}


def profile_problem(network: Any, profiles: list[Any]) -> str:
    """Why the builder refuses a network with these profiles; "" if it does not."""
    if not profiles:
        return "a network with dynamic inputs needs a profile"
    caches = in_place_outputs(onnx.load(network.path, load_external_data=False).graph).values()
    for tensor in network.inputs:
        if tensor.name in caches and tensor.shape[2] < 0:
            return f"KVCacheUpdate: {tensor.name} must have a fixed capacity"
        for profile in profiles:
            if -1 in tensor.shape and tensor.name not in profile.shapes:
                return f"no profile for {tensor.name}"
            for bound in profile.shapes.get(tensor.name, []):
                if any(
                    have not in (-1, size) for have, size in zip(tensor.shape, bound, strict=True)
                ):
                    return f"the profile of {tensor.name} contradicts its shape"
            if tensor.is_shape_tensor and tensor.name not in profile.values:
                return f"no values for {tensor.name}"
    return ""
