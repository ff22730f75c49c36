"""Settings of the server: limits of the service, and of connections and bodies."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.serve.limits import ServiceLimits, parse_settings, setting_kinds

_DEFAULT_MAX_TOKENS = 512  # clients of this API take an answer that is cut for a fault


@dataclass(frozen=True)
class HttpLimits:
    """What the server takes of connections and bodies.

    Attributes:
        max_body_bytes: bytes of a request's body.
        max_connections: connections at a time; requests on others are refused.
        max_n: answers per request.
        head_s: seconds for the head of a request to come.
        body_s: seconds for the body of a request to come.
        first_s: seconds that a stream waits for its first token before it begins without, so that
            proxies and clients see that it is alive; what fails later has status 200.
        send_s: seconds that a reader may take nothing of what is sent to it.

    Raises:
        TrioError: a limit is not above 0.
    """

    max_body_bytes: int = 32 * 2**20
    max_connections: int = 512
    max_n: int = 8
    head_s: float = 10.0
    body_s: float = 30.0
    first_s: float = 10.0
    send_s: float = 30.0

    def __post_init__(self) -> None:
        for each in fields(self):
            value = getattr(self, each.name)
            if not (math.isfinite(value) and value > 0):
                raise TrioError(f"{each.name} must be above 0, got {value!r:.40}")


@dataclass(frozen=True)
class Settings:
    """All settings of a server.

    Attributes:
        service: what is accepted of requests.
        http: what is accepted of connections and bodies.
    """

    service: ServiceLimits = field(
        default_factory=lambda: ServiceLimits(default_max_tokens=_DEFAULT_MAX_TOKENS)
    )
    http: HttpLimits = field(default_factory=HttpLimits)

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> Settings:
        """Read settings by name, as `limits.read_settings` gives them.

        Raises:
            TrioError: an unknown name, a value that is not of its kind or out of range.
        """
        http = setting_kinds(HttpLimits)
        kinds = http | setting_kinds(ServiceLimits, BatcherLimits)
        values: dict[str, Any] = parse_settings(texts, kinds)
        longest = values.get("max_tokens", ServiceLimits.max_tokens)
        values.setdefault("default_max_tokens", min(_DEFAULT_MAX_TOKENS, longest))
        return cls(
            ServiceLimits.from_settings(values),
            HttpLimits(**{name: values[name] for name in http if name in values}),
        )
