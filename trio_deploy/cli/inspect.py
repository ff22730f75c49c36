"""`trio inspect`: show what a bundle holds."""

from __future__ import annotations

import argparse
import sys

from trio_deploy.cli.options import add_bundle, bundle_of
from trio_deploy.cli.terminal import say

SUMMARY = "Show what a bundle holds."

INCOMPLETE = 3  # exit status of --verify where weights are missing


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument(
        "--verify",
        action="store_true",
        help="compare every file with its checksum, and record the checksums of linked weights; "
        f"exit status {INCOMPLETE} if weights are missing",
    )


def run(args: argparse.Namespace) -> int:
    """Print what the bundle holds; with --verify compare its files with their checksums.

    Returns:
        0, or `INCOMPLETE` where a bundle is verified that has no weights.
    """
    from trio_deploy.bundle.describe import inspect

    bundle = bundle_of(args)
    if args.verify:
        bundle.check(verify=True)
    compared = sum(info.sha256 is not None for info in bundle.manifest.files.values())
    if args.verify:
        bundle.check_places()
    if args.verify and bundle.files_without_checksum and bundle.manifest.weights != "planned":
        say(
            f"trio: nothing to compare {', '.join(bundle.files_without_checksum)} with: no "
            "checksum of linked weights was recorded until now",
            file=sys.stderr,
        )
        bundle = bundle.record_checksums()
    say(inspect(bundle))
    if not args.verify:
        return 0
    say(f"verified   {compared} of {len(bundle.manifest.files)} files have their checksum")
    if bundle.manifest.weights == "planned":
        say(
            "trio: weights are missing, only the other files were verified: complete the bundle "
            "with `trio attach-weights`",
            file=sys.stderr,
        )
        return INCOMPLETE
    return 0
