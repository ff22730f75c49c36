"""Quantised weights for graphs of tests."""

from __future__ import annotations

from collections.abc import Mapping

import ml_dtypes
import numpy as np
import onnx_ir as ir

from trio_deploy.graphs.weight import PartValue
from trio_deploy.quant.schemes import decode, encode


def quantised(
    model: ir.Model, weights: Mapping[str, np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Arrays of a graph's parts made from float weights, and the weights that they stand for.

    Codes of 4 bit are arrays of ml_dtypes.int4, one per entry.
    """
    parts, values = dict(weights), dict(weights)
    for value in model.graph.initializers.values():
        if not isinstance(value, PartValue) or value.stored.coding is None:
            continue
        stored = value.stored
        first, second = stored.parts
        codes, scale = encode(weights[stored.name], stored.coding)
        bits, columns = stored.coding.bits, stored.shape[1]
        values[stored.name] = decode(codes, scale, bits, columns)
        if first.dtype == "int4":
            low, high = codes << 4, codes & 0xF0
            codes = np.stack([low, high], axis=-1).view(np.int8) >> 4
            codes = codes.reshape(first.shape).astype(ml_dtypes.int4)
        parts |= {first.name: codes.view(np.int8) if first.dtype == "int8" else codes}
        parts[second.name] = scale
    return parts, values
