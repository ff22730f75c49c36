"""Clients that wear a server out, for `load_serve.py --attack`; ends after some seconds.

    python scripts/serve_attack.py PORT SECONDS

So many at a time, each again five seconds after the server has ended it:

- 200 send the head of a request, a byte per second;
- 50 announce a body of 30 MiB, and send a byte of it per second;
- 20 send a body of 64 MiB as fast as it is taken, half of them without saying how long it is;
- 100 ask for a page every second, and read nothing of it.

Prints what became of them, as JSON.
"""

from __future__ import annotations

import asyncio
import json
import socket
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable

HEADS, BODIES, LARGE, READERS = 200, 50, 20, 100
AGAIN_S = 5.0
MIB = 2**20
POST = (
    b"POST /v1/chat/completions HTTP/1.1\r\nhost: 127.0.0.1\r\ncontent-type: application/json\r\n"
)

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]
Attack = Callable[[int, Counter[str]], Awaitable[None]]


async def drip(streams: Streams, content: bytes) -> bytes:
    """Send bytes, one per second, until the server answers or ends it; the answer's first line."""
    reader, writer = streams
    line = asyncio.ensure_future(reader.readline())
    for at in range(len(content)):
        writer.write(content[at : at + 1])
        done, _ = await asyncio.wait([line], timeout=1.0)
        if done:
            break
    return await line


async def slow_head(port: int, told: Counter[str]) -> None:
    """A head that does not end."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    try:
        told[_status(await drip(streams, POST + b"x-a: " + b"a" * 3600))] += 1
    finally:
        streams[1].transport.abort()


async def slow_body(port: int, told: Counter[str]) -> None:
    """A body that was announced and does not come."""
    streams = await asyncio.open_connection("127.0.0.1", port)
    try:
        streams[1].write(POST + b"content-length: %d\r\n\r\n" % (30 * MIB))
        told[_status(await drip(streams, b" " * 3600))] += 1
    finally:
        streams[1].transport.abort()


async def large_body(port: int, told: Counter[str], *, known: bool) -> None:
    """A body that is too large."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        length = b"content-length: %d" % (64 * MIB) if known else b"transfer-encoding: chunked"
        writer.write(POST + length + b"\r\n\r\n")
        line = asyncio.ensure_future(reader.readline())
        part = b" " * MIB if known else b"%x\r\n" % MIB + b" " * MIB + b"\r\n"
        for _ in range(64):
            writer.write(part)
            await writer.drain()
            if line.done():
                break
        told[_status(await line)] += 1
    finally:
        writer.transport.abort()


async def stalled_reader(port: int, told: Counter[str]) -> None:
    """Requests whose answers nobody reads."""
    loop = asyncio.get_running_loop()
    with socket.socket() as reader:
        # Small segments, since by them the system of the server sizes what it takes in its place.
        reader.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        reader.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, 536)
        reader.setblocking(False)
        await loop.sock_connect(reader, ("127.0.0.1", port))
        try:
            while True:
                await loop.sock_sendall(
                    reader, b"GET /openapi.json HTTP/1.1\r\nhost: 127.0.0.1\r\n\r\n"
                )
                await asyncio.sleep(1.0)
        except OSError:
            told["cut"] += 1


def _status(line: bytes) -> str:
    return line.split()[1].decode() if line else "cut"


async def again(attack: Attack, port: int, told: Counter[str]) -> None:
    """Attack until cancelled."""
    while True:
        try:
            await attack(port, told)
        except OSError:
            told["cut"] += 1
        await asyncio.sleep(AGAIN_S)


async def run(port: int, seconds: float) -> dict[str, Counter[str]]:
    """Attack in all ways; what each way was told, by status, `cut` for a connection that ended."""

    async def of_known_length(port: int, told: Counter[str]) -> None:
        await large_body(port, told, known=True)

    async def in_pieces(port: int, told: Counter[str]) -> None:
        await large_body(port, told, known=False)

    ways: dict[str, tuple[int, Attack]] = {
        "slow heads": (HEADS, slow_head),
        "slow bodies": (BODIES, slow_body),
        "large bodies": (LARGE // 2, of_known_length),
        "large bodies of unknown length": (LARGE // 2, in_pieces),
        "stalled readers": (READERS, stalled_reader),
    }
    told = {name: Counter[str]() for name in ways}
    running = [
        asyncio.ensure_future(again(attack, port, told[name]))
        for name, (count, attack) in ways.items()
        for _ in range(count)
    ]
    await asyncio.sleep(seconds)
    for task in running:
        task.cancel()
    await asyncio.gather(*running, return_exceptions=True)
    return told


if __name__ == "__main__":
    found = asyncio.run(run(int(sys.argv[1]), float(sys.argv[2])))
    print(json.dumps({"told": found, "processor_s": time.process_time()}))
