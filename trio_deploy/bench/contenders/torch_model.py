"""What both contenders in torch need: the bundle's weights as a torch model, and its requests."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from typing import Any

from trio_deploy.bench.case import Case, timed
from trio_deploy.bench.workload import Inputs, Workload
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.prompt import Prompt
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.reference.row import Row


def has_torch() -> bool:
    """Whether torch and transformers are installed."""
    return all(importlib.util.find_spec(name) for name in ("torch", "transformers"))


def load_model(case: Case, bundle: Bundle, device: str, dtype: str) -> Any:
    """The weights of a bundle in transformers' model.

    Args:
        device: torch device, `cpu` or `cuda`.
        dtype: float type of weights and arithmetic.

    Raises:
        TrioError: torch or transformers is not installed.
    """
    if not has_torch():
        raise TrioError(
            f"the baseline {case.kind} needs torch and transformers: "
            "pip install 'trio-deploy[reference]'"
        )
    import torch

    from trio_deploy.reference.restore import restore_model

    if case.options.threads:
        torch.set_num_threads(case.options.threads)
    return restore_model(bundle, getattr(torch, dtype)).to(device)


def encode(
    inputs: Inputs, work: Workload, seed: int, stages: dict[str, float]
) -> tuple[Prompt, Row]:
    """The prompt of a run, and the same with its pictures as transformers' models take them."""
    pictures = work.pictures(seed)
    with timed(stages, "preprocess"):
        prompt, processed = inputs.encode(work.messages(), pictures)
        row = Row.of(prompt.ids, processed)
    return prompt, row


def clock(device: Any) -> Callable[[], float]:
    """A clock that first waits for the device to finish its work."""
    import torch

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter()

    return now


def ran_as(model: Any) -> RanAs:
    """What computes a model."""
    return RanAs("torch", None, None, precision(model), precision(model), str(model.device))


def precision(model: Any) -> str:
    """Float type that a model computes in."""
    return str(model.dtype).removeprefix("torch.")
