"""A program in another Python environment that answers lines by JSON, and waits between them."""

from __future__ import annotations

import contextlib
import json
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

from trio_deploy.errors import TrioError

C = TypeVar("C", bound="Child")


def start_error(python: str, needed: str) -> str | None:
    """Why an interpreter does not run these imports; None if it does."""
    try:
        check = subprocess.run([python, "-I", "-c", needed], capture_output=True, text=True)
    except OSError as error:
        return f"{python} does not start ({error.strerror})"
    if not check.returncode:
        return None
    reason = check.stderr.strip().splitlines()[-1:] or ["no reason given"]
    return f"{Path(python).name} cannot import what it needs ({reason[0]})"


class Child:
    """The program's process inside `with`; `folder` is there as long."""

    def __init__(
        self,
        title: str,
        python: str,
        program: Path,
        arguments: Mapping[str, Any],
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """Start it.

        Args:
            title: what messages call it.
            arguments: its options, passed as one JSON object.
            environment: variables; None: those of this process.
        """
        self._title = title
        self._temporary = tempfile.TemporaryDirectory(prefix="trio-bench-")
        self.folder = Path(self._temporary.name)
        self._errors = self.folder / "errors"
        with self._errors.open("w", encoding="utf-8") as errors:
            self._process = subprocess.Popen(
                [python, "-I", str(program), json.dumps(arguments)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                env=None if environment is None else dict(environment),
            )

    def __enter__(self: C) -> C:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        assert self._process.stdin is not None
        if kind is not None:  # an answer that nobody waits for may take minutes
            self._process.kill()
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._temporary.cleanup()

    def ask(self, line: str) -> dict[str, Any]:
        """Answer to a line.

        Raises:
            TrioError: the process ended.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._process.stdin, flush=True)
            for answer in self._process.stdout:
                if answer.startswith("{"):  # other lines are the library's own messages
                    return dict(json.loads(answer))
        self._process.wait()
        errors = self._errors.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        raise TrioError(f"{self._title} ({(errors or ['no message'])[-1]})")
