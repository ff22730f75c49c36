"""`trio attach-weights`: complete a bundle that was exported with --graphs-only."""

from __future__ import annotations

import argparse
from pathlib import Path

from trio_deploy.cli.options import add_chat_template
from trio_deploy.cli.terminal import say

SUMMARY = "Add a checkpoint's weights to a bundle exported with --graphs-only."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument("bundle", type=Path, help="folder of the bundle")
    command.add_argument("checkpoint", type=Path, help="checkpoint folder")
    add_chat_template(command)


def run(args: argparse.Namespace) -> None:
    """Copy the weights, and print what the bundle holds."""
    from trio_deploy.bundle.describe import inspect
    from trio_deploy.export.attach import attach_weights

    bundle = attach_weights(args.bundle, args.checkpoint, chat_template=args.chat_template)
    say(inspect(bundle, interface=False))
