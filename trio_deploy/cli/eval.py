"""`trio eval`: ask every configuration every question; the questions of `trio tune`, too."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from trio_deploy.cli.options import add_quantize, add_runtime_options, runtime_options
from trio_deploy.cli.terminal import say
from trio_deploy.errors import TrioError

if TYPE_CHECKING:
    from trio_deploy.evaluation.comparison import Comparison
    from trio_deploy.evaluation.questions import QuestionSet

T = TypeVar("T")

CHART = "retention.svg"
SCENE_TOKENS = 8  # as evaluation.questions has them, which needs numpy
FILE_TOKENS = 128
FIRST_SCENE = 10_000  # as evaluation.scenes.FIRST_SCENE, which needs numpy
SUMMARY = "Measure how much accuracy pruning keeps, method by method."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of `trio eval`."""
    command.add_argument("model", help="folder of a bundle, or what `trio export --model` takes")
    command.add_argument("--out", type=Path, required=True, help="folder for answers and results")
    command.add_argument(
        "--budgets",
        help="shares of visual tokens, comma-separated, and `own` for a bundle's own schedule "
        "(default: 0.111,0.222,0.333; for a bundle own,0.111,0.222,0.333)",
    )
    command.add_argument(
        "--methods",
        help="comma-separated: recipe (the recipe's schedules), METHOD (in the published "
        "schedule's shape), METHOD@LAYER+LAYER, or METHOD@recipe (at the recipe's layers and "
        "keeps); not for a bundle, which has its own (default: recipe)",
    )
    command.add_argument(
        "--schedule",
        action="append",
        default=[],
        metavar="[NAME=]LAYER:KEEP:METHOD,…",
        help="schedule to measure before the methods, or a file that `trio tune` wrote; may be "
        "repeated",
    )
    command.add_argument("--threshold", help="cosine thresholds τ to compare, comma-separated")
    command.add_argument("--probe", help="probe tokens to compare: last, shifted, or last,shifted")
    command.add_argument(
        "--positions", help="position ids to compare: renumber, original, or renumber,original"
    )
    command.add_argument(
        "--seeds", type=int, default=1, help="seeds to average random selections over (default: 1)"
    )
    command.add_argument("--blind", action="store_true", help="also ask without the picture")
    command.add_argument(
        "--float",
        metavar="MODEL",
        help="bundle or model with the float weights of a quantised one, which is asked too: kept "
        "tokens and answers are compared, and the status is 1 if they miss the scheme's bars "
        "(default: the model itself if --quantize, its recipe or the target quantises it; none: "
        "do not compare)",
    )
    command.add_argument("--no-plot", action="store_true", help="write no chart")
    add_question_arguments(command, split="test", scenes=64)
    command.add_argument(
        "--annotations", type=Path, help="the benchmark's own annotation file, for --questions"
    )
    command.add_argument(
        "--scorer",
        default="exact",
        help="scorer for --questions: exact, pope, scienceqa, textvqa or vqav2 (default: exact)",
    )
    add_asking_arguments(command)
    command.add_argument("--json", action="store_true", help="print one JSON object instead")


def add_question_arguments(command: argparse.ArgumentParser, split: str, scenes: int) -> None:
    """Options that say what is asked: generated scenes or a question file."""
    # Not argparse's defaults, so that one given together with a question file is noticed.
    command.set_defaults(
        scene_defaults={"scenes": scenes, "family": "busy", "split": split, "first": FIRST_SCENE}
    )
    command.add_argument(
        "--scenes",
        type=int,
        help=f"number of generated pictures, 16 questions each (default: {scenes})",
    )
    command.add_argument("--family", help="family of scenes: busy (default) or smooth")
    command.add_argument("--split", help=f"split of scenes: test or tuning (default: {split})")
    command.add_argument(
        "--first", type=int, help=f"first scene of the split (default: {FIRST_SCENE})"
    )
    command.add_argument(
        "--questions",
        type=Path,
        metavar="JSONL",
        help="file of questions, instead of generated scenes",
    )
    command.add_argument("--images", type=Path, help="folder of the questions' pictures")
    command.add_argument("--append", default="", help="line to add to every question")
    command.add_argument("--limit", type=int, help="ask only the first LIMIT questions")


def add_asking_arguments(command: argparse.ArgumentParser) -> None:
    """Options that say how bundles are exported and run."""
    command.add_argument("--batch", type=int, default=16, help="requests per batch (default: 16)")
    command.add_argument(
        "--max-new-tokens",
        type=int,
        help=f"maximum number of generated tokens (default: {FILE_TOKENS}; for scenes "
        f"{SCENE_TOKENS})",
    )
    command.add_argument("--dtype", help="float type of exported bundles (default: the target's)")
    add_quantize(command)
    add_runtime_options(command)


def run(args: argparse.Namespace) -> int:
    """Measure what the arguments name, and write and print what was found.

    Returns:
        1 if quantised weights miss a bar of their scheme.

    Raises:
        TrioError: an option is wrong, or what `evaluate` raises.
    """
    from trio_deploy.evaluation.evaluate import evaluate
    from trio_deploy.evaluation.results import RESULTS, TABLE
    from trio_deploy.files import write_atomically
    from trio_deploy.report.charts import retention_chart

    results = evaluate(
        args.model,
        read_questions_of(args),
        args.out,
        runtime_options(args),
        comparison=comparison_of(args),
        floats=args.float,
        left_out=lambda sentence: say(f"trio: {sentence}", file=sys.stderr),
        dtype=args.dtype,
        quantize=args.quantize,
        selections=args.selections,
        batch=args.batch,
    )
    written = [RESULTS, TABLE]
    if not args.no_plot:
        try:
            write_atomically(args.out / CHART, retention_chart(results).encode())
            written.append(CHART)
        except TrioError as error:  # the results are written nevertheless
            say(f"trio: {error}", file=sys.stderr)
    say(f"trio: wrote {', '.join(written)} to {args.out}", file=sys.stderr)
    say(json.dumps(results.to_json(), indent=1) if args.json else results.to_text())
    return 0 if results.passed else 1


def read_questions_of(args: argparse.Namespace) -> QuestionSet:
    """The questions that the arguments name.

    Raises:
        TrioError: an option that does not go with the others, or unreadable questions.
    """
    from trio_deploy.evaluation.questions import (
        FILE_TOKENS,
        QuestionSet,
        annotate,
        read_questions,
        scene_set,
    )
    from trio_deploy.evaluation.scorers import get_scorer

    if args.max_new_tokens is not None and args.max_new_tokens < 1:
        raise TrioError(f"--max-new-tokens must be 1 or more, not {args.max_new_tokens}")
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
        asked = scene_set(args.scenes, family=args.family, split=args.split, first=args.first)
        return replace(asked, max_new_tokens=args.max_new_tokens or asked.max_new_tokens)
    if given := [f"--{name}" for name in args.scene_defaults if getattr(args, name) is not None]:
        raise TrioError(
            f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to generated scenes, not to "
            "--questions: leave one of them out"
        )
    found = read_questions(args.questions, args.images, append=args.append, limit=args.limit)
    if args.annotations is not None:
        found = annotate(found, args.scorer, args.annotations)
    limit = args.max_new_tokens or FILE_TOKENS
    return QuestionSet(found, args.scorer, args.questions.name, limit)


def comparison_of(args: argparse.Namespace) -> Comparison:
    """What the arguments compare.

    Raises:
        TrioError: a value cannot be read.
    """
    from trio_deploy.evaluation.comparison import Comparison

    return Comparison(
        budgets=args.budgets or (),
        methods=args.methods or (),
        schedules=args.schedule,
        thresholds=values(args.threshold, float),
        probes=values(args.probe, str),
        positions=values(args.positions, str),
        seeds=args.seeds,
        blind=args.blind,
    )


def values(text: str | None, kind: Callable[[str], T]) -> list[T]:
    """Read comma-separated values.

    Raises:
        TrioError: one cannot be read.
    """
    try:
        return [kind(part.strip()) for part in (text or "").split(",") if part.strip()]
    except ValueError:
        raise TrioError(f"cannot read {text!r}: write numbers separated by commas") from None
