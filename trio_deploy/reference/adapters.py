"""transformers' models as the oracle runs them: one adapter per kind of model.

An adapter reads an image as transformers does and takes nothing from the family's `arrange`: where
a family puts a row in the wrong place, the check fails.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import torch
import transformers
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trio_deploy.errors import TrioError
from trio_deploy.families.registry import get_family
from trio_deploy.reference.encoder_scores import encoder_scores
from trio_deploy.reference.row import Row
from trio_deploy.reference.trace import Tensors


@dataclass(frozen=True)
class Call:
    """One run of the vision graph.

    Attributes:
        inputs: by name.
        rows: the feature rows that it yields, of `Features.rows`.
    """

    inputs: Tensors
    rows: slice


@dataclass(frozen=True)
class Features:
    """The images of one prompt.

    Attributes:
        rows: [R, d], what the tower and the connector yield, in the order of the tiles.
        order: int64 [N], row of each visual token; -1 is the newline embedding.
        tokens: [N, d], the visual tokens.
        scores: the encoder's scores by name, fp32 [R].
        deep: features for the outputs of decoder layers 0, 1, …, [R, d] each.
        calls: how the vision graph yields all of these.
    """

    rows: Tensor
    order: Tensor
    tokens: Tensor
    scores: dict[str, Tensor]
    deep: tuple[Tensor, ...]
    calls: list[Call]


@dataclass(frozen=True)
class Deepstack:
    """What is added to the outputs of the first decoder layers.

    Attributes:
        rows: for layers 0, 1, …, [R, d] each; most families have none.
        index: int64 [S], row of each token, where there are rows; -1 gets nothing added.
    """

    rows: tuple[Tensor, ...] = ()
    index: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.long))

    def kept(self, index: Tensor) -> Deepstack:
        """The same for the tokens `index` [W] alone."""
        return Deepstack(self.rows, self.index[index]) if self.rows else self

    def none(self) -> Deepstack:
        """The same for one new token, which has no features."""
        return Deepstack(tuple(rows[:0] for rows in self.rows), self.index.new_full((1,), -1))

    def after(self, layer: int, hidden: Tensor) -> Tensor:
        """Add to the output [1, S, d] of a layer."""
        if layer >= len(self.rows):
            return hidden
        has = self.index >= 0
        hidden = hidden.clone()
        hidden[0, has] += self.rows[layer][self.index[has]]
        return hidden


class Llava:
    """LLaVA-1.5 and LLaVA-NeXT: CLIP, two linear layers, and Llama or Mistral.

    Attributes:
        model: LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.
        text: its language model without the head.
        head: from normalised hidden states to logits.
        image_token_id: the token at every visual place.
        one_call: whether the vision graph sees all pictures of a batch at once.
        renumbers: whether tokens can take new positions after pruning.
    """

    one_call = True
    renumbers = True

    def __init__(self, model: Any) -> None:
        self.model = model.eval()
        self.text = model.model.language_model
        self.head = model.lm_head
        self.image_token_id = model.config.image_token_id

    def features(self, row: Row, scores: Collection[str]) -> Features:
        """Run the tower, the projector and transformers' own packing.

        Args:
            scores: names of the encoder's scores that are wanted.
        """
        model, weight = self.model.model, self.text.embed_tokens.weight
        if row.pixel_values is None:
            side = self.model.config.vision_config.image_size
            empty = weight.new_zeros(0, weight.shape[1])
            call = Call({"pixel_values": np.zeros((0, 3, side, side), np.float32)}, slice(0, 0))
            nothing = {name: torch.zeros(0) for name in scores}
            return Features(empty, torch.zeros(0, dtype=torch.long), empty, nothing, (), [call])
        tiles = torch.as_tensor(row.pixel_values).to(weight)
        # The projector's output is what vision.onnx makes: [T, p, d], before tiles are packed.
        projected: list[Tensor] = []
        hook = model.multi_modal_projector.register_forward_hook(
            lambda _module, _inputs, output: projected.append(output)
        )
        image_sizes = torch.tensor([list(size) for size in row.image_sizes])
        packing = {"image_sizes": image_sizes} if self._packs else {}
        output = model.get_image_features(tiles, **packing)
        hook.remove()
        return Features(
            rows=projected[0].flatten(0, 1),
            order=self._order(projected[0].shape[:2], image_sizes),
            tokens=torch.cat(list(getattr(output, "pooler_output", output))),
            scores=encoder_scores(model, tiles, scores),
            deep=(),
            calls=[Call({"pixel_values": np.asarray(row.pixel_values)}, slice(None))],
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

    def positions(self, row: Row) -> Tensor:
        """Rotary positions of a prompt's tokens, int64 [1, S]."""
        return torch.arange(len(row.input_ids), device=self.model.device)[None]

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles at `positions`, for hidden states [1, S, d]."""
        return self.text.rotary_emb(hidden, position_ids=positions)

    def run_layers(
        self,
        layers: Iterable[int],
        hidden: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
        deepstack: Deepstack | None = None,
    ) -> Tensor:
        """Run decoder layers on [1, S, d].

        No mask is needed: without one, attention is causal for many tokens and covers the whole
        cache for one. A layer's cache is its own, so segments may differ in length.
        """
        rotary = self.rotary(hidden, positions)
        for index in layers:
            hidden = self.text.layers[index](
                hidden,
                attention_mask=None,
                position_embeddings=rotary,
                past_key_values=cache,
                use_cache=cache is not None,
            )
            if deepstack is not None:
                hidden = deepstack.after(index, hidden)
        return hidden

    def queries_and_keys(
        self, layer: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [H, S, D] and keys [G, S, D] of a layer over [1, S, d], rotated."""
        module = self.text.layers[layer]
        attention, normal = module.self_attn, module.input_layernorm(hidden)
        query = attention.q_proj(normal).unflatten(-1, (-1, attention.head_dim))
        key = attention.k_proj(normal).unflatten(-1, (-1, attention.head_dim))
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)
        cos, sin = self.rotary(hidden, positions)
        query, key = apply_rotary_pos_emb(query.transpose(1, 2), key.transpose(1, 2), cos, sin)
        return query[0], key[0]


class Qwen(Llava):
    """Qwen2-VL, Qwen2.5-VL and Qwen3-VL: patches of pictures of any size, three positions."""

    one_call = False
    renumbers = False

    def features(self, row: Row, scores: Collection[str]) -> Features:
        """Run the tower and the merger.

        Raises:
            TrioError: scores are asked for, which only a class token gives.
        """
        if scores:
            raise TrioError(f"the vision tower has no class token, so it has no {min(scores)}")
        weight, vision = self.text.embed_tokens.weight, self.model.config.vision_config
        if row.pixel_values is None:
            empty, taps = weight.new_zeros(0, weight.shape[1]), len(self._deep_layers)
            order = torch.zeros(0, dtype=torch.long)
            return Features(empty, order, empty, {}, (empty,) * taps, [])
        pixels = torch.as_tensor(row.pixel_values).to(weight)
        out = self.model.model.get_image_features(pixels, self._grids(row))
        tokens = torch.cat(list(out.pooler_output))
        deep = [torch.cat(list(rows)) for rows in getattr(out, "deepstack_features", None) or []]
        calls, start, square = [], 0, vision.spatial_merge_size**2
        for grid in self._grids(row).tolist():
            count = grid[0] * grid[1] * grid[2]
            patches = np.asarray(row.pixel_values)[start : start + count]
            inputs = {"pixel_values": patches.reshape(grid[0], -1, patches.shape[1])}
            rows = slice(start // square, (start + count) // square)
            calls.append(Call(inputs | self._places(grid[1], grid[2]), rows))
            start += count
        return Features(tokens, torch.arange(len(tokens)), tokens, {}, tuple(deep), calls)

    @property
    def _deep_layers(self) -> Sequence[int]:
        return getattr(self.model.config.vision_config, "deepstack_visual_indexes", ())

    def _grids(self, row: Row) -> Tensor:
        """Frames, rows and columns of the patches of each picture, int64 [n, 3]."""
        merge = self.model.config.vision_config.spatial_merge_size
        return torch.tensor([[t, h * merge, w * merge] for t, h, w in row.grids]).reshape(-1, 3)

    def _places(self, rows: int, columns: int) -> Tensors:
        """The inputs of the tower that depend on the grid alone, by transformers' functions."""
        try:
            from transformers import vision_utils
        except ImportError as error:
            raise TrioError(
                "the reference of this model needs transformers 5: install another version"
            ) from error
        vision, grid = self.model.config.vision_config, torch.tensor([[1, rows, columns]])
        merge = vision.spatial_merge_size
        inputs = {"patch_position": vision_utils.get_vision_position_ids(grid, merge).numpy()}
        if hasattr(vision, "num_position_embeddings"):
            taps, weights = vision_utils.get_vision_interpolation_indices_and_weights(
                grid,
                math.isqrt(vision.num_position_embeddings),
                align_corners=True,
                spatial_merge_size=merge,
            )
            inputs |= {"position_taps": taps.numpy(), "position_weights": weights.float().numpy()}
        if hasattr(vision, "window_size"):
            order, bounds = vision_utils.get_vision_window_index(
                grid, merge, vision.window_size, vision.patch_size
            )
            side = vision.window_size // vision.patch_size // merge
            inputs |= _windows(order, bounds.tolist(), merge**2, side**2)
        return inputs

    def positions(self, row: Row) -> Tensor:
        """Time, row and column of a prompt's tokens, int64 [1, 3, S]."""
        ids = torch.as_tensor(row.input_ids, device=self.model.device)[None]
        grids = self._grids(row).to(ids.device)
        kinds = (ids == self.image_token_id).int()
        found, _ = self.model.model.get_rope_index(
            ids, mm_token_type_ids=kinds, image_grid_thw=grids if len(grids) else None
        )
        return found.transpose(0, 1)

    def rotary(self, hidden: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
        """cos and sin of the rotary angles at `positions` [1, 3, S]."""
        return self.text.rotary_emb(hidden, position_ids=positions.transpose(0, 1))


def _windows(order: Tensor, bounds: Sequence[int], square: int, blocks: int) -> Tensors:
    """window_index and window_slot from transformers' order of the blocks and ends of windows.

    Args:
        order: block of patches at each place.
        bounds: patches before each window, and all of them.
        square: patches per block.
        blocks: blocks that a window has room for.
    """
    patches = (order[:, None] * square + torch.arange(square)).flatten().numpy()
    index = np.full((len(bounds) - 1, blocks * square), -1, np.int64)
    slot = np.empty(len(patches), np.int64)
    for window, (start, stop) in enumerate(pairwise(bounds)):
        index[window, : stop - start] = patches[start:stop]
        slot[patches[start:stop]] = window * index.shape[1] + np.arange(stop - start)
    return {"window_index": index, "window_slot": slot}


ADAPTERS: dict[str, type[Llava]] = {"llava": Llava, "qwen": Qwen}
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
