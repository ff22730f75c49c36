"""A command that is told to end removes what it has half-written, whichever signal says so."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.waiting import WAIT_S
from trio_deploy.cli.signals import Stopped, raising_signals

# Runs the command line, and stops for ever in the middle of writing: after the first file of a
# folder, or with a file's content written under its temporary name.
PROGRAM = """
import os, signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job ignores it
if sys.argv[1] == "ignored":
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from trio_deploy import files
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.cli.main import main
def wait():
    print("writing", flush=True)
    sys.stdin.readline()
write, fsync = BundleWriter.write, os.fsync
def write_one(self, relative, content):
    write(self, relative, content)
    wait()
def flush(descriptor):
    fsync(descriptor)
    wait()
if "inspect" in sys.argv:
    os.fsync = flush
else:
    BundleWriter.write = write_one
sys.exit(main(sys.argv[2:]))
"""


def started(*arguments: object, ignored: bool = False) -> subprocess.Popen[str]:
    how = "ignored" if ignored else "default"
    process = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, how, *map(str, arguments)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n", process.communicate()[1]
    return process


def everything(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


@pytest.fixture
def words(command, bundles, llava_checkpoint, tmp_path) -> list[object]:
    """The command line of a command, which writes into this test's folder."""

    def copy(model: object, **options: object) -> Path:
        return bundles.copy(tmp_path / "bundle", model, **options)

    options = {"schedule": "1:0.5"}
    makers = {
        "export": lambda: ["export", "--model", "tiny", "--out", tmp_path / "b"],
        "attach-weights": lambda: [
            "attach-weights",
            copy(llava_checkpoint, graphs_only=True, **options),
            llava_checkpoint,
        ],
        "triton": lambda: ["triton", copy("tiny"), "--out", tmp_path / "models"],
        "inspect": lambda: [
            "inspect",
            copy(llava_checkpoint, link_weights=True, **options),
            "--verify",
        ],
    }
    return makers[command]()


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("export", "SIGTERM"),
        ("export", "SIGHUP"),
        ("export", "SIGINT"),
        ("attach-weights", "SIGTERM"),
        ("triton", "SIGTERM"),
        ("inspect", "SIGTERM"),
    ],
)
def test_a_signal_leaves_the_folder_as_it_was(command, name, words, tmp_path):
    before = everything(tmp_path)
    process = started(*words)
    assert everything(tmp_path) != before
    number = getattr(signal, name)
    process.send_signal(number)
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number
    last = error.splitlines()[-1]
    assert last in ("trio: interrupted", f"trio: stopped by {name}"), error
    assert everything(tmp_path) == before


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path):
    process = started("export", "--model", "tiny", "--out", tmp_path / "b", ignored=True)
    process.send_signal(signal.SIGHUP)
    _, error = process.communicate("\n" * 100, timeout=WAIT_S)
    assert process.returncode == 0, error
    assert (tmp_path / "b" / "manifest.json").is_file()


def test_a_second_signal_does_not_disturb_what_the_first_one_ends():
    """By this thread's own signals: the process's may come later, when nothing holds them."""
    tidied = []
    with pytest.raises(Stopped, match="stopped by SIGTERM") as stopped, raising_signals():
        try:
            signal.raise_signal(signal.SIGTERM)
        finally:
            signal.raise_signal(signal.SIGTERM)
            tidied.append(True)
    assert tidied
    assert stopped.value.status == 143
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
