"""The command line: finds the command, runs it, and turns failures into one line and a status.

Each command is a file of this folder. Its options are declared without importing what it runs, so
that `trio --help` is quick and only `trio check` needs torch.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import trio_deploy
from trio_deploy.cli import (
    attach_weights,
    bench,
    build,
    check,
    export,
    inspect,
    plan,
    report,
    run,
    triton,
    tune,
)
from trio_deploy.cli import eval as evaluate
from trio_deploy.errors import TrioError

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

#: name → module with SUMMARY, add_arguments(parser) and run(args), in the order of the help.
_COMMANDS: dict[str, Any] = {
    "export": export,
    "attach-weights": attach_weights,
    "run": run,
    "build": build,
    "plan": plan,
    "check": check,
    "triton": triton,
    "eval": evaluate,
    "tune": tune,
    "bench": bench,
    "report": report,
    "inspect": inspect,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `trio`: run a command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return _execute(parser().parse_args(arguments, argparse.Namespace(arguments=arguments)))


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
    except OSError as error:  # no permission, a disk that fails: not foreseen by a command
        if args.debug:
            raise
        print(f"trio: {error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Prints errors as one line, since the usage of these commands would fill a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} (`{self.prog} --help` has the options)\n")


def export_main() -> int:
    """Entry point of `trio-export`, the same as `trio export`."""
    command = _Parser(prog="trio-export", description=export.SUMMARY)
    command.add_argument("--version", action="version", version=trio_deploy.__version__)
    _add(command, export)
    return _execute(command.parse_args())


def parser() -> argparse.ArgumentParser:
    """The command line with all commands and their options."""
    trio = _Parser(prog="trio", description="Token-pruned vision-language models as ONNX graphs.")
    trio.add_argument("--version", action="version", version=trio_deploy.__version__)
    commands = trio.add_subparsers(required=True, metavar="COMMAND")
    for name, module in _COMMANDS.items():
        _add(commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY), module)
    return trio


def _add(command: argparse.ArgumentParser, module: Any) -> None:
    command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    command.set_defaults(command=module.run)
    module.add_arguments(command)


if __name__ == "__main__":
    sys.exit(main())
