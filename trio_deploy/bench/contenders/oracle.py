"""The oracle's pruning in torch: autograd for the saliency, greedy suppression in a loop."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from trio_deploy.bench.case import Case, Run, timed
from trio_deploy.bench.contenders.torch_model import (
    clock,
    encode,
    load_model,
    precision,
    ran_as,
)
from trio_deploy.bench.results import PROBES
from trio_deploy.bench.workload import Inputs, Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.schedule.schedule import Schedule


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
    """The oracle's own generation, timed, without the tensors of its stages."""
    from trio_deploy.reference.trace import Trace

    text, now = inputs.config.text, clock(oracle.model.device)

    class Timed(Trace):
        """Seconds per stage; `until` is when the last of them ended."""

        until = 0.0

        @contextlib.contextmanager
        def stage(self, name: str) -> Iterator[None]:
            with timed(stages_of_run, name, now):
                yield
            self.until = now()

    stages_of_run: dict[str, float] = {}

    def answer(seed: int) -> Run:
        stages_of_run.clear()
        start = time.perf_counter()
        prompt, given = encode(inputs, work, seed, stages_of_run)
        trace = Timed(recording=False)
        row = oracle.generate_row(given, schedule, work.new_tokens, (), trace)
        until_first = trace.until - start
        later = now() - start - until_first
        lengths = [prompt.length, *(len(kept) for kept in row.kept)]
        ranges = [
            (first, stop, length)
            for length, (first, stop) in zip(
                lengths, schedule.segments(text.num_layers), strict=True
            )
        ]
        per_layer = [length for first, stop, length in ranges for _ in range(first, stop)]
        return Run(
            stages=dict(stages_of_run),
            first_token_s=until_first,
            tokens_per_s=(work.new_tokens - 1) / later if work.new_tokens > 1 else 0.0,
            prompt_tokens=prompt.length,
            visual_tokens=prompt.visual_tokens,
            keep=schedule.resolve(prompt.visual_tokens),
            layer_ranges=tuple(entry for entry in ranges if entry[1] > entry[0]),
            kv_bytes=text.kv_bytes(per_layer, oracle.model.dtype.itemsize),
            precision=precision(oracle.model),
            ran_as=ran_as(oracle.model),
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
