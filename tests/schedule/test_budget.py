"""Schedules for budgets: the published ones, scaled, solved, and a recipe's own."""

from __future__ import annotations

from itertools import pairwise

import pytest

from trio_deploy import Schedule, TrioError
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.recipe import list_recipes
from trio_deploy.families.registry import parse_config
from trio_deploy.schedule.budget import (
    budgets_for_layers,
    check_budget,
    default_layers,
    for_budget,
    is_budget,
    read_budget,
    resolve_schedule,
    schedule_at_budget,
    smallest_budget,
    solve,
)

PAPER_11 = Schedule.parse("1:92,10:54,15:22")


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
    [(80, (3, 25, 38)), (40, (1, 13, 19)), (32, (1, 10, 15)), (28, (1, 9, 13)), (16, (1, 5, 8)),
     (12, (1, 4, 6)), (4, (1, 2, 3)), (3, (1, 2)), (2, (1,)), (1, ())],
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


@pytest.mark.parametrize(
    ("count", "keeps"),
    [(1, (92,)), (2, (92, 22)), (4, (92, 54 + 38 / 3, 22 + 64 / 3, 22)), (5, (92, 73, 54, 38, 22))],
)
def test_more_or_fewer_points_lie_on_the_lines_between_the_published_ones(count, keeps):
    points = solve(1 / 9, 40, tuple(range(1, 1 + count))).points
    shares = [point.keep / points[0].keep for point in points]
    assert shares == pytest.approx([keep / keeps[0] for keep in keeps], abs=1e-5)


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


def test_a_recipes_budget_of_1_gives_no_other_its_layers():
    keeps_all = {"1.0": Schedule.parse("3:1.0")}
    half = {"0.5": Schedule.parse("1:0.6,4:0.4:dart")}
    assert for_budget(0.9, 16, half | keeps_all) == for_budget(0.9, 16, half)
    assert for_budget(0.9, 16, keeps_all) == solve(0.9, 16)


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


def test_keeps_between_two_budgets_of_a_recipe_are_interpolated_linearly():
    recipe = {2 / 9: Schedule.parse("1:0.2,5:0.05"), 7 / 9: Schedule.parse("1:0.9,5:0.6")}
    halfway = solve(0.5, 9, (1, 5), like=recipe)
    assert [point.keep for point in halfway.points] == pytest.approx([0.55, 0.325])


def test_proportions_of_a_recipe_hold_for_the_smallest_keeps():
    recipe = {0.00055: Schedule.parse("0:0.001,1:0.0001")}
    schedule = solve(0.0005, 2, (0, 1), like=recipe)
    assert [point.keep for point in schedule.points] == [0.000909, 0.000091]


def test_between_the_published_budgets_the_proportions_are_interpolated_linearly():
    first, *others = (point.keep for point in solve(96 / 576, 32).points)
    shares = [(54 / 92 + 128 / 218) / 2, (22 / 92 + 54 / 218) / 2]
    assert [keep / first for keep in others] == pytest.approx(shares, abs=1e-5)


def test_a_recipes_budget_of_1_keeps_all_whatever_rounding_says():
    """3 / (3 · 0.29) · 0.29 is above 1 by a rounding."""
    schedule = solve(0.5, 5, (1, 2), like={1.0: Schedule.parse("1:1.0,2:0.29")})
    assert [point.keep for point in schedule.points] == [0.375, 0.375]


def test_proportions_are_those_of_keeps_that_have_reached_1():
    near = {0.9: Schedule.parse("1:1.0,5:0.5")}  # at most 1, so the second is 11/15
    first, second = (point.keep for point in solve(0.5, 8, (1, 5), like=near).points)
    assert second / first == pytest.approx(11 / 15, rel=1e-5)
    both = {0.4: Schedule.parse("1:0.4,2:0.2"), 1.0: Schedule.parse("1:1.0,2:0.29")}
    halfway = solve(0.7, 5, (1, 2), like=both)  # of 0.4 and 0.2, and of 1 and 1
    assert [point.keep for point in halfway.points] == pytest.approx([0.7, 0.6])


def test_a_recipe_may_have_a_single_point():
    assert solve(0.1, 16, (1,), like={0.2: Schedule.parse("1:0.15")}) == solve(0.1, 16, (1,))


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
        own_budget = next((known for known in budgets if abs(known - budget) < 1e-6), None)
        if own_budget is not None:  # which the recipe rounds to whole tokens
            assert schedule == budgets[own_budget]
        else:
            assert abs(schedule.average(10**5, num_layers) - budget * 10**5) <= 1
    for less, more in pairwise(solved):
        assert all(a.keep <= b.keep for a, b in zip(less.points, more.points, strict=True))


def test_a_default_budget_that_cannot_be_reached_is_called_the_default():
    assert for_budget(None, 32) == solve(0.111, 32)
    with pytest.raises(TrioError, match=r"above 0\.125 \(0\.111 is the default.*--budget"):
        for_budget(None, 8)
    with pytest.raises(TrioError, match=r"above 0\.125$"):
        for_budget(0.111, 8)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("11", r"a budget of 11 is not possible: .* at most 1; did you mean 0\.11\?$"),
        ("1.5", r"a budget of 1\.5 is not possible: .*; did you mean 0\.015\?$"),
        ("11%", r"a budget of 11% is not possible: .* at most 1; did you mean 0\.11\?$"),
        (" 100 %", r"a budget of 100 % is not possible: .*; did you mean 1\?$"),
        ("1%", r"a budget of 1% is not possible: .*; did you mean 0\.01\?$"),
        ("101%", r"a budget of 101% is not possible: .* at most 1$"),
        ("250", r"a budget of 250 is not possible: .* at most 1$"),
        ("-1%", r"a budget of -1% is not possible: .* at most 1$"),
        ("0", r"a budget of 0 is not possible: .* at most 1$"),
        ("nan", r"a budget of nan is not possible: .* at most 1$"),
        ("inf", r"a budget of inf is not possible: .* at most 1$"),
        ("1%1", r"cannot read the budget '1%1': it is the average share .* such as 0\.111$"),
        ("", "cannot read the budget ''"),
    ],
)
def test_a_text_that_is_no_budget_is_refused_and_percent_is_understood(text, words):
    with pytest.raises(TrioError, match=words):
        read_budget(text)


@pytest.mark.parametrize("budget", [11, 11.0, float("inf"), float("nan"), 0, True, "0.2"])
def test_every_schedule_for_a_budget_refuses_what_is_none(budget):
    published = {"0.2": Schedule.parse("0:0.2")}
    for solver in (check_budget, lambda it: for_budget(it, 8, published), lambda it: solve(it, 8)):
        with pytest.raises(TrioError, match="a budget (of|must be a number)"):
            solver(budget)


def test_texts_of_budgets_are_read():
    assert [read_budget(text) for text in ("0.11", " 1", "1e-3")] == [0.11, 1, 0.001]


def test_a_budget_below_the_first_layers_names_the_smallest():
    with pytest.raises(TrioError, match=r"1 of 8 layers run on all .* must be above 0\.125"):
        solve(0.111, 8)
    with pytest.raises(TrioError, match=r"must be above 0\.125"):
        solve(0.125, 8)
    with pytest.raises(TrioError, match="no pruning point"):
        solve(0.5, 32, ())
    assert solve(1.0, 32, ()) == Schedule()
    assert smallest_budget(32, ()) == 1


def test_a_recipes_budget_that_its_first_layers_take_says_nothing_of_proportions():
    recipe = {0.125: Schedule.parse("1:0.5,3:0.1")}
    assert solve(0.5, 8, (1, 3), like=recipe) == solve(0.5, 8, (1, 3))


def test_a_solved_schedule_keeps_the_methods_of_its_points():
    with pytest.raises(ValueError, match="shorter"):
        solve(0.111, 32, (0, 16), ("divprune",))
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


def test_a_name_begins_with_a_letter_and_a_budget_does_not():
    assert all(is_budget(key) for key in ("0.1", ".1", "1"))
    assert not any(is_budget(key) for key in ("v2", "a", "encoder"))
    with pytest.raises(TrioError, match="no schedule called 'v2'"):
        resolve_schedule(32, schedule="v2")


def test_keeps_are_stored_with_six_digits_and_none_becomes_zero():
    for budget in (0.1, 1 / 9, 0.2345678901):
        for point in solve(budget, 32).points:
            assert point.keep == round(point.keep, 6)
    tight = solve(1e-9, 32, layers=(0, 4))
    assert [point.keep for point in tight.points] == [1e-6, 1e-6]
