"""What pruning keeps of a model's answers: questions, scores, comparisons, best schedules."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from trio_deploy.evaluation.configurations import Configuration, RuntimeOptions, Source
    from trio_deploy.evaluation.questions import Question
    from trio_deploy.evaluation.results import Results


def evaluate(
    source: Source,
    questions: Sequence[Question],
    configurations: Sequence[Configuration],
    out: Path,
    *,
    scorer: str = "exact",
    options: RuntimeOptions | None = None,
    batch: int = 16,
    max_new_tokens: int = 128,
    data: str = "",
    progress: bool = True,
) -> Results:
    """Ask every configuration every question, beside the unpruned model.

    Answers are kept under `out` as they come: the same call after an interrupt goes on where it
    stopped, and one with more questions or configurations asks those alone.

    Args:
        configurations: the first one of each budget (within half a percentage point) is what the
            others are compared with.
        scorer: see `scorers`; questions without a reference count for agreement and KL alone.
        batch: requests at a time.
        max_new_tokens: an answer's length at most.
        data: says in the report what was asked.

    Raises:
        TrioError: what exporting or running raises; before anything is asked, a reference that
            does not fit the scorer.
    """
    from trio_deploy.bench.environment import machine
    from trio_deploy.evaluation.ask import Examiner
    from trio_deploy.evaluation.configurations import BUNDLES, Bundles, RuntimeOptions, unpruned
    from trio_deploy.evaluation.results import collect
    from trio_deploy.evaluation.scorers import get_scorer, require_references

    options = options or RuntimeOptions()
    score = get_scorer(scorer)
    require_references(questions, score)
    bundles = Bundles(source, out / BUNDLES, options)
    examiner = Examiner(
        questions, score, out, batch=batch, max_new_tokens=max_new_tokens, progress=progress
    )
    whole = unpruned(source)
    reference = examiner.reference(whole, bundles)
    measured = [
        examiner.measure(configuration, bundles, reference)
        for configuration in (whole, *configurations)
    ]
    about: dict[str, Any] = machine(options.threads)
    results = collect(source, questions, measured, data=data, scorer=scorer, machine=about)
    results.save(out)
    return results
