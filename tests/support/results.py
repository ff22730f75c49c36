"""Made-up results of an evaluation."""

from __future__ import annotations

from trio_deploy.evaluation.results import KindResult, Result, Results
from trio_deploy.evaluation.statistics import Estimate


def results_of(model: str, *results, **more) -> Results:
    """Results of (name, share of tokens, retained, schedule, options)."""

    def result(name, share, retained, schedule=None, options=None):
        estimate = Estimate(retained, retained - 0.02, retained + 0.01)
        kind = KindResult(20, retained, 0.1, estimate, estimate)
        return Result(
            name, share, share, schedule, options or {}, kind, estimate, {"colour": kind}, None
        )

    found = [result("unpruned", 1.0, 1.0), *(result(*one) for one in results)]
    return Results(model, "made up", "exact", {"cpu": "x"}, 20, 5, found,
                   scored=20, **more)  # fmt: skip
