"""How long rows that are being decoded wait while prompts join them: `trio bench --rows`."""

from __future__ import annotations

import itertools
import statistics
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from tqdm import tqdm

from trio_deploy.bench.case import Case
from trio_deploy.bench.contenders.contenders import Contenders
from trio_deploy.bench.environment import load_average, machine
from trio_deploy.bench.measure import BenchOptions, interleave, list_cases
from trio_deploy.bench.record import SCHEMA
from trio_deploy.bench.workload import Workload, fit_prompt, picture_size
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.batcher import Batcher
from trio_deploy.pipeline.batcher.events import Event, Handle
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Request

JOINS = 2  # prompts that join in a run, one after another
UNBOUNDED_MS = 1e9
_STEPS_IN_PREFILL = 100  # for which a running row must have room, per prompt that joins
_WAIT_S = 3600.0


@dataclass(frozen=True)
class Joined:
    """What a run measured.

    Attributes:
        gap_s: longest time between two tokens of a running row while prompts joined.
        tokens_per_s: of all rows, from the first prompt's submission to the last one's end.
        alone_tokens_per_s: of the running rows before.
        first_token_s: of each prompt that joined.
    """

    gap_s: float
    tokens_per_s: float
    alone_tokens_per_s: float
    first_token_s: tuple[float, ...]


@dataclass
class _Times:
    """When tokens came and what ended, by row; listeners run in one thread."""

    changed: threading.Condition = field(default_factory=threading.Condition)
    rows: list[list[float]] = field(default_factory=list)
    ended: dict[int, Event] = field(default_factory=dict)

    def add(self) -> int:
        """A new row's number."""
        self.rows.append([])
        return len(self.rows) - 1

    def note(self, row: int, event: Event) -> None:
        """Note a token, and the end of an answer."""
        with self.changed:
            if event.token_id is not None:
                self.rows[row].append(time.perf_counter())
            if event.last:
                self.ended[row] = event
            self.changed.notify_all()

    def wait(self, rows: int, tokens: int) -> bool:
        """Wait until each of the first rows has so many tokens; False if one ended before."""

        def over() -> bool:
            return self.first_end(rows) is not None

        def there() -> bool:
            return all(len(times) >= tokens for times in self.rows[:rows])

        with self.changed:
            if not self.changed.wait_for(lambda: there() or over(), _WAIT_S):
                raise TrioError(f"the running rows got no token within {_WAIT_S:g} s")
            return not over()

    def first_end(self, rows: int) -> Event | None:
        """The end of one of the first rows, if one has ended."""
        return next((self.ended[row] for row in range(rows) if row in self.ended), None)


def measure_rows(
    bundle: Bundle,
    options: BenchOptions,
    rows: Sequence[int],
    max_gap_ms: float,
    *,
    progress: bool = True,
) -> dict[str, Any]:
    """Figures of rows that are being decoded while prompts with pictures join: plain JSON.

    Every budget and no pruning is measured with each number of rows, with a bound on the gap and
    without one by turns. The rows that run have prompts without pictures.

    Raises:
        TrioError: a number of rows or a budget is impossible, or a prompt does not fit.
    """
    options.check()
    if not rows or min(rows) < 1:
        raise TrioError("--rows takes numbers of rows of 1 or more, comma-separated")
    before = load_average()
    cases, _ = list_cases(bundle, replace(options, baselines=()))
    width, height = options.picture or picture_size(bundle.config)
    asked = Workload(options.images, width, height, "?", options.new_tokens)
    work, _ = fit_prompt(asked, bundle, options.text_tokens)
    points: list[dict[str, Any]] = []
    with Contenders() as contenders:
        pipeline = contenders.pipeline(cases[0])
        steps = len(cases) * len(rows) * 2 * (options.runs + options.warm_up)
        with tqdm(total=steps, desc="bench", disable=None if progress else True) as bar:
            for case in cases:
                for count in rows:
                    bounds = {"no bound": UNBOUNDED_MS, f"{max_gap_ms:g} ms": max_gap_ms}
                    runs = interleave(
                        options.runs,
                        {
                            name: _Runner(pipeline, case, work, count, bound).run
                            for name, bound in bounds.items()
                        },
                        options.warm_up,
                        bar.update,
                    )
                    points += [
                        {"rows": count, "case": case.name, "bound": name, **_figures(runs[name])}
                        for name in bounds
                    ]
    text = bundle.config.text
    return {
        "schema": SCHEMA,
        "machine": machine(options.runtime.threads),
        "load_before": before,
        "load_after": load_average(),
        "model": {
            "name": bundle.manifest.model.name,
            "layers": text.num_layers,
            "hidden_size": text.hidden_size,
        },
        "workload": {
            "images": work.images,
            "visual_tokens": work.visual_tokens,
            "text_tokens": options.text_tokens,
            "new_tokens": work.new_tokens,
            "joins": JOINS,
            "runs": options.runs,
        },
        "ran_as": pipeline.ran_as.to_json(),
        "waiting": points,
    }


@dataclass(frozen=True)
class _Runner:
    """One line of the table: so many rows at a budget, with a bound on the gap."""

    pipeline: Pipeline
    case: Case
    work: Workload
    rows: int
    max_gap_ms: float

    def run(self, seed: int) -> Joined:
        """Measure once, with pictures of this seed."""
        times, new = _Times(), self.work.new_tokens
        room = JOINS * (new + _STEPS_IN_PREFILL) + 2 * new
        with Batcher(
            self.pipeline, max_rows=self.rows + 1, max_gap_ms=self.max_gap_ms, max_queue=self.rows
        ) as batcher:
            plain = self._request([], room)
            running = [self._submit(batcher, plain, times) for _ in range(self.rows)]
            self._wait(times, 2, room)
            started, had = time.perf_counter(), sum(map(len, times.rows))
            self._wait(times, 2 + new, room)
            alone = (sum(map(len, times.rows)) - had) / (time.perf_counter() - started)
            start = time.perf_counter()
            first = []
            for join in range(JOINS):
                pictured = self._request(self.work.pictures(seed * JOINS + join), new)
                handle = self._submit(batcher, pictured, times)
                first.append(handle.result(_WAIT_S).first_token_s)
                self._wait(times, 0, room)
            end = time.perf_counter()
            for handle in running:
                handle.cancel()
        tokens = sum(start <= at <= end for row in times.rows for at in row)
        gaps = [
            later - earlier
            for row in times.rows[: self.rows]
            for earlier, later in itertools.pairwise(row)
            if later >= start and earlier <= end
        ]
        return Joined(max(gaps), tokens / (end - start), alone, tuple(first))

    def _wait(self, times: _Times, tokens: int, room: int) -> None:
        """Wait until the running rows have so many tokens.

        Args:
            room: tokens that they were asked for.

        Raises:
            TrioError: one has ended.
        """
        if times.wait(self.rows, tokens):
            return
        event = times.first_end(self.rows)
        assert event is not None
        if event.error is not None:
            raise TrioError(f"a running row failed: {event.error}") from event.error
        if event.generation is not None and len(event.generation.token_ids) < room:
            context = self.pipeline.bundle.config.text.max_positions
            raise TrioError(
                f"the model's context of {context} tokens was full before all prompts had joined: "
                "pass fewer --new-tokens or --text-tokens, or with --size a larger context="
            )
        raise TrioError("rows ended before all prompts had joined: pass more --new-tokens")

    def _request(self, pictures: list[Any], new_tokens: int) -> Request:
        text = self.work if pictures else replace(self.work, images=0)
        return Request(
            text.messages(),
            pictures,
            max_new_tokens=new_tokens,
            budget=self.case.budget,
            bundle_sampling=False,
        )

    def _submit(self, batcher: Batcher, request: Request, times: _Times) -> Handle:
        row = times.add()
        return batcher.submit(request, lambda event: times.note(row, event))


def _figures(runs: Sequence[Joined]) -> dict[str, float]:
    """The longest gap of all runs, and medians of the rest."""
    return {
        "gap_s": max(run.gap_s for run in runs),
        "tokens_per_s": statistics.median(run.tokens_per_s for run in runs),
        "alone_tokens_per_s": statistics.median(run.alone_tokens_per_s for run in runs),
        "first_token_s": statistics.median(s for run in runs for s in run.first_token_s),
    }
