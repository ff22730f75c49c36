"""`trio tune`: search for the schedule that changes answers least."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from trio_deploy.cli.eval import (
    add_asking_arguments,
    add_question_arguments,
    read_questions_of,
    values,
)
from trio_deploy.cli.options import budget_of, runtime_options
from trio_deploy.cli.terminal import say
from trio_deploy.config.options import DEFAULT_THRESHOLD
from trio_deploy.runtimes.registry import default_target

if TYPE_CHECKING:
    from trio_deploy.evaluation.statistics import Estimate
    from trio_deploy.evaluation.tune import Tuned


SUMMARY = "Search for the schedule that changes answers least, without labels."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of `trio tune`."""
    command.add_argument("model", help="what `trio export --model` takes")
    command.add_argument(
        "--out", type=Path, required=True, help="folder for the search and its result"
    )
    command.add_argument(
        "--budget", help="average share of visual tokens per layer (default: 0.111)"
    )
    command.add_argument(
        "--methods", default="trio,divprune", help="methods to try (default: trio,divprune)"
    )
    command.add_argument(
        "--last",
        help="methods of the last pruning point, to find where one of them does best (default: "
        "those of --methods)",
    )
    command.add_argument(
        "--points",
        type=int,
        default=3,
        help="maximum number of pruning points, 1 to 3 (default: 3)",
    )
    command.add_argument(
        "--threshold", help=f"cosine thresholds τ to begin with (default: {DEFAULT_THRESHOLD})"
    )
    command.add_argument("--probe", help="probe tokens to try: last, shifted, or last,shifted")
    command.add_argument(
        "--positions", help="position ids to try: renumber, original, or renumber,original"
    )
    command.add_argument("--candidates", type=int, help="maximum number of schedules to begin with")
    command.add_argument(
        "--start",
        action="append",
        default=[],
        metavar="SCHEDULE",
        help="further schedule to begin with, or a file that `trio tune` wrote, with its "
        "threshold, probe and positions; may be repeated",
    )
    add_question_arguments(command, split="tuning", scenes=40)
    command.set_defaults(scorer="exact", annotations=None)
    add_asking_arguments(command)


def run(args: argparse.Namespace) -> None:
    """Search as the arguments say, write the best schedule and print the ranking.

    Raises:
        TrioError: an option is wrong, or what `tune` raises.
    """
    from trio_deploy.evaluation.ask import AskOptions
    from trio_deploy.evaluation.configurations import Source, schedule_of
    from trio_deploy.evaluation.tune import BEST, Space, tune
    from trio_deploy.schedule.budget import DEFAULT_BUDGET

    budget = budget_of(args)
    source = Source.open(args.model)
    asked = read_questions_of(args)
    tuned = tune(
        source,
        asked.questions,
        DEFAULT_BUDGET if budget is None else budget,
        args.out,
        AskOptions(
            runtime_options(args),
            args.dtype,
            args.batch,
            asked.max_new_tokens,
            quantize=args.quantize,
            selections=args.selections,
        ),
        space=Space(
            methods=tuple(values(args.methods, str)),
            thresholds=tuple(values(args.threshold, float)) or (DEFAULT_THRESHOLD,),
            probes=tuple(values(args.probe, str)) or (None,),
            positions=tuple(values(args.positions, str)) or (None,),
            points=args.points,
            last=tuple(values(args.last, str)),
        ),
        limit=args.candidates,
        start=[schedule_of(text) for text in args.start],
    )
    say(f"trio: wrote {BEST} to {args.out}", file=sys.stderr)
    say(tuned_text(tuned))
    say(f"\nTo export it:\n\n    {export_command(args)}")


def export_command(args: argparse.Namespace) -> str:
    """The command that exports the schedule which was found, as it was searched."""
    from trio_deploy.evaluation.tune import BEST

    words = ["trio", "export", "--model", args.model, "--schedule", str(args.out / BEST)]
    target = args.target or (default_target(args.runtime) if args.runtime else None)
    given = {
        "--target": target,
        "--dtype": args.dtype,
        "--quantize": args.quantize,
        "--selections": args.selections,
    }
    for option, value in given.items():
        words += [option, str(value)] if value else []
    return shlex.join([*words, "--out", "BUNDLE"])


def tuned_text(tuned: Tuned, places: Sequence[int] = range(5)) -> str:
    """The best schedule in the form of a recipe, and a table of the first of the ranking."""
    from trio_deploy.evaluation.tune import described

    lines = [tuned.text, "loss     more than the best            same answer  schedule"]
    for place in places:
        if place < len(tuned.ranking):
            one, more = tuned.ranking[place], tuned.behind[place]
            apart = "" if place == 0 else f"{more.value:+.4f} ({_interval(more)})"
            schedule = described(one.configuration)
            lines.append(f"{one.loss:<8.4f} {apart:<29} {one.agreement:<12.1%} {schedule}")
    return "\n".join(lines)


def _interval(more: Estimate) -> str:
    from trio_deploy.evaluation.tune import level

    if not more.known:
        return "–"
    return "level" if level(more) else f"{more.low:+.4f} to {more.high:+.4f}"
