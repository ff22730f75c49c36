"""`trio check`: compare a bundle with the reference, stage by stage."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from trio_deploy.cli.options import add_bundle, add_runtime_options, runtime_options
from trio_deploy.cli.terminal import say

SUMMARY = "Compare a bundle with the reference, stage by stage."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    source = command.add_mutually_exclusive_group()
    source.add_argument(
        "--record", action="store_true", help="also store the reference's tensors in the bundle"
    )
    source.add_argument(
        "--golden", action="store_true", help="compare with the stored tensors, without torch"
    )
    command.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint folder that the bundle was made from: its files are compared, and the "
        "reference is loaded from it (default: the reference has the weights in the bundle); with "
        "--golden only config.json and the headers of weights are compared",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_runtime_options(command)


def run(args: argparse.Namespace) -> int:
    """Record if asked, check, and print the table; 1 if a row is beyond tolerance."""
    from trio_deploy.verify import check as verify
    from trio_deploy.verify.report import format_report

    options = runtime_options(args)
    if args.record:
        verify.record(args.bundle, options, checkpoint=args.checkpoint)
    report = verify.check(args.bundle, options, golden=args.golden, checkpoint=args.checkpoint)
    say(json.dumps(report.to_json(), indent=2) if args.json else format_report(report))
    return 0 if report.passed else 1
