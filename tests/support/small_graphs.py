"""Small hand-made graphs, so that the engines are tested without the exporter."""

from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto as T
from onnx import helper

SIZE, OUT = 8, 6


def external(name: str, array: np.ndarray, file: str, offset: int) -> onnx.TensorProto:
    tensor = onnx.TensorProto(
        name=name, data_type=T.FLOAT, dims=array.shape, data_location=T.EXTERNAL
    )
    for key, value in (("location", file), ("offset", offset), ("length", array.nbytes)):
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def write_product(folder: Path, name: str = "product") -> tuple[Path, np.ndarray]:
    """y = x W, counts = its shape; W lies at an odd offset of weights/w.bin."""
    weight = np.random.default_rng(0).standard_normal((SIZE, OUT)).astype(np.float32)
    (folder / "weights").mkdir(exist_ok=True)
    (folder / "weights" / "w.bin").write_bytes(b"\0\0\0" + weight.tobytes())
    graph = helper.make_graph(
        [
            helper.make_node("MatMul", ["x", "W"], ["y"]),
            helper.make_node("Shape", ["x"], ["counts"]),
        ],
        name,
        [helper.make_tensor_value_info("x", T.FLOAT, ["B", SIZE])],
        [
            helper.make_tensor_value_info("y", T.FLOAT, ["B", OUT]),
            helper.make_tensor_value_info("counts", T.INT64, [2]),
        ],
        [external("W", weight, "weights/w.bin", 3)],
    )
    path = folder / f"{name}.onnx"
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path, weight


def write_attention(folder: Path) -> Path:
    """GroupQueryAttention, the one operator that works on a cache in place."""
    heads, groups, size = 4, 2, 8

    def info(name: str, kind: int, shape: list) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, kind, shape)

    graph = helper.make_graph(
        [
            helper.make_node(
                "GroupQueryAttention",
                ["q", "k", "v", "past.0.key", "past.0.value", "seqlens", "total"],
                ["y", "present.0.key", "present.0.value"],
                domain="com.microsoft",
                num_heads=heads,
                kv_num_heads=groups,
            )
        ],
        "attention",
        [
            info("q", T.FLOAT, ["B", "S", heads * size]),
            info("k", T.FLOAT, ["B", "S", groups * size]),
            info("v", T.FLOAT, ["B", "S", groups * size]),
            info("past.0.key", T.FLOAT, ["B", groups, "C", size]),
            info("past.0.value", T.FLOAT, ["B", groups, "C", size]),
            info("seqlens", T.INT32, ["B"]),
            info("total", T.INT32, []),
        ],
        [
            info("y", T.FLOAT, ["B", "S", heads * size]),
            info("present.0.key", T.FLOAT, ["B", groups, "P", size]),
            info("present.0.value", T.FLOAT, ["B", groups, "P", size]),
        ],
    )
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    path = folder / "attention.onnx"
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    path.write_bytes(model.SerializeToString())
    return path
