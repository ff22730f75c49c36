"""Evaluations of a few questions, and the requests that they ask."""

from __future__ import annotations

import pytest

from trio_deploy import Pipeline, Request, RuntimeOptions
from trio_deploy.evaluation.ask import AskOptions
from trio_deploy.evaluation.evaluate import evaluate_configurations
from trio_deploy.evaluation.results import Results

ONE_THREAD = RuntimeOptions(threads=1)


def run(source, questions, configurations, out, **more) -> Results:
    """Results of configurations; answers have 8 tokens at most."""
    asking = {key: more.pop(key) for key in ("runtime", "dtype", "batch") if key in more}
    options = AskOptions(**{"runtime": ONE_THREAD, **asking}, max_new_tokens=8, progress=False)
    return evaluate_configurations(
        source, questions, configurations, out, options, **{"data": "scenes", **more}
    )


def requests_asked(monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """Requests that reach a pipeline from now on."""
    seen: list[Request] = []
    generate = Pipeline.generate_batch

    def recording(self, requests):
        seen.extend(requests)
        return generate(self, requests)

    monkeypatch.setattr(Pipeline, "generate_batch", recording)
    return seen
