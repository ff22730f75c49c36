"""Pictures at http and https addresses, within limits on bytes, time and redirects.

Only `Pipeline.generate`, `generate_batch` and `stream` fetch, for the user whose process it is.
Servers prepare requests by `Pipeline.prepare`, which refuses addresses: fetching one would let a
client reach the server's own network.
"""

from __future__ import annotations

import http.client
import re
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
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
_REDIRECTS = (301, 302, 303, 307, 308)


@dataclass(frozen=True)
class FetchLimits:
    """Limits of the pictures that are fetched.

    Attributes:
        max_bytes: bytes of one picture's file.
        max_request_bytes: bytes of the files at all distinct addresses of one request.
        timeout_s: seconds from the first connection to the last byte of a file, redirects included.
        max_redirects: redirects per picture, each to http or https.
    """

    max_bytes: int = 50 * 2**20
    max_request_bytes: int = 200 * 2**20
    timeout_s: float = 30.0
    max_redirects: int = 5


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


def fetch_pictures(
    requests: Sequence[Request], limits: FetchLimits | None = None
) -> list[list[ImageSource]]:
    """The pictures of each request, with the files in place of addresses.

    An address that occurs again is fetched once.

    Args:
        requests: checked ones, since each address costs time and memory.

    Raises:
        TrioError: a picture cannot be fetched within the limits.
    """
    limits = limits or FetchLimits()
    files: dict[str, bytes] = {}
    return [_pictures(request.image_list, files, limits) for request in requests]


def _pictures(
    sources: Sequence[ImageSource], files: dict[str, bytes], limits: FetchLimits
) -> list[ImageSource]:
    """The pictures of one request; what is fetched is added to `files`."""
    left = limits.max_request_bytes
    for address in dict.fromkeys(filter(is_address, sources)):
        if address not in files:
            files[address] = fetch(address, limits, left)
        left -= len(files[address])
        if left < 0:
            raise _too_large_together(address, limits)
    return [files[source] if is_address(source) else source for source in sources]


def fetch(address: str, limits: FetchLimits | None = None, left: int | None = None) -> bytes:
    """Content of the file at an http or https address.

    Args:
        left: bytes that remain of the request's; None: `max_request_bytes`.

    Raises:
        TrioError: another scheme, no answer, an error status, or beyond the limits.
    """
    limits = limits or FetchLimits()
    check_scheme(address)
    left = limits.max_request_bytes if left is None else left
    results: list[bytes | Exception] = []

    def download() -> None:
        try:
            results.append(_download(address, limits, left))
        except Exception as error:
            results.append(error)

    # In a thread of its own, since a server may send so slowly that no single wait is long.
    thread = threading.Thread(target=download, name="fetch a picture", daemon=True)
    thread.start()
    thread.join(limits.timeout_s)
    result = results[0] if results else TimeoutError()
    if isinstance(result, bytes):
        return result
    if isinstance(result, TrioError):
        raise result
    raise TrioError(f"cannot fetch {address}: {_reason(result, limits)}") from result


def _download(address: str, limits: FetchLimits, left: int) -> bytes:
    opener = urllib.request.OpenerDirector()  # no handlers of files, ftp or data
    for handler in (
        urllib.request.ProxyHandler(),
        urllib.request.HTTPHandler(),
        urllib.request.HTTPSHandler(),
        urllib.request.HTTPDefaultErrorHandler(),
        urllib.request.HTTPErrorProcessor(),
        _Redirects(limits.max_redirects),
    ):
        opener.add_handler(handler)
    headers = {"User-Agent": f"trio-deploy/{__version__}", "Accept": "image/*"}
    asked = urllib.request.Request(address, headers=headers)
    deadline = time.monotonic() + limits.timeout_s
    with opener.open(asked, timeout=limits.timeout_s) as answer:
        length = answer.headers.get("Content-Length", "")
        if length.isdecimal():
            _check_size(int(length[:20]), address, limits, left)
        content = bytearray()
        while chunk := answer.read1(_CHUNK):
            content += chunk
            _check_size(len(content), address, limits, left)
            if time.monotonic() > deadline:  # nobody waits any more
                raise TimeoutError
    if length.isdecimal() and len(content) < int(length):
        raise TrioError(f"cannot fetch {address}: {_BROKE_OFF}")
    return bytes(content)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a number of redirects, to http and https alone."""

    max_redirections = max_repeats = sys.maxsize  # urllib's own counts, with other words

    def __init__(self, most: int) -> None:
        self._left = most

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


def _check_size(size: int, address: str, limits: FetchLimits, left: int) -> None:
    if size > limits.max_bytes:
        raise TrioError(
            f"cannot fetch {address}: the file is larger than {format_bytes(limits.max_bytes)}"
        )
    if size > left:
        raise _too_large_together(address, limits)


def _too_large_together(address: str, limits: FetchLimits) -> TrioError:
    return TrioError(
        f"cannot fetch {address}: with it the pictures of the request have more than "
        f"{format_bytes(limits.max_request_bytes)} together: pass fewer or smaller ones"
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
    # address, a name that no host can have, letters that are not percent-encoded.
    if isinstance(cause, http.client.InvalidURL | ValueError):
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
