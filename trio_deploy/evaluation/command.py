"""`trio eval` and `trio tune`: what the command line says, made into calls."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TypeVar

from trio_deploy.errors import TrioError
from trio_deploy.evaluation.configurations import (
    OWN,
    RECIPE,
    Configuration,
    RuntimeOptions,
    Source,
    as_exported,
    blind,
    grid,
    named,
    used,
)
from trio_deploy.evaluation.evaluate import evaluate
from trio_deploy.evaluation.options import BUDGETS, FILE_TOKENS, SCENE_TOKENS
from trio_deploy.evaluation.plot import PLOT, draw
from trio_deploy.evaluation.questions import Question, annotate, read_questions, scene_questions
from trio_deploy.evaluation.results import RESULTS, TABLE, Results
from trio_deploy.evaluation.scorers import get_scorer
from trio_deploy.evaluation.statistics import Estimate
from trio_deploy.evaluation.tune import BEST, Space, Tuned, level, tune
from trio_deploy.schedule.budget import DEFAULT_BUDGET
from trio_deploy.schedule.schedule import Schedule

T = TypeVar("T")


def run_eval(args: argparse.Namespace) -> Results:
    """Measure what the arguments of `trio eval` name, and write what was found.

    Raises:
        TrioError: an option is wrong, or what `evaluate` raises.
    """
    source = Source.open(args.model)
    questions, scorer, data, limit = _questions(args)
    configurations = _configurations(args, source)
    if args.blind:
        configurations.append(blind(source))
    if not configurations:
        raise TrioError("nothing is left to measure: pass other --budgets, --methods or --schedule")
    plotted = not args.no_plot
    if plotted and find_spec("matplotlib") is None:
        plotted = False
        print(
            f"trio: there will be no {PLOT}, for want of matplotlib: pip install "
            "'trio-deploy[plots]', or pass --no-plot",
            file=sys.stderr,
        )
    results = evaluate(
        source,
        questions,
        configurations,
        args.out,
        scorer=scorer,
        options=_running(args),
        batch=args.batch,
        max_new_tokens=limit,
        data=data,
    )
    written = [RESULTS, TABLE]
    if plotted:
        try:
            draw(results, args.out / PLOT)
            written.append(PLOT)
        except TrioError as error:  # what was measured is there nevertheless
            print(f"trio: {error}", file=sys.stderr)
    print(f"trio: wrote {', '.join(written)} to {args.out}", file=sys.stderr)
    return results


def run_tune(args: argparse.Namespace) -> Tuned:
    """Search as the arguments of `trio tune` say.

    Raises:
        TrioError: an option is wrong, or what `tune` raises.
    """
    source = Source.open(args.model)
    questions, _, _, limit = _questions(args)
    tuned = tune(
        source,
        questions,
        args.budget if args.budget is not None else DEFAULT_BUDGET,
        args.out,
        space=Space(
            methods=tuple(_list(args.methods, str)),
            thresholds=tuple(_list(args.threshold, float)) or (0.8,),
            probes=tuple(_list(args.probe, str)) or (None,),
            positions=tuple(_list(args.positions, str)) or (None,),
            points=args.points,
        ),
        options=_running(args),
        batch=args.batch,
        max_new_tokens=limit,
        limit=args.candidates,
        start=[Schedule.parse(text) for text in args.start],
    )
    print(f"trio: wrote {BEST} to {args.out}", file=sys.stderr)
    return tuned


def _questions(args: argparse.Namespace) -> tuple[list[Question], str, str, int]:
    """Questions, the scorer's name, the data in words, tokens an answer may have."""
    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise TrioError(f"an answer has 1 token or more, not {args.max_new_tokens}")
    get_scorer(args.scorer)
    if args.questions is None:
        theirs = {
            "--images": args.images,
            "--annotations": args.annotations,
            "--append": args.append,
            "--limit": args.limit is not None,
            "--scorer": args.scorer != "exact",
        }
        if given := [option for option, value in theirs.items() if value]:
            raise TrioError(
                f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to --questions FILE"
            )
        for name, value in args.scene_defaults.items():
            if getattr(args, name) is None:
                setattr(args, name, value)
        found = scene_questions(args.scenes, family=args.family, split=args.split, first=args.first)
        data = f"{args.family} scenes {args.first} to {args.first + args.scenes - 1} of the "
        return found, "exact", f"{data}{args.split} seeds", args.max_new_tokens or SCENE_TOKENS
    if given := [f"--{name}" for name in args.scene_defaults if getattr(args, name) is not None]:
        raise TrioError(
            f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to generated scenes, not to "
            "--questions: leave one of them out"
        )
    found = read_questions(args.questions, args.images, append=args.append, limit=args.limit)
    scorer = args.scorer
    if args.annotations is not None:
        found = annotate(found, scorer, args.annotations)
    return found, scorer, args.questions.name, args.max_new_tokens or FILE_TOKENS


def _configurations(args: argparse.Namespace, source: Source) -> list[Configuration]:
    asked = _list(args.budgets, str)
    if not asked:
        pruned = source.bundle is not None and source.bundle.schedule.layers
        asked = [OWN] * bool(pruned) + [f"{budget:g}" for budget in BUDGETS]
    own = [as_exported(source)] if OWN in asked else []
    budgets = _list(",".join(budget for budget in asked if budget != OWN), float)
    methods = _list(args.methods, str)
    if not methods and not args.schedule and source.bundle is None:
        methods = [RECIPE]
    if args.seeds < 1:
        raise TrioError(f"a random selection is run once or more, not {args.seeds} times")
    found: list[Configuration] = []
    if methods or source.bundle is not None:
        found, refused = grid(
            source,
            methods,
            budgets,
            thresholds=_list(args.threshold, float) or [None],
            probes=_list(args.probe, str) or [None],
            positions=_list(args.positions, str) or [None],
            seeds=range(args.seeds),
        )
        for sentence in refused:
            print(f"trio: {sentence}", file=sys.stderr)
        # A budget at which a bundle has its own schedule would be asked twice.
        same = [used(source, one) for one in own]
        found = own + [one for one in found if used(source, one) not in same]
    return [named(source, text) for text in args.schedule] + found


def _running(args: argparse.Namespace) -> RuntimeOptions:
    return RuntimeOptions(args.target, args.dtype, args.runtime, args.provider, args.threads)


def _list(text: str | None, kind: Callable[[str], T]) -> list[T]:
    """Comma-separated values.

    Raises:
        TrioError: one cannot be read.
    """
    try:
        return [kind(part.strip()) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise TrioError(f"cannot read {text!r}: write numbers with commas between them") from None


def tuned_text(tuned: Tuned, others: Sequence[int] = range(5)) -> str:
    """The result in recipe form, and the schedules that came next."""
    lines = [tuned.text, "loss     more than the best            same answer  schedule"]
    for place in others:
        if place < len(tuned.ranking):
            one, more = tuned.ranking[place], tuned.behind[place]
            apart = "" if place == 0 else f"{more.value:+.4f} ({_apart(more)})"
            tau = one.configuration.threshold
            lines.append(
                f"{one.loss:<8.4f} {apart:<29} {one.agreement:<12.1%} {one.configuration.name}"
                + ("" if tau is None else f"  τ={tau:g}")
            )
    return "\n".join(lines)


def _apart(more: Estimate) -> str:
    if not more.known:
        return "–"
    return "level" if level(more) else f"{more.low:+.4f} to {more.high:+.4f}"
