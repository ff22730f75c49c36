"""Short measurements for a page: run bench, eval and check, and write what the commands write."""

from __future__ import annotations

from pathlib import Path

from trio_deploy.bench.contenders.torch_model import has_torch
from trio_deploy.bench.measure import BenchOptions, measure
from trio_deploy.bench.table import write
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.ask import AskOptions
from trio_deploy.evaluation.configurations import Configuration, Source, as_exported, grid
from trio_deploy.evaluation.evaluate import evaluate_configurations
from trio_deploy.evaluation.questions import scene_questions
from trio_deploy.evaluation.results import RESULTS
from trio_deploy.report.charts import bench_chart
from trio_deploy.report.facts import schedule
from trio_deploy.verify.check import check
from trio_deploy.verify.golden import GOLDEN
from trio_deploy.verify.report import Report

_BUDGETS = (0.111, 0.222, 0.333)
_MIN_DISTANCE = 0.02  # budgets closer to the bundle's own show nothing new
_NEW_TOKENS = 16  # maximum length of an answer about a scene


def run_bench(
    bundle: Bundle, options: RuntimeOptions, folder: Path, *, progress: bool = True
) -> Path:
    """Measure a few runs; returns the JSON file.

    Raises:
        TrioError: as `measure`.
    """
    few = BenchOptions(new_tokens=8, runs=3, warm_up=1, baselines=(), runtime=options)
    result = {"command": "trio report", **measure(bundle, few, progress=progress)}
    return write(result, folder / "bench", bench_chart(result))[0]


def run_eval(
    bundle: Bundle, scenes: int, options: RuntimeOptions, folder: Path, *, progress: bool = True
) -> Path:
    """Ask about `scenes` of the test split, at the bundle's own schedule and at budgets above it.

    Returns:
        The JSON file.

    Raises:
        TrioError: as `evaluate_configurations`.
    """
    source = Source.open(bundle.path)
    configurations: list[Configuration] = []
    if bundle.schedule.layers:
        share = schedule(bundle)["share"]
        more = [budget for budget in _BUDGETS if budget > share + _MIN_DISTANCE]
        configurations = [as_exported(source), *grid(source, [], more)[0]]
    out = folder / "eval"
    evaluate_configurations(
        source,
        scene_questions(scenes),
        configurations,
        out,
        AskOptions(options, max_new_tokens=_NEW_TOKENS, progress=progress),
        data="generated scenes of the test split",
    )
    return out / RESULTS


def run_check(bundle: Bundle, options: RuntimeOptions) -> Report:
    """Compare with the oracle if torch is installed, else with recorded answers.

    Raises:
        TrioError: neither is there, or as `check`.
    """
    torch = has_torch()
    if not (torch or (bundle.path / GOLDEN).is_file()):
        raise TrioError(
            "that needs torch and transformers (pip install 'trio-deploy[reference]'), or a "
            "reference recorded by `trio check --record`"
        )
    return check(bundle, options, golden=not torch)
