"""`trio bench` on a bundle of random weights: which figures come out and what is written."""

from __future__ import annotations

import importlib.util
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from msgspec import structs

from tests.support.bundles import make_speechless
from trio_deploy import RuntimeOptions, Schedule, TrioError
from trio_deploy.bench.case import Run
from trio_deploy.bench.contenders.contenders import Contenders
from trio_deploy.bench.measure import UNPRUNED, BenchOptions, interleave, list_cases, measure, sweep
from trio_deploy.bench.table import NOTE, operations, times, to_markdown, to_text

QUICK = BenchOptions(text_tokens=30, new_tokens=3, runs=2, warm_up=0, baselines=(), memory=False,
                     runtime=RuntimeOptions(threads=2))  # fmt: skip
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
    with Contenders() as contenders:
        (case, *_), _ = list_cases(random_bundle, QUICK)
        pipeline = contenders.pipeline(case)
        assert pipeline.bundle.manifest.generation.eos_token_ids == ()
        assert random_bundle.manifest.generation.eos_token_ids


def test_runs_choose_tokens_without_the_checkpoints_sampling(random_bundle, tmp_path):
    bundle = make_speechless(Path(shutil.copytree(random_bundle.path, tmp_path / "b")))
    assert len(measure(bundle, QUICK, progress=False)["cases"]) == 2


def test_engines_of_a_bundle_are_found_by_their_target_without_its_file(random_bundle, tmp_path):
    copy = replace(random_bundle, path=tmp_path)
    (tmp_path / "engines" / "mine").mkdir(parents=True)
    (case, *_), _ = list_cases(copy, replace(QUICK, runtime=RuntimeOptions(target="mine")))
    assert (case.options.runtime, case.options.target) == ("tensorrt", "mine")
    (case, *_), _ = list_cases(copy, replace(QUICK, runtime=RuntimeOptions(target="cpu-openvino")))
    assert (case.options.runtime, case.options.precision) == ("openvino", None)


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


def test_contenders_take_turns_with_equal_seeds_and_warm_up_is_left_out():
    calls = []

    def contender(name):
        return lambda seed: calls.append((name, seed)) or seed

    steps = []
    results = interleave(2, {"a": contender("a"), "b": contender("b")}, 1, lambda: steps.append(1))
    assert results == {"a": [1, 2], "b": [1, 2]}
    assert [seed for _, seed in calls] == [0, 0, 1, 1, 2, 2]  # one another's neighbours
    order = [name for name, _ in calls]
    assert order[0:2] != order[2:4] and order[2:4] != order[4:6]  # nobody is always first
    assert len(steps) == 6


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


def test_other_weights_are_measured_at_the_same_budgets(random_bundle):
    options = replace(QUICK, budgets=(None, 0.5), others={"int4": random_bundle})
    cases, _ = list_cases(random_bundle, options)
    names = [UNPRUNED, "45.8 %", "50 %", "45.8 %, int4", "50 %, int4"]
    assert [case.name for case in cases] == names


def test_llama_cpp_has_a_line_per_type_of_weights_and_one_build(random_bundle, monkeypatch):
    monkeypatch.setattr("trio_deploy.bench.contenders.llama_cpp.missing", lambda python: None)
    options = replace(QUICK, baselines=("llama.cpp",), llama_python="p")
    for server, build in ((None, "xllamacpp"), (__file__, "native build")):
        cases, _ = list_cases(random_bundle, replace(options, llama_server=server))
        assert [case.name for case in cases[-2:]] == [
            f"llama.cpp, Q4_0, {build}",
            f"llama.cpp, Q8_0, {build}",
        ]
    with pytest.raises(TrioError, match="--llama-server /nowhere is no file"):
        list_cases(random_bundle, replace(options, llama_server="/nowhere"))


def test_why_a_pruner_has_no_second_line_is_what_its_first_said(random_bundle, monkeypatch):
    monkeypatch.setattr("trio_deploy.bench.contenders.genai.missing", lambda python: None)
    why = "this version has no pruning_ratio, so nothing was pruned"

    class Fakes(Contenders):
        def open(self, case, work):
            if case.kind == "genai":
                return lambda seed: Run({}, 1.0, 0.0, remark=why if case.pruning_ratio else "")
            return super().open(case, work)

    options = replace(QUICK, baselines=("genai",), checkpoint="c", genai_python="p")
    with Fakes() as contenders:
        result = measure(random_bundle, options, progress=False, contenders=contenders)
    assert result["skipped"] == {"OpenVINO GenAI, CDPruner, 46 %, not in halves": why}


def test_a_baseline_that_the_methods_rule_out_is_no_matter_of_installing(
    random_bundle, monkeypatch
):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    points = [replace(point, method="divprune") for point in random_bundle.schedule.points]
    manifest = structs.replace(random_bundle.manifest, schedule=Schedule(tuple(points)).to_json())
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


def test_figures_are_short():
    assert times(None) == "" and times(7.391) == "7.39x"
    assert [operations(count) for count in (5, 2.5e6, 16.7e12)] == ["5", "2.5 M", "16.7 T"]
