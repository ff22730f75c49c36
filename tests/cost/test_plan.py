"""`trio plan` shows a schedule's cost, and the paper's figures as the paper's."""

from __future__ import annotations

import json
import math

import pytest

from trio_deploy import TrioError, plan
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.cli.main import main

GIB = 2**30


def test_the_papers_rows_stand_beside_ours_and_differences_are_explained():
    planned = plan("llava-next-7b", budget=0.111, visual_tokens=2880)
    text = planned.to_text(paper=True)
    ours, papers = text.split("the paper's own figures")
    assert "16.670 T" in ours
    assert "1.699 T" in ours and "2.68" not in ours
    for figure in ("2.68 T", "16.67 T", "191.0 MiB", "1156.0 MiB"):
        assert figure in papers
    # its KV row belongs to 2312 tokens; a whole layer a probe explains part of its FLOPs
    assert "2312 tokens" in papers and "2940 here" in papers
    assert "2.34 T" in papers


def test_the_plan_leads_with_what_a_user_asks():
    planned = plan("llava-1.5-7b", budget=0.111, target="jetson-agx-orin-64gb")
    lines = planned.to_text().splitlines()
    assert len(lines) <= 10
    for line in (
        "prompt     576 visual and 60 text tokens",
        "pruning    92, 54 and 22 visual tokens kept from layers 1, 10, 15 on",
        "kept       11.1% of the visual tokens, averaged over 32 layers",
        "KV cache   62 MiB instead of 318 MiB, 5.1x less: in 16 bits",
    ):
        assert line in lines
    assert lines[-1].startswith("memory     fits jetson-agx-orin-64gb: at most ")
    assert "paper" not in planned.to_text()
    nano = plan("llava-1.5-7b", target="jetson-orin-nano-8gb").to_text()
    assert "memory     does not fit jetson-orin-nano-8gb: weights, 15 GiB, and KV cache" in nano
    assert "- the smallest target that fits it is l4" in nano


@pytest.mark.parametrize(
    ("gib", "verdict"), [(20, "does not fit: "), (40, "may not fit: "), (64, "fits: ")]
)
def test_a_cpu_target_is_compared_with_this_machine(monkeypatch, gib, verdict):
    monkeypatch.setattr("trio_deploy.cost.plan.usable_memory", lambda: gib * 2**30)
    fit = plan("llava-1.5-7b").fit
    assert fit.verdict.startswith(verdict) and f"this machine's {gib} GiB" in fit.verdict
    assert 26 * 2**30 < fit.weights < 27 * 2**30
    half = plan("llava-1.5-7b", dtype="float16").fit
    assert half.weights * 2 == fit.weights and half.cache * 2 == fit.cache
    assert plan("llava-1.5-7b", target="cuda").fit.machine is None, "its memory is the GPU's"


def test_quantised_weights_are_counted_with_the_copies_of_selections():
    whole, narrow = (
        plan("llava-1.5-7b", quantize=scheme, progress=False) for scheme in ("none", "int4")
    )
    assert 26 * GIB < whole.fit.weights < 27 * GIB
    # 3.0 for the layers and 0.2 for their scales, 0.6 for three selections, 0.1 for the head, and
    # tower, projector and embeddings as they were.
    assert 5.0 * GIB < narrow.fit.weights < 6.0 * GIB
    assert "in int4 and float32, for the target cpu" in narrow.to_text()
    assert narrow.fit.to_json()["quantize"] == "int4"


def test_float_selections_are_counted_with_their_layers_and_the_head():
    narrow, wide = (
        plan("llava-1.5-7b", quantize="int4", selections=kind, progress=False).fit
        for kind in ("int8", "float")
    )
    matrices, head = 4 * 4096 * 4096 + 3 * 4096 * 11008, 32064 * 4096
    scales = 4 / 128
    # Four bytes per weight instead of one, of which the head's stays.
    expected = 3 * matrices * (4 - 1 - scales) + 4 * head
    assert wide.weights - narrow.weights == pytest.approx(expected, rel=1e-3)
    planned = plan("llava-1.5-7b", quantize="int4", selections="float", progress=False)
    assert "in int4 and float32, selections float, for the target cpu" in planned.to_text()
    assert planned.fit.to_json()["selections"] == "float"
    with pytest.raises(TrioError, match="name a scheme by --quantize"):
        plan("llava-1.5-7b", selections="float", progress=False)


def test_engines_with_float_selections_hold_more():
    narrow, wide = (
        plan(
            "tiny", target="jetson-orin-nx-16gb", quantize="int4", selections=kind, progress=False
        ).fit
        for kind in ("int8", "float")
    )
    assert wide.layouts[0].all_weights > narrow.layouts[0].all_weights


def test_a_table_on_the_host_is_left_out_and_advised_where_it_decides():
    asked = {"quantize": "int4", "target": "jetson-orin-nano-8gb", "progress": False}
    within = plan("qwen2.5-vl-3b", max_pixels=700_000, **asked).fit
    (advice,) = within.advice
    assert within.fits is False and advice.startswith("it fits with --embeddings host")
    host = plan("qwen2.5-vl-3b", max_pixels=700_000, embeddings="host", **asked).fit
    assert host.fits and not host.advice
    table = 151_936 * (2048 + 4)  # codes of the tied table, and a scale per row
    assert within.layouts[0].table == table and host.layouts[0].table == 0
    assert within.weights - host.weights == pytest.approx(table, rel=1e-3)
    assert "mapped on the host, 297 MiB for the output head" in host.vocabulary
    beyond = plan("qwen2.5-vl-3b", **asked).fit
    assert not any("--embeddings" in each for each in beyond.advice)
    weights, request = "the weights, 3.52 GiB", "a request at these limits, 3.74 GiB"
    assert f"{weights}, and {request}, exceed 5.4 GiB together" in beyond.advice


def test_a_scheme_that_a_target_does_not_take_is_refused():
    with pytest.raises(TrioError, match="TensorRT 10.3 does not take weights in int4-g32"):
        plan("llava-1.5-7b", target="jetson-orin-nx-16gb", quantize="int4-g32", progress=False)


def test_the_towers_memory_is_a_part_of_a_cpus_plan(monkeypatch):
    """It follows the picture, the float type, and whether the runtime holds scores."""
    monkeypatch.setattr("trio_deploy.cost.plan.usable_memory", lambda: 16 * 2**30)
    fit = plan("qwen3-vl-2b").fit
    assert fit.tower == 7 * 5120 * (1024 + 4096) * 4
    assert fit.to_json()["tower"] == fit.tower
    assert "never pruned; about 700 MiB while it runs" in plan("qwen3-vl-2b").to_text()
    small = plan("qwen3-vl-2b", visual_tokens=64)
    assert small.fit.tower == fit.tower // 20 and "about 35 MiB while" in small.to_text()
    assert plan("qwen3-vl-2b", dtype="float16").fit.tower == fit.tower // 2
    largest = plan("qwen3-vl-2b", max_pixels=16_777_216)
    assert largest.fit.tower == 7 * 65536 * 5120 * 4, "8.75 GiB"
    assert fit.verdict.startswith("may not fit") and largest.fit.verdict.startswith("does not fit")
    assert plan("llava-1.5-7b").fit.tower == 7 * 577 * (1024 + 4096) * 4
    assert plan("qwen2.5-vl-3b").fit.tower == 7 * 5120 * (1280 + 3420 * 3 // 2) * 4
    assert "while it runs" not in plan("qwen3-vl-2b", target="jetson-agx-orin-64gb").to_text()


def test_a_plan_that_takes_long_says_what_it_does_before_it_does_it(monkeypatch, capsys):
    said = []

    def fit(*_):
        said.append(capsys.readouterr().err)
        raise TrioError("enough")

    monkeypatch.setattr("trio_deploy.cost.device_memory.fit", fit)
    for target, progress in (("l4", True), ("l4", False)):
        with pytest.raises(TrioError, match="enough"):
            plan("tiny", target=target, progress=progress)
    assert said[0].startswith("trio: building the graphs of tiny to count its memory on l4")
    assert said[0].count("\n") == 1 and said[1] == ""
    plan("tiny")
    assert capsys.readouterr().err == "", "it takes no time for a CPU"


def test_a_budget_below_one_token_is_said_and_the_floor_is_that_of_the_schedule():
    few = plan("tiny", schedule="0:0.001:divprune")
    assert "less than one of 256 visual tokens (0.26 before layer 0)" in few.to_text()
    assert any("before layer 0, any budget above 0" in note for note in few.notes)
    assert not any("0.000" in note for note in few.notes)
    assert any("must exceed 0.031" in note for note in plan("llava-1.5-7b").notes)
    assert plan("tiny").warnings == ()


def test_rows_that_agree_with_the_paper_are_not_remarked_upon():
    planned = plan("llava-1.5-7b", schedule="1:92,10:54,15:22")
    assert planned.cost.kv_bytes == 62 * 2**20
    assert planned.unpruned.kv_bytes == 318 * 2**20
    assert not any("MiB pruned" in note for note in planned.notes)


def test_at_another_budget_the_papers_pruned_figures_are_not_compared():
    planned = plan("llava-next-7b", budget=0.222)
    assert any("11.1 %, not to this 22.2%" in note for note in planned.notes)
    assert not any("whole layer's forward" in note for note in planned.notes)


def test_published_schedules_are_the_recipes():
    planned = plan("llava-1.5-7b", budget=0.222)
    assert planned.schedule.resolve(576) == (218, 128, 54)
    assert planned.cost.average == 128


def test_visual_tokens_default_to_the_largest_image():
    assert plan("llava-1.5-7b").visual == 576
    planned = plan("llava-next-7b")
    assert (planned.visual, planned.tiles) == (2880, 5)
    assert plan("llava-next-7b", visual_tokens=1176).tiles == 3


@pytest.mark.parametrize(
    "model", ["tiny", "llava-1.5-13b", "llava-next-mistral-7b", "llama3-llava-next-8b"]
)
@pytest.mark.parametrize("budget", [0.333, 0.222, 0.111])
def test_every_recipe_has_a_plan_within_half_a_token_a_layer(model, budget):
    planned = plan(model, budget=budget)
    share = planned.cost.average / planned.visual
    assert share == pytest.approx(budget, abs=max(0.01, 0.6 / planned.visual))
    assert planned.cost.prefill < planned.unpruned.prefill
    assert planned.to_text()


def test_text_only_prompts_have_nothing_to_prune():
    planned = plan("llava-1.5-7b", visual_tokens=0, text_tokens=10)
    assert planned.cost.prefill == planned.unpruned.prefill
    assert planned.cost.selection == 0
    assert planned.to_text()


def test_json_says_what_the_text_says(capsys):
    assert main(["plan", "--model", "llava-1.5-7b", "--budget", "0.111", "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)
    assert raw["keep"] == [92, 54, 22]
    assert raw["pruned"]["average"] == 64
    assert math.isclose(raw["unpruned"]["flops"]["paper_formula"], 2.986e12, rel_tol=1e-3)
    assert [row["unpruned"] for row in raw["paper"]] == [2.98, 318]
    assert [r["tokens"] for r in raw["pruned"]["ranges"]] == [636, 152, 114, 82]


def test_a_checkpoint_folder_needs_its_configuration_alone(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(load_recipe("llava-1.5-7b").architecture))
    planned = plan(str(tmp_path), budget=1.0)
    assert planned.model == tmp_path.name
    assert planned.cost.layers == planned.unpruned.layers


def test_an_unreadable_configuration_is_named(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TrioError, match=r"config\.json"):
        plan(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"model": "llava-9"}, "llava-9"),
        ({"model": "llava-1.5-7b", "budget": 0.01}, "0.03"),
        ({"model": "llava-1.5-7b", "budget": 1.5}, "not possible"),
        ({"model": "llava-1.5-7b", "budget": 11}, "did you mean 0.11.$"),
        ({"model": "llava-1.5-7b", "schedule": "1:900"}, "only 576"),
        ({"model": "llava-1.5-7b", "schedule": "40:9"}, "layers 0 to 31"),
        ({"model": "llava-1.5-7b", "visual_tokens": -1}, "negative"),
    ],
)
def test_bad_input_is_one_clear_error(arguments, words):
    with pytest.raises(TrioError, match=words):
        plan(**arguments)


def test_the_cost_counts_the_block_size_that_the_graphs_use():
    from trio_deploy.cost.flops import SUPPRESSION_BLOCK
    from trio_deploy.selection.suppression import BLOCK

    assert BLOCK == SUPPRESSION_BLOCK


def test_a_prompt_beyond_the_context_is_remarked():
    assert any("context of 4096" in n for n in plan("llava-1.5-7b", text_tokens=4000).warnings)
    assert plan("llava-1.5-7b").warnings == ()
