"""Building blocks of every stage, in any dialect.

The blocks are `onnxscript.nn` modules with the structure of the PyTorch code; each holds the
`Dialect` that writes its operators. Two things differ from plain onnxscript.nn, which would go
wrong without a message:

* A `Weight` has its canonical name from the start and registers itself under exactly that name,
  whichever module calls it and however deep. Using a module in a second graph, or two modules for
  one name in one graph, raises.
* `Linear` computes x Wᵀ and, in `backward`, x W from one un-transposed initializer.

Some modules have the backward pass that the saliency needs; methods with `probes` or `few_rows` in
their names take P rows per batch row, which is few.

Shapes in docstrings: B rows, S tokens, d hidden size,
H query heads, G key/value heads, R = H/G,
D head size, m inner size of the MLP, C capacity of the KV cache.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import onnx_ir as ir
from onnxscript import nn

from trio_deploy.errors import TrioError
from trio_deploy.families.base import TextConfig
from trio_deploy.families.names import EMBEDDINGS, HEAD
from trio_deploy.graphs.dialects.base import KV, Angles, Dialect, Window
from trio_deploy.graphs.values import (
    FLOAT,
    cast,
    dtype_of,
    merge_heads,
    over_power_of_two,
    reduce,
    scaled_product,
    shape_of,
    split_heads,
    typed,
)
from trio_deploy.graphs.weight import Matrix, QuantisedWeight, Weight
from trio_deploy.quant.stored_weight import Coding

_TOKENS = EMBEDDINGS.removesuffix(".weight")
_HEAD = HEAD.removesuffix(".weight")


def _matrix(d: Dialect, name: str, shape: list[int], coding: Coding | None) -> Matrix:
    """Declare a matrix [N, K]; `coding`: how it is quantised, None if it is float."""
    if coding is None:
        return Weight(name, shape, d.dtype)
    return QuantisedWeight(name, shape, coding)


class Linear(nn.Module):
    """y = x Wᵀ + b with W [out, in] as in the checkpoint."""

    def __init__(
        self,
        d: Dialect,
        name: str,
        out_features: int,
        in_features: int,
        bias: bool = False,
        coding: Coding | None = None,
    ) -> None:
        """Declare the weights; `coding`: how the matrix is quantised, None if it is float."""
        super().__init__(name.rpartition(".")[2])
        self.d = d
        self.weight = _matrix(d, f"{name}.weight", [out_features, in_features], coding)
        self.bias = Weight(f"{name}.bias", [out_features], d.dtype) if bias else None

    @classmethod
    def of_layer(
        cls, d: Dialect, name: str, out_features: int, in_features: int, bias: bool
    ) -> Linear:
        """Make a matrix of a decoder layer, quantised as the dialect says."""
        coding = d.layer_coding(f"{name}.weight", in_features)
        return cls(d, name, out_features, in_features, bias, coding)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., in] → [..., out]."""
        return self.d.linear(op, x, self.weight, self.bias)

    def backward(self, op: Any, g: ir.Value) -> ir.Value:
        """Compute the gradient before the product from that behind: [..., out] → [..., in]."""
        return self.d.linear_transposed(op, g, self.weight.into(op))

    def few_rows(self, op: Any, x: ir.Value) -> ir.Value:
        """Compute `forward` for [B, P, in] → [B, P, out] with few rows P."""
        bias = None if self.bias is None else self.bias.into(op)
        return self.d.linear_few_rows(op, x, self.weight.into(op), bias)

    def few_rows_beside(self, op: Any, x: ir.Value) -> ir.Value:
        """Compute `few_rows` beside that of another weight for the same x."""
        bias = None if self.bias is None else self.bias.into(op)
        return self.d.linear_few_rows_beside(op, x, self.weight.into(op), bias)

    def backward_few_rows(self, op: Any, g: ir.Value) -> ir.Value:
        """Compute `backward` for f32 [B, P, out] → f32 [B, P, in] with few rows P."""
        weight = self.weight.into(op)
        return scaled_product(
            op,
            self.d.dtype,
            g,
            lambda narrow: self.d.linear_transposed_few_rows(op, narrow, weight),
        )


class RMSNorm(nn.Module):
    """x / sqrt(mean(x²) + ε) · w, computed in fp32."""

    def __init__(self, d: Dialect, name: str, size: int, eps: float) -> None:
        super().__init__(name.rpartition(".")[2])
        self.d, self.eps = d, eps
        self.weight = Weight(f"{name}.weight", [size], d.dtype)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., size] → [..., size]."""
        return self.d.rms_norm(op, x, self.weight, self.eps)

    def backward(self, op: Any, x: ir.Value, g: ir.Value) -> ir.Value:
        """Compute the gradient before the norm of x [..., size] from g f32 behind it.

        With r = 1/sqrt(mean(x²) + ε) and h = w ∘ g it is r (h - x r² (h·x)/d).
        """
        x = cast(op, x, FLOAT)
        size = int(shape_of(x)[-1])
        squares = reduce(op, "ReduceSumSquare", x, [-1])
        square = op.Div(1.0, op.Add(op.Mul(squares, 1.0 / size), self.eps))  # r²
        h = op.Mul(g, cast(op, self.weight.into(op), FLOAT))
        along = op.Mul(reduce(op, "ReduceSum", op.Mul(h, x), [-1]), op.Mul(square, 1.0 / size))
        return op.Mul(op.Sub(h, op.Mul(x, along)), op.Sqrt(square))

    def backward_norm(self, op: Any, squares: ir.Value, g: ir.Value, along: ir.Value) -> ir.Value:
        """Compute the Euclidean norm of `backward` per row, f32 [..., 1], without x.

        With y = r x ∘ w the normed row, y·g = r (h·x); so r² |h - x r² (h·x)/d|² is
        r² (|h|² - (y·g)² (1 + ε r²)/d), which needs neither x nor the difference; and |h|² is a
        product of g ∘ g with w ∘ w.

        Args:
            squares: x·x of each row, f32 [..., 1].
            g: gradient behind the norm, f32 [..., size].
            along: y·g of each row, f32 [..., 1].
        """
        size = int(shape_of(g)[-1])
        square = op.Div(1.0, op.Add(op.Mul(squares, 1.0 / size), self.eps))  # r²
        w = cast(op, self.weight.into(op), FLOAT)
        h = op.MatMul(op.Mul(g, g), op.Unsqueeze(op.Mul(w, w), [1]))  # |h|²
        inside = op.Mul(op.Mul(along, along), op.Add(op.Mul(square, self.eps), 1.0))
        outside = op.Sub(h, op.Mul(inside, 1.0 / size))
        return op.Sqrt(op.Mul(op.Max(outside, 0.0), square))


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
    """A table of vectors, [rows, size]."""

    def __init__(
        self, d: Dialect, name: str, rows: int, size: int, coding: Coding | None = None
    ) -> None:
        """Declare the table; `coding`: how it is quantised, None if it is float."""
        super().__init__(name.rpartition(".")[2])
        self.d, self.coding = d, coding
        self.weight = _matrix(d, f"{name}.weight", [rows, size], coding)

    @classmethod
    def of_tokens(cls, d: Dialect, text: TextConfig) -> Embedding:
        """Make the language model's table of token embeddings.

        One that serves as a quantised head is stored once, as the head's codes.
        """
        size = text.hidden_size
        coding = d.table_coding(EMBEDDINGS, size) if text.tie_word_embeddings else None
        return cls(d, _TOKENS, text.vocab_size, size, coding)

    def forward(self, op: Any, index: ir.Value) -> ir.Value:
        """int64 [...] → [..., size]."""
        return self.d.rows(op, self.weight, index)


def activation(op: Any, kind: str, x: ir.Value) -> ir.Value:
    """Apply `silu`, `quick_gelu`, `gelu` (erf) or `gelu_pytorch_tanh` / `gelu_new`.

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
    raise TrioError(f"activation {kind!r} is not supported: use silu, quick_gelu or gelu")


#: Attention weights of about 1/S, times this, stay normal numbers in fp16.
LIFT = 64.0


@dataclass(frozen=True)
class ProbeAttention:
    """What the backward pass needs of the attention of P probes per batch row.

    Attributes:
        n: [B, S, d], input of the projections.
        angles: of its S rows.
        k: [B, S, G·D], keys before norm and rotation.
        q: [B, G, R·P, D], queries, rotated and scaled.
        raw: f32 [B, H·P, S], scores without the mask.
        weights: f32 [B, H·P, S], after the softmax.
        lifted: the same times `LIFT`, in the graph's float type.
        mixed: f32 [B, H·P, d], weights times n.
        w_v: [G, D, d], weight of the values by head.
    """

    n: ir.Value
    angles: Angles
    k: ir.Value
    q: ir.Value
    raw: ir.Value
    weights: ir.Value
    lifted: ir.Value
    mixed: ir.Value
    w_v: ir.Value


class InputGradient(NamedTuple):
    """Gradient of the input n of an attention, times `LIFT` and divided by `scale`.

    Attributes:
        dn: f32 [B, S, d].
        along: n·dn of each row, f32 [B, S, 1].
        scale: f32 [B, 1, 1], a power of two per batch row.
    """

    dn: ir.Value
    along: ir.Value
    scale: ir.Value


class Attention(nn.Module):
    """Causal grouped-query attention with rotary positions and a KV cache."""

    def __init__(self, d: Dialect, name: str, text: TextConfig) -> None:
        super().__init__(name.rpartition(".")[2])
        self.d, self.text = d, text
        size, inner = text.hidden_size, text.num_heads * text.head_dim
        kv, bias = text.num_kv_heads * text.head_dim, text.qkv_bias
        self.q_proj = Linear.of_layer(d, f"{name}.q_proj", inner, size, bias)
        self.k_proj = Linear.of_layer(d, f"{name}.k_proj", kv, size, bias)
        self.v_proj = Linear.of_layer(d, f"{name}.v_proj", kv, size, bias)
        self.o_proj = Linear.of_layer(d, f"{name}.o_proj", size, inner, text.o_bias)
        self.q_norm = self.k_norm = None
        if text.qk_norm:
            self.q_norm = RMSNorm(d, f"{name}.q_norm", text.head_dim, text.rms_norm_eps)
            self.k_norm = RMSNorm(d, f"{name}.k_norm", text.head_dim, text.rms_norm_eps)

    def forward(self, op: Any, x: ir.Value, window: Window, past: KV | None) -> tuple[ir.Value, KV]:
        """x [B, S, d] → ([B, S, d], present keys and values)."""
        q = _head_by_head(op, self.q_norm, self.q_proj(op, x))
        k = _head_by_head(op, self.k_norm, self.k_proj(op, x))
        v = self.v_proj(op, x)
        y, present = self.d.attention(op, self.text, q, k, v, window, past)
        return self.o_proj(op, y), present

    def keys(self, op: Any, x: ir.Value, angles: Angles) -> ir.Value:
        """Compute rotated keys: [B, S, d] → [B, G, S, D]."""
        k = _head_by_head(op, self.k_norm, self.k_proj(op, x))
        k = split_heads(op, k, self.text.num_kv_heads, self.text.head_dim)
        return self.d.rope(op, k, angles)

    def queries(self, op: Any, x: ir.Value, angles: Angles) -> ir.Value:
        """Compute rotated queries: [B, S, d] → [B, H, S, D]."""
        q = _head_by_head(op, self.q_norm, self.q_proj(op, x))
        q = split_heads(op, q, self.text.num_heads, self.text.head_dim)
        return self.d.rope(op, q, angles)

    def forward_probes(
        self,
        op: Any,
        n: ir.Value,
        probed: ir.Value,
        angles: tuple[Angles, Angles],
        mask: ir.Value,
        like: ir.Value,
    ) -> tuple[ir.Value, ProbeAttention]:
        """Attend from P rows of n [B, S, d] alone: [B, P, d], and what `backward_probes` needs.

        The values are not projected; the probes' weighted sums of n are pushed through W_v
        instead. That takes 3 H P multiplications per feature and token against 2 G D.

        Args:
            probed: [B, P, d], the P rows.
            angles: of the S rows and of the P rows.
            mask: additive, f32 [B, 1, P, S].
            like: any [B, ...] whose shape is known early.
        """
        text, d = self.text, self.d
        heads, groups, size, hidden = (
            text.num_heads, text.num_kv_heads, text.head_dim, text.hidden_size
        )  # fmt: skip
        probes = int(shape_of(mask)[2])
        per_group = heads // groups * probes
        raw_k = self.k_proj(op, n)
        k = split_heads(op, _head_by_head(op, self.k_norm, raw_k), groups, size)
        k = d.rope(op, k, angles[0])
        q = _head_by_head(op, self.q_norm, self.q_proj.few_rows(op, probed))
        q = d.rope(op, split_heads(op, q, heads, size), angles[1])
        q = op.Reshape(op.Mul(q, size**-0.5), [0, groups, per_group, size])
        raw = cast(op, d.matmul_transposed(op, q, k), FLOAT)  # [B, G, R·P, S]
        raw = op.Reshape(raw, [0, heads, probes, -1])
        weights = op.Softmax(op.Add(raw, mask), axis=-1)
        weights, raw = (op.Reshape(v, [0, heads * probes, -1]) for v in (weights, raw))
        lifted = cast(op, op.Mul(weights, LIFT), d.dtype)
        mixed = op.Mul(cast(op, op.MatMul(lifted, n), FLOAT), 1.0 / LIFT)
        w_v = d.reshape_weight(op, self.v_proj.weight.into(op), [groups, size, hidden], like)
        o = op.Reshape(cast(op, mixed, d.dtype), [0, groups, per_group, hidden])
        o = op.Reshape(d.matmul_transposed(op, o, w_v), [0, heads, probes, size])
        o = merge_heads(op, o)  # [B, P, H·D]
        if self.v_proj.bias is not None:  # the weights of a head sum to one
            bias = op.Reshape(self.v_proj.bias.into(op), [groups, 1, size])
            bias = op.Expand(bias, [groups, heads // groups, size])
            o = op.Add(o, op.Reshape(bias, [heads * size]))
        kept = ProbeAttention(n, angles[0], raw_k, q, raw, weights, lifted, mixed, w_v)
        return self.o_proj.few_rows(op, o), kept

    def backward_probes(self, op: Any, kept: ProbeAttention, g: ir.Value) -> InputGradient:
        """Compute the gradient of n through keys and values from g f32 [B, P, d] behind o_proj.

        What acts through the probes' own queries is left out: it belongs to the probes' rows.
        """
        text, d, a = self.text, self.d, kept.weights
        heads, groups, size = text.num_heads, text.num_kv_heads, text.head_dim
        per_group = int(shape_of(kept.q)[2])
        do = split_heads(op, self.o_proj.backward_few_rows(op, g), heads, size)
        do = op.Reshape(do, [0, groups, per_group, size])
        u = scaled_product(op, d.dtype, do, lambda narrow: d.matmul_shared(op, narrow, kept.w_v))
        u = op.Reshape(u, [0, groups * per_group, text.hidden_size])
        u, scale = over_power_of_two(op, u)
        narrow = cast(op, u, d.dtype)
        da = cast(op, d.matmul_transposed(op, narrow, kept.n), FLOAT)  # [B, H·P, S]
        ds = op.Mul(a, op.Sub(da, reduce(op, "ReduceSum", op.Mul(u, kept.mixed), [-1])))
        # n·dn of each row without a sum over its d entries: the rotation drops out
        through_k = op.Mul(ds, kept.raw)
        if self.k_norm is not None:
            through_k = op.Mul(through_k, self._blindness(op, kept.k, per_group))
        along = op.Add(through_k, op.Mul(a, da))
        along = op.Transpose(reduce(op, "ReduceSum", along, [1]), perm=[0, 2, 1])  # [B, S, 1]
        ds = cast(op, op.Mul(ds, LIFT), d.dtype)
        ds = op.Reshape(ds, [0, groups, per_group, -1])
        dk = op.MatMul(op.Transpose(ds, perm=[0, 1, 3, 2]), kept.q)  # [B, G, S, D]
        dk = merge_heads(op, d.rope(op, dk, kept.angles, inverse=True))
        if self.k_norm is not None:
            apart = [0, 0, groups, size]
            g = cast(op, op.Reshape(dk, apart), FLOAT)
            g = self.k_norm.backward(op, op.Reshape(kept.k, apart), g)
            dk = cast(op, op.Reshape(g, [0, 0, groups * size]), d.dtype)
        dn = op.Add(
            self.k_proj.backward(op, dk),
            op.MatMul(op.Transpose(kept.lifted, perm=[0, 2, 1]), narrow),
        )
        if self.k_proj.bias is not None:
            in_bias = op.MatMul(dk, op.Unsqueeze(self.k_proj.bias.into(op), [1]))
            along = op.Sub(along, op.Mul(cast(op, in_bias, FLOAT), 1.0 / LIFT))
        return InputGradient(cast(op, dn, FLOAT), op.Mul(along, LIFT), scale)

    def _blindness(self, op: Any, k: ir.Value, per_group: int) -> ir.Value:
        """What the norm of the keys leaves of k·dk, k [B, S, G·D]: f32 [B, H·P, S].

        The loss does not see the length of a normalised key but for ε: with r = 1/sqrt(mean(k²) +
        ε) it is ε r².
        """
        assert self.k_norm is not None
        groups, size, eps = self.text.num_kv_heads, self.text.head_dim, self.k_norm.eps
        k = cast(op, op.Reshape(k, [0, 0, groups, size]), FLOAT)
        squares = reduce(op, "ReduceSumSquare", k, [3], keepdims=False)  # [B, S, G]
        left = op.Div(eps, op.Add(op.Mul(squares, 1.0 / size), eps))
        left = op.Unsqueeze(op.Transpose(left, perm=[0, 2, 1]), [2])  # [B, G, 1, S]
        left = op.Expand(left, [1, 1, per_group, 1])
        return op.Reshape(left, [0, groups * per_group, -1])


def _head_by_head(op: Any, norm: RMSNorm | None, x: ir.Value) -> ir.Value:
    """Normalise each head of x [B, S, N·D], if there is a norm."""
    if norm is None:
        return x
    size, width = int(shape_of(norm.weight)[0]), int(shape_of(x)[-1])
    y = norm(op, op.Reshape(x, [0, 0, width // size, size]))
    return typed(op.Reshape(y, [0, 0, width]), dtype_of(x), shape_of(x))


class Gates(NamedTuple):
    """What the backward pass needs of an MLP, [B, P, m] each."""

    gate: ir.Value
    sigmoid: ir.Value
    silu: ir.Value
    up: ir.Value


class MLP(nn.Module):
    """SwiGLU: down(silu(gate x) ∘ up x)."""

    def __init__(self, d: Dialect, name: str, text: TextConfig) -> None:
        super().__init__(name.rpartition(".")[2])
        size, inner, bias = text.hidden_size, text.intermediate_size, text.mlp_bias
        self.gate_proj = Linear.of_layer(d, f"{name}.gate_proj", inner, size, bias)
        self.up_proj = Linear.of_layer(d, f"{name}.up_proj", inner, size, bias)
        self.down_proj = Linear.of_layer(d, f"{name}.down_proj", size, inner, bias)

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., d] → [..., d]."""
        gate = activation(op, "silu", self.gate_proj(op, x))
        return self.down_proj(op, op.Mul(gate, self.up_proj(op, x)))

    def forward_probes(self, op: Any, x: ir.Value) -> tuple[ir.Value, Gates]:
        """Compute `forward` for few rows [B, P, d], and what `backward_probes` needs."""
        gate, up = self.gate_proj.few_rows(op, x), self.up_proj.few_rows_beside(op, x)
        sigmoid = op.Sigmoid(gate)
        silu = op.Mul(gate, sigmoid)
        return self.down_proj.few_rows(op, op.Mul(silu, up)), Gates(gate, sigmoid, silu, up)

    def backward_probes(self, op: Any, kept: Gates, g: ir.Value) -> ir.Value:
        """Compute the gradient before the MLP from that behind it: f32 [B, P, d]."""
        dh = self.down_proj.backward_few_rows(op, g)
        gate, sigmoid, silu, up = (cast(op, value, FLOAT) for value in kept)
        slope = op.Mul(sigmoid, op.Sub(op.Add(gate, 1.0), silu))
        return op.Add(
            self.gate_proj.backward_few_rows(op, op.Mul(op.Mul(dh, up), slope)),
            self.up_proj.backward_few_rows(op, op.Mul(dh, silu)),
        )


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
    """Final norm and projection to the vocabulary.

    A model with tied embeddings has no lm_head.weight: pass its table of embeddings if the same
    graph uses it already.
    """

    def __init__(self, d: Dialect, text: TextConfig, table: Embedding | None = None) -> None:
        super().__init__("head")
        self.norm = RMSNorm(d, "language_model.norm", text.hidden_size, text.rms_norm_eps)
        name = _TOKENS if text.tie_word_embeddings else _HEAD
        size = text.hidden_size
        coding = d.head_coding(f"{name}.weight", size)
        self.lm_head = Linear(d, name, text.vocab_size, size, coding=coding)
        if table is not None and text.tie_word_embeddings and table.coding == coding:
            self.lm_head.weight = table.weight

    def forward(self, op: Any, x: ir.Value) -> ir.Value:
        """[..., d] → logits [..., V] in the graph's float type."""
        return self.lm_head(op, self.norm(op, x))
