"""Readers of quantised checkpoints: round trips, examples by hand, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.packed import in_awq, in_compressed_tensors, in_gptq, random_matrix, zeros_of
from trio_deploy.errors import TrioError
from trio_deploy.quant.forms import FORMS
from trio_deploy.quant.matrix import QuantisedMatrix, dequantised
from trio_deploy.quant.schemes import stored_arrays
from trio_deploy.quant.stored_weight import Coding
from trio_deploy.quant.words import Blocks, matrix_of

PACKERS = {
    "compressed-tensors": in_compressed_tensors,
    "awq": in_awq,
    "gptq": partial(in_gptq, less=1),
    "gptq_v2": partial(in_gptq, less=0),
}
Tensors = dict[str, np.ndarray]
read_compressed_tensors, read_awq = FORMS["compressed-tensors"].read, FORMS["awq"].read
read_gptq, read_gptq_v2 = FORMS["gptq"].read, FORMS["gptq_v2"].read


def same(ours: QuantisedMatrix, other: QuantisedMatrix) -> bool:
    codes = np.array_equal(ours.codes, other.codes) and np.array_equal(ours.scale, other.scale)
    zero = np.array_equal(zeros_of(ours), zeros_of(other))
    return codes and zero and (ours.bits, ours.block) == (other.bits, other.block)


@settings(deadline=None, max_examples=40)
@given(
    form=st.sampled_from(sorted(PACKERS)),
    rows=st.integers(1, 3),
    blocks=st.integers(1, 3),
    block=st.sampled_from([16, 32, 64]),
    bits=st.sampled_from([4, 8]),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_a_packed_matrix_is_read_back(
    form: str, rows: int, blocks: int, block: int, bits: int, symmetric: bool, seed: int
) -> None:
    pack, read = PACKERS[form], FORMS[form].read
    bits = 4 if form == "awq" else bits
    made = random_matrix(8 * rows, blocks * block, bits, block, symmetric=symmetric, seed=seed)
    assert same(read(pack(made), "w"), made)
    assert read(pack(made), "w").zero is None or not symmetric


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("rows,columns", [(5, 33), (8, 7), (3, 36)])
def test_rows_and_columns_that_fill_no_word_are_read(rows, columns, bits, symmetric) -> None:
    made = random_matrix(rows, columns, bits, columns, symmetric=symmetric)
    assert same(read_compressed_tensors(in_compressed_tensors(made), "w"), made)


def test_words_of_compressed_tensors_by_hand() -> None:
    matrix = read_compressed_tensors(
        {
            "weight_packed": np.array([[0x76543210], [0x0FEDCBA9]], np.int32),
            "weight_scale": np.array([[0.5, 1.0], [2.0, 4.0]], np.float32),
            "weight_shape": np.array([2, 8]),
        },
        "w",
    )
    assert matrix.codes.tolist() == [list(range(8)), [9, 10, 11, 12, 13, 14, 15, 0]]
    assert matrix.block == 4 and matrix.zero is None
    assert dequantised(matrix)[0].tolist() == [-4.0, -3.5, -3.0, -2.5, -4.0, -3.0, -2.0, -1.0]


def test_words_of_awq_by_hand() -> None:
    words = np.array([[0x75316420], [0x00000008]], np.int32)  # fields 0, 2, 4, 6, 1, 3, 5, 7
    matrix = read_awq(
        {
            "qweight": words,
            "qzeros": np.array([[0x11111111]], np.int32),
            "scales": np.full((1, 8), 0.5, np.float16),
        },
        "w",
    )
    assert matrix.codes.T.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7], [8, 0, 0, 0, 0, 0, 0, 0]]
    assert dequantised(matrix).T[0].tolist() == [-0.5, 0.0, 0.5, 1.0, 1.5, 2.0, 2.5, 3.0]


def test_words_of_gptq_by_hand() -> None:
    arrays = {
        "qweight": np.array([[0x76543210] * 8], np.int32),
        "qzeros": np.array([[0x77777777]], np.int32),
        "scales": np.full((1, 8), 0.5, np.float16),
        "g_idx": np.zeros(8, np.int32),
    }
    row = dequantised(read_gptq(arrays, "w"))[5].tolist()
    assert row == [-4.0, -3.5, -3.0, -2.5, -2.0, -1.5, -1.0, -0.5]
    assert read_gptq(arrays, "w").zero is None
    other = read_gptq_v2(arrays, "w")
    assert other.zero is not None and (other.zero == 7).all()


@pytest.mark.parametrize("kind", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_scales_may_have_any_float_type(kind) -> None:
    made = random_matrix(4, 64, 4, 32)
    arrays = in_compressed_tensors(made, kind)
    read = read_compressed_tensors(arrays, "w")
    assert np.array_equal(read.scale, arrays["weight_scale"].astype(np.float32))


def test_one_scale_for_a_matrix_serves_each_row() -> None:
    arrays = in_compressed_tensors(random_matrix(4, 64, 8, 64))
    arrays["weight_scale"] = np.array([0.25], np.float16)
    assert read_compressed_tensors(arrays, "w").scale.tolist() == [[0.25]] * 4


def test_zero_points_of_older_releases_are_signed_bytes() -> None:
    made = random_matrix(6, 64, 4, 32, symmetric=False)
    arrays = in_compressed_tensors(made)
    arrays["weight_zero_point"] = (zeros_of(made).astype(np.int16) - 8).astype(np.int8)
    assert same(read_compressed_tensors(arrays, "w"), made)


@settings(deadline=None, max_examples=40)
@given(
    bits=st.sampled_from([4, 8]),
    least=st.integers(0, 2),
    symmetric=st.booleans(),
    seed=st.integers(0, 2**16),
)
def test_scales_of_0_and_below_are_written_as_scales_above(
    bits: int, least: int, symmetric: bool, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    made = random_matrix(4, 100, bits, 32, symmetric=symmetric, seed=seed)
    codes = np.maximum(made.codes, least).astype(np.uint8)
    scale = made.scale * rng.choice([-1.0, 0.0, 1.0], made.scale.shape)
    wide = np.repeat(scale, 32, axis=1)[:, :100]
    zero = np.repeat(zeros_of(made), 32, axis=1)[:, :100]
    wanted = (codes.astype(np.float64) - zero) * wide
    blocks = Blocks(4, 100, bits, 32, scale, made.zero)
    matrix = matrix_of(codes, blocks)
    assert matrix.zero is None or not blocks.symmetric
    assert np.array_equal(dequantised(matrix), wanted.astype(np.float32))
    if symmetric and least:
        assert matrix.zero is None


def test_scales_are_kept_within_the_type_of_scales() -> None:
    made = random_matrix(4, 64, 4, 32)
    coding = Coding(4, 32, "blocks", "float16")
    small = replace(made, scale=made.scale * np.float32(1e-9))
    assert (stored_arrays(small, coding)[1] > 0).all()
    with pytest.raises(TrioError, match="a scale is more than float16 can hold: choose --dtype"):
        stored_arrays(replace(made, scale=made.scale * np.float32(1e9)), coding)


@pytest.mark.parametrize("form", ["compressed-tensors", "gptq"])
def test_columns_in_another_order_are_refused(form: str) -> None:
    pack, read = PACKERS[form], FORMS[form].read
    arrays = pack(random_matrix(8, 64, 4, 32))
    name = "g_idx" if form == "gptq" else "weight_g_idx"
    arrays[name] = (np.arange(64) // 32).astype(np.int32)
    assert read(arrays, "w").block == 32
    arrays[name] = arrays[name][::-1].copy()
    with pytest.raises(TrioError, match="layers.0.q: the columns are ordered by activation"):
        read(arrays, "layers.0.q")


def test_a_zero_point_that_gptq_cannot_tell_is_refused() -> None:
    made = random_matrix(8, 64, 4, 32, symmetric=False)
    assert made.zero is not None
    made.zero[3, 1] = 0
    with pytest.raises(TrioError, match="zero point of 15 in the form gptq"):
        read_gptq(in_gptq(made), "w")
    assert same(read_gptq_v2(in_gptq(made, less=0), "w"), made)


def _cut(name: str, axis: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        return tensors | {name: np.delete(tensors[name], 0, axis)}

    return change


@pytest.mark.parametrize(
    "form,change",
    [
        ("compressed-tensors", _cut("weight_packed", 1)),
        ("compressed-tensors", _cut("weight_scale", 0)),
        ("compressed-tensors", lambda t: t | {"weight_scale": t["weight_scale"][:, [0] * 5]}),
        ("awq", _cut("qzeros", 0)),
        ("awq", _cut("scales", 1)),
        ("awq", _cut("qweight", 0)),
        ("gptq", _cut("scales", 1)),
        ("gptq", _cut("qweight", 1)),
        ("gptq", lambda t: t | {"qzeros": t["qzeros"][:, :0]}),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(form: str, change) -> None:
    pack, read = PACKERS[form], FORMS[form].read
    arrays = pack(random_matrix(16, 96, 4, 32))
    read(arrays, "w")
    with pytest.raises(TrioError, match="^w: "):
        read(change(arrays), "w")
