"""CLIP's vision tower: images to features, and per-token scores of the encoder."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import nn

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig, PatchTowerConfig, VisionConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.modules import LayerNorm, Linear, activation
from trio_deploy.graphs.patch_tower import PatchTower
from trio_deploy.graphs.values import FLOAT, cast, constant, dtype_of, reduce, split_heads
from trio_deploy.graphs.weight import Weight
from trio_deploy.schedule.methods import WINDOW, shallow_layer


class ClipAttention(nn.Module):
    """Full attention without positions or cache."""

    def __init__(self, d: Dialect, name: str, vision: VisionConfig) -> None:
        super().__init__("self_attn")
        self.d, self.vision = d, vision
        size = vision.hidden_size
        self.q_proj = Linear(d, f"{name}.q_proj", size, size, bias=True)
        self.k_proj = Linear(d, f"{name}.k_proj", size, size, bias=True)
        self.v_proj = Linear(d, f"{name}.v_proj", size, size, bias=True)
        self.out_proj = Linear(d, f"{name}.out_proj", size, size, bias=True)

    def forward(
        self, op: Any, x: ir.Value, scores: bool = False
    ) -> tuple[ir.Value, ir.Value | None]:
        """Attend: [T, N, h] → [T, N, h].

        With `scores`, returns the class token's attention to each token, too, averaged over the
        heads, f32 [T, N].
        """
        heads = self.vision.num_heads
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        paid = self._of_class_token(op, q, k) if scores else None
        return self.out_proj(op, self.d.full_attention(op, q, k, v, heads)), paid

    def _of_class_token(self, op: Any, q: ir.Value, k: ir.Value) -> ir.Value:
        heads = self.vision.num_heads
        head_dim = self.vision.hidden_size // heads
        first = split_heads(op, op.Slice(q, [0], [1], [1]), heads, head_dim)  # [T, H, 1, D]
        keys = op.Transpose(split_heads(op, k, heads, head_dim), perm=[0, 1, 3, 2])
        scores = cast(op, op.MatMul(op.Mul(first, head_dim**-0.5), keys), FLOAT)
        return reduce(op, "ReduceMean", op.Softmax(scores, axis=-1), [1, 2], keepdims=False)


class ClipMLP(nn.Module):
    """Two linear layers with an activation in between."""

    def __init__(self, d: Dialect, name: str, vision: VisionConfig) -> None:
        super().__init__("mlp")
        self.kind = vision.hidden_act
        size, inner = vision.hidden_size, vision.intermediate_size
        self.fc1 = Linear(d, f"{name}.fc1", inner, size, bias=True)
        self.fc2 = Linear(d, f"{name}.fc2", size, inner, bias=True)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[T, N, h] → [T, N, h]."""
        return self.fc2(op, activation(op, self.kind, self.fc1(op, x)))


class ClipLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, d: Dialect, vision: VisionConfig, index: int) -> None:
        name = f"vision_tower.encoder.layers.{index}"
        super().__init__(name)
        size, eps = vision.hidden_size, vision.layer_norm_eps
        self.layer_norm1 = LayerNorm(d, f"{name}.layer_norm1", size, eps)
        self.self_attn = ClipAttention(d, f"{name}.self_attn", vision)
        self.layer_norm2 = LayerNorm(d, f"{name}.layer_norm2", size, eps)
        self.mlp = ClipMLP(d, f"{name}.mlp", vision)

    def forward(
        self, op: Any, x: ir.Value, scores: bool = False
    ) -> tuple[ir.Value, ir.Value | None]:
        """[T, N, h] → [T, N, h]; `scores` as in `ClipAttention`."""
        y, paid = self.self_attn(op, self.layer_norm1(op, x), scores)
        x = op.Add(x, y)
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x))), paid


class ClipEmbeddings(nn.Module):
    """Patches by convolution, a class token in front, learned positions."""

    def __init__(self, d: Dialect, vision: VisionConfig) -> None:
        name = "vision_tower.embeddings"
        super().__init__(name)
        self.vision = vision
        size, patch = vision.hidden_size, vision.patch_size
        self.class_token = Weight(f"{name}.class_embedding", [size], d.dtype)
        self.patches = Weight(f"{name}.patch_embedding.weight", [size, 3, patch, patch], d.dtype)
        self.positions = Weight(
            f"{name}.position_embedding.weight", [vision.side**2 + 1, size], d.dtype
        )

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        """[T, 3, h, w] → [T, 1 + patches, size]."""
        size, patch = self.vision.hidden_size, self.vision.patch_size
        patches: ir.Value = self.patches
        dtype = dtype_of(pixels)
        if dtype == ir.DataType.BFLOAT16 and op.version < 22:  # Conv takes bfloat16 from 22 on
            pixels, patches = cast(op, pixels, FLOAT), cast(op, patches, FLOAT)
        x = op.Conv(pixels, patches, strides=[patch, patch], kernel_shape=[patch, patch])
        x = cast(op, x, dtype)
        x = op.Transpose(op.Reshape(x, [0, size, self.vision.side**2]), perm=[0, 2, 1])
        first = op.Expand(
            op.Reshape(self.class_token, [1, 1, size]),
            op.Concat(op.Shape(pixels, start=0, end=1), [1, size], axis=0),
        )
        return op.Add(op.Concat(first, x, axis=1), self.positions)


def make_tower(d: Dialect, config: ModelConfig) -> ClipTower | PatchTower:
    """The vision tower of a model."""
    if isinstance(config.vision, PatchTowerConfig):
        return PatchTower(d, config)
    return ClipTower(d, config.vision)


class ClipTower(nn.Module):
    """CLIP's vision transformer up to the last layer whose output is read, without a final norm."""

    def __init__(self, d: Dialect, vision: VisionConfig) -> None:
        super().__init__("vision_tower")
        self.d, self.vision = d, vision
        norm = "vision_tower.pre_layrnorm"
        self.embeddings = ClipEmbeddings(d, vision)
        self.pre_norm = LayerNorm(d, norm, vision.hidden_size, vision.layer_norm_eps)
        self.layers = [ClipLayer(d, vision, i) for i in range(max(vision.feature_layers))]
        for layer in self.layers:
            setattr(self, str(layer.name), layer)  # modules in a list are not registered

    def inputs(self) -> dict[str, tuple[ir.DataType, list[int | str]]]:
        """Type and shape of each input by its name; T tiles."""
        side = self.vision.image_size
        return {"pixel_values": (self.d.dtype, ["T", 3, side, side])}

    def forward(
        self, op: Any, inputs: Mapping[str, ir.Value], scores: Collection[str]
    ) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Encode to features [T, p, h·layers]; and each of `scores`, f32 [T, p].

        * `prior`: the class token's attention to each token, averaged over the heads, in the last
          layer built;
        * `prior_local`: an order window by window, greatest first (VScan, arXiv 2505.22654). The
          tile is cut into windows of 6 x 6 patches; with r the rank of a patch within its window by
          the class token's attention a in a shallow layer, the score is 36 - r + 0.999 a / max a.
          The class token itself, if it is among the features, has 36.

        Raises:
            TrioError: scores are asked for, but the features come before the first layer.
        """
        vision, last = self.vision, len(self.layers) - 1
        if scores and last < 0:
            raise TrioError(
                "the model takes image features from before the encoder's first layer, so there "
                "is no attention of a class token: choose another method than cls-attention and "
                "vscan"
            )
        layer_of = {"prior": last, "prior_local": min(shallow_layer(vision.num_layers), last)}
        scored = {layer_of[name] for name in scores}
        hidden, attention = [self.pre_norm(op, self.embeddings(op, inputs["pixel_values"]))], {}
        for i, layer in enumerate(self.layers):
            x, attention[i] = layer(op, hidden[-1], i in scored)
            hidden.append(x)
        chosen = [hidden[i] for i in vision.feature_layers]
        features = chosen[0] if len(chosen) == 1 else op.Concat(*chosen, axis=-1)
        found = {}
        for name in scores:
            a = attention[layer_of[name]]  # [T, 1 + patches]
            found[name] = self._drop_class(op, self._local(op, a) if name == "prior_local" else a)
        return self._drop_class(op, features), found

    def _drop_class(self, op: Any, x: ir.Value) -> ir.Value:
        """Drop the class token's row of x [T, 1 + patches, ...], unless it is a feature."""
        return self._patches(op, x) if self.vision.drop_cls else x

    def _patches(self, op: Any, x: ir.Value) -> ir.Value:
        return op.Slice(x, [1], [self.vision.side**2 + 1], [1])

    def _local(self, op: Any, a: ir.Value) -> ir.Value:
        local = _window_order(op, self.vision, self._patches(op, a))
        own = op.Mul(op.Slice(a, [0], [1], [1]), 0.0)
        return op.Concat(op.Add(own, float(WINDOW**2)), local, axis=1)


def _window_order(op: Any, vision: VisionConfig, attention: ir.Value) -> ir.Value:
    """Compute `prior_local` of the patches from the attention to them, f32 [T, patches]."""
    side, area = vision.side, WINDOW**2
    across = -(-side // WINDOW)
    grid = op.Reshape(attention, [-1, side, side])
    if missing := across * WINDOW - side:  # windows at the far edges are smaller
        grid = op.Pad(grid, [0, 0, 0, 0, missing, missing], -1.0)
    windows = op.Transpose(
        op.Reshape(grid, [-1, across, WINDOW, across, WINDOW]), perm=[0, 1, 3, 2, 4]
    )
    windows = op.Reshape(windows, [-1, across * across, area])
    own, other = op.Unsqueeze(windows, [3]), op.Unsqueeze(windows, [2])
    before = constant(op, np.tril(np.ones((1, 1, area, area), np.bool_), -1), "window")
    ahead = op.Or(op.Greater(other, own), op.And(op.Equal(other, own), before))
    rank = reduce(op, "ReduceSum", op.Cast(ahead, to=FLOAT), [3], keepdims=False)
    maximum = op.Unsqueeze(reduce(op, "ReduceMax", attention, [1]), [2])
    order = op.Add(op.Sub(float(area), rank), op.Mul(op.Div(windows, maximum), 0.999))
    order = op.Reshape(order, [-1, across, across, WINDOW, WINDOW])
    order = op.Reshape(
        op.Transpose(order, perm=[0, 1, 3, 2, 4]), [-1, across * WINDOW, across * WINDOW]
    )
    return op.Reshape(op.Slice(order, [0, 0], [side, side], [1, 2]), [-1, side * side])
