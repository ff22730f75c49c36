"""The other selection methods, one row at a time, as their papers state them.

`graphs/rivals.py` has the same ones as graphs and names where they come from. Everything here is
for one row of hidden states [1, S, d]; cosines are computed in fp64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trio_deploy.schedule.methods import (
    FAR,
    PIVOTS,
    RANDOM_PRIME,
    RANDOM_ROUNDS,
    STEP,
    TIE,
    WINDOW,
    random_constant,
    shallow_layer,
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
        seed: of `random`, below `methods.SEEDS`.
        encoder: `prior` and `prior_local` of every token, fp32 [S], where a method goes by them.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    visual: Tensor
    keep: int
    seed: int = 0
    encoder: Mapping[str, Tensor] = field(default_factory=dict)

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
    index = torch.arange(len(view.visual))
    high, low = divmod(view.seed, RANDOM_PRIME)
    keys, x = (low + index // RANDOM_PRIME, high), index % RANDOM_PRIME
    for turn in range(RANDOM_ROUNDS):
        x = (x + keys[turn % 2] + random_constant(view.layer, turn)) % RANDOM_PRIME
        x = x * x % RANDOM_PRIME * x % RANDOM_PRIME
    scores = (x + 1).double() / RANDOM_PRIME * view.visual.cpu()
    return _best(scores, view), scores


def cls_attention(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """What the encoder's class token attends to most."""
    scores = view.encoder["prior"].double() * view.visual
    return _best(scores, view), scores


def vscan(oracle: Any, view: View) -> tuple[Tensor, Tensor]:
    """Half by the global scan, rounded up, then by the local scan."""
    prior, local = (view.encoder[name].double() * view.visual for name in ("prior", "prior_local"))
    if view.keep == len(view.places):
        return view.places, prior
    wide = _best(prior, replace(view, keep=view.keep - view.keep // 2))
    rest = view.visual.clone()
    rest[wide] = False
    near = _best(local, replace(view, visual=rest, keep=view.keep // 2))
    return torch.cat([wide, near]), prior


def merge(view: View, index: Tensor) -> Tensor:
    """Hidden states of the places `index` [W], what is dropped averaged into them: [1, W, d].

    A dropped patch goes to the kept visual token of the greatest cosine, to the earlier one of
    equals; what is no patch (`prior_local` 0: image_newline) is just dropped.
    """
    hidden = view.hidden[0]
    groups: dict[int, list[int]] = {int(place): [int(place)] for place in index}
    heirs = [place for place in groups if view.visual[place]]
    for place in view.places.tolist():
        if place in groups or view.encoder["prior_local"][place] <= 0 or not heirs:
            continue
        distance = _distances(hidden[heirs].double(), hidden[place].double())
        nearest = int((distance <= distance.min() + TIE).nonzero()[0])
        groups[heirs[nearest]].append(place)
    return torch.stack([hidden[group].mean(0) for group in groups.values()])[None]


METHODS: dict[str, Method] = {
    "topk-gradient": top_gradient,
    "fastv": fastv,
    "dart": dart,
    "divprune": divprune,
    "random": random,
    "cls-attention": cls_attention,
    "vscan": vscan,
}


def encoder_scores(model: Any, pixel_values: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """`prior` and `prior_local` of the rows of image_features [T·p], fp32, as far as `names` asks.

    Args:
        model: transformers' LLaVA, without its head.
        pixel_values: [T, 3, h, w].
    """
    if not names:
        return {}
    config, tower = model.config, model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    top = max(i if i >= 0 else len(layers) + 1 + i for i in chosen) - 1
    shallow = min(shallow_layer(len(layers)), top)
    seen: dict[int, Tensor] = {}

    def watch(index: int) -> Any:
        def note(_module: Any, _inputs: Any, normal: Tensor) -> None:
            attention = layers[index].self_attn
            query, key = attention.q_proj(normal[:, :1]), attention.k_proj(normal)
            query, key = (
                x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key)
            )
            weights = (query @ key.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
            seen[index] = weights.mean(1)[:, 0].float()  # [T, 1 + patches]

        return layers[index].layer_norm1.register_forward_hook(note)

    hooks = [watch(index) for index in {top, shallow}]
    tower(pixel_values, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    local = torch.cat([seen[shallow][:, :1] * 0 + WINDOW**2, _window_order(seen[shallow])], dim=1)
    scores = {"prior": seen[top], "prior_local": local}
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return {name: scores[name][:, first:].flatten() for name in sorted(names)}


def _window_order(attention: Tensor) -> Tensor:
    """For each patch, what decides when the local scan takes it: [T, patches] of [T, 1 + patches].

    36 minus its rank inside its window, and for equal ranks by the attention itself.
    """
    attention = attention[:, 1:]
    side = math.isqrt(attention.shape[1])
    place = torch.arange(side * side)
    window = place // side // WINDOW * side + place % side // WINDOW
    order = torch.zeros_like(attention)
    for tile, weights in enumerate(attention):
        for number in window.unique():
            inside = (window == number).nonzero().flatten()
            ranked = inside[weights[inside].argsort(descending=True, stable=True)]
            order[tile, ranked] = float(WINDOW**2) - torch.arange(len(inside))
        order[tile] += 0.999 * weights / weights.max()
    return order


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
