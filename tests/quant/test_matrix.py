"""Rounding to nearest, and the bytes of quantised matrices against ONNX's and ORT's operators."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import (
    LEAST_SCALE,
    QuantisedMatrix,
    block_count,
    dequantised,
    round_to_nearest,
)
from trio_deploy.quant.packing import Form, pack, unpack

#: N, K, block: odd N, an odd number of blocks, a short last block, a scale per row.
SHAPES = [(5, 384, 128), (4, 192, 64), (3, 200, 128), (7, 48, 48), (1, 576, 128)]


def weights(rows: int, columns: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(0, 0.05, (rows, columns)).astype(np.float32)


def with_zero_points(rows: int, columns: int, bits: int, block: int) -> QuantisedMatrix:
    rng, top = np.random.default_rng(1), 1 << bits
    blocks = (rows, block_count(columns, block))
    return QuantisedMatrix(
        rng.integers(0, top, (rows, columns)).astype(np.uint8),
        rng.uniform(0.01, 0.02, blocks).astype(np.float32),
        rng.integers(0, top, blocks).astype(np.uint8),
        bits,
        block,
    )


def same(a: QuantisedMatrix, b: QuantisedMatrix) -> bool:
    zeros = a.zero is b.zero or (
        a.zero is not None and b.zero is not None and np.array_equal(a.zero, b.zero)
    )
    codes = np.array_equal(a.codes, b.codes) and np.array_equal(a.scale, b.scale)
    return codes and zeros and (a.bits, a.block) == (b.bits, b.block)


@settings(deadline=None, max_examples=60)
@given(
    rows=st.integers(1, 5),
    columns=st.integers(1, 300),
    block=st.sampled_from([16, 32, 64, 128, 300]),
    bits=st.sampled_from([4, 8]),
    size=st.sampled_from([1e-9, 1e-4, 1.0, 1e4]),
    dtype=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 2**16),
)
def test_every_value_is_within_half_a_step(
    rows: int, columns: int, block: int, bits: int, size: float, dtype: Any, seed: int
) -> None:
    array = weights(rows, columns, seed) * np.float32(size)
    array[0, : block // 2] = 0
    matrix = round_to_nearest(array, bits, block, dtype)
    scale = np.repeat(matrix.scale, block, axis=1)[:, :columns]
    # A scale that was rounded down cuts the block's greatest values off by that much.
    slack = 1.0 if dtype is np.float32 else 1.02
    near = np.abs(dequantised(matrix) - array) <= 0.5001 * slack * scale + np.abs(array) * (
        0 if dtype is np.float32 else 0.002
    )
    assert near[scale > 2 * LEAST_SCALE].all()
    assert (matrix.scale >= LEAST_SCALE).all()
    assert (matrix.scale.astype(np.float16) > 0).all()
    assert (matrix.scale == matrix.scale.astype(dtype)).all()
    assert matrix.codes.min() >= (1 if bits == 8 else 0) and matrix.codes.max() < 1 << bits


def test_rows_are_rounded_alone() -> None:
    array = weights(6, 200)
    whole, part = round_to_nearest(array, 4, 128), round_to_nearest(array[2:4], 4, 128)
    assert np.array_equal(whole.codes[2:4], part.codes)
    assert np.array_equal(whole.scale[2:4], part.scale)


def test_blocks_of_zeros_stay_zero() -> None:
    matrix = round_to_nearest(np.zeros((2, 64), np.float32), 4, 32)
    assert (matrix.scale == 1).all() and (matrix.codes == 8).all()
    assert (dequantised(matrix) == 0).all()


def test_the_greatest_values_take_the_outer_codes() -> None:
    array = np.array([[1.0, -1.0, 0.0, 0.25]], np.float32)
    assert round_to_nearest(array, 8, 4).codes.tolist() == [[255, 1, 128, 160]]
    assert round_to_nearest(array, 4, 4).codes.tolist() == [[15, 1, 8, 10]]


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    array = weights(2, 64)
    array[1, 3] = value
    with pytest.raises(TrioError, match="not finite"):
        round_to_nearest(array, 8, 64)


def test_contradictory_parts_are_refused() -> None:
    made = round_to_nearest(weights(2, 64), 4, 32)
    for codes, scale, zero in (
        (made.codes.astype(np.int8), made.scale, None),
        (made.codes, made.scale[:, :1], None),
        (made.codes, made.scale, np.zeros((2, 3), np.uint8)),
        (made.codes, made.scale * 0, None),
    ):
        with pytest.raises(TrioError):
            QuantisedMatrix(codes, scale, zero, 4, 32)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_packing_loses_nothing(rows: int, columns: int, block: int, bits: int) -> None:
    made = round_to_nearest(weights(rows, columns), bits, block)
    assert same(unpack(pack(made, "blocks"), "blocks", columns, bits), made)
    asymmetric = with_zero_points(rows, columns, bits, block)
    assert same(unpack(pack(asymmetric, "blocks"), "blocks", columns, bits), asymmetric)
    if columns % block == 0:
        assert same(unpack(pack(made, "signed"), "signed", columns, bits), made)


def test_the_first_code_is_in_the_low_nibble() -> None:
    codes = np.arange(16, dtype=np.uint8)[None]
    matrix = QuantisedMatrix(codes, np.ones((1, 1), np.float32), None, 4, 16)
    assert pack(matrix, "blocks")["codes"].tobytes().hex() == "1032547698badcfe"
    assert pack(matrix, "signed")["codes"].tobytes().hex() == "98badcfe10325476"  # XOR 0x88


def test_signed_codes_have_neither_zero_points_nor_short_blocks() -> None:
    with pytest.raises(TrioError, match="no zero points"):
        pack(with_zero_points(2, 64, 4, 32), "signed")
    with pytest.raises(TrioError, match="no whole blocks"):
        pack(round_to_nearest(weights(2, 200), 4, 128), "signed")


def tensor(name: str, array: np.ndarray, dtype: int, shape: tuple[int, ...]) -> Any:
    return helper.make_tensor(name, dtype, shape, array.tobytes(), raw=True)


def dequantize_linear(matrix: QuantisedMatrix, form: Form) -> onnx.ModelProto:
    """A DequantizeLinear of the packed bytes, as graphs have it."""
    arrays, (rows, columns) = pack(matrix, form), matrix.codes.shape
    kinds = {
        ("signed", 8): TensorProto.INT8,
        ("signed", 4): TensorProto.INT4,
        ("blocks", 8): TensorProto.UINT8,
        ("blocks", 4): TensorProto.UINT4,
    }
    blocks = matrix.scale.shape[1]
    shape: tuple[int, ...] = (rows, columns)
    scale = arrays["scale"]
    attributes = {"axis": 0} if scale.ndim == 1 else {"axis": 1, "block_size": matrix.block}
    inputs = ["q", "scale"]
    kind = kinds[form, matrix.bits]
    initializers = []
    if form == "blocks":
        shape, scale = (rows, blocks, matrix.block), scale[:, :, None]
        attributes = {"axis": 2, "block_size": matrix.block}
        zero = np.full(rows * blocks, matrix.offset, np.uint8)
        if matrix.bits == 4:
            zero = np.full(-(-rows * blocks // 2), 0x88, np.uint8)
        initializers.append(tensor("zero", zero, kind, scale.shape))
        inputs.append("zero")
    initializers += [
        tensor("q", arrays["codes"], kind, shape),
        tensor("scale", np.ascontiguousarray(scale), TensorProto.FLOAT, scale.shape),
    ]
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", inputs, ["y"], **attributes)],
        "dequantise",
        [],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        initializers,
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    onnx.checker.check_model(model, full_check=True)
    return model


@pytest.mark.parametrize("form", ["signed", "blocks"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), SHAPES)
def test_dequantize_linear_reads_the_bytes(
    rows: int, columns: int, block: int, bits: int, form: Form
) -> None:
    if form == "signed" and columns % block:
        pytest.skip("signed codes have whole blocks")
    matrix = round_to_nearest(weights(rows, columns), bits, block)
    model, expected = dequantize_linear(matrix, form), dequantised(matrix)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    for values in (session.run(None, {})[0], ReferenceEvaluator(model).run(None, {})[0]):
        flat = np.asarray(values).reshape(rows, -1)[:, :columns]
        assert np.array_equal(flat, expected)


@pytest.mark.parametrize("zeros", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("rows", "columns", "block"), [s for s in SHAPES if s[2] != 48])
def test_matmul_nbits_reads_the_bytes(
    rows: int, columns: int, block: int, bits: int, zeros: bool
) -> None:
    made = round_to_nearest(weights(rows, columns), bits, block)
    matrix = with_zero_points(rows, columns, bits, block) if zeros else made
    arrays = pack(matrix, "blocks")
    kinds = {"codes": TensorProto.UINT8, "scale": TensorProto.FLOAT, "zero": TensorProto.UINT8}
    node = helper.make_node(
        "MatMulNBits", ["x", *arrays], ["y"], domain="com.microsoft",
        K=columns, N=rows, bits=bits, block_size=block, accuracy_level=0,
    )  # fmt: skip
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["B", columns])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["B", rows])],
        [tensor(name, array, kinds[name], array.shape) for name, array in arrays.items()],
    )
    imports = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=10)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    x = np.random.default_rng(2).normal(size=(3, columns)).astype(np.float32)
    expected = x @ dequantised(matrix).T
    found = np.asarray(session.run(None, {"x": x})[0])
    assert np.abs(found - expected).max() <= 1e-5 * np.abs(expected).max()
