"""What every measuring command writes says how it ran: as it was asked to, or not at all."""

import json

import pytest

from trio_deploy.cli.main import main
from trio_deploy.evaluation import tune
from trio_deploy.evaluation.questions import scene_questions

OPENVINO = {
    "runtime": "openvino",
    "target": "cpu-openvino",
    "dialect": "primitive",
    "dtype": "float32",
    "precision": "float32",
    "device": "CPU",
}
ORT = OPENVINO | {
    "runtime": "onnxruntime",
    "target": "cpu",
    "device": "CPUExecutionProvider",
}
FEW = "--new-tokens 2 --runs 1 --warm-up 0 --baselines none --no-memory"


@pytest.fixture(scope="module")
def bundle(bundles):
    return bundles.path("tiny", dialect="primitive")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Options that ask one question."""
    folder = tmp_path_factory.mktemp("questions")
    (question,) = scene_questions(1, each=1)
    question.images[0].save(folder / "x.png")
    line = {"question_id": 7, "image": "x.png", "text": question.prompt, "answer": "red"}
    (folder / "q.jsonl").write_text(json.dumps(line))
    return f"--questions {folder / 'q.jsonl'} --max-new-tokens 2 --threads 1"


def run(text):
    assert main(text.split()) == 0, text


def test_an_evaluation_runs_a_bundle_as_asked_and_takes_no_answer_of_another_way(
    bundle, questions, tmp_path, capsys
):
    def ran(options: str) -> list[dict]:
        run(f"eval {bundle} --out {tmp_path} --budgets own --no-plot {questions} {options}")
        return [
            one["ran_as"] for one in json.loads((tmp_path / "results.json").read_text())["results"]
        ]

    assert ran("") == [ORT] * 2
    answered = set((tmp_path / "answers").iterdir())
    assert ran("--target cpu-openvino") == [OPENVINO] * 2
    assert len(set((tmp_path / "answers").iterdir()) - answered) == 2
    assert "Ran as openvino on CPU, target cpu-openvino" in (tmp_path / "results.md").read_text()
    assert ran("--target cpu --dtype float32") == [ORT] * 2


def test_an_evaluation_of_a_model_names_the_target_it_was_exported_for(questions, tmp_path):
    run(f"eval tiny --out {tmp_path} --schedule 0:0.2 --target cpu-openvino --no-plot {questions}")
    found = json.loads((tmp_path / "results.json").read_text())["results"]
    assert [one["ran_as"] for one in found] == [OPENVINO] * 2


def test_a_search_names_how_it_ran(questions, tmp_path, monkeypatch):
    monkeypatch.setattr(tune, "neighbours", lambda *_: [])  # one candidate is enough
    options = "--candidates 1 --points 1 --target cpu-openvino"
    run(f"tune tiny --out {tmp_path} {options} {questions}")
    text = (tmp_path / "schedule.yaml").read_text(encoding="utf-8")
    assert "# Ran as openvino on CPU, target cpu-openvino, primitive graphs in float32" in text


@pytest.mark.parametrize(
    ("options", "expected"), [("", ORT), ("--target cpu-openvino", OPENVINO)], ids=["own", "asked"]
)
def test_a_measurement_names_how_each_case_ran(bundle, tmp_path, options, expected):
    run(f"bench {bundle} {FEW} --threads 1 --out {tmp_path / 'b'} {options}")
    cases = json.loads((tmp_path / "b.json").read_text())["cases"]
    assert [case["ran_as"] for case in cases] == [expected] * 2
    assert f"no pruning, 11 %: {expected['runtime']} on" in (tmp_path / "b.md").read_text()


def test_a_check_names_how_it_ran(bundle, capsys):
    run(f"check {bundle} --target cpu-openvino --threads 1 --json")
    assert json.loads(capsys.readouterr().out)["ran_as"] == OPENVINO


def test_a_page_names_how_its_figures_ran(bundle, tmp_path):
    options = "--no-check --no-bench --scenes 0 --target cpu-openvino --threads 1"
    run(f"report {bundle} --out {tmp_path / 'r.html'} {options}")
    page = (tmp_path / "r.html").read_text(encoding="utf-8")
    assert "Ran as openvino on CPU, target cpu-openvino, primitive graphs in float32" in page


@pytest.mark.parametrize("command", ["eval", "bench", "check", "report"])
def test_a_bundle_that_cannot_serve_a_target_is_refused(bundles, command, tmp_path, capsys):
    out = {"eval": f"--out {tmp_path / 'e'}", "report": f"--out {tmp_path / 'r.html'}"}
    arguments = f"{command} {bundles.path('tiny')} --target cpu-openvino {out.get(command, '')}"
    assert main(arguments.split()) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "export it with --dialect primitive" in error or "with --target cpu-openvino" in error
    assert list(tmp_path.iterdir()) == []


def test_another_float_type_than_a_bundles_is_refused(bundle, tmp_path, capsys):
    assert main(f"eval {bundle} --out {tmp_path} --scenes 1 --dtype float16".split()) == 1
    assert "is in float32, not in float16: export another bundle" in capsys.readouterr().err
    target = tmp_path / "half.yaml"
    target.write_text("description: x\nruntime: onnxruntime\ndtype: float16\n")
    out = tmp_path / "out"
    for command in (f"eval {bundle} --out {out} --scenes 1", f"bench {bundle} {FEW}"):
        assert main(f"{command} --target {target}".split()) == 1
        assert "and the target half is in float16: export another" in capsys.readouterr().err
    assert not out.exists()
