"""Profiles admit what requests within a target's limits bring about, and no more."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.support.exported import Export
from trio_deploy import Schedule, TrioError
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.target import Limits, Target
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.runtimes.registry import load_target
from trio_deploy.runtimes.tensorrt.profiles import Profile, Sizes, profiles
from trio_deploy.schedule.budget import schedule_at_budget, solve

RECIPE = load_recipe("llava-next-7b")
CONFIG = parse_config(RECIPE.architecture)
SCHEDULE = RECIPE.schedules["0.111"]
JETSON, H200 = load_target("jetson-agx-orin-64gb"), load_target("h200")


def limited(target: Target, **limits: object) -> Target:
    return replace(target, limits=replace(target.limits, **limits))


@pytest.mark.parametrize("most", [0.2, 0.5, 1.0])
def test_every_request_within_the_limits_fits_and_the_largest_one_fills_them(most: float) -> None:
    limits = replace(JETSON.limits, max_budget=most)
    sizes = Sizes.of(CONFIG, SCHEDULE, limits)
    layers = CONFIG.text.num_layers
    largest = [0] * len(sizes.tokens)
    for text in (1, 60, limits.max_text_tokens):
        for visual in (0, 1, 576, limits.max_visual_tokens):
            for budget in (0.04, 0.111, 0.2, most):
                if budget > most:
                    continue
                schedule = solve(budget, layers, layers=SCHEDULE.layers)
                for point, kept in enumerate((visual, *schedule.resolve(visual))):
                    least, _, limit = sizes.tokens[point]
                    assert least <= text + kept <= limit
                    largest[point] = max(largest[point], text + kept)
                    capacity = text + kept + limits.max_new_tokens
                    assert sizes.capacity[point].min <= capacity <= sizes.capacity[point].max
    assert largest == [span.max for span in sizes.tokens]


def test_what_a_recipe_keeps_at_a_budget_within_the_limits_fits() -> None:
    """Its proportions may leave more behind the last point than the published ones would."""
    budgets = {
        0.111: SCHEDULE,
        0.222: Schedule.parse("1:0.25,10:0.25,15:0.18"),
        0.4: Schedule.parse("1:0.9,10:0.4,15:0.1"),
    }
    limits = replace(JETSON.limits, max_budget=0.3)
    sizes = Sizes.of(CONFIG, SCHEDULE, limits, budgets)
    visual, layers = limits.max_visual_tokens, CONFIG.text.num_layers
    asked = [budget / 1000 for budget in range(32, 301)]
    kept = [schedule_at_budget(each, layers, SCHEDULE, budgets).resolve(visual) for each in asked]
    most = [max(point) + limits.max_text_tokens for point in zip(*kept, strict=True)]
    assert [span.max for span in sizes.tokens[1:]] == most
    assert most[2] > limits.max_text_tokens + 0.17 * visual
    assert Sizes.of(CONFIG, SCHEDULE, limits).tokens[3].max < most[2]


def test_what_is_typical_follows_from_the_schedule() -> None:
    sizes = Sizes.of(CONFIG, SCHEDULE, JETSON.limits)
    text, visual = JETSON.limits.typical_text_tokens, request_limits(CONFIG).visual_tokens
    assert [span.opt for span in sizes.tokens] == [
        text + kept for kept in (visual, *SCHEDULE.resolve(visual))
    ]
    assert (sizes.tiles, sizes.rows) == ((1, 5, 5), (0, 2880, 2880))


def test_a_model_of_one_tile_an_image_never_brings_more_than_its_images() -> None:
    recipe = load_recipe("llava-1.5-7b")
    config = parse_config(recipe.architecture)
    sizes = Sizes.of(config, recipe.schedules["0.111"], JETSON.limits)
    assert sizes.tokens[0].max == JETSON.limits.max_text_tokens + 576
    assert sizes.tiles == (1, 1, 1)
    two = replace(JETSON.limits, max_images=2, max_batch=3)
    assert Sizes.of(config, recipe.schedules["0.111"], two).tiles.max == 6


@pytest.mark.parametrize("name", ["qwen2.5-vl-3b", "qwen3-vl-2b"])
def test_pictures_of_any_size_fill_the_towers_profile(exported: Export, name: str) -> None:
    """As many patches as the recipe's pixels hold, windows of long thin pictures among them."""
    bundle = exported(name, "jetson-agx-orin-64gb", graphs_only=True)
    found = profiles(bundle, load_target("jetson-agx-orin-64gb"))
    tower = found["vision"][0].shapes
    values = bundle.config.patch_tower.patch_values
    assert tower["pixel_values"] == ((1, 4, values), (1, 5120, values), (1, 5120, values))
    assert tower["patch_position"] == ((4, 2), (5120, 2), (5120, 2))
    if bundle.config.patch_tower.window:
        assert tower["window_index"] == ((1, 64), (80, 64), (160, 64))
        assert tower["window_slot"] == ((4,), (5120,), (5120,))
    else:
        assert tower["position_weights"] == ((4, 4), (5120, 4), (5120, 4))
        prefill = next(stage for stage in found if "deepstack.0" in found[stage][0].shapes)
        width = bundle.config.text.hidden_size
        full, step = (profile.shapes for profile in found[prefill][0].parts)
        assert full["deepstack.0"].min == (0, width) and full["deepstack.0"].max[0] >= 1280
        assert step["deepstack.0"].max == (0, width) and step["feature_index"].max[1] == 1
        assert full["position_ids"].max[1] == 3


def test_nothing_is_longer_than_the_models_context() -> None:
    sizes = Sizes.of(CONFIG, SCHEDULE, H200.limits)
    assert sizes.tokens[0].max == sizes.capacity[0].max == CONFIG.text.max_positions
    talk = replace(H200.limits, max_text_tokens=4000, max_new_tokens=1000)
    sizes = Sizes.of(CONFIG, SCHEDULE, talk)
    assert {span.max for span in sizes.capacity} == {CONFIG.text.max_positions}


@pytest.mark.parametrize("most", [0.111, 0.34, 1.0])
def test_capacities_are_what_the_context_lets_a_row_hold_behind_each_point(most: float) -> None:
    """Text, visual and new tokens share the context: no more of them come together."""
    limits = replace(H200.limits, max_budget=most)
    budgets = {float(name): RECIPE.schedules[name] for name in ("0.111", "0.222", "0.333")}
    sizes = Sizes.of(CONFIG, SCHEDULE, limits, budgets)
    layers, context = CONFIG.text.num_layers, CONFIG.text.max_positions
    allowed = [
        schedule_at_budget(budget, layers, SCHEDULE, budgets) for budget in (0.05, 0.111, most)
    ]
    largest, longest = [0] * 4, [0] * 4
    for text in (1, 100, limits.max_text_tokens):
        for visual in range(0, limits.max_visual_tokens, 64):
            room = context - text - visual
            if room < 1:
                continue
            new = min(limits.max_new_tokens, room)
            for schedule in allowed:
                for point, kept in enumerate((visual, *schedule.resolve(visual))):
                    longest[point] = max(longest[point], text + kept)
                    largest[point] = max(largest[point], text + kept + new)
    assert largest == [span.max for span in sizes.capacity]
    assert all(0 <= s.max - most < 64 for s, most in zip(sizes.tokens, longest, strict=True))


def test_a_segment_that_decodes_too_has_one_profile_for_both_uses(exported: Export) -> None:
    """With two, the compiler holds matrices twice: once in each layout that it chose."""
    bundle = exported("llava-next-7b", "jetson-agx-orin-64gb", graphs_only=True)
    found = profiles(bundle, JETSON)
    assert list(found) == list(bundle.stages)
    (both,) = found["prefill_2"]
    prefill, decode = both.parts
    assert (prefill.name, decode.name) == ("prefill", "decode")
    assert {bounds[2] for bounds in prefill.shapes["past.10.key"]} == {0}
    assert {bounds[1] for bounds in decode.shapes["hidden_states"]} == {1}
    capacity = [bounds[2] for bounds in decode.shapes["past.10.key"]]
    assert capacity[0] == 2 and capacity[1] == 64 + 275 + 64
    embed, step = found["embed"][0].parts
    assert embed.shapes["image_features"].min == (0, 4096)
    assert step.shapes["image_features"].max == (0, 4096)
    assert step.shapes["input_ids"].max == (1, 1)
    for use in both.uses:
        for name, (least, _, most) in both.shapes.items():
            within = zip(least, *use.shapes[name], most, strict=True)
            assert all(list(sizes) == sorted(sizes) for sizes in within), name


def test_each_corner_of_a_profile_for_both_uses_is_a_valid_step(exported: Export) -> None:
    """Where TensorRT computes sizes at a corner, new tokens and past must not contradict there."""
    bundle = exported("llava-next-7b", "jetson-agx-orin-64gb", graphs_only=True)
    for stage in ("prefill_0", "prefill_3"):
        (both,) = profiles(bundle, JETSON)[stage]
        past = next(name for name in both.shapes if name.startswith("past."))
        corners = [
            (new[1], slots[2])
            for new, slots in zip(both.shapes["position_ids"], both.shapes[past], strict=True)
        ]
        assert [slots in (0, new) for new, slots in corners] == [True] * 3


def test_only_the_width_of_a_selection_has_values(exported: Export) -> None:
    bundle = exported("llava-next-7b", "jetson-agx-orin-64gb", graphs_only=True)
    found = profiles(bundle, limited(JETSON, max_budget=0.2))
    assert {stage for stage, each in found.items() if each[0].values} == {
        "select_1",
        "select_2",
        "select_3",
    }
    (before,), (after, _) = found["select_2"], found["prefill_2"][0].uses
    # what one stage gives at most, the next one takes at most
    prompt = found["prefill_1"][0].uses[0]
    assert prompt.shapes["hidden_states"].max == before.shapes["hidden_states"].max
    assert before.values["width"].max[0] == after.shapes["hidden_states"].max[1]
    assert before.shapes["hidden_states"].min[1] == 2  # a visual token, and one of text


def test_a_cache_that_is_updated_in_place_has_one_capacity(exported: Export) -> None:
    bundle = exported("llava-next-7b", "h200", graphs_only=True)
    (decode,) = profiles(bundle, H200)["decode"]
    least, typical, most = decode.shapes["past.31.value"]
    assert least[2] == typical[2] == most[2]
    assert (least[0], most[0]) == (1, H200.limits.max_batch)


def test_a_cache_that_is_updated_in_place_is_as_long_as_the_schedule_asks_for(
    exported: Export,
) -> None:
    bundle = exported("llava-next-7b", "h200", graphs_only=True)

    def capacities(target: Target) -> list[int]:
        (decode,) = profiles(bundle, target)["decode"]
        assert [decode.shapes[f"past.{i}.key"].max[2] for i in (1, 9)] == [
            decode.shapes[f"past.{i}.value"].max[2] for i in (9, 1)
        ]
        return [decode.shapes[f"past.{i}.key"].max[2] for i in (0, 1, 10, 15)]

    others = H200.limits.max_text_tokens + H200.limits.max_new_tokens
    visual = CONFIG.text.max_positions - others
    own = [others + kept for kept in (visual, *SCHEDULE.resolve(visual))]
    assert capacities(limited(H200, max_budget=0.111)) == own == [4096, 1515, 1312, 1141]
    shipped = capacities(H200)
    assert shipped == [4096, 2904, 2128, 1490], "budgets up to 0.34"
    assert capacities(limited(H200, max_budget=1.0)) == [4096] * 4


def test_a_pruning_point_before_the_first_layer_has_its_own_sizes() -> None:
    schedule = Schedule.parse("0:0.2:divprune,16:0.1")
    sizes = Sizes.of(CONFIG, schedule, replace(JETSON.limits, max_budget=0.3))
    assert sizes.tokens[1].max < sizes.tokens[0].max


def test_profiles_survive_their_record(exported: Export) -> None:
    bundle = exported("llava-next-7b", "jetson-agx-orin-64gb", graphs_only=True)
    for found in profiles(bundle, JETSON).values():
        assert [Profile.from_json(profile.to_json()) for profile in found] == found


@pytest.mark.parametrize(
    ("limits", "says"),
    [
        (Limits(max_text_tokens=5000), "exceeds the model's context of 4096"),
        (Limits(max_budget=0.01), "max_budget does not fit.*cannot be reached"),
    ],
)
def test_limits_that_do_not_suit_the_model_are_named(limits: Limits, says: str) -> None:
    with pytest.raises(TrioError, match=says):
        Sizes.of(CONFIG, SCHEDULE, limits)
