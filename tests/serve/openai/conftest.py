"""Servers for the tests of this folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.http_server import HttpServer
from trio_deploy import Pipeline


@pytest.fixture
def pipeline(bundles: Bundles) -> Pipeline:
    """The shipped model without end tokens: answers are as long as they may be."""
    return opened(bundles)


@pytest.fixture
def start(pipeline: Pipeline) -> Iterator[Callable[..., HttpServer]]:
    """Starts servers, which end with the test."""
    servers: list[HttpServer] = []

    def make(*given: Any, **named: Any) -> HttpServer:
        servers.append(HttpServer(*(given or (pipeline,)), **named))
        return servers[-1]

    yield make
    for server in servers:
        server.close()


@pytest.fixture
def server(start: Callable[..., HttpServer]) -> HttpServer:
    """A server with the default limits."""
    return start()
