"""Runs cases by turns and puts the figures together: `trio bench` without its output."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from tqdm import tqdm

from trio_deploy.bench.cases import BASELINES, Case, Opened, Run, fitted
from trio_deploy.bench.child import peak_memory
from trio_deploy.bench.environment import load_average, machine
from trio_deploy.bench.results import case_figures, compare
from trio_deploy.bench.timing import interleave
from trio_deploy.bench.workload import Workload, picture_size
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.target import load_target
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import request_limits

SCHEMA = 1
UNPRUNED = "no pruning"


@dataclass(frozen=True)
class Options:
    """How to measure.

    Attributes:
        budgets: shares of visual tokens; None among them is the bundle's own schedule. No pruning
            is measured as well, always.
        images: pictures in the prompt, each of `picture` (width, height) pixels; None takes the
            size that gives most visual tokens.
        text_tokens: of the prompt, template included. new_tokens: generated in every run.
        runs: measured, after `warm_up` that are not.
        baselines: of `BASELINES`; None takes those that are installed.
        memory: measure peak memory too, in a process of its own for each case.
        runtime, target, provider, precision, threads: as `Pipeline.open` takes them.
        checkpoint, genai_python: for OpenVINO GenAI.
    """

    budgets: tuple[float | None, ...] = (None,)
    images: int = 1
    picture: tuple[int, int] | None = None
    text_tokens: int = 64
    new_tokens: int = 32
    runs: int = 5
    warm_up: int = 2
    baselines: Sequence[str] | None = None
    memory: bool = True
    runtime: str | None = None
    target: str | None = None
    provider: str | None = None
    precision: str | None = None
    threads: int | None = None
    checkpoint: str | None = None
    genai_python: str | None = None

    def check(self) -> None:
        """Raises TrioError where a count is impossible or a baseline unknown."""
        for name in ("images", "text_tokens", "new_tokens", "runs"):
            if getattr(self, name) < 1:
                raise TrioError(f"{name.replace('_', ' ')} must be 1 or more")
        if self.warm_up < 0:
            raise TrioError("warm-up runs must be 0 or more")
        if unknown := set(self.baselines or ()) - set(BASELINES):
            raise TrioError(
                f"unknown baseline {min(unknown)!r}: choose from {', '.join(BASELINES)}, or none"
            )


def measure(
    bundle: Bundle, options: Options, *, progress: bool = True, opened: Opened | None = None
) -> dict[str, Any]:
    """Figures of a bundle at several budgets, without pruning, and of the baselines: plain JSON.

    All run by turns in this process (OpenVINO GenAI in one that waits for its turn), with new
    pictures in every run.

    Args:
        opened: pipelines to use again, where several measurements follow each other.

    Raises:
        TrioError: a budget that the bundle cannot reach, a prompt that does not fit, or a baseline
            that was named and is not installed.
    """
    options.check()
    bundle.require_weights()
    if opened is None:
        with Opened() as mine:
            return measure(bundle, options, progress=progress, opened=mine)
    before = load_average()
    cases, skipped = list_cases(bundle, options)
    pipeline = opened.pipeline(cases[0])
    width, height = options.picture or picture_size(bundle.config)
    work, tiles = fitted(
        Workload(options.images, width, height, "?", options.new_tokens),
        bundle,
        options.text_tokens,
    )
    contenders: dict[str, Callable[[int], Run]] = {}
    for case in cases:
        if case.kind == "genai":  # in what the pipeline computes in
            case = replace(case, precision=pipeline.precision)
        try:
            answer = opened.open(case, work)
            if case.kind in BASELINES:
                answer(0)  # what cannot be measured is found before the others are
            contenders[case.name] = answer
        except TrioError as error:
            if case.kind not in BASELINES or options.baselines:
                raise
            skipped[case.kind] = str(error)
    cases = [case for case in cases if case.name in contenders]
    steps = len(cases) * (options.runs + options.warm_up + options.memory)
    with tqdm(total=steps, desc="bench", disable=None if progress else True) as bar:
        raw = interleave(options.runs, contenders, options.warm_up, bar.update)
        figures = [case_figures(case, raw[case.name], bundle, tiles) for case in cases]
        for case, entry in zip(cases, figures, strict=True):
            if options.memory:
                # GenAI is a process of its own already.
                own = raw[case.name][-1].peak_mib
                entry["peak_mib"] = own or peak_memory(case, work)
                bar.update()
    for entry in figures:
        entry["against_unpruned"] = compare(entry, figures[0])
    text, first = bundle.config.text, figures[0]["tokens"]
    return {
        "schema": SCHEMA,
        "machine": machine(options.threads),
        "load_before": before,
        "load_after": load_average(),
        "model": {
            "name": bundle.manifest.model.name,
            "layers": text.num_layers,
            "hidden_size": text.hidden_size,
            "vocab_size": text.vocab_size,
            "dtype": bundle.manifest.dtype,
            "dialect": bundle.manifest.dialect,
            "schedule": str(bundle.schedule),
        },
        "workload": {
            "images": work.images,
            "width": work.width,
            "height": work.height,
            "visual_tokens": first["visual"],
            "text_tokens": first["prompt"] - first["visual"],
            "new_tokens": work.new_tokens,
            "runs": options.runs,
            "warm_up": options.warm_up,
        },
        "cases": figures,
        "skipped": skipped,
    }


def sweep(
    bundle: Bundle, options: Options, images: Sequence[int], *, progress: bool = True
) -> dict[str, Any]:
    """`measure` for several numbers of pictures, peak memory and baselines left out: plain JSON.

    The measurements are under `points`, in the order of `images`.
    """
    if not images:
        raise TrioError("a sweep needs numbers of pictures: --images 1,2,4")
    alone = replace(options, baselines=(), memory=False)
    with Opened() as opened:
        points = [
            measure(bundle, replace(alone, images=count), progress=progress, opened=opened)
            for count in images
        ]
    shared = ("schema", "machine", "load_before", "model")
    return {
        **{key: points[0][key] for key in shared},
        "load_after": points[-1]["load_after"],
        "points": [
            {key: point[key] for key in ("workload", "cases", "skipped")} for point in points
        ],
    }


def list_cases(bundle: Bundle, options: Options) -> tuple[list[Case], dict[str, str]]:
    """What will be measured, no pruning first; and baselines left out, with the reason."""
    manifest = bundle.manifest
    targeted = load_target(options.target).runtime if options.target else manifest.runtime
    base = Case(
        UNPRUNED,
        "trio",
        str(bundle.path),
        1.0 if bundle.schedule.layers else None,
        runtime=options.runtime or targeted,
        target=options.target,
        provider=options.provider,
        precision=options.precision,
        threads=options.threads,
    )
    cases = [base]
    if bundle.schedule.layers:
        cases += [
            replace(base, name=budget_name(budget, bundle), budget=budget)
            for budget in options.budgets
            if budget != 1
        ]
    skipped: dict[str, str] = {}
    for kind in BASELINES if options.baselines is None else options.baselines:
        if reason := _missing(kind, bundle, options):
            if options.baselines:
                raise TrioError(f"the baseline {kind} cannot be measured: {reason}")
            skipped[kind] = reason
            continue
        cases.append(_baseline(kind, cases, options))
    return cases, skipped


def _baseline(kind: str, cases: Sequence[Case], options: Options) -> Case:
    base = cases[0]
    if kind == "oracle":  # beside the first pruned case
        return replace(cases[1], name=f"oracle, autograd, {cases[1].name}", kind=kind)
    if kind == "transformers":
        return replace(base, name=f"transformers, {UNPRUNED}", kind=kind)
    return replace(
        base,
        name=f"OpenVINO GenAI, {UNPRUNED}",
        kind=kind,
        checkpoint=options.checkpoint,
        python=options.genai_python or sys.executable,
    )


def _missing(kind: str, bundle: Bundle, options: Options) -> str | None:
    """Why a baseline cannot be measured here; None where it can."""
    if kind == "genai":
        from trio_deploy.bench.genai import missing

        if options.checkpoint is None:
            return "it converts a checkpoint: pass its folder as --checkpoint"
        if options.genai_python is None and importlib.util.find_spec("openvino_genai") is None:
            return "not installed here: pass an interpreter that has it as --genai-python"
        return missing(options.genai_python or sys.executable)
    if kind == "oracle":  # first what no installation changes
        if not bundle.schedule.layers:
            return "this bundle prunes nothing"
        if others := sorted(set(bundle.schedule.methods) - {"trio"}):
            return (
                f"it prunes by trio alone, and this bundle by {' and '.join(others)}: a bundle "
                "exported with trio at every pruning point can be compared with it"
            )
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install 'trio-deploy[reference]'"
    return None


def budget_name(budget: float | None, bundle: Bundle) -> str:
    """`11.1 %`; a bundle's own schedule is called by what it comes to."""
    if budget is None:
        visual = request_limits(bundle.config).tile_rows
        layers = bundle.config.text.num_layers
        budget = bundle.schedule.average(visual, layers) / visual
    return f"{100 * budget:.3g} %"
