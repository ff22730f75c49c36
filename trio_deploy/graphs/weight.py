"""A weight in a graph."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from trio_deploy.graphs.values import FLOAT_NAMES
from trio_deploy.quant.stored_weight import float_weight


class Weight(nn.Parameter):
    """Initializer of a float weight, without data: the exporter adds them.

    Attributes:
        stored: the weight and its one part, under whose name the initializer registers itself.
    """

    def __init__(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> None:
        self.stored = float_weight(name, shape, FLOAT_NAMES[dtype])
        super().__init__(shape, dtype=dtype, name=name)

    def _realize(self, builder: GraphBuilder) -> Weight:
        graph = builder.root.graph
        known = graph.initializers.get(self.stored.name)
        if known is None:
            if self._realized:
                raise RuntimeError(
                    f"{self.stored.name} belongs to another graph: build modules afresh"
                )
            graph.initializers[self.stored.name] = self
            self._realized = True
        elif known is not self:
            raise RuntimeError(f"{self.stored.name} is used by two modules of one graph: share one")
        return self

    def into(self, op: Any) -> Weight:
        """Register in the graph of `op`, for a use outside the module's own forward."""
        return self._realize(op.builder)
