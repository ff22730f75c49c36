"""Schedules resolve and solve as published, and the accounting reproduces the paper's figures."""

from __future__ import annotations

from itertools import pairwise

import pytest

from trio_deploy import Schedule, TrioError
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.recipe import list_recipes
from trio_deploy.cost.flops import (
    account,
    layer_flops,
    paper_layer_flops,
    vision_flops,
)
from trio_deploy.families.base import ModelConfig, RopeConfig, TextConfig, VisionConfig
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.schedule.budget import (
    budgets_for_layers,
    default_layers,
    for_budget,
    resolve_schedule,
    schedule_at_budget,
    smallest_budget,
    solve,
)
from trio_deploy.schedule.methods import METHODS
from trio_deploy.schedule.schedule import PruningPoint
from trio_deploy.selection.trio import saliency_flops

MIB = 2**20
VICUNA = TextConfig(
    hidden_size=4096,
    intermediate_size=11008,
    num_layers=32,
    num_heads=32,
    num_kv_heads=32,
    head_dim=128,
    vocab_size=32064,
    max_positions=4096,
    rms_norm_eps=1e-5,
    rope=RopeConfig(10000.0),
)
CLIP = VisionConfig(1024, 4096, 24, 16, 336, 14, 1e-5, "quick_gelu", (23,), True)
PAPER_11 = Schedule.parse("1:92,10:54,15:22")
PAPER_22 = Schedule.parse("1:218,10:128,15:54")
NOTHING = Schedule()


def cost(schedule, visual, text_tokens=60):
    return account(VICUNA, schedule, visual, text_tokens, item_bytes=2, probes=4)


# --- the paper's arithmetic ----------------------------------------------------------------------


@pytest.mark.parametrize(("visual", "tera"), [(576, 2.986), (2880, 16.670)])
def test_unpruned_flops_are_the_papers(visual, tera):
    assert cost(NOTHING, visual).paper / 1e12 == pytest.approx(tera, abs=5e-4)


@pytest.mark.parametrize(("schedule", "mib"), [(NOTHING, 318), (PAPER_11, 62)])
def test_kv_cache_is_the_papers_llava_row(schedule, mib):
    assert cost(schedule, 576).kv_bytes == mib * MIB


@pytest.mark.parametrize(
    ("schedule", "visual", "free", "layer_a_probe"),
    [(PAPER_11, 576, 0.326, 0.442), (Schedule.parse("1:460,10:270,15:110"), 2880, 1.70, 2.34)],
)
def test_pruned_flops_with_and_without_a_layer_forward_a_probe(
    schedule, visual, free, layer_a_probe
):
    base = cost(schedule, visual).paper
    probed = (visual, *schedule.resolve(visual))[:-1]
    with_probe = base + sum(paper_layer_flops(n, 4096, 11008) for n in probed)
    assert base / 1e12 == pytest.approx(free, abs=6e-3)
    assert with_probe / 1e12 == pytest.approx(layer_a_probe, abs=6e-3)


def test_saliency_costs_the_share_of_a_layer_that_was_derived():
    share = saliency_flops(2944, VICUNA, probes=4) / layer_flops(2944, VICUNA)
    assert share == pytest.approx(0.157, abs=2e-3)


def test_the_honest_count_has_the_third_mlp_matrix_and_the_selection():
    pruned, full = cost(PAPER_11, 576, 0), cost(NOTHING, 576, 0)
    assert full.selection == 0
    assert full.layers - full.paper == 32 * 576 * 4096 * 11008
    assert pruned.honest == pruned.layers + pruned.saliency + pruned.similarity + pruned.lm_head
    assert 0 < pruned.selection < 3 * layer_flops(576, VICUNA)


def test_grouped_heads_make_keys_and_their_cache_cheaper():
    grouped = TextConfig(**{**VICUNA.__dict__, "num_kv_heads": 8})
    assert grouped.kv_bytes([10], 2) * 4 == VICUNA.kv_bytes([10], 2)
    assert layer_flops(100, VICUNA) - layer_flops(100, grouped) == 2 * 100 * 4096 * (4096 - 1024)
    assert saliency_flops(2944, grouped, 4) < saliency_flops(2944, VICUNA, 4)


def test_vision_cost_grows_with_the_tiles():
    config = ModelConfig("llava_next", CLIP, VICUNA, "gelu", True, 32000, ((336, 672),))
    one = vision_flops(config, 1)
    assert vision_flops(config, 5) == 5 * one
    # 23 of CLIP-L's 24 layers over 577 tokens, about 0.19 T with its attention
    assert one / 1e12 == pytest.approx(0.19, abs=0.02)


def test_the_largest_image_is_known_from_the_configuration():
    llava = ModelConfig("llava", CLIP, VICUNA, "gelu", True, 32000)
    canvases = ((336, 672), (672, 336), (672, 672), (1008, 336), (336, 1008))
    tiled = ModelConfig("llava_next", CLIP, VICUNA, "gelu", True, 32000, canvases)
    for config, tiles, visual in ((llava, 1, 576), (tiled, 5, 2928)):
        limits = request_limits(config)
        assert (limits.tiles, limits.visual_tokens) == (tiles, visual)


# --- schedules -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("schedule", "visual", "average"),
    [
        (PAPER_22, 576, 128),
        (PAPER_11, 576, 64),
        (Schedule.parse("1:460,10:270,15:110"), 2880, 320),
        (Schedule.parse("0:96,16:32"), 576, 64),
    ],
)
def test_published_schedules_have_their_published_average(schedule, visual, average):
    assert schedule.average(visual, 32) == average


def test_resolve_rounds_half_up_keeps_at_least_one_and_never_increases():
    assert Schedule.parse("1:0.5").resolve(5) == (3,)
    assert Schedule.parse("1:0.01,2:0.001").resolve(10) == (1, 1)
    assert Schedule((PruningPoint(1, 0.5), PruningPoint(2, 0.5))).resolve(7) == (4, 4)
    assert Schedule.parse("1:92,10:54").resolve(60) == (60, 54)
    assert Schedule.parse("1:0.5,2:0.2").resolve(0) == (0, 0)
    assert Schedule.parse("1:0").resolve(9) == (0,)


def test_segments_cover_the_layers():
    assert PAPER_11.segments(32) == [(0, 1), (1, 10), (10, 15), (15, 32)]
    assert Schedule.parse("0:96,16:32").segments(32) == [(0, 0), (0, 16), (16, 32)]
    assert NOTHING.segments(4) == [(0, 4)]


def test_a_range_without_layers_is_not_shown():
    assert [r[:3] for r in cost(Schedule.parse("0:96,16:32"), 576).ranges] == [
        (0, 16, 96),
        (16, 32, 32),
    ]


def test_json_and_text_round_trip():
    schedule = Schedule.parse("1:0.16, 10:9.4%,15:0.038")
    assert schedule.points[1].keep == pytest.approx(0.094)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert Schedule.from_json([{"layer": 1, "keep": 5}]) == Schedule.parse("1:5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("1", "layer:keep"),
        ("a:3", "layer:keep"),
        ("1:x", "layer:keep"),
    ],
)
def test_unreadable_text_is_refused(text, words):
    with pytest.raises(TrioError, match=words):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "raw",
    [
        {"layer": 1},
        [3],
        [{"layer": 1}],
        [{"layer": 1.5, "keep": 3}],
        [{"layer": 1, "keep": "3"}],
        [{"layer": 1, "keep": True}],
        [{"layer": 1, "keep": 3, "kep": 1}],
    ],
)
def test_unreadable_json_is_refused(raw):
    with pytest.raises(TrioError):
        Schedule.from_json(raw)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:700", "only 576"),
        ("1:1.5", "at most 1"),
        ("1:0.0", "above 0"),
        ("1:-3", "keeps -3"),
        ("10:54,1:22", "must increase"),
        ("1:54,1:22", "must increase"),
        ("32:5", "layers 0 to 31"),
        ("-1:5", "layers 0 to 31"),
        ("1:54,10:92", "not increase"),
        ("1:0.1,10:0.2", "not increase"),
        ("1:0.5,10:54", "mixes"),
    ],
)
def test_impossible_schedules_are_refused(text, words):
    with pytest.raises(TrioError, match=words):
        Schedule.parse(text).validate(32, visual=576)


def test_unknown_method_is_refused():
    with pytest.raises(TrioError, match="unknown pruning method 'best'"):
        Schedule((PruningPoint(1, 0.5, "best"),)).validate(32)


# --- the solver ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("budget", "keeps"),
    [
        (0.111, (92, 54, 22)),
        (1 / 9, (92, 54, 22)),
        (0.222, (218, 128, 54)),
        (2 / 9, (218, 128, 54)),
    ],
)
def test_published_budgets_give_the_published_counts(budget, keeps):
    schedule = solve(budget, 32)
    assert schedule.layers == (1, 10, 15)
    assert schedule.resolve(576) == keeps


@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(40, (1, 13, 19)), (32, (1, 10, 15)), (28, (1, 9, 13)), (16, (1, 5, 8)), (12, (1, 4, 6)),
     (4, (1, 2, 3)), (3, (1, 2)), (2, (1,)), (1, ())],
)  # fmt: skip
def test_pruning_layers_scale_with_depth(num_layers, layers):
    assert default_layers(num_layers) == layers


def test_the_shape_scales_to_other_depths():
    keeps = solve(1 / 9, 16).resolve(2880)
    assert keeps == pytest.approx((292, 171, 70), abs=1)
    for num_layers in (16, 40):
        first, second, third = solve(0.2, num_layers).resolve(100_000)
        assert second / first == pytest.approx(0.587, abs=2e-3)
        assert 0.239 <= third / first <= 0.248


@pytest.mark.parametrize("visual", [1, 7, 576, 2340])
@pytest.mark.parametrize(
    ("num_layers", "layers"),
    [(32, None), (40, None), (16, None), (12, None), (4, None), (32, (16,)), (32, (0, 16)),
     (24, (2, 5, 9, 14, 20))],
)  # fmt: skip
def test_every_budget_is_hit_within_rounding_and_more_budget_keeps_no_less(
    visual, num_layers, layers
):
    points = layers or default_layers(num_layers)
    floor = smallest_budget(num_layers, points)
    grid = [floor + (1 - floor) * i / 400 for i in range(1, 401)]
    solved = [solve(budget, num_layers, layers) for budget in grid]
    for budget, schedule in zip(grid, solved, strict=True):
        schedule.validate(num_layers, visual)
        assert schedule.layers == points
        # half a token a layer by rounding; below half a token the minimum of one is kept
        assert abs(schedule.average(visual, num_layers) - budget * visual) <= (
            0.501 if budget * visual - floor * visual > 1 else 1.001
        )
    for less, more in pairwise(solved):
        assert all(a.keep <= b.keep for a, b in zip(less.points, more.points, strict=True))
    assert all(point.keep == 1.0 for point in solved[-1].points)


@pytest.mark.parametrize("budget", [0.0, -0.5, 1.01, float("nan")])
def test_budgets_that_are_no_share_are_refused(budget):
    with pytest.raises(TrioError, match="not possible"):
        solve(budget, 32)


def test_a_recipes_own_schedule_comes_before_the_solvers():
    recipe = {"0.111": Schedule.parse("2:0.1"), "encoder": Schedule.parse("0:9")}
    assert for_budget(0.111, 32, recipe) == recipe["0.111"]
    assert for_budget(0.222, 32, {"encoder": recipe["encoder"]}) == solve(0.222, 32)
    with pytest.raises(TrioError, match="not possible"):
        for_budget(0.0, 32, recipe)


def test_budgets_that_a_recipe_does_not_list_have_the_layers_and_methods_of_the_nearest():
    recipe = {
        "0.1": Schedule.parse("0:0.2:divprune,8:0.0334"),
        "0.2": Schedule.parse("0:0.4:divprune,8:0.0667"),
        "0.5": Schedule.parse("1:0.6,4:0.4:dart"),
    }
    for budget, key in ((0.05, "0.1"), (0.15, "0.2"), (0.28, "0.2"), (0.4, "0.5"), (0.9, "0.5")):
        found = for_budget(budget, 16, recipe)
        assert (found.layers, found.methods) == (recipe[key].layers, recipe[key].methods)
        assert found.average(10**5, 16) / 10**5 == pytest.approx(budget, abs=1e-4)
    first, second = (point.keep for point in for_budget(0.15, 16, recipe).points)
    assert first / second == pytest.approx(6, rel=0.01), "in the recipe's proportions"
    assert for_budget(1.0, 16, recipe).resolve(100) == (100, 100)


OWN = Schedule.parse("0:0.2:divprune,8:0.07")
RECIPE = {
    "0.111": OWN,
    "0.222": Schedule.parse("0:0.3:divprune,8:0.144"),
    "0.3": Schedule.parse("0:0.5,8:0.1"),  # by other methods
    "0.4": Schedule.parse("0:0.5:divprune,4:0.3"),  # before other layers
    "1.0": Schedule.parse("0:0.9:divprune,8:0.9"),
    "divers": Schedule.parse("0:0.4:divprune,8:0.04"),
}


def test_of_a_recipes_schedules_those_for_budgets_fit_that_have_the_same_layers_and_methods():
    assert budgets_for_layers(RECIPE, OWN) == {0.111: OWN, 0.222: RECIPE["0.222"]}
    assert list(budgets_for_layers(RECIPE, OWN.with_method("dart"), "dart")) == [0.111, 0.222, 0.3]
    assert budgets_for_layers(RECIPE, OWN.with_method("dart")) == {}
    assert budgets_for_layers({"0.5": Schedule()}, Schedule()) == {}


def test_a_budget_that_the_recipe_has_is_the_recipes_and_others_lie_between():
    budgets = budgets_for_layers(RECIPE, OWN)
    assert schedule_at_budget(0.111, 16, OWN, budgets) == OWN
    assert schedule_at_budget(0.222 + 9e-7, 16, OWN, budgets) == RECIPE["0.222"]
    between = schedule_at_budget(0.2, 16, OWN, budgets)
    assert between != solve(0.2, 16, OWN.layers, OWN.methods)
    assert (between.layers, between.methods) == (OWN.layers, OWN.methods)
    for point, low, high in zip(between.points, OWN.points, RECIPE["0.222"].points, strict=True):
        assert low.keep < point.keep < high.keep
    less, more = (
        schedule_at_budget(0.05, 16, OWN, budgets),
        schedule_at_budget(0.3, 16, OWN, budgets),
    )
    assert less.points[1].keep / less.points[0].keep == pytest.approx(0.07 / 0.2, rel=1e-4)
    assert more.points[1].keep / more.points[0].keep == pytest.approx(0.144 / 0.3, rel=1e-4)
    assert schedule_at_budget(1.0, 16, OWN, budgets).resolve(9) == (9, 9)


def test_a_budget_is_solved_in_the_published_proportions_where_the_recipe_has_none():
    for budget in (0.111, 0.2, 0.7):
        assert schedule_at_budget(budget, 16, OWN, {}) == solve(budget, 16, OWN.layers, OWN.methods)


@pytest.mark.parametrize(
    ("num_layers", "budgets"),
    [
        (16, budgets_for_layers(RECIPE, OWN)),
        (16, {0.2: Schedule.parse("1:64,8:0")}),  # counts, none of them at last
        (16, {0.2: Schedule.parse("1:0,8:0")}),
        (16, {0.01: Schedule.parse("1:0.5,8:0.2"), 0.2: Schedule.parse("1:0.3,8:0.05")}),
        *(
            (
                parse_config(load_recipe(name).architecture).text.num_layers,
                budgets_for_layers(
                    load_recipe(name).schedules, load_recipe(name).schedules["0.111"]
                ),
            )
            for name in list_recipes()
        ),
    ],
)
def test_budgets_beside_a_recipes_are_hit_and_more_budget_keeps_no_less(num_layers, budgets):
    own = next(iter(budgets.values()))
    floor = smallest_budget(num_layers, own.layers)
    grid = [floor + (1 - floor) * i / 400 for i in range(1, 401)]
    solved = [schedule_at_budget(budget, num_layers, own, budgets) for budget in grid]
    for budget, schedule in zip(grid, solved, strict=True):
        schedule.validate(num_layers, 10**5)
        assert abs(schedule.average(10**5, num_layers) - budget * 10**5) <= 1
    for less, more in pairwise(solved):
        assert all(a.keep <= b.keep for a, b in zip(less.points, more.points, strict=True))


def test_a_default_budget_that_cannot_be_reached_is_called_the_default():
    assert for_budget(None, 32) == solve(0.111, 32)
    with pytest.raises(TrioError, match=r"above 0\.125 \(0\.111 is the default.*--budget"):
        for_budget(None, 8)
    with pytest.raises(TrioError, match=r"above 0\.125$"):
        for_budget(0.111, 8)


def test_a_budget_below_the_first_layers_names_the_smallest():
    with pytest.raises(TrioError, match=r"must be above 0\.125"):
        solve(0.111, 8)
    with pytest.raises(TrioError, match="no pruning point"):
        solve(0.5, 32, ())
    assert solve(1.0, 32, ()) == Schedule()


@pytest.mark.parametrize("text", ["1:1.0, 2:0.5", "1:1", "1:92, 10:54", "1:0.16"])
def test_a_schedule_prints_as_it_is_read(text):
    assert str(Schedule.parse(text)) == text


# --- methods -------------------------------------------------------------------------------------


def test_a_point_may_name_its_method():
    schedule = Schedule.parse("0:96:divprune, 16:32")
    assert schedule.methods == ("divprune", "trio")
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert Schedule.parse("1:92,10:54:fastv", "dart").methods == ("dart", "fastv")
    assert PAPER_11.with_method("random").methods == ("random",) * 3
    assert PAPER_11.with_method("random").resolve(576) == PAPER_11.resolve(576)


def test_a_solved_schedule_keeps_the_methods_of_its_points():
    for budget in (0.111, 1.0):
        schedule = solve(budget, 32, (0, 16), ("divprune", "trio"))
        assert schedule.methods == ("divprune", "trio")
        assert schedule.average(10**6, 32) == pytest.approx(budget * 10**6, rel=1e-3)


def test_a_schedule_is_asked_for_by_budget_text_or_name():
    published = {"0.111": PAPER_11, "encoder": Schedule.parse("0:96:divprune,16:32")}
    assert resolve_schedule(32, 0.111, published=published) == PAPER_11
    assert resolve_schedule(32, 0.111, method="dart", published=published) == PAPER_11.with_method(
        "dart"
    )
    assert resolve_schedule(32, schedule="encoder", published=published) == published["encoder"]
    assert resolve_schedule(32, schedule="1:5,2:3:random", method="fastv").methods == (
        "fastv",
        "random",
    )
    with pytest.raises(TrioError, match="encoder"):
        resolve_schedule(32, schedule="decoder", published=published)
    assert for_budget(0.2, 32, published).methods == ("trio",) * 3


def test_what_selects_is_counted_by_its_method():
    """TRIO's probes cost more than attention of one token; diversity compares all with all."""
    by = {m: cost(PAPER_11.with_method(m), 576) for m in METHODS}
    assert by["random"].selection == 0
    assert by["trio"].saliency == by["topk-gradient"].saliency > by["fastv"].saliency > 0
    assert by["topk-gradient"].similarity == by["fastv"].similarity == 0
    assert by["divprune"].saliency == 0
    tokens = [n + 60 for n in (576, 92, 54)]
    assert by["divprune"].similarity == sum(n * n * 4096 for n in tokens)
    assert by["dart"].saliency == sum(n * 4096 * 4096 for n in tokens)
    one_shot = cost(Schedule.parse("0:64:dart"), 576)
    assert one_shot.saliency == 0 and one_shot.similarity == 8 * 636 * 4096
    layers = {c.layers for c in by.values()}
    assert len(layers) == 1
