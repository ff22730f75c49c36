"""Connectors: features of the tower to rows of the language model."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.modules import Linear, activation


class Projector(nn.Module):
    """Image features into the language model's space."""

    def __init__(self, d: Dialect, config: ModelConfig) -> None:
        name = "multi_modal_projector"
        super().__init__(name)
        self.kind = config.projector_act
        size, bias = config.text.hidden_size, config.projector_bias
        inner = config.vision.hidden_size * len(config.vision.feature_layers)
        self.linear_1 = Linear(d, f"{name}.linear_1", size, inner, bias)
        self.linear_2 = Linear(d, f"{name}.linear_2", size, size, bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., h·layers] → [..., d]."""
        return self.linear_2(op, activation(op, self.kind, self.linear_1(op, x)))
