"""The OpenAI-compatible server in a thread of the tests, on a free port of this machine."""

from __future__ import annotations

import base64
import contextlib
import json
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httptools
import msgspec

from tests.support.tensors import file
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline
from trio_deploy.serve.openai.app import Served, build_app
from trio_deploy.serve.openai.process import ProcessOptions, Server, bind
from trio_deploy.serve.openai.settings import Settings
from trio_deploy.serve.service import Service

NAME = "tiny"
QUESTION = "what color is the circle ?"


def data_uri(content: bytes) -> str:
    """A picture's file as a client sends it."""
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


def asking(question: str = QUESTION, *pictures: bytes) -> list[dict[str, Any]]:
    """Messages of a question about pictures."""
    parts: list[dict[str, Any]] = [
        {"type": "image_url", "image_url": {"url": data_uri(each)}} for each in pictures
    ]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": question}]}]


def chat(question: str = QUESTION, *pictures: bytes, **fields: Any) -> dict[str, Any]:
    """A body of /v1/chat/completions; one picture if none is given."""
    return {"model": NAME, "messages": asking(question, *(pictures or (file(),))), **fields}


class HttpServer:
    """A running server.

    Attributes:
        url: where it listens; `address`: the same for sockets.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        options: ProcessOptions | None = None,
        *,
        settings: dict[str, str] | None = None,
        send_buffer: int = 0,
        **served: Any,
    ) -> None:
        """Start; `settings` as texts by name, `served` are fields of `Served`.

        `send_buffer`: bytes that the system takes for a reader that does not read.
        """
        parsed = Settings.parse(settings or {})
        self.service = Service(pipeline, parsed.service, warm_up=False)
        self.served = Served(pipeline, self.service, NAME, parsed.http, **served)
        listener = bind("127.0.0.1", 0)
        if send_buffer:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.address: tuple[str, int] = listener.getsockname()
        self.url = "http://{}:{}".format(*self.address)
        listening = threading.Event()
        self.server = Server(
            self.served, build_app(self.served), options or ProcessOptions(), listening.set
        )
        self._thread = threading.Thread(target=self.server.run, args=([listener],), daemon=True)
        self._thread.start()
        assert listening.wait(WAIT_S)

    def close(self) -> None:
        """End it at once."""
        self.service.close(timeout=0.0)
        self.server.should_exit = self.server.force_exit = True
        self._thread.join(WAIT_S)

    @property
    def running(self) -> bool:
        """Whether its thread has not ended."""
        return self._thread.is_alive()

    def idle(self) -> bool:
        """Whether nothing waits, runs or is held."""
        metrics = self.service.metrics()
        running = metrics.prefilling + metrics.active
        return running == metrics.queued == self.service.used_bytes == 0

    def post(self, path: str, body: Any, **headers: str) -> Reply:
        """Post JSON, or bytes as they are, on a connection of its own."""
        return self.ask("POST", path, body, **headers)

    def ask(self, method: str, path: str, body: Any = None, **headers: str) -> Reply:
        """One request on a connection of its own."""
        with self.connection() as connection:
            connection.sendall(request(method, path, body, **headers))
            return read_reply(connection)

    @contextlib.contextmanager
    def connection(self) -> Iterator[socket.socket]:
        """A bare connection."""
        with socket.create_connection(self.address, timeout=WAIT_S) as connection:
            yield connection

    def wait_until_idle(self) -> None:
        """Wait until nothing waits, runs or is held."""
        wait_for(self.idle)


def request(method: str, path: str, body: Any = None, **headers: str) -> bytes:
    """The bytes of a request; headers as `content_type`."""
    content = body if isinstance(body, bytes) else b"" if body is None else _json(body)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    lines = {"host": "127.0.0.1", "connection": "close"}
    if body is not None:
        lines |= {"content-type": "application/json", "content-length": str(len(content))}
    lines |= named
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items() if value)
    return f"{method} {path} HTTP/1.1\r\n{head}\r\n".encode() + content


def _json(body: Any) -> bytes:
    return json.dumps(body).encode()


class Reply:
    """A response as httptools reads it."""

    def __init__(self) -> None:
        self.status = 0
        self.headers: dict[str, str] = {}
        self.content = b""
        self.complete = False
        self._parser = httptools.HttpResponseParser(self)

    def on_header(self, name: bytes, value: bytes) -> None:
        self.headers[name.decode().lower()] = value.decode()

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()

    def on_body(self, body: bytes) -> None:
        self.content += body

    def on_message_complete(self) -> None:
        self.complete = True

    def feed(self, data: bytes) -> None:
        """Read some bytes of it."""
        self._parser.feed_data(data)

    def json(self) -> Any:
        """The body as JSON."""
        return msgspec.json.decode(self.content)

    @property
    def error(self) -> dict[str, Any]:
        """The error that it tells, in OpenAI's form."""
        error = self.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    @property
    def events(self) -> list[Any]:
        """What came as server-sent events so far; comments are left out."""
        found = []
        for block in self.content.decode().split("\n\n"):
            if block.startswith("data: "):
                text = block.removeprefix("data: ")
                found.append(text if text == "[DONE]" else json.loads(text))
        return found


def read_reply(connection: socket.socket) -> Reply:
    """Read a response to its end, or to that of the connection."""
    reply = Reply()
    while not reply.complete and (data := connection.recv(65536)):
        reply.feed(data)
    return reply
