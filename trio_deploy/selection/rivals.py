"""Other ways to choose visual tokens, each a function of what a pruning point sees.

They are the methods that TRIO is compared with, as graphs over the same inputs and outputs. Facts
come from the papers and their code; each function names its source and where it differs. All
images of a row share one budget. Scores are in fp32; where scores tie, the lower index is first.

B rows, S tokens, N of them visual, d hidden size, H query heads, G key/value heads, R = H/G, D head
size, M block size.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.modules import DecoderLayer, RMSNorm
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import rotary_angles
from trio_deploy.graphs.values import (
    FLOAT,
    INT64,
    cast,
    constant,
    dim,
    merge_heads,
    reduce,
    split_heads,
)
from trio_deploy.schedule.methods import (
    FAR,
    PIVOTS,
    RANDOM_PRIME,
    RANDOM_ROUNDS,
    STEP,
    TIE,
    random_constant,
)
from trio_deploy.selection.saliency import Tokens, saliency
from trio_deploy.selection.suppression import (
    NO_CANDIDATE,
    NORM_FLOOR,
    PADDING,
    SEEN,
    any_of,
    loop,
    next_best,
)

_BLIND = -1e30  # additive mask; its exponential is zero in fp32
_OUTSIDE = -1.0  # of what cannot be chosen


@dataclass(frozen=True)
class Site:
    """A pruning point, as its method sees it.

    Attributes:
        stage: the graph, for inputs of the method's own.
        layer: the one that runs next.
        tokens: the input of that layer.
        lengths: int64 [B], valid tokens.
        keep: int64 [B], visual tokens to keep.
        width: int64 [1], W.
        block: M.
    """

    stage: Stage
    d: Dialect
    text: TextConfig
    layer: int
    options: GraphOptions
    tokens: Tokens
    lengths: ir.Value
    keep: ir.Value
    width: ir.Value
    block: int

    def need(self, op: Any) -> tuple[ir.Value, ir.Value]:
        """How many tokens a row must choose, f32 [B,1] (0 where it keeps all), and if, bool."""
        seen = reduce(op, "ReduceSum", op.Cast(self.tokens.visual, to=FLOAT), [1])
        keep = op.Cast(op.Unsqueeze(self.keep, [1]), to=FLOAT)
        prunes = op.Less(keep, seen)
        return op.Where(prunes, keep, 0.0), prunes


@dataclass(frozen=True)
class Choice:
    """What a method decided.

    Attributes:
        kept: bool [B,S], visual tokens that stay.
        score: f32 [B,S], what they were chosen by, 0 where not visual.
        finite: f32 [B,S], the scores where they must be finite.
        converged: bool [B], whether an iteration came to its end; None where there is none.
        merge: from (op, keep_index [B,W]) the hidden states that go on, [B,W,d] (what stands behind
            a row's end does not matter); None: those of the tokens kept.
    """

    kept: ir.Value
    score: ir.Value
    finite: ir.Value
    converged: ir.Value | None = None
    merge: Callable[[Any, ir.Value], ir.Value] | None = None


Method = Callable[[Any, Site], Choice]


def top_gradient(op: Any, site: Site) -> Choice:
    """TRIO's saliency without suppression: the greatest gradients."""
    scores = saliency(op, site.d, site.text, site.layer, site.options, site.tokens)
    return Choice(_best(op, site, scores.ranking), scores.value, finite=scores.ranking)


def fastv(op: Any, site: Site) -> Choice:
    """Attention that the last token pays, averaged over the heads (FastV, arXiv 2403.06764).

    The authors read the attention of the layer that has just run; a pruning point sees what the
    next layer will read, so the attention is that of the next layer.
    """
    d, text, tokens = site.d, site.text, site.tokens
    heads, groups, size = text.num_heads, text.num_kv_heads, text.head_dim
    layer = DecoderLayer(d, text, site.layer)
    n = layer.input_layernorm(op, tokens.x)
    last = op.Unsqueeze(op.Sub(site.lengths, 1), [1])  # [B,1]
    flat = op.Reshape(n, [-1, text.hidden_size])
    query = op.Gather(flat, op.Add(last, tokens.offset), axis=0)  # [B,1,d]
    place = op.GatherElements(tokens.positions, last, axis=1)
    q = split_heads(op, layer.self_attn.q_proj(op, query), heads, size)
    q = d.rope(op, q, rotary_angles(op, d, text, place))
    q = op.Reshape(op.Mul(q, size**-0.5), [0, groups, heads // groups, size])
    k = _keys(op, site, layer, n)  # [B,G,S,D]
    scores = cast(op, op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])), FLOAT)  # [B,G,R,S]
    blind = op.Greater(op.Unsqueeze(tokens.index, [0]), last)
    mask = op.Mul(op.Cast(blind, to=FLOAT), _BLIND)
    a = op.Softmax(op.Add(scores, op.Unsqueeze(mask, [1, 2])), axis=-1)
    score = reduce(op, "ReduceMean", a, [1, 2], keepdims=False)
    return _by_score(op, site, score)


def random(op: Any, site: Site) -> Choice:
    """A set of tokens that depends on the row's seed and on nothing else.

    Takes `seed` int64 [B], below `methods.SEEDS`. A token's score is its place under a keyed
    permutation of 0…p-1, so no two of p tokens tie, and a row keeps the same ones alone and in a
    batch.
    """
    seed = op.Cast(op.Unsqueeze(site.stage.input("seed", INT64, ["B"]), [1]), to=FLOAT)
    p = float(RANDOM_PRIME)

    def divide(value: ir.Value) -> tuple[ir.Value, ir.Value]:
        """Quotient and rest, where the product of the rounded quotient may be one off."""
        quotient = op.Floor(op.Mul(value, 1.0 / p))
        rest = op.Sub(value, op.Mul(quotient, p))
        step = op.Sub(
            op.Cast(op.GreaterOrEqual(rest, p), to=FLOAT), op.Cast(op.Less(rest, 0.0), to=FLOAT)
        )
        return op.Add(quotient, step), op.Sub(rest, op.Mul(step, p))

    high, low = divide(seed)
    lap, x = divide(op.Unsqueeze(op.Cast(site.tokens.index, to=FLOAT), [0]))
    keys = op.Add(low, lap), high
    for turn in range(RANDOM_ROUNDS):
        added = float(random_constant(site.layer, turn))
        _, x = divide(op.Add(op.Add(x, keys[turn % 2]), added))
        _, square = divide(op.Mul(x, x))
        _, x = divide(op.Mul(square, x))
    return _by_score(op, site, op.Mul(op.Add(x, 1.0), 1.0 / p))


def divprune(op: Any, site: Site) -> Choice:
    """The most diverse tokens, greedily (DivPrune, arXiv 2503.02175).

    First the token whose nearest other one is farthest, then again and again the one that is
    farthest from all that is kept; distance is 1 - cosine. The score is a token's distance from
    what was kept when it was taken, or at the end where it was not; the first one's is 2, and all
    are 0 in a row that keeps everything.
    """
    tokens = site.tokens
    need, prunes = site.need(op)
    visual = tokens.visual
    unit = _unit_rows(op, cast(op, tokens.x, FLOAT), tokens.squares)
    cosines = op.MatMul(unit, op.Transpose(unit, perm=[0, 2, 1]))  # [B,S,S]
    distances = op.Sub(1.0, cosines)
    itself = op.Equal(op.Unsqueeze(tokens.index, [1]), op.Unsqueeze(tokens.index, [0]))  # [S,S]
    other = op.And(op.Unsqueeze(visual, [2]), op.Not(op.Unsqueeze(itself, [0])))
    nearest = reduce(op, "ReduceMin", op.Where(other, distances, FAR), [1], keepdims=False)
    # Distances from one token: a row of the above, or, since OpenVINO takes as long for that in a
    # loop as for all of them, a product a pick.
    product = not site.d.gathers_in_loops
    table = unit if product else distances
    rows = op.Reshape(table, op.Concat([-1], dim(op, table, 2), axis=0))
    nothing = op.Mul(nearest, 0.0)

    def take(op: Any, gap: ir.Value, chosen: ir.Value) -> tuple[ir.Value, ir.Value]:
        """The token that is farthest, int64 [B,1]; and 1 at its place, f32 [B,S]."""
        free = op.And(visual, op.Less(chosen, 0.5))
        open_ = op.Where(free, gap, _OUTSIDE)
        far = op.Sub(reduce(op, "ReduceMax", open_, [1]), TIE)
        hit = op.And(free, op.GreaterOrEqual(open_, far))
        index = op.Cast(tokens.index, to=FLOAT)
        length = op.Cast(dim(op, gap, 1), to=FLOAT)
        first = reduce(op, "ReduceMin", op.Where(hit, index, length), [1])
        first = op.Min(first, op.Sub(length, 1.0))  # a row without a free token
        count = reduce(op, "ReduceSum", chosen, [1])
        picked = op.And(op.Equal(index, first), op.And(hit, op.Less(count, need)))
        return op.Cast(first, to=INT64), op.Cast(picked, to=FLOAT)

    def nearer(op: Any, gap: ir.Value, token: ir.Value, picked: ir.Value) -> ir.Value:
        """Distances from what is kept, once `token` [B,1] is, where a row has `picked` one."""
        row = op.Gather(rows, op.Add(token, tokens.offset), axis=0)  # [B,1,d] or [B,1,S]
        if product:
            away = op.Sub(1.0, op.Squeeze(op.MatMul(unit, op.Transpose(row, perm=[0, 2, 1])), [2]))
        else:
            away = op.Squeeze(row, [1])
        some = op.Greater(reduce(op, "ReduceSum", picked, [1]), 0.5)
        return op.Where(some, op.Min(gap, op.Max(away, 0.0)), gap)

    token, chosen = take(op, nearest, nothing)
    start = [nearer(op, op.Add(nothing, FAR), token, chosen), chosen, op.Mul(chosen, FAR)]

    def next_one(
        op: Any, _turn: ir.Value, gap: ir.Value, chosen: ir.Value, score: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        token, picked = take(op, gap, chosen)
        score = op.Add(score, op.Mul(picked, gap))
        chosen = op.Add(chosen, picked)
        more = op.Less(reduce(op, "ReduceSum", chosen, [1]), need)
        return any_of(op, more), [nearer(op, gap, token, picked), chosen, score]

    most = op.Squeeze(dim(op, nearest, 1), [0])
    gap, chosen, score = loop(op, most, any_of(op, op.Greater(need, 1.0)), start, next_one, "picks")
    picked = op.Greater(chosen, 0.5)
    score = op.Where(picked, score, gap)
    return _made(op, site, picked, prunes, score)


def dart(op: Any, site: Site) -> Choice:
    """A few pivots, and what is least like each of them (DART, arXiv 2502.11494).

    Pivots are the 4 visual and 4 text tokens of the greatest L1 norm. Pivot after pivot, visual
    ones first, its share of the rest is filled up with the tokens of the least cosine with it.
    Before layer 0 norms and cosines are those of the embeddings, and any text token may be a pivot:
    NVIDIA's DartPruner (TensorRT Edge-LLM, cpp/runtime), whose rule for the shares is used
    throughout. At a later layer norms are those of its keys, cosines those of the hidden states
    after the final norm, and the text is what follows the first visual token, as in the authors'
    code (their keys are those of the layer before). The score is a token's distance, 1 - cosine,
    from the pivot that it was compared with last; a visual pivot's is 2, and all are 0 in a row
    that keeps everything.
    """
    d, text, tokens = site.d, site.text, site.tokens
    need, prunes = site.need(op)
    if site.layer == 0:
        features = cast(op, tokens.x, FLOAT)
        norms = reduce(op, "ReduceSum", op.Abs(features), [2], keepdims=False)
        squares, words = tokens.squares, tokens.text
    else:
        layer = DecoderLayer(d, text, site.layer)
        keys = merge_heads(op, _keys(op, site, layer, layer.input_layernorm(op, tokens.x)))
        norms = reduce(op, "ReduceSum", op.Abs(cast(op, keys, FLOAT)), [2], keepdims=False)
        norm = RMSNorm(d, "language_model.norm", text.hidden_size, text.rms_norm_eps)
        features = cast(op, norm(op, tokens.x), FLOAT)
        squares = reduce(op, "ReduceSumSquare", features, [2])
        before = op.CumSum(op.Cast(tokens.visual, to=FLOAT), 1)
        words = op.And(tokens.text, op.Greater(before, 0.5))
    pictures, known = _largest(op, norms, tokens.visual, PIVOTS)
    known = op.And(known, op.Less(constant(op, _counting(PIVOTS), "pivots"), need))
    texts, read = _largest(op, norms, words, PIVOTS)
    pivots = op.Concat(pictures, texts, axis=1)  # [B,2P]
    valid = op.Cast(op.Concat(known, read, axis=1), to=FLOAT)
    unit = _unit_rows(op, features, squares)
    flat = op.Reshape(unit, [-1, text.hidden_size])
    mine = op.Gather(flat, op.Add(pivots, tokens.offset), axis=0)  # [B,2P,d]
    distances = op.Sub(1.0, op.MatMul(mine, op.Transpose(unit, perm=[0, 2, 1])))  # [B,2P,S]
    distances = op.Mul(op.Floor(op.Add(op.Mul(op.Max(distances, 0.0), 1 / STEP), 0.5)), STEP)
    own = op.Equal(op.Unsqueeze(pictures, [2]), op.Unsqueeze(tokens.index, [0, 1]))  # [B,P,S]
    own = op.And(own, op.Unsqueeze(known, [2]))
    chosen = reduce(op, "ReduceMax", op.Cast(own, to=FLOAT), [1], keepdims=False)
    numbers = constant(op, _counting(2 * PIVOTS), "numbers")
    shape = op.Shape(tokens.visual)

    def grow(
        op: Any, turn: ir.Value, chosen: ir.Value, score: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        later = op.GreaterOrEqual(numbers, op.Cast(turn, to=FLOAT))
        left = reduce(op, "ReduceSum", op.Mul(valid, op.Cast(later, to=FLOAT)), [1])
        # reshaped, since TensorRT's older parsers hand on the turn as [1], not as a scalar
        now = op.Reshape(op.Gather(valid, turn, axis=1), [-1, 1])
        rest = op.Mul(op.Sub(need, reduce(op, "ReduceSum", chosen, [1])), now)
        share = op.Floor(op.Div(op.Add(rest, op.Sub(left, 1.0)), op.Max(left, 1.0)))
        distance = op.Reshape(op.Gather(distances, turn, axis=1), shape)  # [B,S]
        free = op.And(tokens.visual, op.Less(chosen, 0.5))
        compared = op.And(free, op.Greater(rest, 0.5))
        score = op.Where(compared, distance, score)
        taken = _top(op, distance, free, share, site.block)
        more = op.Less(reduce(op, "ReduceSum", chosen, [1]), need)
        return any_of(op, more), [op.Add(chosen, op.Cast(taken, to=FLOAT)), score]

    chosen, score = loop(
        op,
        op.Squeeze(constant(op, np.array([2 * PIVOTS]), "all_pivots"), [0]),
        any_of(op, op.Greater(need, 0.0)),
        [chosen, op.Mul(chosen, FAR)],
        grow,
        "grow",
    )
    return _made(op, site, op.Greater(chosen, 0.5), prunes, score)


def cls_attention(op: Any, site: Site) -> Choice:
    """Attention of the encoder's class token in the last layer but one (FasterVLM, arXiv
    2412.01818; the dominant tokens of VisionZip, arXiv 2412.04467).

    Takes `prior` f32 [B,S], 0 where there is no patch: image_newline goes last.
    """
    return _by_score(op, site, _prior(site, "prior"))


def vscan(op: Any, site: Site) -> Choice:
    """A global scan, a local scan, and the rest merged (VScan, arXiv 2505.22654).

    Takes `prior` and `prior_local` f32 [B,S] (`graphs/vision.py`), 0 where there is no patch. Half
    of the budget, rounded up, goes to the greatest `prior`; the rest to the greatest `prior_local`
    of what is left: the best of each window, then the second best, and so on. Every dropped patch
    is averaged into the kept visual token of the greatest cosine; image_newline is just dropped.
    Cosines and means are those of the hidden states at the pruning point, which before layer 0 are
    the projected features. The score is `prior`.
    """
    tokens = site.tokens
    need, prunes = site.need(op)
    prior, local = _prior(site, "prior"), _prior(site, "prior_local")
    half = op.Floor(op.Mul(need, 0.5))
    wide = _top(op, prior, tokens.visual, op.Sub(need, half), site.block, "global_scan")
    rest = op.And(tokens.visual, op.Not(wide))
    picked = op.Or(wide, _top(op, local, rest, half, site.block, "local_scan"))
    choice = _made(op, site, picked, prunes, prior)
    dropped = op.And(op.And(tokens.visual, op.Not(choice.kept)), op.Greater(local, 0.0))
    score = op.Where(tokens.visual, prior, 0.0)
    total = op.Add(score, op.Where(tokens.visual, local, 0.0))

    def merge(op: Any, index: ir.Value) -> ir.Value:
        filled, safe = op.GreaterOrEqual(index, 0), op.Max(index, 0)
        x = cast(op, tokens.x, FLOAT)
        unit = _unit_rows(op, x, tokens.squares)
        flat = op.Reshape(unit, [-1, site.text.hidden_size])
        kept = op.Gather(flat, op.Add(safe, tokens.offset), axis=0)  # [B,W,d]
        cosines = op.MatMul(kept, op.Transpose(unit, perm=[0, 2, 1]))  # [B,W,S]
        visual = op.GatherElements(cast(op, tokens.visual, INT64), safe, axis=1)
        heirs = op.Unsqueeze(op.And(filled, op.Greater(visual, 0)), [2])  # [B,W,1]
        cosines = op.Where(heirs, cosines, -FAR)
        near = op.GreaterOrEqual(cosines, op.Sub(reduce(op, "ReduceMax", cosines, [1]), TIE))
        columns = op.Cast(op.Range(0, op.Squeeze(site.width, [0]), 1), to=FLOAT)
        columns = op.Unsqueeze(columns, [0, 2])  # [1,W,1]
        none = op.Cast(site.width, to=FLOAT)
        heir = reduce(op, "ReduceMin", op.Where(op.And(near, heirs), columns, none), [1])
        given = op.And(op.Equal(columns, heir), op.Unsqueeze(dropped, [1]))
        own = op.Equal(op.Unsqueeze(index, [2]), op.Unsqueeze(tokens.index, [0, 1]))
        share = op.Cast(op.Or(given, own), to=FLOAT)  # [B,W,S]
        count = op.Max(reduce(op, "ReduceSum", share, [2]), 1.0)
        return cast(op, op.Div(op.MatMul(share, x), count), site.d.dtype)

    return Choice(choice.kept, score, finite=total, merge=merge)


METHODS: Mapping[str, Method] = {
    "topk-gradient": top_gradient,
    "fastv": fastv,
    "dart": dart,
    "divprune": divprune,
    "random": random,
    "cls-attention": cls_attention,
    "vscan": vscan,
}


# --------------------------------------------------------------------------------------------
# What they share


def _by_score(op: Any, site: Site, score: ir.Value) -> Choice:
    """The greatest of a score [B,S] that is not negative."""
    score = op.Where(site.tokens.visual, score, 0.0)
    return Choice(_best(op, site, score), score, finite=score)


def _prior(site: Site, name: str) -> ir.Value:
    """The encoder's score as an input, f32 [B,S]."""
    return site.stage.input(name, FLOAT, ["B", "S"])


def _best(op: Any, site: Site, score: ir.Value) -> ir.Value:
    need, prunes = site.need(op)
    picked = _top(op, score, site.tokens.visual, need, site.block)
    return op.And(site.tokens.visual, op.Or(picked, op.Not(prunes)))


def _made(op: Any, site: Site, picked: ir.Value, prunes: ir.Value, score: ir.Value) -> Choice:
    visual = site.tokens.visual
    score = op.Where(op.And(visual, prunes), score, 0.0)
    return Choice(op.And(visual, op.Or(picked, op.Not(prunes))), score, finite=score)


def _top(
    op: Any, score: ir.Value, among: ir.Value, count: ir.Value, block: int, name: str = "ranks"
) -> ir.Value:
    """Where the `count` f32 [B,1] greatest of `score` f32 [B,S] ≥ 0 lie, of those `among`: bool.

    Ties go to the lower index. A block of M ranks at a time, as in `selection.select`; `name` is
    the loop's, one of its own in a graph.
    """
    batch, length = dim(op, score, 0), dim(op, score, 1)
    shape = op.Concat(batch, [block], axis=0)
    padding = op.ConstantOfShape(shape, value=ir.tensor(np.array([PADDING], np.float32)))
    left = op.Concat(op.Where(among, score, NO_CANDIDATE), padding, axis=1)  # [B,S+M]
    ranks = op.Range(0.0, float(block), 1.0)

    def take_block(
        op: Any, turn: ir.Value, left: ir.Value, chosen: ir.Value
    ) -> tuple[ir.Value, list[ir.Value]]:
        best, index = next_best(op, left, block)
        start = op.Mul(op.Cast(turn, to=FLOAT), float(block))
        taken = op.And(op.GreaterOrEqual(best, 0.0), op.Less(op.Add(ranks, start), count))
        taken = op.Cast(taken, to=FLOAT)
        chosen = op.ScatterElements(chosen, index, taken, axis=1)
        left = op.ScatterElements(left, index, op.Add(op.Mul(taken, 0.0), SEEN), axis=1)
        return any_of(op, op.Less(op.Add(start, float(block)), count)), [left, chosen]

    trips = op.Squeeze(op.Div(op.Add(length, block - 1), block), [0])
    start = any_of(op, op.Greater(count, 0.0))
    _, chosen = loop(op, trips, start, [left, op.Mul(left, 0.0)], take_block, name)
    return op.Greater(op.Slice(chosen, [0], length, [1]), 0.5)


def _largest(op: Any, score: ir.Value, among: ir.Value, count: int) -> tuple[ir.Value, ir.Value]:
    """Indices of the `count` greatest of `score` [B,S] ≥ 0, descending, and which exist: [B,count].

    What does not exist points at the last token.
    """
    shape = op.Concat(dim(op, score, 0), [count], axis=0)
    padding = op.ConstantOfShape(shape, value=ir.tensor(np.array([PADDING], np.float32)))
    padded = op.Concat(op.Where(among, score, NO_CANDIDATE), padding, axis=1)
    best, index = next_best(op, padded, count)
    return op.Min(index, op.Sub(dim(op, score, 1), 1)), op.GreaterOrEqual(best, 0.0)


def _keys(op: Any, site: Site, layer: DecoderLayer, n: ir.Value) -> ir.Value:
    """The layer's keys of normalised states n [B,S,d], rotated: [B,G,S,D]."""
    d, text = site.d, site.text
    k = split_heads(op, layer.self_attn.k_proj(op, n), text.num_kv_heads, text.head_dim)
    return d.rope(op, k, rotary_angles(op, d, text, site.tokens.positions))


def _unit_rows(op: Any, x: ir.Value, squares: ir.Value) -> ir.Value:
    """x f32 [B,S,d] over the norms of its rows; squares f32 [B,S,1]."""
    return op.Div(x, op.Max(op.Sqrt(squares), NORM_FLOOR))


def _counting(count: int) -> np.ndarray:
    return np.arange(count, dtype=np.float32)[None]
