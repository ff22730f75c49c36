"""OpenVINO GenAI as a baseline: its process ends with ours, and what it kept is said."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.support.waiting import wait_for
from trio_deploy.bench.case import Case
from trio_deploy.bench.contenders import genai
from trio_deploy.bench.contenders.genai import GenAI, convert, pruning_text
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


GENAI = """
import types
class Pipeline:
    def __init__(self, *a, **k): pass
    def get_generation_config(self):
        known = {"pruning_ratio": 0} if KNOWN else {}
        return types.SimpleNamespace(**known)
    def generate(self, prompt, images, generation_config):
        ratio = getattr(generation_config, "pruning_ratio", 0)
        tokens = 100 - (ratio if HEEDED else 0)
        figure = types.SimpleNamespace(mean=1000.0)
        metrics = types.SimpleNamespace(get_num_input_tokens=lambda: tokens,
            get_ttft=lambda: figure, get_tpot=lambda: figure)
        return types.SimpleNamespace(perf_metrics=metrics, texts=[str(tokens)])
VLMPipeline, __version__ = Pipeline, "fake"
"""


@pytest.mark.parametrize(
    ("known", "heeded", "words"),
    [
        (True, False, "pruning_ratio 89 % was ignored: as many input tokens and the same answer"),
        (True, True, "pruning_ratio 89 % dropped 89 of 100 input tokens"),
        (False, False, "this version has no pruning_ratio, so nothing was pruned"),
    ],
)
def test_what_genais_own_pruner_did_is_said(fake, tmp_path, known, heeded, words):
    module = GENAI.replace("KNOWN", str(known)).replace("HEEDED", str(heeded))
    (tmp_path / "openvino_genai.py").write_text(module)
    (tmp_path / "openvino.py").write_text("Tensor = lambda array: array\n")
    # As `python -I child arguments`, with these modules in front.
    start = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[2:]"
    run = "runpy.run_path(sys.argv[0], run_name='__main__')"
    fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}; {run}" "$@"\n')
    case = Case(
        "x", "genai", "b", checkpoint=str(tmp_path / "model"), python=str(fake), pruning_ratio=89
    )
    with GenAI(case, WORK) as contender:
        runs = [contender(seed) for seed in range(2)]
    assert all(run.remark.startswith(words) for run in runs)
    assert runs[0].ran_as is not None and runs[0].ran_as.runtime == "openvino genai"


def test_an_answer_that_changed_without_fewer_tokens_is_said():
    tried = {"known": True, "ratio": 50, "before": 9, "after": 9, "same": False}
    assert "changed the answer" in pruning_text(tried)
    assert pruning_text(None) == ""
