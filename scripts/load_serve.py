"""Measure `trio serve` under closed-loop load beside the same batcher in this process.

    python scripts/load_serve.py [--clients 32] [--seconds 60] [--attack] [--out FOLDER]

Pictures and questions are those of `trio_deploy.evaluation.scenes`, in bodies of about 100 kB.
First the pipeline answers them one after another; its texts are what every answer is compared
with. Then, by turns, the batcher in this process and a server on loopback answer N clients, each
of which asks its next question when the answer to the last is complete. Half of them stream, and a
tenth of the questions is given up early, by closing the connection. After that one client alone
measures what HTTP adds to the time to the first token, and how soon a row is free whose client has
gone. With `--attack` a few clients are measured beside those of `serve_attack.py` as well.

The clients run in a process of their own on the same cores, and take some of their time. Hence
processor time is given, too: of the process that answers and of the clients, per whole answer.
Prints a table; `--out` adds serve.json and serve.md there. The exit status is 1 when an
answer was wrong or failed, or something is still held at the end.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import serve_attack

from trio_deploy import Bundle, Pipeline, Request, RuntimeOptions, export_model
from trio_deploy.bench.environment import load_average, machine, machine_text
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.batcher.events import Event, Handle
from trio_deploy.serve.limits import ServiceLimits, parse_settings, read_settings, setting_kinds
from trio_deploy.serve.requests import ClientRequest
from trio_deploy.serve.service import Service, switch_threads_often

SIDE = 160  # pixels; an uncompressed picture has 77 kB then
MAX_TOKENS = 32
LEAVES_EARLY = 10  # every so many questions
ENDLESS = 400  # tokens of an answer that its client leaves
HONEST = 8  # clients beside the attack


@dataclass(frozen=True)
class Case:
    """A question about a picture (PNG), the answer's text, and the body that asks for it."""

    picture: bytes
    question: str
    text: str = ""

    def body(self, **fields: Any) -> bytes:
        """A body of /v1/chat/completions."""
        url = "data:image/png;base64," + base64.b64encode(self.picture).decode()
        content = [
            {"type": "image_url", "image_url": {"url": url}},
            {"type": "text", "text": self.question},
        ]
        asked = {"messages": [{"role": "user", "content": content}], "temperature": 0}
        return json.dumps({**asked, "max_tokens": MAX_TOKENS, **fields}).encode()


@dataclass
class Answers:
    """Measurements of one turn; times in seconds.

    Attributes:
        processor_s, client_s: processor time of the process that answers and, where it is another
            one, of the clients.
    """

    seconds: float = 0.0
    processor_s: float = 0.0
    client_s: float = 0.0
    whole: int = 0
    left: int = 0
    wrong: int = 0
    first_token: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)
    memory_mib: list[float] = field(default_factory=list)

    @property
    def per_s(self) -> float:
        """Whole answers per second."""
        return self.whole / self.seconds


def per_answer_ms(turns: Sequence[Answers]) -> tuple[float, float]:
    """Processor time per whole answer: of what answers, and of the clients."""
    whole = sum(each.whole for each in turns)
    of = (sum(each.processor_s for each in turns), sum(each.client_s for each in turns))
    return 1e3 * of[0] / whole, 1e3 * of[1] / whole


def make_cases(count: int) -> list[Case]:
    """Questions about pictures that the tiny VLM was not trained on, two per picture."""
    cases = []
    for seed in itertools.islice(scenes.TEST_SEEDS, (count + 1) // 2):
        scene = scenes.generate(seed)
        content = io.BytesIO()
        scene.image.resize((SIDE, SIDE)).save(content, "PNG", compress_level=0)
        cases += [Case(content.getvalue(), each.text) for each in scene.questions[:2]]
    return cases[:count]


def messages(case: Case) -> list[dict[str, Any]]:
    """The conversation that a body asks about."""
    content = [{"type": "image"}, {"type": "text", "text": case.question}]
    return [{"role": "user", "content": content}]


def answered(pipeline: Pipeline, cases: Sequence[Case]) -> list[Case]:
    """The cases with the texts that the pipeline gives, one after another."""
    return [
        Case(
            case.picture,
            case.question,
            pipeline.generate(
                Request(messages(case), [case.picture], MAX_TOKENS, temperature=0.0)
            ).text,
        )
        for case in cases
    ]


# ------------------------------------------------------------------------------- in this process


def in_process(service: Service, cases: Sequence[Case], clients: int, seconds: float) -> Answers:
    """Let so many clients ask the service, each from the listener of its last answer."""
    result, turns, used = Answers(), itertools.count(), time.process_time()
    start = time.perf_counter()
    until, done = start + seconds, threading.Semaphore(0)

    def ask() -> None:
        if time.perf_counter() >= until:
            done.release()
            return
        number = next(turns)
        case, leaves, asked = (
            cases[number % len(cases)],
            number % LEAVES_EARLY == 1,
            time.perf_counter(),
        )
        client = ClientRequest(
            messages=json.dumps(messages(case)).encode(),
            images=[case.picture],
            max_tokens=MAX_TOKENS,
            temperature=0.0,
        )
        handles: list[Handle] = []
        first = True

        def on_event(event: Event) -> None:
            nonlocal first
            if first and event.token_id is not None:
                first = False
                result.first_token.append(time.perf_counter() - asked)
            if leaves and handles:  # the first token may be there before the handle is
                handles[0].cancel()
            if event.last:
                if event.generation is not None:
                    result.whole += not leaves
                    result.wrong += event.generation.text != case.text
                elif not leaves:
                    result.errors.append(str(event.error))
                result.left += leaves
                ask()

        handles.append(service.submit(client, on_event))

    for _ in range(clients):
        ask()
    for _ in range(clients):
        done.acquire()
    result.seconds = time.perf_counter() - start
    result.processor_s = time.process_time() - used
    return result


# ------------------------------------------------------------------------------------- by HTTP


class Server:
    """`trio serve` in a process of its own."""

    def __init__(self, bundle: Path, settings: Sequence[str], options: Sequence[str]) -> None:
        command = [sys.executable, "-m", "trio_deploy", "serve", str(bundle), "--port", "0"]
        sets = itertools.chain(*(("--set", each) for each in settings))
        self.process = subprocess.Popen(
            [*command, *options, *sets],
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        assert self.process.stdout is not None
        said = ""
        for line in self.process.stdout:
            said += line
            if "http://127.0.0.1:" in line:
                self.port = int(line.partition("http://127.0.0.1:")[2].split("/")[0].split()[0])
                break
        else:
            raise SystemExit(f"the server did not start: {said}")
        threading.Thread(target=self.process.stdout.read, daemon=True).start()

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *error: object) -> None:
        self.process.terminate()
        self.process.wait(60)

    def processor_s(self) -> float:
        """Processor time since its start."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def memory_mib(self) -> float:
        """Resident memory."""
        text = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(text.partition("VmRSS:")[2].split()[0]) / 1024


class Connection:
    """One kept connection of HTTP/1.1, with as little of a client as there can be."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._reader: asyncio.StreamReader | None = None

    async def send(self, body: bytes | None, path: str = "/v1/chat/completions") -> int:
        """Send a request; the status of the answer."""
        if self._reader is None:
            self._reader, self._writer = await asyncio.open_connection("127.0.0.1", self._port)
        head = f"{'GET' if body is None else 'POST'} {path} HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        if body is not None:
            head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n"
        self._writer.write(head.encode() + b"\r\n" + (body or b""))
        lines = (await self._reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
        self._headers = dict(line.lower().split(": ", 1) for line in lines[1:] if line)
        return int(lines[0].split()[1])

    async def chunks(self) -> Any:
        """The pieces of the answer's body."""
        assert self._reader is not None
        if "content-length" in self._headers:
            yield await self._reader.readexactly(int(self._headers["content-length"]))
            return
        while size := int((await self._reader.readline()).strip(), 16):
            yield (await self._reader.readexactly(size + 2))[:-2]
        await self._reader.readline()

    async def body(self) -> bytes:
        """The whole body."""
        return b"".join([chunk async for chunk in self.chunks()])

    def close(self) -> None:
        """Leave at once."""
        if self._reader is not None:
            self._writer.transport.abort()
        self._reader = None


def pieces_of(stream: bytes) -> Iterator[str]:
    """The texts of a stream's events.

    Raises:
        ValueError: the stream has an error, or no end.
    """
    events = [line[6:] for line in stream.decode().split("\n") if line.startswith("data: ")]
    if not events or events[-1] != "[DONE]":
        raise ValueError(f"the stream has no end: {stream[-200:]!r}")
    for event in map(json.loads, events[:-1]):
        for choice in event["choices"]:
            yield choice["delta"].get("content") or ""


async def one_client(
    server: Server, cases: Sequence[Case], bodies: dict[tuple[int, bool], bytes],
    turns: Iterator[int], until: float, result: Answers,
) -> None:  # fmt: skip
    """Ask until the time is over."""
    connection = Connection(server.port)
    while (asked := time.perf_counter()) < until:
        number = next(turns)
        at, streams, leaves = number % len(cases), number % 2 == 0, number % LEAVES_EARLY == 1
        streams |= leaves
        try:
            status = await connection.send(bodies[at, streams])
            if status != 200:
                raise ValueError(f"{status}: {(await connection.body())[:200]!r}")
            got = b""
            async for chunk in connection.chunks():
                if streams and not got:
                    result.first_token.append(time.perf_counter() - asked)
                got += chunk
                if leaves:
                    break
            if leaves:
                connection.close()
                result.left += 1
                continue
            if streams:
                text = "".join(pieces_of(got))
            else:
                text = json.loads(got)["choices"][0]["message"]["content"]
            result.whole += 1
            result.wrong += text != cases[at].text
        except Exception as error:  # every kind of failure is counted
            result.errors.append(f"{type(error).__name__}: {error}")
            connection.close()
            await asyncio.sleep(0.1)
    connection.close()


async def by_http(server: Server, cases: Sequence[Case], clients: int, seconds: float) -> Answers:
    """Let so many clients ask the server."""
    bodies = {
        (at, streams): case.body(stream=streams)
        for at, case in enumerate(cases)
        for streams in (False, True)
    }
    result, turns, start = Answers(), itertools.count(), time.perf_counter()
    server_used, used = server.processor_s(), time.process_time()
    asking = [
        asyncio.create_task(one_client(server, cases, bodies, turns, start + seconds, result))
        for _ in range(clients)
    ]
    while not all(task.done() for task in asking):
        result.memory_mib.append(server.memory_mib())
        await asyncio.wait(asking, timeout=1.0)
    await asyncio.gather(*asking)
    result.seconds = time.perf_counter() - start
    result.processor_s = server.processor_s() - server_used
    result.client_s = time.process_time() - used
    return result


async def gauges(server: Server) -> dict[str, float]:
    """The server's metrics without labels, by name."""
    connection = Connection(server.port)
    assert await connection.send(None, "/metrics") == 200
    lines = (await connection.body()).decode().splitlines()
    connection.close()
    return {
        name: float(value)
        for name, _, value in (line.rpartition(" ") for line in lines if line[:1] != "#")
    }


async def busy(server: Server) -> int:
    """Requests that run or wait."""
    found = await gauges(server)
    return int(found["trio_num_requests_running"] + found["trio_num_requests_waiting"])


async def leave(server: Server, case: Case, times: int) -> dict[str, float]:
    """Seconds until a row is free whose client has gone, and between two tokens."""
    freed, steps = [], []
    for _ in range(times):
        connection = Connection(server.port)
        body = case.body(stream=True, ignore_eos=True, max_tokens=ENDLESS)
        assert await connection.send(body) == 200
        stamps = []
        async for _ in connection.chunks():
            stamps.append(time.perf_counter())
            if len(stamps) == 12:
                break
        connection.close()
        gone = time.perf_counter()
        while await busy(server):
            assert time.perf_counter() - gone < 60
        freed.append(time.perf_counter() - gone)
        steps += [later - earlier for earlier, later in itertools.pairwise(stamps[2:])]
    return {
        "freed_ms": 1e3 * statistics.median(freed),
        "freed_most_ms": 1e3 * max(freed),
        "step_ms": 1e3 * statistics.median(steps),
    }


async def alone(
    server: Server, service: Service, cases: Sequence[Case], times: int
) -> dict[str, float]:
    """Seconds to the first token of one client by HTTP and in this process, by turns."""
    http, process = [], []
    connection = Connection(server.port)
    bodies = [case.body(stream=True) for case in cases[:times]]
    for case, body in zip(cases, bodies, strict=False):
        process += in_process_once(service, case)
        start = time.perf_counter()
        assert await connection.send(body) == 200
        first = 0.0
        async for _ in connection.chunks():
            first = first or time.perf_counter() - start
        http.append(first)
    connection.close()
    medians = statistics.median(http), statistics.median(process)
    return {
        "http_ms": 1e3 * medians[0],
        "process_ms": 1e3 * medians[1],
        "added_ms": 1e3 * statistics.median(a - b for a, b in zip(http, process, strict=True)),
    }


def in_process_once(service: Service, case: Case) -> list[float]:
    """Seconds to the first token."""
    client = ClientRequest(
        messages=json.dumps(messages(case)).encode(),
        images=[case.picture],
        max_tokens=MAX_TOKENS,
        temperature=0.0,
    )
    first: list[float] = []
    start = time.perf_counter()
    service.submit(client, lambda event: first.append(time.perf_counter() - start)).result(60)
    return first[:1]


# ------------------------------------------------------------------------------------- the whole


def measure(args: argparse.Namespace, bundle: Bundle, name: str, sets: list[str]) -> dict[str, Any]:
    """Figures with some settings, `threads` among them."""
    plain = [each for each in sets if not each.startswith("threads=")]
    threads = [each.partition("=")[2] for each in sets if each.startswith("threads=")]
    pipeline = Pipeline.open(bundle, RuntimeOptions(threads=int(threads[0]) if threads else None))
    cases = answered(pipeline, make_cases(args.cases))
    kinds = setting_kinds(ServiceLimits, type(ServiceLimits().batcher))
    values = parse_settings(read_settings(None, plain), kinds)
    turns: dict[str, list[Answers]] = {"process": [], "http": []}
    options = ["--threads", threads[0]] if threads else []
    with Server(bundle.path, plain, options) as server:
        service = Service(pipeline, ServiceLimits.from_settings(values))
        for turn in range(args.turns):
            seconds = args.seconds / args.turns
            for which in list(turns)[:: 1 if turn % 2 else -1]:
                if which == "process":
                    found = in_process(service, cases, args.clients, seconds)
                else:
                    found = asyncio.run(by_http(server, cases, args.clients, seconds))
                turns[which].append(found)
        held = asyncio.run(settle(server))
        one = asyncio.run(alone(server, service, cases, min(60, len(cases))))
        gone = asyncio.run(leave(server, cases[0], 10))
        service.close(timeout=0.0)
    memory = [mib for each in turns["http"] for mib in each.memory_mib]
    half = len(memory) // 2
    rate = {
        which: sum(a.whole for a in of) / sum(a.seconds for a in of) for which, of in turns.items()
    }
    every = [answers for of in turns.values() for answers in of]
    pairs = [
        http.per_s / own.per_s for http, own in zip(turns["http"], turns["process"], strict=True)
    ]
    server_ms, clients_ms = per_answer_ms(turns["http"])
    process_ms, _ = per_answer_ms(turns["process"])
    return {
        "name": name,
        "settings": sets,
        "http_per_s": rate["http"],
        "process_per_s": rate["process"],
        "ratio": statistics.median(pairs),
        "ratios": pairs,
        "server_ms": server_ms,
        "clients_ms": clients_ms,
        "process_ms": process_ms,
        "answers": sum(each.whole for each in turns["http"]),
        "left": sum(each.left for each in turns["http"]),
        "wrong": sum(each.wrong for each in every),
        "errors": sorted({text for each in every for text in each.errors}),
        "failed": sum(len(each.errors) for each in every),
        "held": held,
        "memory_growth": max(memory[half:]) / max(memory[:half]) - 1,
        "body_kb": len(cases[0].body()) / 1e3,
        "one_client": one,
        "gone": gone,
    }


def attacked(bundle: Bundle, cases: Sequence[Case], seconds: float) -> dict[str, Any]:
    """What a few clients get before, during and after an attack."""
    limits = ServiceLimits()
    with Server(bundle.path, [], []) as server:

        def served() -> Answers:
            return asyncio.run(by_http(server, cases, HONEST, seconds))

        asyncio.run(by_http(server, cases, HONEST, 2.0))
        before = served()
        command = [sys.executable, serve_attack.__file__, str(server.port), str(seconds + 2)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as attack:
            time.sleep(1.0)
            during = served()
            told = json.loads(attack.communicate()[0])
        after = served()
        held = asyncio.run(settle(server))
    turns = {"before": before, "during": during, "after": after}
    calm = (before.per_s + after.per_s) / 2
    return {
        "seconds": seconds,
        "per_s": {name: each.per_s for name, each in turns.items()},
        "ratio": during.per_s / calm,
        "server_ms": {name: per_answer_ms([each])[0] for name, each in turns.items()},
        "attack_cores": told["processor_s"] / (seconds + 2),
        "told": told["told"],
        "answers": during.whole,
        "wrong": sum(each.wrong for each in turns.values()),
        "failed": sum(len(each.errors) for each in turns.values()),
        "errors": sorted({text for each in turns.values() for text in each.errors}),
        "held": held,
        "memory_mib": {name: max(each.memory_mib) for name, each in turns.items()},
        "bound_mib": (limits.max_queue_bytes + limits.vision_cache_bytes) / 2**20,
    }


async def settle(server: Server) -> int:
    """What runs or waits some seconds after the load has ended."""
    for _ in range(100):
        if not (left := await busy(server)):
            return 0
        await asyncio.sleep(0.05)
    return left


def report(results: Sequence[dict[str, Any]], on: str, command: str, clients: int) -> str:
    """The page docs/measurements/serve.md."""
    lines = [
        "# `trio serve` under load",
        "",
        f"Command: `{command}`.",
        "",
        f"Machine: {on} Clients and server share it.",
        "",
        f"Model tiny; {clients} clients in a closed loop, bodies of "
        f"{results[0]['body_kb']:.0f} kB; "
        "half of the answers are streamed, a tenth of the questions is given up at the first "
        "chunk. Answers per second are whole ones, beside those of the same service in one "
        "process, by turns; the ratio is the median of the turns'. Processor time is per whole "
        "answer: of the server, of the same service in one process, and of the clients. First "
        "token: of one client, by HTTP, in process, and what HTTP adds. "
        "Row free: after a client has left, median and most, beside a decode step.",
        "",
        "| settings | answers/s | in process | ratio (of turns) | processor, ms | wrong | errors "
        "| still held | memory, second half | first token, ms | row free, ms |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for each in results:
        one, gone = each["one_client"], each["gone"]
        cells = (
            each["name"],
            f"{each['http_per_s']:.1f}",
            f"{each['process_per_s']:.1f}",
            f"{each['ratio']:.2f} ({min(each['ratios']):.2f} to {max(each['ratios']):.2f})",
            f"{each['server_ms']:.1f}, {each['process_ms']:.1f}, {each['clients_ms']:.1f}",
            f"{each['wrong']} of {each['answers']}",
            str(each["failed"]),
            str(each["held"]),
            f"{each['memory_growth']:+.1%}",
            f"{one['http_ms']:.1f}, {one['process_ms']:.1f}, {one['added_ms']:+.1f}",
            f"{gone['freed_ms']:.0f}, {gone['freed_most_ms']:.0f}; {gone['step_ms']:.0f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def report_attack(found: dict[str, Any]) -> str:
    """The attack's section of the page."""
    lines = [
        "",
        "## Under attack",
        "",
        f"{HONEST} clients as above, default settings, {found['seconds']:.0f} s each before, "
        f"during and after an attack by `scripts/serve_attack.py`: at a time "
        f"{serve_attack.HEADS} heads and {serve_attack.BODIES} bodies of a byte per second, "
        f"{serve_attack.LARGE} bodies of 64 MiB (half of them of unknown length), "
        f"{serve_attack.READERS} readers that do not read; each again "
        f"{serve_attack.AGAIN_S:g} s after it was cut off or refused. The attack takes "
        f"{found['attack_cores']:.2f} of the cores itself. Memory may grow by "
        f"`max_queue_bytes` and the cache, {found['bound_mib']:.0f} MiB.",
        "",
        "| | answers/s | server's processor time, ms | memory, MiB |",
        "|---|---|---|---|",
    ]
    for name in ("before", "during", "after"):
        figures = (found["per_s"], found["server_ms"], found["memory_mib"])
        cells = [
            f"{each[name]:.{digits}f}" for each, digits in zip(figures, (1, 1, 0), strict=True)
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    told = "; ".join(
        f"{name}: " + (", ".join(f"{count} x {what}" for what, count in of.items()) or "none ended")
        for name, of in found["told"].items()
    )
    lines += [
        "",
        f"During it {found['ratio']:.2f} of the answers per second before and after; of all "
        f"answers {found['wrong']} wrong, {found['failed']} failed, {found['held']} still held. "
        f"What the attackers were told: {told}.",
    ]
    return "\n".join(lines) + "\n"


def main() -> int:
    """Measure with default settings and with two prefillers of one thread each."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--bundle", type=Path, help="default: the tiny VLM, exported at 0.111")
    parser.add_argument("--clients", type=int, default=32, help="default: 32")
    parser.add_argument("--seconds", type=float, default=60.0, help="of each side (default: 60)")
    parser.add_argument("--turns", type=int, default=4, help="so many of each side (default: 4)")
    parser.add_argument("--cases", type=int, default=256, help="questions (default: 256)")
    parser.add_argument(
        "--set", action="append", help="measure these settings alone, NAME=VALUE, threads too"
    )
    parser.add_argument("--attack", action="store_true", help="measure clients under attack, too")
    parser.add_argument(
        "--attack-seconds", type=float, default=40.0, help="before, during and after (default: 40)"
    )
    parser.add_argument("--out", type=Path, help="folder for serve.md and serve.json")
    args = parser.parse_args()
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    switch_threads_often()  # as the server does
    before = load_average()
    kinds = {"default": [], "threads 1, prefillers 2": ["threads=1", "prefillers=2"]}
    if args.set:
        kinds = {", ".join(args.set).replace("=", " "): args.set}
    with tempfile.TemporaryDirectory() as scratch:
        bundle = (
            Bundle.load(args.bundle)
            if args.bundle
            else export_model("tiny", Path(scratch) / "bundle", budget=0.111, progress=False)
        )
        results = [measure(args, bundle, name, sets) for name, sets in kinds.items()]
        attack = None
        if args.attack:
            cases = answered(Pipeline.open(bundle), make_cases(args.cases))
            attack = attacked(bundle, cases, args.attack_seconds)
    on = machine(None)
    shown = [arg if not arg.startswith("/") else Path(arg).name for arg in sys.argv[1:]]
    command = " ".join(["python scripts/load_serve.py", *shown])
    text = report(results, machine_text(on, before, load_average()), command, args.clients)
    if attack:
        text += report_attack(attack)
    print(text)
    if args.out:
        (args.out / "serve.md").write_text(text, encoding="utf-8")
        figures = {"machine": on, "results": results} | ({"attack": attack} if attack else {})
        (args.out / "serve.json").write_text(json.dumps(figures, indent=1) + "\n")
    every = [*results, *([attack] if attack else [])]
    for each in every:
        for message in each["errors"][:5]:
            print(f"error: {message}", file=sys.stderr)
    return int(any(each["wrong"] or each["failed"] or each["held"] for each in every))


if __name__ == "__main__":
    sys.exit(main())
