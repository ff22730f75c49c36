"""`trio plan`: what a budget costs, before anything is exported."""

from __future__ import annotations

import argparse
import json

from trio_deploy.cli.options import (
    add_embeddings,
    add_max_pixels,
    add_model,
    add_quantize,
    add_schedule,
    budget_of,
    model_of,
)
from trio_deploy.cli.terminal import say

SUMMARY = "Compute what a budget keeps and costs, and whether it fits."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model(command)
    add_schedule(command)
    add_max_pixels(command)
    command.add_argument(
        "--visual-tokens",
        type=int,
        help="visual tokens of the prompt (default: the maximum of one image, without newlines)",
    )
    command.add_argument(
        "--text-tokens",
        type=int,
        default=60,
        help="text tokens of the prompt (default: 60, as in the paper)",
    )
    command.add_argument(
        "--target", help="name or file of the target whose memory is counted (default: cpu)"
    )
    command.add_argument("--dtype", help="float type of the weights (default: the target's)")
    add_quantize(command)
    add_embeddings(command)
    command.add_argument("--probes", type=int, default=4, help="probe positions (default: 4)")
    command.add_argument(
        "--paper",
        action="store_true",
        help="show layers, all operations counted, memory in detail and the paper's own figures",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> None:
    """Print the plan."""
    from trio_deploy.cost.plan import plan

    planned = plan(
        model_of(args),
        budget=budget_of(args),
        schedule=args.schedule,
        method=args.method,
        max_pixels=args.max_pixels,
        visual_tokens=args.visual_tokens,
        text_tokens=args.text_tokens,
        probes=args.probes,
        target=args.target,
        dtype=args.dtype,
        quantize=args.quantize,
        selections=args.selections,
        embeddings=args.embeddings,
    )
    say(json.dumps(planned.to_json(), indent=2) if args.json else planned.to_text(paper=args.paper))
