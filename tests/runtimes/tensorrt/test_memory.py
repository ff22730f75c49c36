"""`trio plan --target`: what engines take of a device's memory, and the verdict on it."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from tests.support.bundles import Bundles
from tests.support.exported import Export
from trio_deploy import Bundle, Schedule, TrioError
from trio_deploy.checkpoint.resolve import described, load_recipe, source_config
from trio_deploy.cli.main import main
from trio_deploy.config.recipe import list_recipes
from trio_deploy.config.target import Limits, list_targets, target_folder
from trio_deploy.cost.device_memory import fit, planned
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import parse_config
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.build import weight_bytes
from trio_deploy.runtimes.tensorrt.logged import Logged, logged, written
from trio_deploy.runtimes.tensorrt.memory import Fit, as_exported
from trio_deploy.runtimes.tensorrt.target import FLAVOURS

ROOT = Path(__file__).parents[3]
_GIB = 2**30


def model(name: str) -> tuple[ModelConfig, Schedule]:
    source, recipe = described(name), load_recipe(name)
    # None for a model whose files are at hand, such as the shipped one's.
    config = parse_config(recipe.architecture) if source is None else source_config(source)
    return config, recipe.schedules["0.111"]


@pytest.fixture(scope="module")
def seven_billion() -> dict[str, Fit]:
    """LLaVA-NeXT-7B, fp16, on some targets."""
    config, schedule = model("llava-next-7b")
    names = ("jetson-orin-nano-8gb", "jetson-orin-nx-16gb", "jetson-agx-orin-64gb", "l4", "h200")
    return {name: fit(config, schedule, load_target(name)) for name in names}


def test_seven_billion_halves_fit_where_they_do_and_not_on_a_nano_or_nx(
    seven_billion: dict[str, Fit],
) -> None:
    assert {name: each.fits for name, each in seven_billion.items()} == {
        "jetson-orin-nano-8gb": False,
        "jetson-orin-nx-16gb": False,
        "jetson-agx-orin-64gb": True,
        "l4": True,
        "h200": True,
    }
    first, *_, last = seven_billion["jetson-orin-nano-8gb"].advice
    assert "nor do quantised weights: the weights alone take 15 GiB" in first
    assert last == "the smallest target that fits it is l4"
    assert seven_billion["jetson-orin-nx-16gb"].advice == (
        "it fits with --quantize int4, whose weights take 4.99 GiB",
    )
    assert seven_billion["l4"].advice == ()


def test_a_decode_engine_of_its_own_holds_the_language_model_again(
    seven_billion: dict[str, Fit],
) -> None:
    shared, separate = seven_billion["jetson-agx-orin-64gb"].layouts
    assert (shared.layout, separate.layout) == ("shared", "separate")
    segments = sum(n for stage, n in shared.weights.items() if stage.startswith("prefill_"))
    embedding = 32064 * 4096 * 2
    assert separate.weights["decode"] == pytest.approx(segments + embedding, rel=1e-3)
    assert separate.total - shared.total == pytest.approx(separate.weights["decode"], rel=0.05)
    in_place, copied = seven_billion["h200"].layouts
    assert (in_place.dialect, copied.dialect) == ("onnx", "primitive")


def test_weights_are_those_that_the_graphs_refer_to(exported: Export) -> None:
    bundle = exported("llava-1.5-7b", "jetson-agx-orin-64gb", graphs_only=True)
    target = load_target("jetson-agx-orin-64gb")
    own = fit(bundle.config, bundle.schedule, target).layouts[0]
    for stage in bundle.stages:
        assert own.weights[stage] == pytest.approx(weight_bytes(bundle, stage), rel=1e-3)


@pytest.mark.parametrize(
    ("name", "quantize", "words", "engines"),
    [
        ("llava-next-7b", None, (32064, 4096), 4),
        ("qwen3-vl-2b", None, (151936, 2048), 2),  # tied
        ("qwen3-vl-2b", "int4", (151936, 2048), 2),  # tied, stored once as codes
        ("llava-next-7b", "int4", (32064, 4096), 4),
    ],
)
def test_the_table_of_embeddings_and_each_engines_head_are_told(
    name: str, quantize: str | None, words: tuple[int, int], engines: int
) -> None:
    target = replace(load_target("jetson-orin-nx-16gb"), quantize=quantize)
    config, schedule = model(name)
    found = Fit(target, (planned(config, schedule, target, None),))
    own, count = found.layouts[0], words[0] * words[1]
    per_head = 2 * count if quantize is None else count + 4 * words[0]  # codes, and scales
    assert own.table == (per_head if config.text.tie_word_embeddings else 2 * count)
    assert own.heads == (per_head,) * engines
    assert f"for the output head in each of {engines} engines" in found.vocabulary


@pytest.mark.parametrize("quantize", [None, "int4"])
def test_a_tied_head_of_a_decode_engine_is_no_table_where_that_is_on_the_host(
    quantize: str | None,
) -> None:
    config, schedule = model("qwen3-vl-2b")
    thor = replace(load_target("jetson-thor"), quantize=quantize)
    device, host = (
        planned(config, schedule, replace(thor, embeddings=place), None)
        for place in ("device", "host")
    )
    (head, _), table = device.heads, device.table // 2  # in embed and in decode
    assert host.table == 0 and host.heads == (head,) * 3
    assert device.all_weights - host.all_weights == pytest.approx(table, rel=1e-3)


def test_the_cache_is_the_schedules_twice_where_it_is_not_updated_in_place() -> None:
    config, _ = model("llava-1.5-7b")
    target = load_target("l4")
    schedule = Schedule.parse("1:92,10:54,15:22")
    text, new = target.limits.max_text_tokens, target.limits.max_new_tokens
    tokens = 576 + 9 * 92 + 5 * 54 + 17 * 22 + 32 * (text + new)
    assert fit(config, schedule, target).layouts[0].cache == 2 * 2 * 4096 * 2 * tokens


def test_a_cache_updated_in_place_is_what_the_largest_budget_asks_for_in_each_segment() -> None:
    config, schedule = model("llava-1.5-7b")
    h200 = load_target("h200")
    limits = replace(h200.limits, max_budget=0.111)
    visual, others = 2 * 576, limits.max_text_tokens + limits.max_new_tokens
    one, two, three = schedule.resolve(visual)
    tokens = visual + 9 * one + 5 * two + 17 * three + 32 * others
    pruned = fit(config, schedule, replace(h200, limits=limits)).layouts[0]
    assert pruned.cache == 2 * 4096 * 2 * tokens * limits.max_batch
    whole = replace(h200, limits=replace(limits, max_budget=1.0))
    assert (
        fit(config, schedule, whole).layouts[0].cache
        == 2 * 4096 * 2 * 32 * (visual + others) * limits.max_batch
    )


def test_what_is_kept_for_the_next_request_counts(seven_billion: dict[str, Fit]) -> None:
    for each in seven_billion.values():
        for found in each.layouts:
            buffers = found.cache + found.tensors
            assert buffers < buffers + found.cached < 1.3 * buffers
            assert found.total > found.all_weights + found.activations + buffers + found.cached
            assert found.to_json()["kept_for_the_next_request"] == found.cached


LARGE = [name for name in list_recipes() if name != "tiny"]
TENSORRT = [load_target(name) for name in list_targets() if load_target(name).tensorrt]


@pytest.mark.parametrize("name", LARGE)
def test_the_workspace_of_every_target_has_room_for_the_models_that_fit_it(name: str) -> None:
    """A fused node keeps the intermediate results of a decoder's layers in the workspace."""
    config, schedule = model(name)
    for target in TENSORRT:
        if target.workspace_gib is None:
            continue
        own = planned(config, schedule, target, None)
        # Quantised, a LLaVA of 7B may come to fit later; a tower of patches takes smaller pictures.
        if Fit(target, (own,)).fits or (name.startswith("llava") and "7b" in name):
            needed = 1.5 * own.activations / _GIB
            assert target.workspace_gib >= needed, target.name


def test_scratch_memory_has_a_ceiling_only_where_the_gpu_shares_the_systems() -> None:
    capped = [target.name for target in TENSORRT if target.workspace_gib is not None]
    assert capped == [target.name for target in TENSORRT if target.name.startswith("jetson-")]


def test_attention_counts_as_split_up_and_is_shown_fused_too() -> None:
    config, schedule = model("llava-next-7b")
    a100 = load_target("a100")
    found = fit(config, schedule, a100)
    own, other = found.layouts
    # split up, it takes about what the graphs without Attention nodes do
    assert own.activations == pytest.approx(other.activations, rel=0.1)
    assert own.fused < 0.2 * own.activations and other.fused == other.activations
    assert own.total - own.total_fused == own.activations - own.fused
    between = (own.total + own.total_fused) / 2 / _GIB
    unsure = fit(config, schedule, replace(a100, memory_gib=between + a100.reserved_gib))
    assert unsure.fits is False and unsure.fits_if_fused is True
    assert "fits if TensorRT runs every Attention node as one kernel" in unsure.advice[0]
    text = unsure.to_text()
    assert text.count("  if attention is fused") == 2
    assert re.search(r"^fits +if fused", text, re.MULTILINE)
    raw = unsure.to_json()
    assert raw["fits"] is False and raw["fits_if_attention_is_fused"] is True
    assert raw["layouts"][0]["total_if_attention_is_fused"] == own.total_fused


def test_what_nvidias_compiler_logged_stands_beneath_the_bound() -> None:
    """Of the case that docs/measurements/tensorrt-rtx.json has; a plan of another has no row."""
    config, schedule = model("llava-next-7b")
    found = fit(config, schedule, load_target("rtx-40"))
    own, other = found.layouts
    measured = json.loads((ROOT / "docs" / "measurements" / "tensorrt-rtx.json").read_text())
    assert own.logged is not None and other.logged is None
    largest = max(stage["activations_mib"] for stage in measured["stages"])
    assert own.logged.scratch_bytes == pytest.approx(largest * 2**20, rel=1e-3)
    assert own.logged.scratch_bytes < own.activations
    assert re.search(r"^  logged by TensorRT-RTX [\d.]+ +\d+ MiB$", found.to_text(), re.MULTILINE)
    assert found.to_json()["layouts"][0]["activations_logged"] == own.logged.scratch_bytes
    smaller = replace(load_target("rtx-40"), limits=replace(Limits(), max_new_tokens=128))
    assert "logged by" not in fit(config, schedule, smaller).to_text()
    quantised = replace(load_target("rtx-40"), quantize="int8", weights="inputs")
    assert logged(config, schedule, quantised) is None


@pytest.mark.parametrize(
    ("options", "form"),
    [
        ({}, ("inputs", None)),
        ({"weights": "constants"}, ("constants", None)),
        ({"quantize": "int8"}, ("constants", "int8")),
    ],
)
def test_a_bundle_has_the_form_of_its_export_whatever_its_target_says(
    bundles: Bundles, options: dict[str, str], form: tuple[str, str | None]
) -> None:
    bundle = Bundle.load(bundles.path("tiny", target="rtx-40", graphs_only=True, **options))
    own = as_exported(bundle, load_target("rtx-40"))
    assert (own.weights, own.quantize) == form
    assert (own.dialect, own.dtype, own.decode_layout) == ("onnx", "float16", "separate")


def test_what_is_logged_again_takes_the_place_of_what_was() -> None:
    first = Logged("model, on a", "C 1", 5, "k")
    text = written(written("[]", first), Logged("other", "C 1", 6, "l"))
    again = msgspec.json.decode(written(text, Logged("model, on a", "C 2", 7, "k")))
    assert [(each["key"], each["scratch_bytes"]) for each in again] == [("k", 7), ("l", 6)]


def test_a_step_of_the_primitive_dialect_moves_the_cache_four_times() -> None:
    config, schedule = model("llava-next-7b")
    own, other = fit(config, schedule, load_target("h200")).layouts
    assert (own.dialect, own.moved) == ("onnx", own.cache)
    assert (other.dialect, other.moved) == ("primitive", 2 * other.cache)  # of two buffers
    assert own.to_json()["kv_cache_moved_per_step"] == own.moved


def test_attention_in_float32_is_never_counted_as_fused() -> None:
    config, schedule = model("llava-next-7b")
    own = fit(config, schedule, replace(load_target("a100"), dtype="float32")).layouts[0]
    assert own.dialect == "onnx" and own.fused == own.activations


def test_without_attention_nodes_there_is_one_figure() -> None:
    config, schedule = model("llava-1.5-7b")
    assert "if attention is fused" not in fit(config, schedule, load_target("l4")).to_text()


def test_a_layout_or_limit_that_would_fit_is_named() -> None:
    config, schedule = model("llava-next-7b")
    l4 = load_target("l4")
    twice = replace(l4, decode_layout="separate")
    (advice,) = fit(config, schedule, twice).advice
    assert "decode_layout: shared" in advice and "dialect: primitive" in advice
    crowd = replace(l4, limits=replace(l4.limits, max_batch=4))
    (advice,) = fit(config, schedule, crowd).advice
    assert "limits max_batch 1" in advice


def test_the_tiny_model_fits_everywhere() -> None:
    config, schedule = model("tiny")
    for name in list_targets():
        target = load_target(name)
        if target.runtime in FLAVOURS:
            assert fit(config, schedule, target).fits, name


def test_the_target_that_is_recommended_has_the_runtime_that_was_asked_about() -> None:
    config, schedule = model("tiny")
    small = replace(load_target("rtx"), name="small", memory_gib=0.02, reserved_gib=0.0)
    assert fit(config, schedule, small).advice[-1] == "the smallest target that fits it is rtx"


def test_a_target_of_unknown_memory_gets_no_verdict() -> None:
    config, schedule = model("tiny")
    result = fit(config, schedule, replace(load_target("l4"), memory_gib=None))
    assert result.fits is None and "fits" not in result.to_text()


def test_trio_plan_says_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["plan", "--model", "llava-1.5-7b", "--target", "jetson-orin-nx-16gb"]
    assert main(command) == 0
    short = capsys.readouterr().out
    assert "does not fit jetson-orin-nx-16gb" in short and "decode layout" not in short
    assert main([*command, "--paper"]) == 0
    text = capsys.readouterr().out
    assert "memory on jetson-orin-nx-16gb (15.2 GiB, 12.2 GiB of them for this), float16" in text
    assert "decode layout" in text and "no" in text.split("fits")[1]
    assert main([*command, "--json"]) == 0
    raw = json.loads(capsys.readouterr().out)["memory"]
    assert raw["fits"] is False
    assert [each["decode_layout"] for each in raw["layouts"]] == ["shared", "separate"]
    assert raw["layouts"][0]["total"] > raw["usable"] > 12 * _GIB


def test_a_plan_without_a_target_is_for_the_cpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--model", "tiny", "--budget", "0.5", "--json"]) == 0
    memory = json.loads(capsys.readouterr().out)["memory"]
    assert (memory["target"], memory["dtype"]) == ("cpu", "float32") and "layouts" not in memory


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--target", "l4", "--dtype", "int4"], "unknown dtype 'int4'"),
        (["--target", "l5"], "no target called 'l5'.*did you mean 'l4'"),
    ],
)
def test_wrong_wishes_are_named(
    arguments: list[str], says: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "--model", "tiny", "--budget", "0.5", *arguments]) == 1
    assert re.search(says, capsys.readouterr().err)


def test_limits_that_do_not_suit_the_model_are_named(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    text = (target_folder() / "l4.yaml").read_text()
    file.write_text(text.replace("max_text_tokens: 512", "max_text_tokens: 9000"))
    config, schedule = model("llava-1.5-7b")
    with pytest.raises(TrioError, match="exceeds the model's context"):
        fit(config, schedule, load_target(file))
