"""The command line: finds the command, runs it, and turns failures into one line and a status.

Each command is a file of this folder. Its options are declared without importing what it runs, so
that `trio --help` is quick and only `trio check` needs torch.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

import trio_deploy
from trio_deploy.cli import (
    attach_weights,
    bench,
    build,
    cache,
    chat,
    check,
    export,
    inspect,
    plan,
    report,
    run,
    serve,
    triton,
    tune,
)
from trio_deploy.cli import eval as evaluate
from trio_deploy.cli.signals import Stopped, raising_signals
from trio_deploy.cli.terminal import say
from trio_deploy.errors import TrioError
from trio_deploy.files import nearest_name

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
    "starlette": "serve",
    "uvicorn": "serve",
    "httptools": "serve",
    "llguidance": "serve",
}
_INTERRUPTED = 130  # 128 + SIGINT, as shells report it

#: name → module with SUMMARY, add_arguments(parser) and run(args), in the order of the help.
_COMMANDS: dict[str, Any] = {
    "export": export,
    "attach-weights": attach_weights,
    "run": run,
    "chat": chat,
    "build": build,
    "plan": plan,
    "check": check,
    "serve": serve,
    "triton": triton,
    "eval": evaluate,
    "tune": tune,
    "bench": bench,
    "report": report,
    "inspect": inspect,
    "cache": cache,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point of `trio`: run a command and return its exit status."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    return _execute(parser().parse_args(arguments, argparse.Namespace(arguments=arguments)))


def _execute(args: argparse.Namespace) -> int:
    try:
        command: Callable[[argparse.Namespace], int | None] = args.command
        with raising_signals():
            return command(args) or 0
    except TrioError as error:
        if args.debug:
            raise
        say(f"trio: {error}", file=sys.stderr)
        return 1
    except ModuleNotFoundError as error:
        if args.debug or error.name is None or error.name.split(".")[0] not in _EXTRAS:
            raise
        package = error.name.split(".")[0]
        say(
            f"trio: this needs the package {package}, which is not installed: "
            f"pip install 'trio-deploy[{_EXTRAS[package]}]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        if args.debug:
            raise
        say("trio: interrupted", file=sys.stderr)
        return _INTERRUPTED
    except Stopped as error:
        if args.debug:
            raise
        with contextlib.suppress(OSError):  # the terminal is gone
            say(f"trio: {error}", file=sys.stderr)
        return error.status
    except BrokenPipeError:  # `trio plan … | head`
        sys.stderr.close()
        return 1
    except MemoryError as error:  # outside of the stages of a model, which name themselves
        if args.debug:
            raise
        words = f" ({error})" if str(error) else ""
        say(
            "trio: out of memory: end other programs, or allow this process more" + words,
            file=sys.stderr,
        )
        return 1
    except OSError as error:  # no permission, a disk that fails: not foreseen by a command
        if args.debug:
            raise
        say(f"trio: {error}", file=sys.stderr)
        return 1


class _Parser(argparse.ArgumentParser):
    """Prints errors as one line, since the usage of these commands would fill a screen."""

    def error(self, message: str) -> NoReturn:
        self.exit(_USAGE, f"{self.prog}: {message} (`{self.prog} --help` has the options)\n")


class _Trio(_Parser):
    """Parses the command line, and itself refuses an unknown command, with the nearest one."""

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        given = sys.argv[1:] if args is None else list(args)
        name = next((each for each in given if not each.startswith("-")), None)
        if name is not None and name not in _COMMANDS:
            self.error(f"unknown command {name!r:.60}{nearest_name(name, _COMMANDS)}")
        return super().parse_known_args(given, namespace)


class _CommandParser(_Parser):
    """Parses a command: arguments and options in any order, and itself refuses unknown ones.

    argparse leaves what a subcommand does not know to the parser above it, which would name the
    wrong help, reports a missing option before the misspelt one, and gives arguments behind an
    option to nobody.
    """

    _mixing = False  # within parse_known_intermixed_args, which calls parse_known_args

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self._mixing:
            return super().parse_known_args(args, namespace)
        given = sys.argv[1:] if args is None else list(args)
        self._refuse_unknown_options(given)
        self._mixing = True
        try:
            found, unknown = self.parse_known_intermixed_args(given, namespace)
        finally:
            self._mixing = False
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}")
        return found, unknown

    def _refuse_unknown_options(self, given: Sequence[str]) -> None:
        known = self._option_string_actions  # unique beginnings of options stand for them
        for argument in itertools.takewhile(lambda each: each != "--", given):
            name = argument.partition("=")[0]
            option = name.startswith("--") and " " not in name  # as argparse tells them apart
            if option and not any(each.startswith(name) for each in known):
                self.error(f"unknown option {name}{nearest_name(name, known)}")


def export_main() -> int:
    """Entry point of `trio-export`, the same as `trio export`."""
    command = _CommandParser(prog="trio-export", description=export.SUMMARY)
    command.add_argument("--version", action="version", version=trio_deploy.__version__)
    _add(command, export)
    return _execute(command.parse_args())


def parser() -> argparse.ArgumentParser:
    """The command line with all commands and their options."""
    trio = _Trio(prog="trio", description="Token-pruned vision-language models as ONNX graphs.")
    trio.add_argument("--version", action="version", version=trio_deploy.__version__)
    commands = trio.add_subparsers(required=True, metavar="COMMAND", parser_class=_CommandParser)
    for name, module in _COMMANDS.items():
        _add(commands.add_parser(name, help=module.SUMMARY, description=module.SUMMARY), module)
    return trio


def _add(command: argparse.ArgumentParser, module: Any) -> None:
    command.add_argument("--debug", action="store_true", help="show tracebacks of errors")
    command.set_defaults(command=module.run)
    module.add_arguments(command)


if __name__ == "__main__":
    sys.exit(main())
