"""The commands: one function each, which hands its arguments to the room that does the work.

Rooms are imported when their command runs, so that `trio --help` is quick and nothing needs torch
but `trio check`.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import trio_deploy
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.options import add_eval, add_tune
from trio_deploy.schedule.methods import METHODS

_EXPORT_SUMMARY = "Turn a checkpoint into a bundle of pruned ONNX graphs."
_USAGE = 2  # as argparse has it
# The extra of this package that installs a package which some commands need.
_EXTRAS = {
    "onnx": "export",
    "onnx_ir": "export",
    "onnxscript": "export",
    "torch": "reference",
    "transformers": "reference",
    "safetensors": "reference",
    "polygraphy": "tensorrt",
}
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

_RUNTIME_HELP = "onnxruntime, openvino or tensorrt (default: by the bundle)"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `trio`: runs a command and returns its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return _execute(_parser().parse_args(arguments, argparse.Namespace(arguments=arguments)))


def _execute(args: argparse.Namespace) -> int:
    try:
        command: Callable[[argparse.Namespace], int | None] = args.command
        return command(args) or 0
    except TrioError as error:
        if args.debug:
            raise
        print(f"trio: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if args.debug or error.name is None or error.name.split(".")[0] not in _EXTRAS:
            raise
        package = error.name.split(".")[0]
        print(
            f"trio: this needs the package {package}, which is not installed: "
            f"pip install 'trio-deploy[{_EXTRAS[package]}]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        print("trio: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except BrokenPipeError:  # `trio plan … | head`
        sys.stderr.close()
        return 1
    except OSError as error:  # no permission, a disk that fails: whatever no room foresaw
        if args.debug:
            raise
        print(f"trio: {error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line; the usage of these commands would fill a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} (`{self.prog} --help` has the options)\n")


def export_main() -> int:
    """Entry point of `trio-export`, the same as `trio export`."""
    parser = _Parser(prog="trio-export", description=_EXPORT_SUMMARY)
    parser.add_argument("--version", action="version", version=trio_deploy.__version__)
    _add_common(parser, _export)
    _add_export(parser)
    return _execute(parser.parse_args())


def _export(args: argparse.Namespace) -> None:
    from trio_deploy.bundle.describe import inspect
    from trio_deploy.export.job import export_model

    bundle = export_model(
        args.model,
        args.out,
        budget=args.budget,
        schedule=args.schedule,
        method=args.method,
        dtype=args.dtype,
        dialect=args.dialect,
        target=args.target,
        link_weights=args.link_weights,
        graphs_only=args.graphs_only,
        force=args.force,
        positions=args.positions,
        probe=args.probe,
        threshold=args.threshold,
    )
    print(inspect(bundle, interface=False))


def _attach_weights(args: argparse.Namespace) -> None:
    from trio_deploy.bundle.describe import inspect
    from trio_deploy.export.attach import attach_weights

    print(inspect(attach_weights(args.bundle, args.checkpoint), interface=False))


def _inspect(args: argparse.Namespace) -> None:
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.bundle.describe import inspect

    bundle = Bundle.load(args.bundle, verify=args.verify)
    compared = sum(info.sha256 is not None for info in bundle.manifest.files.values())
    if args.verify:
        bundle.check_places()
    if args.verify and bundle.files_without_checksum and bundle.manifest.weights != "planned":
        print(
            f"trio: nothing to compare {', '.join(bundle.files_without_checksum)} with: no "
            "checksum of linked weights was recorded until now",
            file=sys.stderr,
        )
        bundle = bundle.record_checksums()
    if args.verify and bundle.manifest.weights == "planned":
        print(
            "trio: no weights are there to verify, the other files were: complete the bundle with "
            "`trio attach-weights`",
            file=sys.stderr,
        )
    print(inspect(bundle))
    if args.verify:
        print(f"verified   {compared} of {len(bundle.manifest.files)} files have their checksum")


def _plan(args: argparse.Namespace) -> None:
    from trio_deploy.cost.plan import plan

    planned = plan(
        args.model,
        budget=args.budget,
        schedule=args.schedule,
        method=args.method,
        visual_tokens=args.visual_tokens,
        text_tokens=args.text_tokens,
        probes=args.probes,
        target=args.target,
        dtype=args.dtype,
    )
    print(json.dumps(planned.to_json(), indent=2) if args.json else planned.to_text())


def _run(args: argparse.Namespace) -> None:
    from trio_deploy.cli.run import (
        EMPTY,
        check_picture_path,
        generation_json,
        generation_text,
        save_kept,
        unknown_remark,
    )
    from trio_deploy.pipeline.pipeline import Pipeline
    from trio_deploy.pipeline.request import Request

    if not args.prompt.strip():
        raise TrioError("--prompt has no text: write something to ask")
    if args.show is not None:
        if not args.image:
            raise TrioError("--show draws what was kept of an image: pass one with --image")
        check_picture_path(args.show)
    pipeline = Pipeline.open(
        args.bundle,
        runtime=args.runtime,
        threads=args.threads,
        low_memory=args.low_memory,
        provider=args.provider,
        target=args.target,
    )
    request = Request(
        args.prompt,
        args.image,
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature,
        top_p=args.top_p,
        seed=args.seed,
        stop=args.stop,
        budget=args.budget,
    )
    stream = pipeline.stream(request)
    for piece in stream:
        if not args.json:
            print(piece, end="", flush=True)
    generation = stream.generation
    if args.json:
        print(json.dumps(generation_json(generation), indent=2))
    else:
        said = "" if generation.text.strip() else EMPTY
        print(f"{said}\n\n{generation_text(generation)}")
    if unknown := pipeline.unknown_words(args.prompt):
        print(f"trio: {unknown_remark(unknown, pipeline.vocabulary)}", file=sys.stderr)
    if args.show is not None:
        save_kept(generation, args.show)


def _check(args: argparse.Namespace) -> int:
    from trio_deploy.verify import check as parity

    if args.record:
        parity.record(
            args.bundle,
            runtime=args.runtime,
            checkpoint=args.checkpoint,
            provider=args.provider,
        )
    report = parity.check(
        args.bundle,
        runtime=args.runtime,
        golden=args.golden,
        checkpoint=args.checkpoint,
        threads=args.threads,
        provider=args.provider,
        target=args.target,
    )
    print(json.dumps(report.to_json(), indent=2) if args.json else parity.format_report(report))
    return 0 if report.passed else 1


def _triton(args: argparse.Namespace) -> None:
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.serve.triton_server.repository import (
        Options,
        path_warning,
        read_settings,
        write_repository,
    )

    options = Options(
        runtime=args.runtime,
        target=args.target,
        device=args.device,
        instances=args.instances,
        stages=args.stages,
        name=args.name,
        settings=read_settings(args.settings, args.set),
        link=args.link,
    )
    models = write_repository(Bundle.load(args.bundle), args.out, options, force=args.force)
    print(f"{args.out}: {', '.join(models)}")
    if said := path_warning(args.out):
        print(f"trio: {said}", file=sys.stderr)
    print(f"serve it: tritonserver --model-repository {args.out}")


def _bench(args: argparse.Namespace) -> None:
    from trio_deploy.cli import bench

    bench.run(args)


def _build(args: argparse.Namespace) -> int:
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.config.target import list_targets
    from trio_deploy.runtimes.registry import load_target

    bundle = Bundle.load(args.bundle)
    name = bundle.manifest.target
    if not args.target and name not in list_targets():
        raise TrioError(
            f"{args.bundle} was exported for {name}, which is a target file of your own: pass it "
            f"again, --target {name}.yaml"
        )
    target = load_target(args.target or name)
    if args.dry_run:
        from trio_deploy.runtimes.tensorrt.dry_run.rules import dry_run

        if args.force:
            raise TrioError("--force builds engines again, and --dry-run builds none: drop one")
        report = dry_run(bundle, target, tensorrt=args.tensorrt, stages=args.stage or None)
        print(json.dumps(report.to_json(), indent=2) if args.json else report.to_text())
        return 0 if report.passed else 1
    if args.tensorrt is not None:
        raise TrioError("--tensorrt is for --dry-run: engines are built by what is installed")
    from trio_deploy.runtimes.tensorrt import bindings as adapter
    from trio_deploy.runtimes.tensorrt.build import build_engines, require_buildable
    from trio_deploy.runtimes.tensorrt.device import Device
    from trio_deploy.runtimes.tensorrt.first_run import run_once
    from trio_deploy.runtimes.tensorrt.gpu import this_gpu

    require_buildable(bundle, target, args.stage or None)
    tensorrt, device = adapter.load(), Device()
    outcome = build_engines(
        bundle,
        target,
        tensorrt,
        this_gpu(device),
        verify=lambda folder, stage: run_once(bundle, tensorrt, folder, stage),
        stages=args.stage or None,
        force=args.force,
        progress=not args.json,
    )
    print(json.dumps(outcome.to_json(), indent=2) if args.json else outcome.to_text())
    return 0


def _eval(args: argparse.Namespace) -> None:
    from trio_deploy.evaluation.command import run_eval

    results = run_eval(args)
    print(json.dumps(results.to_json(), indent=1) if args.json else results.to_text())


def _tune(args: argparse.Namespace) -> None:
    from trio_deploy.evaluation.command import run_tune, tuned_text

    print(tuned_text(run_tune(args)))


def _report(args: argparse.Namespace) -> None:
    from trio_deploy.report.report import Wanted, asked_about, write_report

    page = write_report(
        args.bundle,
        args.out,
        Wanted(
            bench=args.bench,
            evaluation=args.eval,
            asked=asked_about(args.image, args.prompt),
            check=not args.no_check,
            measure=not args.no_bench,
            scenes=args.scenes,
            runtime=args.runtime,
            provider=args.provider,
            threads=args.threads,
        ),
    )
    print(page)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="trio", description="Token-pruned vision-language models as ONNX graphs.")
    parser.add_argument("--version", action="version", version=trio_deploy.__version__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(
        name: str, function: Callable[[argparse.Namespace], int | None], summary: str
    ) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        _add_common(command, function)
        return command

    _add_export(add("export", _export, _EXPORT_SUMMARY))

    attach = add("attach-weights", _attach_weights, "Complete a bundle of graphs with weights.")
    attach.add_argument("bundle", type=Path, help="folder of the bundle")
    attach.add_argument("checkpoint", type=Path, help="checkpoint folder")

    run = add("run", _run, "Answer a prompt about pictures.")
    run.add_argument("bundle", type=Path, help="folder of the bundle")
    run.add_argument("--image", action="append", default=[], type=Path, help="may be repeated")
    run.add_argument("--prompt", required=True, help="what to ask about the pictures")
    run.add_argument("--budget", type=float, help="share of visual tokens (default: the bundle's)")
    run.add_argument("--show", type=Path, metavar="PNG", help="draw which visual tokens were kept")
    run.add_argument("--runtime", help=_RUNTIME_HELP)
    run.add_argument("--target", help="of which engines to take, where several were built")
    run.add_argument("--provider", help="of ONNX Runtime: cpu or cuda (default: by the bundle)")
    run.add_argument("--threads", type=int, help="CPU threads (default: the runtime's choice)")
    run.add_argument(
        "--low-memory", action="store_true", help="leave weights in the page cache (slower decode)"
    )
    run.add_argument("--max-new-tokens", type=int, default=128, help="default: 128")
    run.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default)")
    run.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        help="sample from the likeliest tokens of this total probability (default: 1, all)",
    )
    run.add_argument("--seed", type=int, help="of sampling (default: another each time)")
    run.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    run.add_argument("--json", action="store_true", help="print one JSON object instead")

    build = add("build", _build, "Build TensorRT engines of a bundle, on the device they run on.")
    build.add_argument("bundle", type=Path, help="folder of the bundle")
    build.add_argument("--target", help="target name or file (default: the bundle's)")
    build.add_argument(
        "--dry-run",
        action="store_true",
        help="check the graphs against TensorRT's operators and the target's limits; no GPU needed",
    )
    build.add_argument(
        "--tensorrt", metavar="VERSION", help="of --dry-run, as 8.6 or 10.3 (default: the target's)"
    )
    build.add_argument(
        "--stage", action="append", default=[], help="this engine (or graph) alone; may be repeated"
    )
    build.add_argument("--force", action="store_true", help="build engines again that are there")
    build.add_argument("--json", action="store_true", help="print one JSON object instead")

    plan = add("plan", _plan, "What a budget costs in tokens, operations and KV cache.")
    plan.add_argument("--model", required=True, help="recipe name or file, or checkpoint folder")
    _add_schedule(plan)
    plan.add_argument(
        "--visual-tokens",
        type=int,
        help="default: the most that one image takes, newlines not counted",
    )
    plan.add_argument("--text-tokens", type=int, default=60, help="default: 60, as in the paper")
    plan.add_argument("--target", help="name or file of a TensorRT target: does the model fit it?")
    plan.add_argument("--dtype", help="of the engines on --target (default: the target's)")
    plan.add_argument("--probes", type=int, default=4, help="probe positions (default: 4)")
    plan.add_argument("--json", action="store_true", help="print one JSON object instead")

    check = add("check", _check, "Compare a bundle with the reference, stage by stage.")
    check.add_argument("bundle", type=Path, help="folder of the bundle")
    check.add_argument("--runtime", help=_RUNTIME_HELP)
    check.add_argument("--target", help="of which engines to take, where several were built")
    check.add_argument("--provider", help="of ONNX Runtime: cpu or cuda (default: by the bundle)")
    source = check.add_mutually_exclusive_group()
    source.add_argument(
        "--record", action="store_true", help="store the reference's tensors in the bundle too"
    )
    source.add_argument(
        "--golden", action="store_true", help="compare with the stored tensors, without torch"
    )
    check.add_argument(
        "--checkpoint",
        type=Path,
        help="checkpoint folder for the reference, whose processor is compared too "
        "(default: the weights in the bundle)",
    )
    check.add_argument("--threads", type=int, help="CPU threads (default: the runtime's choice)")
    check.add_argument("--json", action="store_true", help="print one JSON object instead")

    triton = add("triton", _triton, "Write a model repository for the Triton Inference Server.")
    triton.add_argument("bundle", type=Path, help="folder of the bundle")
    triton.add_argument("--out", type=Path, required=True, help="folder to write the repository to")
    triton.add_argument("--runtime", help=_RUNTIME_HELP)
    triton.add_argument("--target", help="target name or file (default: the bundle's)")
    triton.add_argument("--device", default="cpu", help="cpu or gpu (default: cpu)")
    triton.add_argument(
        "--instances",
        type=int,
        default=1,
        help="processes that each load the model (default: 1, which answers many requests at once)",
    )
    triton.add_argument(
        "--stages",
        action="store_true",
        help="write each stage, and vision + embed, as models too (loads the weights once more)",
    )
    triton.add_argument(
        "--name", default="trio", help="prefix of the models' names (default: trio)"
    )
    triton.add_argument(
        "--settings", type=Path, metavar="YAML", help="file of limits and other settings"
    )
    triton.add_argument(
        "--set",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="one setting, such as max_tokens=512; may be repeated",
    )
    triton.add_argument(
        "--link", action="store_true", help="hard-link the bundle's files instead of copying"
    )
    triton.add_argument("--force", action="store_true", help="replace an existing repository")

    add_eval(add("eval", _eval, "Measure what pruning keeps of the answers, method by method."))
    add_tune(add("tune", _tune, "Search for the schedule that changes answers least; no labels."))

    _add_bench(add("bench", _bench, "Measure time and memory, against no pruning and others."))

    report = add("report", _report, "Write one HTML page about a bundle.")
    report.add_argument("bundle", type=Path, help="folder of the bundle")
    report.add_argument(
        "--out", type=Path, default=Path("report.html"), help="the page (default: report.html)"
    )
    report.add_argument(
        "--bench", type=Path, metavar="JSON", help="of `trio bench --out` (default: a quick one)"
    )
    report.add_argument(
        "--eval",
        type=Path,
        metavar="JSON",
        help="results.json of `trio eval` (default: a quick one)",
    )
    report.add_argument(
        "--image",
        action="append",
        default=[],
        type=Path,
        help="to show what is kept of; may be repeated (default: generated scenes)",
    )
    report.add_argument(
        "--prompt",
        action="append",
        default=[],
        help="asked about the --image at its place; one alone is asked about all of them, and "
        "several about one --image",
    )
    report.add_argument(
        "--scenes", type=int, default=10, help="asked for a quick accuracy (default: 10; 0: none)"
    )
    report.add_argument("--no-check", action="store_true", help="leave the reference out")
    report.add_argument("--no-bench", action="store_true", help="measure no time now")
    report.add_argument("--runtime", help=_RUNTIME_HELP)
    report.add_argument("--provider", help="of ONNX Runtime: cpu or cuda (default: by the bundle)")
    report.add_argument("--threads", type=int, help="CPU threads (default: the runtime's choice)")

    inspect = add("inspect", _inspect, "Show what a bundle holds.")
    inspect.add_argument("bundle", type=Path, help="folder of the bundle")
    inspect.add_argument(
        "--verify",
        action="store_true",
        help="check every file's sha256; linked weights get theirs recorded",
    )
    return parser


def _add_common(
    command: argparse.ArgumentParser, function: Callable[[argparse.Namespace], int | None]
) -> None:
    command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    command.set_defaults(command=function)


def _add_export(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--model", required=True, help="recipe name or file, checkpoint folder, or hub id"
    )
    command.add_argument("--out", type=Path, required=True, help="folder to write the bundle to")
    _add_schedule(command)
    command.add_argument("--dtype", help="float32, float16 or bfloat16 (default: the target's)")
    command.add_argument("--dialect", help="ort, onnx or primitive (default: the target's)")
    command.add_argument("--target", default="cpu", help="target name or file (default: cpu)")
    command.add_argument(
        "--link-weights", action="store_true", help="hard-link the weights instead of copying"
    )
    command.add_argument(
        "--graphs-only", action="store_true", help="write graphs without weights, from a recipe"
    )
    command.add_argument("--positions", help="renumber or original (default: the recipe's)")
    command.add_argument("--probe", help="last or shifted (default: the recipe's)")
    command.add_argument(
        "--threshold",
        type=float,
        help="cosine similarity that suppresses (default: the recipe's, else 0.8)",
    )
    command.add_argument("--force", action="store_true", help="replace an existing bundle")


def _add_bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("bundle", nargs="?", type=Path, help="folder of the bundle")
    bench.add_argument(
        "--size",
        help="random weights, not a bundle: d=1024,layers=16,vocab=32000, or a recipe's sizes",
    )
    bench.add_argument(
        "--budget",
        type=_list_of(float),
        help="shares of visual tokens, 0.111,0.333 (default: the bundle's, or 0.111; of a sweep "
        "0.111,0.222,0.333); no pruning is always measured too",
    )
    bench.add_argument("--schedule", help="of the bundle made for --size, as of `trio export`")
    bench.add_argument(
        "--images", type=_list_of(int), help="pictures in the prompt (default: 1; 1,2,3,4 --sweep)"
    )
    bench.add_argument(
        "--picture",
        type=_pixels,
        metavar="WxH",
        help="their size (default: the one with most visual tokens)",
    )
    bench.add_argument("--text-tokens", type=int, default=64, help="default: 64")
    bench.add_argument("--new-tokens", type=int, default=32, help="generated a run (default: 32)")
    bench.add_argument("--runs", type=int, default=5, help="measured (default: 5)")
    bench.add_argument("--warm-up", type=int, default=2, help="not measured (default: 2)")
    bench.add_argument(
        "--sweep", action="store_true", help="how cost grows: every budget at every --images"
    )
    bench.add_argument(
        "--baselines",
        type=_list_of(str, none="none"),
        help="of transformers, oracle, genai; or none (default: those that are installed)",
    )
    bench.add_argument("--genai-python", metavar="PATH", help="interpreter with openvino-genai")
    bench.add_argument("--checkpoint", metavar="DIR", help="a bundle's checkpoint, for genai")
    bench.add_argument("--no-memory", action="store_true", help="leave peak memory out")
    bench.add_argument("--runtime", help=_RUNTIME_HELP)
    bench.add_argument("--target", help="target name or file (default: by the bundle)")
    bench.add_argument("--provider", help="of ONNX Runtime: cpu or cuda (default: by the bundle)")
    bench.add_argument("--precision", help="of OpenVINO: float32 or bfloat16")
    bench.add_argument("--threads", type=int, help="CPU threads (default: the runtime's choice)")
    bench.add_argument("--dtype", help="of random weights (default: float32)")
    bench.add_argument("--dialect", help="of the bundle made for --size (default: the target's)")
    bench.add_argument("--cache", type=Path, help="where random weights stay for the next time")
    bench.add_argument(
        "--out", type=Path, metavar="NAME", help="write NAME.json, NAME.md and NAME.svg"
    )
    bench.add_argument("--json", action="store_true", help="print one JSON object instead")


def _list_of(kind: Callable[[str], Any], none: str | None = None) -> Callable[[str], list[Any]]:
    """Reads `1,2,3`; `none` stands for an empty list."""

    def read(text: str) -> list[Any]:
        return [] if text == none else [kind(part) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"  # what argparse calls it in an error
    return read


def _pixels(text: str) -> tuple[int, int]:
    """Reads `640x480`."""
    width, height = map(int, text.lower().split("x"))
    if min(width, height) < 1:
        raise ValueError
    return width, height


_pixels.__name__ = "WxH"


def _add_schedule(command: argparse.ArgumentParser) -> None:
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--budget", type=float, help="average share of visual tokens a layer sees (default: 0.111)"
    )
    choice.add_argument(
        "--schedule",
        help="layer:keep,… as ratios (1:0.16,10:0.094) or counts (1:92,10:54), each with :method "
        "if not trio (0:96:divprune,16:32); or the name of a schedule of the recipe's",
    )
    command.add_argument(
        "--method",
        help=f"what selects at pruning points that name no method: {', '.join(METHODS)}",
    )


if __name__ == "__main__":
    sys.exit(main())
