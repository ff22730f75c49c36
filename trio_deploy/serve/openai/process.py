"""The process: uvicorn, limits of connections, and an orderly end."""

from __future__ import annotations

import asyncio
import functools
import logging
import socket
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any

import msgspec
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from trio_deploy.errors import TrioError
from trio_deploy.serve.openai.app import Served, build_app
from trio_deploy.serve.openai.errors import ApiError, invalid
from trio_deploy.serve.openai.gate import BEYOND
from trio_deploy.serve.openai.settings import HttpLimits
from trio_deploy.serve.service import switch_threads_often

_LOG = logging.getLogger("trio_deploy.serve")
_KEEP_ALIVE_S = 75  # longer than clients keep idle connections, so that they close first
_BACKLOG = 2048
_MAX_HEAD = 2**16  # bytes of a request's line and headers; httptools itself takes any number


@dataclass(frozen=True)
class ProcessOptions:
    """How the process listens and ends.

    Attributes:
        drain_s: seconds for running answers to finish.
        drain_delay_s: seconds before that in which it still listens, with /ready at 503, so that
            a load balancer sends no more.
        ssl_certfile, ssl_keyfile: files of TLS; None: plain HTTP.
    """

    drain_s: float = 30.0
    drain_delay_s: float = 0.0
    ssl_certfile: str | None = None
    ssl_keyfile: str | None = None


def bind(host: str, port: int) -> socket.socket:
    """Reserve an address, before a model is loaded for it.

    Args:
        port: 0: any free one.

    Raises:
        TrioError: it cannot be had.
    """
    if not 0 <= port <= 65535:
        raise TrioError(f"cannot listen at {host} port {port}: choose a --port of 0 to 65535")
    try:
        ((family, _, _, _, address), *_) = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )
        # Named as TCP: asyncio sends small writes at once then. Otherwise what follows a response's
        # head waits until the client has acknowledged it, some 40 ms.
        found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
        try:
            found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            found.bind(address)
        except BaseException:
            found.close()
            raise
    except (OSError, OverflowError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise TrioError(
            f"cannot listen at {host} port {port} ({reason}): choose another --host or --port"
        ) from error
    return found


def serve(
    served: Served,
    listener: socket.socket,
    options: ProcessOptions,
    listening: Callable[[], object] = lambda: None,
) -> None:
    """Serve until a signal ends the process; what runs then is finished.

    Args:
        listener: from `bind`.
        listening: called when requests are taken.
    """
    switch_threads_often()
    server = Server(served, build_app(served), options, listening)
    try:
        server.run(sockets=[listener])
    finally:
        served.service.close(timeout=0.0)


class Server(uvicorn.Server):
    """uvicorn's server, which refuses requests for a while before it stops to listen."""

    def __init__(
        self,
        served: Served,
        app: ASGIApp,
        options: ProcessOptions,
        listening: Callable[[], object] = lambda: None,
    ) -> None:
        protocol: Any = functools.partial(Protocol, limits=served.limits)
        super().__init__(
            uvicorn.Config(
                app,
                http=protocol,
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                server_header=False,
                proxy_headers=False,
                backlog=_BACKLOG,
                timeout_keep_alive=_KEEP_ALIVE_S,
                timeout_graceful_shutdown=max(1, round(options.drain_s)),
                ssl_certfile=options.ssl_certfile,
                ssl_keyfile=options.ssl_keyfile,
            )
        )
        self._life = served.life
        self._delay_s = options.drain_delay_s
        self._listening = listening
        self._loop: asyncio.AbstractEventLoop | None = None

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        self._listening()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """End in order; at a second signal, at once. The process ends without an error."""
        if self._life.draining:
            self.should_exit = self.force_exit = True
        else:
            self.drain()

    def drain(self) -> None:
        """Take no more requests, and end when those that run are answered; from any thread."""
        self._life.draining = True
        if self._loop is None:  # it does not listen yet
            self.should_exit = True
            return
        self._loop.call_soon_threadsafe(self._loop.call_later, self._delay_s, self._end)

    def _end(self) -> None:
        self.should_exit = True


class Protocol(HttpToolsProtocol):
    """uvicorn's connection, with limits for heads, for readers that do not read, and for idleness.

    All requests of a connection that is lost are told so, not only the last one that came.
    """

    def __init__(self, *given: Any, limits: HttpLimits, **named: Any) -> None:
        super().__init__(*given, **named)
        self._limits = limits
        self._timers: dict[str, asyncio.TimerHandle] = {}
        self._head_bytes = 0
        self._open: list[RequestResponseCycle] = []

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self._limits.max_connections:
            self.app_state = {**self.app_state, BEYOND: True}
        self._abort_in("head", self._limits.head_s)

    def connection_lost(self, exc: Exception | None) -> None:
        for name in list(self._timers):
            self._keep(name)
        for cycle in self._open:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        due = "head" in self._timers
        super().data_received(data)
        self._head_bytes = self._head_bytes + len(data) if due and "head" in self._timers else 0
        if self._head_bytes > _MAX_HEAD and not self.transport.is_closing():
            error = ApiError(431, f"the request's head has more than {_MAX_HEAD} bytes")
            self._refuse("431 Request Header Fields Too Large", error)
        self._limit_idleness()

    def _limit_idleness(self) -> None:
        """Begin the time for another request anew: any byte ends it, also one that begins none."""
        running = self.cycle is not None and not self.cycle.response_complete
        if running or self._timers.keys() & {"head", "rest"} or self.transport.is_closing():
            return
        self._unset_keepalive_if_required()
        self.timeout_keep_alive_task = self.loop.call_later(
            self.timeout_keep_alive, self.timeout_keep_alive_handler
        )

    def on_message_begin(self) -> None:
        self._abort_in("head", self._limits.head_s)
        super().on_message_begin()

    def on_headers_complete(self) -> None:
        self._keep("head")
        super().on_headers_complete()
        self._open = [each for each in (*self._open, self.cycle) if not each.response_complete]

    def on_message_complete(self) -> None:
        self._keep("rest")
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:  # what was refused before it was there still comes
            self._abort_in("rest", self._limits.body_s)

    def pause_writing(self) -> None:
        super().pause_writing()
        self._abort_in("reader", self._limits.send_s)

    def resume_writing(self) -> None:
        self._keep("reader")
        super().resume_writing()

    def timeout_keep_alive_handler(self) -> None:
        if self.transport.get_write_buffer_size():
            self.transport.abort()  # closing would wait for a reader that does not read
        else:
            super().timeout_keep_alive_handler()

    def send_400_response(self, msg: str) -> None:
        self._refuse("400 Bad Request", invalid("this is no HTTP request", code="invalid_http"))

    def _refuse(self, status: str, error: ApiError) -> None:
        """Send an error that no application has seen, and close."""
        body = msgspec.json.encode(error.body)
        head = (
            f"HTTP/1.1 {status}\r\ncontent-type: application/json\r\n"
            f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
        )
        self.transport.write(head.encode() + body)
        self.transport.close()

    def _abort_in(self, name: str, seconds: float) -> None:
        self._keep(name)
        self._timers[name] = self.loop.call_later(seconds, self.transport.abort)

    def _keep(self, name: str) -> None:
        if name in self._timers:
            self._timers.pop(name).cancel()
