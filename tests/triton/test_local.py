"""Requests between the two models' processes."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.runtime.test_continuous import wait_for
from trio_deploy.triton import local


@pytest.fixture
def name() -> str:
    return f"model_{uuid.uuid4().hex}"


@pytest.fixture
def serve(name: str) -> Iterator[Callable[..., Any]]:
    servers = []

    def serve(take: Callable[[Any, Any], None]) -> Any:
        servers.append(local.LocalServer(name, take))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def asked(name: str, turn: int = 0, **tensors: np.ndarray) -> Any:
    with local.connect(name, turn) as connection:
        connection.send(local.Ask(tensors, "{}", 0))
        return connection.recv()


def test_a_request_gets_its_reply_whatever_its_size(name, serve) -> None:
    serve(lambda sender, ask: sender.send({"twice": ask.tensors["x"] * 2}, last=True))
    for size in (0, 1, 3_000_000):
        x = np.random.default_rng(size).standard_normal(size)
        np.testing.assert_array_equal(asked(name, x=x).outputs["twice"], x * 2)
    files = np.array([b"\0\xff", b"", bytes(2**20)], np.object_)
    serve_bytes = asked(name, x=files).outputs["twice"]
    assert serve_bytes.tolist() == [data * 2 for data in files.tolist()]


def test_many_at_once_get_each_their_own(name, serve) -> None:
    def take(sender: Any, ask: Any) -> None:
        threading.Timer(0.01, sender.send, ({"y": ask.tensors["x"]},), {"last": True}).start()

    serve(take)
    replies: dict[int, int] = {}

    def one(number: int) -> None:
        replies[number] = asked(name, x=np.array(number)).outputs["y"].item()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {number: number for number in range(64)}


def test_errors_keep_their_code_and_a_failure_is_one(name, serve) -> None:
    serve(lambda sender, ask: sender.fail("too much", "INVALID_ARG"))
    reply = asked(name)
    assert (reply.error, reply.code) == ("too much", "INVALID_ARG")
    name = f"{name}_broken"

    def fails(sender: Any, ask: Any) -> None:
        raise ValueError("oh")

    server = local.LocalServer(name, fails)
    try:
        reply = asked(name)
        assert "oh" in reply.error and reply.code == "INTERNAL"
    finally:
        server.close()


def test_hanging_up_cancels(name, serve) -> None:
    senders = []
    serve(lambda sender, ask: senders.append(sender))
    with local.connect(name, 0) as connection:
        connection.send(local.Ask({}, "{}", 0))
        wait_for(lambda: senders)
        assert not senders[0].is_cancelled()
    wait_for(senders[0].is_cancelled)
    senders[0].fail("cancelled", "CANCELLED")
    senders[0].send({}, last=True)  # after the last: nothing goes out, nothing breaks


def test_instances_take_turns_and_what_is_closed_is_not_asked(name, serve) -> None:
    def answers(number: int) -> Callable[[Any, Any], None]:
        return lambda sender, ask: sender.send({"n": np.array(number)}, last=True)

    first, _ = serve(answers(0)), serve(answers(1))
    got = [asked(name, turn).outputs["n"].item() for turn in range(4)]
    assert got == [0, 1, 0, 1]
    open_still = local.connect(name, 0)  # it has the name of what took it
    asked(name, 0)  # so that the one before it has been accepted
    first.close()
    assert [asked(name, turn).outputs["n"].item() for turn in range(2)] == [1, 1]
    open_still.close()
    with pytest.raises(ConnectionRefusedError, match="nobody is not there"):
        local.connect("nobody", 0)


def test_another_user_is_neither_asked_nor_answered(name, serve, monkeypatch) -> None:
    taken = []
    serve(lambda sender, ask: taken.append(ask))
    monkeypatch.setattr(local.os, "geteuid", lambda: 12345)
    with pytest.raises(PermissionError, match="another user"):
        local.connect(name, 0)
    monkeypatch.setattr(local, "_check_peer", lambda connection: None)
    connection = local.connect(name, 0)
    monkeypatch.undo()
    connection.close()
    assert not taken


def test_a_caller_that_says_nothing_or_nonsense_disturbs_nobody(name, serve) -> None:
    serve(lambda sender, ask: sender.send({"x": ask.tensors["x"]}, last=True))
    silent = local.connect(name, 0)
    with local.connect(name, 0):
        pass
    with local.connect(name, 0) as connection:
        connection.send_bytes(b"no pickle")
        assert connection.recv().code == "INTERNAL"
    assert asked(name, x=np.ones(1)).outputs["x"] == 1
    silent.close()
