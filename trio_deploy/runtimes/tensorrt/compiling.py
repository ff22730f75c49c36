"""Build one engine in a process of its own, whose death is reported as that build's failure.

TensorRT may end its process (a crash in the compiler, the kernel's out-of-memory killer), and keeps
memory of one build until the process ends. The child reads a `Job` from stdin and writes messages
to stdout, one JSON object per line; what TensorRT itself prints goes to stderr.
"""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import msgspec

from trio_deploy.errors import TrioError
from trio_deploy.files import write_atomically
from trio_deploy.runtimes.tensorrt.bindings import BuildOptions, Log, Progress, TensorRT, load
from trio_deploy.runtimes.tensorrt.profiles import Profile


class Job(msgspec.Struct, frozen=True, kw_only=True):
    """One engine to build.

    Attributes:
        graph: file of the ONNX graph.
        plan: file that the engine is written to, whole; "": it is discarded.
        profiles: in the engine's order.
        options: how it is built.
        timing_cache: file that is read if it exists, and rewritten; "": none.
        flavour: the bindings that build it, of `bindings.MODULES`.
        verbose: whether `VERBOSE` messages, hundreds of megabytes for a large graph, are passed on.
    """

    graph: str
    plan: str = ""
    profiles: tuple[Profile, ...]
    options: BuildOptions = BuildOptions()
    timing_cache: str = ""
    flavour: str = "tensorrt"
    verbose: bool = False


class Compiled(msgspec.Struct, frozen=True, tag=True):
    """A finished build.

    Attributes:
        version: TensorRT's.
        plan_bytes: size of the engine.
        seconds: duration of the build.
        peak_bytes: largest resident memory of the process that built it.
    """

    version: str
    plan_bytes: int
    seconds: float
    peak_bytes: int


class _Said(msgspec.Struct, frozen=True, tag=True):
    severity: str
    message: str


class _Progressed(msgspec.Struct, frozen=True, tag=True):
    phase: str
    done: int
    steps: int


class _Failed(msgspec.Struct, frozen=True, tag=True):
    error: str


_Message = _Said | _Progressed | _Failed | Compiled


def compile_here(tensorrt: TensorRT, job: Job, log: Log, progress: Progress) -> Compiled:
    """Build an engine in this process.

    Raises:
        TrioError: it cannot be built, or its file cannot be written.
    """
    cache = Path(job.timing_cache) if job.timing_cache else None
    start = time.monotonic()
    built = tensorrt.build(
        Path(job.graph),
        job.profiles,
        job.options,
        timing_cache=cache.read_bytes() if cache is not None and cache.is_file() else b"",
        log=log,
        progress=progress,
    )
    seconds = time.monotonic() - start
    if job.plan:
        write_atomically(Path(job.plan), built.plan)
    if cache is not None and built.timing_cache:
        try:
            write_atomically(cache, built.timing_cache)
        except TrioError as error:  # only the next build would use it
            log("WARNING", str(error))
    return Compiled(tensorrt.version, len(built.plan), seconds, _peak_bytes())


def compile_in_child(job: Job, log: Log, progress: Progress) -> Compiled:
    """Build an engine in a process of its own, which ends with this call.

    Raises:
        TrioError: it cannot be built, its file cannot be written, or the process died.
    """
    name = Path(job.graph).name
    command = [sys.executable, "-m", __name__]
    with tempfile.TemporaryFile() as printed:
        child = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=printed
        )
        assert child.stdin is not None and child.stdout is not None
        try:
            with suppress(BrokenPipeError), child.stdin as stdin:  # its death is reported below
                stdin.write(msgspec.json.encode(job))
            for message in _messages(child.stdout):
                if isinstance(message, _Said):
                    log(message.severity, message.message)
                elif isinstance(message, _Progressed):
                    progress(message.phase, message.done, message.steps)
                elif isinstance(message, _Failed):
                    raise TrioError(message.error)
                else:
                    return message
            status = child.wait()
        finally:
            child.kill()  # after an exception here, too: it may be an interrupt
            child.wait()
            child.stdout.close()
        raise TrioError(f"{name}: {_how_it_ended(status)}{_last_line(printed)}")


@dataclass(frozen=True)
class ChildCompiler:
    """Builds by the TensorRT of a version, each in a process of its own."""

    version: str

    def compile(self, job: Job, log: Log, progress: Progress) -> Compiled:
        """Build an engine; see `compile_in_child`."""
        return compile_in_child(job, log, progress)


def _messages(lines: IO[bytes]) -> Iterator[_Message]:
    decoder = msgspec.json.Decoder(_Message)
    for line in lines:
        with suppress(msgspec.DecodeError):  # half of a line, where the process died
            yield decoder.decode(line)


def _how_it_ended(status: int) -> str:
    if status >= 0:
        return f"the process that builds the engine ended with status {status}"
    try:
        by = signal.Signals(-status).name
    except ValueError:
        by = f"signal {-status}"
    ended = f"the process that builds the engine was ended by {by}"
    if by == "SIGKILL":
        return f"{ended}, such as by the kernel for lack of memory: end other programs"
    return f"{ended}, which is a fault in TensorRT or its driver"


def _last_line(printed: IO[bytes]) -> str:
    """What the child printed last, for the end of a message; "" for nothing."""
    size = printed.seek(0, os.SEEK_END)
    printed.seek(max(0, size - 4096))
    lines = printed.read().decode(errors="replace").split("\n")
    last = next((line.strip() for line in reversed(lines) if line.strip()), "")
    return f" ({last})" if last else ""


def _peak_bytes() -> int:
    """Largest resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    """Build what stdin asks for, as the child of `compile_in_child`."""
    out = os.fdopen(os.dup(1), "wb", buffering=0)
    os.dup2(2, 1)  # what TensorRT prints

    def tell(message: _Message) -> None:
        out.write(msgspec.json.encode(message) + b"\n")

    def say(severity: str, message: str) -> None:
        if job.verbose or severity != "VERBOSE":
            tell(_Said(severity, message))

    job = msgspec.json.decode(sys.stdin.buffer.read(), type=Job)
    try:
        done = compile_here(load(job.flavour), job, say, lambda *told: tell(_Progressed(*told)))
    except TrioError as error:
        tell(_Failed(str(error)))
    else:
        tell(done)


if __name__ == "__main__":
    main()
