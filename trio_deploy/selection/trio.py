"""TRIO: the greatest gradients of a layer-local loss, near-copies suppressed.

arXiv 2602.04657. The next layer runs alone, then the final norm and the head; at the last few text
tokens the loss is the cross-entropy against the layer's own arg-max. A visual token's score is the
norm of the loss's gradient at its hidden state. Tokens are kept by falling score; a kept token
suppresses those whose cosine with it reaches the threshold, and where too few survive, the best
suppressed ones fill up. All images of a row share its budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import Selected, View
from trio_deploy.selection.choice import Choice
from trio_deploy.selection.nms import cosines_of, greedy_by_cosines, greedy_select

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site

_ROUNDING = 1e-6  # similarities this close to the threshold may fall either way


def graph(op: Any, site: Site) -> Choice:
    """Score by the gradient in closed form (`saliency.py`), suppress in blocks of ranks."""
    scores = site.saliency(op)
    kept, converged = site.suppress(op, scores.ranking)
    return Choice(kept, scores.value, finite=scores.ranking, converged=converged)


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Suppress one token after another; the gradient comes from autograd."""
    scores, visual = view.arrays["gradient"], view.visual
    chosen = greedy_select(scores[visual], view.hidden[visual], view.keep, view.threshold)
    return view.places[chosen], scores


def rule(selected: Selected) -> bool:
    """Whether greedy suppression by the reported scores keeps these tokens."""
    visual, kept = selected.visual, selected.kept.tolist()
    cosines = cosines_of(selected.hidden[visual])
    for margin in (0.0, _ROUNDING, -_ROUNDING):
        chosen = greedy_by_cosines(
            selected.scores[visual], cosines, len(kept), selected.threshold + margin
        )
        if selected.places[chosen].tolist() == kept:
            return True
    return False


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """The gradient, and the cosines of the suppression at worst."""
    return (
        saliency_flops(sizes.tokens, text, sizes.probes),
        similarity_flops(sizes.before, sizes.after, sizes.block, text.hidden_size),
    )


def saliency_flops(n: int, text: TextConfig, probes: int) -> int:
    """Multiply-adds of the gradient over n tokens with P probe rows.

    Over all rows: keys, and their gradient back through W_k, 2·n·d·GD; q·kᵀ and dSᵀ·q, 2·P·n·HD;
    A·n, U·nᵀ and Aᵀ·U, 3·H·P·n·d.  For the probe rows: queries, P·d·HD; W_v, W_o, the MLP and
    lm_head, there and back, 2·P·(2·HD·d + 3dm + dV).
    """
    d, q, kv = text.hidden_size, text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    all_rows = n * (2 * d * kv + 2 * probes * q + 3 * text.num_heads * probes * d)
    there = 2 * q * d + 3 * d * text.intermediate_size + d * text.vocab_size
    return all_rows + probes * (d * q + 2 * there)


def similarity_flops(visual: int, keep: int, block: int, d: int) -> int:
    """Multiply-adds of suppression at worst: N·(k + M) cosine similarities in blocks of M ranks."""
    return visual * min(visual, keep + block) * d
