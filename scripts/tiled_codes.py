"""Try codes in tiles that serve a product with W and one with its transpose, on ONNX Runtime.

    python scripts/tiled_codes.py [--width 1024] [--mlp 2816] [--vocab 32000] [--tokens 2944]

A selection by TRIO multiplies by a layer's matrices forwards and, for the gradient, by their
transposes: the projections to keys and values at all tokens, everything else and the head at its
four probes. With 8 bit and a scale per tile of 128 x 128, W and a transposed copy of the same codes
are both right for MatMulNBits, and nothing is dequantised. Compared, by turns, are

* float: the matrices in float32, as in float bundles;
* dequantised: codes of 8 bit with a scale per row, dequantised at every run, as bundles have them;
* tiles, 8 bit activations: MatMulNBits by both copies, `accuracy_level` 4;
* tiles, float activations: the same with `accuracy_level` 0.

Printed are medians of seconds, the weights' bytes, and the relative error of the gradient against
the products in float64 with the matrices before rounding, beside that of the rounding alone.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

TILE = 128
PROBES = 4
WAYS = ("float", "dequantised", "tiles, 8 bit activations", "tiles, float activations")


def tiled(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Codes int8 [N, K] and a scale per tile [N / 128, K / 128]."""
    rows, columns = (size // TILE for size in w.shape)
    tiles = w.reshape(rows, TILE, columns, TILE)
    scales = np.abs(tiles).max((1, 3)) / 127
    codes = np.rint(tiles / scales[:, None, :, None]).astype(np.int8)
    return codes.reshape(w.shape), scales.astype(np.float32)


def untiled(codes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The values that codes in tiles stand for."""
    return codes * np.repeat(np.repeat(scales, TILE, 0), TILE, 1)


def _float(name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@dataclass
class Graph:
    """A graph in one of the ways, and its matrices."""

    way: str
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def add(self, name: str, values: np.ndarray) -> str:
        self.weights.append(numpy_helper.from_array(values, name))
        return name

    def op(self, kind: str, inputs: list[str], out: str, **attributes: Any) -> str:
        domain = "com.microsoft" if kind in ("MatMulNBits", "FusedMatMul") else ""
        self.nodes.append(helper.make_node(kind, inputs, [out], domain=domain, **attributes))
        return out

    def product(self, x: str, name: str, w: np.ndarray, out: str, back: bool) -> str:
        """X Wᵀ, or with `back` x W, for W [N, K]."""
        if self.way == "float":
            if not any(each.name == name for each in self.weights):
                self.add(name, w)
            return self.op("FusedMatMul", [x, name], out, transB=0 if back else 1)
        if self.way == "dequantised":
            if not any(each.name == name for each in self.weights):
                scales = (np.abs(w).max(1) / 127).astype(np.float32)
                self.add(name, np.rint(w / scales[:, None]).astype(np.int8))
                self.add(f"{name}.scale", scales)
                self.op("DequantizeLinear", [name, f"{name}.scale"], f"{name}.value", axis=0)
            return self.op("FusedMatMul", [x, f"{name}.value"], out, transB=0 if back else 1)
        codes, scales = tiled(w)
        if back:
            codes, scales, name = codes.T, scales.T, f"{name}.transposed"
        rows, columns = codes.shape
        unsigned = (codes.astype(np.int16) + 128).astype(np.uint8)
        self.add(name, np.ascontiguousarray(unsigned.reshape(rows, columns // TILE, TILE)))
        self.add(f"{name}.scale", np.ascontiguousarray(np.repeat(scales, TILE, 0).reshape(-1)))
        level = 4 if "8 bit" in self.way else 0
        return self.op("MatMulNBits", [x, name, f"{name}.scale"], out, N=rows, K=columns, bits=8,
                       block_size=TILE, accuracy_level=level)  # fmt: skip

    def session(self, inputs: dict[str, np.ndarray], outputs: list[str], threads: int) -> Any:
        graph = helper.make_graph(
            self.nodes,
            "selection",
            [_float(name, x.shape) for name, x in inputs.items()],
            [_float(name, None) for name in outputs],
            self.weights,
        )
        opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.intra_op_num_threads = threads
        # Constants would be dequantised once, when the graph is loaded.
        options.add_session_config_entry("session.disable_quant_qdq", "1")
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC
        return ort.InferenceSession(model.SerializeToString(), options)

    @property
    def nbytes(self) -> int:
        return sum(len(each.raw_data) for each in self.weights)


def build(way: str, matrices: dict[str, np.ndarray]) -> Graph:
    """Keys and values forwards and backwards at all tokens, the rest at the probes."""
    graph = Graph(way)
    for name in ("k", "v"):
        forward = graph.product("tokens", name, matrices[name], f"{name}.forward", back=False)
        graph.product(forward, name, matrices[name], f"{name}.gradient", back=True)
    x = graph.product("probes", "q", matrices["q"], "q.forward", back=False)
    x = graph.product(x, "o", matrices["o"], "o.forward", back=False)
    gate = graph.product(x, "gate", matrices["gate"], "gate.forward", back=False)
    up = graph.product(x, "up", matrices["up"], "up.forward", back=False)
    inner = graph.op("Mul", [gate, up], "inner")
    x = graph.product(inner, "down", matrices["down"], "down.forward", back=False)
    logits = graph.product(x, "head", matrices["head"], "head.forward", back=False)
    g = graph.product(logits, "head", matrices["head"], "head.back", back=True)
    g = graph.product(g, "down", matrices["down"], "down.back", back=True)
    a = graph.product(g, "gate", matrices["gate"], "gate.back", back=True)
    b = graph.product(g, "up", matrices["up"], "up.back", back=True)
    g = graph.op("Add", [a, b], "sum.back")
    graph.product(g, "o", matrices["o"], "o.back", back=True)
    return graph


OUTPUTS = ["k.gradient", "v.gradient", "o.back"]


def main() -> None:
    """Time the ways by turns and print a line for each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name, value in (("width", 1024), ("mlp", 2816), ("vocab", 32000), ("tokens", 2944)):
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    d, m, rng = args.width, args.mlp, np.random.default_rng(0)
    shapes = dict.fromkeys("qkvo", (d, d)) | {"gate": (m, d), "up": (m, d), "down": (d, m)}
    shapes["head"] = (args.vocab, d)
    matrices = {
        name: rng.standard_normal(shape, np.float32) / np.float32(np.sqrt(shape[1]))
        for name, shape in shapes.items()
    }
    inputs = {
        "tokens": rng.standard_normal((args.tokens, d), np.float32),
        "probes": rng.standard_normal((PROBES, d), np.float32),
    }
    wide = matrices["k"].astype(np.float64)
    exact = inputs["tokens"].astype(np.float64) @ wide.T @ wide
    rounded = untiled(*tiled(matrices["k"])).astype(np.float64)
    alone = inputs["tokens"].astype(np.float64) @ rounded.T @ rounded
    print(f"rounding in tiles alone: {np.linalg.norm(alone - exact) / np.linalg.norm(exact):.4f}")
    graphs = {way: build(way, matrices) for way in WAYS}
    sessions = {way: graph.session(inputs, OUTPUTS, args.threads) for way, graph in graphs.items()}
    seconds: dict[str, list[float]] = {way: [] for way in WAYS}
    error = {}
    for turn in range(args.rounds + 1):
        for way in WAYS if turn % 2 else reversed(WAYS):
            start = time.perf_counter()
            gradient = sessions[way].run(OUTPUTS, inputs)[0]
            if turn:  # the first is the warm-up
                seconds[way].append(time.perf_counter() - start)
            error[way] = np.linalg.norm(gradient - exact) / np.linalg.norm(exact)
    for way in WAYS:
        found = seconds[way]
        print(
            f"{way}: {statistics.median(found):.4f} s ({min(found):.4f} to {max(found):.4f}), "
            f"{graphs[way].nbytes / 2**20:.0f} MiB, error {error[way]:.4f}"
        )


if __name__ == "__main__":
    main()
