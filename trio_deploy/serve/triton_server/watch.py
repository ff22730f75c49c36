"""End the server when a model's process dies.

If the process of a python model is killed, most likely by the kernel because memory ran out, Triton
2.51 neither restarts it nor reports it as not ready: requests that it was answering never end, new
ones fail one by one, and the server cannot shut down in order. So a second, small process watches
the model's. If that ends without announcing it, the watcher says so in the server's log and ends
the server, for its supervisor (Kubernetes, systemd, docker --restart) to start it again: by
SIGTERM, so that answers of other models can end, and a little later by SIGKILL. If the server
itself is killed, the watcher ends the model's process, which would go on running otherwise.
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

_FINALIZED = b"finalized"
_REGION = "triton_python_backend_shm_region_"
_SHARED_MEMORY = Path("/dev/shm")
_POLL_S = 2.0  # between checks whether the server is running
_GRACE_S = 5.0  # between asking the server to end and killing it


class Watch:
    """Watches this process from its creation until `close`."""

    def __init__(self, name: str) -> None:
        """Args:
        name: name of the model, for the server's log.
        """
        # The watcher reads until the pipe is closed, which the kernel does when this process dies.
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-m", __name__),
                *(name, str(os.getppid()), str(os.getpid()), *_regions()),
            ],
            stdin=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for the server, which ends the model in order
        )

    def close(self) -> None:
        """Announce that this process is about to end in order."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            self._process.communicate(_FINALIZED, timeout=5)


def _regions() -> list[str]:
    """Shared memory that the server made for this process, by name from its arguments."""
    with contextlib.suppress(OSError):
        arguments = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
        return [argument for argument in arguments if argument.startswith(_REGION)]
    return []


def _main(name: str, server: int, model: int, regions: list[str]) -> None:
    while not select.select([sys.stdin], [], [], _POLL_S)[0]:
        if not _is_running(server):
            with contextlib.suppress(OSError):
                os.kill(model, signal.SIGKILL)
            break
    else:
        if sys.stdin.buffer.read() == _FINALIZED:
            return
        if _is_running(server):
            print(
                f"trio: the process of {name} was killed (if not by you, most likely by the kernel "
                "because memory ran out): ending the server, so that it can be started again",
                file=sys.stderr,
                flush=True,
            )
            _end(server)
    for region in regions:  # the server does not remove it any more
        (_SHARED_MEMORY / Path(region).name).unlink(missing_ok=True)


def _end(server: int) -> None:
    """End the server by SIGTERM, and by SIGKILL if that takes too long.

    It would wait for the dead model's requests during all of its exit timeout. A container's first
    process cannot be killed from within it, and does wait.
    """
    with contextlib.suppress(OSError):  # it has ended
        os.kill(server, signal.SIGTERM)
        until = time.monotonic() + _GRACE_S
        while time.monotonic() < until:
            if not _is_running(server):
                return
            time.sleep(0.1)
        os.kill(server, signal.SIGKILL)


def _is_running(process: int) -> bool:
    """Whether a process exists and is no zombie."""
    try:
        status = Path(f"/proc/{process}/stat").read_bytes()  # the program's name may have any bytes
    except OSError:
        return False
    return status.rpartition(b")")[2].split()[0] != b"Z"


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
