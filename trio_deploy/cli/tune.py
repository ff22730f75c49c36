"""`trio tune`: search for the schedule that changes answers least."""

from __future__ import annotations

import argparse

from trio_deploy.evaluation.options import add_tune

SUMMARY = "Search for the schedule that changes answers least; no labels."
add_arguments = add_tune


def run(args: argparse.Namespace) -> None:
    """Search, and print the schedules."""
    from trio_deploy.evaluation.command import run_tune, tuned_text

    print(tuned_text(run_tune(args)))
