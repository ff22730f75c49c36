"""Vision towers of the Qwen families: frames of any size as patches, merged in squares.

T frames of one size, L patches per frame, h hidden size, D head size, m² patches per visual token,
W windows of K slots, d hidden size of the language model.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnxscript import nn

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig, PatchTowerConfig
from trio_deploy.graphs.dialects.base import Angles, Dialect
from trio_deploy.graphs.modules import LayerNorm, Linear, RMSNorm, activation
from trio_deploy.graphs.rope import grid_angles
from trio_deploy.graphs.values import FLOAT, INT64, cast, dim, dtype_of, shape_of, typed
from trio_deploy.graphs.weight import Weight


@dataclass(frozen=True)
class Windows:
    """The windows of a frame.

    Attributes:
        index: int64 [W, K], patch in each slot, 0 where it is empty.
        used: bool [T·W, K], slots that are not empty.
        slot: int64 [L], the slot of each patch, window after window.
    """

    index: ir.Value
    used: ir.Value
    slot: ir.Value

    @classmethod
    def of(cls, op: Any, index: ir.Value, slot: ir.Value, frames: ir.Value) -> Windows:
        """Derive from window_index [W, K], -1 where a slot is empty, and window_slot [L]."""
        used = op.GreaterOrEqual(index, 0)
        shape = op.Concat(dim(op, frames, 0), op.Shape(index), axis=0)
        slots = int(shape_of(index)[1])
        used = op.Reshape(op.Expand(op.Unsqueeze(used, [0]), shape), [-1, slots])
        return cls(op.Max(index, 0), typed(used, ir.DataType.BOOL, [None, slots]), slot)

    def apart(self, op: Any, x: ir.Value) -> ir.Value:
        """Patches to windows: [T, L, h] → [T·W, K, h]."""
        slots, size = int(shape_of(self.used)[1]), int(shape_of(x)[2])
        gathered = op.Reshape(op.Gather(x, self.index, axis=1), [-1, slots, size])
        return typed(gathered, dtype_of(x), [None, slots, size])

    def together(self, op: Any, x: ir.Value, like: ir.Value) -> ir.Value:
        """Windows to patches: [T·W, K, h] → [T, L, h], the shape of `like`."""
        size = int(shape_of(x)[2])
        frames = op.Reshape(x, op.Concat(dim(op, like, 0), [-1, size], axis=0))
        return typed(op.Gather(frames, self.slot, axis=1), dtype_of(x), shape_of(like))


class PatchAttention(nn.Module):
    """Attention over a frame or within windows, rotated by a patch's row and column."""

    def __init__(self, d: Dialect, name: str, vision: PatchTowerConfig) -> None:
        super().__init__("attn")
        self.d, self.heads, self.size = d, vision.num_heads, vision.hidden_size
        self.qkv = Linear(d, f"{name}.qkv", 3 * self.size, self.size, bias=True)
        self.proj = Linear(d, f"{name}.proj", self.size, self.size, bias=True)

    def forward(
        self, op: Any, x: ir.Value, angles: Angles, windows: Windows | None = None
    ) -> ir.Value:
        """[T, L, h] → [T, L, h]."""
        d, heads = self.d, self.heads
        q, k, v = op.Split(self.qkv(op, x), [self.size] * 3, axis=-1, _outputs=3)
        q, k, v = (typed(each, d.dtype, shape_of(x)) for each in (q, k, v))
        q, k = (d.rope(op, each, angles, heads=heads) for each in (q, k))
        q, k = (typed(each, d.dtype, shape_of(x)) for each in (q, k))
        if windows is None:
            y = d.full_attention(op, q, k, v, heads, long=True)
        else:
            q, k, v = (windows.apart(op, each) for each in (q, k, v))
            y = windows.together(op, d.full_attention(op, q, k, v, heads, windows.used), x)
        return self.proj(op, y)


class PatchMLP(nn.Module):
    """Two linear layers with an activation in between, or three, one of them a gate."""

    def __init__(self, d: Dialect, name: str, vision: PatchTowerConfig) -> None:
        super().__init__("mlp")
        self.kind = vision.hidden_act
        names = {
            "fc": ("fc1", "fc2"),
            "linear_fc": ("linear_fc1", "linear_fc2"),
            "gated": ("up_proj", "down_proj"),
        }
        first, last = names[vision.mlp]
        size, inner = vision.hidden_size, vision.intermediate_size
        self.first = Linear(d, f"{name}.{first}", inner, size, bias=True)
        self.last = Linear(d, f"{name}.{last}", size, inner, bias=True)
        self.gate = None
        if vision.mlp == "gated":
            self.gate = Linear(d, f"{name}.gate_proj", inner, size, bias=True)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[T, L, h] → [T, L, h]."""
        inner = self.first(op, x)
        if self.gate is None:
            return self.last(op, activation(op, self.kind, inner))
        return self.last(op, op.Mul(activation(op, self.kind, self.gate(op, x)), inner))


def patch_norm(
    d: Dialect, name: str, vision: PatchTowerConfig, size: int | None = None
) -> LayerNorm | RMSNorm:
    """A norm of the tower's kind over `size` values, the hidden size by default."""
    kind = RMSNorm if vision.norm == "rms" else LayerNorm
    return kind(d, name, size or vision.hidden_size, vision.norm_eps)


class PatchLayer(nn.Module):
    """A pre-norm transformer layer."""

    def __init__(self, d: Dialect, vision: PatchTowerConfig, index: int) -> None:
        name = f"visual.blocks.{index}"
        super().__init__(name)
        self.norm1 = patch_norm(d, f"{name}.norm1", vision)
        self.attn = PatchAttention(d, f"{name}.attn", vision)
        self.norm2 = patch_norm(d, f"{name}.norm2", vision)
        self.mlp = PatchMLP(d, f"{name}.mlp", vision)

    def forward(self, op: Any, x: ir.Value, angles: Angles, windows: Windows | None) -> ir.Value:
        """[T, L, h] → [T, L, h]."""
        x = op.Add(x, self.attn(op, self.norm1(op, x), angles, windows))
        return op.Add(x, self.mlp(op, self.norm2(op, x)))


class PatchEmbeddings(nn.Module):
    """A linear layer over each patch; learned positions, resampled, if the tower has them."""

    def __init__(self, d: Dialect, vision: PatchTowerConfig) -> None:
        super().__init__("visual.patch_embed")
        self.d, self.vision = d, vision
        name, size, side = "visual.patch_embed.proj", vision.hidden_size, vision.patch_size
        shape = [size, vision.in_channels, vision.temporal_patch_size, side, side]
        self.weight = Weight(f"{name}.weight", shape, d.dtype)
        self.bias = Weight(f"{name}.bias", [size], d.dtype) if vision.patch_bias else None
        self.table = None
        if vision.position_side is not None:
            rows = vision.position_side**2
            self.table = Weight("visual.pos_embed.weight", [rows, size], d.dtype)

    def forward(self, op: Any, inputs: Mapping[str, ir.Value]) -> ir.Value:
        """pixel_values [T, L, c] → [T, L, h]."""
        d, size, pixels = self.d, self.vision.hidden_size, inputs["pixel_values"]
        flat = d.reshape_weight(op, self.weight, [size, self.vision.patch_values], pixels)
        x = d.matmul_transposed(op, pixels, flat)
        if self.bias is not None:
            x = op.Add(x, self.bias)
        if self.table is not None:
            x = op.Add(x, self._positions(op, inputs))
        return typed(x, d.dtype, ["T", "L", size])

    def _positions(self, op: Any, inputs: Mapping[str, ir.Value]) -> ir.Value:
        """Four entries of the table per patch, each times its weight: [L, h]."""
        terms = []
        for tap in range(4):
            index, weight = (
                op.Slice(inputs[name], [tap], [tap + 1], [1])
                for name in ("position_taps", "position_weights")
            )
            entry = op.Gather(self.table, op.Squeeze(index, [1]), axis=0)
            terms.append(op.Mul(cast(op, entry, FLOAT), weight))
        first, second, third, fourth = terms
        total = op.Add(op.Add(first, second), op.Add(third, fourth))
        return cast(op, total, self.d.dtype)


class Merger(nn.Module):
    """The m² patches of a square to one row of the language model: norm, fold, two linear layers.

    `fold_first` normalises over the whole square.
    """

    def __init__(
        self, d: Dialect, name: str, config: ModelConfig, *, fold_first: bool = False
    ) -> None:
        super().__init__(name)
        vision = config.patch_tower
        self.fold_first, self.inner = fold_first, vision.hidden_size * vision.merge**2
        norm, first, last = "norm", "linear_fc1", "linear_fc2"
        if vision.mlp != "linear_fc":
            norm, first, last = "ln_q", "mlp.0", "mlp.2"
        self.norm = patch_norm(
            d, f"{name}.{norm}", vision, self.inner if fold_first else vision.hidden_size
        )
        self.first = Linear(d, f"{name}.{first}", self.inner, self.inner, bias=True)
        self.last = Linear(d, f"{name}.{last}", config.text.hidden_size, self.inner, bias=True)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[T, L, h] → [T·L/m², d]."""
        if self.fold_first:
            x = self.norm(op, self._fold(op, x))
        else:
            x = self._fold(op, self.norm(op, x))
        return self.last(op, activation(op, "gelu", self.first(op, x)))

    def _fold(self, op: Any, x: ir.Value) -> ir.Value:
        """[T, L, h] → [T·L/m², m²·h]."""
        return typed(op.Reshape(x, [-1, self.inner]), dtype_of(x), [None, self.inner])


class PatchTower(nn.Module):
    """A transformer over patches, without a class token and without a final norm."""

    def __init__(self, d: Dialect, config: ModelConfig) -> None:
        super().__init__("visual")
        vision = config.patch_tower
        self.d, self.vision = d, vision
        self.embeddings = PatchEmbeddings(d, vision)
        self.layers = [PatchLayer(d, vision, i) for i in range(vision.num_layers)]
        self.mergers = [
            Merger(d, f"visual.deepstack_merger_list.{j}", config, fold_first=True)
            for j in range(config.deepstack)
        ]
        for module in (*self.layers, *self.mergers):
            setattr(self, str(module.name), module)  # modules in a list are not registered

    def inputs(self) -> dict[str, tuple[ir.DataType, list[int | str]]]:
        """Type and shape of each input by its name."""
        vision = self.vision
        given: dict[str, tuple[ir.DataType, list[int | str]]] = {
            "pixel_values": (self.d.dtype, ["T", "L", vision.patch_values]),
            "patch_position": (INT64, ["L", 2]),
        }
        if vision.window is not None:
            given["window_index"] = (INT64, ["W", vision.window_slots])
            given["window_slot"] = (INT64, ["L"])
        if vision.position_side is not None:
            given["position_taps"] = (INT64, ["L", 4])
            given["position_weights"] = (FLOAT, ["L", 4])
        return given

    def forward(
        self, op: Any, inputs: Mapping[str, ir.Value], scores: Collection[str]
    ) -> tuple[ir.Value, dict[str, ir.Value]]:
        """Encode to features [T, L, h]; and the merged output of each deepstack layer, [R, d].

        Raises:
            TrioError: scores are asked for, which only a class token gives.
        """
        if scores:
            raise TrioError(
                "the vision tower has no class token, whose attention cls-attention and vscan "
                "read: choose another method"
            )
        vision, pixels = self.vision, inputs["pixel_values"]
        head_dim = vision.hidden_size // vision.num_heads
        angles = grid_angles(op, self.d, head_dim, inputs["patch_position"], pixels)
        windows = None
        if vision.window is not None:
            windows = Windows.of(op, inputs["window_index"], inputs["window_slot"], pixels)
        x, found = self.embeddings(op, inputs), {}
        for i, layer in enumerate(self.layers):
            x = layer(op, x, angles, windows if vision.is_windowed(i) else None)
            if i in vision.deepstack_layers:
                j = vision.deepstack_layers.index(i)
                found[f"deepstack.{j}"] = self.mergers[j](op, x)
        return x, found
