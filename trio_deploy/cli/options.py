"""Options that several commands share."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.registry import RUNTIMES, check_options
from trio_deploy.schedule.budget import read_budget
from trio_deploy.schedule.methods import METHODS

if TYPE_CHECKING:
    from trio_deploy.bundle.bundle import Bundle


def add_bundle(command: argparse.ArgumentParser, nargs: str | None = None) -> None:
    """The argument that names a bundle, or a model of which one is exported."""
    command.add_argument(
        "bundle",
        nargs=nargs,
        help="folder of a bundle; or a recipe, checkpoint folder or hub id, which is exported once "
        "into the cache (`trio cache`)",
    )


def bundle_of(
    args: argparse.Namespace,
    options: RuntimeOptions | None = None,
    *,
    to_run: bool = False,
    budgets: Sequence[float | None] = (),
    before_export: Callable[[], object] | None = None,
) -> Bundle:
    """Load the bundle of `add_bundle`, exported first where a model was named.

    Args:
        options: how it will be run, which decides what a model is exported for.
        to_run, budgets, before_export: as of `find_bundle`.

    Raises:
        TrioError: it is neither a bundle nor a model, or cannot be loaded, exported or run.
    """
    from trio_deploy.bundle.bundle import Bundle
    from trio_deploy.export.cache import find_bundle

    return Bundle.load(
        find_bundle(
            args.bundle, options, to_run=to_run, budgets=budgets, before_export=before_export
        )
    )


def add_model(command: argparse.ArgumentParser) -> None:
    """The argument that names a model, alone or as --model."""
    what = "name or file of a recipe, checkpoint folder, or hub id"
    command.add_argument("named", nargs="?", metavar="MODEL", help=what)
    command.add_argument("--model", help="the same as MODEL")


def model_of(args: argparse.Namespace) -> str:
    """The model of `add_model`.

    Raises:
        TrioError: none is named, or two are.
    """
    if (args.named is None) == (args.model is None):
        again = "" if args.model is None else ", and not twice"
        raise TrioError(
            f"name the model as MODEL or --model{again}: a recipe, checkpoint folder or hub id"
        )
    return str(args.model if args.named is None else args.named)


def add_chat_template(command: argparse.ArgumentParser) -> None:
    """Add the option for checkpoints without a chat template."""
    command.add_argument(
        "--chat-template",
        metavar="FILE",
        help="jinja2 file with the chat template (default: the checkpoint's), or none for a base "
        "model, which takes prompts as they are",
    )


def add_quantize(command: argparse.ArgumentParser) -> None:
    """Add the options for quantised weights."""
    command.add_argument(
        "--quantize",
        metavar="SCHEME",
        help="int8, int4, int4-g32, fp8 or nvfp4: how the decoder layers' matrices are stored "
        "(docs/quantisation.md), or none (default: the recipe's, else the target's, else none)",
    )
    command.add_argument(
        "--selections",
        metavar="TYPE",
        help="int8 or float: what selections compute with beside quantised weights; floats take "
        "more room, and less time on ONNX Runtime (default: the recipe's, else the target's, else "
        "int8)",
    )


def add_embeddings(command: argparse.ArgumentParser) -> None:
    """Add the option for the place of the table of embeddings."""
    command.add_argument(
        "--embeddings",
        metavar="PLACE",
        help="device or host: where the table of token embeddings is, in the graphs, or mapped on "
        "the host, which looks tokens up (default: the target's, else device)",
    )


def add_max_pixels(command: argparse.ArgumentParser) -> None:
    """Add the option for families whose pictures keep their sizes."""
    command.add_argument(
        "--max-pixels",
        type=int,
        metavar="N",
        help="most pixels that a picture is resized to, which bounds its visual tokens; for Qwen's "
        "models alone (default: the recipe's, else the checkpoint's)",
    )


def add_runtime_options(command: argparse.ArgumentParser) -> None:
    """Options for how bundles are run: the fields of `RuntimeOptions`."""
    *others, last = RUNTIMES
    group = command.add_argument_group("how to run")
    group.add_argument("--runtime", help=f"{', '.join(others)} or {last} (default: the target's)")
    group.add_argument(
        "--target",
        help="name or file of the target, whose runtime and engines are used (default: the "
        "bundle's, or the runtime's own for a bundle that the command exports)",
    )
    group.add_argument(
        "--provider", help="ONNX Runtime's execution provider: cpu or cuda (default: the target's)"
    )
    group.add_argument(
        "--precision",
        help="float type OpenVINO computes in: float32 or bfloat16 (default: the target's)",
    )
    group.add_argument(
        "--threads",
        type=int,
        help="CPU threads per operator (default: the runtime's choice, within the cores that the "
        "process may use)",
    )
    group.add_argument(
        "--low-memory",
        action="store_true",
        help="keep weights in the page cache alone: less memory, slower decode (ONNX Runtime)",
    )


def runtime_options(args: argparse.Namespace) -> RuntimeOptions:
    """Read the options of `add_runtime_options`, each into the field of its name.

    Raises:
        TrioError: a combination that cannot be had.
    """
    options = RuntimeOptions(
        **{each.name: getattr(args, each.name) for each in fields(RuntimeOptions)}
    )
    check_options(options)
    return options


def add_schedule(command: argparse.ArgumentParser) -> None:
    """Options for where, how much and by what method a model is pruned."""
    choice = command.add_mutually_exclusive_group()
    choice.add_argument(
        "--budget", help="average share of visual tokens per layer (default: 0.111)"
    )
    choice.add_argument(
        "--schedule",
        help="layer:keep,… with keep as a ratio (1:0.16,10:0.094) or a count (1:92,10:54), each "
        "with :method if not trio (0:96:divprune,16:32); or the name of one of the recipe's "
        "schedules; or a file that `trio tune` wrote",
    )
    command.add_argument(
        "--method",
        help="method of pruning points that name none (default: trio): " + ", ".join(METHODS),
    )


def budget_of(args: argparse.Namespace) -> float | None:
    """Read --budget; None where it is not given.

    Raises:
        TrioError: it is no share.
    """
    return None if args.budget is None else read_budget(args.budget)


def list_of(kind: Callable[[str], Any], none: str | None = None) -> Callable[[str], list[Any]]:
    """A reader of `1,2,3`; the text `none` stands for an empty list."""

    def read(text: str) -> list[Any]:
        return [] if text == none else [kind(part) for part in text.split(",")]

    read.__name__ = f"comma-separated {kind.__name__}"  # argparse's name for it in an error
    return read


def pixels(text: str) -> tuple[int, int]:
    """(width, height) of `640x480`."""
    width, height = map(int, text.lower().split("x"))
    if min(width, height) < 1:
        raise ValueError
    return width, height


pixels.__name__ = "WxH"
