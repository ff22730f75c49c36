"""A bundle, what was measured about it, and its page."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.page import EVIL
from tests.support.pictures import make_picture
from tests.support.results import results_of
from trio_deploy import Bundle, Schedule, export_model
from trio_deploy.bench.measure import BenchOptions, measure
from trio_deploy.bench.table import write
from trio_deploy.report.charts import bench_chart
from trio_deploy.report.examples import Asked
from trio_deploy.report.gather import ReportOptions
from trio_deploy.report.report import write_report


@pytest.fixture(scope="module")
def bundle(llava_checkpoint, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("report") / "b"
    return export_model(llava_checkpoint, out, schedule="1:8,2:4", progress=False)


@pytest.fixture(scope="module")
def measured(bundle, tmp_path_factory) -> Path:
    """What `trio bench --out` writes about it."""
    out = tmp_path_factory.mktemp("figures") / "bench"
    options = BenchOptions(
        text_tokens=20, new_tokens=3, runs=2, warm_up=0, baselines=(), memory=False
    )
    result = {"command": "trio bench", **measure(bundle, options, progress=False)}
    return write(result, out, bench_chart(result))[0]


@pytest.fixture(scope="module")
def evaluated(bundle, tmp_path_factory) -> Path:
    """What `trio eval` writes, of made-up figures; the bundle's own configuration is the second."""
    results = results_of(
        bundle.manifest.model.name,
        ("random", 0.4, 0.4, bundle.schedule.with_method("random")),
        ("trio", 0.4, 0.92, bundle.schedule),
        ("trio", 0.6, 0.99, Schedule.parse("1:12,2:4")),
    )
    folder = tmp_path_factory.mktemp("eval")
    results.save(folder)
    return folder / "results.json"


@pytest.fixture(scope="module")
def page(bundle, measured, evaluated, tmp_path_factory) -> Path:
    wanted = ReportOptions(
        bench=measured,
        evaluation=evaluated,
        asked=[Asked(EVIL, (make_picture(),), "4"), Asked("how many ?", (make_picture(seed=1),))],
        check=False,
    )
    out = tmp_path_factory.mktemp("page") / "report.html"
    return write_report(bundle, out, wanted, progress=False)
