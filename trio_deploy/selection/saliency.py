"""Saliency of visual tokens for the layer-local proxy loss, in closed form: no autograd.

The loss touches P query rows alone, so a visual token acts only through the layer's keys and
values. One product gives the keys of all S rows; everything else in the forward pass is done for
P rows; and the gradient comes back through P x H rows of attention. The values are never projected
(the probes' rows are pushed through W_v instead): 3 H P multiplications a feature and token against
2 G D, which is less while G > 3 H P / 2 D, so for P = 4 and D = 128 while G > H / 21: grouped-query
models included.

P probes, B rows, S tokens, d hidden size, H query heads, G key/value heads, R = H/G, D head size,
V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.modules import DecoderLayer, Head, Linear, RMSNorm, rotary_angles
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.values import (
    FLOAT,
    INT64,
    cast,
    constant,
    dim,
    merge_heads,
    reduce,
    running_sum,
    split_heads,
)

_BLIND = -1e30  # additive mask; its exponential is zero in fp32
_LIFT = 64.0  # attention weights of ~1/S, times this, stay normal numbers in fp16
_TINY = 1e-37  # below it a gradient counts as zero


@dataclass(frozen=True)
class Tokens:
    """The input of a pruning point and what follows from it.

    Attributes:
        x: [B,S,d] in the graph's float type.
        positions: int64 [B,S].
        visual, text: bool [B,S]; neither holds for padding.
        squares: f32 [B,S,1], the squared norms of the rows of x.
        flat: x as [B*S,d].
        offset: int64 [B,1], where a batch row starts in `flat`.
        index: int64 [S], 0…S-1.
    """

    x: ir.Value
    positions: ir.Value
    visual: ir.Value
    text: ir.Value
    squares: ir.Value
    flat: ir.Value
    offset: ir.Value
    index: ir.Value

    @classmethod
    def of(
        cls, op: Any, x: ir.Value, positions: ir.Value, lengths: ir.Value, visual: ir.Value
    ) -> Tokens:
        """From the inputs of a select graph: x [B,S,d], lengths [B], visual bool [B,S]."""
        batch, length = dim(op, x, 0), dim(op, x, 1)
        index = op.Range(0, op.Squeeze(length, [0]), 1)
        valid = op.Less(op.Unsqueeze(index, [0]), op.Unsqueeze(lengths, [1]))
        offset = op.Mul(op.Range(0, op.Squeeze(batch, [0]), 1), length)
        return cls(
            x=x,
            positions=positions,
            visual=op.And(valid, visual),
            text=op.And(valid, op.Not(visual)),
            squares=reduce(op, "ReduceSumSquare", cast(op, x, FLOAT), [-1]),
            flat=op.Reshape(x, [-1, int(_sizes(x)[-1])]),
            offset=op.Unsqueeze(offset, [1]),
            index=index,
        )


@dataclass(frozen=True)
class Saliency:
    """‖∂loss/∂x[v]‖₂ of every visual token v, f32 [B,S]; 0 where there is none.

    Attributes:
        value: as defined; tiny gradients may underflow.
        ranking: the same times a power of two a row, so that they do not.
    """

    value: ir.Value
    ranking: ir.Value


def saliency(
    op: Any, d: Dialect, text: TextConfig, layer: int, options: GraphOptions, tokens: Tokens
) -> Saliency:
    """Saliency at the input of `layer`, whose weights with those of the head it registers."""
    block, head = DecoderLayer(d, text, layer), Head(d, text)
    attention = block.self_attn
    heads, groups, size = text.num_heads, text.num_kv_heads, text.head_dim
    hidden, probes, per_group = text.hidden_size, options.probes, heads // groups * options.probes

    # Where the probes are. A row with less text has fewer: the missing look at token 0, unweighted.
    place, present = _probes(op, options, tokens)
    weight = op.Div(present, op.Max(reduce(op, "ReduceSum", present, [1]), 1.0))  # [B,P]
    rows = op.Add(place, tokens.offset)

    # Forward: the keys of all rows, everything else of the probes' rows only.
    n = block.input_layernorm(op, tokens.x)
    probed = op.Gather(op.Reshape(n, [-1, hidden]), rows, axis=0)  # [B,P,d]
    angles = rotary_angles(op, d, text, tokens.positions)
    probe_angles = rotary_angles(op, d, text, op.GatherElements(tokens.positions, place, axis=1))
    k = d.rope(op, split_heads(op, attention.k_proj(op, n), groups, size), angles)
    q = d.rope(
        op, split_heads(op, attention.q_proj.few_rows(op, probed), heads, size), probe_angles
    )
    q = op.Reshape(op.Mul(q, size**-0.5), [0, groups, per_group, size])
    raw = cast(op, d.matmul_transposed(op, q, k), FLOAT)  # [B,G,R*P,S]
    raw = op.Reshape(raw, [0, heads, probes, -1])
    blind = op.Greater(op.Unsqueeze(tokens.index, [0, 1]), op.Unsqueeze(place, [2]))
    mask = op.Unsqueeze(op.Mul(op.Cast(blind, to=FLOAT), _BLIND), [1])  # [B,1,P,S]
    a = op.Softmax(op.Add(raw, mask), axis=-1)
    a, raw = (op.Reshape(v, [0, heads * probes, -1]) for v in (a, raw))  # [B,H*P,S]
    lifted = cast(op, op.Mul(a, _LIFT), d.dtype)
    mixed = op.Mul(cast(op, op.MatMul(lifted, n), FLOAT), 1.0 / _LIFT)  # [B,H*P,d]: a n
    w_v = d.reshape_weight(op, attention.v_proj.weight.into(op), [groups, size, hidden], tokens.x)
    o = op.Reshape(cast(op, mixed, d.dtype), [0, groups, per_group, hidden])
    o = op.Reshape(d.matmul_transposed(op, o, w_v), [0, heads, probes, size])
    o = merge_heads(op, o)  # [B,P,H*D]
    if attention.v_proj.bias is not None:  # the weights of a head sum to one
        bias = op.Reshape(attention.v_proj.bias.into(op), [groups, 1, size])
        bias = op.Expand(bias, [groups, heads // groups, size])
        o = op.Add(o, op.Reshape(bias, [heads * size]))
    y = op.Add(op.Gather(tokens.flat, rows, axis=0), attention.o_proj.few_rows(op, o))
    z = block.post_attention_layernorm(op, y)
    gate, up = block.mlp.gate_proj.few_rows(op, z), block.mlp.up_proj.few_rows(op, z)
    sigmoid = op.Sigmoid(gate)
    silu = op.Mul(gate, sigmoid)
    last = op.Add(y, block.mlp.down_proj.few_rows(op, op.Mul(silu, up)))
    logits = cast(op, head.lm_head.few_rows(op, head.norm(op, last)), FLOAT)

    # Backward, in fp32 between the products.
    dlogits, scale = _unit(op, _loss_gradient(op, text, logits, weight))
    dlast = _back(op, d, head.lm_head, dlogits)
    dlast = op.Mul(*_norm_back(op, head.norm, last, dlast))
    dh = _back(op, d, block.mlp.down_proj, dlast)
    gate, up, sigmoid, silu = (cast(op, v, FLOAT) for v in (gate, up, sigmoid, silu))
    slope = op.Mul(sigmoid, op.Sub(op.Add(gate, 1.0), silu))
    dz = op.Add(
        _back(op, d, block.mlp.gate_proj, op.Mul(op.Mul(dh, up), slope)),
        _back(op, d, block.mlp.up_proj, op.Mul(dh, silu)),
    )
    dy = op.Add(dlast, op.Mul(*_norm_back(op, block.post_attention_layernorm, y, dz)))
    do = split_heads(op, _back(op, d, attention.o_proj, dy), heads, size)
    do = op.Reshape(do, [0, groups, per_group, size])
    u = _scaled(op, d, do, lambda g: op.MatMul(g, w_v))
    u, scale_of_u = _unit(op, op.Reshape(u, [0, heads * probes, hidden]))
    narrow = cast(op, u, d.dtype)
    da = cast(op, d.matmul_transposed(op, narrow, n), FLOAT)  # [B,H*P,S]
    ds = op.Mul(a, op.Sub(da, reduce(op, "ReduceSum", op.Mul(u, mixed), [-1])))
    # n·dn of each row, which need not be summed up over its d entries: the rotation drops out
    along = op.Add(op.Mul(ds, raw), op.Mul(a, da))
    along = op.Transpose(reduce(op, "ReduceSum", along, [1]), perm=[0, 2, 1])  # [B,S,1]
    ds = cast(op, op.Mul(ds, _LIFT), d.dtype)
    ds = op.Reshape(ds, [0, groups, per_group, -1])
    dk = op.MatMul(op.Transpose(ds, perm=[0, 1, 3, 2]), q)  # [B,G,S,D]
    dk = merge_heads(op, d.rope(op, dk, angles, inverse=True))
    dn = op.Add(
        attention.k_proj.backward(op, dk),
        op.MatMul(op.Transpose(lifted, perm=[0, 2, 1]), narrow),
    )
    if attention.k_proj.bias is not None:
        in_bias = op.MatMul(dk, op.Unsqueeze(attention.k_proj.bias.into(op), [1]))
        along = op.Sub(along, op.Mul(cast(op, in_bias, FLOAT), 1.0 / _LIFT))
    norm = _norm_of_norm_back(
        op, block.input_layernorm, tokens.squares, cast(op, dn, FLOAT), op.Mul(along, _LIFT)
    )
    norm = op.Squeeze(norm, [2])  # [B,S]
    ranking = op.Where(tokens.visual, norm, 0.0)
    scale = op.Squeeze(op.Mul(op.Mul(scale, scale_of_u), 1.0 / _LIFT), [2])
    return Saliency(op.Mul(ranking, scale), ranking)


def _probes(op: Any, options: GraphOptions, tokens: Tokens) -> tuple[ir.Value, ir.Value]:
    """Positions of the probes, int64 [B,P], and which of them exist, f32 [B,P].

    Probe p is the text token with p more behind it, or p + 1 where `probe` is `shifted`.
    """
    text = op.Cast(tokens.text, to=FLOAT)
    behind = op.Sub(reduce(op, "ReduceSum", text, [1]), running_sum(op, text))
    shift = 1 if options.probe == "shifted" else 0
    wanted = np.arange(options.probes, dtype=np.float32)[None, :, None] + shift
    hit = op.Equal(op.Unsqueeze(behind, [1]), constant(op, wanted, "probes"))
    hit = op.Cast(op.And(hit, op.Unsqueeze(tokens.text, [1])), to=FLOAT)  # [B,P,S]
    index = op.Cast(tokens.index, to=FLOAT)
    place = reduce(op, "ReduceSum", op.Mul(hit, index), [2], keepdims=False)
    return op.Cast(place, to=INT64), reduce(op, "ReduceSum", hit, [2], keepdims=False)


def _loss_gradient(op: Any, text: TextConfig, logits: ir.Value, weight: ir.Value) -> ir.Value:
    """(softmax - onehot(argmax)) · weight for logits [B,P,V], weight [B,P].

    The label's entry is minus the sum of the others: p - 1 would cancel where p is near 1. Ties
    for the label go to the lowest token, as ArgMax has it; OpenVINO's ArgMax sorts (8 ms for four
    rows of 32,000 logits, where these reductions cost next to nothing).
    """
    vocabulary = op.Range(0.0, float(text.vocab_size), 1.0)
    best = op.Equal(logits, reduce(op, "ReduceMax", logits, [-1]))
    places = op.Where(best, vocabulary, float(text.vocab_size))
    hot = op.Equal(vocabulary, reduce(op, "ReduceMin", places, [-1]))
    others = op.Where(hot, 0.0, op.Softmax(logits, axis=-1))
    gradient = op.Where(hot, op.Neg(reduce(op, "ReduceSum", others, [-1])), others)
    return op.Mul(gradient, op.Unsqueeze(weight, [2]))


def _unit(op: Any, x: ir.Value) -> tuple[ir.Value, ir.Value]:
    """x [B,m,n] f32 over a power of two a batch row, and that power [B,1,1].

    The sum of magnitudes comes to lie within 1…2, so nothing overflows or underflows in fp16.
    """
    total = op.Max(reduce(op, "ReduceSum", op.Abs(x), [1, 2]), _TINY)
    power = op.Pow(2.0, op.Floor(op.Mul(op.Log(total), 1.0 / math.log(2.0))))
    return op.Div(x, power), power


def _scaled(op: Any, d: Dialect, g: ir.Value, product: Callable[[ir.Value], ir.Value]) -> ir.Value:
    """product(g) for a gradient g in fp32, the product itself in the graph's float type."""
    if d.dtype == FLOAT:
        return product(g)
    total = op.Max(reduce(op, "ReduceSum", op.Abs(g), range(1, len(_sizes(g)))), _TINY)
    return op.Mul(cast(op, product(cast(op, op.Div(g, total), d.dtype)), FLOAT), total)


def _back(op: Any, d: Dialect, module: Linear, g: ir.Value) -> ir.Value:
    """The gradient before a Linear from the one behind it, f32 [B,P,out] → [B,P,in]."""
    return _scaled(op, d, g, lambda narrow: module.backward_few_rows(op, narrow))


def _norm_back(op: Any, module: RMSNorm, x: ir.Value, g: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The gradient before an RMSNorm of x [...,d] from the one behind it, f32.

    With r = 1/sqrt(mean(x²) + ε) and h = w ∘ g it is r (h - x r² (h·x)/d); returned as two factors,
    of which the second, r, has one entry a row.
    """
    x = cast(op, x, FLOAT)
    size = int(_sizes(x)[-1])
    squares = reduce(op, "ReduceSumSquare", x, [-1])
    square = op.Div(1.0, op.Add(op.Mul(squares, 1.0 / size), module.eps))  # r²
    h = op.Mul(g, cast(op, module.weight.into(op), FLOAT))
    along = op.Mul(reduce(op, "ReduceSum", op.Mul(h, x), [-1]), op.Mul(square, 1.0 / size))
    return op.Sub(h, op.Mul(x, along)), op.Sqrt(square)


def _norm_of_norm_back(
    op: Any, module: RMSNorm, squares: ir.Value, g: ir.Value, along: ir.Value
) -> ir.Value:
    """The norm of what `_norm_back` gives, f32 [...,1], from x·x and y·g of each row alone.

    With y = r x ∘ w the normed row, y·g = r (h·x); so r² |h - x r² (h·x)/d|² is
    r² (|h|² - (y·g)² (1 + ε r²)/d), for which neither x nor the difference is gone through; and
    |h|² is a product of g ∘ g with w ∘ w.
    """
    size = int(_sizes(g)[-1])
    square = op.Div(1.0, op.Add(op.Mul(squares, 1.0 / size), module.eps))  # r²
    w = cast(op, module.weight.into(op), FLOAT)
    h = op.MatMul(op.Mul(g, g), op.Unsqueeze(op.Mul(w, w), [1]))  # |h|²
    inside = op.Mul(op.Mul(along, along), op.Add(op.Mul(square, module.eps), 1.0))
    outside = op.Sub(h, op.Mul(inside, 1.0 / size))
    return op.Sqrt(op.Mul(op.Max(outside, 0.0), square))


def _sizes(x: ir.Value) -> tuple[Any, ...]:
    """The shape of a value that shape inference has reached."""
    assert x.shape is not None, x.name
    return tuple(x.shape)
