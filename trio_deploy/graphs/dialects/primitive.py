"""`primitive`: the operators of opset 17, which TensorRT from 8.6 on and OpenVINO read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import KV, Angles, Dialect, Past, Window
from trio_deploy.graphs.loops import by_blocks
from trio_deploy.graphs.values import (
    FLOAT,
    cast,
    constant,
    dim,
    dtype_of,
    last_two_swapped,
    merge_heads,
    reduce,
    shape_of,
    split_heads,
    typed,
)
from trio_deploy.graphs.weight import Matrix

_HIDDEN = -1e30  # additive mask
_RUN = 128  # places that `running_sum` adds up at a time


@dataclass(frozen=True)
class MaskedWindow(Window):
    """What each new token may attend to.

    Attributes:
        mask: fp32 [B, 1, S, P], added to the scores; P = max(C, S) slots.
    """

    mask: ir.Value


@dataclass(frozen=True)
class CacheWindow(MaskedWindow):
    """Where the new tokens stand in the cache.

    Attributes:
        written: bool [B, 1, P, 1], slots that take new tokens.
        filler: int64 [1], 1 in prefill and 0 in decode.
    """

    written: ir.Value
    filler: ir.Value


class PrimitiveDialect(Dialect):
    """Elementary operators, in the patterns that OpenVINO and TensorRT fuse."""

    name = "primitive"
    opset = 17
    decode_opset = 17
    nests_loops = False  # OpenVINO copies what a loop reads whenever it starts
    gathers_in_loops = False

    def linear(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        y = self.product(op, x, weight, lambda x, w: op.MatMul(x, op.Transpose(w, perm=[1, 0])))
        return y if bias is None else op.Add(y, bias)

    def matmul_shared(self, op: Any, x: ir.Value, w: ir.Value) -> ir.Value:
        """Compute x w as (wᵀ xᵀ)ᵀ for a square w; x has rank 2 or more.

        OpenVINO 2026.4 packs a constant on the right of a product, and if one graph has both x w
        and x wᵀ for a square w, it takes the one packing for the other: wrong numbers, no message.
        """
        out, inner = shape_of(w)[-2:]
        if out != inner:
            return op.MatMul(x, w)
        swapped = last_two_swapped(len(shape_of(x)))
        left = op.Transpose(w, perm=last_two_swapped(len(shape_of(w))))
        return op.Transpose(op.MatMul(left, op.Transpose(x, perm=swapped)), perm=swapped)

    def rms_norm(self, op: Any, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        wide = cast(op, x, FLOAT)
        mean = reduce(op, "ReduceMean", op.Pow(wide, 2.0), [-1])
        unit = op.Mul(wide, op.Div(1.0, op.Sqrt(op.Add(mean, eps))))
        return op.Mul(cast(op, unit, dtype_of(x)), weight)

    def rope(
        self,
        op: Any,
        x: ir.Value,
        angles: Angles,
        *,
        heads: int | None = None,
        inverse: bool = False,
    ) -> ir.Value:
        cos, sin = angles.cos, op.Neg(angles.sin) if inverse else angles.sin
        if heads is not None:
            x = split_heads(op, x, heads, int(shape_of(x)[-1]) // heads)
            return merge_heads(op, self.rope(op, x, Angles(cos, sin)))
        half = int(shape_of(x)[-1]) // 2
        cos, sin = op.Unsqueeze(cos, [1]), op.Unsqueeze(sin, [1])
        # the order of operands in which OpenVINO recognises a rotation
        first, second = op.Split(x, [half, half], axis=-1, _outputs=2)
        first, second = (
            op.Sub(op.Mul(first, cos), op.Mul(second, sin)),
            op.Add(op.Mul(second, cos), op.Mul(first, sin)),
        )
        return op.Concat(first, second, axis=-1)

    def full_attention(
        self,
        op: Any,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        heads: int,
        used: ir.Value | None = None,
        *,
        long: bool = False,
    ) -> ir.Value:
        head_dim = int(shape_of(q)[-1]) // heads
        q, k, v = (split_heads(op, each, heads, head_dim) for each in (q, k, v))
        mask = None if used is None else _additive_mask(op, op.Unsqueeze(op.Not(used), [1]))

        def attend(op: Any, rows: ir.Value) -> ir.Value:
            return _attend(op, rows, k, v, mask, head_dim**-0.5)

        return merge_heads(
            op, by_blocks(op, q, self.query_block if long else None, attend, "queries")
        )

    def attention(
        self,
        op: Any,
        text: TextConfig,
        q: ir.Value,
        k: ir.Value,
        v: ir.Value,
        window: Window,
        past: KV | None,
    ) -> tuple[ir.Value, KV]:
        assert isinstance(window, MaskedWindow)
        q = self.rope(op, split_heads(op, q, text.num_heads, text.head_dim), window.angles)
        k = self.rope(op, split_heads(op, k, text.num_kv_heads, text.head_dim), window.angles)
        present = KV(k, split_heads(op, v, text.num_kv_heads, text.head_dim))
        if past is not None:
            present = KV(
                self._update(op, past.key, present.key, window),
                self._update(op, past.value, present.value, window),
            )
        times = text.num_heads // text.num_kv_heads
        keys = _repeat_heads(op, present.key, times)
        values = _repeat_heads(op, present.value, times)
        y = _attend(op, q, keys, values, window.mask, text.head_dim**-0.5)
        return merge_heads(op, typed(y, self.dtype, shape_of(q))), present

    def _update(self, op: Any, past: ir.Value, new: ir.Value, window: Window) -> ir.Value:
        """Write new tokens into the cache: [B, G, C, D] and [B, G, S, D] → [B, G, max(C, S), D].

        Prefill (C = 0): every slot takes its new token; `old` is a filler of one slot that is
        broadcast and never taken. Decode (S = 1): `old` is the past, and the one new token is
        broadcast to the slot it takes.
        """
        assert isinstance(window, CacheWindow)
        old = op.Concat(past, op.Slice(new, [0], window.filler, [2]), axis=2)
        batch, heads, _, head_dim = shape_of(new)
        shape = [batch, heads, None, head_dim]
        return typed(op.Where(window.written, new, old), self.dtype, shape)

    def prefill_window(
        self, op: Any, angles: Angles, x: ir.Value, lengths: ir.Value | None, past: Past | None
    ) -> Window:
        assert lengths is not None
        if past is not None:
            return self._window(op, angles, x, lengths, past)
        rows = op.Range(0, op.Squeeze(dim(op, x, 1), [0]), 1)
        ends = op.Unsqueeze(op.Sub(lengths, 1), [1, 2])
        last = op.Min(op.Unsqueeze(rows, [0, 2]), ends)  # as in `_window`
        mask = _additive_mask(op, op.Greater(op.Unsqueeze(rows, [0, 1]), last))
        return MaskedWindow(angles, mask)

    def decode_window(self, op: Any, angles: Angles, x: ir.Value, past: Past) -> Window:
        return self._window(op, angles, x, None, past)

    def _window(
        self, op: Any, angles: Angles, x: ir.Value, lengths: ir.Value | None, past: Past
    ) -> CacheWindow:
        """Prepare a step that is either a first prompt (C = 0) or one new token per row."""
        new, capacity = dim(op, x, 1), dim(op, past.first.key, 2)
        first_prompt = op.Greater(new, capacity)
        slots = op.Range(0, op.Squeeze(op.Max(capacity, new), [0]), 1)
        rows = op.Range(0, op.Squeeze(new, [0]), 1)
        start = op.Unsqueeze(past.lengths, [1, 2])
        # [B, S, 1]: a query attends to slots up to its own, a padding query up to its row's last
        # valid token (its result is not read; but OpenVINO drops an input that nothing uses).
        last = op.Add(start, op.Unsqueeze(rows, [0, 2]))
        if lengths is not None:
            last = op.Min(last, op.Add(start, op.Unsqueeze(op.Sub(lengths, 1), [1, 2])))
        mask = _additive_mask(op, op.Greater(op.Unsqueeze(slots, [0, 1]), last))
        written = op.Equal(op.Unsqueeze(slots, [0]), op.Unsqueeze(past.lengths, [1]))
        written = op.Unsqueeze(op.Or(written, first_prompt), [1, 3])
        # By arithmetic: TensorRT computes no sizes with comparisons.
        filler = op.Min(op.Max(op.Sub(new, capacity), 0), 1)
        return CacheWindow(angles, mask, written, filler)

    def running_sum(self, op: Any, flags: ir.Value) -> ir.Value:
        """Sum by a triangle: within blocks, then over the blocks.

        TensorRT before 10.15 turns CumSum into a loop of L steps. Every product here is exact, in
        bfloat16 too.
        """
        batch, length = dim(op, flags, 0), dim(op, flags, 1)
        blocks = op.Div(op.Add(length, _RUN - 1), _RUN)
        missing = op.Concat(batch, op.Sub(op.Mul(blocks, _RUN), length), axis=0)
        padding = op.ConstantOfShape(missing, value=ir.tensor(np.zeros(1, np.float32)))
        table = op.Concat(batch, blocks, [_RUN], axis=0)
        flags = op.Reshape(op.Concat(flags, padding, axis=1), table)
        triangle = constant(op, np.triu(np.ones((_RUN, _RUN), np.float32)), "run")
        inside = op.MatMul(flags, triangle)
        totals = op.Transpose(op.Slice(inside, [_RUN - 1], [_RUN], [2]), perm=[0, 2, 1])
        number = op.Range(0, op.Squeeze(blocks, [0]), 1)
        before = op.Less(op.Unsqueeze(number, [0]), op.Unsqueeze(number, [1]))
        # Not a product: TensorRT pads operands of dynamic sizes, in a copy.
        offsets = reduce(op, "ReduceSum", op.Where(before, totals, 0.0), [2])  # [B, blocks, 1]
        sums = op.Reshape(op.Add(inside, offsets), op.Concat(batch, [-1], axis=0))
        return op.Slice(sums, [0], length, [1])


def _additive_mask(op: Any, hidden: ir.Value) -> ir.Value:
    """Turn bool [B, S, P], slots that a query must not attend to, into f32 [B, 1, S, P]."""
    return op.Unsqueeze(op.Where(hidden, _HIDDEN, 0.0), [1])


def _attend(
    op: Any, q: ir.Value, k: ir.Value, v: ir.Value, mask: ir.Value | None, scale: float
) -> ir.Value:
    """Compute softmax(q kᵀ · scale + mask) v over [B, N, S, D]: the pattern that OpenVINO fuses.

    The softmax is computed in fp32; a mask is fp32 and additive.
    """
    dtype = dtype_of(q)
    scores = op.MatMul(op.Mul(q, scale), op.Transpose(k, perm=[0, 1, 3, 2]))
    scores = cast(op, scores, FLOAT)
    if mask is not None:
        scores = op.Add(scores, mask)
    return op.MatMul(cast(op, op.Softmax(scores, axis=-1), dtype), v)


def _repeat_heads(op: Any, x: ir.Value, times: int) -> ir.Value:
    """Repeat each head `times` times in a row: [B, G, S, D] → [B, G·times, S, D]."""
    if times == 1:
        return x
    batch, heads, length, head_dim = shape_of(x)
    wide = op.Expand(op.Unsqueeze(x, [2]), [1, 1, times, 1, 1])
    y = op.Reshape(wide, op.Concat(dim(op, x, 0), [int(heads) * times, -1, int(head_dim)], axis=0))
    return typed(y, dtype_of(x), [batch, int(heads) * times, length, head_dim])
