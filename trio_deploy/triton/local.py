"""Requests from `trio_vlm_complete` to `trio_vlm`: two processes of one server.

Triton has a way for this, a model that asks another one ("business logic scripting"), but in 2.51
it is not fit for requests from several threads: a thread of its own drops Python objects without
the interpreter's lock, which ends the process with a corrupted heap after some thousand requests.
So the two speak over a Unix socket. Its name is an abstract one, which no file is left of, and each
side makes sure that the other runs as the same user.

A connection is one request. The caller sends it and gets one reply; if it hangs up before that, the
request is cancelled. What is sent is pickled: only the two models, in the same hands, take part.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import logging
import os
import socket
import struct
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.connection import Client, Connection, Listener
from pathlib import Path

import numpy as np

from trio_deploy.triton.sender import Sender

_LOG = logging.getLogger(__name__)
_CREDENTIALS = struct.Struct("3i")  # process, user, group: struct ucred of unix(7)
_WAITING = 128  # connections that may wait to be accepted
_LISTENS = f"{1 << 16:08X}"  # __SO_ACCEPTCON, as /proc/net/unix writes flags


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
        take: called for each request on a thread of its own.
        """
        self._take = take
        self._listener, self._address = _listen(model)
        self._closing = False
        self._thread = threading.Thread(target=self._accept, name="trio-accept", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Take no more requests; those that were taken still get their replies."""
        self._closing = True
        with contextlib.suppress(OSError):
            Client(self._address).close()  # wakes the thread that accepts
        self._thread.join()
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                connection = self._listener.accept()
            except OSError:  # no more files may be opened, say: those that are open will close
                _LOG.exception("a request could not be taken")
                continue
            if self._closing:
                return
            threading.Thread(target=self._receive, args=(connection,), daemon=True).start()

    def _receive(self, connection: Connection) -> None:
        sender = _LocalSender(connection)
        try:
            _check_peer(connection)
            self._take(sender, connection.recv())
        except (EOFError, OSError):  # it was given up, or is none of ours
            connection.close()
        except Exception as error:
            _LOG.exception("a request failed")
            sender.fail(f"internal error: {error!r:.200}", "INTERNAL")


def connect(model: str, turn: int) -> Connection:
    """A connection to an instance of a model: the next one each turn.

    Raises:
        OSError: there is none.
    """
    names = _instances(model)
    if not names:
        raise ConnectionRefusedError(f"{model} is not there")
    connection = Client(names[turn % len(names)])
    try:
        _check_peer(connection)
    except BaseException:
        connection.close()
        raise
    return connection


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
                    self._connection.send(reply)


def _listen(model: str) -> tuple[Listener, str]:
    for number in itertools.count():
        address = f"{_prefix(model)}{number}"
        with contextlib.suppress(OSError):  # another instance has it
            return Listener(address, "AF_UNIX", backlog=_WAITING), address
    raise AssertionError


def _instances(model: str) -> list[str]:
    prefix = _prefix(model).replace("\0", "@")
    table = [line.split() for line in Path("/proc/net/unix").read_text().splitlines()]
    # Connections have their listener's name, too, and may outlive it.
    listening = {line[7] for line in table if line[7:] and line[3] == _LISTENS}
    return sorted(name.replace("@", "\0") for name in listening if name.startswith(prefix))


def _prefix(model: str) -> str:
    """Of the names of a model's sockets: other servers on the machine have others."""
    server = os.getppid()
    started = Path(f"/proc/{server}/stat").read_text().rpartition(")")[2].split()[19]
    digest = hashlib.sha256(f"{server} {started} {model}".encode()).hexdigest()
    return f"\0trio-{digest[:32]}-"


def _check_peer(connection: Connection) -> None:
    """Raises PermissionError unless the other side runs as the same user."""
    with socket.socket(fileno=os.dup(connection.fileno())) as peer:
        data = peer.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _CREDENTIALS.size)
    if _CREDENTIALS.unpack(data)[1] != os.geteuid():
        raise PermissionError("the other side of a local connection runs as another user")
