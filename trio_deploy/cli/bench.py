"""`trio bench`: measure a bundle, or random weights of a size; show and write the figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_deploy.cli.options import (
    add_bundle,
    add_runtime_options,
    bundle_of,
    list_of,
    pixels,
    runtime_options,
)
from trio_deploy.cli.terminal import say
from trio_deploy.errors import TrioError
from trio_deploy.files import is_folder
from trio_deploy.schedule.budget import read_budget

if TYPE_CHECKING:
    from trio_deploy.bench.measure import BenchOptions
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.pipeline.batcher.scheduler import BatcherLimits

SUMMARY = "Measure time and memory, compared with no pruning and other pipelines."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command, nargs="?")
    command.add_argument(
        "--size",
        help="measure random weights instead of a bundle: sizes, such as "
        "d=1024,layers=16,vocab=32000, with the tower's, such as vision_d=256,vision_layers=3 (its "
        "defaults) or tower=NAME (clip-l-336, qwen2-vl, qwen2.5-vl, qwen3-vl-2b); or a recipe that "
        "has them",
    )
    command.add_argument(
        "--budget",
        type=list_of(str),
        help="shares of visual tokens, comma-separated, measured beside no pruning (default: the "
        "bundle's, or 0.111; with --sweep 0.111,0.222,0.333)",
    )
    command.add_argument(
        "--schedule", help="schedule of the bundle made for --size, as `trio export --schedule`"
    )
    command.add_argument(
        "--images",
        type=list_of(int),
        help="number of pictures in the prompt (default: 1; with --sweep 1,2,3,4)",
    )
    command.add_argument(
        "--picture",
        type=pixels,
        metavar="WxH",
        help="size of the pictures (default: the one with most visual tokens)",
    )
    command.add_argument(
        "--text-tokens", type=int, default=64, help="text tokens of the prompt (default: 64)"
    )
    command.add_argument(
        "--new-tokens", type=int, default=32, help="generated tokens per run (default: 32)"
    )
    command.add_argument("--runs", type=int, default=5, help="number of measured runs (default: 5)")
    command.add_argument(
        "--warm-up",
        type=int,
        default=2,
        help="number of runs before them that are not measured (default: 2)",
    )
    command.add_argument(
        "--sweep", action="store_true", help="measure every budget with every number of --images"
    )
    command.add_argument(
        "--rows",
        type=list_of(int),
        help="measure instead how long so many rows that are being decoded wait while prompts join "
        "them, such as 1,8,16",
    )
    command.add_argument(
        "--max-gap-ms",
        type=float,
        help="bound on that wait, with --rows, compared with none (default: that of the servers)",
    )
    command.add_argument(
        "--baselines",
        type=list_of(str, none="none"),
        help="pipelines to compare with: transformers, oracle, genai, llama.cpp, comma-separated, "
        "or none (default: those installed)",
    )
    command.add_argument(
        "--genai-python", metavar="PATH", help="interpreter that has openvino-genai"
    )
    command.add_argument(
        "--llama-python", metavar="PATH", help="interpreter that has xllamacpp and gguf"
    )
    command.add_argument(
        "--llama-server",
        metavar="PATH",
        help="a llama-server to measure instead of xllamacpp's (scripts/build_llama_cpp.sh)",
    )
    command.add_argument(
        "--quantize",
        type=list_of(str),
        help="with --size, schemes of weights to measure beside float ones: int8, int4, int4-g32, "
        "comma-separated; int4:float has float selections",
    )
    command.add_argument(
        "--checkpoint", metavar="DIR", help="checkpoint of the bundle, for the baseline genai"
    )
    command.add_argument("--no-memory", action="store_true", help="do not measure peak memory")
    command.add_argument("--dtype", help="float type of random weights (default: float32)")
    command.add_argument(
        "--dialect", help="dialect of the bundle made for --size (default: the target's)"
    )
    command.add_argument("--cache", type=Path, help="folder to keep random weights in")
    command.add_argument(
        "--out", type=Path, metavar="NAME", help="write NAME.json, NAME.md and NAME.svg"
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    add_runtime_options(command)


def run(args: argparse.Namespace) -> None:
    """Measure as the arguments say, print tables or JSON, and write files with --out.

    Raises:
        TrioError: neither or both of bundle and --size, an option that does not go with them, or
            what measuring raises.
    """
    from trio_deploy.bench.joining import measure_rows
    from trio_deploy.bench.measure import BenchOptions, measure, sweep
    from trio_deploy.bench.table import to_text, write
    from trio_deploy.report.charts import bench_chart

    images = args.images or ([1, 2, 3, 4] if args.sweep else [1])
    if len(images) > 1 and not args.sweep:
        raise TrioError("several numbers of --images are a sweep: pass --sweep, or one number")
    if args.out is not None and not is_folder(args.out.absolute().parent):
        raise TrioError(f"--out cannot write {args.out}: there is no folder {args.out.parent}")
    limits = _limits(args)
    budgets = tuple(map(read_budget, args.budget or ()))
    options = BenchOptions(
        budgets=budgets or ((0.111, 0.222, 0.333) if args.sweep else (None,)),
        images=images[0],
        picture=args.picture,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        runs=args.runs,
        warm_up=args.warm_up,
        baselines=args.baselines,
        memory=not args.no_memory,
        runtime=runtime_options(args),
        checkpoint=args.checkpoint,
        genai_python=args.genai_python,
        llama_python=args.llama_python,
        llama_server=args.llama_server,
    )
    with contextlib.ExitStack() as stack:
        bundle, options = _subject(args, options, stack)
        if args.rows:
            measured = measure_rows(bundle, options, args.rows, limits.max_gap_ms)
        else:
            measured = sweep(bundle, options, images) if args.sweep else measure(bundle, options)
    result: dict[str, Any] = {"command": shown_command(args.arguments), **measured}
    if args.out is not None:
        write(result, args.out, None if args.rows else bench_chart(result))
    say(json.dumps(result, indent=2) if args.json else to_text(result))


def _limits(args: argparse.Namespace) -> BatcherLimits:
    """The bound on the gap.

    Raises:
        TrioError: it is out of range, or options do not go together.
    """
    from trio_deploy.pipeline.batcher.scheduler import BatcherLimits

    if args.max_gap_ms is not None and not args.rows:
        raise TrioError("--max-gap-ms belongs to --rows: name numbers of rows")
    if args.rows and (args.sweep or args.baselines):
        raise TrioError("--rows measures the bundle alone: leave out --sweep and --baselines")
    return BatcherLimits(**({} if args.max_gap_ms is None else {"max_gap_ms": args.max_gap_ms}))


def _subject(
    args: argparse.Namespace, options: BenchOptions, stack: contextlib.ExitStack
) -> tuple[Bundle, BenchOptions]:
    """The bundle to measure, exported first for --size, and the options for it."""
    from trio_deploy.bench.synthetic import RandomModel, make_bundle

    if (args.bundle is None) == (args.size is None):
        raise TrioError("pass either a bundle's folder, or --size for random weights")
    if args.size is None:
        made = {
            name: getattr(args, name)
            for name in ("schedule", "dtype", "dialect", "quantize", "cache")
        }
        if given := [f"--{name}" for name, value in made.items() if value]:
            raise TrioError(
                f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to --size: a bundle has "
                "its own"
            )
        options.check()
        return bundle_of(args, options.runtime, to_run=True, budgets=options.budgets), options
    folder = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model = RandomModel(args.size, args.schedule, args.dtype, args.dialect)
    budget = next(filter(None, options.budgets), None)
    bundle, checkpoint = make_bundle(model, folder, options.runtime, budget)
    others = {}
    for name in args.quantize or ():
        scheme, _, selections = name.partition(":")
        stored = replace(model, quantize=scheme, selections=selections or None)
        title = f"{scheme}, {selections} selections" if selections else scheme
        others[title] = make_bundle(stored, folder, options.runtime, budget)[0]
    checkpoint_folder = options.checkpoint or str(checkpoint)
    return bundle, replace(options, checkpoint=checkpoint_folder, others=others)


def shown_command(arguments: Sequence[str]) -> str:
    """The command line with only the last part of absolute paths: no folders of this machine."""

    def plain(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"

    return shlex.join(["trio", *map(plain, arguments)])
