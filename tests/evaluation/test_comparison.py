"""What is compared if little is said, and what a bundle is compared at."""

from pathlib import Path

import pytest

from trio_deploy import (
    Schedule,
    TrioError,
    export_model,
)
from trio_deploy.evaluation.comparison import Comparison
from trio_deploy.evaluation.configurations import (
    Source,
    used,
)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bundles") / "b"
    export_model("tiny", folder, schedule="0:0.2:divprune,8:0.1", graphs_only=True, progress=False)
    return folder


@pytest.mark.parametrize(
    ("asked", "budgets"),
    [
        ((), ["own", 0.111, 0.222, 0.333]),
        ("own", ["own"]),
        ("0.3,own", ["own", 0.3]),
        ([0.3, "own"], ["own", 0.3]),
        (0.3, [0.3]),
    ],
)
def test_a_bundle_is_measured_in_its_own_schedule_first(asked, budgets, bundle):
    source = Source.open(bundle)
    found, _ = Comparison(budgets=asked).configurations(source)
    assert source.bundle is not None
    own = [one for one in found if used(source, one) == source.bundle.schedule]
    assert [one.budget for one in found if one not in own] == [b for b in budgets if b != "own"]
    assert own == found[: len(own)] and len(own) == budgets.count("own")


def test_own_is_no_budget_of_a_model(source):
    with pytest.raises(TrioError, match="`own` is a bundle's own schedule: pass a bundle"):
        Comparison(budgets="own").configurations(source)


def test_a_bundle_in_a_recipes_schedule_is_asked_once_at_that_budget(tmp_path):
    bundle = export_model("tiny", tmp_path / "b", graphs_only=True, progress=False)
    found, _ = Comparison().configurations(Source.open(bundle.path))
    assert found[0].schedule == bundle.schedule
    assert [one.budget for one in found[1:]] == [0.222, 0.333]


def test_schedules_come_first_and_replace_the_recipes(source):
    mixed = Schedule.parse("0:44:divprune,6:19")
    found, refused = Comparison(schedules=mixed, blind=True).configurations(source)
    assert [one.schedule for one in found] == [mixed, Schedule()] and found[1].blind
    named = Comparison(schedules=["a=0:0.1", "0:0.2"], methods="dart@0,fastv@2", budgets=[0.111])
    found, refused = named.configurations(source)
    assert [one.name for one in found] == ["a", "0:0.2", "dart@0"]
    assert [sentence.split(" is left out")[0] for sentence in refused] == ["fastv@2 at 11.1%"]


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"budgets": "a third"}, "cannot read the budget 'a third'"),
        ({"budgets": 11}, "a budget of 11 is not possible: .* did you mean 0.11"),
        ({"budgets": "own,11%"}, "a budget of 11% is not possible: .* did you mean 0.11"),
        ({"seeds": 0}, "seeds must be 1 or more"),
        ({"methods": "fastv@2", "budgets": 0.111}, "nothing is left to measure: .*; fastv@2 at"),
    ],
)
def test_a_comparison_that_cannot_be_had_is_refused(asked, words, source):
    with pytest.raises(TrioError, match=words):
        Comparison(**asked).configurations(source)
