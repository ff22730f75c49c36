"""`trio bench` on a bundle of random weights: which figures come out and what is written."""

from __future__ import annotations

import importlib.util
import json
from dataclasses import replace

import pytest

from trio_deploy import Schedule, TrioError
from trio_deploy.bench.cases import Opened
from trio_deploy.bench.child import peak_memory
from trio_deploy.bench.command import bench, shown_command
from trio_deploy.bench.runner import UNPRUNED, Options, list_cases, measure, sweep
from trio_deploy.bench.table import NOTE, operations, times, to_markdown, to_text
from trio_deploy.cli import main as cli

QUICK = Options(text_tokens=30, new_tokens=3, runs=2, warm_up=0, baselines=(), memory=False,
                threads=2)  # fmt: skip
TORCH = importlib.util.find_spec("torch") and importlib.util.find_spec("transformers")


@pytest.fixture(scope="module")
def result(random_bundle):
    options = replace(QUICK, budgets=(None, 0.5), images=2)
    return measure(random_bundle, options, progress=False)


def test_no_pruning_comes_first_and_everything_is_compared_with_it(result):
    names = [case["name"] for case in result["cases"]]
    assert names == [UNPRUNED, "45.8 %", "50 %"]
    assert all(case["against_unpruned"]["name"] == UNPRUNED for case in result["cases"])
    assert result["cases"][0]["against_unpruned"]["prefill"] == 1


def test_tokens_are_what_was_asked_for(result):
    assert result["workload"]["visual_tokens"] == 32
    assert result["workload"]["text_tokens"] == 30
    whole, pruned, _ = result["cases"]
    assert {tokens for _, _, tokens in whole["tokens"]["ranges"]} == {62}
    assert pruned["tokens"]["keep"] == [8, 4]
    assert pruned["tokens"]["ranges"] == [[0, 1, 62], [1, 3, 38], [3, 6, 34]]


def test_measured_kv_bytes_are_the_counted_ones(result):
    for case in result["cases"]:
        assert case["kv_bytes"] == case["kv_bytes_counted"]


def test_stages_are_split_and_add_up(result):
    for case in result["cases"]:
        assert case["groups_s"].keys() >= {"vision", "layers", "selection", "other"}
        assert all(spread["runs"] == 2 for spread in case["stages_s"].values())
    whole, pruned, _ = result["cases"]
    assert whole["groups_s"]["selection"]["median"] == 0
    assert {"select_1", "prefill_2"} <= pruned["stages_s"].keys()


def test_every_run_generates_as_many_tokens_whatever_the_model_says(random_bundle):
    with Opened() as opened:
        (case, *_), _ = list_cases(random_bundle, QUICK)
        pipeline = opened.pipeline(case)
        assert pipeline.bundle.manifest.generation.eos_token_ids == ()
        assert random_bundle.manifest.generation.eos_token_ids


def test_results_are_json_text_and_markdown(result):
    assert json.loads(json.dumps(result)) == result
    text = to_text(result)
    assert "45.8 %" in text and "first token" in text and "FLOPs limit" in text
    markdown = to_markdown(result, "trio bench b", "b.png")
    assert "Command: `trio bench b`." in markdown and NOTE in markdown and "](b.png)" in markdown
    tables = [line for line in markdown.splitlines() if line.startswith("|")]
    for line in tables:
        assert line.count("|") in {tables[0].count("|"), tables[-1].count("|")}


def test_a_sweep_has_every_budget_at_every_length(random_bundle, tmp_path):
    options = replace(QUICK, budgets=(0.5,), new_tokens=1, runs=1)
    result = sweep(random_bundle, options, [1, 3], progress=False)
    assert [point["workload"]["visual_tokens"] for point in result["points"]] == [16, 48]
    assert all(len(point["cases"]) == 2 for point in result["points"])
    assert "16 to 48 visual tokens" in to_text(result)
    with pytest.raises(TrioError, match="numbers of pictures"):
        sweep(random_bundle, options, [], progress=False)


def test_peak_memory_is_measured_in_a_process_of_its_own(random_bundle):
    (case, *_), _ = list_cases(random_bundle, QUICK)
    from trio_deploy.bench.workload import Workload

    assert peak_memory(case, Workload(1, 56, 56, "hi", 4)) > 10
    with pytest.raises(TrioError, match="memory of no pruning"):
        peak_memory(replace(case, bundle="nowhere"), Workload(1, 56, 56, "hi", 4))


@pytest.mark.skipif(not TORCH, reason="needs torch and transformers")
def test_torch_baselines_run_on_the_bundle_and_keep_as_many_tokens(random_bundle):
    options = replace(QUICK, images=2, baselines=("transformers", "oracle"), runs=1)
    result = measure(random_bundle, options, progress=False)
    whole, pruned, plain, oracle = result["cases"]
    assert plain["kind"] == "transformers" and oracle["kind"] == "oracle"
    for ours, theirs in ((whole, plain), (pruned, oracle)):
        assert theirs["tokens"]["prompt"] == ours["tokens"]["prompt"]
        assert theirs["kv_bytes"] == ours["kv_bytes"]
        assert theirs["precision"] == "float32"
    assert oracle["tokens"]["ranges"] == pruned["tokens"]["ranges"]
    assert oracle["groups_s"]["selection"]["median"] > 0
    assert plain["flops"] == whole["flops"] and oracle["flops"] is None


@pytest.mark.skipif(not TORCH, reason="needs torch and transformers")
def test_the_oracle_baseline_chooses_what_the_oracle_chooses(random_bundle):
    """Its loop is written anew without the oracle's notes, so the tokens are compared."""
    from trio_deploy.bench import baselines
    from trio_deploy.bench.cases import Case
    from trio_deploy.bench.inputs import Inputs
    from trio_deploy.bench.workload import Workload
    from trio_deploy.reference.oracle import Oracle, Row
    from trio_deploy.reference.restore import restore_model

    manifest = random_bundle.manifest
    oracle = Oracle(
        restore_model(random_bundle), positions=manifest.positions, probe=manifest.probe
    )
    work = Workload(1, 56, 56, "what is it ?", 4)
    chosen, logits = [], oracle.logits
    oracle.logits = lambda hidden: chosen.append(int(logits(hidden)[-1].argmax())) or logits(hidden)
    answer = baselines._oracle(oracle, Inputs(random_bundle), work, random_bundle.schedule)
    assert Case("x", "oracle", "b").kind == "oracle"
    answer(5)
    mine = chosen[-work.new_tokens :]
    prompt, (picture,) = Inputs(random_bundle).encode(work.messages(), work.pictures(5))
    row = Row(prompt.ids, picture.pixel_values, [picture.size])
    result = oracle.generate([row], random_bundle.schedule, max_new_tokens=work.new_tokens)
    assert result.token_ids[0] == mine


def test_baselines_that_are_not_there_are_named(random_bundle, monkeypatch):
    _, skipped = list_cases(random_bundle, replace(QUICK, baselines=None))
    assert "--checkpoint" in skipped["genai"]
    options = replace(QUICK, checkpoint="c", genai_python="/nowhere/python")
    _, skipped = list_cases(random_bundle, replace(options, baselines=None))
    assert "does not start" in skipped["genai"]
    with pytest.raises(TrioError, match="genai cannot be measured"):
        list_cases(random_bundle, replace(options, baselines=("genai",)))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    cases, skipped = list_cases(random_bundle, replace(QUICK, baselines=None))
    assert [case.kind for case in cases] == ["trio", "trio"]
    assert "reference" in skipped["transformers"] and "reference" in skipped["oracle"]


def test_a_baseline_that_the_methods_rule_out_is_no_matter_of_installing(
    random_bundle, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    points = [replace(point, method="divprune") for point in random_bundle.schedule.points]
    manifest = replace(random_bundle.manifest, schedule=Schedule(tuple(points)).to_json())
    other = replace(random_bundle, manifest=manifest)
    _, skipped = list_cases(other, replace(QUICK, baselines=None))
    assert "prunes by trio alone, and this bundle by divprune" in skipped["oracle"]
    assert "install" not in skipped["oracle"]
    with pytest.raises(TrioError, match="oracle cannot be measured: it prunes by trio alone"):
        list_cases(other, replace(QUICK, baselines=("oracle",)))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runs": 0}, "runs must be 1"),
        ({"new_tokens": 0}, "new tokens must be 1"),
        ({"warm_up": -1}, "warm-up"),
        ({"baselines": ("vllm",)}, "unknown baseline 'vllm'"),
        ({"images": 20}, "fewer --images"),
        ({"budgets": (0.01,)}, "cannot be reached"),
    ],
)
def test_what_cannot_be_measured_is_one_sentence(random_bundle, options, words):
    with pytest.raises(TrioError, match=words):
        measure(random_bundle, replace(QUICK, **options), progress=False)


def test_the_command_measures_a_size_and_writes_what_it_shows(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    command = (
        "bench --size d=32,layers=4,vocab=300,mlp=48,heads=2,image=28,vision_d=16,vision_layers=2 "
        "--budget 0.5 --runs 1 --warm-up 0 --new-tokens 2 --baselines none --no-memory "
        f"--cache {tmp_path / 'cache'} --out figures"
    )
    assert cli.main(command.split()) == 0
    assert "50 %" in capsys.readouterr().out
    written = json.loads((tmp_path / "figures.json").read_text())
    assert written["schema"] == 1 and len(written["cases"]) == 2
    assert str(tmp_path) not in (tmp_path / "figures.md").read_text()
    assert "--cache cache" in written["command"]
    assert (tmp_path / "figures.png").exists() == bool(importlib.util.find_spec("matplotlib"))
    assert not list(tmp_path.glob(".*"))


@pytest.mark.skipif(not importlib.util.find_spec("matplotlib"), reason="needs matplotlib")
def test_bars_and_lines_are_drawn(result, random_bundle, tmp_path):
    from PIL import Image

    from trio_deploy.bench import chart

    chart.draw(result, tmp_path / "bars.png")
    lines = sweep(random_bundle, replace(QUICK, new_tokens=1, runs=1), [1, 2], progress=False)
    chart.draw(lines, tmp_path / "lines.png")
    for name in ("bars", "lines"):
        with Image.open(tmp_path / f"{name}.png") as picture:
            assert picture.width > 800


def test_charts_are_left_out_without_matplotlib(result, tmp_path, monkeypatch):
    from trio_deploy.bench import chart, command

    monkeypatch.setattr(chart, "available", lambda: False)
    files = command.write({"command": "trio bench", **result}, tmp_path / "f")
    assert [file.name for file in files] == ["f.json", "f.md"]
    assert "](" not in (tmp_path / "f.md").read_text()
    with pytest.raises(TrioError, match=r"trio-deploy\[plots\]"):
        chart.draw(result, tmp_path / "f.png")


def test_a_bundle_or_a_size_not_both(tmp_path):
    for bundle, size in ((None, None), (tmp_path, "d=64")):
        with pytest.raises(TrioError, match="either a bundle"):
            bench(bundle, QUICK, size=size)
    with pytest.raises(TrioError, match="no folder"):
        bench(tmp_path, QUICK, out=tmp_path / "none" / "f")


def test_what_belongs_to_random_weights_is_not_taken_for_a_bundle(random_bundle, capsys):
    command = ["bench", str(random_bundle.path)]
    assert cli.main([*command, "--dtype", "float16"]) == 1
    assert "--dtype belongs to --size: a bundle has its own" in capsys.readouterr().err
    assert cli.main([*command, "--schedule", "1:2", "--cache", "c"]) == 1
    assert "--schedule and --cache belong to --size" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        cli.main([*command, "--picture", "0x10"])
    assert "invalid WxH value: '0x10'" in capsys.readouterr().err


def test_several_numbers_of_pictures_are_a_sweep(capsys):
    assert cli.main(["bench", "b", "--images", "1,2"]) == 1
    assert "--sweep" in capsys.readouterr().err


def test_a_command_is_shown_without_this_machines_folders():
    arguments = ["bench", "/home/me/b", "--out=/tmp/x/f", "--budget", "0.1", "--cache", "c d"]
    assert shown_command(arguments) == "trio bench b --out=f --budget 0.1 --cache 'c d'"


def test_figures_are_short():
    assert times(None) == "" and times(7.391) == "7.39x"
    assert [operations(count) for count in (5, 2.5e6, 16.7e12)] == ["5", "2.5 M", "16.7 T"]
