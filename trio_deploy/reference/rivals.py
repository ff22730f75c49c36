"""The other selection methods, one row at a time, as their papers state them.

`graphs/rivals.py` has the same ones as graphs and names where they come from. Everything here is
for one row of hidden states [1, S, d]; cosines are computed in fp64.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trio_deploy.methods import (
    FAR,
    PIVOTS,
    RANDOM_PRIME,
    RANDOM_ROUNDS,
    STEP,
    TIE,
    random_constant,
)


@dataclass(frozen=True)
class View:
    """What a method sees of one row.

    Attributes:
        layer: the one that runs next.
        hidden: its input, [1, S, d].
        positions: int64 [1, S].
        visual: bool [S].
        keep: visual tokens to keep; their number at most.
        seed: of `random`.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    visual: Tensor
    keep: int
    seed: int = 0

    @property
    def places(self) -> Tensor:
        """Places of the visual tokens, int64 [N]."""
        return self.visual.nonzero().flatten()


Method = Callable[[Any, View], tuple[Tensor, Tensor]]
"""From the oracle and a view: places kept, [keep] in any order, and scores [S] fp64."""


def top_gradient(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """The greatest gradients, near-copies or not."""
    scores = oracle.saliency(view.layer, view.hidden, view.positions, view.visual)
    return _best(scores, view), scores


def fastv(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """The greatest attention of the last token in the next layer, averaged over the heads."""
    query, key = _queries_and_keys(oracle, view)  # [H, S, D], [G, S, D]
    key = key.repeat_interleave(len(query) // len(key), dim=0)
    logits = (key @ query[:, -1, :, None])[..., 0] / key.shape[-1] ** 0.5  # [H, S]
    scores = logits.softmax(-1).mean(0).double() * view.visual
    return _best(scores, view), scores


def dart(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """The visual pivots, and pivot after pivot what is least like it."""
    if view.keep == len(view.places):
        return view.places, torch.zeros(len(view.visual), dtype=torch.float64)
    text = ~view.visual
    if view.layer == 0:
        features, norms = view.hidden[0].double(), view.hidden[0].abs().sum(-1)
    else:
        _, key = _queries_and_keys(oracle, view)
        features, norms = oracle.text.norm(view.hidden)[0].double(), key.abs().sum((0, 2))
        text[: int(view.places[0])] = False
    pictures = _largest(norms, view.visual, min(PIVOTS, view.keep))
    pivots = pictures + _largest(norms, text, PIVOTS)
    scores = torch.zeros(len(norms), dtype=torch.float64)
    scores[pictures] = FAR
    kept = list(pictures)
    free = [place for place in view.places.tolist() if place not in kept]
    for turn, pivot in enumerate(pivots):
        rest, left = view.keep - len(kept), len(pivots) - turn
        if rest == 0:
            break
        distance = _distances(features, features[pivot])
        distance = ((distance.clamp(min=0) / STEP + 0.5).floor() * STEP).cpu()
        scores[free] = distance[free]
        share = -(-rest // left)
        taken = sorted(free, key=lambda place: -distance[place])[:share]
        kept += taken
        free = [place for place in free if place not in taken]
    return torch.tensor(kept, dtype=torch.int64), scores


def divprune(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """Again and again the token that is farthest from all that is kept."""
    places = view.places
    if view.keep == len(places):
        return places, torch.zeros(len(view.visual), dtype=torch.float64)
    features = view.hidden[0, places].double()
    distances = torch.stack([_distances(features, row) for row in features])  # [N, N]
    nearest = distances.clone().fill_diagonal_(FAR).min(dim=0).values
    scores = torch.zeros(len(view.visual), dtype=torch.float64)
    kept: list[int] = []
    gap = nearest
    while len(kept) < view.keep:
        gap = gap.clone()
        gap[kept] = -1.0
        token = int((gap >= gap.max() - TIE).nonzero()[0])
        scores[places[token]] = gap[token] if kept else FAR
        away = distances[token].clamp(min=0)
        gap = torch.minimum(gap, away) if kept else away
        kept.append(token)
    dropped = [token for token in range(len(places)) if token not in kept]
    scores[places[dropped]] = gap[dropped].cpu() if kept else FAR
    return places[kept], scores


def random(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """The tokens that come last under a permutation by the seed."""
    x = torch.arange(len(view.visual)) % RANDOM_PRIME
    key = view.seed % RANDOM_PRIME
    for turn in range(RANDOM_ROUNDS):
        x = (x + key + random_constant(view.layer, turn)) % RANDOM_PRIME
        x = x * x % RANDOM_PRIME * x % RANDOM_PRIME
    scores = (x + 1).double() / RANDOM_PRIME * view.visual.cpu()
    return _best(scores, view), scores


METHODS: dict[str, Method] = {
    "topk-gradient": top_gradient,
    "fastv": fastv,
    "dart": dart,
    "divprune": divprune,
    "random": random,
}


def _best(scores: Tensor, view: View) -> Tensor:
    """Places of the `keep` greatest scores; of equal ones the earlier."""
    places = view.places
    order = torch.sort(scores.to(places.device)[places], descending=True, stable=True).indices
    return places[order[: view.keep]]


def _largest(norms: Tensor, among: Tensor, count: int) -> list[int]:
    """Places of the `count` greatest norms, greatest first."""
    places = among.nonzero().flatten()
    order = torch.sort(norms[places], descending=True, stable=True).indices
    return places[order[:count]].tolist()


def _queries_and_keys(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """Of the next layer, rotated: [H, S, D] and [G, S, D]."""
    layer = oracle.text.layers[view.layer]
    normal = layer.input_layernorm(view.hidden)
    size = layer.self_attn.head_dim
    query = layer.self_attn.q_proj(normal).unflatten(-1, (-1, size)).transpose(1, 2)
    key = layer.self_attn.k_proj(normal).unflatten(-1, (-1, size)).transpose(1, 2)
    cos, sin = oracle.text.rotary_emb(view.hidden, position_ids=view.positions)
    query, key = apply_rotary_pos_emb(query, key, cos, sin)
    return query[0], key[0]


def _distances(rows: Tensor, row: Tensor) -> Tensor:
    """1 - cosine of each of [n, d] with [d]; a zero row has cosine 0."""
    norms = rows.norm(dim=-1).clamp(min=1e-12) * row.norm().clamp(min=1e-12)
    return 1.0 - rows @ row / norms
