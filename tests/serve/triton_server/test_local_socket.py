"""Requests between the two models' processes."""

from __future__ import annotations

import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest

from tests.support.waiting import wait_for
from trio_deploy.serve.triton_server import local_socket
from trio_deploy.serve.triton_server.local_socket import InferRequest, LocalClient, LocalServer


@pytest.fixture
def name() -> str:
    return f"model_{uuid.uuid4().hex}"


@pytest.fixture
def serve(name: str) -> Iterator[Callable[..., LocalServer]]:
    servers = []

    def serve(take: Callable[[Any, InferRequest], None]) -> LocalServer:
        servers.append(LocalServer(name, take))
        return servers[-1]

    yield serve
    for server in servers:
        server.close()


def asked(client: LocalClient, **tensors: np.ndarray) -> local_socket.Reply:
    return client.infer(InferRequest(tensors, "{}", 0), lambda: False)


def answers(**outputs: np.ndarray) -> Callable[[Any, InferRequest], None]:
    return lambda sender, request: sender.send(outputs, last=True)


def test_a_request_arrives_and_gets_its_reply_whatever_its_arrays(name, serve) -> None:
    taken = []

    def take(sender: Any, request: InferRequest) -> None:
        taken.append(request)
        sender.send({"text": np.array([b"partly"], np.object_)}, last=False)
        sender.send(request.tensors, last=True)

    serve(take)
    client = LocalClient(name)
    arrays: list[Any] = [np.zeros((0, 3), np.float32), np.array(2**40), np.ones((2, 3), np.int32)]
    arrays += [np.random.default_rng(0).standard_normal(3_000_000), np.array([True, False])]
    arrays += [np.array(v, np.object_) for v in ([b"\0\xff", b"", bytes(2**20)], [[b"a"], [b"b"]])]
    sent = {str(number): array for number, array in enumerate(arrays)}
    reply = client.infer(InferRequest(sent, '{"stream": false}', 1234), lambda: False)
    assert (taken[0].parameters, taken[0].timeout_us) == ('{"stream": false}', 1234)
    assert not reply.error and reply.outputs.keys() == sent.keys()
    for key, array in sent.items():
        assert reply.outputs[key].dtype == array.dtype
        np.testing.assert_array_equal(reply.outputs[key], array, strict=True)


def test_many_at_once_get_each_their_own(name, serve) -> None:
    def take(sender: Any, request: InferRequest) -> None:
        threading.Timer(0.01, sender.send, ({"y": request.tensors["x"]},), {"last": True}).start()

    serve(take)
    client, replies = LocalClient(name), {}

    def one(number: int) -> None:
        replies[number] = asked(client, x=np.array(number)).outputs["y"].item()

    threads = [threading.Thread(target=one, args=(number,)) for number in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert replies == {number: number for number in range(64)}


def test_errors_keep_their_code_and_a_failure_is_one(name, serve) -> None:
    def take(sender: Any, request: InferRequest) -> None:
        if not request.tensors:
            sender.fail("too much", "INVALID_ARG")
        raise ValueError("oh")

    serve(take)
    reply = asked(LocalClient(name))
    assert (reply.error, reply.code) == ("too much", "INVALID_ARG")
    reply = asked(LocalClient(name), x=np.ones(1))
    assert "oh" in reply.error and reply.code == "INTERNAL"


def test_what_is_cancelled_is_given_up_on_both_sides(name, serve) -> None:
    senders: list[Any] = []
    serve(lambda sender, request: senders.append(sender))
    reply = LocalClient(name).infer(InferRequest({}, "{}", 0), lambda: bool(senders))
    assert reply.code == "CANCELLED"
    wait_for(senders[0].is_cancelled)
    senders[0].fail("cancelled", "CANCELLED")
    senders[0].send({}, last=True)  # after the last: nothing goes out, nothing breaks
    assert not senders[0].is_cancelled()


def test_one_that_is_not_cancelled_is_not_taken_for_it(name, serve) -> None:
    seen = []

    def take(sender: Any, request: InferRequest) -> None:
        seen.extend(sender.is_cancelled() for _ in range(100))
        sender.send({}, last=True)

    serve(take)
    asked(LocalClient(name))
    assert seen == [False] * 100


def test_instances_take_turns_and_what_is_closed_is_not_asked(name, serve) -> None:
    senders: list[Any] = []

    def first(sender: Any, request: InferRequest) -> None:
        if request.tensors:  # stays open, and keeps the name of what took it
            senders.append(sender)
        else:
            sender.send({"n": np.array(0)}, last=True)

    servers = {0: serve(first), 1: serve(answers(n=np.array(1)))}
    client = LocalClient(name)
    got = [asked(client).outputs["n"].item() for _ in range(4)]
    assert sorted(got[:2]) == [0, 1] and got[2:] == got[:2]
    waiting = [
        threading.Thread(target=lambda: asked(LocalClient(name), x=np.ones(1))) for _ in range(2)
    ]
    for thread in waiting:  # the name that sorts first; if that is the other one, it answers
        thread.start()
    servers[0].close()
    assert [asked(client).outputs["n"].item() for _ in range(3)] == [1, 1, 1]
    for sender in senders:
        sender.send({}, last=True)
    for thread in waiting:
        thread.join()
    with pytest.raises(ConnectionRefusedError, match="no instance of nobody"):
        asked(LocalClient("nobody"))


def test_a_new_instance_is_found_when_all_known_ones_are_gone(name, serve) -> None:
    client = LocalClient(name)
    for number in range(3):
        server = serve(answers(n=np.array(number)))
        assert asked(client).outputs["n"] == number
        server.close()


SQUATTER = """
import socket, sys, time
kind = getattr(socket, sys.argv[2])
with socket.socket(socket.AF_UNIX, kind) as s:
    s.bind(bytes.fromhex(sys.argv[1]))
    if kind == socket.SOCK_STREAM:
        s.listen()
    print("there", flush=True)
    time.sleep(60)
"""


def squat(address: bytes, kind: str = "SOCK_STREAM") -> subprocess.Popen:
    # Not a child of ours, as any process beside the server.
    command = [sys.executable, "-c", SQUATTER, address.hex(), kind]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None and process.stdout.readline() == b"there\n"
    return process


def test_sockets_of_others_are_passed_over(name, serve) -> None:
    """Whoever sees the names can make more of them; a child of ours is not one of the server's."""
    prefix = local_socket._prefix(name)
    others = [
        squat(prefix + b"0"),
        squat(prefix + b"1", "SOCK_DGRAM"),
        squat(b"\0caf\xe9 " + prefix),
    ]
    try:
        serve(answers(n=np.array(7)))
        client = LocalClient(name)
        assert [asked(client).outputs["n"].item() for _ in range(4)] == [7] * 4
    finally:
        for process in others:
            process.kill()
            process.wait()


def test_a_process_that_is_none_of_the_servers_is_not_served(name, serve) -> None:
    taken: list[InferRequest] = []
    serve(lambda sender, request: taken.append(request))
    (address,) = local_socket._instances(name)
    script = (
        "import socket, sys\ns = socket.socket(socket.AF_UNIX)\n"
        "s.connect(bytes.fromhex(sys.argv[1]))\n"
        "try:\n    print(s.recv(1))\nexcept ConnectionResetError:\n    print(b'')"
    )
    child = subprocess.run(
        [sys.executable, "-c", script, address.hex()], capture_output=True, text=True, timeout=30
    )
    assert child.stdout == "b''\n" and not taken


@pytest.mark.parametrize("peer", [(0, 0), (1, 12345)], ids=["other container", "other user"])
def test_whoever_is_not_of_this_user_and_machine_is_not_asked(
    name, serve, peer, monkeypatch
) -> None:
    serve(answers())

    class Credentials:
        size = local_socket._CREDENTIALS.size

        @staticmethod
        def unpack(data: bytes) -> tuple[int, int, int]:
            process, user, group = struct.unpack("3i", data)
            return process * peer[0], peer[1] or user, group

    monkeypatch.setattr(local_socket, "_CREDENTIALS", Credentials)
    with pytest.raises(ConnectionRefusedError, match="no instance"):
        asked(LocalClient(name))


@pytest.mark.parametrize(
    "message",
    [b"no json", b"{}", b'{"fields": {}, "arrays": [{"name": "x", "shape": [], "kind": "O"}]}'],
)
def test_a_caller_that_says_nothing_or_nonsense_disturbs_nobody(name, serve, message) -> None:
    serve(answers(x=np.ones(1)))
    (address,) = local_socket._instances(name)
    silent = local_socket._connect(address)
    with local_socket._connect(address):
        pass
    with local_socket._connect(address) as connection:
        connection.send_bytes(message)
        with pytest.raises((EOFError, OSError)):  # it may have hung up after the first
            connection.send_bytes(b"12345678")
            connection.recv_bytes()
    assert asked(LocalClient(name)).outputs["x"] == 1
    silent.close()


def test_an_instance_that_hangs_is_not_waited_for(name, serve, monkeypatch) -> None:
    monkeypatch.setattr(local_socket, "_TIMEOUT_S", 0.2)
    listening = local_socket._listen(name)
    with listening, pytest.raises(TimeoutError, match=r"received no request within 0\.2 s"):
        asked(LocalClient(name))
    senders: list[Any] = []  # kept, so that nothing hangs up
    serve(lambda sender, request: senders.append(sender))
    with pytest.raises(TimeoutError, match="no answer in time"):
        LocalClient(name).infer(InferRequest({}, "{}", 0), lambda: False, timeout_s=0.2)


def test_it_goes_on_after_a_request_that_could_not_be_taken(name, serve, monkeypatch) -> None:
    read, failures = (
        local_socket._read,
        [OSError(24, "Too many open files"), RuntimeError("no memory")],
    )

    def fail(connection: Any) -> Any:
        if failures:
            raise failures.pop()
        return read(connection)

    serve(answers(x=np.ones(1)))
    client = LocalClient(name)
    asked(client)
    monkeypatch.setattr(local_socket, "_read", fail)
    for _ in range(4):
        try:
            reply = asked(client)
        except (EOFError, OSError, RuntimeError):
            time.sleep(0.01)
    assert reply.outputs["x"] == 1


def test_a_machine_that_allows_no_socket_is_an_error_and_closing_twice_is_none(
    name, serve, monkeypatch
) -> None:
    server = serve(answers())
    server.close()

    def refuse(*given: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(socket, "socket", refuse)
    with pytest.raises(PermissionError):
        LocalServer(name, answers())
