"""DART: a few pivots, and the visual tokens that are least like each of them.

Wen et al., arXiv 2502.11494. Pivots are the 4 visual and 4 text tokens of the greatest L1 norm.
Pivot after pivot, visual ones first, its share of what is left of the budget goes to the tokens of
the least cosine with it.

Before layer 0 norms and cosines are those of the embeddings, and any text token may be a pivot, as
in NVIDIA's DartPruner (TensorRT Edge-LLM, cpp/runtime), whose rule for the shares is used
throughout. At a later layer norms are those of its keys (the authors' are those of the layer
before), cosines those of the hidden states after the final norm, and the text is what follows the
first visual token, as in the authors' code. All images of a row share its budget.

The score is a token's distance, 1 - cosine, from the pivot that it was compared with last; a visual
pivot's is 2, and all are 0 in a row that keeps everything.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import Selected, View
from trio_deploy.selection.arrays import FARTHEST, cosine_distances, greatest
from trio_deploy.selection.choice import Choice, Value

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site

PIVOTS = 4
"""Visual pivots, and text pivots: the defaults of the authors and of NVIDIA."""
_STEP = 2.0**-16  # distances are rounded to multiples of this, so that rounding decides no tie


def graph(op: Any, site: Site) -> Choice:
    """Fill the shares up in a loop over the pivots."""
    tokens = site.tokens
    need, prunes = site.need(op)
    features, squares, norms, words = _features(op, site)
    pictures, known = site.largest(op, norms, tokens.visual, PIVOTS)
    known = op.And(known, op.Less(site.constant(op, _counting(PIVOTS), "pivots"), need))
    texts, read = site.largest(op, norms, words, PIVOTS)
    pivots = op.Concat(pictures, texts, axis=1)  # [B,2P]
    valid = site.float32(op, op.Concat(known, read, axis=1))
    unit = site.unit_rows(op, features, squares)
    flat = op.Reshape(unit, [-1, site.text.hidden_size])
    mine = op.Gather(flat, op.Add(pivots, tokens.offset), axis=0)  # [B,2P,d]
    distances = op.Sub(1.0, op.MatMul(mine, op.Transpose(unit, perm=[0, 2, 1])))  # [B,2P,S]
    distances = op.Mul(op.Floor(op.Add(op.Mul(op.Max(distances, 0.0), 1 / _STEP), 0.5)), _STEP)
    own = op.Equal(op.Unsqueeze(pictures, [2]), op.Unsqueeze(tokens.index, [0, 1]))  # [B,P,S]
    own = op.And(own, op.Unsqueeze(known, [2]))
    chosen = site.reduce(op, "ReduceMax", site.float32(op, own), [1], keepdims=False)
    numbers = site.constant(op, _counting(2 * PIVOTS), "numbers")
    shape = op.Shape(tokens.visual)

    def grow(op: Any, turn: Value, chosen: Value, score: Value) -> list[Value]:
        later = op.GreaterOrEqual(numbers, site.float32(op, turn))
        left = site.reduce(op, "ReduceSum", op.Mul(valid, site.float32(op, later)), [1])
        # Reshaped, since TensorRT's older parsers hand on the turn as [1], not as a scalar.
        now = op.Reshape(op.Gather(valid, turn, axis=1), [-1, 1])
        rest = op.Mul(op.Sub(need, site.reduce(op, "ReduceSum", chosen, [1])), now)
        share = op.Floor(op.Div(op.Add(rest, op.Sub(left, 1.0)), op.Max(left, 1.0)))
        distance = op.Reshape(op.Gather(distances, turn, axis=1), shape)  # [B,S]
        free = op.And(tokens.visual, op.Less(chosen, 0.5))
        compared = op.And(free, op.Greater(rest, 0.5))
        score = op.Where(compared, distance, score)
        taken = site.greatest(op, distance, free, share)
        return [op.Add(chosen, site.float32(op, taken)), score]

    states = [chosen, op.Mul(chosen, FARTHEST)]
    chosen, score = site.counted_loop(op, 2 * PIVOTS, states, grow, "grow")
    return site.by_picks(op, op.Greater(chosen, 0.5), prunes, score)


def _features(op: Any, site: Site) -> tuple[Value, Value, Value, Value]:
    """Features f32 [B,S,d], their squared norms [B,S,1], L1 norms [B,S], text pivots bool [B,S]."""
    tokens = site.tokens
    if site.layer == 0:
        features = site.float32(op, tokens.x)
        norms = site.reduce(op, "ReduceSum", op.Abs(features), [2], keepdims=False)
        return features, tokens.squares, norms, tokens.text
    keys = site.merge_heads(op, site.next_layer(op).keys(op))
    norms = op.Abs(site.float32(op, keys))
    norms = site.reduce(op, "ReduceSum", norms, [2], keepdims=False)
    features = site.float32(op, site.final_norm(op))
    squares = site.reduce(op, "ReduceSumSquare", features, [2])
    before = site.d.running_sum(op, site.float32(op, tokens.visual))
    return features, squares, norms, op.And(tokens.text, op.Greater(before, 0.5))


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Fill the shares up, pivot after pivot, in fp64."""
    scores = np.zeros(len(view.visual))
    if view.keep == len(view.places):
        return view.places, scores
    text = ~view.visual
    if view.layer == 0:
        features = view.hidden.astype(np.float64)
        norms = np.abs(features).sum(axis=1)
    else:
        features = view.arrays["final_norm"].astype(np.float64)
        norms = np.abs(view.arrays["keys"].astype(np.float64)).sum(axis=(0, 2))
        text[: view.places[0]] = False
    pictures = greatest(norms, view.visual, min(PIVOTS, view.keep)).tolist()
    pivots = pictures + greatest(norms, text, PIVOTS).tolist()
    scores[pictures] = FARTHEST
    kept = list(pictures)
    free = [place for place in view.places.tolist() if place not in kept]
    for turn, pivot in enumerate(pivots):
        rest, left = view.keep - len(kept), len(pivots) - turn
        if rest == 0:
            break
        distance = np.maximum(cosine_distances(features, features[pivot]), 0.0)
        distance = np.floor(distance / _STEP + 0.5) * _STEP
        scores[free] = distance[free]
        share = -(-rest // left)
        taken = sorted(free, key=lambda place: -distance[place])[:share]
        kept += taken
        free = [place for place in free if place not in taken]
    return np.array(kept, np.int64), scores


def rule(selected: Selected) -> None:
    """The scores alone do not determine the tokens."""


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """Keys unless before layer 0, n·d·GD; the cosines of eight pivots, 8·n·d."""
    n, d, kv = sizes.tokens, text.hidden_size, text.num_kv_heads * text.head_dim
    return (n * d * kv if sizes.layer else 0), 2 * PIVOTS * n * d


def _counting(count: int) -> NDArray[np.float32]:
    return np.arange(count, dtype=np.float32)[None]
