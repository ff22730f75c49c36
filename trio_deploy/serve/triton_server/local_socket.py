"""Requests from `trio_vlm_complete` to `trio_vlm`: two processes of one server.

Triton has a way for this, a model that asks another one ("business logic scripting"), but in 2.51
it is not fit for requests from several threads: a thread of its own drops Python objects without
the interpreter's lock, which ends the process with a corrupted heap after some thousand requests.
So the two speak over a Unix socket. Its name is an abstract one, which no file is left of; other
users and other containers of a network namespace can see such a name, so each side makes sure that
the other one is a process of the same user and of the same server.

A connection is one request: the caller sends it, hears that it was taken, and gets one reply. If it
hangs up before that, the request is cancelled. A message is a JSON object and the bytes of its
arrays: nothing in it is executed.
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
_WAITING = 128  # connections that may wait to be accepted
_RECEIVERS = 4  # threads that take requests
_PATIENCE_S = 10.0  # for the other side's next step
_LOOK_S = 0.05  # between looks at whether a request was cancelled
_KNOWN_S = 1.0  # for which the instances of a model are not looked up again


@dataclass(frozen=True)
class Ask:
    """A request: input arrays by name, its parameters as JSON, its timeout in µs (0: none)."""

    tensors: Mapping[str, np.ndarray]
    parameters: str
    timeout_us: int


@dataclass(frozen=True)
class Reply:
    """A whole answer's output arrays by name, or else what is wrong and the name of its code."""

    outputs: Mapping[str, np.ndarray]
    error: str = ""
    code: str = ""


class LocalServer:
    """Takes requests for one instance of a model until `close`."""

    def __init__(self, model: str, take: Callable[[Sender, Ask], None]) -> None:
        """Args:
        model: its name; instances of the same name share the work.
        take: called for each request, on one of a few threads: it must not wait for the answer.

        Raises:
            OSError: there is no socket or no thread to be had.
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
        """Take no more requests; those that were taken still get their replies."""
        self._closing.set()
        with contextlib.suppress(OSError):  # it was closed before
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the threads
        for thread in self._threads:
            thread.join(_PATIENCE_S)
        self._socket.close()

    def _serve(self) -> None:
        while not self._closing.is_set():
            try:
                self._receive(Connection(self._socket.accept()[0].detach()))
            except Exception as error:  # no more files may be opened, say: this must go on
                if not self._closing.wait(1.0):
                    _LOG.error("a request could not be taken: %r", error)

    def _receive(self, connection: Connection) -> None:
        sender = _LocalSender(connection)
        try:
            _prepare(connection)
            if not connection.poll(_PATIENCE_S):
                raise EOFError
            given, tensors = _read(connection)
            _write(connection, {"taken": True})
        except (EOFError, OSError, ValueError, KeyError):  # given up, or none of ours
            connection.close()
            return
        try:
            self._take(sender, Ask(tensors, given["parameters"], given["timeout_us"]))
        except Exception as error:
            _LOG.exception("a request failed")
            sender.fail(f"internal error: {error!r:.200}", "INTERNAL")


class LocalClient:
    """Asks the instances of a model in turn, from any thread."""

    def __init__(self, model: str) -> None:
        self._model = model
        self._turns = itertools.count()
        self._known: list[bytes] = []
        self._known_until = -math.inf

    def ask(self, ask: Ask, is_cancelled: Callable[[], bool], timeout_s: float = math.inf) -> Reply:
        """The reply to a request, or that it was cancelled.

        Args:
            is_cancelled: asked again and again until there is a reply.
            timeout_s: wait so long at most.

        Raises:
            OSError, EOFError: there is no instance that takes it, it ended, or the time is over.
        """
        until = time.monotonic() + timeout_s
        with self._connect() as connection:  # hanging up cancels
            given = {"parameters": ask.parameters, "timeout_us": ask.timeout_us}
            _write(connection, given, ask.tensors)
            if not connection.poll(_PATIENCE_S):
                raise TimeoutError(f"it took no request in {_PATIENCE_S:g} s")
            _read(connection)
            while not connection.poll(_LOOK_S):
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
                self._known_until = time.monotonic() + _KNOWN_S
            known = self._known
            for number in range(len(known)):
                with contextlib.suppress(OSError):  # it has ended, or is somebody else
                    return _connect(known[(turn + number) % len(known)])
        raise ConnectionRefusedError(f"no instance of {self._model} is there")


class _LocalSender:
    """Sends the last response as the reply; there are no others."""

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
            # There is nothing to read but the end, since the caller sends one message alone.
            return not self._connection.closed and self._connection.poll()

    def _reply(self, reply: Reply) -> None:
        with self._lock:
            if not self._connection.closed:
                with contextlib.suppress(OSError), self._connection:  # it was given up
                    said = {"error": reply.error, "code": reply.code}
                    _write(self._connection, said, reply.outputs)


def _listen(model: str) -> socket.socket:
    listening = socket.socket(socket.AF_UNIX)
    try:
        listening.bind(_prefix(model) + secrets.token_hex(8).encode())
        listening.listen(_WAITING)
    except BaseException:
        listening.close()
        raise
    return listening


def _connect(name: bytes) -> Connection:
    connecting = socket.socket(socket.AF_UNIX)
    try:
        _be_patient(connecting)  # also with one whose queue is full
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
    """Names of the sockets at which a model's instances listen."""
    prefix = b"@" + _prefix(model)[1:]
    found = []
    for line in Path("/proc/net/unix").read_bytes().splitlines():
        words = line.split(None, 7)  # a name may be any bytes
        # Connections have their listener's name, too, and may outlive it.
        if len(words) == 8 and words[3] == _LISTENS and words[7].startswith(prefix):
            found.append(b"\0" + words[7][1:])
    return sorted(found)


def _prefix(model: str) -> bytes:
    """Of the names of a model's sockets: other servers on the machine have others."""
    server = os.getppid()
    digest = hashlib.sha256(
        f"{server} {int(process_stat(server)[19])} {model}".encode()
    ).hexdigest()
    return f"\0trio-{digest[:32]}-".encode()


def _prepare(connection: Connection) -> None:
    """Make sure of the other side, and that nothing waits for it for ever.

    Raises:
        PermissionError: it is none of this server's processes.
    """
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
        process, user, _ = _CREDENTIALS.unpack(data)
        # A process of another container has no number here: 0.
        if user != os.geteuid() or not process or int(process_stat(process)[1]) != os.getppid():
            raise PermissionError("the other side of a local connection is none of this server's")
        _be_patient(peer)


def _be_patient(connection: socket.socket) -> None:
    """Let a message or a connection that gets stuck on its way fail, with BlockingIOError."""
    patience = _TIMEVAL.pack(int(_PATIENCE_S), int(_PATIENCE_S % 1 * 1e6))
    for option in (socket.SO_SNDTIMEO, socket.SO_RCVTIMEO):
        connection.setsockopt(socket.SOL_SOCKET, option, patience)


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
    """Raises ValueError or KeyError where it is no message."""
    message = json.loads(connection.recv_bytes())
    arrays = {}
    for entry in message["arrays"]:
        content = connection.recv_bytes()
        if entry["sizes"] is None:
            kind = np.dtype(entry["kind"])
            if kind.hasobject:
                raise ValueError("an array of objects")
            array = np.frombuffer(content, kind)
        else:
            ends = [0, *itertools.accumulate(entry["sizes"])]
            array = np.empty(len(entry["sizes"]), np.object_)
            array[:] = [content[start:end] for start, end in itertools.pairwise(ends)]
        arrays[entry["name"]] = array.reshape(entry["shape"])
    return message["fields"], arrays
