"""`trio cache` lists and clears; commands take a model in place of a bundle."""

from __future__ import annotations

import argparse

import pytest

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

    def find(bundle, options=None, *, to_run=False, budget=None, progress=True):
        seen.append((bundle, options and options.target, to_run))
        raise SystemExit(0)

    monkeypatch.setattr("trio_deploy.export.cache.find_bundle", find)
    monkeypatch.setattr("trio_deploy.pipeline.pipeline.find_bundle", find)
    monkeypatch.setattr("trio_deploy.report.report.find_bundle", find)
    more = {"run": ["how?"], "triton": ["--out", str(tmp_path / "x")]}.get(name, [])
    wanted = {"inspect": None, "build": "l4"}.get(name, "cpu")  # of which engines can be built
    target = ["--target", wanted] if wanted else []
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.bindings.load", lambda flavour: None)
    with pytest.raises(SystemExit):
        cli.main([name, "org/model", *more, *target])
    assert seen == [("org/model", wanted, name in ("run", "check", "bench", "report"))]


def test_no_command_on_bundles_is_left_out():
    actions = cli.parser()._actions
    (found,) = (each for each in actions if isinstance(each, argparse._SubParsersAction))
    takers = {n for n, p in found.choices.items() if any(a.dest == "bundle" for a in p._actions)}
    assert takers == {
        "run", "build", "check", "triton", "bench", "report", "inspect",
        "attach-weights",  # which completes a bundle made by hand
    }  # fmt: skip
