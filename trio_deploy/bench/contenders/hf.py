"""transformers without pruning: its own forward pass and cache, without the cost of `generate`."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from trio_deploy.bench.case import Case, Run, timed
from trio_deploy.bench.contenders.torch_model import (
    clock,
    encode,
    load_model,
    precision,
    ran_as,
)
from trio_deploy.bench.workload import Inputs, Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.reference.row import Row


def open_transformers(
    case: Case, work: Workload, *, device: str = "cpu", dtype: str = "float32"
) -> Callable[[int], Run]:
    """A contender on the bundle's weights and on what the runtime's preprocessing yields.

    Args:
        device: torch device, `cpu` or `cuda`; a GPU is waited for wherever time is taken.
        dtype: float type of weights and arithmetic.

    Raises:
        TrioError: torch or transformers is not installed.
    """
    bundle = Bundle.load(case.bundle)
    model = load_model(case, bundle, device, dtype)
    import torch

    inputs = Inputs(bundle)
    marks: dict[str, float] = {}
    now = clock(model.device)
    if hasattr(model.model, "visual"):  # a tower of patches, its connector included
        first_part = last_part = model.model.visual
    else:
        first_part, last_part = model.model.vision_tower, model.model.multi_modal_projector
    first_part.register_forward_pre_hook(lambda *_: marks.update(start=now()))
    last_part.register_forward_hook(lambda *_: marks.update(stop=now()))
    text = inputs.config.text

    @torch.inference_mode()
    def answer(seed: int) -> Run:
        stages: dict[str, float] = {}
        start = time.perf_counter()
        prompt, row = encode(inputs, work, seed, stages)
        feeds: dict[str, Any] = {"input_ids": torch.as_tensor(prompt.ids)[None]}
        feeds["pixel_values"] = torch.as_tensor(row.pixel_values, dtype=model.dtype)
        if hasattr(model.model, "pack_image_features"):  # a model of tiled pictures
            feeds = _tiled(feeds, row)
        elif row.grids:
            feeds |= _patched(feeds, row, model.config)
        feeds = {name: tensor.to(model.device) for name, tensor in feeds.items()}
        with timed(stages, "prefill", now):
            out = model(**feeds, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = now() - start
        stages["vision"] = marks["stop"] - marks["start"]
        stages["prefill"] -= stages["vision"]
        for _ in range(work.new_tokens - 1):
            out = model(input_ids=token, past_key_values=out.past_key_values, use_cache=True)
            token = out.logits[:, -1:].argmax(-1)
        later = now() - start - first
        return Run(
            stages=stages,
            first_token_s=first,
            tokens_per_s=(work.new_tokens - 1) / later if work.new_tokens > 1 else 0.0,
            prompt_tokens=prompt.length,
            visual_tokens=prompt.visual_tokens,
            layer_ranges=((0, text.num_layers, prompt.length),),
            kv_bytes=text.kv_bytes([prompt.length] * text.num_layers, model.dtype.itemsize),
            precision=precision(model),
            ran_as=ran_as(model),
        )

    return answer


def _patched(feeds: dict[str, Any], row: Row, config: Any) -> dict[str, Any]:
    """The grids of pictures of any size, and which tokens are theirs."""
    import torch

    merge = config.vision_config.spatial_merge_size
    return {
        "image_grid_thw": torch.tensor([[t, h * merge, w * merge] for t, h, w in row.grids]),
        "mm_token_type_ids": (feeds["input_ids"] == config.image_token_id).int(),
    }


def _tiled(feeds: dict[str, Any], row: Row) -> dict[str, Any]:
    """Pictures in LLaVA-NeXT's form: tiles per picture, padded to the largest count, and sizes."""
    import torch

    sizes, pixels = row.image_sizes, feeds["pixel_values"]
    count = len(sizes)
    tiles = len(pixels) // count  # pictures of one workload have one size
    shaped = pixels.reshape(count, tiles, *pixels.shape[1:])
    return feeds | {"pixel_values": shaped, "image_sizes": torch.tensor([list(s) for s in sizes])}
