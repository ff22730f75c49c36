"""The oracle's pruning in torch: autograd for the saliency, greedy suppression in a loop."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np

from trio_deploy.bench.case import Case, Run, timed
from trio_deploy.bench.contenders.torch_model import clock, encode, load_model, precision
from trio_deploy.bench.workload import Inputs, Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.schedule.schedule import Schedule

PROBES = 4


def open_oracle(
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
    from trio_deploy.reference.oracle import Oracle

    manifest = bundle.manifest
    oracle = Oracle(
        model,
        probe=manifest.probe,
        probes=PROBES,
        positions=manifest.positions,
        threshold=manifest.threshold,
    )
    schedule = bundle.schedule if case.budget is None else bundle.schedule_at(case.budget)
    return answer_with(oracle, Inputs(bundle), work, schedule)


def answer_with(
    oracle: Any, inputs: Inputs, work: Workload, schedule: Schedule
) -> Callable[[int], Run]:
    """The reference's pruning: autograd through a layer for the scores, greedy suppression.

    The oracle's own steps without its notes of every stage's tensors, and by `trio` alone.
    """
    import torch
    from transformers import DynamicCache

    from trio_deploy.reference.oracle import Row
    from trio_deploy.selection.nms import greedy_select

    text, device = inputs.config.text, oracle.model.device
    now = clock(device)
    segments = schedule.segments(text.num_layers)
    image_token = inputs.config.image_token_id

    @torch.no_grad()
    def answer(seed: int) -> Run:
        stages: dict[str, float] = {}
        start = time.perf_counter()
        prompt, pixels, sizes = encode(inputs, work, seed, stages)
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
            precision=precision(oracle.model),
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
