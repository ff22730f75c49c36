"""`trio chat`: talk about pictures in the terminal."""

from __future__ import annotations

import argparse
import io
import json
import shlex
import sys
import tempfile
import urllib.parse
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_deploy.cli.options import (
    add_bundle,
    add_runtime_options,
    budget_of,
    bundle_of,
    runtime_options,
)
from trio_deploy.cli.terminal import say
from trio_deploy.errors import PromptTooLong, TrioError
from trio_deploy.files import is_file, nearest_name, write_atomically
from trio_deploy.schedule.budget import read_budget

if TYPE_CHECKING:
    from trio_deploy.pipeline.pipeline import Pipeline
    from trio_deploy.pipeline.request import Generation

SUMMARY = "Talk about pictures in the terminal."

_CACHE = 256 * 2**20  # bytes of what the vision tower made of pictures
COMMANDS = {
    "/image": "PATH or address of a picture for the next question; the path alone will do",
    "/budget": "share of visual tokens from now on, such as 0.222, or default",
    "/show": "draw which visual tokens the last answer kept, to a file",
    "/system": "TEXT: what the model is told first; starts again",
    "/reset": "start again, without pictures",
    "/save": "FILE: the conversation as JSON",
    "/help": "these lines",
    "/quit": "leave, as Ctrl-D does; Ctrl-C ends an answer",
}


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument("--budget", help="average share of visual tokens (default: the bundle's)")
    command.add_argument(
        "--system", default="", metavar="TEXT", help="what the model is told first"
    )
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=512,
        help="maximum number of tokens per answer (default: 512)",
    )
    add_runtime_options(command)


def run(args: argparse.Namespace) -> None:
    """Answer line after line, until there are no more."""
    from trio_deploy.pipeline.pipeline import Pipeline
    from trio_deploy.pipeline.request import Request

    options, budget = runtime_options(args), budget_of(args)
    Request("?", max_new_tokens=args.max_new_tokens, budget=budget).check()
    bundle = bundle_of(args, options, to_run=True, budgets=[budget])
    pipeline = Pipeline.open(bundle, options)
    pipeline.cache_features(_CACHE)
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    chat = Chat(pipeline, args.max_new_tokens, budget, args.system, dim=terminal)
    if terminal:
        say("ask, or name a picture; /help says what else there is")
    for line in _lines_of_terminal() if terminal else _lines_of_pipe():
        if not chat.take(line):
            return


@dataclass
class Chat:
    """A conversation; every answer is a prompt of its own, of all that was said.

    Attributes:
        system: what the model is told first; empty: nothing.
        dim: whether figures are printed dimmed.
        messages: in Hugging Face's format, without the system's.
        images: files of the pictures that they name.
        waiting: pictures for the next question.
        last: the last answer, if it was whole.
    """

    pipeline: Pipeline
    max_new_tokens: int = 512
    budget: float | None = None
    system: str = ""
    dim: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    images: list[bytes] = field(default_factory=list)
    waiting: list[bytes] = field(default_factory=list)
    last: Generation | None = None

    def take(self, line: str) -> bool:
        """Do what a line asks for; whether there is more to do. What fails is printed."""
        line = line.strip()
        try:
            if line.startswith("/") and not is_file(Path(line)):
                return self._command(line)
            if (path := picture_path(line)) is not None:
                self._image(path)
            elif line:
                self._ask(line)
        except PromptTooLong as error:
            say(f"trio: {error}, or start again with /reset")
        except TrioError as error:
            say(f"trio: {error}")
        return True

    def _command(self, line: str) -> bool:
        name, _, rest = line.partition(" ")
        if name == "/quit":
            return False
        does: dict[str, Callable[[str], None]] = {
            "/image": self._image,
            "/budget": self._set_budget,
            "/show": self._show,
            "/system": self._start_with,
            "/reset": self._reset,
            "/save": self._save,
            "/help": self._help,
        }
        if name not in does:
            raise TrioError(f"there is no command {name:.60}{nearest_name(name, COMMANDS)}")
        does[name](rest.strip())
        return True

    def _image(self, named: str) -> None:
        from trio_deploy.families.pixels import open_image

        content = _read_picture(named)
        width, height = open_image(content, named).size
        self.waiting.append(content)
        self._figures(f"a picture of {width} x {height}, for the next question")

    def _ask(self, question: str) -> None:
        from trio_deploy.pipeline.request import Request

        items = [{"type": "image"}] * len(self.waiting)
        asked = {"role": "user", "content": [*items, {"type": "text", "text": question}]}
        first = [{"role": "system", "content": self.system}] if self.system else []
        images = [*self.images, *self.waiting]
        request = Request(
            [*first, *self.messages, asked],
            images,
            max_new_tokens=self.max_new_tokens,
            budget=self.budget,
        )
        said = ""
        generation = None
        with self.pipeline.stream(request) as stream:
            try:
                for piece in stream:
                    said += piece
                    say(piece, end="", flush=True)
                generation = stream.generation
            except KeyboardInterrupt:  # the answer ends here, the program does not
                say(" …", end="")
            finally:
                say()
        self.messages += [asked, {"role": "assistant", "content": said}]
        self.images, self.waiting, self.last = images, [], generation
        if generation is not None:
            self._figures(_summary(generation))
            for warning in generation.warnings:
                self._figures(warning)

    def _set_budget(self, text: str) -> None:
        self.budget = None if text == "default" else read_budget(text)

    def _show(self, text: str) -> None:
        from trio_deploy.families.pixels import open_image
        from trio_deploy.pipeline.draw import draw_generation

        if self.last is None:
            raise TrioError("there is no whole answer to show: ask something first")
        images = [open_image(content) for content in self.images]
        drawn = io.BytesIO()
        draw_generation(replace(self.last, images=images)).save(drawn, "PNG")
        with tempfile.NamedTemporaryFile(prefix="trio-kept-", suffix=".png", delete=False) as file:
            file.write(drawn.getvalue())
        say(file.name)

    def _start_with(self, text: str) -> None:
        self._reset()
        self.system = text

    def _reset(self, text: str = "") -> None:
        self.messages, self.images, self.waiting, self.last = [], [], [], None

    def _save(self, named: str) -> None:
        if not named:
            raise TrioError("/save needs the name of a file")
        first = [{"role": "system", "content": self.system}] if self.system else []
        content = json.dumps([*first, *self.messages], indent=2, ensure_ascii=False)
        try:
            write_atomically(Path(named).expanduser(), content.encode(errors="replace"))
        except OSError as error:
            raise TrioError(f"cannot write {named}: {error.strerror or error}") from error

    def _help(self, text: str) -> None:
        for name, does in COMMANDS.items():
            say(f"{name:<9}{does}")

    def _figures(self, text: str) -> None:
        say(text, dim=self.dim)


def _summary(generation: Generation) -> str:
    kept = ", ".join(map(str, generation.keep_counts))
    parts = [f"kept {kept} of {generation.visual_tokens}"] if generation.visual_tokens else []
    parts.append(f"first token {generation.first_token_s:.2f} s")
    if generation.tokens_per_s:
        parts.append(f"{generation.tokens_per_s:.0f} tokens/s")
    if generation.finish_reason == "length":
        parts.append("cut by the length of answers or the context")
    return " · ".join(parts)


def picture_path(line: str) -> str | None:
    """The path of a line that is nothing but one, as terminals paste it: quoted, escaped, file://."""
    forms = [line]
    with suppress(ValueError):  # an apostrophe
        forms += words if len(words := shlex.split(line)) == 1 else []
    for form in forms:
        if form.startswith("file://"):
            form = urllib.parse.unquote(urllib.parse.urlsplit(form).path)
        if form and is_file(Path(form).expanduser()):
            return form
    return None


def _read_picture(named: str) -> bytes:
    from trio_deploy.pipeline.fetch import FetchLimits, fetch, is_address

    if is_address(named) and not named.startswith("file://"):
        return fetch(named, FetchLimits(public=True))
    path = picture_path(named)
    if path is None:
        raise TrioError(f"there is no picture {named!r:.200}: name a file or an address")
    try:
        return Path(path).expanduser().read_bytes()
    except OSError as error:
        raise TrioError(f"{path} cannot be read: {error.strerror or error}") from error


def _lines_of_pipe() -> Iterator[str]:
    yield from sys.stdin


def _lines_of_terminal() -> Iterator[str]:
    """Lines as they are typed; Ctrl-C gives up a line, Ctrl-D ends."""
    read = _reader()
    while True:
        try:
            yield read()
        except KeyboardInterrupt:
            say()
        except EOFError:
            return


def _reader() -> Callable[[], str]:
    """Reads a line with history and completion, where the package for it is installed."""
    try:
        import prompt_toolkit
        from prompt_toolkit.history import FileHistory
    except ModuleNotFoundError:
        return lambda: input("> ")
    import platformdirs

    history = platformdirs.user_state_path("trio-deploy", ensure_exists=True) / "chat_history"
    session: Any = prompt_toolkit.PromptSession(
        history=FileHistory(str(history)), completer=_completer(), key_bindings=_keys()
    )
    return lambda: str(session.prompt("> "))


def _completer() -> Any:
    """Completes commands, and paths behind those that take one."""
    from prompt_toolkit.completion import Completer, Completion, PathCompleter
    from prompt_toolkit.document import Document

    class Commands(Completer):
        """The words of COMMANDS."""

        def get_completions(self, document: Document, complete_event: Any) -> Iterator[Completion]:
            text = document.text_before_cursor
            name, space, rest = text.partition(" ")
            if not space and text.startswith("/"):
                yield from (Completion(each, -len(text)) for each in COMMANDS if text in each)
            elif name in ("/image", "/save"):
                paths = PathCompleter(expanduser=True)
                yield from paths.get_completions(Document(rest), complete_event)

    return Commands()


def _keys() -> Any:
    """Alt-Enter begins a new line."""
    from prompt_toolkit.key_binding import KeyBindings

    keys = KeyBindings()
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys
