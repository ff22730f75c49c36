"""Greedy non-maximum suppression of visual tokens, as a graph.

What greedy suppression keeps is the fixed point of
``keep_i = not exists j: keep_j and cosine_ji >= threshold and j ranked before i``, iterated from
all ones. It is computed exactly and without the N x N similarity: an outer Loop takes the next M
ranks, suppresses them by what is kept already (M x K), and an inner Loop runs the fixed point among
them (M x M). It ends when every row has its budget or has no candidate left.

Formulated for runtimes with fragile loops: loop states never change their shape, nothing in a body
has a data-dependent shape (but if the dialect resizes in loops, a block is compared with no more
than is kept by then), and no index is scattered to twice.

B rows, S tokens, N of them visual, d hidden size, M block size, K capacity for kept tokens,
R = M (ceil(S / M) + 1) ranks.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.loops import any_of, loop_while
from trio_deploy.graphs.values import FLOAT, INT64, cast, constant, dim, filled, reduce
from trio_deploy.selection.choice import Value
from trio_deploy.selection.ranking import NO_CANDIDATE
from trio_deploy.selection.saliency import Tokens

BLOCK = 256
"""M, ranks that are worked through at a time."""
NORM_FLOOR = 1e-12
"""Least norm of a row: a zero row has cosine 0 with every other, and no NaN."""
_ROUNDS = 2
"""Rounds of a fixed point between two questions whether it is reached."""
_END = np.iinfo(np.int64).max  # of a slice


@dataclass(frozen=True)
class _Ranks:
    """The tokens of each row by falling score.

    Attributes:
        tokens: int64 [B,R], the token of each rank; behind the S tokens, places of their own.
        candidates: bool [B,R], ranks of visual tokens.
        blocks: int64 [1], ceil(S / M) + 1. The last one has no candidates: a round too many, as
            TensorRT's parser has run (onnx-tensorrt's issue 891), writes there and to no token.
        available: f32 [B,1], N.
        prunes: bool [B,1], whether the row keeps less than it has.
        need: f32 [B,1], tokens to choose, 0 where the row keeps all it has.
    """

    tokens: Value
    candidates: Value
    blocks: Value
    available: Value
    prunes: Value
    need: Value


@dataclass(frozen=True)
class _Survivors:
    """Ranks that are kept.

    Attributes:
        status: f32 [B,R], 1 where a rank is kept.
        count: f32 [B,1], how many they are.
        converged: f32 [B,1], 1 if every fixed point was reached.
    """

    status: Value
    count: Value
    converged: Value


@dataclass(frozen=True)
class Suppression:
    """Exact greedy suppression by descending score (ties: lower index), filled up to `keep`.

    Attributes:
        keep: int64 [B]; a row with keep >= N keeps all its visual tokens.
        capacity: K, int64 [1], at least every `keep` that is below its row's N.
        threshold: positive cosine from which a kept token suppresses another.
        block: M; half of it if the dialect resizes in loops: rounds are cheap and rows dear.
    """

    d: Dialect
    tokens: Tokens
    keep: Value
    capacity: Value
    threshold: float
    block: int = BLOCK

    def select(self, op: Any, scores: Value) -> tuple[Value, Value]:
        """Choose by scores f32 [B,S], not negative.

        Returns:
            The visual tokens that stay, bool [B,S], and whether the row's fixed points were
            reached, bool [B].
        """
        ranks = self.order(op, scores)
        survivors = self.fixed_points(op, ranks)
        chosen = self.fill_up(op, ranks, survivors)
        kept = op.And(self.tokens.visual, op.Or(chosen, op.Not(ranks.prunes)))
        return kept, op.Greater(op.Squeeze(survivors.converged, [1]), 0.5)

    def order(self, op: Any, scores: Value) -> _Ranks:
        """Rank the tokens by falling score."""
        tokens, block = self.tokens, self._ranks_at_once
        length = dim(op, tokens.x, 1)
        available = reduce(op, "ReduceSum", op.Cast(tokens.visual, to=FLOAT), [1])
        keep = op.Unsqueeze(self.keep, [1])
        prunes = op.Less(keep, op.Cast(available, to=INT64))
        blocks = op.Add(op.Div(op.Add(length, block - 1), block), 1)
        places = op.Range(0, op.Squeeze(op.Mul(blocks, block), [0]), 1)  # all ranks
        order = self.d.descending(op, op.Where(tokens.visual, scores, NO_CANDIDATE), tokens.index)
        rest = op.Slice(places, length, [_END], [0])
        rest = op.Expand(rest, op.Concat(dim(op, tokens.x, 0), [1], axis=0))
        return _Ranks(
            tokens=op.Concat(order, rest, axis=1),
            candidates=op.Less(op.Unsqueeze(op.Cast(places, to=FLOAT), [0]), available),
            blocks=blocks,
            available=available,
            prunes=prunes,
            need=op.Cast(op.Where(prunes, keep, 0), to=FLOAT),
        )

    def fixed_points(self, op: Any, ranks: _Ranks) -> _Survivors:
        """Keep, block after block of ranks, what nothing kept before it suppresses."""
        tokens, capacity, need, block = self.tokens, self.capacity, ranks.need, self._ranks_at_once
        batch, last = dim(op, tokens.x, 0), op.Sub(dim(op, tokens.x, 1), 1)
        norms = op.Max(op.Sqrt(op.Squeeze(tokens.squares, [2])), NORM_FLOOR)  # [B,S]
        up_to = constant(op, np.triu(np.ones((block, block), np.float32)), f"up_to_{block}")
        columns = op.Range(0, block, 1)
        slots = op.Unsqueeze(op.Cast(op.Range(0, op.Squeeze(capacity, [0]), 1), to=FLOAT), [0])
        before = constant(op, np.triu(np.ones((1, block, block), np.bool_), 1), f"before_{block}")

        def full(width: Value, value: Any) -> Value:
            return filled(op, op.Concat(batch, width, axis=0), value)

        one = constant(op, np.array([1]), "one")
        start = [
            full(op.Mul(ranks.blocks, block), np.float32(0)),  # 1 where a rank is kept [B,R]
            full(op.Add(capacity, block), np.int64(0)),  # tokens kept so far, then scrap [B,K+M]
            full(one, np.float32(0)),  # how many they are [B,1]
            full(one, np.float32(1)),  # 1 while every fixed point was reached [B,1]
        ]

        def take_block(
            op: Any,
            iteration: Value,
            status: Value,
            buffer: Value,
            count: Value,
            converged: Value,
        ) -> tuple[Value, list[Value]]:
            number = op.Min(iteration, op.Sub(ranks.blocks, 1))
            mine = op.Add(columns, op.Mul(number, block))
            candidate = op.Gather(ranks.candidates, mine, axis=1)  # [B,M]
            # No candidate: any token, it never counts.
            token = op.Min(op.Gather(ranks.tokens, mine, axis=1), last)
            compared = _greatest_count(op, count) if self.d.resizes_in_loops else capacity
            similar = self._similar(op, norms, buffer, token, compared)  # [B,K+M,M]
            by_kept = op.Slice(similar, [0], compared, [1])
            taken = op.Less(op.Slice(slots, [0], compared, [1]), count)
            by_kept = op.And(by_kept, op.Unsqueeze(taken, [2]))
            hits = reduce(op, "ReduceSum", op.Cast(by_kept, to=FLOAT), [1], keepdims=False)
            alive = op.And(op.And(candidate, op.Less(count, need)), op.Less(hits, 0.5))
            kept, changed = _fixed_point(
                op,
                op.Cast(alive, to=FLOAT),
                op.Cast(op.And(op.Slice(similar, compared, [_END], [1]), before), to=FLOAT),
                block,
            )
            # No more than the budget, best first.
            total = op.Add(op.MatMul(kept, up_to), count)
            taken = op.And(op.Greater(kept, 0.5), op.LessOrEqual(total, need))
            slot = op.Cast(op.Sub(total, 1.0), to=INT64)
            slot = op.Where(taken, slot, op.Add(columns, capacity))
            buffer = op.ScatterElements(buffer, slot, token, axis=1)
            taken = op.Cast(taken, to=FLOAT)
            count = op.Add(count, reduce(op, "ReduceSum", taken, [1]))
            converged = op.Mul(converged, op.Cast(op.Less(changed, 0.5), to=FLOAT))
            places = op.Add(op.Mul(token, 0), mine)  # [B,M]
            status = op.ScatterElements(status, places, taken, axis=1)
            done = op.Cast(op.Mul(op.Add(iteration, 1), block), to=FLOAT)
            more = op.And(op.Less(count, need), op.Less(done, ranks.available))
            return any_of(op, more), [status, buffer, count, converged]

        status, _, count, converged = loop_while(op, start, take_block, "blocks")
        return _Survivors(status, count, converged)

    def fill_up(self, op: Any, ranks: _Ranks, survivors: _Survivors) -> Value:
        """Add the best suppressed tokens up to the budget: bool [B,S]."""
        kept = op.Greater(survivors.status, 0.5)
        suppressed = op.And(ranks.candidates, op.Not(kept))
        turn = self.d.running_sum(op, op.Cast(suppressed, to=FLOAT))
        missing = op.Sub(ranks.need, survivors.count)
        filling = op.And(suppressed, op.LessOrEqual(turn, missing))
        picked = op.Cast(op.Or(kept, filling), to=FLOAT)
        chosen = op.ScatterElements(op.Mul(picked, 0.0), ranks.tokens, picked, axis=1)
        return op.Greater(op.Slice(chosen, [0], dim(op, self.tokens.x, 1), [1]), 0.5)

    @property
    def _ranks_at_once(self) -> int:
        return max(self.block // 2, 1) if self.d.resizes_in_loops else self.block

    def _similar(
        self, op: Any, norms: Value, buffer: Value, token: Value, compared: Value
    ) -> Value:
        """Compare a block's tokens [B,M] with the first `compared` of the kept and one another.

        The block is the right operand: its size is fixed, and TensorRT copies one of another size
        to pad it.

        Returns:
            Whether the cosine reaches the threshold, bool [B,compared+M,M].
        """
        both = op.Concat(op.Slice(buffer, [0], compared, [1]), token, axis=1)
        rows = op.Gather(self.tokens.flat, op.Add(both, self.tokens.offset), axis=0)
        rows = cast(op, rows, FLOAT)
        own_rows = op.Slice(rows, compared, [_END], [1])
        bound = op.GatherElements(norms, both, axis=1)
        own = op.Mul(op.Slice(bound, compared, [_END], [1]), self.threshold)
        bound = op.Mul(op.Unsqueeze(own, [1]), op.Unsqueeze(bound, [2]))
        dots = op.MatMul(rows, op.Transpose(own_rows, perm=[0, 2, 1]))
        return op.GreaterOrEqual(dots, bound)


def _fixed_point(op: Any, alive: Value, conflict: Value, block: int) -> tuple[Value, Value]:
    """Suppress greedily among `alive` [B,M] in rank order, by conflict [B,M,M]: row against column.

    Returns:
        What is kept, 0 or 1 [B,M], and how many places the last round changed [B,1].
    """

    def settle(
        op: Any, _iteration: Value, kept: Value, _changed: Value
    ) -> tuple[Value, list[Value]]:
        for _ in range(_ROUNDS):
            before = kept
            hits = op.Squeeze(op.MatMul(op.Unsqueeze(kept, [1]), conflict), [1])
            kept = op.Mul(alive, op.Cast(op.Less(hits, 0.5), to=FLOAT))
        changed = reduce(op, "ReduceSum", op.Abs(op.Sub(kept, before)), [1])
        return any_of(op, op.Greater(changed, 0.5)), [kept, changed]

    # Every round settles at least one more rank, and one more round finds nothing changed.
    states = [alive, op.Mul(reduce(op, "ReduceSum", alive, [1]), 0.0)]
    kept, changed = loop_while(op, states, settle, "fixed_point", most=-(-(block + 1) // _ROUNDS))
    return kept, changed


def _greatest_count(op: Any, count: Value) -> Value:
    """The greatest entry of `count` f32 [B,1], int64 [1]."""
    return op.Reshape(op.Cast(op.ReduceMax(count), to=INT64), [1])
