"""Graphs of the `ort` dialect that also say how large activations are."""

from __future__ import annotations

import math
import re
from pathlib import Path

import onnx
from onnx import TensorProto, helper

_LAYERS = re.compile(r"language_model\.layers\.\d+\..*\.weight")

MEASURED = "greatest."
"""Begins the names of the outputs that are added."""

_INFINITE = "infinite"


def measured(file: Path) -> bytes:
    """Add an output per product with a matrix of a layer: how large its other operand is."""
    model = onnx.load(str(file), load_external_data=False)
    graph, nodes = model.graph, []
    for node in graph.node:
        nodes.append(node)
        name = node.input[1] if len(node.input) > 1 else ""
        if node.op_type != "FusedMatMul" or not _LAYERS.fullmatch(name):
            continue
        output = f"{MEASURED}{name}"
        nodes.append(helper.make_node("Abs", [node.input[0]], [f"size.of.{name}"]))
        # A maximum may pass over what is not a number, which is infinite here.
        nodes.append(helper.make_node("IsNaN", [node.input[0]], [f"unknown.in.{name}"]))
        where = [f"unknown.in.{name}", _INFINITE, f"size.of.{name}"]
        nodes.append(helper.make_node("Where", where, [f"known.of.{name}"]))
        nodes.append(helper.make_node("ReduceMax", [f"known.of.{name}"], [output], keepdims=0))
        graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, []))
    graph.initializer.append(helper.make_tensor(_INFINITE, TensorProto.FLOAT, [], [math.inf]))
    del graph.node[:]
    graph.node.extend(nodes)
    return model.SerializeToString()
