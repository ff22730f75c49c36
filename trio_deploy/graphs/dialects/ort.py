"""`ort`: operators of ONNX Runtime beside those of opset 23."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import onnx_ir as ir

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import KV, Angles, Dialect, Past, Window
from trio_deploy.graphs.values import (
    FLOAT,
    INT32,
    constant,
    dim,
    dtype_of,
    reduce,
    shape_of,
    typed,
)
from trio_deploy.graphs.weight import Matrix, QuantisedWeight, sizes

_MICROSOFT = {"_domain": "com.microsoft", "_version": 1}
_INT8_PRODUCTS = 4  # accuracy_level of MatMulNBits: the only one with a fast kernel for 8 bit
_HEAD_STEP = 8  # GroupQueryAttention takes head sizes that are multiples of this


@dataclass(frozen=True)
class CacheWindow(Window):
    """Lengths for GroupQueryAttention.

    Attributes:
        seqlens: int32 [B], valid tokens per row after this step, less one.
        total: int32 scalar, the longest row after this step.
    """

    seqlens: ir.Value
    total: ir.Value


class OrtDialect(Dialect):
    """Operators of ONNX Runtime: FusedMatMul, MultiHeadAttention, GroupQueryAttention."""

    name = "ort"
    opset = 23
    decode_opset = 23
    domains: ClassVar[Mapping[str, int]] = {"com.microsoft": 1}
    always_takes_past = True
    resizes_in_loops = True
    form = "blocks"

    def linear(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        if isinstance(weight, QuantisedWeight) and not self.selects:
            y = self._product_with_codes(op, x, weight.into(op))
        else:
            y = op.FusedMatMul(x, self.matrix(op, weight), transB=1, **_MICROSOFT)
        typed(y, dtype_of(x), [*shape_of(x)[:-1], sizes(weight)[0]])
        return y if bias is None else op.Add(y, bias)

    def rows(self, op: Any, weight: Matrix, index: ir.Value) -> ir.Value:
        if isinstance(weight, QuantisedWeight):
            return weight.rows(op, index, self.dtype)
        return super().rows(op, weight, index)

    def _product_with_codes(self, op: Any, x: ir.Value, weight: QuantisedWeight) -> ir.Value:
        """Compute x Wᵀ with x rounded to 8 bit in blocks, by products of whole numbers.

        Selections do not: MatMulNBits has no product with W, and rounding x would move scores.
        """
        out, columns = weight.shape
        parts = [weight.codes, weight.scale] + ([] if weight.zero is None else [weight.zero])
        return op.MatMulNBits(
            x, *parts, K=columns, N=out, bits=weight.coding.bits,
            block_size=weight.coding.block, accuracy_level=_INT8_PRODUCTS, **_MICROSOFT,
        )  # fmt: skip

    def linear_few_rows(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        """Compute `linear` with the weight on the left.

        Without prepacked weights ONNX Runtime's CPU kernel copies the right operand of a product
        into panels first, which for a few rows takes two to four times as long as the product.
        """
        w = self.matrix(op, weight)
        out, inner = shape_of(w)
        rows = int(shape_of(x)[1])
        y = op.FusedMatMul(w, op.Reshape(x, [-1, inner]), transB=1, **_MICROSOFT)
        y = op.Transpose(typed(y, self.dtype, [out, None]), perm=[1, 0])
        y = op.Reshape(y, [-1, rows, out])
        return y if bias is None else op.Add(y, bias)

    def linear_few_rows_beside(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        return self.linear_few_rows(op, x, weight, bias)

    def linear_transposed_few_rows(self, op: Any, x: ir.Value, weight: Matrix) -> ir.Value:
        """Compute x W as one vector-matrix product per row and block of W.

        The weight on the left would be no better here than on the right (see `linear_few_rows`);
        a block is small enough to stay in the cache.
        """
        out, inner = sizes(weight)
        rows = int(shape_of(x)[1])
        block = next((b for b in range(128, 31, -1) if out % b == 0), out)
        a = op.Transpose(op.Reshape(x, [-1, out // block, 1, block]), perm=[1, 0, 2, 3])
        w = self.reshape_weight(op, weight, [out // block, 1, block, inner], x)
        y = reduce(op, "ReduceSum", op.MatMul(a, w), [0], keepdims=False)
        return op.Reshape(y, [-1, rows, inner])

    def reshape_weight(
        self, op: Any, weight: Matrix, shape: Sequence[int], like: ir.Value
    ) -> ir.Value:
        """Reshape to a shape that is known at run time only, since it is multiplied by B / B.

        ONNX Runtime's constant folding would make a copy otherwise.
        """
        one = op.Div(dim(op, like, 0), dim(op, like, 0))
        w = op.Reshape(self.matrix(op, weight), op.Mul(one, list(shape)))
        return typed(w, self.dtype, shape)

    def matmul_transposed(self, op: Any, a: ir.Value, b: ir.Value) -> ir.Value:
        y = op.FusedMatMul(a, b, transB=1, **_MICROSOFT)
        return typed(y, self.dtype, [*shape_of(a)[:-1], shape_of(b)[-2]])

    def cache_head_dim(self, head_dim: int) -> int:
        """Head size rounded up to what GroupQueryAttention takes."""
        return -(-head_dim // _HEAD_STEP) * _HEAD_STEP

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
        scale = (int(shape_of(q)[-1]) // heads) ** -0.5
        inputs = [q, k, v] if used is None else [q, k, v, None, op.Cast(used, to=INT32)]
        y = op.MultiHeadAttention(*inputs, num_heads=heads, scale=scale, **_MICROSOFT)
        return typed(y, self.dtype, shape_of(q))

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
        assert isinstance(window, CacheWindow) and past is not None
        heads, kv_heads, size = text.num_heads, text.num_kv_heads, text.head_dim
        wide = self.cache_head_dim(size)
        q = _resize_heads(op, self.rope(op, q, window.angles, heads=heads), heads, size, wide)
        k = _resize_heads(op, self.rope(op, k, window.angles, heads=kv_heads), kv_heads, size, wide)
        v = _resize_heads(op, v, kv_heads, size, wide)
        y, key, value = op.GroupQueryAttention(
            q, k, v, past.key, past.value, window.seqlens, window.total,
            num_heads=heads, kv_num_heads=kv_heads, do_rotary=0,
            scale=size**-0.5, _outputs=3, **_MICROSOFT,
        )  # fmt: skip
        typed(y, self.dtype, shape_of(q))
        shape = [shape_of(q)[0], kv_heads, None, wide]
        present = KV(typed(key, self.dtype, shape), typed(value, self.dtype, shape))
        return _resize_heads(op, y, heads, wide, size), present

    def prefill_window(
        self, op: Any, angles: Angles, x: ir.Value, lengths: ir.Value | None, past: Past | None
    ) -> Window:
        assert lengths is not None and past is not None
        return self._window(op, angles, x, lengths, past)

    def decode_window(self, op: Any, angles: Angles, x: ir.Value, past: Past) -> Window:
        return self._window(op, angles, x, constant(op, np.ones(1, np.int64), "one"), past)

    def _window(
        self, op: Any, angles: Angles, x: ir.Value, lengths: ir.Value, past: Past
    ) -> CacheWindow:
        new = dim(op, x, 1)
        seqlens = op.Cast(op.Sub(op.Add(past.lengths, lengths), 1), to=INT32)
        # Prefill: S, which tells the kernel that this is a first prompt. Decode: max past + 1.
        total = op.Add(op.ReduceMax(past.lengths, keepdims=1), new)
        total = op.Cast(op.Squeeze(total, [0]), to=INT32)
        return CacheWindow(angles, seqlens, total)

    def ranks(self, op: Any, score: ir.Value, index: ir.Value) -> ir.Value:
        order = self.descending(op, score, index)
        places = op.Expand(op.Cast(index, to=FLOAT), op.Shape(order))
        return op.ScatterElements(places, order, places, axis=1)

    def descending(self, op: Any, score: ir.Value, index: ir.Value) -> ir.Value:
        """Sort: of equal scores ONNX Runtime's TopK takes the lower index first."""
        return op.TopK(score, op.Shape(index), axis=1, largest=1, sorted=1, _outputs=2)[1]


def _resize_heads(op: Any, x: ir.Value, heads: int, size: int, wanted: int) -> ir.Value:
    """Pad the heads of x [B, S, heads·size] with zeros, or cut them: [B, S, heads·wanted].

    Zeros in queries and keys change no score, and in values none of the columns that are kept.
    """
    if size == wanted:
        return x
    shape = [*shape_of(x)[:2], heads * wanted]
    apart = op.Reshape(x, [0, 0, heads, size])
    if wanted > size:
        apart = op.Pad(apart, [0] * 7 + [wanted - size])
    else:
        apart = op.Slice(apart, [0], [wanted], [3])
    return typed(op.Reshape(apart, [0, 0, heads * wanted]), dtype_of(x), shape)
