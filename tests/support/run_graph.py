"""Run a graph of `trio_deploy.export.graphs` with weights from arrays, on ORT or OpenVINO."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir


def filled(model: ir.Model, weights: Mapping[str, np.ndarray]) -> onnx.ModelProto:
    """The model as a proto, each initializer without data filled from `weights` by name."""
    for name, value in model.graph.initializers.items():
        if value.const_value is None:
            dtype = value.type.dtype
            array = np.asarray(weights[name], order="C").astype(dtype.numpy())
            assert array.shape == tuple(value.shape), (name, array.shape, value.shape)
            value.const_value = ir.tensor(array, dtype=dtype, name=name)
    return ir.to_proto(model)


class Runner:
    """Callable stage on ONNX Runtime (`ort`) or OpenVINO (`openvino`), two threads, fp32."""

    def __init__(
        self,
        model: ir.Model,
        weights: Mapping[str, np.ndarray],
        runtime: str = "ort",
        **config: Any,
    ) -> None:
        self.proto = filled(model, weights)
        self.outputs = [value.name for value in self.proto.graph.output]
        self.inputs = [value.name for value in self.proto.graph.input]
        self.runtime = runtime
        if runtime == "ort":
            import onnxruntime

            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads = 2
            options.log_severity_level = 3
            # as runtimes/onnxruntime.py
            options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
            self.session = onnxruntime.InferenceSession(
                self.proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
            )
        else:
            import openvino

            core = openvino.Core()
            settings = {"INFERENCE_PRECISION_HINT": "f32", "INFERENCE_NUM_THREADS": 2, **config}
            read = core.read_model(self.proto.SerializeToString(), b"")
            self.compiled = core.compile_model(read, "CPU", settings)
            self.request = self.compiled.create_infer_request()

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Feeds a graph does not take are left out."""
        feeds = {name: feeds[name] for name in self.inputs}
        if self.runtime == "ort":
            return dict(zip(self.outputs, self.session.run(self.outputs, feeds), strict=True))
        result = self.request.infer(feeds, share_inputs=False, share_outputs=False)
        return {name: result[name] for name in self.outputs}


def run(
    model: ir.Model,
    weights: Mapping[str, np.ndarray],
    feeds: Mapping[str, np.ndarray],
    runtime: str = "ort",
) -> dict[str, np.ndarray]:
    """Fill, load and run once."""
    return Runner(model, weights, runtime)(feeds)


def _only(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The part of the model that makes one output."""
    needed, nodes = {output}, []
    for node in reversed(model.graph.node):
        if needed & set(node.output):
            nodes.append(node)
            needed |= set(node.input)
    part = onnx.ModelProto()
    part.CopyFrom(model)
    del part.graph.node[:], part.graph.output[:]
    part.graph.node.extend(reversed(nodes))
    part.graph.output.extend(v for v in model.graph.output if v.name == output)
    return part


def doubled(model: onnx.ModelProto, output: str) -> onnx.ModelProto:
    """The part of a model that makes one output, in double precision."""
    model = _only(model, output)
    single, double = onnx.TensorProto.FLOAT, onnx.TensorProto.DOUBLE
    for tensor in model.graph.initializer:
        if tensor.data_type == single:
            array = onnx.numpy_helper.to_array(tensor).astype(np.float64)
            tensor.CopyFrom(onnx.numpy_helper.from_array(array, tensor.name))
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "Cast" and attribute.i == single:
                attribute.i = double
    for value in (*model.graph.input, *model.graph.output):
        if value.type.tensor_type.elem_type == single:
            value.type.tensor_type.elem_type = double
    del model.graph.value_info[:]
    return model
