"""A Triton server on loopback for tests and measurements, started and ended by its own process id.

Needs what `scripts/setup_triton.sh` installs, and is imported by that environment's Python.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType

HOST = "127.0.0.1"
_SHARED = Path("/dev/shm")
PROGRAM = Path(sys.executable).parent / "tritonserver"


class TritonServer:
    """A context with a running server: `with TritonServer(repository, log) as server:`.

    Attributes:
        http_port, grpc_port, metrics_port: free ports, on 127.0.0.1 only.
        process: the server; processes of its python backend are its descendants.
    """

    def __init__(
        self,
        repository: Path,
        log: Path,
        arguments: Sequence[str] = (),
        *,
        wait_s: float | None = 180.0,
        program: Path = PROGRAM,
    ) -> None:
        """Choose ports and arguments.

        Args:
            wait_s: maximum seconds until the server is ready; None: do not wait.
        """
        self.log = log
        self._wait_s = wait_s
        self.http_port, self.grpc_port, self.metrics_port = _free_ports(3)
        self._command = [
            str(program),
            f"--model-repository={repository}",
            *(f"--{kind}-address={HOST}" for kind in ("http", "grpc", "metrics")),
            f"--http-port={self.http_port}",
            f"--grpc-port={self.grpc_port}",
            f"--metrics-port={self.metrics_port}",
            "--allow-gpu-metrics=false",
            "--metrics-interval-ms=200",
            *arguments,
        ]

    @property
    def http(self) -> str:
        """`host:port`"""
        return f"{HOST}:{self.http_port}"

    @property
    def grpc(self) -> str:
        """`host:port`"""
        return f"{HOST}:{self.grpc_port}"

    def __enter__(self) -> TritonServer:
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
        try:
            if self._wait_s is not None:
                self.wait_until_ready(self._wait_s)
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def wait_until_ready(self, timeout_s: float) -> None:
        """Wait for all models; RuntimeError with the end of the log if one is not ready in time."""
        deadline = time.monotonic() + timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"tritonserver ended ({self.process.returncode}):{self.tail()}")
            with contextlib.suppress(OSError):
                if self.get("/v2/health/ready")[0] == 200:
                    return
            time.sleep(0.1)
        raise RuntimeError(f"tritonserver was not ready after {timeout_s} s:{self.tail()}")

    def get(self, path: str, port: int | None = None) -> tuple[int, str]:
        """Status and body of an HTTP GET."""
        connection = http.client.HTTPConnection(HOST, port or self.http_port, timeout=10)
        try:
            connection.request("GET", path)
            response = connection.getresponse()
            return response.status, response.read().decode()
        finally:
            connection.close()

    def metrics(self) -> dict[str, float]:
        """Metrics of the endpoint: name with labels → value."""
        lines = self.get("/metrics", self.metrics_port)[1].splitlines()
        pairs = (line.rsplit(" ", 1) for line in lines if line and not line.startswith("#"))
        return {name: float(value) for name, value in pairs}

    def descendants(self) -> list[int]:
        """Process ids of the models' Python processes."""
        children: dict[int, list[int]] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError):
                    status = (entry / "stat").read_text()
                    parent = int(status.rpartition(")")[2].split()[1])
                    children.setdefault(parent, []).append(int(entry.name))
        found: list[int] = []
        waiting = [self.process.pid]
        while waiting:
            waiting += children.get(waiting.pop(), [])
            found = [pid for pid in dict.fromkeys([*found, *waiting]) if pid != self.process.pid]
        return found

    def shared_memory(self) -> list[Path]:
        """Files through which the server passes tensors to its models' processes."""
        arguments = []
        for pid in self.descendants():
            with contextlib.suppress(OSError):
                arguments += Path(f"/proc/{pid}/cmdline").read_text().split("\0")
        return [_SHARED / name for name in arguments if name.startswith("triton_python_backend_")]

    def memory_mib(self) -> float:
        """Resident memory of the server and its models' processes; shared pages count once."""
        total = 0
        for pid in [self.process.pid, *self.descendants()]:
            with contextlib.suppress(OSError):
                for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
                    if line.startswith("Pss:"):
                        total += int(line.split()[1])
        return total / 1024

    def stop(self, timeout_s: float = 45.0) -> int:
        """End the server with SIGTERM, so that it finishes its requests; kill it after `timeout_s`.

        Returns:
            Its exit status.
        """
        family, shared = self.descendants(), self.shared_memory()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            for pid in family:  # they would end by themselves, but later
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGKILL)
            for region in shared:
                region.unlink(missing_ok=True)
        return self.process.returncode

    def tail(self, lines: int = 25) -> str:
        """The end of the log."""
        text = self.log.read_text(errors="replace").splitlines()
        return "\n" + "\n".join(text[-lines:])


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    try:
        for each in sockets:
            each.bind((HOST, 0))
        return [each.getsockname()[1] for each in sockets]
    finally:
        for each in sockets:
            each.close()
