"""Vision towers: pictures to features."""

from __future__ import annotations

from typing import Any

import onnx_ir as ir
from onnxscript import nn

from trio_deploy.families.base import VisionConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.modules import LayerNorm, Linear, Weight, activation
from trio_deploy.graphs.values import (
    FLOAT,
    cast,
    dtype_of,
    reduce,
    split_heads,
)


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

    def forward(self, op: Any, x: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        """[T, N, h] → [T, N, h]; appends to `seen` what the class token attends to, f32 [T, N]."""
        heads = self.vision.num_heads
        head_dim = self.vision.hidden_size // heads
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        if seen is not None:
            first = split_heads(op, op.Slice(q, [0], [1], [1]), heads, head_dim)  # [T, H, 1, D]
            keys = op.Transpose(split_heads(op, k, heads, head_dim), perm=[0, 1, 3, 2])
            scores = cast(op, op.MatMul(op.Mul(first, head_dim**-0.5), keys), FLOAT)
            weights = op.Softmax(scores, axis=-1)
            seen.append(reduce(op, "ReduceMean", weights, [1, 2], keepdims=False))
        return self.out_proj(op, self.d.full_attention(op, q, k, v, heads))


class ClipMLP(nn.Module):
    """Two linear layers with an activation between."""

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

    def forward(self, op: Any, x: ir.Value, seen: list[ir.Value] | None = None) -> ir.Value:
        """[T, N, h] → [T, N, h]; `seen` as in `ClipAttention`."""
        x = op.Add(x, self.self_attn(op, self.layer_norm1(op, x), seen))
        return op.Add(x, self.mlp(op, self.layer_norm2(op, x)))


class ClipEmbeddings(nn.Module):
    """Patches by convolution, class token in front, learned positions."""

    def __init__(self, d: Dialect, vision: VisionConfig) -> None:
        name = "vision_tower.embeddings"
        super().__init__(name)
        self.vision = vision
        size, patch = vision.hidden_size, vision.patch_size
        self.patches = Weight(f"{name}.patch_embedding.weight", [size, 3, patch, patch], d.dtype)
        self.class_token = Weight(f"{name}.class_embedding", [size], d.dtype)
        self.positions = Weight(
            f"{name}.position_embedding.weight", [vision.side**2 + 1, size], d.dtype
        )

    def forward(self, op: Any, pixels: ir.Value) -> ir.Value:
        """[T, 3, h, w] → [T, 1 + patches, size]."""
        size, patch = self.vision.hidden_size, self.vision.patch_size
        patches: ir.Value = self.patches
        dtype = dtype_of(pixels)
        if dtype == ir.DataType.BFLOAT16 and op.version < 22:  # Conv learned bfloat16 in 22
            pixels, patches = cast(op, pixels, FLOAT), cast(op, patches, FLOAT)
        x = op.Conv(pixels, patches, strides=[patch, patch], kernel_shape=[patch, patch])
        x = cast(op, x, dtype)
        x = op.Transpose(op.Reshape(x, [0, size, self.vision.side**2]), perm=[0, 2, 1])
        first = op.Expand(
            op.Reshape(self.class_token, [1, 1, size]),
            op.Concat(op.Shape(pixels, start=0, end=1), [1, size], axis=0),
        )
        return op.Add(op.Concat(first, x, axis=1), self.positions)
