"""Clients that leave, dawdle, flood or lie harm no other: rows and bytes are free again."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import pytest

from tests.support.batching import Gate, expire
from tests.support.http_server import QUESTION, HttpServer, Reply, chat, read_reply, request
from tests.support.tensors import file
from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import Pipeline, Request, TrioError
from trio_deploy.pipeline.batch import DecodeBatch
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.serve.admission import Admission
from trio_deploy.serve.fetch import ImageHosts
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.openai import process
from trio_deploy.serve.openai.errors import ApiError
from trio_deploy.serve.openai.gate import Doors, HeldBytes, digest_of
from trio_deploy.serve.openai.process import bind
from trio_deploy.serve.requests import ClientRequest

Start = Callable[..., HttpServer]
LONG = {"max_tokens": 600}
CHAT = "/v1/chat/completions"
CHUNKED = request("POST", CHAT, b"", transfer_encoding="chunked", content_length="")


def right(server: HttpServer) -> bool:
    """Whether it still answers."""
    return server.post(CHAT, chat(max_tokens=2)).status == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_before_its_prefill_is_not_answered(
    pipeline: Pipeline, server: HttpServer, monkeypatch: pytest.MonkeyPatch, stream: bool
) -> None:
    gate = Gate(pipeline, monkeypatch)
    with server.connection() as first, server.connection() as second:
        first.sendall(request("POST", CHAT, chat(stream=stream, **LONG)))
        gate.held()
        second.sendall(request("POST", CHAT, chat(stream=stream, **LONG)))
        wait_for(lambda: server.service.metrics().queued == 1)
    gate.open.set()
    wait_for(lambda: server.service.metrics().outcomes == {"cancelled": 2})
    server.wait_until_idle()
    assert right(server)


@pytest.mark.parametrize("fields", [{}, {"n": 3, "temperature": 1.0}], ids=["one", "several"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_while_it_is_answered_frees_its_rows(
    server: HttpServer, stream: bool, fields: dict[str, Any]
) -> None:
    with server.connection() as connection:
        connection.sendall(request("POST", CHAT, chat(stream=stream, **LONG, **fields)))
        if stream:
            reply = Reply()
            while b"content" not in reply.content.partition(b"assistant")[2]:
                reply.feed(connection.recv(4096))
        wait_for(lambda: server.service.metrics().active == fields.get("n", 1))
    wait_for(lambda: server.service.metrics().outcomes == {"cancelled": fields.get("n", 1)})
    server.wait_until_idle()


def test_one_of_several_answers_that_fails_ends_the_others(
    server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(batch: DecodeBatch) -> Any:
        raise RuntimeError("secret of the server's")

    monkeypatch.setattr(DecodeBatch, "step", broken)
    reply = server.post(CHAT, chat(n=3, temperature=1.0), x_request_id="mine")
    assert reply.status == 500 and reply.headers["x-request-id"] == "mine"
    assert "secret" not in reply.content.decode() and "mine" in reply.error["message"]
    streamed = server.post(CHAT, chat(stream=True))
    assert streamed.status == 200  # there was a token before
    assert streamed.events[-1]["error"]["type"] == "server_error"
    assert "secret" not in streamed.content.decode()
    monkeypatch.undo()
    server.wait_until_idle()
    assert right(server)


def test_a_deadline_ends_an_answer_or_is_a_status(
    pipeline: Pipeline, server: HttpServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    with server.connection() as connection:
        connection.sendall(request("POST", CHAT, chat(**LONG)))
        wait_for(lambda: server.service.metrics().active == 1)
        expire(server.service._batcher)
        (choice,) = read_reply(connection).json()["choices"]
    assert (choice["finish_reason"], choice["trio"]["finish_reason"]) == ("length", "deadline")
    gate = Gate(pipeline, monkeypatch)
    with server.connection() as first:
        first.sendall(request("POST", CHAT, chat(max_tokens=2)))
        gate.held()
        late = chat(trio={"timeout_s": 0.01}, stream=True)
        with server.connection() as second:
            second.sendall(request("POST", CHAT, late))
            wait_for(lambda: server.service.metrics().queued == 1)
            gate.open.set()
            reply = read_reply(second)
        assert (reply.status, reply.error["code"]) == (504, "deadline_passed")


def test_a_stream_that_waits_shows_that_it_lives(
    pipeline: Pipeline, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start(settings={"first_s": "0.05"})
    gate = Gate(pipeline, monkeypatch)
    with server.connection() as connection:
        connection.sendall(request("POST", CHAT, chat(stream=True, max_tokens=2)))
        reply = Reply()
        while b": waiting" not in reply.content:
            reply.feed(connection.recv(4096))
        assert reply.status == 200
        assert reply.events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
        gate.open.set()
        while not reply.complete:
            reply.feed(connection.recv(4096))
    assert reply.events[-1] == "[DONE]" and reply.content.count(b'"assistant"') == 1


def test_bodies_beyond_the_limit_are_refused_with_a_length_and_without(start: Start) -> None:
    server = start(settings={"max_body_bytes": "5000"})
    large = b" " * 5001
    assert server.post(CHAT, large).status == 413
    assert server.post(CHAT, b"{}", content_length=str(10**15)).status == 413
    with server.connection() as connection:
        connection.sendall(CHUNKED)
        connection.sendall(b"1389\r\n" + large + b"\r\n")
        reply = read_reply(connection)
    assert (reply.status, reply.error["code"]) == (413, "request_too_large")
    assert server.service.metrics().outcomes == {"invalid": 3}


def test_a_body_that_could_never_be_held_is_told_so_and_not_to_try_again(start: Start) -> None:
    server = start(settings={"max_queue_bytes": "3000"})
    reply = server.post(CHAT, b" " * 1001)
    assert (reply.status, "retry-after" in reply.headers) == (413, False)
    assert "max_queue_bytes" in reply.error["message"]


def test_what_could_never_be_answered_is_told_so_and_not_to_try_again(start: Start) -> None:
    """A client that is told to try again would do so for ever."""
    server = start(settings={"max_queue": "2"})
    too_many = server.post(CHAT, chat(n=3, temperature=1.0))
    assert (too_many.status, too_many.error["param"]) == (400, "n")
    assert "max_queue" in too_many.error["message"] and "retry-after" not in too_many.headers
    alone = ClientRequest(prompt=QUESTION.encode(), images=[file()])
    admission = Admission(ServiceLimits(), server.served.pipeline.bundle.config)
    need = admission.admit(alone, Request(QUESTION, [file()]))
    server = start(settings={"max_queue_bytes": str(3 * need)})
    assert server.post(CHAT, chat(n=2, temperature=1.0, max_tokens=1)).status == 200
    server.wait_until_idle()
    together = server.post(CHAT, chat(n=4, temperature=1.0, max_tokens=1))
    assert together.status == 400 and "4 times" in together.error["message"]
    assert "retry-after" not in together.headers
    hosts = ImageHosts.parse(["http://images.example.com"])
    server = start(settings={"max_queue_bytes": "100000"}, images=hosts)
    address = {"type": "image_url", "image_url": {"url": "http://images.example.com/a.png"}}
    fetched = server.post(CHAT, {"messages": [{"role": "user", "content": [address]}]})
    assert fetched.status == 400 and "max_queue_bytes" in fetched.error["message"]


def test_pictures_whose_tokens_are_asked_for_count_as_those_of_answers(start: Start) -> None:
    server = start(settings={"max_queue_bytes": "100000"})
    body = {"messages": chat()["messages"]}
    reply = server.post("/tokenize", body)
    assert reply.status == 400 and "max_queue_bytes" in reply.error["message"]
    assert server.post("/tokenize", {"prompt": "red"}).status == 200
    assert server.idle()


def test_a_body_in_pieces_is_read_as_one_with_a_length(server: HttpServer) -> None:
    content = request("POST", CHAT, chat(max_tokens=2)).partition(b"\r\n\r\n")[2]
    with server.connection() as connection:
        connection.sendall(CHUNKED)
        for part in (content[:10], content[10:]):
            connection.sendall(b"%x\r\n" % len(part) + part + b"\r\n")
        connection.sendall(b"0\r\n\r\n")
        assert read_reply(connection).status == 200


def test_bodies_that_are_read_together_are_bounded(start: Start) -> None:
    server = start(settings={"max_queue_bytes": "3000000"})

    def refused() -> bool:
        reply = server.post(CHAT, b" " * 200_000)
        return reply.status == 429 and reply.headers["retry-after"] == "1"

    def refused_beside_another() -> bool:
        with server.connection() as slow:
            slow.sendall(request("POST", CHAT, b" " * 800_000, content_length="900000"))
            return refused()  # unless it came before the other was read

    wait_for(refused_beside_another)
    wait_for(lambda: not refused())


def test_a_body_that_was_announced_and_does_not_come_takes_nothing_from_others(
    start: Start,
) -> None:
    server = start(settings={"max_queue_bytes": "3000000"})
    asked = b" " * 200_000 + request("POST", CHAT, chat(max_tokens=2)).partition(b"\r\n\r\n")[2]
    with server.connection() as slow:
        slow.sendall(request("POST", CHAT, b" " * 1000, content_length="900000"))
        for _ in range(3):
            assert server.post(CHAT, asked).status == 200


def test_bodies_that_take_much_leave_room_for_those_that_take_little() -> None:
    held, clients = HeldBytes(1000), [0] * 9
    held.take(900)  # one alone may have it all
    held.release(900)
    for _ in range(100):
        for number, taken in enumerate(clients):
            with suppress(Refused):
                held.take(10, held=taken)
                clients[number] += 10
    assert held.used == sum(clients) and max(clients) <= 1000 - held.used
    held.take(50)
    with pytest.raises(Refused, match="send less"):
        held.take(1000 - held.used)
    held.take(1000 - held.used, leaves_room=False)  # pictures at addresses, counted beforehand
    with pytest.raises(Refused):
        held.take(1, leaves_room=False)
    with pytest.raises(ApiError, match="max_queue_bytes"):
        held.take(1, held=1000)


def test_a_head_that_does_not_end_is_cut_off(start: Start) -> None:
    server = start(settings={"head_s": "0.2"})
    with server.connection() as silent, server.connection() as slow:
        slow.sendall(b"POST / HTTP/1.1\r\nhost: 127.0.0.1\r\nx-a: ")
        for connection in (silent, slow):
            with pytest.raises(ConnectionResetError):
                assert connection.recv(1) == b""
                raise ConnectionResetError  # the system may tell either
    with server.connection() as kept:  # a second request on the same connection
        asked = request("GET", "/health", connection="keep-alive")
        kept.sendall(asked)
        assert read_reply(kept).status == 200
        kept.sendall(asked[:10])
        with pytest.raises(ConnectionResetError):
            assert kept.recv(1) == b""
            raise ConnectionResetError


def test_a_head_that_is_too_large_is_refused_before_it_is_whole(server: HttpServer) -> None:
    with server.connection() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nhost: 127.0.0.1\r\n")
        with pytest.raises(ConnectionError):
            for _ in range(1000):  # which is more than the system holds back
                connection.sendall(b"x-a: " + b"y" * 60_000 + b"\r\n")
    with server.connection() as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nx-a: " + b"y" * 66_000)
        reply = read_reply(connection)
    assert reply.status == 431 and "65536" in reply.error["message"]
    assert server.ask("GET", "/health", x_a="y" * 60_000).status == 200


@pytest.mark.parametrize("ended", [False, True], ids=["line break", "body of a refused request"])
def test_bytes_that_begin_no_request_keep_no_connection_open(
    start: Start, monkeypatch: pytest.MonkeyPatch, ended: bool
) -> None:
    monkeypatch.setattr(process, "_KEEP_ALIVE_S", 0.2)
    server = start()
    with server.connection() as idle:
        if ended:
            idle.sendall(request("POST", CHAT, b"{", content_length="2", content_type="text/plain",
                                 connection="keep-alive"))  # fmt: skip
        else:
            idle.sendall(request("GET", "/health", connection="keep-alive"))
        assert read_reply(idle).status == (415 if ended else 200)
        idle.sendall(b"}" if ended else b"\r\n")
        assert idle.recv(1) == b""


def test_requests_in_a_row_on_a_connection_that_is_lost_all_end(server: HttpServer) -> None:
    with server.connection() as connection:
        asked = request("POST", CHAT, chat(**LONG), connection="keep-alive")
        connection.sendall(asked + asked)
        wait_for(lambda: server.service.metrics().active == 1)
    server.wait_until_idle()
    assert server.service.metrics().outcomes == {"cancelled": 1}


def test_a_body_that_does_not_come_is_told_so(start: Start) -> None:
    server = start(settings={"body_s": "0.2"})
    with server.connection() as connection:
        connection.sendall(request("POST", CHAT, b"{", content_length="100"))
        reply = read_reply(connection)
    assert (reply.status, reply.error["code"]) == (408, "request_timeout")
    assert right(server)


def test_a_client_that_leaves_in_the_middle_of_its_body_is_nothing(server: HttpServer) -> None:
    with server.connection() as connection:
        connection.sendall(request("POST", CHAT, b"{", content_length="100"))
    assert right(server)
    server.wait_until_idle()


def test_a_reader_that_does_not_read_is_cut_off_and_frees_its_row(start: Start) -> None:
    server = start(settings={"send_s": "0.3"}, send_buffer=4096)
    body = chat("what is red ?", stream=True, logprobs=True, top_logprobs=20, max_tokens=700)
    with socket.socket() as stalled:
        stalled.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        stalled.connect(server.address)
        stalled.settimeout(WAIT_S)
        stalled.sendall(request("POST", CHAT, body))
        wait_for(lambda: server.service.metrics().outcomes == {"cancelled": 1})
    server.wait_until_idle()
    wait_for(lambda: not server.server.server_state.connections)


def test_connections_beyond_the_limit_are_refused_but_probes_are_not(start: Start) -> None:
    server = start(settings={"max_connections": "2"})
    with server.connection() as early, server.connection():
        wait_for(lambda: len(server.server.server_state.connections) == 2)
        reply = server.post(CHAT, chat())
        assert (reply.status, reply.error["type"]) == (429, "rate_limit_error")
        assert server.ask("GET", "/health").status == 200
        with server.connection():  # those within the limit lose nothing by it
            wait_for(lambda: len(server.server.server_state.connections) == 3)
            early.sendall(request("POST", CHAT, chat(max_tokens=2)))
            assert read_reply(early).status == 200
    wait_for(lambda: not server.server.server_state.connections)
    assert right(server)


def test_what_is_sent_does_not_wait_for_acknowledgements() -> None:
    """The kernel would keep small writes back until the client has acknowledged those before."""

    async def sends_at_once() -> bool:
        flags: asyncio.Queue[int] = asyncio.Queue()

        class Asked(asyncio.Protocol):
            def connection_made(self, transport: asyncio.BaseTransport) -> None:
                connection = transport.get_extra_info("socket")
                flags.put_nowait(connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))

        with bind("127.0.0.1", 0) as listener:
            server = await asyncio.get_running_loop().create_server(Asked, sock=listener)
            async with server:
                _, writer = await asyncio.open_connection(*listener.getsockname())
                try:
                    return bool(await asyncio.wait_for(flags.get(), WAIT_S))
                finally:
                    writer.close()

    assert asyncio.run(sends_at_once())


def test_who_may_ask_is_who_has_a_key(start: Start) -> None:
    server = start(doors=Doors([digest_of("one"), digest_of("two")]))
    for path in (CHAT, "/v1/models", "/tokenize", "/metrics", "/openapi.json", "/nothing"):
        method = "POST" if path in (CHAT, "/tokenize") else "GET"
        for headers in ({}, {"authorization": "Bearer three"}, {"authorization": "Basic one"}):
            reply = server.ask(method, path, b"{}", **headers)
            assert (reply.status, reply.error["code"]) == (401, "invalid_api_key")
            assert reply.headers["www-authenticate"] == "Bearer"
    for key in ("one", "two"):
        assert server.ask("GET", "/v1/models", authorization=f"Bearer {key}").status == 200
    assert server.ask("GET", "/ready").status == 200


def test_a_name_that_is_not_ours_is_refused(start: Start) -> None:
    server = start(doors=Doors(hosts={"models.example.com"}))

    def status(host: str) -> int:
        return server.ask("GET", "/v1/models", host=host).status

    good = ("models.example.com", "Models.example.com:80", "localhost:1", "127.0.0.1", "[::1]:2")
    assert [status(host) for host in good] == [200] * len(good)
    bad = (
        "evil.com",
        "models.example.com.evil.com",
        "xmodels.example.com",
        "10.0.0.1",
        "localhost.",
    )
    assert [status(host) for host in bad] == [400] * len(bad)
    assert server.ask("GET", "/health", host="10.0.0.1").status == 200
    one_port = start(doors=Doors(hosts={"models.example.com:8000"}))
    for host, expected in (
        ("models.example.com:8000", 200),
        ("Models.example.com:8000", 200),
        ("models.example.com:8001", 400),
        ("models.example.com", 400),
    ):
        assert one_port.ask("GET", "/v1/models", host=host).status == expected
    anywhere = start(doors=Doors(hosts={"0.0.0.0"}, any_address=True))
    assert anywhere.ask("GET", "/v1/models", host="10.0.0.1:80").status == 200
    assert anywhere.ask("GET", "/v1/models", host="evil.com").status == 400


def test_other_types_methods_and_paths_have_their_status(server: HttpServer) -> None:
    plain = server.post(CHAT, b"{}", content_type="text/plain")
    assert (plain.status, plain.error["code"]) == (415, "unsupported_media_type")
    assert (
        server.post(CHAT, chat(max_tokens=1), content_type="application/json; charset=utf-8").status
        == 200
    )
    wrong = server.ask("GET", CHAT)
    assert (wrong.status, wrong.headers["allow"]) == (405, "POST")
    assert server.ask("GET", "/v1/chat").error["code"] == "not_found"
    assert server.post("/v1/completions", {}).error["code"] == "unsupported_route"
    with server.connection() as connection:
        connection.sendall(b"nonsense\r\n\r\n")
        assert read_reply(connection).error["code"] == "invalid_http"


def test_the_id_of_a_request_is_its_own_or_a_new_one(server: HttpServer) -> None:
    assert server.ask("GET", "/ready", x_request_id="a.B-9_").headers["x-request-id"] == "a.B-9_"
    for given in ("", "a b", "x" * 129, "é"):
        made = server.ask("GET", "/ready", x_request_id=given).headers["x-request-id"]
        assert made.startswith("req-") and made != given


def test_health_tells_that_the_threads_have_ended(server: HttpServer) -> None:
    assert server.ask("GET", "/health").json() == {"status": "ok"}
    server.service.close(timeout=0.0)
    assert server.ask("GET", "/health").status == server.ask("GET", "/ready").status == 503


def test_answers_that_run_are_finished_when_the_server_ends(
    pipeline: Pipeline, start: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    gate = Gate(pipeline, monkeypatch)
    with server.connection() as running:
        running.sendall(request("POST", CHAT, chat(stream=True, max_tokens=5)))
        gate.held()
        server.served.life.draining = True  # while it still listens
        assert server.ask("GET", "/ready").status == 503
        assert server.ask("GET", "/health").status == 200
        refused = server.post(CHAT, chat())
        assert (refused.status, refused.headers["retry-after"]) == (503, "1")
        server.server.drain()
        gate.open.set()
        assert read_reply(running).events[-1] == "[DONE]"
    wait_for(lambda: not server.running)


def test_metrics_are_text_that_prometheus_reads(server: HttpServer) -> None:
    assert right(server)
    reply = server.ask("GET", "/metrics")
    assert reply.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert b'trio_request_success_total{finished_reason="length"} 1\n' in reply.content
    assert b"trio_generation_tokens_total 2\n" in reply.content
    assert b"trio_visual_tokens_total 256\n" in reply.content


def test_errors_of_the_service_are_counted_once(server: HttpServer) -> None:
    server.post(CHAT, b"{")
    server.post(CHAT, chat("what ?", b"no picture"))
    server.post(CHAT, chat("word " * 4000))
    assert server.service.metrics().outcomes == {"invalid": 3}


def test_an_address_that_is_taken_is_told_before_a_model_is_loaded(server: HttpServer) -> None:
    with pytest.raises(TrioError, match="cannot listen at 127.0.0.1"):
        bind(*server.address)
    with pytest.raises(TrioError, match="cannot listen at no.such.host.invalid"):
        bind("no.such.host.invalid", 0)
