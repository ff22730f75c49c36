"""CDPruner: visual tokens that suit the question and differ from each other, by a determinant.

Zhang et al., arXiv 2506.10967. With r the relevance of a token to the question and cos the cosine
of two tokens, the tokens kept make the determinant of the kernel r_i r_j cos_ij large: the greedy
approximation takes the token with the greatest gain, again and again, by updates of a Cholesky
factor. All images of a row share its budget.

The relevance is the mean cosine of a visual token with the question's tokens at the pruning point,
scaled to 0…1 per row. That is the form without CLIP's text tower, as OpenVINO GenAI has it for the
Qwen models; the authors' code for LLaVA takes CLIP's text embeddings and turns the relevance
around. The question is the text behind the first visual token, or all text where there is none.

A kernel of d features has a rank of d at most: where no gain is left, the most relevant tokens fill
the budget up. The score is a token's gain when it was taken, 0 if it was not or only filled up, and
0 in a row that keeps everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import Selected, View
from trio_deploy.selection.arrays import greatest
from trio_deploy.selection.choice import Choice, Value

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site

# Below it rounding in fp32 orders the gains. Up to 33 % of the tokens on the shipped model's
# activations, and up to 60 % on SmolLM2's, 1e-4 and 1e-6 give the same picks, and fp64's but for 2
# of 12,240 and 2 of 4,005. At 60 % on the former, beyond the kernel's rank, 276 of 11,088 picks are
# not fp64's with 1e-6, and 31 with 1e-4; 1e-3 leaves none, but ends the picks below 33 %.
_LEAST_GAIN = 1e-4
_OFFSET = 1e-6  # of relevances before they are scaled: the least is not quite 0
_TIE = 1e-4  # gains closer than this, relative to the greatest, count as equal: the earlier wins
_ROUNDING = 1e-5  # of a gain in fp32, whose terms are at most 1
_NONE = -1.0  # below every gain
_AT_ONCE = 16  # picks between two questions whether any row goes on


def graph(op: Any, site: Site) -> Choice:
    """Take one token per round of a loop; then the most relevant of the others.

    Each round of a loop that ends with the last pick is a loop of 16 picks, as in DivPrune.
    """
    tokens, visual = site.tokens, site.tokens.visual
    need, prunes = site.need(op)
    unit = site.unit_rows(op, site.float32(op, tokens.x), tokens.squares)
    relevance = _relevance(op, site, unit)
    rows = op.Mul(unit, op.Unsqueeze(relevance, [2]))  # the kernel is rows · rowsᵀ
    flat = op.Reshape(rows, [-1, site.text.hidden_size])
    index = site.float32(op, tokens.index)
    length = site.float32(op, site.dim(op, relevance, 1))
    # K rows of the factor, W: a size of TensorRT's cannot depend on what rows keep.
    numbers = op.Range(0, op.Squeeze(site.width, [0]), 1)

    def greatest_gain(op: Any, gain: Value, chosen: Value) -> tuple[Value, Value, Value, Value]:
        """Which tokens are free [B,S], their gains [B,S], the best [B,1], whether it counts."""
        free = op.And(visual, op.Less(chosen, 0.5))
        open_ = op.Where(free, gain, _NONE)
        best = site.reduce(op, "ReduceMax", open_, [1])
        lacks = op.Less(site.reduce(op, "ReduceSum", chosen, [1]), need)
        return free, open_, best, op.And(lacks, op.Greater(best, _LEAST_GAIN))

    def take(
        op: Any, turn: Value, gain: Value, factor: Value, chosen: Value, score: Value
    ) -> list[Value]:
        free, open_, best, goes_on = greatest_gain(op, gain, chosen)
        hit = op.And(free, op.GreaterOrEqual(open_, op.Mul(best, 1.0 - _TIE)))
        first = site.reduce(op, "ReduceMin", op.Where(hit, index, length), [1])
        first = op.Min(first, op.Sub(length, 1.0))  # a row without a free token
        picked = site.float32(op, op.And(op.Equal(index, first), op.And(hit, goes_on)))
        # A row of the factor: what the token has in common with each, less what is told already.
        place = op.Add(site.int64(op, first), tokens.offset)
        mine = op.Transpose(op.Gather(flat, place, axis=0), perm=[0, 2, 1])  # [B,d,1]
        common = op.MatMul(rows, mine)  # [B,S,1]
        known = op.MatMul(factor, op.Unsqueeze(picked, [2]))  # [B,K,1]
        told = op.MatMul(op.Transpose(factor, perm=[0, 2, 1]), known)  # [B,S,1]
        new = op.Squeeze(op.Sub(common, told), [2])
        own = op.Sqrt(op.Max(best, _LEAST_GAIN))
        new = op.Where(goes_on, op.Div(new, own), 0.0)
        # Reshaped, since TensorRT's older parsers hand on the turn as [1], not as a scalar.
        now = op.Equal(op.Reshape(numbers, [1, -1, 1]), op.Reshape(turn, [1, 1, 1]))
        factor = op.Where(now, op.Unsqueeze(new, [1]), factor)
        score = op.Add(score, op.Mul(picked, gain))
        chosen = op.Add(chosen, picked)
        gain = op.Max(op.Sub(gain, op.Mul(new, new)), 0.0)
        return [gain, factor, chosen, score]

    def take_some(op: Any, turn: Value, *states: Value) -> tuple[Value, list[Value]]:
        first = op.Mul(turn, _AT_ONCE)

        def take_next(op: Any, turn: Value, *states: Value) -> list[Value]:
            return take(op, op.Add(first, turn), *states)

        gain, factor, chosen, score = site.repeat(op, _AT_ONCE, states, take_next)
        goes_on = greatest_gain(op, gain, chosen)[3]
        return site.any_of(op, goes_on), [gain, factor, chosen, score]

    nothing = op.Mul(relevance, 0.0)
    empty = op.Mul(op.Reshape(site.float32(op, numbers), [1, -1, 1]), 0.0)
    factor = op.Add(op.Unsqueeze(nothing, [1]), empty)  # [B,K,S]
    states = [op.Mul(relevance, relevance), factor, nothing, nothing]
    _, _, chosen, score = site.loop_while(op, states, take_some, "picks")
    taken = op.Greater(chosen, 0.5)
    left = op.Sub(need, site.reduce(op, "ReduceSum", chosen, [1]))
    others = op.And(visual, op.Not(taken))
    fillers = site.greatest(op, relevance, others, left)
    return site.by_picks(op, op.Or(taken, fillers), prunes, score)


def _relevance(op: Any, site: Site, unit: Value) -> Value:
    """Relevance of the visual tokens to the question, f32 [B,S]; 0 for other tokens."""
    tokens, visual = site.tokens, site.tokens.visual
    before = site.d.running_sum(op, site.float32(op, visual))
    words = site.float32(op, op.And(tokens.text, op.Greater(before, 0.5)))
    asked = op.Greater(site.reduce(op, "ReduceSum", words, [1]), 0.5)
    words = op.Where(asked, words, site.float32(op, tokens.text))
    count = op.Max(site.reduce(op, "ReduceSum", words, [1]), 1.0)
    question = op.MatMul(op.Unsqueeze(op.Div(words, count), [1]), unit)  # [B,1,d]
    mean = op.Squeeze(op.MatMul(unit, op.Transpose(question, perm=[0, 2, 1])), [2])
    low = site.reduce(op, "ReduceMin", op.Where(visual, mean, 2.0), [1])
    high = site.reduce(op, "ReduceMax", op.Where(visual, mean, -2.0), [1])
    span = op.Max(op.Sub(high, low), 0.0)
    scaled = op.Div(op.Add(op.Sub(mean, low), _OFFSET), op.Add(span, _OFFSET))
    return op.Where(visual, op.Max(scaled, 0.0), 0.0)


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Take the token whose gain is greatest, again and again, in fp64."""
    scores = np.zeros(len(view.visual))
    places = view.places
    if view.keep == len(places):
        return places, scores
    relevance, rows = _kernel(view.hidden, view.visual)
    gain, factor = relevance**2, np.zeros((0, len(places)))
    free = np.ones(len(places), bool)
    kept: list[int] = []
    while len(kept) < view.keep and gain[free].max() > _LEAST_GAIN:
        token = int(np.flatnonzero(free & (gain >= gain[free].max() * (1 - _TIE)))[0])
        scores[places[token]] = gain[token]
        gain, factor = _told(rows, gain, factor, token)
        free[token] = False
        kept.append(token)
    kept += greatest(relevance, free, view.keep - len(kept)).tolist()
    return places[kept], scores


def rule(selected: Selected) -> bool:
    """Whether each token kept had the greatest gain when it was taken, as far as fp32 can tell."""
    places, kept = selected.places, selected.kept
    if not len(kept) or len(kept) == len(places):
        return True
    valid = slice(0, selected.length)
    relevance, rows = _kernel(selected.hidden[valid], selected.visual[valid])
    gain, factor = relevance**2, np.zeros((0, len(places)))
    free = np.ones(len(places), bool)
    # The score falls from pick to pick.
    for place in kept[np.argsort(-selected.scores[kept], kind="stable")]:
        token, best = int(np.searchsorted(places, place)), gain[free].max()
        if best <= _LEAST_GAIN + _ROUNDING:  # from here on relevance decides, or rounding
            return True
        if gain[token] < best * (1 - 2 * _TIE) - _ROUNDING:
            return False
        gain, factor = _told(rows, gain, factor, token)
        free[token] = False
    return True


def _kernel(
    hidden: NDArray[np.floating], visual: NDArray[np.bool_]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Relevance [N] of the visual tokens, and rows [N,d] whose products are the kernel."""
    norms = np.linalg.norm(hidden.astype(np.float64), axis=1, keepdims=True)
    unit = hidden / np.maximum(norms, 1e-12)
    words = ~visual & (np.cumsum(visual) > 0)
    words = words if words.any() else ~visual
    mean = unit[visual] @ unit[words].sum(axis=0) / max(1, int(words.sum()))
    relevance = (mean - mean.min() + _OFFSET) / (mean.max() - mean.min() + _OFFSET)
    return relevance, unit[visual] * relevance[:, None]


def _told(
    rows: NDArray[np.float64], gain: NDArray[np.float64], factor: NDArray[np.float64], token: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Gains [N] and factor [picks,N] once `token` is taken."""
    common = rows @ rows[token] - factor.T @ factor[:, token]
    new = common / np.sqrt(max(gain[token], _LEAST_GAIN))
    return np.maximum(gain - new**2, 0.0), np.concatenate([factor, new[None]])


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """Relevance, n·d; for each of k tokens its row of the kernel and of the factor, n·(d + 2k)."""
    n, d, k = sizes.tokens, text.hidden_size, sizes.after
    return 2 * n * d, k * n * (d + 2 * k)
