"""`trio eval`: its options, and what it writes and prints."""

import json

import pytest

from tests.support.results import results_of
from trio_deploy.cli.main import main
from trio_deploy.evaluation.results import Results


def stored(results: Results, monkeypatch: pytest.MonkeyPatch) -> None:
    """`trio eval` finds these results, whatever it is asked."""

    def evaluate(model, questions, out, options, **_):
        results.save(out)
        return results

    monkeypatch.setattr("trio_deploy.evaluation.evaluate.evaluate", evaluate)


def test_without_a_plot_everything_else_is_written(tmp_path, capsys, monkeypatch):
    results = results_of("tiny", ("recipe", 0.111, 0.9))
    stored(results, monkeypatch)
    assert main(f"eval tiny --out {tmp_path} --scenes 1 --no-plot --json".split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["questions"] == results.questions
    assert {p.name for p in tmp_path.iterdir()} == {"results.json", "results.md"}


def test_a_plot_that_cannot_be_written_loses_no_results(tmp_path, capsys, monkeypatch):
    results = results_of("tiny", ("recipe", 0.111, 0.9))
    stored(results, monkeypatch)
    (tmp_path / "retention.svg").mkdir()  # no file can take its place
    assert main(f"eval tiny --out {tmp_path} --scenes 1 --json".split()) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["scored"] == results.scored
    assert "cannot write" in captured.err and "retention.svg" in captured.err
    assert "wrote results.json, results.md to" in captured.err


def test_the_command_evaluates_and_says_what_it_wrote(tmp_path, capsys):
    status = main(
        f"eval tiny --out {tmp_path} --scenes 1 --threads 1 --split tuning --batch 16 --schedule "
        "mixed=0:44:divprune,6:19 --methods fastv@2 --budgets 0.111".split()
    )
    captured = capsys.readouterr()
    assert status == 0 and "| mixed |" in captured.out
    assert "fastv@2 at 11.1% is left out" in captured.err
    assert {"results.json", "results.md", "retention.svg"} <= {p.name for p in tmp_path.iterdir()}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("--images .", "--images belongs to --questions"),
        ("--append x --limit 3 --scorer pope", "--append and --limit and --scorer belong to --que"),
        (
            "--questions q --scenes 3 --split test",
            "--scenes and --split belong to generated scenes",
        ),
        ("--scorer foo", "unknown scorer 'foo'"),
        ("--max-new-tokens 0", "--max-new-tokens must be 1 or more"),
        ("--seeds 0", "seeds must be 1 or more"),
        ("--scenes 0", "0 scenes hold no question"),
        ("--first 99999", "no scenes 99999 to 100062 of the test split"),
        ("--methods fastv@2 --budgets 0.111", "nothing is left to measure"),
    ],
)
def test_what_cannot_be_evaluated_is_said_before_anything_is_written(
    options, words, tmp_path, capsys
):
    assert main(f"eval tiny --out {tmp_path / 'out'} {options}".split()) == 1
    captured = capsys.readouterr()
    assert words in captured.err and captured.out == ""
    assert not (tmp_path / "out").exists()
