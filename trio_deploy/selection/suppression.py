"""Which visual tokens stay at a pruning point, given their saliency.

Greedy non-maximum suppression is the fixed point of
``keep_i = not exists j: keep_j and cosine_ji >= threshold and j ranked before i`` iterated from all
ones. It is computed exactly and without the N x N similarity: an outer Loop takes the next M best
candidates, suppresses them by what is kept already (M x K), and an inner Loop runs the fixed point
among them (M x M). It ends when every row has its budget or has no candidate left.

Formulated for runtimes with fragile loops: loop states never change their shape, nothing in a body
has a data-dependent shape (but where the dialect resizes in loops, a block is compared with no more
than is kept by then), and no index is scattered to twice.

B rows, S tokens, N of them visual, d hidden size, M block size, K capacity for kept tokens,
R = M ceil(S / M) ranks, W width after pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.values import BOOL, FLOAT, INT64, cast, constant, dim, reduce, running_sum
from trio_deploy.selection.saliency import Tokens

BLOCK = 256

NO_CANDIDATE = -1.0  # scores of what is not visual,
PADDING = -2.0  # of the M columns that make every TopK long enough,
SEEN = -3.0  # of what a block has taken: it never comes up again, since padding suffices
_END = np.iinfo(np.int64).max  # of a slice
NORM_FLOOR = 1e-12  # a zero row has cosine 0 with everything, and no NaN


def compact(op: Any, mask: ir.Value, index: ir.Value, width: ir.Value) -> tuple[ir.Value, ir.Value]:
    """The places where `mask` [B,S] holds, ascending, -1 behind: int64 [B,W]; their number [B].

    By cumulative sum and scatter: a TopK over all kept tokens would be too long for TensorRT.
    """
    shape = op.Shape(mask)
    index = op.Expand(index, shape)
    flags = cast(op, mask, FLOAT)
    # what stays goes to its rank, what goes to a place of its own behind the W columns
    rank = op.Cast(op.Sub(running_sum(op, flags), 1.0), to=INT64)
    slot = op.Where(mask, rank, op.Add(index, width))
    room = op.Concat(dim(op, mask, 0), op.Add(dim(op, mask, 1), width), axis=0)
    room = op.ConstantOfShape(room, value=ir.tensor(np.array([-1], np.int64)))
    packed = op.ScatterElements(room, slot, index, axis=1)
    packed = op.Slice(packed, [0], width, [1])
    return packed, op.Cast(reduce(op, "ReduceSum", flags, [1], keepdims=False), to=INT64)


def select(
    op: Any,
    d: Dialect,
    tokens: Tokens,
    *,
    scores: ir.Value,
    keep: ir.Value,
    capacity: ir.Value,
    threshold: float,
    block: int = BLOCK,
) -> tuple[ir.Value, ir.Value]:
    """Exact greedy NMS by descending score (ties: lower index), filled up to `keep`.

    Args:
        scores: [B,S] f32, not negative.
        keep: int64 [B]; a row with keep >= N keeps all its visual tokens.
        capacity: K, int64 [1], at least every `keep` that is below its row's N.
        threshold: a kept token suppresses those with a cosine of at least this; positive.
        block: M; half of it where the dialect resizes in loops: rounds are cheap and rows dear.

    Returns:
        The visual tokens that stay, bool [B,S], and whether the row's fixed points were reached,
        bool [B].
    """
    block = max(block // 2, 1) if d.resizes_in_loops else block
    batch, length = dim(op, tokens.x, 0), dim(op, tokens.x, 1)
    available = reduce(op, "ReduceSum", op.Cast(tokens.visual, to=FLOAT), [1])  # [B,1]
    keep = op.Unsqueeze(keep, [1])
    prunes = op.Less(keep, op.Cast(available, to=INT64))
    need = op.Cast(op.Where(prunes, keep, 0), to=FLOAT)  # [B,1]
    norms = op.Max(op.Sqrt(op.Squeeze(tokens.squares, [2])), NORM_FLOOR)  # [B,S]
    last = op.Sub(length, 1)
    before = _before(op, block)
    up_to = constant(op, np.triu(np.ones((block, block), np.float32)), f"up_to_{block}")
    ranks = op.Range(0, block, 1)
    slots = op.Unsqueeze(op.Cast(op.Range(0, op.Squeeze(capacity, [0]), 1), to=FLOAT), [0])

    def full(columns: ir.Value, value: Any) -> ir.Value:
        shape = op.Concat(batch, columns, axis=0)
        return op.ConstantOfShape(shape, value=ir.tensor(np.array([value])))

    one = constant(op, np.array([1]), "one")
    blocks = op.Div(op.Add(length, block - 1), block)  # int64 [1]
    places = op.Range(0, op.Squeeze(op.Mul(blocks, block), [0]), 1)  # all ranks
    candidates = op.Less(op.Unsqueeze(op.Cast(places, to=FLOAT), [0]), available)  # [B,R]
    # the token of each rank, and behind the S tokens places of their own [B,R]
    order = d.descending(op, op.Where(tokens.visual, scores, NO_CANDIDATE), tokens.index)
    rest = op.Slice(places, length, [_END], [0])
    order = op.Concat(order, op.Expand(rest, op.Concat(batch, [1], axis=0)), axis=1)
    start = [
        full(op.Mul(blocks, block), np.float32(0)),  # 1 where a rank is kept [B,R]
        full(op.Add(capacity, block), np.int64(0)),  # tokens kept so far, then scrap [B,K+M]
        full(one, np.float32(0)),  # how many they are [B,1]
        full(one, np.float32(1)),  # 1 while every fixed point was reached [B,1]
    ]

    def take_block(
        op: Any,
        iteration: ir.Value,
        status: ir.Value,
        buffer: ir.Value,
        count: ir.Value,
        converged: ir.Value,
    ) -> tuple[ir.Value, list[ir.Value]]:
        mine = op.Add(ranks, op.Mul(iteration, block))
        candidate = op.Gather(candidates, mine, axis=1)  # [B,M]
        token = op.Min(op.Gather(order, mine, axis=1), last)  # what is no candidate never counts
        # cosines with what is kept and with one another
        held = _most(op, count) if d.resizes_in_loops else capacity
        both = op.Concat(op.Slice(buffer, [0], held, [1]), token, axis=1)
        rows = cast(op, op.Gather(tokens.flat, op.Add(both, tokens.offset), axis=0), FLOAT)
        own_rows = op.Slice(rows, held, [_END], [1])
        bound = op.GatherElements(norms, both, axis=1)  # [B,K+M]
        own = op.Mul(op.Slice(bound, held, [_END], [1]), threshold)
        bound = op.Mul(op.Unsqueeze(own, [2]), op.Unsqueeze(bound, [1]))
        dots = op.MatMul(own_rows, op.Transpose(rows, perm=[0, 2, 1]))  # [B,M,K+M]
        similar = op.GreaterOrEqual(dots, bound)
        by_kept = op.Slice(similar, [0], held, [2])
        filled = op.Less(op.Slice(slots, [0], held, [1]), count)
        by_kept = op.And(by_kept, op.Unsqueeze(filled, [1]))
        hits = reduce(op, "ReduceSum", op.Cast(by_kept, to=FLOAT), [2], keepdims=False)
        alive = op.And(op.And(candidate, op.Less(count, need)), op.Less(hits, 0.5))
        kept, changed = _fixed_point(
            op,
            op.Cast(alive, to=FLOAT),
            op.Cast(op.And(op.Slice(similar, held, [_END], [2]), before), to=FLOAT),
            block,
        )
        # no more than the budget, best first
        total = op.Add(op.MatMul(kept, up_to), count)
        taken = op.And(op.Greater(kept, 0.5), op.LessOrEqual(total, need))
        slot = op.Cast(op.Sub(total, 1.0), to=INT64)
        slot = op.Where(taken, slot, op.Add(ranks, capacity))
        buffer = op.ScatterElements(buffer, slot, token, axis=1)
        taken = op.Cast(taken, to=FLOAT)
        count = op.Add(count, reduce(op, "ReduceSum", taken, [1]))
        converged = op.Mul(converged, op.Cast(op.Less(changed, 0.5), to=FLOAT))
        places_now = op.Add(op.Mul(token, 0), mine)  # [B,M]
        status = op.ScatterElements(status, places_now, taken, axis=1)
        seen = op.Cast(op.Mul(op.Add(iteration, 1), block), to=FLOAT)
        more = op.And(op.Less(count, need), op.Less(seen, available))
        return any_of(op, more), [status, buffer, count, converged]

    status, _, count, converged = loop(
        op, op.Squeeze(blocks, [0]), any_of(op, op.Greater(need, 0.0)), start, take_block, "blocks"
    )
    # fill up with the best of what was suppressed
    kept = op.Greater(status, 0.5)
    suppressed = op.And(candidates, op.Not(kept))
    turn = running_sum(op, op.Cast(suppressed, to=FLOAT))
    filling = op.And(suppressed, op.LessOrEqual(turn, op.Sub(need, count)))
    picked = op.Cast(op.Or(kept, filling), to=FLOAT)
    chosen = op.ScatterElements(op.Mul(picked, 0.0), order, picked, axis=1)
    chosen = op.Greater(op.Slice(chosen, [0], length, [1]), 0.5)
    mask = op.And(tokens.visual, op.Or(chosen, op.Not(prunes)))
    return mask, op.Greater(op.Squeeze(converged, [1]), 0.5)


def _fixed_point(
    op: Any, alive: ir.Value, conflict: ir.Value, block: int
) -> tuple[ir.Value, ir.Value]:
    """Greedy NMS among `alive` [B,M] in rank order; conflict [B,M,M]: i is suppressed by j.

    Returns:
        What is kept, 0 or 1 [B,M], and how many places the last round changed [B,1].
    """

    def settle(
        op: Any, _iteration: ir.Value, kept: ir.Value, _changed: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        hits = op.Squeeze(op.MatMul(conflict, op.Unsqueeze(kept, [2])), [2])
        after = op.Mul(alive, op.Cast(op.Less(hits, 0.5), to=FLOAT))
        changed = reduce(op, "ReduceSum", op.Abs(op.Sub(after, kept)), [1])
        return any_of(op, op.Greater(changed, 0.5)), [after, changed]

    # every round settles one more rank at least, and one more round sees that nothing moves
    kept, changed = loop(
        op,
        op.Squeeze(constant(op, np.array([block + 1]), "rounds"), [0]),
        any_of(op, op.Greater(alive, 0.5)),
        [alive, op.Mul(reduce(op, "ReduceSum", alive, [1]), 0.0)],
        settle,
        "fixed_point",
    )
    return kept, changed


def next_best(op: Any, score: ir.Value, block: int) -> tuple[ir.Value, ir.Value]:
    """The M best of each row, descending, and their indices: both [B,M].

    Ties go to the lower index whatever the runtime's TopK does about them (OpenVINO's and
    TensorRT's promise nothing): only the value of the M-th best is taken from it.
    """
    values, _ = op.TopK(score, [block], axis=1, largest=1, sorted=1, _outputs=2)
    least = op.Slice(values, [block - 1], [block], [1])  # [B,1]
    above, level = op.Greater(score, least), op.Equal(score, least)
    room = op.Sub(float(block), reduce(op, "ReduceSum", op.Cast(above, to=FLOAT), [1]))
    turn = running_sum(op, op.Cast(level, to=FLOAT))
    inside = op.Or(above, op.And(level, op.LessOrEqual(turn, room)))  # exactly M a row
    columns = op.Range(0, op.Squeeze(dim(op, score, 1), [0]), 1)
    index, _ = compact(op, inside, columns, constant(op, np.array([block]), f"block_{block}"))
    value = op.GatherElements(score, index, axis=1)
    mine, other = op.Unsqueeze(value, [2]), op.Unsqueeze(value, [1])
    tied_before = op.And(op.Equal(other, mine), _before(op, block))
    ahead = op.Cast(op.Or(op.Greater(other, mine), tied_before), to=FLOAT)
    rank = op.Cast(reduce(op, "ReduceSum", ahead, [2], keepdims=False), to=INT64)
    return (
        op.ScatterElements(value, rank, value, axis=1),
        op.ScatterElements(index, rank, index, axis=1),
    )


def _before(op: Any, block: int) -> ir.Value:
    """[1,M,M] bool: j comes before i."""
    return constant(op, np.tril(np.ones((1, block, block), np.bool_), -1), f"before_{block}")


def _most(op: Any, count: ir.Value) -> ir.Value:
    """The greatest entry of `count` f32 [B,1], int64 [1]."""
    return op.Reshape(op.Cast(op.ReduceMax(count), to=INT64), [1])


def any_of(op: Any, flags: ir.Value) -> ir.Value:
    """Whether any of `flags` holds: bool scalar."""
    return op.Greater(op.ReduceSum(op.Cast(flags, to=FLOAT), keepdims=0), 0.5)


def loop(
    op: Any,
    trips: ir.Value,
    start: ir.Value,
    states: Sequence[ir.Value],
    body: Callable[..., tuple[ir.Value, list[ir.Value]]],
    name: str,
) -> list[ir.Value]:
    """A Loop of at most `trips` rounds that goes on while `body` says so.

    Args:
        trips: int64 scalar.
        start: bool scalar, whether the first round runs.
        states: loop-carried values; their types and shapes hold through all rounds.
        body: called once as ``body(op, iteration, *states)``; returns (go on, new states).
    """

    def trace(inner: Any, iteration: ir.Value, _go: ir.Value, *inside: ir.Value) -> list[ir.Value]:
        inner.builder.push_module(name)  # its values must not share names with the outer graph's
        go_on, after = body(inner, iteration, *inside)
        outputs = [inner.Identity(value) for value in (go_on, *after)]
        inner.builder.pop_module()
        return outputs

    def carried(kind: str) -> list[ir.Value]:
        return [
            ir.Value(name=f"{name}.{kind}.{i}", type=s.type, shape=s.shape)
            for i, s in enumerate(states)
        ]

    graph = op.builder.subgraph(
        trace,
        [
            ir.Value(name=f"{name}.round", type=ir.TensorType(INT64), shape=ir.Shape([])),
            ir.Value(name=f"{name}.go", type=ir.TensorType(BOOL), shape=ir.Shape([])),
            *carried("in"),
        ],
        [
            ir.Value(name=f"{name}.go_on", type=ir.TensorType(BOOL), shape=ir.Shape([])),
            *carried("out"),
        ],
        name=name,
    )
    results = list(op.Loop(trips, start, *states, body=graph, _outputs=len(states)))
    for value, state in zip(results, states, strict=True):
        value.type, value.shape = state.type, state.shape
    return results
