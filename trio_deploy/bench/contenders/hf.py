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
    model.model.vision_tower.register_forward_pre_hook(lambda *_: marks.update(start=now()))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: marks.update(stop=now()))
    text = inputs.config.text

    @torch.inference_mode()
    def answer(seed: int) -> Run:
        stages: dict[str, float] = {}
        start = time.perf_counter()
        prompt, pixels, sizes = encode(inputs, work, seed, stages)
        feeds: dict[str, Any] = {"input_ids": torch.as_tensor(prompt.ids)[None]}
        feeds["pixel_values"] = torch.as_tensor(pixels, dtype=model.dtype)
        if hasattr(model.model, "pack_image_features"):  # a model of tiled pictures
            feeds = _tiled(feeds, sizes)
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


def _tiled(feeds: dict[str, Any], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """Pictures in LLaVA-NeXT's form: tiles per picture, padded to the largest count, and sizes."""
    import torch

    count, pixels = len(sizes), feeds["pixel_values"]
    tiles = len(pixels) // count  # pictures of one workload have one size
    shaped = pixels.reshape(count, tiles, *pixels.shape[1:])
    return feeds | {"pixel_values": shaped, "image_sizes": torch.tensor([list(s) for s in sizes])}
