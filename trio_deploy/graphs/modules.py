"""Building blocks of every stage, in three dialects.

The blocks are `onnxscript.nn` modules that read like the PyTorch code. Three things differ from
plain onnxscript.nn, because its ways of going wrong are silent:

* A `Weight` carries its canonical name from the start and registers itself under exactly that
  name, whichever module calls it and however deep. Using a module in a second graph, or two
  modules for one name in one graph, raises.
* `Linear` computes `x @ W.T` and, in `backward`, `x @ W` from one un-transposed initializer.
* Operators without an ONNX schema get their output types here, since later constants take their
  type from their neighbours.

A `Dialect` travels with every module. Shapes in docstrings: B rows, S tokens, d hidden size,
H query heads, G key/value heads, D head size, C capacity of the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from trio_deploy.errors import TrioError
from trio_deploy.families.base import RopeConfig, TextConfig
from trio_deploy.graphs.dialects.base import KV, Angles, Dialect, Window
from trio_deploy.graphs.values import (
    FLOAT,
    cast,
    constant,
)

# --------------------------------------------------------------------------------------------
# Modules with weights


class Weight(nn.Parameter):
    """A checkpoint tensor under its canonical name; its data come later, from the exporter."""

    def __init__(self, name: str, shape: Sequence[int], dtype: ir.DataType) -> None:
        super().__init__(shape, dtype=dtype, name=name)
        self.canonical, self.dims = name, tuple(shape)

    def _realize(self, builder: GraphBuilder) -> Weight:
        graph = builder.root.graph
        known = graph.initializers.get(self.canonical)
        if known is None:
            if self._realized:
                raise RuntimeError(
                    f"{self.canonical} belongs to another graph: build modules afresh"
                )
            graph.initializers[self.canonical] = self
            self._realized = True
        elif known is not self:
            raise RuntimeError(f"{self.canonical} is used by two modules of one graph: share one")
        return self

    def into(self, op: Any) -> Weight:
        """Register in the graph of `op`, for a use outside the module's own forward."""
        return self._realize(op.builder)


class Linear(nn.Module):
    """y = x Wᵀ + b with W [out, in] as the checkpoint has it."""

    def __init__(
        self, d: Dialect, name: str, out_features: int, in_features: int, bias: bool = False
    ) -> None:
        super().__init__(name.rpartition(".")[2])
        self.d = d
        self.weight = Weight(f"{name}.weight", [out_features, in_features], d.dtype)
        self.bias = Weight(f"{name}.bias", [out_features], d.dtype) if bias else None

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., in] → [..., out]."""
        return self.d.linear(op, x, self.weight, self.bias)

    def backward(self, op: Any, g: ir.Value) -> ir.Value:
        """The gradient before the product from that behind it: [..., out] → [..., in]."""
        return self.d.linear_transposed(op, g, self.weight.into(op))

    def few_rows(self, op: Any, x: ir.Value) -> ir.Value:
        """`forward` for x [B, P, in] with few rows P."""
        bias = None if self.bias is None else self.bias.into(op)
        return self.d.linear_few_rows(op, x, self.weight.into(op), bias)

    def backward_few_rows(self, op: Any, g: ir.Value) -> ir.Value:
        """`backward` for g [B, P, out] with few rows P."""
        return self.d.linear_transposed_few_rows(op, g, self.weight.into(op))


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · w, computed in fp32."""

    def __init__(self, d: Dialect, name: str, size: int, eps: float) -> None:
        super().__init__(name.rpartition(".")[2])
        self.d, self.eps = d, eps
        self.weight = Weight(f"{name}.weight", [size], d.dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., size] → [..., size]."""
        return self.d.rms_norm(op, x, self.weight, self.eps)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with weight and bias, computed in fp32."""

    def __init__(self, d: Dialect, name: str, size: int, eps: float) -> None:
        super().__init__(name.rpartition(".")[2])
        self.eps = eps
        self.weight = Weight(f"{name}.weight", [size], d.dtype)
        self.bias = Weight(f"{name}.bias", [size], d.dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., size] → [..., size]."""
        return op.LayerNormalization(x, self.weight, self.bias, axis=-1, epsilon=self.eps)


class Embedding(nn.Module):
    """A table [rows, size]."""

    def __init__(self, d: Dialect, name: str, rows: int, size: int) -> None:
        super().__init__(name.rpartition(".")[2])
        self.weight = Weight(f"{name}.weight", [rows, size], d.dtype)

    def forward(self, op: Any, index: ir.Value) -> ir.Value:
        """int64 [...] → [..., size]."""
        return op.Gather(self.weight, index, axis=0)


def activation(op: Any, kind: str, x: ir.Value) -> ir.Value:
    """`silu`, `quick_gelu`, `gelu` (erf) or `gelu_pytorch_tanh` / `gelu_new`.

    Raises:
        TrioError: any other activation.
    """
    if kind in ("silu", "swish"):
        return op.Mul(x, op.Sigmoid(x))
    if kind == "quick_gelu":
        return op.Mul(x, op.Sigmoid(op.Mul(x, 1.702)))
    if kind in ("gelu", "gelu_python"):
        half = op.Mul(x, 0.5)
        return op.Mul(half, op.Add(op.Erf(op.Mul(x, math.sqrt(0.5))), 1.0))
    if kind in ("gelu_pytorch_tanh", "gelu_new", "gelu_fast"):
        cubic = op.Add(x, op.Mul(op.Mul(op.Mul(x, x), x), 0.044715))
        tanh = op.Tanh(op.Mul(cubic, math.sqrt(2.0 / math.pi)))
        return op.Mul(op.Mul(x, 0.5), op.Add(tanh, 1.0))
    raise TrioError(f"The activation {kind!r} is not supported; use silu, quick_gelu or gelu.")


# --------------------------------------------------------------------------------------------
# Rotary position embedding


def inverse_frequencies(rope: RopeConfig, head_dim: int) -> np.ndarray:
    """float32 [D/2], as transformers' `ROPE_INIT_FUNCTIONS` computes them.

    Raises:
        TrioError: a scaling other than `default`, `linear` and `llama3`.
    """
    exponent = np.arange(0, head_dim, 2).astype(np.float32) / np.float32(head_dim)
    # Powers rounded to fp32 but once, as torch's are: numpy's fp32 power is off by a last digit for
    # a tenth of them, and 2900 positions on an angle is off by 2e-4.
    powers = np.power(np.float64(rope.theta), exponent.astype(np.float64)).astype(np.float32)
    inverse = np.float32(1.0) / powers
    if rope.scaling == "default":
        return inverse
    if rope.scaling == "linear":
        return inverse / np.float32(rope.factor)
    if rope.scaling == "llama3":
        wavelength = 2.0 * np.pi / inverse
        low = rope.original_max_positions / rope.low_freq_factor
        high = rope.original_max_positions / rope.high_freq_factor
        smooth = (rope.original_max_positions / wavelength - rope.low_freq_factor) / (
            rope.high_freq_factor - rope.low_freq_factor
        )
        blend = (1 - smooth) * inverse / rope.factor + smooth * inverse
        scaled = np.where(wavelength > low, inverse / rope.factor, inverse)
        scaled = np.where((wavelength >= high) & (wavelength <= low), blend, scaled)
        return scaled.astype(np.float32)
    raise TrioError(f"The rotary scaling {rope.scaling!r} is not supported.")


def rotary_angles(
    op: Any, d: Dialect, text: TextConfig, positions: ir.Value, dtype: ir.DataType | None = None
) -> Angles:
    """Angles of int64 positions [B, S]: computed in fp32, handed over in `dtype` (the graph's)."""
    frequency = constant(op, inverse_frequencies(text.rope, text.head_dim), "inv_freq")
    angle = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=FLOAT), frequency)
    dtype = dtype or d.dtype
    return Angles(cast(op, op.Cos(angle), dtype), cast(op, op.Sin(angle), dtype))


# --------------------------------------------------------------------------------------------
# Layers of the language model


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and a KV cache."""

    def __init__(self, d: Dialect, name: str, text: TextConfig) -> None:
        super().__init__(name.rpartition(".")[2])
        self.d, self.text = d, text
        size, inner = text.hidden_size, text.num_heads * text.head_dim
        kv, bias = text.num_kv_heads * text.head_dim, text.attention_bias
        self.q_proj = Linear(d, f"{name}.q_proj", inner, size, bias)
        self.k_proj = Linear(d, f"{name}.k_proj", kv, size, bias)
        self.v_proj = Linear(d, f"{name}.v_proj", kv, size, bias)
        self.o_proj = Linear(d, f"{name}.o_proj", size, inner, bias)

    def forward(self, op: Any, x: ir.Value, window: Window, past: KV | None) -> tuple[ir.Value, KV]:
        """x [B, S, d] → ([B, S, d], present keys and values)."""
        q, k, v = self.q_proj(op, x), self.k_proj(op, x), self.v_proj(op, x)
        y, present = self.d.attention(op, self.text, q, k, v, window, past)
        return self.o_proj(op, y), present


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ∘ up x)."""

    def __init__(self, d: Dialect, name: str, text: TextConfig) -> None:
        super().__init__(name.rpartition(".")[2])
        size, inner, bias = text.hidden_size, text.intermediate_size, text.mlp_bias
        self.gate_proj = Linear(d, f"{name}.gate_proj", inner, size, bias)
        self.up_proj = Linear(d, f"{name}.up_proj", inner, size, bias)
        self.down_proj = Linear(d, f"{name}.down_proj", size, inner, bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., d] → [..., d]."""
        gate = activation(op, "silu", self.gate_proj(op, x))
        return self.down_proj(op, op.Mul(gate, self.up_proj(op, x)))


class DecoderLayer(nn.Module):
    """One layer of the language model, index counted over the whole model."""

    def __init__(self, d: Dialect, text: TextConfig, index: int) -> None:
        name = f"language_model.layers.{index}"
        super().__init__(name)
        eps = text.rms_norm_eps
        self.input_layernorm = RMSNorm(d, f"{name}.input_layernorm", text.hidden_size, eps)
        self.self_attn = Attention(d, f"{name}.self_attn", text)
        self.post_attention_layernorm = RMSNorm(
            d, f"{name}.post_attention_layernorm", text.hidden_size, eps
        )
        self.mlp = MLP(d, f"{name}.mlp", text)

    def forward(self, op: Any, x: ir.Value, window: Window, past: KV | None) -> tuple[ir.Value, KV]:
        """x [B, S, d] → ([B, S, d], present keys and values)."""
        y, present = self.self_attn(op, self.input_layernorm(op, x), window, past)
        x = op.Add(x, y)
        return op.Add(x, self.mlp(op, self.post_attention_layernorm(op, x))), present


class Head(nn.Module):
    """Final norm and vocabulary projection.

    A model with tied embeddings has no lm_head.weight: pass its embedding table where the same
    graph uses it already.
    """

    def __init__(self, d: Dialect, text: TextConfig, table: Embedding | None = None) -> None:
        super().__init__("head")
        self.norm = RMSNorm(d, "language_model.norm", text.hidden_size, text.rms_norm_eps)
        name = "language_model.embed_tokens" if text.tie_word_embeddings else "lm_head"
        self.lm_head = Linear(d, name, text.vocab_size, text.hidden_size)
        if table is not None and text.tie_word_embeddings:
            self.lm_head.weight = table.weight

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., d] → logits [..., V] in the graph's float type."""
        return self.lm_head(op, self.norm(op, x))
