"""Measure a Triton server of the tiny VLM under closed-loop load, and the pipeline on its own.

    scripts/setup_triton.sh
    .venv-triton/bin/python scripts/load_triton.py [--clients 32] [--seconds 60] [--out FOLDER]

Pictures and questions are those of `trio_deploy.evaluation.scenes`. First the pipeline answers them
one after another, as `trio run` does; its tokens are what every answer is compared with. Then
a server is started on loopback, and one client, then N clients ask without a pause, each its next
question when the answer to the last is complete. Prints throughput, time to the first token,
latency, errors, wrong answers, and the server's memory over time; `--out` writes triton.md and
triton.json there. The exit status is 1 when an answer was wrong or failed.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tritonclient.grpc.aio as triton
from tqdm import tqdm
from triton_server import TritonServer

from trio_deploy import Bundle, Pipeline, Request, export_model
from trio_deploy.bench.environment import load_average, machine, machine_text
from trio_deploy.bench.measure import budget_name
from trio_deploy.evaluation import scenes
from trio_deploy.runtimes.machine import usable_cores
from trio_deploy.serve.limits import read_settings
from trio_deploy.serve.triton_server.repository import Options, write_repository

MODEL = "trio_vlm"
#: For short answers of a small model on CPUs: a prefill for each core, in large batches.
SETTINGS = {
    "threads": "1",
    "prefillers": str(usable_cores()),
    "prefill_rows": "8",
    "max_rows": "32",
}
#: Maximum growth of memory from the second to the last third of the time.
FLAT = 0.05


@dataclass(frozen=True)
class Case:
    """A question about a picture (PNG), and the tokens that answer it."""

    picture: bytes
    question: str
    token_ids: tuple[int, ...] = ()


@dataclass
class Answers:
    """Measurements at one level of load; times in seconds."""

    clients: int
    seconds: float
    first_token: list[float] = field(default_factory=list)
    latency: list[float] = field(default_factory=list)
    tokens: int = 0
    wrong: int = 0
    errors: list[str] = field(default_factory=list)
    memory_mib: list[tuple[float, float]] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """Figures: requests and tokens per second, percentiles in milliseconds."""
        return {
            "clients": self.clients,
            "seconds": round(self.seconds, 1),
            "answers": len(self.latency),
            "answers_per_s": len(self.latency) / self.seconds,
            "tokens_per_s": self.tokens / self.seconds,
            "first_token_ms": _percentiles(self.first_token),
            "latency_ms": _percentiles(self.latency),
            "wrong": self.wrong,
            "errors": len(self.errors),
            "error_messages": sorted(set(self.errors))[:5],
            "memory_mib": [[round(t, 1), round(m, 1)] for t, m in self.memory_mib],
        }


def make_cases(count: int) -> list[Case]:
    """Questions about pictures that the tiny VLM was not trained on, two per picture."""
    cases = []
    for seed in itertools.islice(scenes.TEST_SEEDS, (count + 1) // 2):
        scene = scenes.generate(seed)
        content = io.BytesIO()
        scene.image.save(content, "PNG")
        cases += [Case(content.getvalue(), q.text) for q in scene.questions[:2]]
    return cases[:count]


def answer_alone(
    bundle: Bundle, cases: Sequence[Case], budget: float | None
) -> tuple[list[Case], Answers]:
    """The cases with their tokens, and the pipeline's measurements, one request after another."""
    pipeline = Pipeline.open(bundle)
    for case in cases[:4]:  # warm-up
        pipeline.generate(Request(case.question, [case.picture], budget=budget))
    result = Answers(clients=1, seconds=0.0)
    answered = []
    start = time.perf_counter()
    for case in tqdm(cases, desc="pipeline alone", disable=None):
        began = time.perf_counter()
        generation = pipeline.generate(Request(case.question, [case.picture], budget=budget))
        result.latency.append(time.perf_counter() - began)
        result.first_token.append(generation.first_token_s)
        result.tokens += len(generation.token_ids)
        answered.append(Case(case.picture, case.question, tuple(generation.token_ids)))
    result.seconds = time.perf_counter() - start
    return answered, result


async def ask(client: triton.InferenceServerClient, case: Case) -> AsyncIterator[tuple[float, Any]]:
    """Stream one answer: (seconds since the question, response)."""
    prompt = triton.InferInput("prompt", [1], "BYTES")
    prompt.set_data_from_numpy(np.array([case.question.encode()], object))
    images = triton.InferInput("images", [1], "BYTES")
    images.set_data_from_numpy(np.array([case.picture], object))

    async def request():
        yield {"model_name": MODEL, "inputs": [prompt, images]}

    start = time.perf_counter()
    async for response, error in client.stream_infer(request()):
        if error is not None:
            raise error
        yield time.perf_counter() - start, response


async def _client(
    url: str, cases: Iterator[Case], until: float, result: Answers, bar: tqdm
) -> None:
    client = triton.InferenceServerClient(url)
    try:
        while time.perf_counter() < until:
            case, times, ids = next(cases), [], []
            try:
                async for seconds, response in ask(client, case):
                    times.append(seconds)
                    ids += response.as_numpy("token_ids").tolist()
            except Exception as error:  # every kind of failure is counted
                result.errors.append(str(error))
                await asyncio.sleep(0.1)  # so that a broken server is not hammered
                continue
            if not ids:
                result.errors.append("an answer ended without a token")
                await asyncio.sleep(0.1)
                continue
            result.first_token.append(times[0])
            result.latency.append(times[-1])
            result.tokens += len(ids)
            result.wrong += tuple(ids) != case.token_ids
            bar.update()
    finally:
        await client.close()


async def load(
    server: TritonServer, cases: Sequence[Case], clients: int, seconds: float
) -> Answers:
    """Let `clients` ask for `seconds`, each its next question when the last is answered."""
    result = Answers(clients, seconds)
    turns = itertools.cycle(cases)
    start = time.perf_counter()

    async def watch() -> None:
        while True:
            result.memory_mib.append((time.perf_counter() - start, server.memory_mib()))
            await asyncio.sleep(1.0)

    with tqdm(desc=f"{clients} clients", unit="answers", disable=None) as bar:
        watcher = asyncio.create_task(watch())
        try:
            await asyncio.gather(
                *(_client(server.grpc, turns, start + seconds, result, bar) for _ in range(clients))
            )
        finally:
            watcher.cancel()
    result.seconds = time.perf_counter() - start
    return result


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    if not values:
        return {}
    points = {"p50": 50, "p90": 90, "p99": 99}
    return {name: float(np.percentile(values, q)) * 1e3 for name, q in points.items()}


def growth(samples: Sequence[tuple[float, float]]) -> float:
    """Median memory of the last third over that of the second third, minus 1."""
    third = len(samples) // 3
    if third == 0:
        return 0.0
    middle = statistics.median(mib for _, mib in samples[third : 2 * third])
    last = statistics.median(mib for _, mib in samples[2 * third :])
    return last / middle - 1


def describe(bundle: Bundle) -> str:
    """The served model in a sentence: its name, budget and runtime."""
    made = bundle.manifest
    return (
        f"Model {made.model.name}, budget {budget_name(None, bundle)}, {made.dtype}, run by "
        f"{made.runtime} (target {made.target})"
    )


def report(
    results: dict[str, Answers],
    served: str,
    settings: dict[str, str],
    on: str,
    command: str,
    flat: float,
) -> str:
    """Contents of the page docs/measurements/triton.md."""
    lines = [
        "# Under load",
        "",
        f"Command: `{command}`.",
        "",
        f"Machine: {on} Clients and server share it.",
        "",
        f"{served}; answers streamed over gRPC. Closed loop: each client asks its next question "
        "when the answer to the last is complete. Settings of the model: "
        f"{', '.join(f'{name} {value}' for name, value in settings.items())}.",
        "",
        "| | answers/s | tokens/s | first token, ms (p50, p90, p99) | latency, ms (p50, p90, p99) "
        "| wrong | errors |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, answers in results.items():
        figures = answers.to_json()
        first, whole = (
            ", ".join(f"{v:.0f}" for v in figures[key].values()) or "–"
            for key in ("first_token_ms", "latency_ms")
        )
        lines.append(
            f"| {name} | {figures['answers_per_s']:.1f} | {figures['tokens_per_s']:.0f} | {first} "
            f"| {whole} | {answers.wrong} of {len(answers.latency)} | {len(answers.errors)} |"
        )
    names = list(results)
    alone, one, many = (results[name].to_json()["answers_per_s"] for name in names)
    memory = [mib for _, mib in results[names[-1]].memory_mib]
    lines += [
        "",
        f"{names[-1]} against {names[-2]}: {many / one:.2f}x the answers; against the pipeline "
        f"alone: {many / alone:.2f}x. The pipeline alone has all cores for one operator, the "
        "server with these settings one core for one prefill. Memory of the server "
        f"and its processes under {names[-1]}: {memory[0]:.0f} MiB at the start, "
        f"{max(memory):.0f} at most, {memory[-1]:.0f} at the end; the last third of the time "
        f"against the second: {flat:+.1%}.",
        "",
    ]
    return "\n".join(lines)


def main() -> int:
    """Run the three levels; return 1 if an answer was wrong or failed, or memory grew."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--bundle", type=Path, help="default: the tiny VLM, exported at 0.111")
    parser.add_argument("--clients", type=int, default=32, help="default: 32")
    parser.add_argument("--seconds", type=float, default=60.0, help="of N clients (default: 60)")
    parser.add_argument("--alone", type=float, default=20.0, help="of one client (default: 20)")
    parser.add_argument("--cases", type=int, default=256, help="questions (default: 256)")
    parser.add_argument(
        "--set", action="append", default=[], help="setting of the model, NAME=VALUE"
    )
    parser.add_argument("--out", type=Path, help="folder for triton.md and triton.json")
    args = parser.parse_args()

    before = load_average()
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        bundle = (
            Bundle.load(args.bundle)
            if args.bundle
            else export_model("tiny", folder / "bundle", budget=0.111)
        )
        settings = SETTINGS | read_settings(None, args.set)
        write_repository(bundle, folder / "repository", Options(settings=settings, link=True))
        cases, alone = answer_alone(bundle, make_cases(args.cases), None)
        results = {"the pipeline alone, in sequence": alone}
        with TritonServer(folder / "repository", folder / "log") as server:
            for clients, seconds in ((1, args.alone), (args.clients, args.seconds)):
                name = f"{clients} client{'s' * (clients > 1)}"
                results[name] = asyncio.run(load(server, cases, clients, seconds))
    flat = growth(results[name].memory_mib)
    on = machine(None)
    shown = [arg if not arg.startswith("/") else Path(arg).name for arg in sys.argv[1:]]
    command = " ".join(["python scripts/load_triton.py", *shown])
    loaded = machine_text(on, before, load_average())
    text = report(results, describe(bundle), settings, loaded, command, flat)
    print(text)
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "triton.md").write_text(text, encoding="utf-8")
        figures = {
            "machine": on,
            "settings": settings,
            "memory_growth": flat,
            "results": {name: answers.to_json() for name, answers in results.items()},
        }
        (args.out / "triton.json").write_text(json.dumps(figures, indent=1) + "\n")
    failed = sum(answers.wrong + len(answers.errors) for answers in results.values())
    for message in itertools.chain(*(a.to_json()["error_messages"] for a in results.values())):
        print(f"error: {message}", file=sys.stderr)
    if flat > FLAT:
        print(f"memory is not flat: {flat:+.1%}", file=sys.stderr)
    return 1 if failed or flat > FLAT else 0


if __name__ == "__main__":
    sys.exit(main())
