"""Evaluate configurations: what pruning keeps of a model's answers."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trio_deploy.bench.environment import machine
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.ask import AskOptions, Examiner, Measured
from trio_deploy.evaluation.comparison import Comparison
from trio_deploy.evaluation.configurations import (
    BLIND,
    BUNDLES,
    UNPRUNED,
    Bundles,
    Configuration,
    Source,
    unpruned,
    used,
)
from trio_deploy.evaluation.questions import Question, QuestionSet, question_set, require_references
from trio_deploy.evaluation.results import Results, collect
from trio_deploy.evaluation.scheme import compare_schemes
from trio_deploy.evaluation.scorers import get_scorer
from trio_deploy.quant.schemes import NO_SCHEME

_RUNTIME = {field.name for field in fields(RuntimeOptions)}
_ASKING = {field.name for field in fields(AskOptions)} - {"runtime"}


def evaluate(
    model: str | os.PathLike[str] | Bundle,
    questions: int | str | os.PathLike[str] | QuestionSet,
    out: str | os.PathLike[str],
    options: RuntimeOptions | None = None,
    *,
    comparison: Comparison | None = None,
    floats: str | os.PathLike[str] | Bundle | None = None,
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
        floats: bundle or model with the float weights of a quantised one: both are asked, and
            `Results.scheme` says what the scheme costs. `none`: only the quantised one is asked.
            None: the model, if it is quantised when it is exported, else `none`.
        left_out: called with a sentence for each configuration that is not possible on the model.
        keywords: fields of `Comparison` (`budgets`, `methods`, `schedules`, …) and
            `RuntimeOptions`, which replace those of the arguments, and `dtype`, `quantize`,
            `selections`, `batch`, `max_new_tokens` and `progress` of `AskOptions`.

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
        floats=_floats_of(source, floats),
    )


def _floats_of(source: Source, floats: str | os.PathLike[str] | Bundle | None) -> Source | None:
    """Where the float weights of a quantised source are; the source itself if it is exported."""
    if floats is None:
        return source if source.bundle is None and source.stored is None else None
    if floats == NO_SCHEME:
        return None
    return Source.open(floats.path if isinstance(floats, Bundle) else floats)


def evaluate_configurations(
    source: Source,
    questions: Sequence[Question],
    configurations: Sequence[Configuration],
    out: Path,
    options: AskOptions | None = None,
    *,
    scorer: str = "exact",
    data: str = "",
    floats: Source | None = None,
) -> Results:
    """Ask the unpruned model and every configuration every question.

    Answers are stored under `out` as they come: the same call after an interrupt goes on where it
    stopped, and one with more questions or configurations asks only those.

    Args:
        configurations: the first one of each budget (within half a percentage point) is what the
            others are compared with.
        scorer: see `scorers`; questions without a reference count for agreement and KL alone.
        data: description of the questions, for the report.
        floats: where the float weights of a quantised source are: they are asked the same; None:
            they are not.

    Raises:
        TrioError: what exporting or running raises; before anything is asked, a reference that
            does not fit the scorer, or floats that are of another model or pruned otherwise.
    """
    options = options or AskOptions()
    score = get_scorer(scorer)
    require_references(questions, score)
    folder = out / BUNDLES
    bundles = Bundles(
        source, folder, options.runtime, options.dtype, options.quantize, options.selections
    )
    asked = [unpruned(source), *configurations]
    other = None
    if floats is not None and (bundles.scheme is not None or floats is not source):
        other = float_side(source, bundles, floats, asked, folder, options)
    examiner = Examiner(questions, score, out, options, kept=other is not None)
    measured = _measured(examiner, bundles, asked)
    about = machine(options.runtime.threads)
    results = collect(source, questions, measured, data=data, scorer=scorer, machine=about)
    if other is not None and floats is not None:
        bundles.close()
        theirs = _measured(examiner, other.bundles, other.configurations)
        seeing = [one for one in measured if not one.configuration.blind]
        results = replace(
            results,
            scheme=compare_schemes(
                seeing,
                theirs,
                [one.share for one in results.results if one.name != BLIND],
                questions,
                scheme=str(bundles.scheme),
                against=floats.name,
            ),
        )
    results.save(out)
    return results


def _measured(
    examiner: Examiner, bundles: Bundles, configurations: Sequence[Configuration]
) -> list[Measured]:
    """Answers of configurations, the first of which is the unpruned one."""
    reference = examiner.reference(configurations[0], bundles)
    return [examiner.measure(each, bundles, reference) for each in configurations]


@dataclass(frozen=True)
class FloatSide:
    """The float weights that a quantised source is compared with.

    Attributes:
        configurations: the same as those of the source, but for those without the picture.
    """

    bundles: Bundles
    configurations: list[Configuration]


def float_side(
    source: Source,
    bundles: Bundles,
    floats: Source,
    configurations: Sequence[Configuration],
    folder: Path,
    options: AskOptions,
) -> FloatSide:
    """Prepare the float weights of a quantised source; nothing is asked yet.

    Args:
        folder: of exported bundles.

    Raises:
        TrioError: the source is float, or the floats are quantised, are those of another model, or
            are pruned otherwise.
    """
    if bundles.scheme is None:
        raise TrioError(
            f"the weights of {source.name} are float already: leave --float out, or name a scheme "
            "with --quantize"
        )
    if (floats.layers, floats.visual) != (source.layers, source.visual):
        raise TrioError(
            f"{floats.name} has {floats.layers} layers and up to {floats.visual} visual tokens of "
            f"a picture, and {source.name} {source.layers} and {source.visual}: pass the float "
            "weights of the same model"
        )
    seeing = [each for each in configurations if not each.blind]
    runtime, dtype = options.runtime, options.dtype
    if source.bundle is not None and floats.bundle is None:
        manifest = source.bundle.manifest
        runtime, dtype = replace(runtime, target=runtime.target or manifest.target), manifest.dtype
        seeing = [_exported_like(source, source.bundle, each) for each in seeing]
    elif floats.bundle is not None:
        _require_pruned_alike(source, floats, floats.bundle, seeing)
        dtype = None
    quantize = NO_SCHEME if floats.bundle is None else None
    theirs = Bundles(floats, folder, runtime, dtype, quantize)
    if theirs.scheme is not None:
        raise TrioError(
            f"the weights of {floats.name} are in {theirs.scheme}: pass its float weights to "
            "--float"
        )
    return FloatSide(theirs, seeing)


def _exported_like(source: Source, bundle: Bundle, configuration: Configuration) -> Configuration:
    """A bundle's configuration for an export of its model."""
    manifest = bundle.manifest
    return replace(
        configuration,
        schedule=used(source, configuration),
        threshold=manifest.threshold,
        probe=manifest.probe,
        positions=manifest.positions,
    )


def _require_pruned_alike(
    source: Source, floats: Source, bundle: Bundle, configurations: Sequence[Configuration]
) -> None:
    """Raises TrioError where a float bundle selects otherwise than the quantised source."""
    if source.bundle is None:
        raise TrioError(
            f"{bundle.path} is a bundle, which has one schedule: pass the float model to --float"
        )
    mine, theirs = (
        [each.manifest.probe, each.manifest.positions, each.manifest.threshold]
        for each in (source.bundle, bundle)
    )
    for each in configurations:
        pairs = [(used(source, each), used(floats, each)), (mine, theirs)]
        if each.name != UNPRUNED and any(one != other for one, other in pairs):
            one, other = (" ".join(map(str, pair)) for pair in zip(*pairs, strict=True))
            raise TrioError(
                f"{bundle.path} prunes otherwise at {each.budget:.1%} ({other}, not {one}): export "
                "it with the same schedule and options, or pass the model itself to --float"
            )
