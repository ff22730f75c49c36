"""`trio bench`: its options, what it prints and writes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from tests.support.waiting import WAIT_S, wait_for
from trio_deploy import RuntimeOptions
from trio_deploy.bench.synthetic import RandomModel, make_bundle
from trio_deploy.cli import main as cli
from trio_deploy.cli.bench import shown_command


@pytest.fixture(scope="module")
def random_bundle(tmp_path_factory):
    size = "d=32,layers=4,vocab=300,mlp=48,heads=2,image=28,vision_d=16,vision_layers=2"
    folder = tmp_path_factory.mktemp("bench")
    model = RandomModel(size, schedule="1:2")
    return make_bundle(model, folder, RuntimeOptions(), progress=False)[0]


def test_the_command_measures_a_size_and_writes_what_it_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (
        "bench --size d=32,layers=4,vocab=300,mlp=48,heads=2,image=28,vision_d=16,vision_layers=2 "
        "--budget 0.5 --runs 1 --warm-up 0 --new-tokens 2 --baselines none --no-memory "
        f"--cache {tmp_path / 'cache'} --out figures"
    )
    assert cli.main(command.split()) == 0
    assert "50 %" in capsys.readouterr().out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["schema"] == 1 and len(written["cases"]) == 2
    assert str(tmp_path) not in (tmp_path / "figures.md").read_text()
    assert "--cache cache" in written["command"]
    assert (tmp_path / "figures.svg").read_text().startswith("<svg")
    assert not list(tmp_path.glob(".*"))


def test_a_bundle_or_a_size_not_both(tmp_path, capsys):
    for arguments in ([], [str(tmp_path), "--size", "d=64"]):
        assert cli.main(["bench", *arguments]) == 1
        assert "either a bundle" in capsys.readouterr().err
    assert cli.main(["bench", str(tmp_path), "--out", str(tmp_path / "none" / "f")]) == 1
    assert "no folder" in capsys.readouterr().err


def test_what_belongs_to_random_weights_is_not_taken_for_a_bundle(random_bundle, capsys):
    command = ["bench", str(random_bundle.path)]
    assert cli.main([*command, "--dtype", "float16"]) == 1
    assert "--dtype belongs to --size: a bundle has its own" in capsys.readouterr().err
    assert cli.main([*command, "--schedule", "1:2", "--cache", "c"]) == 1
    assert "--schedule and --cache belong to --size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--picture", "0x10"])
    assert "invalid WxH value: '0x10'" in capsys.readouterr().err


def test_several_numbers_of_pictures_are_a_sweep(capsys):
    assert cli.main(["bench", "b", "--images", "1,2"]) == 1
    assert "--sweep" in capsys.readouterr().err


def test_a_command_is_shown_without_this_machines_folders():
    arguments = ["bench", "/home/me/b", "--out=/tmp/x/f", "--budget", "0.1", "--cache", "c d"]
    assert shown_command(arguments) == "trio bench b --out=f --budget 0.1 --cache 'c d'"


# Runs the command line with another interpreter for its children.
PROGRAM = """
import sys
sys.executable = sys.argv[1]
from trio_deploy.cli.main import main
sys.exit(main(sys.argv[2:]))
"""


def test_a_signal_ends_the_process_that_measures_memory_too(random_bundle, tmp_path):
    number, child = tmp_path / "number", tmp_path / "python"
    waiting = f'exec {sys.executable} -c "import time; time.sleep(1000)"'
    child.write_text(f"#!/bin/sh\necho $$ > {number}.part\nmv {number}.part {number}\n{waiting}\n")
    child.chmod(0o755)
    options = "--new-tokens 2 --runs 1 --warm-up 0 --baselines none --threads 1"
    words = ["bench", str(random_bundle.path), *options.split(), "--out", str(tmp_path / "b")]
    process = subprocess.Popen([sys.executable, "-c", PROGRAM, str(child), *words])
    try:
        wait_for(lambda: number.is_file() or process.poll() is not None)
        process.send_signal(signal.SIGTERM)
        assert process.wait(WAIT_S) == 128 + signal.SIGTERM
        with pytest.raises(ProcessLookupError):
            os.kill(int(number.read_text()), 0)
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("b.*"))
