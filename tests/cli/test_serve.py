"""`trio serve` as its user sees it: first lines that work, refusals in time, an orderly end."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.support.bundles import Bundles
from tests.support.http_server import chat, request
from tests.support.waiting import WAIT_S
from trio_deploy import TrioError
from trio_deploy.cli import serve
from trio_deploy.cli.main import main
from trio_deploy.serve.openai.gate import digest_of
from trio_deploy.serve.openai.keys import API_KEY


def parsed(*words: str) -> argparse.Namespace:
    command = argparse.ArgumentParser()
    serve.add_arguments(command)
    return command.parse_args(["bundle", *words])


@pytest.fixture
def process(bundles: Bundles) -> Any:
    """A running server, and the lines that it printed first."""
    words = [sys.executable, "-m", "trio_deploy", "serve", str(bundles.path("tiny")), "--port", "0"]
    words += ["--threads", "1", "--name", "tiny"]
    environment = {k: v for k, v in os.environ.items() if k != API_KEY}
    with subprocess.Popen(
        words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    ) as running:
        assert running.stdout is not None
        lines = []
        for line in running.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("print("):
                break
        yield running, lines
        running.kill()


def test_the_first_lines_work_as_printed_and_a_signal_ends_it_in_order(process: Any) -> None:
    running, lines = process
    assert lines, running.stderr.read()
    url = re.findall(r"http://127\.0\.0\.1:\d+", lines[0])[0]
    assert "serves tiny at" in lines[0] and "512 unless asked for" in lines[2]
    (curl,) = [line for line in lines if line.startswith("curl ")]
    if shutil.which("curl"):
        done = subprocess.run(["sh", "-c", curl], capture_output=True, text=True, timeout=WAIT_S)
        assert '"content":"red"' in done.stdout, done.stdout + done.stderr
    program = "\n".join(lines[lines.index(curl) + 1 :])
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, {})
    assert printed.getvalue() == "red\n"

    address = ("127.0.0.1", int(url.rpartition(":")[2]))
    with socket.create_connection(address, timeout=WAIT_S) as connection:
        body = chat("what color is the circle?", max_tokens=60, ignore_eos=True, stream=True)
        connection.sendall(request("POST", "/v1/chat/completions", body))
        connection.recv(1)  # it has begun
        running.send_signal(signal.SIGTERM)
        rest = b""
        while data := connection.recv(65536):
            rest += data
    assert b'"finish_reason":"length"' in rest and b"data: [DONE]" in rest
    assert running.wait(WAIT_S) == 0
    assert "Traceback" not in running.stderr.read()


def test_other_machines_need_a_key_unless_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    assert serve.doors_of(parsed()).keys == []
    with pytest.raises(TrioError, match="--no-auth"):
        serve.doors_of(parsed("--host", "0.0.0.0"))
    doors = serve.doors_of(parsed("--host", "0.0.0.0", "--no-auth"))
    assert doors.keys == [] and doors.any_address
    file = tmp_path / "keys"
    file.write_text("one\n\n two \n")
    monkeypatch.setenv(API_KEY, "three\n")
    doors = serve.doors_of(parsed("--api-key-file", str(file), "--allowed-host", "A.example.com"))
    assert {*doors.keys} == {digest_of(key) for key in ("one", "two", "three")}
    assert doors.hosts is not None and "a.example.com" in doors.hosts and not doors.any_address
    with pytest.raises(TrioError, match="leave one out"):
        serve.doors_of(parsed("--no-auth"))
    monkeypatch.setenv(API_KEY, " ")  # no key, not one that nobody can send
    assert serve.doors_of(parsed()).keys == []
    monkeypatch.setenv(API_KEY, "clé")
    with pytest.raises(TrioError, match="ASCII"):
        serve.doors_of(parsed())


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--api-key-file", "/nowhere/keys"], "there is no file /nowhere/keys"),
        (["--host", "0.0.0.0"], "--no-auth"),
        (["--set", "max_tokens=0"], "max_tokens must be 1 or more"),
        (["--set", "max_token=5"], "unknown parameter 'max_token'"),
        (["--set", "default_max_tokens=50", "--set", "max_tokens=5"], "at most max_tokens = 5"),
        (["--allow-images-from", "*.example.com"], "--allow-images-from takes a host"),
        (["--allowed-host", "http://a.example.com"], "--allowed-host 'http://a.example.com' is no"),
        (["--allowed-host", "a.example.com/v1"], "is no name of a host"),
        (["--allowed-host", ""], "is no name of a host"),
        (["--drain-s", "-1"], "--drain-s must be 0 or more"),
        (["--ssl-certfile", "a"], "both --ssl-certfile and --ssl-keyfile"),
        (["--ssl-certfile", "/no/a", "--ssl-keyfile", "/no/b"], "there is no file /no/a"),
        (["--port", "99999"], "cannot listen at 127.0.0.1 port 99999"),
        (["--runtime", "nothing"], "nothing"),
    ],
)
def test_what_is_wrong_is_told_before_a_model_is_exported(
    words: list[str],
    message: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.setattr("trio_deploy.cli.serve.bundle_of", lambda *given, **named: 1 / 0)
    assert main(["serve", "tiny", *words]) == 1
    assert message in capsys.readouterr().err


def test_the_page_opens_where_a_browser_has_a_window_and_else_its_address_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr("sys.platform", "linux")
    monkeypatch.setattr("webbrowser.open", lambda url: opened.append(url) or len(opened) < 2)
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    page = "http://127.0.0.1:8000/"
    serve.open_page(page)
    assert not opened and page in capsys.readouterr().out
    monkeypatch.setenv("DISPLAY", ":0")
    serve.open_page(page)
    assert opened == [page] and not capsys.readouterr().out
    serve.open_page(page)  # the browser fails
    assert page in capsys.readouterr().out


def test_a_model_is_called_as_it_was_named(tmp_path: Path) -> None:
    folder = tmp_path / "my-bundle"
    folder.mkdir()
    assert serve._name(f"{folder}/") == "my-bundle"
    assert serve._name("tiny") == "tiny" and serve._name("org/model") == "org/model"
