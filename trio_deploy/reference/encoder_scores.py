"""The vision encoder's per-token scores, by hooks on transformers' CLIP tower."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from trio_deploy.schedule.methods import WINDOW, shallow_layer


def encoder_scores(model: Any, pixel_values: Tensor, names: Collection[str]) -> dict[str, Tensor]:
    """Compute those of `prior` and `prior_local` that `names` lists, for each image feature row.

    Args:
        model: transformers' LLaVA, without its head.
        pixel_values: [T, 3, h, w].

    Returns:
        Each score by name, fp32 [T·p].
    """
    if not names:
        return {}
    config, tower = model.config, model.vision_tower
    layers = getattr(tower, "vision_model", tower).encoder.layers
    chosen = config.vision_feature_layer
    chosen = [chosen] if isinstance(chosen, int) else chosen
    top = max(i if i >= 0 else len(layers) + 1 + i for i in chosen) - 1
    shallow = min(shallow_layer(len(layers)), top)
    attention_of: dict[int, Tensor] = {}

    def hooked(index: int) -> Any:
        def record(_module: Any, _inputs: Any, normal: Tensor) -> None:
            attention = layers[index].self_attn
            query, key = attention.q_proj(normal[:, :1]), attention.k_proj(normal)
            query, key = (
                x.unflatten(-1, (attention.num_heads, -1)).transpose(1, 2) for x in (query, key)
            )
            weights = (query @ key.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
            attention_of[index] = weights.mean(1)[:, 0].float()  # [T, 1 + patches]

        return layers[index].layer_norm1.register_forward_hook(record)

    hooks = [hooked(index) for index in {top, shallow}]
    tower(pixel_values, output_hidden_states=True)
    for hook in hooks:
        hook.remove()
    local = torch.cat(
        [attention_of[shallow][:, :1] * 0 + WINDOW**2, window_order(attention_of[shallow])], dim=1
    )
    scores = {"prior": attention_of[top], "prior_local": local}
    first = 1 if config.vision_feature_select_strategy == "default" else 0
    return {name: scores[name][:, first:].flatten() for name in sorted(names)}


def window_order(attention: Tensor) -> Tensor:
    """Order of the window scan, greater is earlier, from attention [T, 1 + patches]: [T, patches].

    36 minus a patch's rank in its window, plus 0.999 times its attention as a share of the tile's
    greatest, which decides among equal ranks.
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
