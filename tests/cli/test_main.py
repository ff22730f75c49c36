"""The command line hands its arguments on, and turns failures into one line and a status."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from trio_deploy import Pipeline, RuntimeOptions, TextStream, TrioError, export_model
from trio_deploy.cli import main as cli
from trio_deploy.verify.compare import ParityRow
from trio_deploy.verify.report import Report, format_report


@pytest.fixture
def calls(monkeypatch):
    """Replaces what the commands call by recorders: name → (args, kwargs)."""
    seen = {}

    def record(module, name, result=None):
        def fake(*args, **kwargs):
            seen[name] = (args, kwargs)
            return result

        monkeypatch.setattr(f"trio_deploy.{module}.{name}", fake)

    record("export.job", "export_model", "bundle")
    record("export.attach", "attach_weights", "bundle")
    record("bundle.describe", "inspect", "what is in it")
    return seen


def test_help_lists_every_command(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["--help"])
    assert stop.value.code == 0
    out = capsys.readouterr().out
    for command in ("export", "run", "plan", "check", "inspect", "attach-weights"):
        assert command in out


def test_export_hands_on_what_was_asked(calls, capsys):
    command = (
        "export --model llava-next-7b --budget 0.222 --dtype float16 --dialect onnx "
        "--target t.yaml --out b --link-weights --graphs-only --force --weights inputs "
        "--max-pixels 4096 --positions original --probe shifted --threshold 0.9 --method dart "
        "--chat-template none --selections float --embeddings host"
    )
    assert cli.main(command.split()) == 0
    args, options = calls["export_model"]
    assert args == ("llava-next-7b", Path("b"))
    assert options == {
        "budget": 0.222,
        "quantize": None,
        "selections": "float",
        "embeddings": "host",
        "calibration": None,
        "chat_template": "none",
        "method": "dart",
        "schedule": None,
        "dtype": "float16",
        "dialect": "onnx",
        "weights": "inputs",
        "max_pixels": 4096,
        "target": "t.yaml",
        "link_weights": True,
        "graphs_only": True,
        "force": True,
        "positions": "original",
        "probe": "shifted",
        "threshold": 0.9,
    }
    assert "what is in it" in capsys.readouterr().out


@pytest.mark.parametrize("command", ["plan", "export --out b"])
def test_a_model_is_an_argument_or_an_option(calls, capsys, monkeypatch, command):
    def planned(model, *_, **__):
        raise TrioError(f"asked for {model}")

    monkeypatch.setattr("trio_deploy.cost.plan.plan", planned)
    monkeypatch.setattr("trio_deploy.export.job.export_model", planned)
    for model in ("tiny", "--model tiny", "--budget 0.2 tiny"):
        assert cli.main(f"{command} {model}".split()) == 1
        assert capsys.readouterr().err == "trio: asked for tiny\n"
    for model, words in (("", "--model: a recipe"), ("tiny --model tiny", "and not twice")):
        assert cli.main(f"{command} {model}".split()) == 1
        said = capsys.readouterr().err
        assert said.startswith("trio: name the model as MODEL or --model") and words in said


def test_trio_export_is_trio_export(calls, monkeypatch):
    monkeypatch.setattr("sys.argv", ["trio-export", "--model", "tiny", "--out", "b"])
    assert cli.export_main() == 0
    assert calls["export_model"][0] == ("tiny", Path("b"))


@pytest.mark.parametrize(
    ("option", "words"), [("--help", "usage: trio-export [-h]"), ("--version", "0.")]
)
def test_trio_export_goes_by_its_own_name(monkeypatch, capsys, option, words):
    monkeypatch.setattr("sys.argv", ["trio-export", option])
    with pytest.raises(SystemExit) as stop:
        cli.export_main()
    assert stop.value.code == 0
    assert words in capsys.readouterr().out


def test_budget_and_schedule_exclude_each_other(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main("export --model tiny --out b --budget 0.2 --schedule 1:3".split())
    assert stop.value.code == 2


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ("export", "trio export: the following arguments are required: --out (`trio export --help"),
        ("plan tiny mine", "trio plan: unexpected argument 'mine' (`trio plan --help` has"),
        ("rnu b", "trio: unknown command 'rnu'; did you mean 'run'? (`trio --help` has "),
        ("frobnicate", "trio: unknown command 'frobnicate' (`trio --help` has the options)"),
        (
            "run b --promt x",
            "trio run: unknown option --promt; did you mean '--prompt'? (`trio run --help`",
        ),
        ("inspect b --prompt=x y", "trio inspect: unknown option --prompt (`trio inspect --help` "),
        ("inspect b -x", "trio inspect: unexpected argument '-x' (`trio inspect --help` has"),
        ("inspect b c", "trio inspect: unexpected argument 'c' (`trio inspect --help` has"),
        ("plan --modle=tiny", "trio plan: unknown option --modle; did you mean '--model'?"),
        ("eval tiny --out b --seeds x", "trio eval: argument --seeds: invalid int value: 'x'"),
    ],
)
def test_a_command_line_that_is_wrong_is_one_line(capsys, arguments, words):
    with pytest.raises(SystemExit) as stop:
        cli.main(arguments.split())
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith(words) and said.count("\n") == 1


def test_trio_export_names_its_own_help(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["trio-export", "--model", "tiny", "--ouy", "b"])
    with pytest.raises(SystemExit) as stop:
        cli.export_main()
    assert stop.value.code == 2
    assert capsys.readouterr().err == (
        "trio-export: unknown option --ouy; did you mean '--out'? (`trio-export --help` has the "
        "options)\n"
    )


def test_verifying_a_bundle_without_weights_is_status_3(tmp_path, capsys, bundles):
    folder = bundles.path("tiny", graphs_only=True)
    assert cli.main(["inspect", str(folder)]) == 0
    capsys.readouterr()
    assert cli.main(["inspect", str(folder), "--verify"]) == 3
    said = capsys.readouterr()
    assert "weights are missing" in said.err and said.err.count("\n") == 1
    whole = bundles.path("tiny")
    assert cli.main(["inspect", str(whole), "--verify"]) == 0
    assert "missing" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--prompt", " "], "the question has no text: write something to ask"),
        ([""], "the question has no text: write something to ask"),
        ([], "there is no question: write it behind the pictures, or pass --prompt"),
        (["a.PNG"], "there is no question, since a.PNG names a picture: write the question last"),
        (["q?", __file__], f"there is no question, since {__file__} names a picture"),
    ],
)
def test_a_question_without_text_is_refused_before_the_bundle_is_opened(
    tmp_path, capsys, arguments, words
):
    assert cli.main(["run", str(tmp_path), *arguments]) == 1
    said = capsys.readouterr().err
    assert said.startswith(f"trio: {words}") and said.count("\n") == 1


def test_a_bundle_where_a_checkpoint_belongs_is_said_to_be_one(tmp_path, capsys):
    bundle = str(export_model("tiny", tmp_path / "b", graphs_only=True, progress=False).path)
    for command in (f"export --model {bundle} --out x", f"plan --model {bundle}"):
        assert cli.main(command.split()) == 1
        assert f"{bundle} is a bundle, which has been exported" in capsys.readouterr().err


def test_attach_weights_takes_a_bundle_and_a_checkpoint(calls):
    assert cli.main(["attach-weights", "b", "ckpt"]) == 0
    assert calls["attach_weights"][0] == (Path("b"), Path("ckpt"))


def test_errors_are_one_line_and_status_1(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise TrioError("no such model: pass a folder")

    monkeypatch.setattr("trio_deploy.export.job.export_model", fail)
    assert cli.main(["export", "--model", "x", "--out", "b"]) == 1
    captured = capsys.readouterr()
    assert captured.err == "trio: no such model: pass a folder\n"
    assert captured.out == ""
    with pytest.raises(TrioError):
        cli.main(["export", "--debug", "--model", "x", "--out", "b"])


def test_an_error_of_the_system_is_one_line_too(monkeypatch, capsys):
    def fail(*args, **kwargs):
        raise PermissionError(13, "Permission denied", "b")

    monkeypatch.setattr("trio_deploy.export.job.export_model", fail)
    assert cli.main(["export", "--model", "x", "--out", "b"]) == 1
    assert capsys.readouterr().err == "trio: [Errno 13] Permission denied: 'b'\n"


def test_an_interrupt_is_status_130(monkeypatch, capsys):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("trio_deploy.export.job.export_model", interrupt)
    assert cli.main(["export", "--model", "x", "--out", "b"]) == 130
    assert "Traceback" not in capsys.readouterr().err


@pytest.mark.parametrize(("problem", "status"), [("", 0), ("logits off", 1)])
def test_check_fails_when_a_row_does(monkeypatch, capsys, problem, status):
    from trio_deploy.verify import check as parity

    report = Report("a check", [ParityRow("embed"), ParityRow("prefill_0", problem=problem)])
    seen = {}
    monkeypatch.setattr(parity, "check", lambda *args, **kwargs: seen.update(kwargs) or report)
    assert cli.main(["check", "b", "--golden"]) == status
    assert seen["golden"] is True
    assert "prefill_0" in capsys.readouterr().out
    assert cli.main(["check", "b", "--json"]) == status
    assert json.loads(capsys.readouterr().out)["passed"] is (status == 0)


@pytest.mark.parametrize(("problem", "explained"), [("", True), ("other tokens", False)])
def test_a_table_explains_answers_that_may_differ(problem, explained):
    rows = [ParityRow("answer 0", tokens_equal=False, problem=problem)]
    text = format_report(Report("a check", rows))
    assert ("only float32 requires" in text) is explained


def test_check_records_before_it_checks(monkeypatch):
    from trio_deploy.verify import check as parity

    seen = []
    monkeypatch.setattr(parity, "record", lambda _, options, **__: seen.append(("record", options)))
    monkeypatch.setattr(
        parity, "check", lambda _, o, **__: seen.append(("check", o)) or Report("", [])
    )
    assert cli.main("check b --record --runtime onnxruntime --provider cuda".split()) == 0
    assert [name for name, _ in seen] == ["record", "check"]
    for _, options in seen:
        assert options == RuntimeOptions("onnxruntime", provider="cuda")


@pytest.mark.parametrize(
    ("schedule", "words"),
    [
        ("1:900,10:54", "only 576"),
        ("10:54,1:22", "must increase"),
        ("32:54", "layers 0 to 31"),
        ("1:22,10:54", "must not increase"),
        ("one", "layer:keep"),
    ],
)
def test_an_impossible_schedule_is_one_line_and_leaves_nothing(tmp_path, capsys, schedule, words):
    out = tmp_path / "b"
    command = ["export", "--model", "llava-1.5-7b", "--graphs-only", "--out", str(out)]
    assert cli.main([*command, "--schedule", schedule]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    assert not out.exists()


def test_run_on_a_missing_bundle_is_an_error(tmp_path, capsys):
    assert cli.main(["run", str(tmp_path / "none"), "--prompt", "hi"]) == 1
    assert "none" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("picture", "words"),
    [("no/kept.png", "no folder"), ("kept.xyz", ".xyz names no"), ("kept", "without an ending"),
     ("kept.eps.mpg", ".mpg names no"), (".", "is a folder")],
)  # fmt: skip
def test_show_that_cannot_be_written_fails_before_a_model_is_loaded(
    tmp_path, capsys, monkeypatch, picture, words
):
    def load(*args, **kwargs):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("trio_deploy.cli.run.bundle_of", load)
    scene = Path(__file__).parents[2] / "examples" / "scene.png"
    command = ["run", "b", "--prompt", "hi", "--image", str(scene), "--show"]
    assert cli.main([*command, str(tmp_path / picture)]) == 1
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1
    for good in ("kept.png", "kept.JPG"):
        with pytest.raises(AssertionError, match="was loaded"):
            cli.main([*command, str(tmp_path / good)])


def test_run_names_words_that_the_vocabulary_lacks_and_shows_that_an_answer_is_empty(
    tmp_path, capsys, monkeypatch
):
    bundle = export_model("tiny", tmp_path / "b", progress=False).path
    picture = Path(__file__).parents[2] / "examples" / "scene.png"
    command = ["run", str(bundle), "--image", str(picture), "--threads", "1", "--prompt"]
    assert cli.main([*command, "what color is the circle?"]) == 0
    known = capsys.readouterr()
    assert known.err == "" and known.out.startswith("white\n\nlayers")
    assert cli.main([*command, "what color is the Giraffe?", "--json"]) == 0
    asked = capsys.readouterr()
    assert asked.err.count("\n") == 1 and "lacks 'Giraffe':" in asked.err
    answer = json.loads(asked.out)
    assert answer["finish_reason"] == "stop"
    assert [f"trio: {warning}\n" for warning in answer["warnings"]] == [asked.err]

    generate = Pipeline.generate

    def silent(self, request):
        yield from ()
        return replace(generate(self, request), text="")

    monkeypatch.setattr(Pipeline, "stream", lambda *given: TextStream(silent(*given)))
    assert cli.main([*command, "what color is the circle?"]) == 0
    assert capsys.readouterr().out.startswith("(the model gave an empty answer)\n\nlayers")


def test_inspect_of_a_missing_bundle_is_an_error(tmp_path, capsys):
    assert cli.main(["inspect", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.startswith("trio: ")


def test_plan_prints_text_or_json(capsys):
    assert cli.main("plan --model llava-1.5-7b --budget 0.111".split()) == 0
    assert "average" in capsys.readouterr().out
    assert cli.main("plan --model llava-1.5-7b --schedule 1:9 --json".split()) == 0
    assert json.loads(capsys.readouterr().out)["keep"] == [9]


def test_verify_says_what_it_could_not_compare_and_compares_it_from_then_on(
    tmp_path, llava_checkpoint, capsys
):
    from trio_deploy import Bundle, export_model

    export_model(llava_checkpoint, tmp_path / "b", budget=0.5, link_weights=True, progress=False)
    command = ["inspect", str(tmp_path / "b"), "--verify"]
    assert cli.main(command) == 0
    captured = capsys.readouterr()
    assert "nothing to compare weights/model.safetensors with" in captured.err
    count = len(Bundle.load(tmp_path / "b").manifest.files)
    assert f"{count - 1} of {count} files have their checksum" in captured.out
    assert cli.main(command) == 0
    assert f"{count} of {count} files have their checksum" in capsys.readouterr().out
    weights = tmp_path / "b" / "weights" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.unlink()  # it shares its bytes with the checkpoint
    weights.write_bytes(content)
    assert cli.main(command) == 1
    assert "model.safetensors" in capsys.readouterr().err
