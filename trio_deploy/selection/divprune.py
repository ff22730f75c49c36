"""DivPrune: the most diverse visual tokens, chosen greedily.

Alvar et al., arXiv 2503.02175. First the token whose nearest other one is farthest, then again and
again the one that is farthest from all that is kept; distance is 1 - cosine. It is computed on the
hidden states at the pruning point (before layer 0 these are the projected features, as published).
All images of a row share its budget.

The score is a token's distance from what was kept when it was taken, or at the end if it was not;
the first one's is 2, and all are 0 in a row that keeps everything.
"""

from __future__ import annotations

from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import Selected, View
from trio_deploy.selection.arrays import FARTHEST, TIE
from trio_deploy.selection.choice import Choice, Value
from trio_deploy.selection.nms import cosines_of

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site

_TAKEN = -1.0  # below the distance of every token that can be chosen
_AT_ONCE = 16  # picks between two questions whether any row lacks one


def graph(op: Any, site: Site) -> Choice:
    """Take one token per round of a loop; distances within `TIE` are equal, the earlier wins.

    Each round of a loop that ends with the last pick is a loop of 16 picks: TensorRT's host waits
    where a loop depends on data, and a row that has enough picks nothing more.
    """
    tokens, visual = site.tokens, site.tokens.visual
    need, prunes = site.need(op)
    unit = site.unit_rows(op, site.float32(op, tokens.x), tokens.squares)
    cosines = op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))  # [B,S,S]
    distances = op.Sub(1.0, cosines)
    itself = op.Equal(op.Unsqueeze(tokens.index, [1]), op.Unsqueeze(tokens.index, [0]))  # [S,S]
    other = op.And(op.Unsqueeze(visual, [2]), op.Not(op.Unsqueeze(itself, [0])))
    nearest = op.Where(other, distances, FARTHEST)
    nearest = site.reduce(op, "ReduceMin", nearest, [1], keepdims=False)
    # Distances from one token: a row of the above, or, since OpenVINO takes as long for that in a
    # loop as for all of them, one product per pick.
    product = not site.d.gathers_in_loops
    table = unit if product else distances
    rows = op.Reshape(table, op.Concat([-1], site.dim(op, table, 2), axis=0))
    nothing = op.Mul(nearest, 0.0)

    def take(op: Any, gap: Value, chosen: Value) -> tuple[Value, Value]:
        """The token that is farthest, int64 [B,1]; and 1 at its place, f32 [B,S]."""
        free = op.And(visual, op.Less(chosen, 0.5))
        open_ = op.Where(free, gap, _TAKEN)
        far = op.Sub(site.reduce(op, "ReduceMax", open_, [1]), TIE)
        hit = op.And(free, op.GreaterOrEqual(open_, far))
        index = site.float32(op, tokens.index)
        length = site.float32(op, site.dim(op, gap, 1))
        first = site.reduce(op, "ReduceMin", op.Where(hit, index, length), [1])
        first = op.Min(first, op.Sub(length, 1.0))  # a row without a free token
        count = site.reduce(op, "ReduceSum", chosen, [1])
        picked = op.And(op.Equal(index, first), op.And(hit, op.Less(count, need)))
        return site.int64(op, first), site.float32(op, picked)

    def nearer(op: Any, gap: Value, token: Value, picked: Value) -> Value:
        """Distances from what is kept, once `token` [B,1] is, where a row has `picked` one."""
        row = op.Gather(rows, op.Add(token, tokens.offset), axis=0)  # [B,1,d] or [B,1,S]
        if product:
            cosine = op.Squeeze(op.MatMul(unit, op.Transpose(row, perm=[0, 2, 1])), [2])
            distance = op.Sub(1.0, cosine)
        else:
            distance = op.Squeeze(row, [1])
        some = op.Greater(site.reduce(op, "ReduceSum", picked, [1]), 0.5)
        return op.Where(some, op.Min(gap, op.Max(distance, 0.0)), gap)

    def next_one(op: Any, _turn: Value, gap: Value, chosen: Value, score: Value) -> list[Value]:
        token, picked = take(op, gap, chosen)
        score = op.Add(score, op.Mul(picked, gap))
        return [nearer(op, gap, token, picked), op.Add(chosen, picked), score]

    def next_ones(op: Any, _turn: Value, *states: Value) -> tuple[Value, list[Value]]:
        before = site.reduce(op, "ReduceSum", states[1], [1])
        gap, chosen, score = site.repeat(op, _AT_ONCE, states, next_one)
        count = site.reduce(op, "ReduceSum", chosen, [1])
        # A row whose distances are no numbers has no farthest token, and would never have enough.
        more = op.And(op.Less(count, need), op.Greater(count, before))
        return site.any_of(op, more), [gap, chosen, score]

    token, chosen = take(op, nearest, nothing)
    gap = nearer(op, op.Add(nothing, FARTHEST), token, chosen)
    states = [gap, chosen, op.Mul(chosen, FARTHEST)]
    gap, chosen, score = site.loop_while(op, states, next_ones, "picks")
    picked = op.Greater(chosen, 0.5)
    return site.by_picks(op, picked, prunes, op.Where(picked, score, gap))


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Take the farthest token again and again, in fp64."""
    places, scores = view.places, np.zeros(len(view.visual))
    if view.keep == len(places):
        return places, scores
    distances = 1.0 - cosines_of(view.hidden[places])
    gap = np.where(np.eye(len(places), dtype=bool), FARTHEST, distances).min(axis=0)
    kept: list[int] = []
    while len(kept) < view.keep:
        gap[kept] = _TAKEN
        token = int(np.flatnonzero(gap >= gap.max() - TIE)[0])
        scores[places[token]] = gap[token] if kept else FARTHEST
        distance = np.maximum(distances[token], 0.0)
        gap = np.minimum(gap, distance) if kept else distance
        kept.append(token)
    dropped = np.setdiff1d(np.arange(len(places)), kept)
    scores[places[dropped]] = gap[dropped] if kept else FARTHEST
    return places[kept], scores


def rule(selected: Selected) -> bool:
    """Whether each token kept, from the first on, was the farthest from those before it."""
    places, kept = selected.places, selected.kept
    if not len(kept) or len(kept) == len(places):
        return True
    distances = 1.0 - cosines_of(selected.hidden[places])
    # The score falls from pick to pick.
    order = kept[np.argsort(-selected.scores[kept], kind="stable")]
    gap = np.full(len(places), np.inf)
    for before, token in pairwise(np.searchsorted(places, order)):
        gap = np.minimum(gap, distances[before])
        gap[before] = -np.inf
        if gap[token] < gap.max() - 2 * TIE:
            return False
    return True


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """All cosines, n²·d."""
    return 0, sizes.tokens**2 * text.hidden_size
