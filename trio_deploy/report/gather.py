"""Gather the parts of a page as plain values; nothing here knows HTML.

Each part stands alone: one that is not available (no weights, no torch, not measured) becomes a
sentence on the page and leaves the others as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.checkpoint.resolve import name_of
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.families.pixels import header_size, open_image
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.report import figures, quick
from trio_deploy.report.examples import Asked, answers, default_questions
from trio_deploy.report.facts import arithmetic, exported, schedule

_QUESTIONS_PER_SCENE = 16
_MAX_SECONDS = 300.0  # of a quick accuracy run, as far as can be estimated


@dataclass(frozen=True)
class ReportOptions:
    """What the page shows, and what is measured for it.

    Attributes:
        bench, evaluation: files of `trio bench` and `trio eval`; None: measure a little now.
        asked: questions whose kept tokens are drawn; empty: questions about generated scenes.
        check, measure: whether to compare with the reference and to measure time now.
        scenes: number of generated scenes for a quick accuracy; 0: none.
        runtime: how the bundle is run.
    """

    bench: Path | None = None
    evaluation: Path | None = None
    asked: Sequence[Asked] = ()
    check: bool = True
    measure: bool = True
    scenes: int = 10  # fewer give no intervals
    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)


def gather(bundle: Bundle, options: ReportOptions, *, progress: bool = True) -> dict[str, Any]:
    """All parts: `bundle`, `schedule`, `arithmetic`, `answers`, `cost`, `accuracy`, `parity`.

    Raises:
        TrioError: one of the files does not load, or a picture cannot be read.
    """
    # First, since the rest takes minutes; they need no weights here.
    read: dict[str, Any] = {}
    if options.bench:
        read["cost"] = figures.cost(bundle, options.bench, quick=False)
    if options.evaluation:
        read["accuracy"] = figures.accuracy(bundle, options.evaluation, quick=False)
    parts = {
        "bundle": exported(bundle),
        "schedule": schedule(bundle),
        "arithmetic": arithmetic(bundle),
    }
    if bundle.manifest.weights == "planned":
        reason = "The bundle has no weights yet: complete it with `trio attach-weights`."
        parts |= {part: {"skipped": reason} for part in ("answers", "cost", "accuracy", "parity")}
    else:
        parts |= _measured(bundle, options, progress)
    return parts | read


def require_readable(options: ReportOptions, model: str) -> None:
    """Check, before a model is exported for a page, that files and pictures can be read.

    Args:
        model: what the user named.

    Raises:
        TrioError: one of them cannot be read, or is of another model.
    """
    for image in (image for asked in options.asked for image in asked.images):
        if isinstance(image, Path) and header_size(image) is None:
            open_image(image)
    name = name_of(model)
    if options.bench:
        figures.read_bench(options.bench, name)
    if options.evaluation:
        figures.read_evaluation(options.evaluation, name)


def _measured(bundle: Bundle, options: ReportOptions, progress: bool) -> dict[str, Any]:
    """Parts that ask the model itself: run what no file was passed for, and read what it wrote."""
    pipeline = Pipeline.open(bundle, options.runtime)
    asked = options.asked or default_questions()
    shown = answers(pipeline, asked)
    del pipeline  # before the next ones are opened
    skipped = {"skipped": "Left out."}
    parts = {"answers": shown, "cost": skipped, "accuracy": skipped, "parity": skipped}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.check:
            try:
                parts["parity"] = figures.parity(quick.run_check(bundle, options.runtime))
            except TrioError as error:
                parts["parity"] = {"skipped": f"Not checked: {error}."}
        if options.evaluation is None and options.scenes:
            seconds = shown["seconds"] / len(asked)
            parts["accuracy"] = _quick_accuracy(bundle, options, seconds, folder, progress)
        if options.bench is None and options.measure:
            file = quick.run_bench(bundle, options.runtime, folder, progress=progress)
            parts["cost"] = figures.cost(bundle, file, quick=True)
    return parts


def _quick_accuracy(
    bundle: Bundle, options: ReportOptions, seconds: float, folder: Path, progress: bool
) -> dict[str, Any]:
    """Accuracy on a few scenes, unless answers of so many `seconds` each would take too long."""
    questions = options.scenes * _QUESTIONS_PER_SCENE
    # Each question is asked once per budget and once of the unpruned model.
    expected = seconds * questions * 2
    if expected > _MAX_SECONDS:
        return {
            "skipped": f"Not measured: {questions} questions would take about "
            f"{expected / 60:.0f} minutes here. Run trio eval and pass its results as --eval."
        }
    file = quick.run_eval(bundle, options.scenes, options.runtime, folder, progress=progress)
    return figures.accuracy(bundle, file, quick=True)
