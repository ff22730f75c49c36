"""The watcher, on processes that stand in for the server and the model."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.support.waiting import WAIT_S
from trio_deploy.serve.triton_server import watch

DEAF = "signal.signal(signal.SIGTERM, signal.SIG_IGN); "
REGION = "triton_python_backend_shm_region_7"


@pytest.fixture
def start() -> Iterator[Callable[..., subprocess.Popen]]:
    started: list[subprocess.Popen] = []

    def start(first: str = "") -> subprocess.Popen:
        code = f"import signal, time; {first}print('ready', flush=True); time.sleep(600)"
        process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
        started.append(process)
        assert process.stdout is not None and process.stdout.readline()
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setattr(watch, "_SHARED_MEMORY", tmp_path)
    (tmp_path / REGION).touch()
    return tmp_path / REGION


def watching(monkeypatch: pytest.MonkeyPatch, server: int, model: int, said: bytes | None) -> None:
    """Watch a model that says this and ends, or goes on if it is None."""
    reading, writing = os.pipe()
    if said is not None:
        os.write(writing, said)
        os.close(writing)
    with os.fdopen(reading) as stdin, monkeypatch.context() as patch:
        patch.setattr(sys, "stdin", stdin)
        watch._main("trio_vlm", server, model, [f"/{REGION}"])
    if said is None:
        os.close(writing)


def test_a_server_that_waits_for_a_dead_models_requests_is_killed(
    start: Callable[..., subprocess.Popen],
    region: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    server = start(DEAF)
    monkeypatch.setattr(watch, "_GRACE_S", 0.2)
    watching(monkeypatch, server.pid, 0, b"")
    assert server.wait(WAIT_S) == -signal.SIGKILL
    assert "the process of trio_vlm was killed" in capsys.readouterr().err
    assert not region.exists()


def test_a_server_that_ends_when_asked_is_not_killed(
    start: Callable[..., subprocess.Popen], region: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    monkeypatch.setattr(watch, "_GRACE_S", 600.0)
    watching(monkeypatch, server.pid, 0, b"")
    assert server.wait(WAIT_S) == -signal.SIGTERM
    assert not region.exists()


def test_a_model_that_announces_its_end_ends_alone(
    start: Callable[..., subprocess.Popen], region: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start()
    watching(monkeypatch, server.pid, 0, b"finalized")
    assert server.poll() is None
    assert region.exists(), "the server's own to remove"


def test_a_dead_server_takes_the_model_along(
    start: Callable[..., subprocess.Popen], region: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server, model = start(), start(DEAF)
    server.kill()
    monkeypatch.setattr(watch, "_POLL_S", 0.01)
    watching(monkeypatch, server.pid, model.pid, None)
    assert model.wait(WAIT_S) == -signal.SIGKILL
    assert not region.exists()
