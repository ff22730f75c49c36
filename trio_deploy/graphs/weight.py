"""A weight in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from trio_deploy.graphs.values import (
    FLOAT,
    FLOAT_NAMES,
    PART_TYPES,
    cast,
    constant,
    dim,
    dtype_of,
    shape_of,
    typed,
)
from trio_deploy.quant.schemes import quantised_weight
from trio_deploy.quant.stored_weight import Coding, Part, StoredWeight, float_weight


class PartValue(nn.Parameter):
    """Initializer of a part of a weight, without data: the exporter adds them.

    It registers itself under the part's name.

    Attributes:
        stored: the weight.
    """

    def __init__(self, stored: StoredWeight, part: Part) -> None:
        self.stored = stored
        super().__init__(part.shape, dtype=PART_TYPES[part.dtype], name=part.name)

    def _realize(self, builder: GraphBuilder) -> PartValue:
        graph = builder.root.graph
        known = graph.initializers.get(str(self.name))
        if known is None:
            if self._realized:
                raise RuntimeError(f"{self.name} belongs to another graph: build modules afresh")
            graph.initializers[str(self.name)] = self
            self._realized = True
        elif known is not self:
            raise RuntimeError(f"{self.name} is used by two modules of one graph: share one")
        return self


class Weight(PartValue):
    """A float weight, whose one part is the tensor."""

    def __init__(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> None:
        stored = float_weight(name, shape, FLOAT_NAMES[dtype])
        super().__init__(stored, stored.parts[0])

    def into(self, op: Any) -> Weight:
        """Register in the graph of `op`, for a use outside the module's own forward."""
        self._realize(op.builder)
        return self


class QuantisedWeight(nn.Module):
    """A matrix [out, in] as codes and scales.

    Attributes:
        codes, scale: its parts.
        zero: its zero points, or what blocks have added, by `coding`; None: neither.
        of_matrix: the scale of all its blocks' scales; None: they have none.
        shape: [out, in].
        coding: how it is stored.
    """

    def __init__(self, name: str, shape: Sequence[int], coding: Coding) -> None:
        super().__init__(name)
        stored = quantised_weight(name, shape, coding)
        self.shape = list(stored.shape)
        self.coding = coding
        self.scale_dtype = FLOAT if coding.label == "fp4" else PART_TYPES[coding.scale_dtype]
        parts = [PartValue(stored, part) for part in stored.parts]
        self.codes, self.scale = parts[:2]
        self.zero = parts[2] if coding.asymmetric else None
        self.of_matrix = parts[2] if coding.label == "fp4" else None
        self._dense: ir.Value | None = None

    def into(self, op: Any) -> QuantisedWeight:
        """Register its parts in the graph of `op`."""
        for part in (self.codes, self.scale, self.zero, self.of_matrix):
            if part is not None:
                part._realize(op.builder)
        return self

    def dense(self, op: Any, dtype: ir.DataType, offsets: bool = True) -> ir.Value:
        """The matrix as a value of a float type, [out, in]: one DequantizeLinear per graph.

        Args:
            offsets: with what blocks have added, if they have.
        """
        self.into(op)
        if self._dense is None:
            blocks = self.coding.form == "blocks"
            made = self._from_blocks(op) if blocks else self._from_signed(op, offsets)
            self._dense = typed(cast(op, made, dtype), dtype, self.shape)
            self._dense.name = self.name  # passes over graphs know a weight by it
            producer = self._dense.producer()
            assert producer is not None
            producer.name = self._dense.name
        return self._dense

    def rows(self, op: Any, index: ir.Value, dtype: ir.DataType) -> ir.Value:
        """Some rows of a matrix in bytes: int64 [B, S] → values of a float type [B, S, in].

        Codes are gathered before they become floats: no other row is dequantised.
        """
        self.into(op)
        columns, kind = self.shape[1], self.scale_dtype
        zero: Any = 128.0
        if self.zero is not None:
            zero = op.Unsqueeze(cast(op, op.Gather(self.zero, index, axis=0), kind), [3])
        codes = cast(op, op.Gather(self.codes, index, axis=0), kind)  # [B, S, blocks, b]
        scale = op.Unsqueeze(op.Gather(self.scale, index, axis=0), [3])
        y = op.Reshape(op.Mul(op.Sub(codes, zero), scale), [0, 0, -1])
        if columns % self.coding.block:
            y = op.Slice(y, [0], [columns], [2])
        return cast(op, typed(y, kind, [*shape_of(index), columns]), dtype)

    def _from_signed(self, op: Any, offsets: bool) -> ir.Value:
        """Codes [out, in], or in 8 bit [out·blocks, in/blocks], whose rows have a scale each."""
        out, columns = self.shape
        scale: ir.Value = self.scale
        if self.of_matrix is not None:
            scale = op.DequantizeLinear(scale, self.of_matrix)
            scale = typed(scale, FLOAT, shape_of(self.scale))
        per_row = len(shape_of(self.scale)) == 1
        attributes = {"axis": 0} if per_row else {"axis": 1, "block_size": self.coding.block}
        y = op.DequantizeLinear(self.codes, scale, **attributes)
        y = typed(y, self.scale_dtype, shape_of(self.codes))
        if self.zero is not None and offsets:
            y = op.Reshape(y, [out, -1, min(self.coding.block, columns)])
            y = op.Reshape(op.Add(y, op.Unsqueeze(self.zero, [2])), self.shape)
        elif list(shape_of(self.codes)) != self.shape:
            y = op.Reshape(y, self.shape)
        return typed(y, self.scale_dtype, self.shape)

    def _from_blocks(self, op: Any) -> ir.Value:
        """Codes uint8 [out, ⌈in/b⌉, b], whose short last block is cut afterwards.

        They become a row per block: with a scale per row ONNX Runtime takes less than half of the
        time that it takes with `block_size`.
        """
        if self.coding.bits != 8:
            raise RuntimeError(f"{self.name}: codes of 4 bit in bytes cannot be dequantised")
        out, columns = self.shape
        blocks, block = shape_of(self.codes)[1:]
        # By a shape that is known at run time only: constant folding would copy the codes.
        size = dim(op, op.builder.root.graph.inputs[0], 0)
        rows = op.Reshape(self.codes, op.Mul(op.Div(size, size), [out * blocks, block]))
        rows = typed(rows, dtype_of(self.codes), [out * blocks, block])
        scale = op.Reshape(self.scale, [-1])
        if self.zero is not None:
            zero = op.Reshape(self.zero, [-1])
        else:
            zero = op.Expand(constant(op, np.full(1, 128, np.uint8), "zero_point"), op.Shape(scale))
        y = op.DequantizeLinear(rows, scale, zero, axis=0)
        y = op.Reshape(typed(y, self.scale_dtype, [out * blocks, block]), [out, -1])
        if columns % self.coding.block:
            y = op.Slice(y, [0], [columns], [1])
        return typed(y, self.scale_dtype, self.shape)


Matrix = Weight | QuantisedWeight
"""A matrix of a linear layer."""


def sizes(weight: Matrix) -> tuple[int, int]:
    """(out, in) of a matrix."""
    out, columns = weight.shape if isinstance(weight, QuantisedWeight) else shape_of(weight)
    return int(out), int(columns)
