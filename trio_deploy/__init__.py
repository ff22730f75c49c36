"""TRIO Deploy: vision-language models as ONNX stages with visual token pruning.

The names in `__all__` are the public interface; every other module is private and may move. They
are imported on first use, so `import trio_deploy` itself loads no numpy, onnx or runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.config.options import ExportOptions, RuntimeOptions, SelectionOptions
    from trio_deploy.config.sampling import SamplingOptions
    from trio_deploy.cost.plan import Plan, plan
    from trio_deploy.errors import TrioError
    from trio_deploy.evaluation.calibrate import calibrate
    from trio_deploy.evaluation.evaluate import evaluate
    from trio_deploy.export.job import export_model
    from trio_deploy.pipeline.batcher.batcher import Batcher
    from trio_deploy.pipeline.pipeline import Pipeline
    from trio_deploy.pipeline.request import Generation, Request
    from trio_deploy.pipeline.stream import TextStream
    from trio_deploy.schedule.schedule import Schedule
    from trio_deploy.verify.check import check
    from trio_deploy.verify.report import Report

__version__ = "0.2.0"
__all__ = [
    "Batcher",
    "Bundle",
    "ExportOptions",
    "Generation",
    "Pipeline",
    "Plan",
    "Report",
    "Request",
    "RuntimeOptions",
    "SamplingOptions",
    "Schedule",
    "SelectionOptions",
    "TextStream",
    "TrioError",
    "calibrate",
    "check",
    "evaluate",
    "export_model",
    "plan",
]

_MODULES = {
    "Batcher": "trio_deploy.pipeline.batcher.batcher",
    "Bundle": "trio_deploy.bundle.bundle",
    "ExportOptions": "trio_deploy.config.options",
    "Generation": "trio_deploy.pipeline.request",
    "Pipeline": "trio_deploy.pipeline.pipeline",
    "Plan": "trio_deploy.cost.plan",
    "Report": "trio_deploy.verify.report",
    "Request": "trio_deploy.pipeline.request",
    "RuntimeOptions": "trio_deploy.config.options",
    "SamplingOptions": "trio_deploy.config.sampling",
    "Schedule": "trio_deploy.schedule.schedule",
    "SelectionOptions": "trio_deploy.config.options",
    "TextStream": "trio_deploy.pipeline.stream",
    "TrioError": "trio_deploy.errors",
    "calibrate": "trio_deploy.evaluation.calibrate",
    "check": "trio_deploy.verify.check",
    "evaluate": "trio_deploy.evaluation.evaluate",
    "export_model": "trio_deploy.export.job",
    "plan": "trio_deploy.cost.plan",
}
"""Where each public name is defined. No room of the package is called as one of them is."""


def __getattr__(name: str) -> object:
    module = _MODULES.get(name)
    if module is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(module), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
