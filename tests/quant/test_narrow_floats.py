"""Matrices in E4M3 and E2M1: rounding, scales, and the values that codes stand for."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trio_deploy.errors import TrioError
from trio_deploy.quant.narrow_floats import (
    BLOCK,
    from_e2m1,
    from_e4m3,
    greatest,
    round_to_e2m1,
    round_to_e4m3,
    scale_of_matrix,
    to_e4m3,
)

VALUES = np.random.default_rng(0).normal(0, 0.1, (6, 64)).astype(np.float32)


def test_e4m3_is_torchs_with_ties_to_even_and_a_greatest_number() -> None:
    values = np.concatenate([np.linspace(-460, 460, 4001), 2.0 ** np.arange(-12, 9)])
    values = np.append(values, [1.0625, 1.1875, 1e9, -1e9]).astype(np.float32)  # two ties
    expected = torch.from_numpy(values).clamp(-448, 448).to(torch.float8_e4m3fn).float().numpy()
    assert np.array_equal(to_e4m3(values).astype(np.float32), expected)


def test_rows_in_e4m3_are_near_their_values() -> None:
    codes, scale = round_to_e4m3(VALUES)
    error = np.abs(from_e4m3(codes, scale) - VALUES)
    # Half a unit in the last of 4 places, or of the least number.
    least = scale[:, None] * 2.0**-10
    assert np.all(error <= np.maximum(np.abs(VALUES) / 16, least) * 1.0001)
    assert np.allclose(np.abs(from_e4m3(codes, scale)).max(1), np.abs(VALUES).max(1), rtol=1e-6)


def test_codes_in_e4m3_belong_to_scales_as_they_are_stored() -> None:
    """A scale that became smaller in float16 leaves the greatest value at the greatest code."""
    codes, scale = round_to_e4m3(VALUES * 3e-3, np.float16)
    assert scale.dtype == np.float16
    assert np.isfinite(from_e4m3(codes, scale)).all()
    assert (codes & 0x7F).max() == 0x7E


@pytest.mark.parametrize("row", [0, 5])
def test_zeros_stay_zeros(row: int) -> None:
    values = VALUES.copy()
    values[row] = 0
    assert not from_e4m3(*round_to_e4m3(values))[row].any()
    of_matrix = scale_of_matrix(greatest(values))
    assert not from_e2m1(*round_to_e2m1(values, of_matrix), of_matrix)[row].any()
    nothing = scale_of_matrix(0.0)
    assert nothing == 1 and not from_e2m1(*round_to_e2m1(values * 0, nothing), nothing).any()


def test_blocks_in_e2m1_have_the_nearest_of_its_eight_numbers() -> None:
    of_matrix = scale_of_matrix(greatest(VALUES))
    codes, scale = round_to_e2m1(VALUES, of_matrix)
    assert codes.shape == (6, 32) and scale.shape == (6, 4)
    numbers = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    levels = torch.from_numpy(scale).view(torch.float8_e4m3fn).float().numpy() * of_matrix
    inside = np.abs(VALUES).reshape(6, -1, BLOCK) / levels[:, :, None]
    nearest = np.abs(np.minimum(inside, 6)[..., None] - numbers).min(-1)
    found = from_e2m1(codes, scale, of_matrix).reshape(inside.shape) / levels[:, :, None]
    assert np.all(found * VALUES.reshape(found.shape) >= 0)
    assert np.allclose(np.abs(np.abs(found) - np.minimum(inside, 6)), nearest, atol=1e-6)


def test_blocks_far_below_the_greatest_keep_a_scale_above_0() -> None:
    values = VALUES.copy()
    values[3] *= 1e-9
    of_matrix = scale_of_matrix(greatest(values))
    _, scale = round_to_e2m1(values, of_matrix)
    assert (scale > 0).all()


@pytest.mark.parametrize("value", [np.inf, np.nan])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    values = VALUES.copy()
    values[2, 3] = value
    for round_it in (greatest, round_to_e4m3):
        with pytest.raises(TrioError, match="not finite"):
            round_it(values)


def test_a_matrix_of_the_least_numbers_has_a_scale_above_0() -> None:
    values = np.full((1, BLOCK), 1e-43, np.float32)
    of_matrix = scale_of_matrix(greatest(values))
    assert of_matrix > 0
    with np.errstate(all="raise", under="ignore"):
        assert np.isfinite(from_e2m1(*round_to_e2m1(values, of_matrix), of_matrix)).all()
