"""The type of the fixture `exported`."""

from __future__ import annotations

from collections.abc import Callable

from trio_deploy import Bundle

Export = Callable[..., Bundle]
