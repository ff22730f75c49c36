"""`trio build` says whether the engines fit the target's memory, and stops where they cannot."""

from __future__ import annotations

import json

import pytest

from trio_deploy import TrioError, export_model
from trio_deploy.cli.main import main
from trio_deploy.config.target import target_folder

NANO = "jetson-orin-nano-8gb"


@pytest.fixture
def target(tmp_path):
    """Writes a target like the Nano, with other memory."""

    def write(gib: float) -> str:
        text = (target_folder() / f"{NANO}.yaml").read_text()
        lines = [
            f"{key}: {gib}" if (key := line.partition(":")[0]) == "memory_gib" else line
            for line in text.splitlines()
            if not line.startswith("reserved_gib")
        ]
        file = tmp_path / f"device-{gib}.yaml"
        file.write_text("\n".join(lines))
        return str(file)

    return write


@pytest.mark.parametrize(
    ("gib", "verdict", "status"),
    [
        (0.01, "does not fit device-0.01: weights, ", 1),
        (0.1, "may not fit device-0.1: with activations of at most ", 0),
        (7.4, "fits device-7.4: at most ", 0),
    ],
)
def test_the_dry_run_weighs_memory_beside_the_operators(
    bundles, target, capsys, gib, verdict, status
):
    folder = bundles.path("tiny", target=NANO, graphs_only=True)
    command = ["build", str(folder), "--dry-run", "--target", target(gib)]
    assert main(command) == status
    *_, graphs, memory = capsys.readouterr().out.splitlines()
    assert graphs.startswith("graphs: passed") and memory.startswith(f"memory: {verdict}")
    assert main([*command, "--allow-oversized"]) == 0
    capsys.readouterr()
    assert main([*command, "--json"]) == status
    said = json.loads(capsys.readouterr().out)
    assert said["passed"] is True and said["memory"]["oversized"] is (status == 1)
    assert main([*command, "--stage", "embed"]) == 0, "a stage alone is not weighed"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "the target cpu runs onnxruntime: engines are for targets"),
        ("", "; name one, such as `trio build tiny --target l4` (`ls engines`)"),
        ("--dry-run --target cuda", "the target cuda runs onnxruntime: engines are for targets"),
        ("--target l4", "no driver here"),
        ("--target rtx", "no driver here"),
        ("--target l4 --tensorrt 10.3", "--tensorrt is for --dry-run"),
        ("--target l4 --dry-run --force", "--force rebuilds engines, and --dry-run builds none"),
        ("--target l5", "l5"),
    ],
)
def test_a_model_of_which_no_engines_can_be_built_is_not_exported(
    options, words, monkeypatch, capsys
):
    def export(*args, **kwargs):
        raise AssertionError("it was exported")

    def load(flavour):
        raise TrioError("no driver here")

    monkeypatch.setattr("trio_deploy.export.job.export_model", export)
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.bindings.load", load)
    assert main(["build", "tiny", *options.split()]) == 1
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ("", "tiny does not fit device-0.01: weights, "),
        ("--stage tower", "tiny has no stage 'tower': name one of vision, embed, "),
        ("--dry-run --stage tower", "tiny has no stage 'tower': name one of vision, embed, "),
    ],
)
def test_a_model_whose_engines_the_device_cannot_hold_is_not_exported(
    options, words, target, tmp_path, monkeypatch, capsys
):
    def export(*args, **kwargs):
        raise AssertionError("it was exported")

    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("trio_deploy.export.job.export_model", export)
    monkeypatch.setattr("trio_deploy.runtimes.tensorrt.bindings.load", lambda flavour: None)
    assert main(["build", "tiny", "--json", "--target", target(0.01), *options.split()]) == 1
    assert words in capsys.readouterr().err
    with pytest.raises(AssertionError, match="it was exported"):
        main(["build", "tiny", "--target", target(0.01), "--allow-oversized"])


def test_export_says_it_before_weights_are_copied(tmp_path, target, capsys):
    export_model("tiny", tmp_path / "b", target=target(0.01), graphs_only=True)
    assert "trio: does not fit device-0.01: weights, " in capsys.readouterr().err
    export_model("tiny", tmp_path / "c", target=target(7.4), graphs_only=True, progress=False)
    assert capsys.readouterr().err == ""


def test_the_verdict_of_a_bundle_is_that_of_the_plan(bundles):
    from trio_deploy import Bundle, plan
    from trio_deploy.runtimes.registry import load_target
    from trio_deploy.runtimes.tensorrt.memory import bundle_fit

    bundle = Bundle.load(bundles.path("tiny", target=NANO, graphs_only=True))
    planned = plan("tiny", target=NANO).fit
    assert planned is not None
    assert bundle_fit(bundle, load_target(NANO)).layouts[0] == planned.layouts[0]
