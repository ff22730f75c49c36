"""Rows that are being decoded while prompts join: figures, their table, wrong options."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from tests.support.bundles import Bundles
from trio_deploy import Bundle, RuntimeOptions, TrioError
from trio_deploy.bench import joining
from trio_deploy.bench.joining import JOINS, measure_rows
from trio_deploy.bench.measure import BenchOptions
from trio_deploy.bench.table import to_markdown, to_text
from trio_deploy.cli import main as cli
from trio_deploy.pipeline.batch import DecodeBatch

OPTIONS = BenchOptions(
    budgets=(None,),
    new_tokens=3,
    runs=1,
    warm_up=0,
    text_tokens=16,
    runtime=RuntimeOptions(threads=1),
)


@pytest.fixture(scope="module")
def figures(bundles: Bundles):
    bundle = Bundle.load(bundles.path("tiny"))
    return measure_rows(bundle, OPTIONS, [1, 3], 20.0, progress=False)


def test_each_number_of_rows_is_measured_with_a_bound_and_without(figures) -> None:
    lines = [(each["case"], each["rows"], each["bound"]) for each in figures["waiting"]]
    budget = lines[-1][0]
    assert lines == [
        (case, rows, bound)
        for case in ("no pruning", budget)
        for rows in (1, 3)
        for bound in ("no bound", "20 ms")
    ]
    for each in figures["waiting"]:
        assert each["gap_s"] > 0 and each["first_token_s"] > 0
        assert each["tokens_per_s"] > 0 and each["alone_tokens_per_s"] > 0
    assert figures["workload"]["joins"] == JOINS


def test_ratios_are_to_the_line_without_a_bound(figures) -> None:
    figures = json.loads(json.dumps(figures))
    for number, each in enumerate(figures["waiting"]):
        each |= {"gap_s": 2.0, "tokens_per_s": 8.0 - 2 * (number % 2), "first_token_s": 0.5}
    text = to_text(figures | {"command": "trio bench"})
    assert text.count(" 0.75 ") == 4 and text.count(" 1.00 ") == 4
    markdown = to_markdown(figures, "trio bench")
    assert (
        "max_gap_ms" in markdown and "| 3 | 20 ms | 2.00 | 6.0 | 0.75 | 0.50 | 1.00 |" in markdown
    )


def test_numbers_of_rows_that_cannot_be_are_refused(bundles: Bundles) -> None:
    bundle = Bundle.load(bundles.path("tiny"))
    with pytest.raises(TrioError, match="numbers of rows of 1 or more"):
        measure_rows(bundle, OPTIONS, [4, 0], 20.0, progress=False)


def test_a_running_row_that_fails_ends_the_measurement_at_once(
    bundles: Bundles, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(joining, "_WAIT_S", 20.0)

    def broken(batch: DecodeBatch) -> object:
        raise TrioError("select_2 found no set of tokens")

    monkeypatch.setattr(DecodeBatch, "step", broken)
    bundle = Bundle.load(bundles.path("tiny"))
    with pytest.raises(TrioError, match="a running row failed: select_2 found no"):
        measure_rows(bundle, OPTIONS, [2], 20.0, progress=False)


@pytest.mark.parametrize(
    ("text_tokens", "new_tokens", "room", "advice"),
    [
        (630, 130, 100, "context of 1024 tokens was full .*: pass fewer --new-tokens"),
        (16, 20, -20, "rows ended before all prompts had joined: pass more --new-tokens"),
    ],
)
def test_rows_that_end_too_early_say_what_helps(
    bundles: Bundles,
    monkeypatch: pytest.MonkeyPatch,
    text_tokens: int,
    new_tokens: int,
    room: int,
    advice: str,
) -> None:
    monkeypatch.setattr(joining, "_STEPS_IN_PREFILL", room)
    bundle = Bundle.load(bundles.path("tiny"))
    options = replace(OPTIONS, text_tokens=text_tokens, new_tokens=new_tokens)
    with pytest.raises(TrioError, match=advice):
        measure_rows(bundle, options, [1], 0.001, progress=False)


def test_the_command_writes_what_it_shows(bundles: Bundles, tmp_path, capsys) -> None:
    command = ["bench", str(bundles.path("tiny")), "--threads", "1"]
    for wrong, message in (
        (["--max-gap-ms", "5"], "belongs to --rows"),
        (["--rows", "1", "--sweep"], "leave out --sweep and --baselines"),
        (["--rows", "1", "--max-gap-ms", "0"], "max_gap_ms must be a number above 0"),
    ):
        assert cli.main([*command, *wrong]) == 1
        assert message in capsys.readouterr().err
    short = ["--rows", "1", "--runs", "1", "--warm-up", "0", "--new-tokens", "2"]
    assert cli.main([*command, *short, "--budget", "0.111", "--out", str(tmp_path / "f")]) == 0
    assert "longest gap s" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "f.json").read_text())["waiting"]) == 4
    assert sorted(each.name for each in tmp_path.iterdir()) == ["f.json", "f.md"]
