"""Every command on small Qwen models: pictures of any size, as users name them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from tests.support.qwen_checkpoints import shared_checkpoint
from tests.support.qwen_models import FAMILIES
from trio_deploy import Bundle
from trio_deploy.cli.main import main
from trio_deploy.schedule.methods import METHODS, encoder_scores

SCHEDULE = "0:0.5:divprune,2:0.25"
SIZES = ((28, 28), (400, 300), (1990, 10), (20, 1000))


@pytest.fixture(scope="module")
def checkpoint(run_folder: Path):
    return lambda family: shared_checkpoint(run_folder, family)


@pytest.fixture(scope="module")
def bundle(checkpoint, bundles: Bundles):
    return lambda family: bundles.path(checkpoint(family), schedule=SCHEDULE)


@pytest.fixture
def pictures(tmp_path: Path) -> list[str]:
    files = [tmp_path / f"{width}x{height}.png" for width, height in SIZES]
    for number, file in enumerate(files):
        make_picture(*SIZES[number], number).save(file)
    return [str(file) for file in files]


def said(capsys: pytest.CaptureFixture[str], *command: Any) -> Any:
    """The JSON object that a command prints."""
    assert main([*map(str, command), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.parametrize("family", FAMILIES)
def test_run_answers_about_pictures_of_any_shape_and_draws_each(
    family, bundle, pictures, tmp_path, capsys
):
    one_thread = ["--threads", 1, "--max-new-tokens", 3]
    counts = []
    for chosen in (pictures, *([each] for each in pictures), []):
        show = ["--show", tmp_path / "kept.png"] if chosen else []
        answer = said(capsys, "run", bundle(family), *chosen, "what is it ?", *one_thread, *show)
        assert len(answer["token_ids"]) == 3
        visual = answer["visual_tokens"]
        assert answer["keep_counts"] == list(
            Bundle.load(bundle(family)).schedule.resolve(visual) if visual else [0, 0]
        )
        counts.append(visual)
        if chosen:
            with Image.open(tmp_path / "kept.png") as sheet:
                assert sheet.width > 3 * 84 and sheet.height > len(chosen) * 84
    assert counts[0] == sum(counts[1:-1]) and counts[-1] == 0 and min(counts[1:-1]) > 0


WITHOUT_CLASS_TOKEN = [name for name in METHODS if encoder_scores([name])]


def refused(capsys: pytest.CaptureFixture[str], command: str, out: Path) -> str:
    """The one line that a command says, which leaves nothing behind."""
    capsys.readouterr()
    assert main(command.split()) == 1
    told = capsys.readouterr()
    assert told.out == "" and told.err.count("\n") == 1
    assert not out.exists()
    return told.err


@pytest.mark.parametrize(
    "command",
    [
        "export --model {model} --schedule 0:0.5:{method} --out {out}",
        "export --model {model} --schedule 2:0.5:{method} --graphs-only --out {out}",
        "export --model {model} --schedule 2:0.5 --method {method} --out {out}",
        "plan --model {model} --schedule 0:0.5:{method}",
        "eval {model} --scenes 1 --methods {method}@0 --budgets 0.4 --out {out}",
        "eval {model} --scenes 1 --schedule mine=0:0.4:{method} --out {out}",
        "tune {model} --scenes 1 --methods trio,{method} --out {out}",
        "tune {model} --scenes 1 --start 0:0.4:{method} --out {out}",
    ],
)
@pytest.mark.parametrize("method", WITHOUT_CLASS_TOKEN)
def test_methods_that_read_a_class_token_are_refused_in_one_sentence(
    method, command, checkpoint, tmp_path, capsys
):
    out = tmp_path / "out"
    command = command.format(model=checkpoint("qwen2_5_vl"), method=method, out=out)
    assert re.search(f"the method {method} reads .* class token", refused(capsys, command, out))


def test_there_are_methods_that_read_a_class_token():
    assert WITHOUT_CLASS_TOKEN == ["cls-attention", "vscan"]


@pytest.mark.parametrize(
    "command",
    [
        "export --model {model} --schedule 2:0.5 --positions renumber --out {out}",
        "export --model {model} --schedule {file} --out {out}",
        "eval {model} --scenes 1 --methods trio@1 --positions renumber --out {out}",
        "eval {model} --scenes 1 --schedule {file} --out {out}",
        "tune {model} --scenes 1 --positions renumber --out {out}",
        "tune {model} --scenes 1 --start {file} --out {out}",
    ],
)
def test_positions_that_the_model_does_not_have_are_refused_in_one_sentence(
    command, checkpoint, tmp_path, capsys
):
    out, file = tmp_path / "out", tmp_path / "found.yaml"
    points = "{layer: 1, keep: 0.2, method: trio}"
    file.write_text(f'schedules:\n  "0.4":\n    - {points}\npositions: renumber\n')
    command = command.format(model=checkpoint("qwen2_vl"), file=file, out=out)
    assert "'renumber' have no meaning for qwen2_vl" in refused(capsys, command, out)


def test_eval_of_a_checkpoint_has_its_methods_and_budgets(checkpoint, tmp_path, capsys):
    options = "--scenes 1 --split tuning --threads 1 --max-new-tokens 4 --no-plot"
    methods = ["--methods", "cdpruner@0,trio@1,fastv@1", "--budgets", "0.4"]
    results = said(
        capsys, "eval", checkpoint("qwen3_vl"), "--out", tmp_path, *options.split(), *methods
    )
    found = {row["name"]: row for row in results["results"]}
    assert found.keys() == {"unpruned", "cdpruner@0", "trio@1", "fastv@1"}
    assert found["unpruned"]["agreement"]["value"] == 1 and found["unpruned"]["kl"] == 0
    for name in ("cdpruner@0", "trio@1", "fastv@1"):
        assert found[name]["share"] == pytest.approx(0.4, abs=0.02)
        assert found[name]["kl"] > 0


def test_tune_finds_a_schedule_that_export_takes(checkpoint, tmp_path, capsys):
    options = "--scenes 1 --candidates 1 --points 1 --threads 1 --budget 0.4 --methods trio"
    command = ["tune", str(checkpoint("qwen2_5_vl")), "--out", str(tmp_path), *options.split()]
    assert main(command) == 0
    out = str(tmp_path / "bundle")
    schedule = str(tmp_path / "schedule.yaml")
    export = ["export", "--model", str(checkpoint("qwen2_5_vl")), "--schedule", schedule]
    assert main([*export, "--out", out]) == 0
    bundle = Bundle.load(tmp_path / "bundle")
    assert len(bundle.schedule.points) == 1 and bundle.manifest.positions == "original"


def test_bench_report_and_plan_count_tower_and_language_model_apart(
    bundle, checkpoint, pictures, tmp_path, capsys
):
    options = "--images 2 --picture 200x90 --runs 1 --warm-up 0 --new-tokens 2 --baselines none"
    figures = tmp_path / "figures"
    measured = said(
        *(capsys, "bench", bundle("qwen2_vl"), *options.split()),
        *("--no-memory", "--threads", 1, "--out", figures),
    )
    assert {case["name"] for case in measured["cases"]} >= {"no pruning"}
    page = tmp_path / "page.html"
    files = ["--bench", f"{figures}.json", "--image", pictures[2], "--prompt", "what is it ?"]
    quick = ["--no-check", "--scenes", "0", "--threads", "1"]
    command = ["report", str(bundle("qwen2_vl")), "--out", str(page), *files, *quick]
    assert main(command) == 0
    assert "up to 97 visual tokens per picture" in page.read_text()
    assert "divprune" in page.read_text()
    capsys.readouterr()
    assert main(["plan", "--model", str(checkpoint("qwen2_vl")), "--schedule", SCHEDULE]) == 0
    planned = capsys.readouterr().out
    assert "multiply-adds of the vision tower, never pruned" in planned
    assert "multiply-adds of the language model" in planned


def test_check_compares_a_bundle_with_its_checkpoint(bundle, checkpoint, capsys):
    report = said(
        *(capsys, "check", bundle("qwen3_vl"), "--checkpoint", checkpoint("qwen3_vl")),
        *("--threads", 1),
    )
    assert report["passed"]
    assert {"patches", "processor", "position_ids", "vision"} <= {
        row["stage"] for row in report["rows"]
    }
