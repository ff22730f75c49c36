"""`trio report`: write one HTML page about a bundle."""

from __future__ import annotations

import argparse
from pathlib import Path

from trio_deploy.cli.options import add_bundle, add_runtime_options, runtime_options
from trio_deploy.cli.terminal import say

SUMMARY = "Write one HTML page about a bundle."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument(
        "--out", type=Path, default=Path("report.html"), help="file to write (default: report.html)"
    )
    command.add_argument(
        "--bench",
        type=Path,
        metavar="JSON",
        help="figures that `trio bench --out` wrote (default: measure briefly)",
    )
    command.add_argument(
        "--eval",
        type=Path,
        metavar="JSON",
        help="results.json that `trio eval` wrote (default: ask a few questions)",
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        help="image whose kept tokens are drawn; may be repeated (default: generated scenes)",
    )
    command.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="question about the --image of the same position; a single one is asked about every "
        "--image, and several are all asked about a single --image",
    )
    command.add_argument(
        "--scenes",
        type=int,
        default=10,
        help="number of generated scenes to measure accuracy with, without --eval (default: 10; "
        "0: none)",
    )
    command.add_argument("--no-check", action="store_true", help="skip `trio check`")
    command.add_argument("--no-bench", action="store_true", help="skip `trio bench`")
    add_runtime_options(command)


def run(args: argparse.Namespace) -> None:
    """Write the page, and print its path.

    Raises:
        TrioError: pictures and questions do not match, or what `write_report` raises.
    """
    from trio_deploy.report.examples import asked_about
    from trio_deploy.report.gather import ReportOptions
    from trio_deploy.report.report import write_report

    options = ReportOptions(
        bench=args.bench,
        evaluation=args.eval,
        asked=asked_about(args.image, args.prompt),
        check=not args.no_check,
        measure=not args.no_bench,
        scenes=args.scenes,
        runtime=runtime_options(args),
    )
    say(write_report(args.bundle, args.out, options))
