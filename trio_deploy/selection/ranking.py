"""The greatest scores of each row, as graphs whose ties do not depend on the runtime.

B rows, S tokens, M block size, W width after pruning.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.loops import any_of, loop
from trio_deploy.graphs.values import FLOAT, INT64, cast, constant, dim, filled, reduce
from trio_deploy.selection.choice import Value

NO_CANDIDATE = -1.0
"""Score of a token that cannot be chosen."""
_PADDING = -2.0  # of the M columns that make every TopK long enough
_TAKEN = -3.0  # of what a block has taken: below the padding, so it is not taken again


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


def greatest(
    op: Any,
    d: Dialect,
    score: Value,
    among: Value,
    count: Value,
    block: int,
    name: str = "ranks",
) -> Value:
    """Mark the `count` f32 [B,1] greatest of `score` f32 [B,S] ≥ 0 among the tokens of `among`.

    Ties go to the lower index. M ranks are taken at a time.

    Args:
        among: bool [B,S].
        name: of the loop, unique in the graph.

    Returns:
        bool [B,S].
    """
    batch, length = dim(op, score, 0), dim(op, score, 1)
    padding = filled(op, op.Concat(batch, [block], axis=0), np.float32(_PADDING))
    left = op.Concat(op.Where(among, score, NO_CANDIDATE), padding, axis=1)  # [B,S+M]
    ranks = op.Range(0.0, float(block), 1.0)

    def take_block(op: Any, turn: Value, left: Value, chosen: Value) -> tuple[Value, list[Value]]:
        best, index = next_best(op, d, left, block)
        start = op.Mul(op.Cast(turn, to=FLOAT), float(block))
        taken = op.And(op.GreaterOrEqual(best, 0.0), op.Less(op.Add(ranks, start), count))
        taken = op.Cast(taken, to=FLOAT)
        chosen = op.ScatterElements(chosen, index, taken, axis=1)
        left = op.ScatterElements(left, index, op.Add(op.Mul(taken, 0.0), _TAKEN), axis=1)
        return any_of(op, op.Less(op.Add(start, float(block)), count)), [left, chosen]

    trips = op.Squeeze(op.Div(op.Add(length, block - 1), block), [0])
    start = any_of(op, op.Greater(count, 0.0))
    _, chosen = loop(op, trips, start, [left, op.Mul(left, 0.0)], take_block, name)
    return op.Greater(op.Slice(chosen, [0], length, [1]), 0.5)


def largest(op: Any, d: Dialect, score: Value, among: Value, count: int) -> tuple[Value, Value]:
    """Find the `count` greatest of `score` [B,S] ≥ 0 among the tokens of `among`, descending.

    Returns:
        Their indices int64 [B,count], and which of them exist, bool [B,count]. One that does not
        exist points at the last token.
    """
    shape = op.Concat(dim(op, score, 0), [count], axis=0)
    padding = filled(op, shape, np.float32(_PADDING))
    padded = op.Concat(op.Where(among, score, NO_CANDIDATE), padding, axis=1)
    best, index = next_best(op, d, padded, count)
    return op.Min(index, op.Sub(dim(op, score, 1), 1)), op.GreaterOrEqual(best, 0.0)


def next_best(op: Any, d: Dialect, score: Value, block: int) -> tuple[Value, Value]:
    """The M greatest of each row, descending, and their indices: both [B,M].

    Ties go to the lower index whatever the runtime's TopK does about them (OpenVINO's and
    TensorRT's promise nothing): only the value of the M-th greatest is taken from it.
    """
    values, _ = op.TopK(score, [block], axis=1, largest=1, sorted=1, _outputs=2)
    least = op.Slice(values, [block - 1], [block], [1])  # [B,1]
    above, level = op.Greater(score, least), op.Equal(score, least)
    left = op.Sub(float(block), reduce(op, "ReduceSum", op.Cast(above, to=FLOAT), [1]))
    turn = d.running_sum(op, op.Cast(level, to=FLOAT))
    inside = op.Or(above, op.And(level, op.LessOrEqual(turn, left)))  # exactly M per row
    columns = op.Range(0, op.Squeeze(dim(op, score, 1), [0]), 1)
    index, _ = compact(op, d, inside, columns, constant(op, np.array([block]), f"block_{block}"))
    value = op.GatherElements(score, index, axis=1)
    mine, other = op.Unsqueeze(value, [2]), op.Unsqueeze(value, [1])
    tied_before = op.And(op.Equal(other, mine), earlier(op, block))
    ahead = op.Cast(op.Or(op.Greater(other, mine), tied_before), to=FLOAT)
    rank = op.Cast(reduce(op, "ReduceSum", ahead, [2], keepdims=False), to=INT64)
    return (
        op.ScatterElements(value, rank, value, axis=1),
        op.ScatterElements(index, rank, index, axis=1),
    )


def earlier(op: Any, block: int) -> Value:
    """The mask of j before i, bool [1,M,M]."""
    return constant(op, np.tril(np.ones((1, block, block), np.bool_), -1), f"before_{block}")
