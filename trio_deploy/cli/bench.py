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
from typing import Any

from trio_deploy.bench.measure import BenchOptions, measure, sweep
from trio_deploy.bench.synthetic import RandomModel, make_bundle
from trio_deploy.bench.table import to_text, write
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.report.charts import bench_chart


def run(args: argparse.Namespace) -> None:
    """Measure as the arguments say, print tables or JSON, and write files with --out.

    Raises:
        TrioError: neither or both of bundle and --size, an option that does not go with them, or
            what measuring raises.
    """
    images = args.images or ([1, 2, 3, 4] if args.sweep else [1])
    if len(images) > 1 and not args.sweep:
        raise TrioError("several numbers of --images are a sweep: pass --sweep, or one number")
    if args.out is not None and not args.out.absolute().parent.is_dir():
        raise TrioError(f"--out cannot write {args.out}: there is no folder {args.out.parent}")
    options = BenchOptions(
        budgets=tuple(args.budget or ([0.111, 0.222, 0.333] if args.sweep else [None])),
        images=images[0],
        picture=args.picture,
        text_tokens=args.text_tokens,
        new_tokens=args.new_tokens,
        runs=args.runs,
        warm_up=args.warm_up,
        baselines=args.baselines,
        memory=not args.no_memory,
        runtime=RuntimeOptions(
            args.runtime, args.target, args.provider, args.precision, args.threads
        ),
        checkpoint=args.checkpoint,
        genai_python=args.genai_python,
    )
    with contextlib.ExitStack() as stack:
        bundle, options = _subject(args, options, stack)
        measured = sweep(bundle, options, images) if args.sweep else measure(bundle, options)
    result: dict[str, Any] = {"command": shown_command(args.arguments), **measured}
    if args.out is not None:
        write(result, args.out, bench_chart(result))
    print(json.dumps(result, indent=2) if args.json else to_text(result))


def _subject(
    args: argparse.Namespace, options: BenchOptions, stack: contextlib.ExitStack
) -> tuple[Bundle, BenchOptions]:
    """The bundle to measure, exported first for --size, and the options for it."""
    if (args.bundle is None) == (args.size is None):
        raise TrioError("pass either a bundle's folder, or --size for random weights")
    if args.size is None:
        made = {name: getattr(args, name) for name in ("schedule", "dtype", "dialect", "cache")}
        if given := [f"--{name}" for name, value in made.items() if value]:
            raise TrioError(
                f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to --size: a bundle has "
                "its own"
            )
        return Bundle.load(args.bundle), options
    folder = args.cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
    model = RandomModel(args.size, args.schedule, args.dtype, args.dialect)
    budget = next(filter(None, options.budgets), None)
    bundle, checkpoint = make_bundle(model, folder, options.runtime, budget)
    return bundle, replace(options, checkpoint=options.checkpoint or str(checkpoint))


def shown_command(arguments: Sequence[str]) -> str:
    """The command line with only the last part of absolute paths: no folders of this machine."""

    def plain(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"

    return shlex.join(["trio", *map(plain, arguments)])
