"""`trio cache`: show the bundles that commands exported themselves, and remove them."""

from __future__ import annotations

import argparse
import sys
import time
from typing import TYPE_CHECKING

from trio_deploy.cli.terminal import say
from trio_deploy.errors import TrioError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from trio_deploy.export.cache import Entry

SUMMARY = "Show or remove the bundles of models that were named in place of a bundle."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    command.add_argument(
        "name", nargs="*", help="with --clear: models or bundles to remove (default: all)"
    )
    command.add_argument("--clear", action="store_true", help="remove bundles from the cache")


def run(args: argparse.Namespace) -> None:
    """List the cache, or clear it.

    Raises:
        TrioError: a name without --clear, or that the cache does not know.
    """
    from trio_deploy.export.cache import cache_folder, clear_cache, list_cache

    if not args.clear:
        if args.name:
            raise TrioError("names are for --clear: `trio cache` alone lists every bundle")
        say(f"{cache_folder()}\n{cache_text(list_cache())}")
        return
    removed, busy = clear_cache(args.name)
    for name in busy:
        say(f"trio: {name} is being exported by another process, it stays", file=sys.stderr)
    say(f"removed {', '.join(removed) or 'nothing'}")


def cache_text(entries: Sequence[Entry]) -> str:
    """A table of bundles: name, size, target, float type, when each was last used."""
    from trio_deploy.files import format_bytes

    if not entries:
        return "no bundles"
    width = max(len(entry.name) for entry in entries)
    lines = [f"{'bundle':<{width}}  {'size':>10}  {'target':<20}  {'dtype':<9}  last used"]
    for entry in entries:
        manifest = entry.bundle.manifest
        used = time.strftime("%Y-%m-%d %H:%M", time.localtime(entry.used))
        lines.append(
            f"{entry.name:<{width}}  {format_bytes(entry.size):>10}  {manifest.target:<20}  "
            f"{manifest.dtype:<9}  {used}"
        )
    total = format_bytes(sum(entry.size for entry in entries))
    return "\n".join([*lines, f"{'all':<{width}}  {total:>10}"])
