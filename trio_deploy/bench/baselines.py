"""What torch users have: transformers without pruning, and the oracle's pruning by autograd.

Both run on the weights of the bundle, on what the runtime's preprocessing makes of the workload.
The only module of this room that imports torch, and only where a baseline is opened.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trio_deploy.bench.cases import Case, Run, timed
from trio_deploy.bench.inputs import Inputs
from trio_deploy.bench.workload import Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.schedule.schedule import Schedule

PROBES = 4


def available() -> bool:
    """Whether torch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def open_baseline(
    case: Case,
    bundle: Bundle,
    work: Workload,
    *,
    device: str = "cpu",
    dtype: str = "float32",
) -> Callable[[int], Run]:
    """A contender that answers with torch.

    Args:
        device: torch's, `cpu` or `cuda`; what runs on a GPU is waited for wherever time is taken.
        dtype: of weights and arithmetic.

    Raises:
        TrioError: torch or transformers is not installed.
    """
    if not available():
        raise TrioError(
            f"the baseline {case.kind} needs torch and transformers: "
            "pip install 'trio-deploy[reference]'"
        )
    import torch

    from trio_deploy.reference.oracle import Oracle
    from trio_deploy.reference.restore import restore_model

    if case.threads:
        torch.set_num_threads(case.threads)
    model = restore_model(bundle, getattr(torch, dtype)).to(device)
    inputs = Inputs(bundle)
    if case.kind == "transformers":
        return _transformers(model, inputs, work)
    manifest = bundle.manifest
    oracle = Oracle(
        model,
        probe=manifest.probe,
        probes=PROBES,
        positions=manifest.positions,
        threshold=manifest.threshold,
    )
    return _oracle(oracle, inputs, work, _schedule(case, bundle))


def _schedule(case: Case, bundle: Bundle) -> Schedule:
    return bundle.schedule if case.budget is None else bundle.schedule_at(case.budget)


def _request(
    inputs: Inputs, work: Workload, seed: int, stages: dict[str, float]
) -> tuple[Any, np.ndarray, list[tuple[int, int]]]:
    """Prompt, pixel values [T,3,h,w] and (height, width) of every picture."""
    pictures = work.pictures(seed)
    with timed(stages, "preprocess"):
        prompt, processed = inputs.encode(work.messages(), pictures)
        pixels = np.concatenate([picture.pixel_values for picture in processed])
    return prompt, pixels, [(int(p.size[0]), int(p.size[1])) for p in processed]


def _transformers(model: Any, inputs: Inputs, work: Workload) -> Callable[[int], Run]:
    """transformers' own forward pass and cache, nothing pruned, without `generate`'s overhead."""
    import torch

    seen: dict[str, float] = {}
    now = _clock(model.device)
    model.model.vision_tower.register_forward_pre_hook(lambda *_: seen.update(start=now()))
    model.model.multi_modal_projector.register_forward_hook(lambda *_: seen.update(stop=now()))
    text = inputs.config.text
    precision = str(model.dtype).removeprefix("torch.")

    @torch.inference_mode()
    def answer(seed: int) -> Run:
        stages: dict[str, float] = {}
        start = time.perf_counter()
        prompt, pixels, sizes = _request(inputs, work, seed, stages)
        feeds: dict[str, Any] = {"input_ids": torch.as_tensor(prompt.ids)[None]}
        feeds["pixel_values"] = torch.as_tensor(pixels, dtype=model.dtype)
        if inputs.config.grid_pinpoints:
            feeds = _tiled(feeds, sizes)
        feeds = {name: tensor.to(model.device) for name, tensor in feeds.items()}
        with timed(stages, "prefill", now):
            out = model(**feeds, use_cache=True, logits_to_keep=1)
        token = out.logits[:, -1:].argmax(-1)
        first = now() - start
        stages["vision"] = seen["stop"] - seen["start"]
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
            precision=precision,
        )

    return answer


def _clock(device: Any) -> Callable[[], float]:
    """The time at which a device has done what it was given."""
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def _tiled(feeds: dict[str, Any], sizes: list[tuple[int, int]]) -> dict[str, Any]:
    """As LLaVA-NeXT's forward takes pictures: tiles of each padded to the most, and their sizes."""
    import torch

    count, pixels = len(sizes), feeds["pixel_values"]
    tiles = len(pixels) // count  # pictures of one workload have one size
    shaped = pixels.reshape(count, tiles, *pixels.shape[1:])
    return feeds | {"pixel_values": shaped, "image_sizes": torch.tensor([list(s) for s in sizes])}


def _oracle(
    oracle: Any, inputs: Inputs, work: Workload, schedule: Schedule
) -> Callable[[int], Run]:
    """The reference's pruning: autograd through a layer for the scores, greedy suppression.

    The oracle's own steps without its notes of every stage's tensors, and by `trio` alone.
    """
    import torch
    from transformers import DynamicCache

    from trio_deploy.reference.nms import greedy_select
    from trio_deploy.reference.oracle import Row

    text, device = inputs.config.text, oracle.model.device
    now = _clock(device)
    segments = schedule.segments(text.num_layers)
    image_token = inputs.config.image_token_id

    @torch.no_grad()
    def answer(seed: int) -> Run:
        stages: dict[str, float] = {}
        start = time.perf_counter()
        prompt, pixels, sizes = _request(inputs, work, seed, stages)
        with timed(stages, "vision", now):
            hidden, _, _ = oracle.embed(Row(prompt.ids, pixels, sizes))
        visual = torch.as_tensor(prompt.ids, device=device) == image_token
        counts = schedule.resolve(prompt.visual_tokens)
        positions = torch.arange(prompt.length, device=device)[None]
        cache = DynamicCache()
        lengths: list[int] = []
        for number, (first, stop) in enumerate(segments):
            if number:
                with timed(stages, f"select_{number}", now):
                    scores = oracle.saliency(first, hidden, positions, visual)[visual]
                    chosen = greedy_select(
                        scores.cpu().numpy(),
                        hidden[0, visual].float().cpu().numpy(),
                        counts[number - 1],
                        oracle.threshold,
                    )
                    keeps = ~visual
                    keeps[visual.nonzero().flatten()[chosen]] = True
                    index = keeps.nonzero().flatten()
                hidden, visual, positions = hidden[:, index], visual[index], positions[:, index]
                if oracle.positions == "renumber":
                    positions = torch.arange(len(index), device=device)[None]
            with timed(stages, f"prefill_{number}", now):
                hidden = oracle.run_layers(range(first, stop), hidden, positions, cache)
            lengths.append(hidden.shape[1])
        with timed(stages, f"prefill_{len(counts)}", now):
            token = oracle.logits(hidden[:, -1:]).argmax(-1)
        until_first = now() - start
        for step in range(work.new_tokens - 1):
            hidden = oracle.text.embed_tokens(token[None])
            for (first, stop), length in zip(segments, lengths, strict=True):
                at = length if oracle.positions == "renumber" else prompt.length
                hidden = oracle.run_layers(
                    range(first, stop), hidden, torch.tensor([[at + step]], device=device), cache
                )
            token = oracle.logits(hidden).argmax(-1)
        later = now() - start - until_first
        per_layer = [n for n, (a, b) in zip(lengths, segments, strict=True) for _ in range(a, b)]
        return Run(
            stages=stages,
            first_token_s=until_first,
            tokens_per_s=(work.new_tokens - 1) / later if work.new_tokens > 1 else 0.0,
            prompt_tokens=prompt.length,
            visual_tokens=prompt.visual_tokens,
            keep=counts,
            layer_ranges=tuple(
                (a, b, n) for n, (a, b) in zip(lengths, segments, strict=True) if b > a
            ),
            kv_bytes=text.kv_bytes(per_layer, oracle.model.dtype.itemsize),
            precision=str(oracle.model.dtype).removeprefix("torch."),
        )

    return answer


def autograd_probe(
    bundle: Any, layer: int, rows: np.ndarray, threads: int | None
) -> Callable[[int], tuple[float, np.ndarray]]:
    """The authors' way to a saliency, on rows [S,d]: (seconds, norms [S]) of each call.

    One transformers decoder layer forward on all tokens, final norm, the language-model head on all
    positions, cross-entropy at the last four, and the gradient of the layer's input, parameters
    frozen.
    """
    import torch

    from trio_deploy.reference.restore import restore_model

    if threads:
        torch.set_num_threads(threads)
    model = restore_model(bundle).requires_grad_(False)
    text, head = model.model.language_model, model.lm_head
    total = len(rows)

    def probe(_: int) -> tuple[float, np.ndarray]:
        start = time.perf_counter()
        x = torch.from_numpy(rows[None]).requires_grad_(True)
        rope = text.rotary_emb(x, torch.arange(total)[None])
        out = text.layers[layer](x, position_embeddings=rope, attention_mask=None)
        out = out[0] if isinstance(out, tuple) else out
        logits = head(text.norm(out)).float()[0, total - PROBES : total]
        loss = torch.nn.functional.cross_entropy(logits, logits.argmax(-1).detach())
        (gradient,) = torch.autograd.grad(loss, x)
        norms = gradient[0].norm(dim=-1)
        return time.perf_counter() - start, norms.numpy()

    return probe
