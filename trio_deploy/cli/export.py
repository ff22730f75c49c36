"""`trio export` and `trio-export`: turn a checkpoint into a bundle."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path

from trio_deploy.cli.options import (
    add_chat_template,
    add_embeddings,
    add_max_pixels,
    add_model,
    add_quantize,
    add_schedule,
    budget_of,
    model_of,
)
from trio_deploy.cli.terminal import say
from trio_deploy.config.options import DEFAULT_THRESHOLD

SUMMARY = "Turn a checkpoint into a bundle of pruned ONNX graphs."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_model(command)
    command.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    add_schedule(command)
    command.add_argument("--dtype", help="float32, float16 or bfloat16 (default: the target's)")
    command.add_argument("--dialect", help="ort, onnx or primitive (default: the target's)")
    command.add_argument(
        "--weights",
        help="constants of the graphs, or inputs, of which one copy in memory serves all stages "
        "(dialect onnx; default: the target's)",
    )
    add_quantize(command)
    add_embeddings(command)
    command.add_argument(
        "--calibrate",
        type=Path,
        metavar="QUESTIONS",
        help="questions like those that will be asked, in the form that `trio eval` reads: the "
        "float model is asked them, and --quantize fp8 rounds activations by what was measured",
    )
    command.add_argument("--target", help="name or file of the target (default: cpu)")
    add_chat_template(command)
    add_max_pixels(command)
    command.add_argument(
        "--link-weights",
        action="store_true",
        help="hard-link the checkpoint's weights instead of copying",
    )
    command.add_argument(
        "--graphs-only",
        action="store_true",
        help="write the graphs only, without weights",
    )
    command.add_argument(
        "--positions",
        help="position ids after pruning: renumber or original (default: the recipe's, else "
        "the family's)",
    )
    command.add_argument("--probe", help="probe tokens: last or shifted (default: the recipe's)")
    command.add_argument(
        "--threshold",
        type=float,
        help="cosine similarity at which a kept token suppresses another (default: the recipe's, "
        f"else {DEFAULT_THRESHOLD})",
    )
    command.add_argument("--force", action="store_true", help="replace an existing bundle")


def run(args: argparse.Namespace) -> None:
    """Export, and print what the bundle holds."""
    from trio_deploy.bundle.describe import inspect
    from trio_deploy.export.job import export_model

    calibration = None
    if args.calibrate is not None:
        from trio_deploy.evaluation.calibrate import calibrate
        from trio_deploy.evaluation.questions import question_set

        calibration = partial(calibrate, model_of(args), question_set(args.calibrate))
    bundle = export_model(
        model_of(args),
        args.out,
        budget=budget_of(args),
        schedule=args.schedule,
        method=args.method,
        dtype=args.dtype,
        dialect=args.dialect,
        weights=args.weights,
        quantize=args.quantize,
        selections=args.selections,
        embeddings=args.embeddings,
        calibration=calibration,
        target=args.target,
        chat_template=args.chat_template,
        max_pixels=args.max_pixels,
        link_weights=args.link_weights,
        graphs_only=args.graphs_only,
        force=args.force,
        positions=args.positions,
        probe=args.probe,
        threshold=args.threshold,
    )
    say(inspect(bundle, interface=False))
