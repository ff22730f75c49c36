"""Ends the server when a model's process dies.

Triton (2.51) neither restarts a python model whose process was killed, by the kernel for want of
memory above all, nor counts it as not ready: requests that it was answering wait for ever, new ones
fail one by one, and the server cannot shut down in order. So a second, tiny process watches the
model's. When that ends without having said goodbye, it says so in the server's log and ends the
server, which whatever runs the server (Kubernetes, systemd, docker --restart) starts again.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

_GOODBYE = b"finalized"
_REGION = "triton_python_backend_shm_region_"
_SHARED_MEMORY = Path("/dev/shm")


class Watch:
    """Watches this process from its creation until `close`."""

    def __init__(self, name: str) -> None:
        """Args:
        name: of the model, for the server's log.
        """
        # The watcher reads until this process closes the pipe, which the kernel does for the dead.
        self._process = subprocess.Popen(
            [sys.executable, "-m", __name__, name, str(os.getppid()), *_regions()],
            stdin=subprocess.PIPE,
            start_new_session=True,  # a Ctrl-C is for the server, which ends the model in order
        )

    def close(self) -> None:
        """This process is about to end because it was asked to."""
        with contextlib.suppress(OSError):
            self._process.communicate(_GOODBYE, timeout=5)


def _regions() -> list[str]:
    """Shared memory that the server made for this process: its name is among the arguments."""
    with contextlib.suppress(OSError):
        arguments = Path("/proc/self/cmdline").read_bytes().decode(errors="replace").split("\0")
        return [argument for argument in arguments if argument.startswith(_REGION)]
    return []


def _main(name: str, server: int, regions: list[str]) -> None:
    if sys.stdin.buffer.read() == _GOODBYE:
        return
    # Where the server died first, the model followed, and there is nobody left to end.
    with contextlib.suppress(OSError):
        os.kill(server, 0)
        print(
            f"trio: the process of {name} was killed (if not by you, most likely by the kernel for "
            "want of memory): ending the server, so that it can be started again",
            file=sys.stderr,
            flush=True,
        )
        os.kill(server, signal.SIGTERM)
    for region in regions:  # the server will not come to removing it
        (_SHARED_MEMORY / Path(region).name).unlink(missing_ok=True)


if __name__ == "__main__":
    _main(sys.argv[1], int(sys.argv[2]), sys.argv[3:])
