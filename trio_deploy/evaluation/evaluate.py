"""Evaluate configurations: what pruning keeps of a model's answers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from trio_deploy.bench.environment import machine
from trio_deploy.evaluation.ask import AskOptions, Examiner
from trio_deploy.evaluation.configurations import (
    BUNDLES,
    Bundles,
    Configuration,
    Source,
    unpruned,
)
from trio_deploy.evaluation.questions import Question, require_references
from trio_deploy.evaluation.results import Results, collect
from trio_deploy.evaluation.scorers import get_scorer


def evaluate(
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
