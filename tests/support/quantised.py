"""Quantised weights for graphs of tests."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trio_deploy.config.options import Calibration
from trio_deploy.export.checkpoint import read_checkpoint
from trio_deploy.graphs.weight import PartValue
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.quant.narrow_floats import E2M1, E4M3, greatest, scale_of_matrix
from trio_deploy.quant.packing import apart
from trio_deploy.quant.schemes import encode, values_of


def quantised(
    model: ir.Model, weights: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays of a graph's parts made from float weights, and the weights that they stand for.

    Codes of 4 bit are arrays of ml_dtypes' types, one per entry.
    """
    parts, values = dict(weights), dict(weights)
    for value in model.graph.initializers.values():
        if not isinstance(value, PartValue) or value.stored.coding is None:
            continue
        stored, coding = value.stored, value.stored.coding
        assert coding is not None
        of_matrix = None
        if coding.label == "fp4":
            of_matrix = scale_of_matrix(greatest(weights[stored.name]))
        codes, scale = encode(weights[stored.name], coding, of_matrix)
        arrays = {"codes": codes, "scale": scale}
        arrays |= {} if of_matrix is None else {"matrix": of_matrix}
        values[stored.name] = values_of(arrays, coding.label, stored.shape[1])
        for part, array in zip(stored.parts, arrays.values(), strict=True):
            parts[part.name] = _in_type(array, part.dtype).reshape(part.shape)
    return parts, values


def _in_type(array: np.ndarray, dtype: str) -> np.ndarray:
    """The array of a part in its own type, as far as numpy has it."""
    if dtype == "int4":
        return ((apart(array) << 4).view(np.int8) >> 4).astype(ml_dtypes.int4)
    if dtype == "float4_e2m1fn":
        return apart(array).view(E2M1)
    if dtype == "float8_e4m3fn":
        return array.view(E4M3)
    return array.view(np.int8) if dtype == "int8" else array


def calibration_of(checkpoint: Path, greatest: float = 8.0) -> Calibration:
    """One greatest value for all matrices of a checkpoint's layers."""
    config = read_checkpoint(checkpoint).config
    names = [name for name in canonical_tensors(config) if name.startswith("language_model.layers")]
    return Calibration("made up", 1, dict.fromkeys(names, greatest))
