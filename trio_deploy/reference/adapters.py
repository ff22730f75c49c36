"""transformers' models as the oracle runs them: one adapter per kind of model.

An adapter reads an image as transformers does and takes nothing from the family's `arrange`: where
a family puts a row in the wrong place, the check fails.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trio_deploy.errors import TrioError
from trio_deploy.families.registry import get_family
from trio_deploy.reference.encoder_scores import encoder_scores


@dataclass(frozen=True)
class Features:
    """The images of one prompt.

    Attributes:
        rows: [R, d], what the tower and the connector yield, in the order of the tiles.
        order: int64 [N], row of each visual token; -1 is the newline embedding.
        tokens: [N, d], the visual tokens.
        scores: the encoder's scores by name, fp32 [R].
    """

    rows: Tensor
    order: Tensor
    tokens: Tensor
    scores: dict[str, Tensor]


class Llava:
    """LLaVA-1.5 and LLaVA-NeXT: CLIP, two linear layers, and Llama or Mistral.

    Attributes:
        model: LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.
        text: its language model without the head.
        head: from normalised hidden states to logits.
        image_token_id: the token at every visual place.
        tile: (channels, height, width) of a tile.
    """

    def __init__(self, model: Any) -> None:
        side = model.config.vision_config.image_size
        self.model = model.eval()
        self.text = model.model.language_model
        self.head = model.lm_head
        self.image_token_id = model.config.image_token_id
        self.tile = (3, side, side)

    def features(
        self, tiles: Tensor, sizes: Sequence[tuple[int, int]], scores: Collection[str]
    ) -> Features:
        """Run the tower, the projector and transformers' own packing.

        Args:
            tiles: [T, 3, h, w] of all images of a prompt.
            sizes: (height, width) of each image in pixels.
            scores: names of the encoder's scores that are wanted.
        """
        model = self.model.model
        # The projector's output is what vision.onnx makes: [T, p, d], before tiles are packed.
        projected: list[Tensor] = []
        hook = model.multi_modal_projector.register_forward_hook(
            lambda _module, _inputs, output: projected.append(output)
        )
        image_sizes = torch.tensor([list(size) for size in sizes])
        packing = {"image_sizes": image_sizes} if self._packs else {}
        output = model.get_image_features(tiles, **packing)
        hook.remove()
        return Features(
            rows=projected[0].flatten(0, 1),
            order=self._order(projected[0].shape[:2], image_sizes),
            tokens=torch.cat(list(getattr(output, "pooler_output", output))),
            scores=encoder_scores(model, tiles, scores),
        )

    @property
    def _packs(self) -> bool:
        return hasattr(self.model.model, "pack_image_features")

    def _order(self, tiles: torch.Size, sizes: Tensor) -> Tensor:
        """Row of each visual token, found by letting transformers pack the numbers of the rows."""
        model, config = self.model.model, self.model.config
        numbers = torch.arange(tiles.numel(), dtype=torch.float64).reshape(*tiles, 1)
        if not self._packs:
            return numbers.flatten().long()
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        counts = [
            image_size_to_num_patches(
                size, config.image_grid_pinpoints, config.vision_config.image_size
            )
            for size in sizes
        ]
        order, _ = model.pack_image_features(
            numbers.split(counts),
            sizes,
            config.vision_feature_select_strategy,
            image_newline=numbers.new_full((1,), -1.0),
        )
        return torch.cat(order).flatten().long()

    def positions(self, ids: Tensor) -> Tensor:
        """Rotary positions of a prompt's tokens [1, S], int64 [1, S]."""
        return torch.arange(ids.shape[1], device=ids.device)[None]

    def run_layers(
        self, layers: Iterable[int], hidden: Tensor, positions: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Run decoder layers on [1, S, d].

        No mask is needed: without one, attention is causal for many tokens and covers the whole
        cache for one. A layer's cache is its own, so segments may differ in length.
        """
        rotary = self.text.rotary_emb(hidden, position_ids=positions)
        for index in layers:
            hidden = self.text.layers[index](
                hidden,
                attention_mask=None,
                position_embeddings=rotary,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return hidden

    def queries_and_keys(
        self, layer: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [H, S, D] and keys [G, S, D] of a layer over [1, S, d], rotated."""
        module = self.text.layers[layer]
        normal, size = module.input_layernorm(hidden), module.self_attn.head_dim
        query = module.self_attn.q_proj(normal).unflatten(-1, (-1, size)).transpose(1, 2)
        key = module.self_attn.k_proj(normal).unflatten(-1, (-1, size)).transpose(1, 2)
        cos, sin = self.text.rotary_emb(hidden, position_ids=positions)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query[0], key[0]


ADAPTERS: dict[str, type[Llava]] = {"llava": Llava}
"""By the name that a family gives as `reference`."""


def adapt(model: Any, family: str) -> Llava:
    """A model in the adapter of its family."""
    return ADAPTERS[get_family(family).reference](model)


def model_class(family: str) -> Any:
    """transformers' class for a family's checkpoints.

    Raises:
        TrioError: the installed transformers has none.
    """
    name = get_family(family).architecture
    if not hasattr(transformers, name):
        raise TrioError(f"the installed transformers has no {name}: install another version")
    return getattr(transformers, name)
