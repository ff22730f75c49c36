"""Requests from `trio_vlm_complete` to `trio_vlm`: two processes of one server.

Triton lets a model call another one ("business logic scripting"), but version 2.51 does not support
calls from several threads: one of its own threads releases Python objects without the interpreter's
lock, which crashes the process with a corrupted heap after some thousand requests. So the two
processes use a Unix socket. Its name is abstract, so that no file is left behind; other users and
other containers of a network namespace can connect to such a name, so each side checks that the
other one is a process of the same user and of the same server.

A connection carries one request: the caller sends it, gets an acknowledgement, and gets one reply.
If the caller disconnects before that, the request is cancelled. A message is a JSON object and the
bytes of its arrays: nothing in it is executed.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import math
import os
import secrets
import socket
import struct
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy.serve.triton_server.sender import Sender
from trio_deploy.serve.triton_server.watch import process_stat

_LOG = logging.getLogger(__name__)
_CREDENTIALS = struct.Struct("3i")  # process, user, group: struct ucred of unix(7)
_TIMEVAL = struct.Struct("ll")
_LISTENS = b"%08X" % (1 << 16)  # __SO_ACCEPTCON, as /proc/net/unix writes flags
_BACKLOG = 128  # connections that may wait to be accepted
_RECEIVERS = 4  # threads that receive requests
_TIMEOUT_S = 10.0  # for the other side's next step
_POLL_S = 0.05  # between checks whether a request was cancelled
_LOOKUP_S = 1.0  # for which the found instances of a model are reused


@dataclass(frozen=True)
class InferRequest:
    """A request of Triton's.

    Attributes:
        tensors: inputs by name, strings as bytes in an object array.
        parameters: its parameters as JSON.
        timeout_us: its timeout, microseconds; 0: none.
    """

    tensors: Mapping[str, np.ndarray]
    parameters: str
    timeout_us: int


@dataclass(frozen=True)
class Reply:
    """The outputs of a whole answer by name, or else an error and the name of its code."""

    outputs: Mapping[str, np.ndarray]
    error: str = ""
    code: str = ""


class LocalServer:
    """Receives requests for one instance of a model until `close`."""

    def __init__(self, model: str, take: Callable[[Sender, InferRequest], None]) -> None:
        """Args:
        model: name of the model; instances of the same name share its requests.
        take: called with each request, from one of a few threads; must not wait for the answer.

        Raises:
            OSError: no socket can be opened, or no thread started.
        """
        self._take = take
        self._closing = threading.Event()
        self._socket = _listen(model)
        self._threads = [
            threading.Thread(target=self._serve, name="trio-local", daemon=True)
            for _ in range(_RECEIVERS)
        ]
        for thread in self._threads:
            thread.start()

    def close(self) -> None:
        """Receive no more requests; those received still get their replies."""
        self._closing.set()
        with contextlib.suppress(OSError):  # it is closed already
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the threads
        for thread in self._threads:
            thread.join(_TIMEOUT_S)
        self._socket.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                self._receive(Connection(self._socket.accept()[0].detach()))
            except Exception as error:  # such as too many open files: the thread must go on
                if not self._closing.wait(1.0):
                    _LOG.error("a request could not be received: %r", error)

    def _receive(self, connection: Connection) -> None:
        sender = _LocalSender(connection)
        try:
            _prepare(connection)
            if not connection.poll(_TIMEOUT_S):
                raise EOFError
            given, tensors = _read(connection)
            _write(connection, {"taken": True})
        except (EOFError, OSError, ValueError, KeyError):  # disconnected, or not of this protocol
            connection.close()
            return
        try:
            self._take(sender, InferRequest(tensors, given["parameters"], given["timeout_us"]))
        except Exception as error:
            _LOG.exception("a request failed")
            sender.fail(f"internal error: {error!r:.200}", "INTERNAL")


class LocalClient:
    """Sends requests to the instances of a model in turn, from any thread."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._turns = itertools.count()
        self._known: list[bytes] = []
        self._known_until = -math.inf

    def infer(
        self,
        request: InferRequest,
        is_cancelled: Callable[[], bool],
        timeout_s: float = math.inf,
    ) -> Reply:
        """Send a request and wait for its reply.

        Args:
            is_cancelled: polled until there is a reply; once it is true, that is the reply.
            timeout_s: seconds to wait at most.

        Raises:
            OSError, EOFError: no instance takes it, the instance ended, or the time is over.
        """
        until = time.monotonic() + timeout_s
        with self._connect() as connection:  # disconnecting cancels
            given = {"parameters": request.parameters, "timeout_us": request.timeout_us}
            _write(connection, given, request.tensors)
            if not connection.poll(_TIMEOUT_S):
                raise TimeoutError(f"it received no request within {_TIMEOUT_S:g} s")
            _read(connection)
            while not connection.poll(_POLL_S):
                if is_cancelled():
                    return Reply({}, "the request was cancelled", "CANCELLED")
                if time.monotonic() > until:
                    raise TimeoutError("it gave no answer in time")
            said, outputs = _read(connection)
            return Reply(outputs, said["error"], said["code"])

    def _connect(self) -> Connection:
        turn = next(self._turns)
        for look_again in (False, True):
            if look_again or time.monotonic() > self._known_until:
                self._known = _instances(self._model)
                self._known_until = time.monotonic() + _LOOKUP_S
            known = self._known
            for number in range(len(known)):
                with contextlib.suppress(OSError):  # it has ended, or is another process
                    return _connect(known[(turn + number) % len(known)])
        raise ConnectionRefusedError(f"no instance of {self._model} is running")


class _LocalSender:
    """Sends the last response as the reply, and no others."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._lock = threading.Lock()

    def send(self, outputs: Mapping[str, np.ndarray], *, last: bool) -> None:
        if last:
            self._reply(Reply(outputs))

    def fail(self, text: str, code: str) -> None:
        self._reply(Reply({}, text, code))

    def is_cancelled(self) -> bool:
        with self._lock:
            # There is nothing to read but the end, since the caller sends one message only.
            return not self._connection.closed and self._connection.poll()

    def _reply(self, reply: Reply) -> None:
        with self._lock:
            if not self._connection.closed:
                with contextlib.suppress(OSError), self._connection:  # the caller may be gone
                    said = {"error": reply.error, "code": reply.code}
                    _write(self._connection, said, reply.outputs)


def _listen(model: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(_prefix(model) + secrets.token_hex(8).encode())
        listening.listen(_BACKLOG)
    except BaseException:
        listening.close()
        raise
    return listening


def _connect(name: bytes) -> Connection:
    connecting = socket.socket(socket.AF_UNIX)
    try:
        _set_timeouts(connecting)  # for a server whose backlog is full, too
        connecting.connect(name)
    except BaseException:
        connecting.close()
        raise
    connection = Connection(connecting.detach())
    try:
        _prepare(connection)
    except BaseException:
        connection.close()
        raise
    return connection


def _instances(model: str) -> list[bytes]:
    """Names of the sockets on which a model's instances listen."""
    prefix = b"@" + _prefix(model)[1:]
    found = []
    for line in Path("/proc/net/unix").read_bytes().splitlines():
        words = line.split(None, 7)  # a name may be any bytes
        # Connections have their listener's name, too, and may outlive it.
        if len(words) == 8 and words[3] == _LISTENS and words[7].startswith(prefix):
            found.append(b"\0" + words[7][1:])
    return sorted(found)


def _prefix(model: str) -> bytes:
    """Prefix of the names of a model's sockets; differs between the servers of a machine."""
    server = os.getppid()
    digest = hashlib.sha256(
        f"{server} {int(process_stat(server)[19])} {model}".encode()
    ).hexdigest()
    return f"\0trio-{digest[:32]}-".encode()


def _prepare(connection: Connection) -> None:
    """Check the other side, and set timeouts so that nothing waits for it for ever.

    Raises:
        PermissionError: it is not one of this server's processes.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(data)
        # A process of another container has no number here: 0.
        if user != os.geteuid() or not process or int(process_stat(process)[1]) != os.getppid():
            raise PermissionError(
                "the other side of a local connection is not one of this server's processes"
            )
        _set_timeouts(peer)


def _set_timeouts(connection: socket.socket) -> None:
    """Make a message or a connection that gets stuck fail with BlockingIOError."""
    timeout = _TIMEVAL.pack(int(_TIMEOUT_S), int(_TIMEOUT_S % 1 * 1e6))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, timeout)


def _write(
    connection: Connection,
    fields: Mapping[str, Any],
    arrays: Mapping[str, np.ndarray] | None = None,
) -> None:
    described, contents = [], []
    for name, array in (arrays or {}).items():
        sizes = None
        if array.dtype == np.object_:  # strings, as Triton gives them
            sizes = [len(item) for item in array.ravel()]
            contents.append(b"".join(array.ravel()))
        else:
            contents.append(array.tobytes())
        kind = None if sizes is not None else array.dtype.str
        described.append({"name": name, "shape": array.shape, "kind": kind, "sizes": sizes})
    connection.send_bytes(json.dumps({"fields": fields, "arrays": described}).encode())
    for content in contents:
        connection.send_bytes(content)


def _read(connection: Connection) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Read fields and arrays of a message; raises ValueError or KeyError if it is malformed."""
    message = json.loads(connection.recv_bytes())
    arrays = {}
    for entry in message["arrays"]:
        content = connection.recv_bytes()
        if entry["sizes"] is None:
            kind = np.dtype(entry["kind"])
            if kind.hasobject:
                raise ValueError("arrays of objects are not accepted")
            array = np.frombuffer(content, kind)
        else:
            ends = [0, *itertools.accumulate(entry["sizes"])]
            array = np.empty(len(entry["sizes"]), np.object_)
            array[:] = [content[start:end] for start, end in itertools.pairwise(ends)]
        arrays[entry["name"]] = array.reshape(entry["shape"])
    return message["fields"], arrays
