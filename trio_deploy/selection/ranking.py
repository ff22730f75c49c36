"""The greatest scores of each row, as graphs whose ties do not depend on the runtime.

B rows, S tokens, W width after pruning.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.values import FLOAT, INT64, cast, constant, dim, filled, reduce
from trio_deploy.selection.choice import Value

NO_CANDIDATE = -1.0
"""Score of a token that cannot be chosen."""


def compact(op: Any, d: Dialect, mask: Value, index: Value, width: Value) -> tuple[Value, Value]:
    """The places where `mask` [B,S] holds, ascending, -1 behind: int64 [B,W]; their number [B].

    By cumulative sum and scatter: a TopK over all kept tokens would be too long for TensorRT.
    """
    shape = op.Shape(mask)
    index = op.Expand(index, shape)
    flags = cast(op, mask, FLOAT)
    # A token that stays goes to its rank, any other to a place of its own behind the W columns.
    rank = op.Cast(op.Sub(d.running_sum(op, flags), 1.0), to=INT64)
    slot = op.Where(mask, rank, op.Add(index, width))
    size = op.Concat(dim(op, mask, 0), op.Add(dim(op, mask, 1), width), axis=0)
    packed = op.ScatterElements(filled(op, size, np.int64(-1)), slot, index, axis=1)
    packed = op.Slice(packed, [0], width, [1])
    return packed, op.Cast(reduce(op, "ReduceSum", flags, [1], keepdims=False), to=INT64)


def greatest(op: Any, d: Dialect, score: Value, among: Value, count: Value, index: Value) -> Value:
    """Mark the `count` f32 [B,1] greatest of `score` f32 [B,S] ≥ 0 among the tokens of `among`.

    Ties go to the lower index. No loop and no TopK: their lengths would depend on the counts, for
    which TensorRT's host would have to wait.

    Args:
        among: bool [B,S].
        index: int64 [S], 0…S-1.

    Returns:
        bool [B,S].
    """
    rank = d.ranks(op, op.Where(among, score, NO_CANDIDATE), index)
    return op.And(among, op.Less(rank, count))


def largest(
    op: Any, d: Dialect, score: Value, among: Value, count: int, index: Value
) -> tuple[Value, Value]:
    """Find the `count` greatest of `score` [B,S] ≥ 0 among the tokens of `among`, descending.

    Returns:
        Their indices int64 [B,count], and which of them exist, bool [B,count]. One that does not
        exist points at the first token.
    """
    rank = d.ranks(op, op.Where(among, score, NO_CANDIDATE), index)
    wanted = constant(op, np.arange(count, dtype=np.float32)[None, :, None], f"first_{count}")
    hit = op.And(op.Equal(op.Unsqueeze(rank, [1]), wanted), op.Unsqueeze(among, [1]))
    hit = op.Cast(hit, to=FLOAT)  # [B,count,S]
    place = reduce(op, "ReduceSum", op.Mul(hit, op.Cast(index, to=FLOAT)), [2], keepdims=False)
    exists = op.Greater(reduce(op, "ReduceSum", hit, [2], keepdims=False), 0.5)
    return op.Cast(place, to=INT64), exists
