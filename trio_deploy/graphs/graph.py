"""A graph under construction."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import onnx_ir as ir
from onnx.helper import find_min_ir_version_for, make_opsetid
from onnxscript import GraphBuilder

from trio_deploy import __version__
from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.values import cast, shape_of, typed
from trio_deploy.graphs.weights import stored_weights
from trio_deploy.quant.stored_weight import parts_of


class Stage:
    """One graph under construction: inputs, outputs and final checks; `op` writes nodes into it."""

    def __init__(self, name: str, d: Dialect) -> None:
        self.d = d
        imports = {"": d.opset, **d.domains}
        self._graph = ir.Graph([], [], nodes=[], name=name, opset_imports=imports)
        self._builder = GraphBuilder(self._graph)
        self.op: Any = self._builder.op

    def input(self, name: str, dtype: ir.DataType, shape: Sequence[int | str]) -> ir.Value:
        """Declare an input; strings name dynamic axes."""
        return self._builder.input(name, dtype, shape)

    def output(
        self, name: str, value: ir.Value, dtype: ir.DataType, shape: Sequence[int | str]
    ) -> None:
        """Declare an output with its full type; a value of another type is cast."""
        value = cast(self.op, value, dtype)
        if value.producer() is None or value.is_graph_output():
            value = self.op.Identity(value)
        typed(value, dtype, shape)
        self._builder.add_output(value, name)

    def finish(self, config: ModelConfig) -> ir.Model:
        """Check the graph and return it as a model.

        Raises:
            RuntimeError: a node reads a value that no node or input provides, or an initializer
                without data is not a part of the model's weights with that shape.
        """
        graph = self._graph
        _check_values(graph, set())
        parts = parts_of(stored_weights(config, self.d))
        expected = {part.name: part.shape for part in parts}
        for name, value in graph.initializers.items():
            if value.const_value is None and expected.get(name) != tuple(shape_of(value)):
                raise RuntimeError(
                    f"{graph.name}: initializer {name} {shape_of(value)} is not a tensor of the "
                    f"model, whose modules have {expected.get(name)}"
                )
        for node in graph.all_nodes():
            node.metadata_props.clear()
        return ir.Model(
            graph,
            # the oldest one that the ONNX release of an opset allows: TensorRT 8.6 reads 8
            ir_version=find_min_ir_version_for([make_opsetid("", self.d.opset)]),
            producer_name="trio-deploy",
            producer_version=__version__,
        )


def _check_values(graph: ir.Graph, outer: set[int]) -> None:
    known = outer | {id(value) for value in graph.inputs}
    known |= {id(value) for value in graph.initializers.values()}
    for node in graph:
        for value in node.inputs:
            if value is not None and id(value) not in known:
                raise RuntimeError(f"{graph.name}: {value.name} is used but never registered")
        for body in _bodies(node):
            _check_values(body, known)
        known |= {id(value) for value in node.outputs}


def _bodies(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
