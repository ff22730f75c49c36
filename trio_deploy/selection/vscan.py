"""VScan: a global scan, a local scan, and the other tokens merged into those that stay.

arXiv 2505.22654, the encoder stage of the paper's encoder-involved mode. Half of the budget,
rounded up, goes to the greatest attention of the encoder's class token (`prior`). The rest goes,
among the tokens that are left, to the best of each window of patches by the class token's attention
in a shallow layer, then to the second best of each, and so on: the order of `prior_local`. Each
dropped patch is averaged into the kept visual token of the greatest cosine; image_newline, which is
no patch, is just dropped. That the global scan goes first, and that merging comes after the
projector (on the hidden states at the pruning point), is our reading. All images and tiles of a row
share its budget. The score is `prior`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import Selected, View
from trio_deploy.selection.arrays import FARTHEST, TIE, cosine_distances, greatest
from trio_deploy.selection.choice import Choice, Value

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site


def graph(op: Any, site: Site) -> Choice:
    """Scan twice, and merge each dropped patch into one kept token."""
    tokens = site.tokens
    need, prunes = site.need(op)
    prior, local = site.encoder_score("prior"), site.encoder_score("prior_local")
    half = op.Floor(op.Mul(need, 0.5))
    wide = site.greatest(op, prior, tokens.visual, op.Sub(need, half))
    rest = op.And(tokens.visual, op.Not(wide))
    picked = op.Or(wide, site.greatest(op, local, rest, half))
    choice = site.by_picks(op, picked, prunes, prior)
    dropped = op.And(op.And(tokens.visual, op.Not(choice.kept)), op.Greater(local, 0.0))
    score = op.Where(tokens.visual, prior, 0.0)
    total = op.Add(score, op.Where(tokens.visual, local, 0.0))
    return replace(
        choice,
        score=score,
        finite=total,
        merge=lambda op, index: _merge(op, site, dropped, index),
    )


def _merge(op: Any, site: Site, dropped: Value, index: Value) -> Value:
    """Average each token of `dropped` bool [B,S] into one of `index` int64 [B,W]: [B,W,d]."""
    tokens = site.tokens
    filled, safe = op.GreaterOrEqual(index, 0), op.Max(index, 0)
    x = site.float32(op, tokens.x)
    unit = site.unit_rows(op, x, tokens.squares)
    flat = op.Reshape(unit, [-1, site.text.hidden_size])
    kept = op.Gather(flat, op.Add(safe, tokens.offset), axis=0)  # [B,W,d]
    cosines = op.MatMul(kept, op.Transpose(unit, perm=[0, 2, 1]))  # [B,W,S]
    visual = op.GatherElements(site.int64(op, tokens.visual), safe, axis=1)
    targets = op.Unsqueeze(op.And(filled, op.Greater(visual, 0)), [2])  # [B,W,1]
    cosines = op.Where(targets, cosines, -FARTHEST)
    greatest_cosine = site.reduce(op, "ReduceMax", cosines, [1])
    near = op.GreaterOrEqual(cosines, op.Sub(greatest_cosine, TIE))
    columns = site.float32(op, op.Range(0, op.Squeeze(site.width, [0]), 1))
    columns = op.Unsqueeze(columns, [0, 2])  # [1,W,1]
    none = site.float32(op, site.width)
    target = site.reduce(op, "ReduceMin", op.Where(op.And(near, targets), columns, none), [1])
    given = op.And(op.Equal(columns, target), op.Unsqueeze(dropped, [1]))
    own = op.Equal(op.Unsqueeze(index, [2]), op.Unsqueeze(tokens.index, [0, 1]))
    share = site.float32(op, op.Or(given, own))  # [B,W,S]
    count = op.Max(site.reduce(op, "ReduceSum", share, [2]), 1.0)
    return site.stored(op, op.Div(op.MatMul(share, x), count))


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Take half by the global scan, rounded up, then half by the local scan."""
    prior, local = (view.arrays[name].astype(np.float64) for name in ("prior", "prior_local"))
    return _scans(prior, local, view.visual, view.keep), prior * view.visual


def _scans(
    prior: NDArray[np.float64], local: NDArray[np.float64], visual: NDArray[np.bool_], keep: int
) -> NDArray[np.int64]:
    """Find the `keep` places that the two scans pick, in any order."""
    if keep == visual.sum():
        return np.flatnonzero(visual)
    wide = greatest(prior * visual, visual, keep - keep // 2)
    rest = visual.copy()
    rest[wide] = False
    return np.concatenate([wide, greatest(local * visual, rest, keep // 2)])


def merge(view: View, index: NDArray[np.int64]) -> NDArray[np.floating]:
    """Hidden states [W,d] of the places `index` [W], each dropped patch averaged into one.

    A patch goes to the kept visual token of the greatest cosine, to the earlier one of equals.
    """
    groups: dict[int, list[int]] = {int(place): [int(place)] for place in index}
    targets = [place for place in groups if view.visual[place]]
    for place in view.places.tolist():
        if place in groups or view.arrays["prior_local"][place] <= 0 or not targets:
            continue
        distance = cosine_distances(view.hidden[targets], view.hidden[place])
        nearest = int(np.flatnonzero(distance <= distance.min() + TIE)[0])
        groups[targets[nearest]].append(place)
    return np.stack([view.hidden[group].mean(axis=0) for group in groups.values()])


def rule(selected: Selected) -> bool:
    """Compare the tokens with those that the two scans pick by the encoder's scores."""
    prior, local = (selected.encoder[name].astype(np.float64) for name in ("prior", "prior_local"))
    picked = _scans(prior, local, selected.visual, len(selected.kept))
    return np.array_equal(np.sort(picked), selected.kept)


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """Cosines of all n tokens with those that stay, and their means: 2·n·(text + after)·d."""
    return 0, 2 * sizes.tokens * (sizes.text_tokens + sizes.after) * text.hidden_size
