"""`trio build`: build engines of a bundle, on the device, or ahead of time for RTX cards."""

from __future__ import annotations

import argparse
import json
from functools import partial
from typing import TYPE_CHECKING

from trio_deploy.cli.options import add_bundle, bundle_of
from trio_deploy.cli.terminal import say
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError

if TYPE_CHECKING:
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.config.target import Target
    from trio_deploy.runtimes.tensorrt.memory import Fit

SUMMARY = "Build TensorRT engines of a bundle: on the device, or ahead of time for RTX cards."


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument("--target", help="name or file of the target (default: the bundle's)")
    command.add_argument(
        "--dry-run",
        action="store_true",
        help="check the graphs against TensorRT's operators, and the target's limits and memory; "
        "needs no GPU",
    )
    command.add_argument(
        "--tensorrt",
        metavar="VERSION",
        help="with --dry-run: version to check for, such as 10.3 (default: the target's)",
    )
    command.add_argument(
        "--stage",
        action="append",
        default=[],
        help="build or check only this stage; may be repeated (default: all)",
    )
    command.add_argument("--force", action="store_true", help="rebuild engines that exist")
    command.add_argument(
        "--allow-oversized",
        action="store_true",
        help="go on although weights and KV cache exceed the target's memory",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object instead")


def run(args: argparse.Namespace) -> int:
    """Build engines, or check whether they can be built; 1 if they cannot."""
    from trio_deploy.export.cache import is_bundle

    if args.dry_run and args.force:
        raise TrioError("--force rebuilds engines, and --dry-run builds none: drop one")
    if args.tensorrt is not None and not args.dry_run:
        raise TrioError("--tensorrt is for --dry-run: engines are built by what is installed")
    if not is_bundle(args.bundle):
        _require_useful_export(args)
    bundle = bundle_of(
        args, RuntimeOptions(target=args.target), before_export=partial(_require_planned, args)
    )
    target = _target(bundle, args)
    if args.dry_run:
        return _dry_run(bundle, target, args)
    _build(bundle, target, args)
    return 0


def _require_useful_export(args: argparse.Namespace) -> None:
    """Check, before a model is exported for engines, that they can be built here.

    Raises:
        TrioError: the target has another runtime, or TensorRT or its driver is missing.
    """
    from trio_deploy.runtimes.registry import default_target, load_target
    from trio_deploy.runtimes.tensorrt import bindings
    from trio_deploy.runtimes.tensorrt.target import require_engines

    remedy = f"name one, such as `trio build {args.bundle} --target l4`"
    library = require_engines(load_target(args.target or default_target()), remedy)
    if not args.dry_run:
        bindings.load(library.flavour)


def _require_planned(args: argparse.Namespace) -> None:
    """Check stages and memory by the graphs that an export would write, before it is made.

    Raises:
        TrioError: there is no such stage, or engines would be built that the device cannot hold.
    """
    if not args.stage and (args.dry_run or args.allow_oversized):
        return
    from trio_deploy.cost.plan import HostMemory, plan

    fit = plan(args.bundle, target=args.target, progress=not args.json).fit
    if fit is None or isinstance(fit, HostMemory):
        return
    stages = fit.layouts[0].kinds
    for stage in args.stage:
        if stage not in stages:
            raise TrioError(
                f"{args.bundle} has no stage {stage!r}: name one of {', '.join(stages)}"
            )
    if not args.dry_run:
        _refuse_oversized(fit, args)


def _target(bundle: Bundle, args: argparse.Namespace) -> Target:
    from trio_deploy.config.target import list_targets
    from trio_deploy.runtimes.registry import load_target

    name = bundle.manifest.target
    if not args.target and name not in list_targets():
        raise TrioError(
            f"{args.bundle} was exported for {name}, which is a target file of your own: pass it "
            f"again, --target {name}.yaml"
        )
    return load_target(args.target or name)


def _dry_run(bundle: Bundle, target: Target, args: argparse.Namespace) -> int:
    from trio_deploy.runtimes.tensorrt.dry_run.rules import dry_run
    from trio_deploy.runtimes.tensorrt.memory import bundle_fit

    report = dry_run(bundle, target, tensorrt=args.tensorrt, stages=args.stage or None)
    memory = None if args.stage else bundle_fit(bundle, target)  # all stages are loaded together
    if args.json:
        more = {} if memory is None else {"memory": memory.to_json()}
        say(json.dumps({**report.to_json(), **more}, indent=2))
    else:
        say(report.to_text())
        if memory is not None:
            say(f"memory: {memory.verdict}")
    oversized = memory is not None and memory.oversized and not args.allow_oversized
    return 0 if report.passed and not oversized else 1


def _refuse_oversized(memory: Fit, args: argparse.Namespace) -> None:
    """Raises TrioError where engines would be built that the device cannot hold."""
    if memory.oversized and not (args.allow_oversized or args.stage):
        raise TrioError(
            f"{args.bundle} {memory.verdict} (--allow-oversized builds it nevertheless)"
        )


def _build(bundle: Bundle, target: Target, args: argparse.Namespace) -> None:
    from trio_deploy.runtimes.tensorrt import bindings
    from trio_deploy.runtimes.tensorrt.build import build_engines, require_buildable
    from trio_deploy.runtimes.tensorrt.compiling import ChildCompiler
    from trio_deploy.runtimes.tensorrt.device import Device
    from trio_deploy.runtimes.tensorrt.first_run import run_once
    from trio_deploy.runtimes.tensorrt.gpu import this_gpu
    from trio_deploy.runtimes.tensorrt.memory import bundle_fit
    from trio_deploy.runtimes.tensorrt.target import require_engines

    require_buildable(bundle, target, args.stage or None)
    if not args.stage:  # all stages are loaded together
        _refuse_oversized(bundle_fit(bundle, target), args)
    tensorrt = bindings.load(require_engines(target).flavour)
    ahead = tensorrt.compiles_ahead
    outcome = build_engines(
        bundle,
        target,
        ChildCompiler(tensorrt.version),
        None if ahead else this_gpu(Device()),
        verify=None if ahead else lambda folder, stage: run_once(bundle, tensorrt, folder, stage),
        stages=args.stage or None,
        force=args.force,
        progress=not args.json,
    )
    say(json.dumps(outcome.to_json(), indent=2) if args.json else outcome.to_text())
