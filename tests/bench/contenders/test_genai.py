"""OpenVINO GenAI as a baseline: its process ends with ours, and what it kept is said."""

from __future__ import annotations

import os
import sys
from dataclasses import replace
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
        folder = contender.folder
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
import os, types
class Pipeline:
    def __init__(self, *a, **k): pass
    def get_generation_config(self):
        known = {"pruning_ratio": 0, "relevance_weight": 0.5} if KNOWN else {}
        return types.SimpleNamespace(**known)
    def generate(self, prompt, images, generation_config):
        ratio = getattr(generation_config, "pruning_ratio", 0)
        tokens = 100 - (ratio if HEEDED else 0)
        figure = types.SimpleNamespace(mean=1000.0)
        part = lambda share: lambda: types.SimpleNamespace(mean=share * 1000.0)
        parts = {"get_prepare_embeddings_duration": part(0.75)} if STAGES else {}
        metrics = types.SimpleNamespace(get_num_input_tokens=lambda: tokens,
            get_ttft=lambda: figure, get_tpot=lambda: figure, **parts)
        with open(os.path.join(os.path.dirname(__file__), "threshold"), "w") as file:
            file.write(os.environ.get("CDPRUNER_SPLIT_THRESHOLD", ""))
        return types.SimpleNamespace(perf_metrics=metrics, texts=[str(tokens)])
VLMPipeline, SchedulerConfig, __version__ = Pipeline, types.SimpleNamespace, "fake"
"""


@pytest.fixture
def answering(fake, tmp_path):
    """Writes the interpreter's openvino_genai, which answers; returns the function that does."""

    def write(*, known: bool = True, heeded: bool = True, stages: bool = True) -> None:
        named = {"KNOWN": known, "HEEDED": heeded, "STAGES": stages}
        module = GENAI
        for name, value in named.items():
            module = module.replace(name, str(value))
        (tmp_path / "openvino_genai.py").write_text(module)
        (tmp_path / "openvino.py").write_text("Tensor = lambda array: array\n")
        # As `python -I child arguments`, with these modules in front.
        start = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); sys.argv = sys.argv[2:]"
        run = "runpy.run_path(sys.argv[0], run_name='__main__')"
        fake.write_text(f'#!/bin/sh\nexec {sys.executable} -c "{start}; {run}" "$@"\n')
        fake.chmod(0o755)

    return write


def pruning(fake, tmp_path, **more) -> Case:
    model = str(tmp_path / "model")
    return Case("x", "genai", "b", checkpoint=model, python=str(fake), pruning_ratio=89, **more)


@pytest.mark.parametrize(
    ("known", "heeded", "words", "keep"),
    [
        (True, False, "pruning_ratio 89 % was ignored: as many input tokens and the same", ()),
        (
            True,
            True,
            "pruning_ratio 89 %, relevance_weight 0.5: kept 7 of 96 visual tokens, chosen in each",
            (7,),
        ),
        (False, False, "this version has no pruning_ratio, so nothing was pruned", ()),
    ],
)
def test_what_genais_own_pruner_did_is_said(fake, answering, tmp_path, known, heeded, words, keep):
    answering(known=known, heeded=heeded)
    with GenAI(pruning(fake, tmp_path), replace(WORK, visual_tokens=96)) as contender:
        runs = [contender(seed) for seed in range(2)]
    assert all(run.remark.startswith(words) and run.keep == keep for run in runs)
    assert runs[0].ran_as is not None and runs[0].ran_as.runtime == "openvino genai"


def test_the_pruner_chooses_among_all_tokens_where_told(fake, answering, tmp_path, monkeypatch):
    monkeypatch.setenv("CDPRUNER_SPLIT_THRESHOLD", "77")  # of another use of this shell
    answering()
    for halves, words, told in ((True, "in each half", ""), (False, "among all of them", "0")):
        with GenAI(pruning(fake, tmp_path, halves=halves), WORK) as contender:
            assert words in contender(0).remark
        assert (tmp_path / "threshold").read_text() == told


def test_vision_and_language_model_are_told_apart_where_genai_does(fake, answering, tmp_path):
    for stages in (True, False):
        answering(stages=stages)
        with GenAI(pruning(fake, tmp_path), WORK) as contender:
            run = contender(0)
        assert run.stages == ({"vision": 0.75, "prefill": 0.25} if stages else {})
        assert run.prefill_s == (0.25 if stages else 0)


def test_an_answer_that_changed_without_fewer_tokens_is_said():
    tried = {"known": True, "ratio": 50, "before": 9, "after": 9, "same": False}
    assert "changed the answer" in pruning_text(tried, 9, True)
    assert pruning_text(None, 9, True) == ""
