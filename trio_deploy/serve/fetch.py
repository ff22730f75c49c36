"""Pictures at addresses that clients send: from hosts that the server's owner has named alone.

A client could otherwise reach the server's own network. So a host is named exactly, its addresses
must all be public, and the connection goes to the very address that was checked; redirects and
proxies are not followed.
"""

from __future__ import annotations

import urllib.parse
from collections.abc import Iterable
from dataclasses import dataclass

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.fetch import FetchLimits, fetch

_PORTS = {"http": 80, "https": 443}
_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class ImageHosts:
    """Hosts whose pictures are fetched; none by default.

    Attributes:
        origins: scheme, name and port of each.
    """

    origins: frozenset[tuple[str, str, int]] = frozenset()

    @classmethod
    def parse(cls, names: Iterable[str]) -> ImageHosts:
        """Read names such as `images.example.com` (https) or `http://images.example.com:8080`.

        Raises:
            TrioError: one is none.
        """
        origins = set()
        for name in names:
            address = name if "://" in name else f"https://{name}"
            origin = _origin(address)
            if origin is None or address.rstrip("/").count("/") != 2 or "*" in name:
                raise TrioError(
                    f"--allow-images-from takes a host, as in images.example.com or "
                    f"http://images.example.com:8080, not {name!r:.100}"
                )
            origins.add(origin)
        return cls(frozenset(origins))

    def check(self, url: str) -> None:
        """Check the address of a picture.

        Raises:
            TrioError: its host is not one of these.
        """
        origin = _origin(url)
        if origin is None or origin not in self.origins:
            raise TrioError(
                "pictures are not fetched from this address: send data:image/png;base64,…"
                + (", or one of a host that the server allows" if self.origins else "")
            )

    def fetch(self, url: str, max_bytes: int) -> bytes:
        """The file at an address that `check` has let through.

        Raises:
            TrioError: it cannot be had within the limits.
        """
        limits = FetchLimits(max_bytes, max_bytes, _TIMEOUT_S, _TIMEOUT_S, 0, public=True)
        return fetch(url, limits)


def _origin(url: str) -> tuple[str, str, int] | None:
    """Scheme, host and port of an address; None for what is none, or names a user."""
    try:
        parts = urllib.parse.urlsplit(url)
        port = parts.port or _PORTS[parts.scheme]
    except (ValueError, KeyError):
        return None
    if not parts.hostname or "@" in parts.netloc or any(c.isspace() or c == "\\" for c in url):
        return None
    return parts.scheme, parts.hostname.lower(), port
