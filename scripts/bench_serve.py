"""Measure `trio serve` with AIPerf, NVIDIA's client for servers of language models.

    make bench-serve
    python scripts/bench_serve.py [--aiperf FILE] [--clients 1 8 32] [--requests 256] [--out FOLDER]

Starts `trio serve` of the tiny VLM on loopback and lets AIPerf ask it questions about pictures that
the model was not trained on, streamed, with answers of a fixed length, by so many clients at once.
Every number is AIPerf's own. Prints a table; `--out` writes aiperf.json and aiperf.md there. The
exit status is 1 when a request failed.
"""

from __future__ import annotations

import argparse
import base64
import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from load_serve import Server, make_cases

from trio_deploy import export_model
from trio_deploy.bench.environment import load_average, machine, machine_text

CASES = 64  # questions, asked again in turn
TOKENS = 32  # of each answer
WARM_UP = 8  # requests before those that count
TIMEOUT_S = 1800.0


@dataclass(frozen=True)
class Figures:
    """What AIPerf found with so many clients.

    Attributes:
        completed, failed: requests.
        requests_per_s, tokens_per_s: of all clients.
        first_token_ms, between_tokens_ms, latency_ms: median and 99th percentile over requests.
    """

    clients: int
    completed: int
    failed: int
    requests_per_s: float
    tokens_per_s: float
    first_token_ms: tuple[float, float]
    between_tokens_ms: tuple[float, float]
    latency_ms: tuple[float, float]

    @classmethod
    def of(cls, clients: int, exported: dict[str, Any]) -> Figures:
        """Read what AIPerf exported as JSON."""

        def spread(name: str) -> tuple[float, float]:
            return exported[name]["p50"], exported[name]["p99"]

        completed = int(exported["request_count"]["avg"])
        return cls(
            clients,
            completed,
            int(exported["completed_request_count"]["avg"]) - completed,
            exported["request_throughput"]["avg"],
            exported["output_token_throughput"]["avg"],
            spread("time_to_first_token"),
            spread("inter_token_latency"),
            spread("request_latency"),
        )


def write_questions(path: Path) -> None:
    """AIPerf's `single_turn` data: a line per question, with its picture as a data URL."""
    with path.open("w", encoding="utf-8") as file:
        for case in make_cases(CASES):
            url = "data:image/png;base64," + base64.b64encode(case.picture).decode()
            file.write(json.dumps({"text": case.question, "image": url}) + "\n")


def run_aiperf(
    aiperf: str, port: int, questions: Path, out: Path, clients: int, requests: int
) -> dict[str, Any]:
    """Let AIPerf ask; what it exported.

    Raises:
        SystemExit: AIPerf failed, with the end of what it said.
    """
    fields = {"min_tokens": TOKENS, "max_tokens": TOKENS, "temperature": 0}
    arguments = ["profile", "-m", "tiny", "-u", f"http://127.0.0.1:{port}"]
    arguments += ["--endpoint-type", "chat", "--streaming", "--use-server-token-count"]
    arguments += ["--input-file", str(questions), "--custom-dataset-type", "single_turn"]
    for name, value in fields.items():
        arguments += ["--extra-inputs", f"{name}:{value}"]
    tokenizer = resources.files("trio_deploy") / "data" / "tiny"
    arguments += ["--tokenizer", str(tokenizer), "--ui", "none", "--artifact-dir", str(out)]
    arguments += ["--warmup-request-count", str(WARM_UP), "--random-seed", "0"]
    arguments += ["--concurrency", str(clients), "--request-count", str(requests)]
    done = subprocess.run(
        [aiperf, *arguments], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )
    exported = out / "profile_export_aiperf.json"
    if done.returncode or not exported.exists():
        raise SystemExit(f"AIPerf failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return json.loads(exported.read_text(encoding="utf-8"))


def table(found: Sequence[Figures]) -> list[str]:
    """A row per number of clients."""
    lines = [
        "| clients | requests | failed | requests/s | tokens/s | first token, ms "
        "| between tokens, ms | whole answer, ms |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for each in found:
        times = (each.first_token_ms, each.between_tokens_ms, each.latency_ms)
        cells = [
            str(each.clients),
            str(each.completed),
            str(each.failed),
            f"{each.requests_per_s:.1f}",
            f"{each.tokens_per_s:.0f}",
            *(f"{median:.1f}, {most:.1f}" for median, most in times),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def report(found: Sequence[Figures], version: str, on: str, requests: int) -> str:
    """The page docs/measurements/aiperf.md."""
    return "\n".join(
        [
            "# `trio serve` by AIPerf",
            "",
            "Command: `make bench-serve`.",
            "",
            f"Machine: {on} AIPerf {version} and the server share it.",
            "",
            f"Model tiny at a budget of 0.111; {CASES} questions about pictures, asked again in "
            f"turn; streamed answers of {TOKENS} tokens; {requests} requests after {WARM_UP} that "
            "do not count. Times: median, 99th percentile.",
            "",
            *table(found),
            "",
        ]
    )


def main() -> int:
    """Measure with each number of clients."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--aiperf", default="aiperf", help="its program (default: aiperf)")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 8, 32])
    parser.add_argument("--requests", type=int, default=256, help="per number of clients")
    parser.add_argument("--out", type=Path, help="folder for aiperf.md and aiperf.json")
    args = parser.parse_args()
    if not (aiperf := shutil.which(args.aiperf)):
        raise SystemExit(f"there is no program {args.aiperf}: make bench-serve installs AIPerf")
    if args.out and not args.out.is_dir():
        raise SystemExit(f"there is no folder {args.out}")
    before, found, version = load_average(), [], ""
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_questions(folder / "questions.jsonl")
        bundle = export_model("tiny", folder / "bundle", budget=0.111, progress=False)
        with Server(bundle.path, [], ["--name", "tiny"]) as server:
            for clients in args.clients:
                print(f"{clients} clients, {args.requests} requests", file=sys.stderr)
                exported = run_aiperf(
                    aiperf,
                    server.port,
                    folder / "questions.jsonl",
                    folder / str(clients),
                    clients,
                    args.requests,
                )
                version = exported["aiperf_version"]
                found.append(Figures.of(clients, exported))
    on = machine(None)
    text = report(found, version, machine_text(on, before, load_average()), args.requests)
    print(text)
    if args.out:
        (args.out / "aiperf.md").write_text(text, encoding="utf-8")
        figures = {"machine": on, "aiperf": version, "results": [vars(each) for each in found]}
        (args.out / "aiperf.json").write_text(json.dumps(figures, indent=1) + "\n")
    return int(any(each.failed for each in found))


if __name__ == "__main__":
    sys.exit(main())
