"""Measure a bundle at several budgets, without pruning, and the baselines: `trio bench`."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from trio_deploy.bench.case import BASELINES, Case, Run
from trio_deploy.bench.contenders import genai, llama_cpp
from trio_deploy.bench.contenders.contenders import Contenders
from trio_deploy.bench.environment import load_average, machine
from trio_deploy.bench.peak_memory import peak_memory
from trio_deploy.bench.record import SCHEMA
from trio_deploy.bench.results import case_figures, compare
from trio_deploy.bench.workload import Workload, fit_prompt, picture_size
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import request_limits
from trio_deploy.pipeline.ran_as import require_served
from trio_deploy.runtimes.registry import complete_options
from trio_deploy.schedule.budget import check_budget

T = TypeVar("T")

UNPRUNED = "no pruning"


@dataclass(frozen=True)
class BenchOptions:
    """How to measure.

    Attributes:
        budgets: shares of visual tokens; None among them: the bundle's own schedule. No pruning is
            always measured as well.
        images: number of pictures in the prompt.
        picture: (width, height) of each picture in pixels; None: the size with the maximum number
            of visual tokens.
        text_tokens: of the prompt, template included.
        new_tokens: generated in every run.
        runs: measured runs.
        warm_up: runs before them that are not measured.
        baselines: of `BASELINES`; None: those that are installed.
        memory: measure peak memory too, in a process of its own per case.
        runtime: how the bundle is run.
        checkpoint, genai_python: folder and interpreter for OpenVINO GenAI.
        llama_python, llama_server: interpreter that has xllamacpp and gguf, and the llama-server of
            another build, which is measured in its place; for llama.cpp.
        others: bundles of the same model in other weights, by a name for them; they are measured
            at the same budgets.
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
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    checkpoint: str | None = None
    genai_python: str | None = None
    llama_python: str | None = None
    llama_server: str | None = None
    others: Mapping[str, Bundle] = field(default_factory=dict)

    def check(self) -> None:
        """Raise TrioError if a budget or count is impossible or a baseline unknown."""
        for budget in self.budgets:
            if budget is not None:
                check_budget(budget)
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
    bundle: Bundle,
    options: BenchOptions,
    *,
    progress: bool = True,
    contenders: Contenders | None = None,
) -> dict[str, Any]:
    """Figures of a bundle at several budgets, without pruning, and of the baselines: plain JSON.

    All take turns in this process (OpenVINO GenAI in one of its own that waits for its turn), with
    new pictures in every run.

    Args:
        contenders: open pipelines to reuse, if several measurements follow each other.

    Raises:
        TrioError: a budget that the bundle cannot reach, a prompt that does not fit, or a baseline
            that was named and is not installed.
    """
    options.check()
    bundle.require_weights()
    require_served(bundle, options.runtime)
    if contenders is None:
        with Contenders() as own:
            return Measurement(bundle, options, own, progress).result()
    return Measurement(bundle, options, contenders, progress).result()


def sweep(
    bundle: Bundle, options: BenchOptions, images: Sequence[int], *, progress: bool = True
) -> dict[str, Any]:
    """`measure` at several numbers of pictures, without peak memory and baselines: plain JSON.

    The measurements are under `points`, in the order of `images`.

    Raises:
        TrioError: no number of pictures, or what `measure` raises.
    """
    if not images:
        raise TrioError("a sweep needs numbers of pictures: pass --images 1,2,4")
    alone = replace(options, baselines=(), memory=False)
    with Contenders() as contenders:
        points = [
            measure(bundle, replace(alone, images=count), progress=progress, contenders=contenders)
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


class Measurement:
    """One measurement of a bundle: list the cases, open their contenders, run them by turns."""

    def __init__(
        self, bundle: Bundle, options: BenchOptions, contenders: Contenders, progress: bool
    ) -> None:
        self._bundle, self._options = bundle, options
        self._contenders, self._progress = contenders, progress
        self._load_before = load_average()
        listed, self._skipped = list_cases(bundle, options)
        self._pipeline = contenders.pipeline(listed[0])
        width, height = options.picture or picture_size(bundle.config)
        self._work, self._tiles = fit_prompt(
            Workload(options.images, width, height, "?", options.new_tokens),
            bundle,
            options.text_tokens,
        )
        self._answers: dict[str, Callable[[int], Run]] = {}
        self._no_pruning = ""  # why GenAI's pruner has no line of its own
        self._cases = [case for case in listed if self._open(case)]

    def _open(self, case: Case) -> bool:
        """Whether a case can be measured; a baseline that cannot be is noted as skipped."""
        if case.kind == "genai":  # computes in the pipeline's precision
            options = replace(case.options, precision=self._pipeline.precision)
            case = replace(case, options=options)
        if not case.halves and self._no_pruning:
            self._skipped[case.name] = self._no_pruning
            return False
        try:
            answer = self._contenders.open(case, self._work)
            if case.kind in BASELINES:
                run = answer(0)  # a baseline that fails is noticed before anything is measured
                if case.pruning_ratio is not None and not run.keep:
                    self._no_pruning = run.remark
        except TrioError as error:
            if case.kind not in BASELINES or self._options.baselines:
                raise
            several = case.pruning_ratio is not None or case.weights is not None
            self._skipped[case.name if several else case.kind] = str(error)
            if case.kind == "genai":  # what the other lines of it ask for would fail alike
                self._no_pruning = str(error)
            return False
        self._answers[case.name] = answer
        return True

    def _figures(self) -> list[dict[str, Any]]:
        """Run everything; figures of each case, no pruning first."""
        options = self._options
        steps = len(self._cases) * (options.runs + options.warm_up + options.memory)
        with tqdm(total=steps, desc="bench", disable=None if self._progress else True) as bar:
            runs = interleave(options.runs, self._answers, options.warm_up, bar.update)
            figures = [
                case_figures(case, runs[case.name], self._bundle, self._tiles)
                for case in self._cases
            ]
            for case, entry in zip(self._cases, figures, strict=True):
                if options.memory:
                    # GenAI reports the memory of its own process.
                    entry["peak_mib"] = runs[case.name][-1].peak_mib or peak_memory(
                        case, self._work
                    )
                    bar.update()
        for entry in figures:
            entry["against_unpruned"] = compare(entry, figures[0])
        return figures

    def result(self) -> dict[str, Any]:
        """Measure; everything that was measured, and on what, as plain JSON."""
        figures = self._figures()
        manifest, text = self._bundle.manifest, self._bundle.config.text
        tokens, work = figures[0]["tokens"], self._work
        return {
            "schema": SCHEMA,
            "machine": machine(self._options.runtime.threads),
            "load_before": self._load_before,
            "load_after": load_average(),
            "model": {
                "name": manifest.model.name,
                "layers": text.num_layers,
                "hidden_size": text.hidden_size,
                "vocab_size": text.vocab_size,
                "dtype": manifest.dtype,
                "dialect": manifest.dialect,
                "schedule": str(self._bundle.schedule),
            },
            "workload": {
                "images": work.images,
                "width": work.width,
                "height": work.height,
                "visual_tokens": tokens["visual"],
                "text_tokens": tokens["prompt"] - tokens["visual"],
                "new_tokens": work.new_tokens,
                "runs": self._options.runs,
                "warm_up": self._options.warm_up,
            },
            "cases": figures,
            "skipped": self._skipped,
        }


def interleave(
    runs: int,
    contenders: Mapping[str, Callable[[int], T]],
    warm_up: int = 2,
    progress: Callable[[], object] = lambda: None,
) -> dict[str, list[T]]:
    """Results of each contender's runs, taken by turns: a disturbance of the machine hits all.

    Every run has its own seed, equal for all contenders, and the order is reversed from run to run.
    Warm-up runs are not returned.
    """
    results: dict[str, list[T]] = {name: [] for name in contenders}
    for run in range(-warm_up, runs):
        names = list(contenders)
        for name in names if run % 2 else reversed(names):
            result = contenders[name](run + warm_up)
            progress()
            if run >= 0:
                results[name].append(result)
    return results


def list_cases(bundle: Bundle, options: BenchOptions) -> tuple[list[Case], dict[str, str]]:
    """Cases to measure, no pruning first; and the reason for each baseline that is left out."""
    base = Case(
        UNPRUNED,
        "trio",
        str(bundle.path),
        1.0 if bundle.schedule.layers else None,
        replace(options.runtime, runtime=complete_options(bundle, options.runtime).runtime),
    )
    cases = [base]
    if bundle.schedule.layers:
        cases += [
            replace(base, name=budget_name(budget, bundle), budget=budget)
            for budget in options.budgets
            if budget != 1
        ]
    cases += [
        replace(case, name=f"{case.name}, {name}", bundle=str(other.path))
        for name, other in options.others.items()
        for case in (cases[1:] or cases)
    ]
    skipped: dict[str, str] = {}
    for kind in BASELINES if options.baselines is None else options.baselines:
        if reason := _missing(kind, bundle, options):
            if options.baselines:
                raise TrioError(f"the baseline {kind} cannot be measured: {reason}")
            skipped[kind] = reason
            continue
        cases += _baseline(kind, cases, options, bundle)
    return cases, skipped


def _baseline(
    kind: str, cases: Sequence[Case], options: BenchOptions, bundle: Bundle
) -> list[Case]:
    base = cases[0]
    if kind == "oracle":  # compared with the first pruned case
        return [replace(cases[1], name=f"oracle, autograd, {cases[1].name}", kind=kind)]
    if kind == "llama.cpp":
        return _llama_cpp(base, options)
    if kind == "transformers":
        return [replace(base, name=f"transformers, {UNPRUNED}", kind=kind)]
    whole = replace(
        base,
        name=f"OpenVINO GenAI, {UNPRUNED}",
        kind=kind,
        checkpoint=options.checkpoint,
        python=options.genai_python or sys.executable,
    )
    pruned = next((case for case in cases[1:] if case.kind == "trio"), None)
    if pruned is None:
        return [whole]
    ratio = round(100 * (1 - _share(pruned.budget, bundle)))  # it takes whole per cent
    own = replace(
        whole,
        name=f"OpenVINO GenAI, CDPruner, {100 - ratio} %",
        budget=pruned.budget,
        pruning_ratio=ratio,
    )
    return [whole, own, replace(own, name=f"{own.name}, not in halves", halves=False)]


def _llama_cpp(base: Case, options: BenchOptions) -> list[Case]:
    """A line per type of weights."""
    build = "native build" if options.llama_server else "xllamacpp"
    return [
        replace(
            base,
            name=f"llama.cpp, {weights}, {build}",
            kind="llama.cpp",
            checkpoint=options.checkpoint,
            python=options.llama_python or sys.executable,
            weights=weights,
            server=options.llama_server,
        )
        for weights in llama_cpp.WEIGHTS
    ]


def _missing(kind: str, bundle: Bundle, options: BenchOptions) -> str | None:
    """Why a baseline cannot be measured here; None if it can."""
    if kind == "genai":
        if options.checkpoint is None:
            return "it converts a checkpoint: pass its folder as --checkpoint"
        if options.genai_python is None and importlib.util.find_spec("openvino_genai") is None:
            return "not installed here: pass an interpreter that has it as --genai-python"
        return genai.missing(options.genai_python or sys.executable)
    if kind == "llama.cpp":
        if options.llama_python is None and importlib.util.find_spec("xllamacpp") is None:
            return "not installed here: pass an interpreter that has it as --llama-python"
        if options.llama_server and not Path(options.llama_server).is_file():
            return f"--llama-server {options.llama_server} is no file: pass a llama-server's"
        python = options.llama_python or sys.executable
        return llama_cpp.unlike(bundle.config) or llama_cpp.missing(python)
    if kind == "oracle":  # reasons that no installation changes come first
        if not bundle.schedule.layers:
            return "this bundle prunes nothing"
        if others := sorted(set(bundle.schedule.methods) - {"trio"}):
            return (
                f"it prunes by trio alone, and this bundle by {' and '.join(others)}: export a "
                "bundle with trio at every pruning point to compare it"
            )
    for name in ("torch", "transformers"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed: pip install 'trio-deploy[reference]'"
    return None


def budget_name(budget: float | None, bundle: Bundle) -> str:
    """`11.1 %`; a bundle's own schedule is named by its average share."""
    return f"{100 * _share(budget, bundle):.3g} %"


def _share(budget: float | None, bundle: Bundle) -> float:
    """A budget, or the average share of a bundle's own schedule."""
    if budget is not None:
        return budget
    visual = request_limits(bundle.config).tile_rows
    return bundle.schedule.average(visual, bundle.config.text.num_layers) / visual
