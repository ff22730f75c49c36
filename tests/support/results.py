"""Made-up results of an evaluation."""

from __future__ import annotations

from trio_deploy.evaluation.results import KindResult, Result, Results
from trio_deploy.evaluation.statistics import Estimate


def results_of(model: str, *results, **more) -> Results:
    """Results of (name, share of tokens, retained, schedule, options)."""
    found = [_result("unpruned", 1.0, 1.0), *(_result(*one) for one in results)]
    return Results(model, "made up", "exact", {"cpu": "x"}, 20, 5, found,
                   scored=20, **more)  # fmt: skip


def results_of_lines(lines: dict[str, list[float]], spread: float = 0.01) -> Results:
    """Results of methods at rising shares of the tokens: retained by name of the method.

    Args:
        spread: how far an interval reaches to each side; nan: there is none.
    """
    found = [_result("unpruned", 1.0, 1.0, interval=(spread, spread))]
    for name, line in lines.items():
        for place, retained in enumerate(line, 1):
            found.append(_result(name, 0.1 * place, retained, interval=(spread, spread)))
    return Results("tiny", "made up", "exact", {}, 20, 5, found, scored=20)


def _result(name, share, retained, schedule=None, options=None, *, interval=(0.02, 0.01)) -> Result:
    below, above = interval
    estimate = Estimate(retained, retained - below, retained + above)
    kind = KindResult(20, retained, 0.1, estimate, estimate)
    return Result(
        name, share, share, schedule, options or {}, kind, estimate, {"colour": kind}, None
    )
