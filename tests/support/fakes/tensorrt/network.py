"""Networks: tensors, layers, and the parser that makes them of an ONNX graph."""

from __future__ import annotations

import weakref
from pathlib import Path
from typing import Any

import onnx

from tests.support.fakes.tensorrt.build import ILogger
from tests.support.fakes.tensorrt.graphs import shape_inputs
from tests.support.fakes.tensorrt.versions import KINDS, Simulated

#: ONNX operator → layer type; every other operator is elementwise.
_LAYERS = {
    "Cast": "CAST",
    "Constant": "CONSTANT",
    "MatMul": "MATRIX_MULTIPLY",
    "Shape": "SHAPE",
}


class ITensor:
    _simulated: Simulated

    def __init__(self, info: onnx.ValueInfoProto, shapes: set[str]) -> None:
        self.name = info.name
        self.kind = info.type.tensor_type.elem_type
        name = KINDS[self.kind][0]
        types = self._simulated.module.DataType
        self.dtype = types.INT32 if self._simulated.old and name == "INT64" else types[name]
        dims = info.type.tensor_type.shape.dim
        self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
        self.is_shape_tensor = info.name in shapes


class ILayer:
    _simulated: Simulated

    def __init__(self, operator: str, inputs: list[Any], outputs: list[Any]) -> None:
        self.type = self._simulated.module.LayerType[_LAYERS.get(operator, "ELEMENTWISE")]
        self._inputs, self._outputs = inputs, outputs
        self.num_inputs, self.num_outputs = len(inputs), len(outputs)
        self.precision: Any = None
        self.output_types: dict[int, Any] = {}

    def get_input(self, number: int) -> Any:
        return self._inputs[number]

    def get_output(self, number: int) -> Any:
        return self._outputs[number]

    def set_output_type(self, number: int, kind: Any) -> None:
        self.output_types[number] = kind


class INetworkDefinition:
    def __init__(self, flags: int) -> None:
        self.flags = flags
        self.path: Path | None = None
        self.inputs: list[Any] = []
        self.layers: list[Any] = []

    @property
    def num_inputs(self) -> int:
        return len(self.inputs)

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    def get_input(self, number: int) -> Any:
        return self.inputs[number]

    def get_layer(self, number: int) -> Any:
        return self.layers[number]


class ParserError:
    def __init__(self, text: str) -> None:
        self._text = text

    def desc(self) -> str:
        return self._text

    def node(self) -> int:
        return 0

    def node_name(self) -> str:
        return "a_node"

    def node_operator(self) -> str:
        return "AnOperator"


class OnnxParser:
    _simulated: Simulated

    def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
        self._network = network
        self._errors: list[Any] = []

    def parse(self, model: bytes, path: str | None = None) -> bool:
        network, new = self._network, self._simulated.new
        proto = onnx.load_model_from_string(model)
        plugins = [node.op_type for node in proto.graph.node if node.domain]
        if plugins:
            self._errors.append(new("ParserError", f"Plugin not found: {plugins[0]}"))
            return False
        assert path is not None, "weights are looked for where the path says"
        network.path = Path(path).resolve()
        network.parser = weakref.ref(self)
        shapes = shape_inputs(proto.graph)
        network.inputs = [new("ITensor", info, shapes) for info in proto.graph.input]
        inferred = onnx.shape_inference.infer_shapes(proto).graph
        weights = [
            onnx.helper.make_tensor_value_info(w.name, w.data_type, w.dims)
            for w in inferred.initializer
        ]
        values = [*inferred.value_info, *inferred.output, *weights]
        known = {
            v.name: new("ITensor", v, set())
            for v in values
            if v.type.tensor_type.elem_type in KINDS
        }
        known.update({tensor.name: tensor for tensor in network.inputs})
        network.layers = [
            new(
                "ILayer",
                node.op_type,
                [known.get(name) for name in node.input],
                [known[name] for name in node.output],
            )
            for node in inferred.node
            if all(name in known for name in node.output)
        ]
        return True

    @property
    def num_errors(self) -> int:
        return len(self._errors)

    def get_error(self, index: int) -> Any:
        return self._errors[index]
