"""What a dialect decides about a graph: the operators of each building block."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, NamedTuple

import numpy as np
import onnx_ir as ir

from trio_deploy.bundle.manifest import Kind
from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.values import (
    FLOAT_NAMES,
    INT64,
    cast,
    constant,
    last_two_swapped,
    reduce,
    shape_of,
    typed,
)
from trio_deploy.graphs.weight import Matrix, QuantisedWeight, Weight, sizes
from trio_deploy.quant.narrow_floats import E4M3, MOST_E4M3, input_scale
from trio_deploy.quant.packing import Form
from trio_deploy.quant.schemes import Scheme, head_coding, layer_coding
from trio_deploy.quant.stored_weight import FLOATS, Coding

#: What is beyond it, and what is no number, counts as not finite.
HUGE = 1e38

#: Version of the standard operators that has the type of some codes, with their blocks.
OPSETS_OF_CODES = {"fp8": 19, "int4": 21, "fp4": 23}


class Angles(NamedTuple):
    """cos and sin of the rotary angles, [B, S, D/2]."""

    cos: ir.Value
    sin: ir.Value


class KV(NamedTuple):
    """Keys and values of one layer, [B, G, C, D] each."""

    key: ir.Value
    value: ir.Value


@dataclass(frozen=True)
class Past:
    """The KV cache before a step.

    Attributes:
        lengths: int64 [B], valid tokens per row.
        first: cache of the segment's first layer; those of the others have its shape.
    """

    lengths: ir.Value
    first: KV


@dataclass(frozen=True)
class Window:
    """What the layers of one segment share; each dialect adds masks and places in the cache."""

    angles: Angles


class Dialect(ABC):
    """Operators of the graphs that a runtime reads, and their float type.

    To add a dialect, derive a class from this one, or from one that it resembles, and enter it in
    `table.py`; nothing else knows a dialect's name. Methods take `op`, which writes nodes into the
    graph under construction.

    Attributes:
        name: as users write it.
        opset: version of the standard operators.
        decode_opset: version of the standard operators in decode.onnx.
        domains: further operator sets, domain to version.
        always_decodes_apart: whether bundles always have decode.onnx.
        always_takes_past: whether prefill graphs take a KV cache even beside decode.onnx.
        reads_lengths: whether attention in prefill reads the number of valid tokens per row.
        resizes_in_loops: whether shapes inside a Loop may depend on data.
        takes_matrices_as_inputs: whether products read a matrix as it is stored, so that it may be
            an input of the graph; others transpose constants once, when a graph is loaded.
        nests_loops: whether a Loop in the body of another is cheap; others have its rounds written
            out.
        gathers_in_loops: whether a Gather of few rows of a large matrix is cheap inside a Loop.
        form: layout of codes of quantised matrices.
        dtype: float type of weights, hidden states and the KV cache.
        query_block: queries of a long attention at a time, for runtimes that hold all scores of
            those that they compute at once; None: all queries.
        scheme: how the matrices of decoder layers and of the head are quantised; None: they are
            float.
        kind: of the stage. Matrices of selections have 8 bit at least.
    """

    name: ClassVar[str]
    opset: int
    decode_opset: ClassVar[int]
    domains: ClassVar[Mapping[str, int]] = {}
    always_decodes_apart: ClassVar[bool] = False
    always_takes_past: ClassVar[bool] = False
    reads_lengths: ClassVar[bool] = True
    resizes_in_loops: ClassVar[bool] = False
    nests_loops: ClassVar[bool] = True
    gathers_in_loops: ClassVar[bool] = True
    takes_matrices_as_inputs: ClassVar[bool] = False
    form: ClassVar[Form] = "signed"

    def __init__(
        self,
        dtype: ir.DataType,
        *,
        kind: Kind = "prefill",
        query_block: int | None = None,
        scheme: Scheme | None = None,
    ) -> None:
        self.dtype, self.kind, self.query_block, self.scheme = dtype, kind, query_block, scheme
        if kind == "decode":
            self.opset = self.decode_opset
        if scheme is not None and kind not in ("embed", "select"):  # those have 8 bit alone
            self.opset = max(self.opset, OPSETS_OF_CODES.get(scheme.label, 0))

    @property
    def selects(self) -> bool:
        """Whether the graph is a selection."""
        return self.kind == "select"

    def layer_coding(self, name: str, columns: int) -> Coding | None:
        """How a matrix of a decoder layer with rows of K entries is quantised; None: it is not."""
        return self._coding(layer_coding, name, columns, self.selects)

    def head_coding(self, name: str, columns: int) -> Coding | None:
        """How the output head is quantised; None: it is not."""
        return self._coding(head_coding, name, columns, self.selects)

    def table_coding(self, name: str, columns: int) -> Coding | None:
        """How a table of embeddings that serves as the head is quantised; None: it is not.

        In 8 bit, but beside the head in one graph that dequantises it: that is one matrix.
        """
        as_head = self.kind == "decode" and self.form == "signed"
        return self._coding(head_coding, name, columns, not as_head)

    def _coding(
        self, coding: Callable[..., Coding | None], name: str, columns: int, selects: bool
    ) -> Coding | None:
        if self.scheme is None:
            return None
        dtype = FLOAT_NAMES[self.dtype]
        return coding(self.scheme, name, columns, selects, self.form, dtype)

    def matrix(self, op: Any, weight: Matrix) -> ir.Value:
        """A matrix as a value of the graph's float type, [out, in]."""
        return weight if isinstance(weight, Weight) else weight.dense(op, self.dtype)

    def rows(self, op: Any, weight: Matrix, index: ir.Value) -> ir.Value:
        """Rows of a matrix, int64 [...] → values of the graph's float type [..., in].

        TensorRT takes codes nowhere but before DequantizeLinear. Its compiler dequantises what is
        gathered alone, and so does OpenVINO.
        """
        return op.Gather(self.matrix(op, weight), index, axis=0)

    def product(
        self,
        op: Any,
        x: ir.Value,
        weight: Matrix,
        multiply: Callable[[ir.Value, ir.Value], ir.Value],
    ) -> ir.Value:
        """Compute x Wᵀ by `multiply`, which is given x and W.

        Beside a matrix in E4M3 x is rounded to it, too. Where blocks of W have numbers added to
        them, W is given without, so that it stays a DequantizeLinear alone, and the sums of x per
        block times those numbers are added.
        """
        added = weight.zero if isinstance(weight, QuantisedWeight) else None
        if added is None or not isinstance(weight, QuantisedWeight) or self.selects:
            return multiply(self._rounded(op, x, weight), self.matrix(op, weight))
        y = multiply(x, weight.dense(op, self.dtype, offsets=False))
        lead, (out, columns) = shape_of(x)[:-1], sizes(weight)
        blocks = int(shape_of(added)[1])
        parts = op.Reshape(x, [*(0 for _ in lead), blocks, columns // blocks])
        parts = typed(parts, self.dtype, [*lead, blocks, columns // blocks])
        sums = reduce(op, "ReduceSum", parts, [-1], keepdims=False)
        sums = typed(sums, self.dtype, [*lead, blocks])
        extra = op.MatMul(sums, op.Transpose(cast(op, added, self.dtype), perm=[1, 0]))
        return typed(op.Add(y, extra), self.dtype, [*lead, out])

    def _rounded(self, op: Any, x: ir.Value, weight: Matrix) -> ir.Value:
        """Round x to E4M3 by the scale that belongs to a matrix in it; x itself beside others."""
        if not isinstance(weight, QuantisedWeight) or weight.coding.label != "fp8":
            return x
        assert self.scheme is not None
        most = (self.scheme.inputs or {}).get(str(weight.name), MOST_E4M3)
        kind = FLOATS[FLOAT_NAMES[self.dtype]]
        scale = constant(op, np.array(input_scale(most), kind), f"{weight.name}.input_scale")
        zero = constant(op, np.zeros((), E4M3), "zero_of_e4m3")
        codes = op.QuantizeLinear(x, scale, zero)
        codes = typed(codes, ir.DataType.FLOAT8E4M3FN, shape_of(x))
        return typed(op.DequantizeLinear(codes, scale), self.dtype, shape_of(x))

    def cache_head_dim(self, head_dim: int) -> int:
        """Head size of the KV cache: `head_dim`, or more if the operators pad heads with zeros."""
        return head_dim

    # Products with weights [out, in]

    @abstractmethod
    def linear(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        """Compute x Wᵀ + b, [..., in] → [..., out], without a copy of W.

        A float weight is the initializer of its one part. A quantised one has an initializer per
        part: `matrix` dequantises it, unless a dialect has a product with its codes.
        """

    def linear_transposed(self, op: Any, x: ir.Value, weight: Matrix) -> ir.Value:
        """Compute x W, [..., out] → [..., in]: the backward pass of `linear`."""
        return self.matmul_shared(op, x, self.matrix(op, weight))

    def linear_few_rows(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        """Compute `linear` for x [B, P, in] with few rows P."""
        return self.linear(op, x, weight, bias)

    def linear_few_rows_beside(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None = None
    ) -> ir.Value:
        """Compute `linear_few_rows` beside another one of the same x.

        It is (W xᵀ)ᵀ over another number of axes than that one: TensorRT joins two products that
        are alike, by a matrix that holds both weights, which is a second copy where the backward
        pass uses them, too.
        """
        return self._weight_on_the_left(op, x, weight, bias, lead=[])

    def _weight_on_the_left(
        self, op: Any, x: ir.Value, weight: Matrix, bias: ir.Value | None, lead: list[int]
    ) -> ir.Value:
        """Compute (W xᵀ)ᵀ + b for x [B, P, in], of which the product sees [*lead, B·P, in]."""
        w = self.matrix(op, weight)
        out, inner = shape_of(w)
        rows, swapped = int(shape_of(x)[1]), last_two_swapped(len(lead) + 2)
        y = op.MatMul(w, op.Transpose(op.Reshape(x, [*lead, -1, inner]), perm=swapped))
        y = op.Transpose(typed(y, self.dtype, [*lead, out, None]), perm=swapped)
        y = op.Reshape(y, [-1, rows, out])
        return y if bias is None else op.Add(y, bias)

    def linear_transposed_few_rows(self, op: Any, x: ir.Value, weight: Matrix) -> ir.Value:
        """Compute `linear_transposed` for x [B, P, out] with few rows P."""
        return self.linear_transposed(op, x, weight)

    def reshape_weight(
        self, op: Any, weight: Matrix, shape: Sequence[int], like: ir.Value
    ) -> ir.Value:
        """Reshape a weight without a second copy of it; `like` is any value [B, ...]."""
        return op.Reshape(self.matrix(op, weight), list(shape))

    # Other operators

    def matmul_transposed(self, op: Any, a: ir.Value, b: ir.Value) -> ir.Value:
        """Compute a bᵀ over the last two axes."""
        return op.MatMul(a, op.Transpose(b, perm=last_two_swapped(len(shape_of(b)))))

    def matmul_shared(self, op: Any, x: ir.Value, w: ir.Value) -> ir.Value:
        """Compute x w over the last two axes, for a constant w that the graph may also take as wᵀ.

        Every product with such a matrix is this one or one with its transpose, so a dialect whose
        runtime confuses the two needs another form here alone.
        """
        return op.MatMul(x, w)

    def rms_norm(self, op: Any, x: ir.Value, weight: ir.Value, eps: float) -> ir.Value:
        """Compute x / sqrt(mean(x²) + ε) ∘ w over the last axis, in fp32."""
        return op.RMSNormalization(x, weight, axis=-1, epsilon=eps)

    def rope(
        self,
        op: Any,
        x: ir.Value,
        angles: Angles,
        *,
        heads: int | None = None,
        inverse: bool = False,
    ) -> ir.Value:
        """Rotate x [B, N, S, D], or [B, S, N·D] if `heads` = N; `inverse` rotates back.

        The angles must have the type of x.
        """
        sin = op.Neg(angles.sin) if inverse else angles.sin
        attributes = {} if heads is None else {"num_heads": heads}
        return op.RotaryEmbedding(x, angles.cos, sin, **attributes)

    @abstractmethod
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
        """Attend from every row to every row: q, k, v [T, N, h] → [T, N, h].

        Args:
            used: bool [T, N], the rows that may be attended to, of which every T has one; None:
                all.
            long: whether N has no bound: `query_block` queries at a time then attend, if it is set
                and the runtime's own operator does not do so.
        """

    @abstractmethod
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
        """Rotate queries and keys, update the cache and attend to it causally.

        q [B, S, H·D], k and v [B, S, G·D], `past` [B, G, C, D] → [B, S, H·D] and the cache
        afterwards; the cache's D is `cache_head_dim`.
        """

    @abstractmethod
    def prefill_window(
        self, op: Any, angles: Angles, x: ir.Value, lengths: ir.Value | None, past: Past | None
    ) -> Window:
        """Prepare the attention of a prefill graph over x [B, S, d].

        `lengths` is int64 [B], the valid new tokens per row. Without `past`, decode.onnx takes the
        later steps. With it, the graph runs those, too: the first prompt then has C = 0 and
        past lengths 0, and each later step S = 1 and lengths 1.
        """

    @abstractmethod
    def decode_window(self, op: Any, angles: Angles, x: ir.Value, past: Past) -> Window:
        """Prepare the attention of decode.onnx over one new token per row, x [B, 1, d]."""

    def ranks(self, op: Any, score: ir.Value, index: ir.Value) -> ir.Value:
        """Number the tokens of each row by descending score [B, S], ties by `index` int64 [S].

        Returns f32 [B, S], the number of tokens ahead of each: OpenVINO and TensorRT do not
        document what TopK does with ties, and TensorRT sorts no more than 3840 values. A score that
        is not finite comes last, since runtimes differ in how they compare it.
        """
        score = op.Where(op.Less(score, HUGE), score, -HUGE)
        own, other = op.Unsqueeze(score, [2]), op.Unsqueeze(score, [1])
        earlier = op.Less(op.Unsqueeze(index, [0]), op.Unsqueeze(index, [1]))  # [S, S]
        ahead = op.Or(op.Greater(other, own), op.And(op.Equal(other, own), earlier))
        return reduce(op, "ReduceSum", op.Where(ahead, 1.0, 0.0), [2], keepdims=False)

    def descending(self, op: Any, score: ir.Value, index: ir.Value) -> ir.Value:
        """Order the tokens of each row by `ranks`: their indices, int64 [B, S]."""
        rank = op.Cast(self.ranks(op, score, index), to=INT64)
        return op.ScatterElements(rank, rank, op.Expand(index, op.Shape(rank)), axis=1)

    def running_sum(self, op: Any, flags: ir.Value) -> ir.Value:
        """Count the ones of `flags` f32 [B, L] up to and including each place: f32 [B, L]."""
        return op.CumSum(flags, 1)
