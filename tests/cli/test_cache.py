"""`trio cache` lists and clears; commands take a model in place of a bundle."""

from __future__ import annotations

import argparse
import re
from pathlib import Path

import pytest

from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.cli import main as cli


def test_a_model_is_inspected_listed_and_cleared(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "cache"))
    assert cli.main(["cache"]) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'cache'}\nno bundles\n"
    assert cli.main(["inspect", "tiny"]) == 0
    said = capsys.readouterr()
    assert "model      tiny" in said.out and "there is no folder tiny: exporting" in said.err
    assert cli.main(["cache"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split()[0].startswith("tiny-") and "cpu" in lines[2] and "float32" in lines[2]
    assert cli.main(["cache", "tiny"]) == 1
    assert "names are for --clear" in capsys.readouterr().err
    assert cli.main(["cache", "--clear", "tiny"]) == 0
    assert capsys.readouterr().out == f"removed {lines[2].split()[0]}\n"
    assert cli.main(["cache", "--clear"]) == 0
    assert capsys.readouterr().out == "removed nothing\n"


@pytest.mark.parametrize("name", ["run", "build", "check", "triton", "bench", "report", "inspect"])
def test_every_command_on_bundles_takes_a_model(name, tmp_path, capsys, monkeypatch):
    seen = []

    def find(bundle, options=None, *, to_run=False, budgets=(), before_export=None, progress=True):
        seen.append((bundle, options and options.target, to_run))
        raise SystemExit(0)

    # The module that has it comes last, since others take what they find there when first imported.
    for module in ("verify.check", "report.report", "pipeline.pipeline", "export.cache"):
        monkeypatch.setattr(f"trio_deploy.{module}.find_bundle", find)
    more = {"run": ["how?"], "triton": ["--out", str(tmp_path / "x")]}.get(name, [])
    wanted = {"inspect": None, "build": "l4"}.get(name, "cpu")  # of which engines can be built
    target = ["--target", wanted] if wanted else []
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.bindings.load", lambda flavour: None)
    with pytest.raises(SystemExit):
        cli.main([name, "org/model", *more, *target])
    assert seen == [("org/model", wanted, name in ("run", "check", "bench", "report"))]


@pytest.fixture
def no_export(tmp_path, monkeypatch):
    """A model that is exported fails the test; the cache is empty."""

    def export(*args, **kwargs):
        raise AssertionError("it was exported")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trio_deploy.export.job.export_model", export)


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ("run FOLDER how? --budget 0.001", "a budget of 0.001 cannot be reached"),
        ("bench FOLDER --budget 0.5,0.001", "a budget of 0.001 cannot be reached"),
        ("bench FOLDER --sweep --budget 0.001", "a budget of 0.001 cannot be reached"),
        ("triton FOLDER --out x --set budget=0.001", "a budget of 0.001 cannot be reached"),
        ("check tiny --golden", "no recorded reference of tiny, .*`trio check tiny --record`"),
        ("report tiny --bench none.json", "none.json holds no measurements of trio bench"),
        ("report tiny --eval none.json", "no results of trio eval at none.json"),
        ("report tiny --image none.png --prompt how?", "none.png"),
    ],
)
def test_what_can_be_known_before_is_said_before_a_model_is_exported(
    command, words, no_export, capsys
):
    # The recipe prunes before layer 0, so that any budget is possible; the folder alone does not.
    checkpoint = str(load_recipe("tiny").checkpoint)
    assert cli.main([checkpoint if each == "FOLDER" else each for each in command.split()]) == 1
    said = capsys.readouterr().err
    assert re.search(words, said) and said.count("\n") == 1


@pytest.mark.parametrize(
    "command",
    ["run tiny how?", "check tiny", "check tiny --golden", "bench tiny", "report tiny",
     "triton tiny --out x", "eval tiny --out x"],
)  # fmt: skip
def test_a_runtime_and_a_target_of_another_are_refused_alike_by_every_command(
    command, no_export, capsys
):
    assert cli.main([*command.split(), "--target", "cpu", "--runtime", "openvino"]) == 1
    assert capsys.readouterr().err == (
        "trio: the target cpu is of onnxruntime, not of openvino: name one of the two\n"
    )


def test_a_model_in_the_cache_without_a_recorded_reference_names_the_way_to_one(
    no_export, bundles, monkeypatch, capsys
):
    """One of older files does not count."""
    folder = bundles.copy(Path.cwd() / "cache" / "bundles" / "tiny-0123456789ab", "tiny")
    assert cli.main(["check", "tiny", "--golden"]) == 1
    assert "no recorded reference of tiny, which would have to be" in capsys.readouterr().err
    assert cli.main(["check", str(folder), "--golden"]) == 1
    assert "has no recorded reference: run `trio check --record`" in capsys.readouterr().err


def test_no_command_on_bundles_is_left_out():
    actions = cli.parser()._actions
    (found,) = (each for each in actions if isinstance(each, argparse._SubParsersAction))
    takers = {n for n, p in found.choices.items() if any(a.dest == "bundle" for a in p._actions)}
    assert takers == {
        "run", "build", "check", "triton", "bench", "report", "inspect", "serve", "chat",
        "attach-weights",  # which completes a bundle made by hand
    }  # fmt: skip
