"""Options of the commands: one set for running bundles, and none of the older ones lost."""

from __future__ import annotations

import argparse
import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest

from trio_deploy import RuntimeOptions, TrioError
from trio_deploy.cli import main as cli
from trio_deploy.cli.options import runtime_options
from trio_deploy.runtimes.registry import RUNTIMES

RUN_BUNDLES = ("run", "check", "eval", "bench", "report", "tune", "triton")

# Options and arguments of each command before the commands became files of their own.
BEFORE = {
    "export": "--debug --model --out --budget --schedule --method --dtype --dialect --target "
    "--link-weights --graphs-only --positions --probe --threshold --force",
    "attach-weights": "--debug bundle checkpoint",
    "run": "--debug bundle --image --prompt --budget --show --runtime --target --provider "
    "--threads --low-memory --max-new-tokens --temperature --top-p --seed --stop --json",
    "build": "--debug bundle --target --dry-run --tensorrt --stage --force --json",
    "plan": "--debug --model --budget --schedule --method --visual-tokens --text-tokens --target "
    "--dtype --probes --json",
    "check": "--debug bundle --runtime --target --provider --record --golden --checkpoint "
    "--threads --json",
    "triton": "--debug bundle --out --runtime --target --device --instances --stages --name "
    "--settings --set --link --force",
    "eval": "--debug model --out --budgets --methods --schedule --threshold --probe --positions "
    "--seeds --blind --no-plot --scenes --family --split --first --questions --images --append "
    "--limit --annotations --scorer --batch --max-new-tokens --target --dtype --runtime "
    "--provider --threads --json",
    "tune": "--debug model --out --budget --methods --points --threshold --probe --positions "
    "--candidates --start --scenes --family --split --first --questions --images --append --limit "
    "--batch --max-new-tokens --target --dtype --runtime --provider --threads",
    "bench": "--debug bundle --size --budget --schedule --images --picture --text-tokens "
    "--new-tokens --runs --warm-up --sweep --baselines --genai-python --checkpoint --no-memory "
    "--runtime --target --provider --precision --threads --dtype --dialect --cache --out --json",
    "report": "--debug bundle --out --bench --eval --image --prompt --scenes --no-check --no-bench "
    "--runtime --provider --threads",
    "inspect": "--debug bundle --verify",
}


def commands() -> dict[str, argparse.ArgumentParser]:
    """The parser of each command by its name."""
    actions = cli.parser()._actions
    (found,) = (each for each in actions if isinstance(each, argparse._SubParsersAction))
    return dict(found.choices)


def named(command: argparse.ArgumentParser) -> dict[str, argparse.Action]:
    """Options and arguments of a command."""
    return {(each.option_strings or [each.dest])[-1]: each for each in command._actions}


@pytest.mark.parametrize("name", BEFORE)
def test_no_option_is_lost(name: str) -> None:
    assert set(BEFORE[name].split()) <= set(named(commands()[name]))


@pytest.mark.parametrize("name", RUN_BUNDLES)
def test_every_command_that_runs_bundles_takes_every_option_of_running(name: str) -> None:
    asked = [f"--{each.name.replace('_', '-')}" for each in dataclasses.fields(RuntimeOptions)]
    first, here = (named(commands()[each]) for each in (RUN_BUNDLES[0], name))
    for option in asked:
        assert here[option].help == first[option].help
        assert (here[option].default, here[option].type) == (
            first[option].default,
            first[option].type,
        )


def test_help_names_every_runtime() -> None:
    text = named(commands()["run"])["--runtime"].help
    assert text is not None and all(name in text for name in RUNTIMES)


@pytest.mark.parametrize("name", BEFORE)
def test_help_says_something_of_every_option(name: str) -> None:
    command = commands()[name]
    assert command.format_help()
    assert all(action.help for action in command._actions)


def options_of(*arguments: str) -> RuntimeOptions:
    return runtime_options(cli.parser().parse_args(["run", "b", "--prompt", "p", *arguments]))


def test_the_options_become_one_struct() -> None:
    assert options_of() == RuntimeOptions()
    given = "--runtime onnxruntime --target t --provider cuda --threads 2 --low-memory"
    expected = RuntimeOptions("onnxruntime", "t", "cuda", threads=2, low_memory=True)
    assert options_of(*given.split()) == expected
    given = "--runtime openvino --precision bfloat16"
    assert options_of(*given.split()) == RuntimeOptions("openvino", precision="bfloat16")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("--runtime openvino --provider cuda", "provider is no option of OpenVINO: .*ONNX Runtime"),
        ("--runtime openvino --low-memory", "low memory is no option of OpenVINO: .*onnxruntime"),
        ("--runtime onnxruntime --precision bfloat16", "no option of ONNX Runtime: .*own dtype"),
        ("--runtime tensorrt --threads 4", "threads is no option of TensorRT: it computes on"),
        ("--runtime tensorrt --low-memory", "low memory is no option of TensorRT: its weights"),
        ("--runtime openvino --precision int8", "unknown precision 'int8' for OpenVINO: choose"),
        ("--provider gpu", "unknown provider 'gpu' for ONNX Runtime: choose cpu, cuda or"),
        ("--runtime onnxrutime", "unknown runtime 'onnxrutime' .did you mean 'onnxruntime'"),
        ("--threads 0", "threads must be 1 to 1024, got 0"),
        ("--threads 1000000", "threads must be 1 to 1024, got 1000000"),
    ],
)
def test_what_cannot_be_had_is_one_sentence(given: str, says: str) -> None:
    with pytest.raises(TrioError, match=says):
        options_of(*given.split())


@pytest.mark.parametrize("budget", ["11", "11%"])
@pytest.mark.parametrize(
    "command",
    [
        "export --model llava-next-7b --out b --budget",
        "plan --model llava-next-7b --budget",
        "run someone/model scene.png why --budget",
        "eval tiny --out b --scenes 1 --budgets",
        "tune someone/model --out b --budget",
        "bench someone/model --budget",
    ],
)
def test_a_budget_in_percent_is_one_and_the_same_hint_before_anything_else(
    command: str,
    budget: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert cli.main([*command.split(), budget]) == 1
    said = capsys.readouterr().err
    assert said.startswith(
        f"trio: a budget of {budget} is not possible: it is the average share of visual tokens "
        "per layer, above 0 and at most 1; did you mean 0.11?"
    )
    assert said.count("\n") == 1 and not list(tmp_path.iterdir())


def test_help_needs_no_numpy() -> None:
    program = (
        "import sys\nfrom trio_deploy.cli import main as cli\n"
        "try:\n    cli.main(['run', '--help'])\nexcept SystemExit:\n    pass\n"
        "print('numpy' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.splitlines()[-1] == "False", out.stderr


def test_the_package_is_a_program() -> None:
    command = [sys.executable, "-m", "trio_deploy", "--version"]
    assert subprocess.run(command, capture_output=True, text=True).stdout.startswith("0.")
