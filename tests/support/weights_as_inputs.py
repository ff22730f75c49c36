"""Graphs of a full-size model that compile without its weights: matrices become inputs.

Of graphs with `weights: inputs` vectors alone are changed; the primitive dialect has none.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import onnx
from onnx import TensorProto, helper


def with_matrices_as_inputs(graph: Path, out: Path) -> Path:
    """Write a graph whose external matrices are inputs, and whose external vectors are zeros.

    A convolution's kernel stays a constant, as TensorRT wants it.
    """
    model = onnx.load(graph, load_external_data=False)
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            kept.append(tensor)
        elif len(tensor.dims) < 2 or tensor.name in kernels:
            item = {TensorProto.FLOAT: 4, TensorProto.FLOAT16: 2, TensorProto.BFLOAT16: 2}
            kept.append(
                TensorProto(
                    name=tensor.name,
                    data_type=tensor.data_type,
                    dims=tensor.dims,
                    raw_data=bytes(prod(tensor.dims) * item[tensor.data_type]),
                )
            )
        else:
            entry = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(entry)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, out)
    return out
