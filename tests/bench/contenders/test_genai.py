"""OpenVINO GenAI as a baseline: its process ends with ours, and what it kept is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from trio_deploy.bench.case import Case
from trio_deploy.bench.contenders import genai
from trio_deploy.bench.contenders.genai import GenAI, convert
from trio_deploy.bench.workload import Workload

WORK = Workload(1, 8, 8, "what ?", 2)


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An interpreter that has GenAI, as far as asked, and never answers: it writes its number."""
    script = tmp_path / "python"
    script.write_text(
        f"#!/bin/sh\necho $$ > {tmp_path / 'number'}\nexec {sys.executable} -c "
        '"import time; time.sleep(1000)"\n'
    )
    script.chmod(0o755)
    monkeypatch.setattr(genai, "missing", lambda python: None)
    converted = tmp_path / "model-genai"
    converted.mkdir()
    (converted / "openvino_language_model.xml").write_text("")
    return script


def ended(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    return False


def test_an_exception_ends_the_process_at_once_and_removes_its_folder(fake, tmp_path):
    case = Case("x", "genai", "b", checkpoint=str(tmp_path / "model"), python=str(fake))
    with pytest.raises(KeyboardInterrupt), GenAI(case, WORK) as contender:
        folder = Path(contender._folder.name)
        wait_for(lambda: (tmp_path / "number").is_file() and (tmp_path / "number").read_text())
        raise KeyboardInterrupt
    assert ended(int((tmp_path / "number").read_text()))
    assert not folder.exists()


def test_a_conversion_that_is_stopped_leaves_nothing(tmp_path, monkeypatch):
    def stopped(command, **_):
        Path(command[-1]).mkdir()
        raise KeyboardInterrupt

    monkeypatch.setattr(genai.subprocess, "run", stopped)
    with pytest.raises(KeyboardInterrupt):
        convert(tmp_path / "model", "python")
    assert list(tmp_path.iterdir()) == []
