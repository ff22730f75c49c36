"""`trio eval`: ask every configuration every question."""

from __future__ import annotations

import argparse
import json

from trio_deploy.evaluation.options import add_eval

SUMMARY = "Measure what pruning keeps of the answers, method by method."
add_arguments = add_eval


def run(args: argparse.Namespace) -> None:
    """Measure, and print the results."""
    from trio_deploy.evaluation.command import run_eval

    results = run_eval(args)
    print(json.dumps(results.to_json(), indent=1) if args.json else results.to_text())
