"""Pictures at http and https addresses, within limits on bytes, time and redirects.

Only `Pipeline.generate`, `generate_batch` and `stream` fetch, for the user whose process it is.
Servers prepare requests by `Pipeline.prepare`, which refuses addresses: fetching one would let a
client reach the server's own network.
"""

from __future__ import annotations

import http.client
import io
import ipaddress
import re
import socket
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import IO, Any, TypeGuard

from trio_deploy import __version__
from trio_deploy.errors import TrioError
from trio_deploy.files import format_bytes
from trio_deploy.pipeline.request import ImageSource, Request

_SCHEMES = ("http", "https")
_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]+://", re.IGNORECASE)
_CHUNK = 2**16
_ELSEWHERE = "it redirects to a scheme other than http and https"
_BROKE_OFF = "the connection broke off"
_TRANSLATED = ipaddress.ip_network("64:ff9b::/96")  # IPv4 addresses behind a translator
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class FetchLimits:
    """Limits of the pictures that are fetched.

    Attributes:
        max_bytes: bytes of one picture's file.
        max_request_bytes: bytes of the files at all distinct addresses of one request.
        timeout_s: seconds from the first connection to the last byte of a file, redirects included.
        max_request_s: seconds for the files at all distinct addresses of one request.
        max_redirects: redirects per picture, each to http or https.
        public: fetch from public addresses of the network alone, and through no proxy: for
            addresses that others name.
    """

    max_bytes: int = 50 * 2**20
    max_request_bytes: int = 200 * 2**20
    timeout_s: float = 30.0
    max_request_s: float = 120.0
    max_redirects: int = 5
    public: bool = False


def is_address(source: object) -> TypeGuard[str]:
    """Whether a picture's source is an address, of any scheme, rather than a path."""
    return isinstance(source, str) and _ADDRESS.match(source) is not None


def _is_fetched(address: str) -> bool:
    return address.partition("://")[0].lower() in _SCHEMES


def check_scheme(address: str) -> None:
    """Refuse an address that is not fetched.

    Raises:
        TrioError: its scheme is neither http nor https.
    """
    if not _is_fetched(address):
        raise TrioError(
            f"cannot fetch {address}: only http:// and https:// addresses are fetched, so download "
            "it and pass the file"
        )


@dataclass(frozen=True)
class _Left:
    """What remains of a request's limits: bytes, and seconds."""

    size: int
    seconds: float


def fetch_pictures(
    request: Request, files: dict[str, bytes], limits: FetchLimits | None = None
) -> list[ImageSource]:
    """The pictures of a request, with the files in place of addresses.

    Args:
        request: a checked one, since each address costs time and memory.
        files: by address, what was fetched for other requests, which is not fetched again; what is
            fetched here is added.

    Raises:
        TrioError: a picture cannot be fetched within the limits.
    """
    limits = limits or FetchLimits()
    sources = request.image_list
    size, deadline = limits.max_request_bytes, time.monotonic() + limits.max_request_s
    for address in dict.fromkeys(filter(is_address, sources)):
        if address not in files:
            files[address] = _fetch(address, limits, _Left(size, deadline - time.monotonic()))
        size -= len(files[address])
        if size < 0:
            raise _too_large_together(address, limits)
    return [files[source] if is_address(source) else source for source in sources]


def fetch(address: str, limits: FetchLimits | None = None) -> bytes:
    """Content of the file at an http or https address.

    Raises:
        TrioError: another scheme, no answer, an error status, or beyond the limits.
    """
    limits = limits or FetchLimits()
    return _fetch(address, limits, _Left(limits.max_request_bytes, limits.max_request_s))


def _fetch(address: str, limits: FetchLimits, left: _Left) -> bytes:
    check_scheme(address)
    if left.seconds <= 0:
        raise _too_slow_together(address, limits)
    results: list[bytes | Exception] = []

    def download(connection: _Connection) -> None:
        try:
            results.append(_download(address, limits, left, connection))
        except Exception as error:
            results.append(error)

    # In a thread of its own, since a server may send so slowly that no single wait is long.
    with closing(_Connection()) as connection:
        thread = threading.Thread(
            target=download, args=(connection,), name="fetch a picture", daemon=True
        )
        thread.start()
        thread.join(min(limits.timeout_s, left.seconds))
        # Before the end of the connection, which looks like the end of a file.
        result = results[0] if results else None
    if isinstance(result, bytes):
        return result
    if isinstance(result, TrioError):
        raise result
    if result is None and left.seconds < limits.timeout_s:
        raise _too_slow_together(address, limits)
    result = result or TimeoutError()
    raise TrioError(f"cannot fetch {address}: {_reason(result, limits)}") from result


def _download(address: str, limits: FetchLimits, left: _Left, connection: _Connection) -> bytes:
    opener = urllib.request.OpenerDirector()  # no handlers of files, ftp or data
    for handler in (
        urllib.request.ProxyHandler({} if limits.public else None),
        _Handler(connection, limits.public),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(limits.max_redirects),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": f"trio-deploy/{__version__}", "Accept": "image/*"}
    asked = urllib.request.Request(address, headers=headers)
    with opener.open(asked, timeout=limits.timeout_s) as answer:
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal():
            _check_size(int(length[:20]), address, limits, left)
        content = bytearray()
        while chunk := answer.read1(_CHUNK):
            content += chunk
            _check_size(len(content), address, limits, left)
    if length.isdecimal() and len(content) < int(length):
        raise TrioError(f"cannot fetch {address}: {_BROKE_OFF}")
    return bytes(content)


class _Connection:
    """The connection that is open for a picture, for another thread to end.

    An end is what stops a server that goes on without one: with headers, with a body or with
    announcements of an answer (100 Continue).
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._socket: socket.socket | None = None
        self._closed = False

    def opened(self, new: socket.socket) -> None:
        """Take the place of the one before, which ends.

        Raises:
            TimeoutError: nobody waits any more.
        """
        with self._lock:
            self._end()
            if self._closed:
                raise TimeoutError
            self._socket = new.dup()  # TLS will take the other one over

    def close(self) -> None:
        """End it, and every later one."""
        with self._lock:
            self._closed = True
            self._end()

    def _end(self) -> None:
        if self._socket is not None:
            with suppress(OSError):  # the server was faster
                self._socket.shutdown(socket.SHUT_RDWR)
            self._socket.close()
            self._socket = None


class _Http(http.client.HTTPConnection):
    """Reports its socket as soon as it is connected."""

    report: Callable[[socket.socket], None]

    def connect(self) -> None:
        super().connect()
        self.report(self.sock)


class _Https(http.client.HTTPSConnection, _Http):
    """The same, before the handshake, since `HTTPSConnection` calls `_Http.connect`."""


class _Handler(urllib.request.HTTPSHandler, urllib.request.HTTPHandler):
    """Opens http and https addresses, and reports the sockets."""

    def __init__(self, connection: _Connection, public: bool) -> None:
        super().__init__()
        self._connection = connection
        self._public = public

    def http_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._reporting(_Http), req)

    def https_open(self, req: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(self._reporting(_Https), req)

    def _reporting(self, kind: type[_Http]) -> Callable[..., _Http]:
        def connect(*args: Any, **options: Any) -> _Http:
            made = kind(*args, **options)
            made.report = self._connection.opened
            if self._public:
                made._create_connection = _connect_public  # type: ignore[attr-defined]
            return made

        return connect


def _connect_public(
    address: tuple[str, int], timeout: float | None = None, source: object = None
) -> socket.socket:
    """Connect to a host of which all addresses are public, at one of those that were looked up.

    One look-up: a name that resolves to another address the next time cannot get past it.

    Raises:
        TrioError: one of the addresses is not public.
    """
    host, port = address
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not all(is_public(str(each[4][0])) for each in found):
        raise TrioError(f"cannot fetch from {host}: its address is not a public one")
    failure: OSError = OSError("it has no address")
    for family, kind, protocol, _, place in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(timeout)
            connection.connect(place)
        except OSError as error:
            connection.close()
            failure = error
        else:
            return connection
    raise failure


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public network, and stands for no other that is not."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return False
    if isinstance(found, ipaddress.IPv6Address):
        if found in _TRANSLATED or found.sixtofour is not None or found.teredo is not None:
            return False
        if found.ipv4_mapped is not None:
            return is_public(str(found.ipv4_mapped))
    return found.is_global and not found.is_multicast


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a number of redirects, to http and https alone."""

    max_redirections = max_repeats = sys.maxsize  # urllib's own counts, with other words

    def __init__(self, most: int) -> None:
        self._left = most

    def http_error_302(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any
    ) -> Any:
        """Follow without a look at the body, which urllib would read to its end, if it has one."""
        fp.close()
        return super().http_error_302(req, io.BytesIO(), code, msg, headers)

    http_error_301 = http_error_303 = http_error_307 = http_error_308 = http_error_302

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: Any,
        newurl: str,
    ) -> urllib.request.Request | None:  # fmt: skip
        """The request of a redirect.

        Raises:
            TrioError: to another scheme, or too many.
        """
        if not _is_fetched(newurl):
            raise TrioError(f"cannot fetch {req.full_url}: {_ELSEWHERE}")
        self._left -= 1
        if self._left < 0:
            raise TrioError(f"cannot fetch {req.full_url}: it redirects too often")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _check_size(size: int, address: str, limits: FetchLimits, left: _Left) -> None:
    if size > limits.max_bytes:
        raise TrioError(
            f"cannot fetch {address}: the file is larger than {format_bytes(limits.max_bytes)}"
        )
    if size > left.size:
        raise _too_large_together(address, limits)


def _too_large_together(address: str, limits: FetchLimits) -> TrioError:
    return TrioError(
        f"cannot fetch {address}: with it the pictures of the request have more than "
        f"{format_bytes(limits.max_request_bytes)} together: pass fewer or smaller ones"
    )


def _too_slow_together(address: str, limits: FetchLimits) -> TrioError:
    return TrioError(
        f"cannot fetch {address}: with it the pictures of the request took longer than "
        f"{limits.max_request_s:g} s together: pass fewer, or download them and pass the files"
    )


def _reason(error: Exception, limits: FetchLimits) -> str:
    """Why an address cannot be fetched, in words for a user."""
    if isinstance(error, urllib.error.HTTPError):
        return _reason_of_status(error)
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"it took longer than {limits.timeout_s:g} s"
    if isinstance(cause, http.client.RemoteDisconnected):
        return "the server closed the connection without an answer"
    if isinstance(cause, http.client.IncompleteRead):
        return _BROKE_OFF
    # Of the address that was given, or of one that a redirect leads to. ValueError: half an IPv6
    # address, a name that no host can have, letters that are not percent-encoded. A certificate
    # that does not fit is both a ValueError and an OSError.
    if isinstance(cause, http.client.InvalidURL | ValueError) and not isinstance(cause, OSError):
        return f"the address, or one that it redirects to, is not valid ({_one_line(cause)})"
    if isinstance(cause, http.client.HTTPException):
        return "the server does not speak HTTP"
    return _one_line(getattr(cause, "strerror", None) or cause)


def _reason_of_status(error: urllib.error.HTTPError) -> str:
    """Why an answer with a status that is no success, and no redirect followed, is no picture."""
    if error.code in _REDIRECTS:
        to = error.headers.get("Location") or error.headers.get("URI")
        if not to:
            return f"the server says {error.code} and names no address to go to"
        if not _is_fetched(urllib.parse.urljoin(error.url, to)):
            return _ELSEWHERE  # which urllib refuses itself
    return f"the server says {error.code} {_one_line(error.reason)}".rstrip()


def _one_line(words: object) -> str:
    return " ".join(str(words).split())
