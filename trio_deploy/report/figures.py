"""Measured figures on the page, read from what `trio bench`, `trio eval` and `trio check` wrote."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from trio_deploy.bench.environment import machine_text
from trio_deploy.bench.measure import UNPRUNED
from trio_deploy.bench.record import read_measured
from trio_deploy.bench.table import ran_text, times
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.recipe import Recipe, list_recipes
from trio_deploy.errors import TrioError
from trio_deploy.evaluation.configurations import BLIND
from trio_deploy.evaluation.configurations import UNPRUNED as ALL_TOKENS
from trio_deploy.evaluation.results import Result, Results
from trio_deploy.evaluation.scheme import SchemeResults, overlap_text
from trio_deploy.evaluation.statistics import points_text
from trio_deploy.families.registry import check_positions
from trio_deploy.files import sha256_of
from trio_deploy.report.charts import Retention
from trio_deploy.verify.report import Report

_MIB = 2**20


def parity(report: Report) -> dict[str, Any]:
    """The comparison with the reference, as `trio check` makes it."""
    rows = [
        {
            "stage": row.stage,
            "relative": f"{row.max_rel:.1e}" if row.max_rel else "0",
            "kept": "" if row.overlap is None else f"{row.overlap:.1%}",
            "tokens": {None: "", True: "equal", False: "differ"}[row.tokens_equal],
            "passed": row.passed,
            "problem": row.problem,
        }
        for row in report.rows
    ]
    passed = sum(row.passed for row in report.rows)
    ran = [] if report.ran_as is None else [f"Ran as {report.ran_as}."]
    return {"title": report.title, "rows": rows, "passed": passed, "ran": ran}


def cost(bundle: Bundle, file: Path, *, quick: bool) -> dict[str, Any]:
    """Measured time and memory, from a file of `trio bench`; `quick`: of few runs.

    Raises:
        TrioError: the file is none of `trio bench`, or of another model.
    """
    result = read_bench(file, bundle.manifest.model.name)
    cases = result["cases"]
    best = next((case for case in cases[1:] if case["kind"] == "trio"), cases[0])
    table = [
        {
            "name": case["name"],
            "first": f"{case['first_token_s']['median']:.3f}",
            "spread": f"{case['first_token_s']['q1']:.3f} – {case['first_token_s']['q3']:.3f}",
            "prefill": times(case["against_unpruned"]["prefill"]),
            "limit": times(case["against_unpruned"]["flops_limit"]),
            "speed": f"{case['tokens_per_s']['median']:.1f}" if case["tokens_per_s"] else "",
            "kv": f"{case['kv_bytes'] / _MIB:.1f}" if case["kv_bytes"] else "",
            "peak": f"{case['peak_mib']:.0f}" if case["peak_mib"] else "",
        }
        for case in cases
    ]
    return {
        "result": result,
        "table": table,
        "work": result["workload"],
        "machine": machine_text(result["machine"], result["load_before"], result["load_after"]),
        "ran": ran_text(cases),
        "prefill_ratio": best["against_unpruned"]["prefill"] if best["name"] != UNPRUNED else None,
        "quick": quick,
    }


def read_bench(file: Path, model: str) -> dict[str, Any]:
    """Read what `trio bench --out` wrote about a model.

    Raises:
        TrioError: it cannot be read, is something else, or of another model.
    """
    result = read_measured(file)
    _same_model(file, result["model"]["name"], model)
    return result


def accuracy(bundle: Bundle, file: Path, *, quick: bool) -> dict[str, Any]:
    """Retained accuracy, from the results.json of `trio eval`; `quick`: of few questions.

    Raises:
        TrioError: the file is none of `trio eval`, or of another model.
    """
    results = read_evaluation(file, bundle.manifest.model.name)
    return {**summarise(results, bundle), "quick": quick}


def read_evaluation(file: Path, model: str) -> Results:
    """Read what `trio eval` wrote about a model.

    Raises:
        TrioError: it cannot be read, is something else, or of another model.
    """
    results = Results.load(file)
    _same_model(file, results.model, model)
    return results


def summarise(results: Results, bundle: Bundle) -> dict[str, Any]:
    """Rows, chart and headline of an evaluation, with the bundle's own configuration marked."""
    rows: list[dict[str, Any]] = []
    pruned = [result for result in results.results if result.name not in (ALL_TOKENS, BLIND)]
    own = next((result for result in pruned if _is_bundles(result, results, bundle)), None)
    for result in results.results:
        one, kept = result.overall, result.overall.retention
        said = [str(result.schedule)] if result.schedule and result.schedule.points else []
        said += [f"{key} {value}" for key, value in result.options.items()]
        rows.append(
            {
                "name": result.name,
                "own": result is own,
                "schedule": ", ".join(said),
                "share": f"{result.share:.1%}",
                "accuracy": f"{one.accuracy.value:.1%}" if one.accuracy else "",
                "retention": f"{kept.value:.1%}" if kept else "",
                "interval": ""
                if kept is None or math.isnan(kept.low) or kept.low == kept.high
                else f"{kept.low:.1%} – {kept.high:.1%}",
                "agreement": f"{result.agreement.value:.1%}",
                "kl": f"{one.kl:.3f}",
            }
        )
    return {
        "model": results.model,
        "data": results.data,
        "questions": results.questions,
        "pictures": results.pictures,
        "rows": rows,
        "ran": results.ran_text(),
        "chart": Retention.of(results, first=own.name if own else None),
        "scored": bool(results.results and results.results[0].overall.retention),
        "headline": (own.overall.retention.value, own.share)
        if own and own.overall.retention
        else None,
        "without": _without(bundle) if own is None and bundle.schedule.points else "",
        "scheme": None if results.scheme is None else _scheme(results.scheme),
    }


def _scheme(results: SchemeResults) -> dict[str, Any]:
    """What quantised weights cost beside float ones."""
    return {
        "against": results.against,
        "verdict": results.verdict,
        "judged": results.judged,
        "passed": results.passed,
        "rows": [
            {
                "name": row.name,
                "share": f"{row.share:.1%}",
                "overlap": overlap_text(row),
                "agreement": f"{row.agreement.value:.1%}",
                "gained": points_text(row.gained),
                "problem": "; ".join(row.problems),
            }
            for row in results.rows
        ],
    }


def _is_bundles(result: Result, results: Results, bundle: Bundle) -> bool:
    """Whether a result is that of the bundle as it is: its schedule and its options.

    A result names the options that were asked for. The others are the measured bundle's own or, if
    bundles were exported for the evaluation, the model's defaults.
    """
    if result.schedule != bundle.schedule:
        return False
    manifest = bundle.manifest
    ours = {
        "threshold": manifest.threshold,
        "probe": manifest.probe,
        "positions": manifest.positions,
    }
    if results.bundle not in ("", sha256_of(bundle.path / MANIFEST)):
        return False
    if not results.bundle:
        known = manifest.model.name in list_recipes()
        defaults = load_recipe(manifest.model.name) if known else Recipe
        unnamed = {key: getattr(defaults, key) for key in ours}
        unnamed["positions"] = check_positions(bundle.config, unnamed["positions"])
    else:
        unnamed = ours
    return {**unnamed, **result.options} == ours


def _without(bundle: Bundle) -> str:
    """The note for an evaluation without the bundle's own configuration."""
    manifest = bundle.manifest
    return (
        f"None of these is this bundle as it is ({bundle.schedule}; probe {manifest.probe}, "
        f"positions {manifest.positions}, threshold {manifest.threshold:g}), so nothing here says "
        "how many right answers it keeps: `trio eval` of the bundle's folder does."
    )


def _same_model(file: Path, name: str, model: str) -> None:
    if name != model:
        raise TrioError(f"{file} is about {name}, not about {model}: pass the figures of {model}")
