"""The page at /: one file, of which a browser runs nothing but what is in it."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

_FILE = Path(__file__).with_name("page.html")


def page() -> tuple[bytes, dict[str, str]]:
    """The page, and headers that forbid it everything but what it does."""
    content = _FILE.read_bytes()
    sources = {kind: _digest(content, kind) for kind in ("script", "style")}
    policy = {
        "default-src": "'none'",
        "script-src": sources["script"],
        "style-src": sources["style"],
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
    }
    return content, {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }


def _digest(content: bytes, kind: str) -> str:
    """What a policy calls the content of the page's one element of a kind."""
    (inner,) = re.findall(rf"<{kind}>(.*?)</{kind}>".encode(), content, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(inner).digest()).decode()}'"
