"""What every request passes: its id, the host it names, its key, and its body within limits."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import logging
import re
import secrets
import threading
import time
from collections.abc import AsyncIterator, Collection, Coroutine, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import msgspec
from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.serve.openai.errors import ApiError, busy, invalid, unavailable
from trio_deploy.serve.openai.settings import HttpLimits

_LOG = logging.getLogger("trio_deploy.serve")
_ID = re.compile(r"[\w.-]{1,128}", re.ASCII)
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
_PROBES = ("/health", "/ready")
BEYOND = "beyond"  # in the state of requests on connections beyond max_connections
COPIES = 3  # of a body while it is read: as it came, as text, and decoded


@dataclass(frozen=True)
class Doors:
    """Who may ask.

    Attributes:
        keys: SHA-256 digests of the keys; empty: no key is asked for.
        hosts: names that a request's Host may have, in lower case: with any port, or, where they
            have one, with this one; None: any name.
        any_address: whether it may also be an IP address: no other site can have one.
        open: paths for which no key is asked.
    """

    keys: Sequence[bytes] = ()
    hosts: Collection[str] | None = None
    any_address: bool = False
    open: Collection[str] = (*_PROBES, "/")

    def check(self, path: str, headers: Headers) -> None:
        """Check a request.

        Raises:
            ApiError: it names another host, or has no key or a wrong one.
        """
        if path not in _PROBES and not self._knows_host(headers.get("host", "")):
            raise ApiError(
                400,
                f"the host {headers.get('host', '')[:100]!r} is not served here: name it with "
                "--allowed-host",
                code="invalid_host",
            )
        if self.keys and path not in self.open and not self._knows_key(headers):
            raise ApiError(
                401,
                "the API key is missing or wrong: send it as Authorization: Bearer KEY",
                code="invalid_api_key",
            )

    def _knows_host(self, host: str) -> bool:
        if self.hosts is None:
            return True
        name = re.sub(r":\d+$", "", host).lower()
        if name in self.hosts or host.lower() in self.hosts or name in _LOOPBACK:
            return True
        return self.any_address and _is_address(name)

    def _knows_key(self, headers: Headers) -> bool:
        kind, _, key = headers.get("authorization", "").partition(" ")
        digest = digest_of(key.strip()) if kind.lower() == "bearer" else b""
        # All of them, whichever fits, so that the time tells nothing.
        return any([hmac.compare_digest(digest, each) for each in self.keys])


def digest_of(key: str) -> bytes:
    """Digest by which a key is compared."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name.strip("[]"))
    except ValueError:
        return False
    return True


class Life:
    """Whether the server takes requests."""

    def __init__(self) -> None:
        self.draining = False


class HeldBytes:
    """A bound on the memory of all bodies that are being read.

    Beside others, a request may hold as much as it leaves free: however many clients send much,
    there is room for those that send little.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._lock = threading.Lock()
        self.used = 0

    def check(
        self, size: int, what: str = "the body", held: int = 0, *, leaves_room: bool = True
    ) -> None:
        """Check that bytes fit, without counting them.

        Args:
            what: what has them, for the message.
            held: bytes that are counted of the same request already.
            leaves_room: whether the request may hold no more than it leaves free.

        Raises:
            ApiError: the request alone exceeds the limit.
            Refused: they do not fit beside those of other requests.
        """
        if held + size > self._limit:
            raise invalid(
                f"{what} may have {size} bytes beside {held} others of the request, but "
                f"max_queue_bytes is {self._limit}: send less"
            )
        others, free = self.used - held, self._limit - self.used - size
        if free < 0 or (leaves_room and others and held + size > free):
            raise Refused(
                f"requests that are being read have {self.used} bytes, {held} of them this one, "
                f"which has {size} more; max_queue_bytes is {self._limit}: try again later, send "
                "less, or start the server with a larger one"
            )

    def take(
        self, size: int, what: str = "the body", held: int = 0, *, leaves_room: bool = True
    ) -> None:
        """Count some bytes; `check` says the rest."""
        with self._lock:
            self.check(size, what, held, leaves_room=leaves_room)
            self.used += size

    def release(self, size: int) -> None:
        """Stop counting them."""
        with self._lock:
            self.used -= size


@dataclass
class _Taken:
    """Bytes that are counted of one body."""

    size: int = 0


class Bodies:
    """Reads bodies within limits on bytes, time and memory."""

    def __init__(self, limits: HttpLimits, max_held_bytes: int) -> None:
        self._limits = limits
        self._largest = min(limits.max_body_bytes, max_held_bytes // COPIES)
        self.held = HeldBytes(max_held_bytes)

    @asynccontextmanager
    async def read(self, request: Request) -> AsyncIterator[bytes]:
        """The body of a request, which is counted until the block is left.

        Raises:
            ApiError: it is too large, does not come in time, or is no JSON by its header.
            Refused: too many bytes are being read.
        """
        kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(
                415,
                f"the content type is {kind[:60] or 'missing'}, but only application/json is read",
                code="unsupported_media_type",
            )
        announced = _length(request.headers)
        if announced > self._largest:
            raise self._too_large(announced)
        self.held.check(COPIES * announced)  # so that nobody sends in vain
        taken = _Taken()
        try:
            yield await self._within(self._read(request, taken))
        finally:
            self.held.release(taken.size)

    async def _within(self, reading: Coroutine[Any, Any, bytes]) -> bytes:
        seconds = self._limits.body_s
        try:
            return await asyncio.wait_for(reading, seconds)
        except asyncio.TimeoutError:
            raise ApiError(
                408,
                f"the body did not come within body_s = {seconds:g} seconds",
                code="request_timeout",
                close=True,
            ) from None

    async def _read(self, request: Request, taken: _Taken) -> bytes:
        """The body; what was announced and does not come takes nothing from others."""
        body = bytearray()  # not a list: parts of few bytes would take more than is counted
        async for part in request.stream():
            if len(body) + len(part) > self._largest:
                raise self._too_large(len(body) + len(part))
            self.held.take(COPIES * len(part), held=taken.size)
            taken.size += COPIES * len(part)
            body += part
        return bytes(body)

    def _too_large(self, size: int) -> ApiError:
        return ApiError(
            413,
            f"the body has {size} bytes or more, but at most {self._largest} are taken, by "
            f"max_body_bytes = {self._limits.max_body_bytes} and a third of max_queue_bytes",
            code="request_too_large",
        )


def _length(headers: Headers) -> int:
    text = headers.get("content-length", "0")
    if not text.isascii() or not text.isdigit() or len(text) > 18:
        raise ApiError(400, "the header Content-Length is no number of bytes")
    return int(text)


class Gate:
    """The outermost part of the application; nothing gets past it but a response."""

    def __init__(self, app: ASGIApp, doors: Doors, limits: HttpLimits, life: Life) -> None:
        self._app = app
        self._doors = doors
        self._limits = limits
        self._life = life

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve a request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, status = time.perf_counter(), 0
        headers = Headers(scope=scope)
        request_id = _request_id(headers)
        scope.setdefault("state", {})["request_id"] = request_id

        async def labelled(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = request_id
            await send(message)

        try:
            try:
                self._check(scope, headers)
                await self._app(scope, receive, labelled)
            except ApiError as error:
                await send_error(error, labelled)
        except Exception:  # Starlette has logged it and sent a response, and raises all the same
            _LOG.debug("request %s failed", request_id, exc_info=True)
        finally:
            took = time.perf_counter() - started
            told = str(status) if status else "left"
            path = repr(scope["path"][:200])  # a path may have line breaks
            quiet = scope["path"] in (*_PROBES, "/metrics") and status == 200
            level = logging.DEBUG if quiet else logging.INFO
            _LOG.log(level, "%s %s %s %.3f s %s", scope["method"], path, told, took, request_id)

    def _check(self, scope: Scope, headers: Headers) -> None:
        path = scope["path"]
        self._doors.check(path, headers)
        if path in _PROBES:
            return
        if self._life.draining:
            raise unavailable("the server is shutting down: ask another one", 1)
        if BEYOND in scope["state"]:
            error = busy(
                f"max_connections = {self._limits.max_connections} connections are open: try "
                "again later",
                1,
            )
            error.close = True
            raise error


def _request_id(headers: Headers) -> str:
    given = headers.get("x-request-id", "")
    return given if _ID.fullmatch(given) else f"req-{secrets.token_hex(12)}"


async def send_error(error: ApiError, send: Send) -> None:
    """Send an error as a response."""
    body = msgspec.json.encode(error.body)
    headers = {"Content-Type": "application/json", "Content-Length": str(len(body))}
    pairs = [
        (name.lower().encode(), value.encode()) for name, value in (headers | error.headers).items()
    ]
    start: dict[str, Any] = {"type": "http.response.start", "status": error.status}
    await send(start | {"headers": pairs})
    await send({"type": "http.response.body", "body": body})
