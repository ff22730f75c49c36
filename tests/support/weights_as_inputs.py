"""Graphs of a full-size model that compile without its weights: matrices become inputs.

Of graphs with `weights: inputs` vectors alone are changed; the primitive dialect has none.
"""

from __future__ import annotations

from math import prod
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
from onnx import TensorProto, helper

_DTYPES = {
    TensorProto.FLOAT: np.dtype(np.float32),
    TensorProto.FLOAT16: np.dtype(np.float16),
    TensorProto.BFLOAT16: np.dtype(ml_dtypes.bfloat16),
}


def with_matrices_as_inputs(graph: Path, out: Path) -> Path:
    """Write a graph whose external matrices are inputs, and whose external vectors are random.

    A convolution's kernel stays a constant, as TensorRT wants it.
    """
    model = onnx.load(graph, load_external_data=False)
    random = np.random.default_rng(0)
    kernels = {node.input[1] for node in model.graph.node if node.op_type == "Conv"}
    kept = []
    for tensor in model.graph.initializer:
        if tensor.data_location != TensorProto.EXTERNAL:
            kept.append(tensor)
        elif len(tensor.dims) < 2 or tensor.name in kernels:
            values = random.uniform(0.5, 1.5, prod(tensor.dims)).astype(_DTYPES[tensor.data_type])
            kept.append(
                TensorProto(
                    name=tensor.name,
                    data_type=tensor.data_type,
                    dims=tensor.dims,
                    raw_data=values.tobytes(),
                )
            )
        else:
            entry = helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            model.graph.input.append(entry)
    del model.graph.initializer[:]
    model.graph.initializer.extend(kept)
    onnx.save(model, out)
    return out
