"""FastV: the visual tokens that the last token attends to most.

Chen et al., arXiv 2403.06764. The authors read the attention of the layer that has just run; a
pruning point sees what the next layer will read, so here it is the attention of the next layer,
averaged over its heads. All images of a row share its budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import View
from trio_deploy.selection.arrays import greatest, keeps_greatest
from trio_deploy.selection.choice import Choice

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site

_MASKED = -1e30  # additive mask; its exponential is zero in fp32


def graph(op: Any, site: Site) -> Choice:
    """Keep the greatest attention weights."""
    text, tokens = site.text, site.tokens
    heads, groups, size = text.num_heads, text.num_kv_heads, text.head_dim
    layer = site.next_layer(op)
    last = op.Unsqueeze(op.Sub(site.lengths, 1), [1])  # [B,1]
    q = op.Mul(layer.queries(op, last), size**-0.5)
    q = op.Reshape(q, [0, groups, heads // groups, size])
    k = layer.keys(op)  # [B,G,S,D]
    logits = site.float32(op, op.MatMul(q, op.Transpose(k, perm=[0, 1, 3, 2])))  # [B,G,H/G,S]
    padding = op.Greater(op.Unsqueeze(tokens.index, [0]), last)
    mask = op.Mul(site.float32(op, padding), _MASKED)
    weights = op.Softmax(op.Add(logits, op.Unsqueeze(mask, [1, 2])), axis=-1)
    return site.by_score(op, site.reduce(op, "ReduceMean", weights, [1, 2], keepdims=False))


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Softmax over all tokens for the last query of each head, averaged over the heads."""
    queries, keys = (view.arrays[name].astype(np.float64) for name in ("queries", "keys"))
    keys = keys.repeat(len(queries) // len(keys), axis=0)
    logits = np.einsum("hd,hsd->hs", queries[:, -1], keys) / keys.shape[-1] ** 0.5
    weights = np.exp(logits - logits.max(axis=1, keepdims=True))
    weights /= weights.sum(axis=1, keepdims=True)
    scores = weights.mean(axis=0) * view.visual
    return greatest(scores, view.visual, view.keep), scores


rule = keeps_greatest


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """Keys of all n tokens, n·d·GD, and one query, d·HD + n·HD."""
    n, d = sizes.tokens, text.hidden_size
    inner, kv = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    return n * d * kv + d * inner + n * inner, 0
