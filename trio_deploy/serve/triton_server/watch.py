"""Ends the server when a model's process dies.

Triton (2.51) neither restarts a python model whose process was killed, by the kernel for want of
memory above all, nor counts it as not ready: requests that it was answering wait for ever, new ones
fail one by one, and the server cannot shut down in order. So a second, tiny process watches the
model's. When that ends without having said goodbye, it says so in the server's log and ends the
server, which whatever runs the server (Kubernetes, systemd, docker --restart) starts again: by
SIGTERM, so that answers of other models may end, and a little later by SIGKILL. And should the
server itself be killed, it ends the model's process, which would live on otherwise.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

_GOODBYE = b"finalized"
_REGION = "triton_python_backend_shm_region_"
_SHARED_MEMORY = Path("/dev/shm")
_LOOK_S = 2.0  # between looks at whether the server is there
_GRACE_S = 5.0  # between asking the server to end and killing it


class Watch:
    """Watches this process from its creation until `close`."""

    def __init__(self, name: str) -> None:
        """Args:
        name: of the model, for the server's log.
        """
        # The watcher reads until this process closes the pipe, which the kernel does for the dead.
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", __name__),
                *(name, str(os.getppid()), str(os.getpid()), *_regions()),
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for the server, which ends the model in order
        )

    def close(self) -> None:
        """This process is about to end because it was asked to."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(_GOODBYE, timeout=5)


def _regions() -> list[str]:
    """Shared memory that the server made for this process: its name is among the arguments."""
    with contextlib.suppress(OSError):
        arguments = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
        return [argument for argument in arguments if argument.startswith(_REGION)]
    return []


def _main(name: str, server: int, model: int, regions: list[str]) -> None:
    while not select.select([sys.stdin], [], [], _LOOK_S)[0]:
        if not _runs(server):
            with contextlib.suppress(OSError):
                os.kill(model, signal.SIGKILL)
            break
    else:
        if sys.stdin.buffer.read() == _GOODBYE:
            return
        if _runs(server):
            print(
                f"trio: the process of {name} was killed (if not by you, most likely by the kernel "
                "for want of memory): ending the server, so that it can be started again",
                file=sys.stderr,
                flush=True,
            )
            _end(server)
    for region in regions:  # the server will not come to removing it
        (_SHARED_MEMORY / Path(region).name).unlink(missing_ok=True)


def _end(server: int) -> None:
    """With SIGTERM alone it would wait for the dead model's requests for all of its exit timeout.

    A container's first process cannot be killed from within it, and does wait.
    """
    with contextlib.suppress(OSError):  # it ends by itself
        os.kill(server, signal.SIGTERM)
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until:
            if not _runs(server):
                return
            time.sleep(0.1)
        os.kill(server, signal.SIGKILL)


def _runs(process: int) -> bool:
    """Whether a process is there, and more than a zombie that nobody has asked after."""
    try:
        return process_stat(process)[0] != b"Z"
    except OSError:
        return False


def process_stat(process: int) -> list[bytes]:
    """A process in proc(5), from its state on: parent at 1, start time at 19.

    Raises:
        OSError: there is none.
    """
    status = Path(f"/proc/{process}/stat").read_bytes()  # the program's name may be any bytes
    return status.rpartition(b")")[2].split()


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
