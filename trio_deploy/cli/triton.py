"""`trio triton`: write a model repository for the Triton Inference Server."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from trio_deploy.cli.options import add_bundle, add_runtime_options, bundle_of, runtime_options
from trio_deploy.cli.terminal import say

SUMMARY = "Write a model repository for the Triton Inference Server."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument(
        "--out", type=Path, required=True, help="folder to write the repository to"
    )
    command.add_argument("--device", default="cpu", help="cpu or gpu (default: cpu)")
    command.add_argument(
        "--instances",
        type=int,
        default=1,
        help="processes that load the model, each answering many requests at once (default: 1)",
    )
    command.add_argument(
        "--stages",
        action="store_true",
        help="also write each stage, and vision + embed, as models (these load the weights again)",
    )
    command.add_argument(
        "--name", default="trio", help="prefix of the models' names (default: trio)"
    )
    command.add_argument(
        "--settings", type=Path, metavar="YAML", help="file of limits and other settings"
    )
    command.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one setting, such as max_tokens=512; may be repeated",
    )
    command.add_argument(
        "--link", action="store_true", help="hard-link the bundle's files instead of copying"
    )
    command.add_argument("--force", action="store_true", help="replace an existing repository")
    add_runtime_options(command)


def run(args: argparse.Namespace) -> None:
    """Write the repository, and print how to serve it."""
    from trio_deploy.export.cache import is_bundle
    from trio_deploy.serve.limits import read_settings
    from trio_deploy.serve.triton_server.repository import (
        Options,
        path_warning,
        require_servable,
        write_repository,
    )

    options = Options(
        runtime=runtime_options(args),
        device=args.device,
        instances=args.instances,
        stages=args.stages,
        name=args.name,
        settings=read_settings(args.settings, args.set),
        link=args.link,
    )
    if not is_bundle(args.bundle):
        require_servable(options, args.out, args.force)
    bundle = bundle_of(args, options.runtime, budgets=[options.budget])
    models = write_repository(bundle, args.out, options, force=args.force)
    say(f"{args.out}: {', '.join(models)}")
    if warning := path_warning(args.out):
        say(f"trio: {warning}", file=sys.stderr)
    say(f"serve it: tritonserver --model-repository {args.out}")
