"""Evaluate configurations: what pruning keeps of a model's answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from trio_deploy.bench.environment import machine
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.evaluation.ask import AskOptions, Examiner
from trio_deploy.evaluation.comparison import Comparison
from trio_deploy.evaluation.configurations import (
    BUNDLES,
    Bundles,
    Configuration,
    Source,
    unpruned,
)
from trio_deploy.evaluation.questions import Question, QuestionSet, question_set, require_references
from trio_deploy.evaluation.results import Results, collect
from trio_deploy.evaluation.scorers import get_scorer

_RUNTIME = {field.name for field in fields(RuntimeOptions)}
_ASKING = {field.name for field in fields(AskOptions)} - {"runtime"}


def evaluate(
    model: str | os.PathLike[str] | Bundle,
    questions: int | str | os.PathLike[str] | QuestionSet,
    out: str | os.PathLike[str],
    options: RuntimeOptions | None = None,
    *,
    comparison: Comparison | None = None,
    left_out: Callable[[str], object] = warnings.warn,
    **keywords: Any,
) -> Results:
    """Measure what schedules keep of a model's answers.

    Answers are stored under `out` as they come: the same call after an interrupt goes on where it
    stopped, and one with more questions or schedules asks only those.

    Args:
        model: a bundle or its folder, or a recipe, checkpoint folder or hub id of which a bundle is
            exported per schedule.
        questions: a file of questions, a number of generated scenes (16 questions each), or
            questions with their scorer.
        out: folder for bundles, answers and results.
        options: how bundles are run.
        comparison: what is compared with the unpruned model.
        left_out: called with a sentence for each configuration that is not possible on the model.
        keywords: fields of `Comparison` (`budgets`, `methods`, `schedules`, …) and
            `RuntimeOptions`, which replace those of the arguments, and `dtype`, `batch`,
            `max_new_tokens` and `progress` of `AskOptions`.

    Raises:
        TrioError: as `evaluate_configurations`, or an argument is wrong.
    """
    run = {name: keywords.pop(name) for name in _RUNTIME & keywords.keys()}
    asking = {name: keywords.pop(name) for name in _ASKING & keywords.keys()}
    asked = question_set(questions)
    source = Source.open(model.path if isinstance(model, Bundle) else model)
    compared = replace(comparison or Comparison(), **keywords)
    configurations, impossible = compared.configurations(source)
    for sentence in impossible:
        left_out(sentence)
    asking = {"max_new_tokens": asked.max_new_tokens} | asking
    return evaluate_configurations(
        source,
        asked.questions,
        configurations,
        Path(out),
        AskOptions(replace(options or RuntimeOptions(), **run), **asking),
        scorer=asked.scorer,
        data=asked.data,
    )


def evaluate_configurations(
    source: Source,
    questions: Sequence[Question],
    configurations: Sequence[Configuration],
    out: Path,
    options: AskOptions | None = None,
    *,
    scorer: str = "exact",
    data: str = "",
) -> Results:
    """Ask the unpruned model and every configuration every question.

    Answers are stored under `out` as they come: the same call after an interrupt goes on where it
    stopped, and one with more questions or configurations asks only those.

    Args:
        configurations: the first one of each budget (within half a percentage point) is what the
            others are compared with.
        scorer: see `scorers`; questions without a reference count for agreement and KL alone.
        data: description of the questions, for the report.

    Raises:
        TrioError: what exporting or running raises; before anything is asked, a reference that
            does not fit the scorer.
    """
    options = options or AskOptions()
    score = get_scorer(scorer)
    require_references(questions, score)
    bundles = Bundles(source, out / BUNDLES, options.runtime, options.dtype)
    examiner = Examiner(questions, score, out, options)
    whole = unpruned(source)
    reference = examiner.reference(whole, bundles)
    measured = [
        examiner.measure(configuration, bundles, reference)
        for configuration in (whole, *configurations)
    ]
    about = machine(options.runtime.threads)
    results = collect(source, questions, measured, data=data, scorer=scorer, machine=about)
    results.save(out)
    return results
