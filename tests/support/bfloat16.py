"""Precision bfloat16 on a CPU without it.

OpenVINO: weights are rounded, products computed in float32. ONNX Runtime: graphs in which both
factors of each product with a weight, and the product, are rounded.
"""

from __future__ import annotations

from typing import Any

import onnx
import pytest
from onnx import TensorProto, helper

from trio_deploy.runtimes import openvino as runtime


class _Core:
    """OpenVINO's core, which claims the arithmetic."""

    def __init__(self, core: Any) -> None:
        self._core = core

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)

    def get_property(self, device: str, name: str) -> Any:
        if name == "OPTIMIZATION_CAPABILITIES":
            return ["BF16"]
        return self._core.get_property(device, name)


def pretend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let graphs be changed for bfloat16, and compiled in float32."""
    openvino = pytest.importorskip("openvino")
    core = openvino.Core
    monkeypatch.setattr(openvino, "Core", lambda: _Core(core()))
    monkeypatch.setattr(runtime, "_HINTS", {"float32": "f32", "bfloat16": "f32"})


def round_products(model: onnx.ModelProto) -> None:
    """Round to bfloat16, in a float32 graph, what `Passes.narrow_products` computes in it."""
    made_by = {name: node for node in model.graph.node for name in node.output}
    held = {tensor.name for tensor in model.graph.initializer}
    nodes = []

    def is_weight(name: str) -> bool:
        node = made_by.get(name)
        source = node.input[0] if node is not None and node.op_type == "Transpose" else name
        return source in held and source.endswith(".weight")

    def rounded(name: str, to: str) -> None:
        nodes.append(helper.make_node("Cast", [name], [f"{to}.narrow"], to=TensorProto.BFLOAT16))
        nodes.append(helper.make_node("Cast", [f"{to}.narrow"], [to], to=TensorProto.FLOAT))

    for node in model.graph.node:
        if node.op_type != "MatMul" or not any(map(is_weight, node.input)):
            nodes.append(node)
            continue
        (product,) = node.output
        factors = [f"{product}.{number}" for number in range(2)]
        for name, factor in zip(node.input, factors, strict=True):
            rounded(name, factor)
        nodes.append(helper.make_node("MatMul", factors, [f"{product}.whole"]))
        rounded(f"{product}.whole", product)
    del model.graph.node[:], model.graph.value_info[:]
    model.graph.node.extend(nodes)
