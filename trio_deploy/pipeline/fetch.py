"""Pictures at http and https addresses, within limits on bytes, time and redirects.

Only `Pipeline.generate`, `generate_batch` and `stream` fetch, for the user whose process it is.
Servers prepare requests by `Pipeline.prepare`, which refuses addresses: fetching one would let a
client reach the server's own network.
"""

from __future__ import annotations

import http.client
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import IO, Any, TypeGuard

from trio_deploy import __version__
from trio_deploy.errors import TrioError
from trio_deploy.files import format_bytes
from trio_deploy.pipeline.request import ImageSource, Request

_SCHEMES = ("http", "https")
_CHUNK = 2**16
_ELSEWHERE = "it redirects to a scheme other than http and https"


@dataclass(frozen=True)
class FetchLimits:
    """Limits of one picture that is fetched.

    Attributes:
        max_bytes: bytes of its file.
        timeout_s: seconds from the first connection to the last byte, redirects included.
        max_redirects: redirects, each to http or https.
    """

    max_bytes: int = 50 * 2**20
    timeout_s: float = 30.0
    max_redirects: int = 5


def is_address(source: object) -> TypeGuard[str]:
    """Whether a picture's source is an address to fetch, rather than a path."""
    return isinstance(source, str) and source.lower().startswith(
        tuple(f"{scheme}://" for scheme in _SCHEMES)
    )


def with_pictures(requests: Sequence[Request]) -> list[Request]:
    """Requests with the files in place of addresses; one that occurs again is fetched once.

    Raises:
        TrioError: a picture cannot be fetched within the limits.
    """
    files: dict[str, bytes] = {}

    def file_of(source: ImageSource) -> ImageSource:
        if not is_address(source):
            return source
        if source not in files:
            files[source] = fetch(source)
        return files[source]

    return [
        replace(request, images=[file_of(source) for source in request.image_list])
        if _has_address(request)
        else request
        for request in requests
    ]


def _has_address(request: Request) -> bool:
    """Whether there is anything to fetch; what is wrong with the request is found elsewhere."""
    images = getattr(request, "images", ())
    return any(map(is_address, images if isinstance(images, list | tuple) else [images]))


def fetch(address: str, limits: FetchLimits | None = None) -> bytes:
    """Content of the file at an http or https address.

    Raises:
        TrioError: another scheme, no answer, an error status, or beyond the limits.
    """
    limits = limits or FetchLimits()
    if not is_address(address):
        raise TrioError(f"cannot fetch {address}: an address begins with http:// or https://")
    results: list[bytes | Exception] = []

    def download() -> None:
        try:
            results.append(_download(address, limits))
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


def _download(address: str, limits: FetchLimits) -> bytes:
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
        if length.isdecimal() and int(length[:20]) > limits.max_bytes:
            raise _too_large(address, limits)
        content = bytearray()
        while chunk := answer.read1(_CHUNK):
            content += chunk
            if len(content) > limits.max_bytes:
                raise _too_large(address, limits)
            if time.monotonic() > deadline:  # nobody waits any more
                raise TimeoutError
    if length.isdecimal() and len(content) < int(length):
        raise TrioError(f"cannot fetch {address}: the connection broke off")
    return bytes(content)


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows a number of redirects, to http and https alone."""

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
        if not is_address(newurl):
            raise TrioError(f"cannot fetch {req.full_url}: {_ELSEWHERE}")
        self._left -= 1
        if self._left < 0:
            raise TrioError(f"cannot fetch {req.full_url}: it redirects too often")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _too_large(address: str, limits: FetchLimits) -> TrioError:
    return TrioError(
        f"cannot fetch {address}: the file is larger than {format_bytes(limits.max_bytes)}"
    )


def _reason(error: Exception, limits: FetchLimits) -> str:
    if isinstance(error, urllib.error.HTTPError):
        if 300 <= error.code < 400:  # some of which urllib refuses itself
            return _ELSEWHERE
        return f"the server says {error.code} {error.reason}"
    cause = error.reason if isinstance(error, urllib.error.URLError) else error
    if isinstance(cause, TimeoutError):
        return f"it took longer than {limits.timeout_s:g} s"
    if isinstance(cause, http.client.HTTPException):
        return "the server does not speak HTTP"
    return str(getattr(cause, "strerror", None) or cause)
