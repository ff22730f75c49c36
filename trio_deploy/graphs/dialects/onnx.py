"""`onnx`: standard operators of opset 23, and of 24 in decode.onnx."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx_ir as ir

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import KV, Angles, Dialect, Past, Window
from trio_deploy.graphs.loops import by_blocks
from trio_deploy.graphs.values import dim, dtype_of, merge_heads, shape_of, split_heads, typed
from trio_deploy.graphs.weight import Matrix, sizes


@dataclass(frozen=True)
class CacheWindow(Window):
    """Where the new token stands in the cache.

    Attributes:
        past_lengths: int64 [B], valid tokens per row before this step.
        mask: bool [B, 1, 1, C], slots that are valid after it.
    """

    past_lengths: ir.Value
    mask: ir.Value


class OnnxDialect(Dialect):
    """Standard operators: Gemm, RMSNormalization, RotaryEmbedding, Attention, TensorScatter."""

    name = "onnx"
    opset = 23
    decode_opset = 24
    always_decodes_apart = True
    reads_lengths = False
    takes_matrices_as_inputs = True

    def linear(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        """Compute a Gemm, which takes a matrix that is transposed."""
        out, inner = sizes(weight)
        lead = shape_of(x)[:-1]

        def gemm(x: ir.Value, w: ir.Value) -> ir.Value:
            flat = x if len(lead) == 1 else op.Reshape(x, [-1, inner])
            inputs = (flat, w) if bias is None else (flat, w, bias)
            y = op.Gemm(*inputs, transB=1)
            if len(lead) == 1:
                return y
            y = op.Reshape(y, op.Concat(op.Shape(x, end=-1), [out], axis=0))
            return typed(y, dtype_of(x), [*lead, out])

        return self.product(op, x, weight, gemm)

    def linear_few_rows(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        """Compute `linear` with the weight on the left, over three axes.

        TensorRT transposes a weight that is an input in every run, but for this form.
        """
        return self._weight_on_the_left(op, x, weight, bias, lead=[1])

    def linear_few_rows_beside(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        return self.linear(op, x, weight, bias)

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
        scale = head_dim**-0.5
        if used is None:

            def attend(op: Any, rows: ir.Value) -> ir.Value:
                return typed(op.Attention(rows, k, v, scale=scale), self.dtype, shape_of(rows))

            y = by_blocks(op, q, self.query_block if long else None, attend, "queries")
        else:  # ONNX Runtime's CPU kernel does not broadcast a mask over the queries
            rows, length = dim(op, used, 0), dim(op, used, 1)
            shape = op.Concat(rows, [1], length, length, axis=0)
            y = op.Attention(q, k, v, op.Expand(op.Unsqueeze(used, [1, 2]), shape), scale=scale)
        return merge_heads(op, typed(y, self.dtype, shape_of(q)))

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
        scale = text.head_dim**-0.5
        q = self.rope(op, split_heads(op, q, text.num_heads, text.head_dim), window.angles)
        k = self.rope(op, split_heads(op, k, text.num_kv_heads, text.head_dim), window.angles)
        present = KV(k, split_heads(op, v, text.num_kv_heads, text.head_dim))
        if past is None:
            # Causality hides padding on the right; nonpad_kv_seqlen would spoil short rows.
            y = op.Attention(q, present.key, present.value, is_causal=1, scale=scale)
            return merge_heads(op, typed(y, self.dtype, shape_of(q))), present
        assert isinstance(window, CacheWindow)
        present = KV(
            op.TensorScatter(past.key, present.key, window.past_lengths, axis=-2),
            op.TensorScatter(past.value, present.value, window.past_lengths, axis=-2),
        )
        # TensorRT's parser takes no nonpad_kv_seqlen.
        y = op.Attention(q, present.key, present.value, window.mask, scale=scale)
        return merge_heads(op, typed(y, self.dtype, shape_of(q))), present

    def prefill_window(
        self, op: Any, angles: Angles, x: ir.Value, lengths: ir.Value | None, past: Past | None
    ) -> Window:
        return Window(angles)

    def decode_window(self, op: Any, angles: Angles, x: ir.Value, past: Past) -> Window:
        slots = op.Range(0, op.Squeeze(dim(op, past.first.key, 2), [0]), 1)
        valid = op.LessOrEqual(op.Unsqueeze(slots, [0]), op.Unsqueeze(past.lengths, [1]))
        return CacheWindow(angles, past.lengths, op.Unsqueeze(valid, [1, 2]))
