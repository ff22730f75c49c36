"""Connectors: features of the vision tower to rows of the language model."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from trio_deploy.families.base import ModelConfig, PatchTowerConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.modules import Linear, activation
from trio_deploy.graphs.patch_tower import Merger
from trio_deploy.graphs.values import cast, constant
from trio_deploy.graphs.weight import Weight


def make_connector(d: Dialect, config: ModelConfig) -> Projector | Merger:
    """What turns features of a model's tower into rows of its language model."""
    if isinstance(config.vision, PatchTowerConfig):
        return Merger(d, "visual.merger", config)
    return Projector(d, config)


class Projector(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, d: Dialect, config: ModelConfig) -> None:
        name = "multi_modal_projector"
        super().__init__(name)
        self.kind = config.projector_act
        size, bias = config.text.hidden_size, config.projector_bias
        inner = config.clip.hidden_size * len(config.clip.feature_layers)
        self.linear_1 = Linear(d, f"{name}.linear_1", size, inner, bias)
        self.linear_2 = Linear(d, f"{name}.linear_2", size, size, bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., h·layers] → [..., d]."""
        return self.linear_2(op, activation(op, self.kind, self.linear_1(op, x)))


class Newline(nn.Module):
    """The learned embedding behind each row of patches; zeros if the family has none."""

    def __init__(self, d: Dialect, config: ModelConfig) -> None:
        super().__init__("newline")
        self.d, self.size = d, config.text.hidden_size
        self.row = Weight("image_newline", [self.size], d.dtype) if config.newline else None

    def forward(self, op: Any) -> ir.Value:
        """The row, [1, d]."""
        if self.row is not None:
            return op.Reshape(self.row, [1, self.size])
        zero = constant(op, np.zeros(1, np.float32), "zero")
        return op.Expand(cast(op, zero, self.d.dtype), [1, self.size])
