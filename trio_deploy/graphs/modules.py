"""Building blocks of every stage, in three dialects.

The blocks are `onnxscript.nn` modules that read like the PyTorch code. Three things differ from
plain onnxscript.nn, because its ways of going wrong are silent:

* A `Weight` carries its canonical name from the start and registers itself under exactly that
  name, whichever module calls it and however deep. Using a module in a second graph, or two
  modules for one name in one graph, raises.
* `Linear` computes `x @ W.T` and, with `transpose=True`, `x @ W` (the backward pass) from one
  un-transposed initializer.
* Operators without an ONNX schema get their output types here, since later constants take their
  type from their neighbours.

A `Dialect` travels with every module. Shapes in docstrings: B rows, S tokens, d hidden size,
H query heads, G key/value heads, D head size, C capacity of the KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir
from onnxscript import GraphBuilder, nn

from trio_deploy.errors import TrioError
from trio_deploy.families.base import RopeConfig, TextConfig
from trio_deploy.graphs.dialects.base import FLOAT, INT32, Dialect
from trio_deploy.graphs.values import cast, constant, dim, dtype_of, reduce, shape_of, typed

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

    def forward(self, op: Any, x: ir.Value, transpose: bool = False) -> ir.Value:
        """[…, in] → […, out]; with `transpose`, [..., out] → [..., in] without the bias."""
        if transpose:
            if self.d.name == "primitive" and self.weight.dims[0] == self.weight.dims[1]:
                return _left_multiply(op, self.weight, x)
            return op.MatMul(x, self.weight)
        return linear(op, self.d, x, self.weight, self.bias)


def _left_multiply(op: Any, weight: ir.Value, x: ir.Value) -> ir.Value:
    """x W as (Wᵀ xᵀ)ᵀ, for a square W and x of rank 2 or more.

    OpenVINO 2026.4 packs a constant on the right of a product, and where one graph has both x W
    and x Wᵀ for a square W it takes the one packing for the other: wrong numbers, no message.
    """
    rank = len(shape_of(x))
    perm = [*range(rank - 2), rank - 1, rank - 2]
    left = op.Transpose(weight, perm=[1, 0])
    return op.Transpose(op.MatMul(left, op.Transpose(x, perm=perm)), perm=perm)


def linear(
    op: Any, d: Dialect, x: ir.Value, weight: Weight, bias: Weight | None = None
) -> ir.Value:
    """x Wᵀ (+ b) for a registered W [out, in], the way that copies no weight in its dialect."""
    out, inner = weight.dims
    lead = shape_of(x)[:-1]
    if d.name == "ort":
        y = op.FusedMatMul(x, weight, transB=1, _domain="com.microsoft", _version=1)
        typed(y, dtype_of(x), [*lead, out])
    elif d.name == "onnx":
        flat = x if len(lead) == 1 else op.Reshape(x, [-1, inner])
        y = op.Gemm(flat, weight, bias, transB=1) if bias else op.Gemm(flat, weight, transB=1)
        if len(lead) == 1:
            return y
        y = op.Reshape(y, op.Concat(op.Shape(x, end=-1), [out], axis=0))
        return typed(y, dtype_of(x), [*lead, out])
    else:
        y = op.MatMul(x, op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else op.Add(y, bias)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · w, computed in fp32."""

    def __init__(self, d: Dialect, name: str, size: int, eps: float) -> None:
        super().__init__(name.rpartition(".")[2])
        self.d, self.eps = d, eps
        self.weight = Weight(f"{name}.weight", [size], d.dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[…, size] → […, size]."""
        if self.d.name != "primitive":
            return op.RMSNormalization(x, self.weight, axis=-1, epsilon=self.eps)
        wide = cast(op, x, FLOAT)
        mean = reduce(op, "ReduceMean", op.Pow(wide, 2.0), [-1])
        unit = op.Mul(wide, op.Div(1.0, op.Sqrt(op.Add(mean, self.eps))))
        return op.Mul(cast(op, unit, dtype_of(x)), self.weight)


class LayerNorm(nn.Module):
    """Layer normalisation over the last axis, with weight and bias, computed in fp32."""

    def __init__(self, d: Dialect, name: str, size: int, eps: float) -> None:
        super().__init__(name.rpartition(".")[2])
        self.eps = eps
        self.weight = Weight(f"{name}.weight", [size], d.dtype)
        self.bias = Weight(f"{name}.bias", [size], d.dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[…, size] → […, size]."""
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


class Angles(NamedTuple):
    """cos and sin of the rotary angles, [B, S, D/2]."""

    cos: ir.Value
    sin: ir.Value


def rotary_angles(
    op: Any, d: Dialect, text: TextConfig, positions: ir.Value, dtype: ir.DataType | None = None
) -> Angles:
    """Angles of int64 positions [B, S]: computed in fp32, handed over in `dtype` (the graph's)."""
    frequency = constant(op, inverse_frequencies(text.rope, text.head_dim), "inv_freq")
    angle = op.Mul(op.Cast(op.Unsqueeze(positions, [-1]), to=FLOAT), frequency)
    dtype = dtype or d.dtype
    return Angles(cast(op, op.Cos(angle), dtype), cast(op, op.Sin(angle), dtype))


def apply_rope(
    op: Any,
    d: Dialect,
    x: ir.Value,
    angles: Angles,
    *,
    heads: int | None = None,
    inverse: bool = False,
) -> ir.Value:
    """Rotate x [B, N, S, D], or [B, S, N·D] where `heads` = N; `inverse` turns it back.

    The angles must have the type of x.
    """
    cos, sin = angles.cos, op.Neg(angles.sin) if inverse else angles.sin
    if d.name != "primitive":
        attributes = {} if heads is None else {"num_heads": heads}
        return op.RotaryEmbedding(x, cos, sin, **attributes)
    if heads is not None:
        flat = shape_of(x)[-1]
        x = op.Transpose(op.Reshape(x, [0, 0, heads, flat // heads]), perm=[0, 2, 1, 3])
        return merge_heads(op, apply_rope(op, d, x, angles, inverse=inverse))
    half = int(shape_of(x)[-1]) // 2
    cos, sin = op.Unsqueeze(cos, [1]), op.Unsqueeze(sin, [1])
    # the order of operands in which OpenVINO knows a rotation
    first, second = op.Split(x, [half, half], axis=-1, _outputs=2)
    first, second = (
        op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
        op.Add(op.Mul(second, cos), op.Mul(first, sin)),
    )
    return op.Concat(first, second, axis=-1)


def split_heads(op: Any, x: ir.Value, heads: int, head_dim: int) -> ir.Value:
    """[B, S, N·D] → [B, N, S, D]."""
    return op.Transpose(op.Reshape(x, [0, 0, heads, head_dim]), perm=[0, 2, 1, 3])


def merge_heads(op: Any, x: ir.Value) -> ir.Value:
    """[B, N, S, D] → [B, S, N·D]."""
    _, heads, _, head_dim = shape_of(x)
    return op.Reshape(op.Transpose(x, perm=[0, 2, 1, 3]), [0, 0, int(heads) * int(head_dim)])


def repeat_heads(op: Any, x: ir.Value, times: int) -> ir.Value:
    """[B, G, S, D] → [B, G·times, S, D], each head `times` times in a row."""
    if times == 1:
        return x
    batch, heads, length, head_dim = shape_of(x)
    wide = op.Expand(op.Unsqueeze(x, [2]), [1, 1, times, 1, 1])
    y = op.Reshape(wide, op.Concat(dim(op, x, 0), [int(heads) * times, -1, int(head_dim)], axis=0))
    return typed(y, dtype_of(x), [batch, int(heads) * times, length, head_dim])


# --------------------------------------------------------------------------------------------
# Attention over a KV cache


class KV(NamedTuple):
    """Keys and values of one layer, [B, G, C, D] each."""

    key: ir.Value
    value: ir.Value


@dataclass(frozen=True)
class Window:
    """What the layers of one segment share: angles, and where the new tokens stand in the cache.

    Which fields are set depends on the dialect:
        seqlens, total: int32 [B] and scalar, for GroupQueryAttention.
        past_lengths: int64 [B], tokens valid before this step.
        written, filler, mask: for `primitive`, with P = max(C, S): bool [B, 1, P, 1], the slots
            that take new tokens; 1 in prefill, 0 in decode, int64 [1]; additive fp32 [B, 1, S, P].
            In decode.onnx of the `onnx` dialect: mask, bool [B, 1, 1, C], the slots that are valid.
    """

    angles: Angles
    seqlens: ir.Value | None = None
    total: ir.Value | None = None
    past_lengths: ir.Value | None = None
    written: ir.Value | None = None
    filler: ir.Value | None = None
    mask: ir.Value | None = None


def cache_window(
    op: Any,
    d: Dialect,
    text: TextConfig,
    x: ir.Value,
    positions: ir.Value,
    lengths: ir.Value | None = None,
    past_lengths: ir.Value | None = None,
    past: KV | None = None,
) -> Window:
    """The window of a segment over S new tokens x [B, S, d].

    Prefill: C = 0, past_lengths = 0, lengths = valid new tokens. Decode: S = 1, lengths = 1,
    past_lengths = tokens valid before. One set of formulas serves both; prefill graphs beside a
    decode.onnx pass neither `past_lengths` nor `past`.
    """
    angles = rotary_angles(op, d, text, positions)
    if d.name == "onnx":
        if past_lengths is None or past is None:
            return Window(angles)
        slots = op.Range(0, op.Squeeze(dim(op, past.key, 2), [0]), 1)
        seen = op.LessOrEqual(op.Unsqueeze(slots, [0]), op.Unsqueeze(past_lengths, [1]))
        return Window(angles, past_lengths=past_lengths, mask=op.Unsqueeze(seen, [1, 2]))
    new = dim(op, x, 1)
    if d.name == "ort":
        if lengths is None:
            lengths = constant(op, np.ones(1, np.int64), "one")
        seqlens = op.Cast(op.Sub(op.Add(past_lengths, lengths), 1), to=INT32)
        # Prefill: S, which tells the kernel that this is a first prompt. Decode: max past + 1.
        total = op.Add(op.ReduceMax(past_lengths, keepdims=1), new)
        total = op.Cast(op.Squeeze(total, [0]), to=INT32)
        return Window(angles, seqlens=seqlens, total=total)
    if past_lengths is None or past is None:
        assert lengths is not None
        rows = op.Range(0, op.Squeeze(new, [0]), 1)
        ends = op.Unsqueeze(op.Sub(lengths, 1), [1, 2])
        last = op.Min(op.Unsqueeze(rows, [0, 2]), ends)  # see below
        mask = _blind(op, op.Greater(op.Unsqueeze(rows, [0, 1]), last))
        return Window(angles, mask=mask)
    capacity = dim(op, past.key, 2)
    fresh = op.Greater(new, capacity)  # prefill
    slots = op.Range(0, op.Squeeze(op.Max(capacity, new), [0]), 1)
    rows = op.Range(0, op.Squeeze(new, [0]), 1)
    start = op.Unsqueeze(past_lengths, [1, 2])
    # [B, S, 1]: a query sees slots up to its own, one that pads up to its row's last valid token
    # (nobody reads it; but an input that nothing uses is dropped by OpenVINO).
    last = op.Add(start, op.Unsqueeze(rows, [0, 2]))
    if lengths is not None:
        last = op.Min(last, op.Add(start, op.Unsqueeze(op.Sub(lengths, 1), [1, 2])))
    mask = _blind(op, op.Greater(op.Unsqueeze(slots, [0, 1]), last))
    written = op.Equal(op.Unsqueeze(slots, [0]), op.Unsqueeze(past_lengths, [1]))
    written = op.Unsqueeze(op.Or(written, fresh), [1, 3])
    # By arithmetic: TensorRT computes no sizes with comparisons.
    filler = op.Min(op.Max(op.Sub(new, capacity), 0), 1)
    return Window(angles, past_lengths=past_lengths, written=written, filler=filler, mask=mask)


def _blind(op: Any, hidden: ir.Value) -> ir.Value:
    """The additive mask f32 [B, 1, S, P] that hides the slots where bool [B, S, P] holds."""
    return op.Unsqueeze(op.Where(hidden, -1e30, 0.0), [1])


def plain_attention(
    op: Any, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> ir.Value:
    """softmax(q kᵀ · scale + mask) v over [B, N, S, D]: the pattern that OpenVINO fuses.

    The softmax is computed in fp32; a mask is fp32 and additive.
    """
    dtype = dtype_of(q)
    scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 1, 3, 2]))
    scores = cast(op, scores, FLOAT)
    if mask is not None:
        scores = op.Add(scores, mask)
    return op.MatMul(cast(op, op.Softmax(scores, axis=-1), dtype), v)


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
        if self.d.name == "ort":
            y, present = self._grouped(op, q, k, v, window, past)
        else:
            text = self.text
            q = apply_rope(
                op, self.d, split_heads(op, q, text.num_heads, text.head_dim), window.angles
            )
            k = split_heads(op, k, text.num_kv_heads, text.head_dim)
            k = apply_rope(op, self.d, k, window.angles)
            v = split_heads(op, v, text.num_kv_heads, text.head_dim)
            if self.d.name == "onnx":
                y, present = self._standard(op, q, k, v, window, past)
            else:
                y, present = self._primitive(op, q, k, v, window, past)
        return self.o_proj(op, y), present

    def _grouped(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, window: Window, past: KV | None
    ) -> tuple[ir.Value, KV]:
        text, angles = self.text, window.angles
        assert past is not None
        q = apply_rope(op, self.d, q, angles, heads=text.num_heads)
        k = apply_rope(op, self.d, k, angles, heads=text.num_kv_heads)
        y, key, value = op.GroupQueryAttention(
            q, k, v, past.key, past.value, window.seqlens, window.total,
            num_heads=text.num_heads, kv_num_heads=text.num_kv_heads, do_rotary=0,
            scale=text.head_dim**-0.5, _domain="com.microsoft", _version=1, _outputs=3,
        )  # fmt: skip
        typed(y, self.d.dtype, shape_of(q))
        shape = [shape_of(q)[0], text.num_kv_heads, None, text.head_dim]
        return y, KV(typed(key, self.d.dtype, shape), typed(value, self.d.dtype, shape))

    def _standard(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, window: Window, past: KV | None
    ) -> tuple[ir.Value, KV]:
        scale = self.text.head_dim**-0.5
        if past is None:
            # Causality hides padding on the right; nonpad_kv_seqlen would spoil short rows.
            y = op.Attention(q, k, v, is_causal=1, scale=scale)
            return merge_heads(op, typed(y, self.d.dtype, shape_of(q))), KV(k, v)
        present = KV(
            op.TensorScatter(past.key, k, window.past_lengths, axis=-2),
            op.TensorScatter(past.value, v, window.past_lengths, axis=-2),
        )
        # TensorRT's parser takes no nonpad_kv_seqlen.
        y = op.Attention(q, present.key, present.value, window.mask, scale=scale)
        return merge_heads(op, typed(y, self.d.dtype, shape_of(q))), present

    def _primitive(
        self, op: Any, q: ir.Value, k: ir.Value, v: ir.Value, window: Window, past: KV | None
    ) -> tuple[ir.Value, KV]:
        present = KV(k, v)
        if past is not None:
            present = KV(
                self._update(op, past.key, k, window), self._update(op, past.value, v, window)
            )
        times = self.text.num_heads // self.text.num_kv_heads
        keys = repeat_heads(op, present.key, times)
        values = repeat_heads(op, present.value, times)
        y = plain_attention(op, q, keys, values, window.mask, self.text.head_dim**-0.5)
        return merge_heads(op, typed(y, self.d.dtype, shape_of(q))), present

    def _update(self, op: Any, past: ir.Value, new: ir.Value, window: Window) -> ir.Value:
        """[B, G, C, D] and [B, G, S, D] → [B, G, max(C, S), D].

        Prefill (C = 0): every slot takes its new token; `old` is a filler of one slot that is
        broadcast and never taken. Decode (S = 1): `old` is the past, and the one new token is
        broadcast to the slot it takes.
        """
        old = op.Concat(past, op.Slice(new, [0], window.filler, [2]), axis=2)
        batch, heads, _, head_dim = shape_of(new)
        shape = [batch, heads, None, head_dim]
        return typed(op.Where(window.written, new, old), self.d.dtype, shape)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ∘ up x)."""

    def __init__(self, d: Dialect, name: str, text: TextConfig) -> None:
        super().__init__(name.rpartition(".")[2])
        size, inner, bias = text.hidden_size, text.intermediate_size, text.mlp_bias
        self.gate_proj = Linear(d, f"{name}.gate_proj", inner, size, bias)
        self.up_proj = Linear(d, f"{name}.up_proj", inner, size, bias)
        self.down_proj = Linear(d, f"{name}.down_proj", size, inner, bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[…, d] → […, d]."""
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
        """[…, d] → logits […, V] in the graph's float type."""
        return self.lm_head(op, self.norm(op, x))
