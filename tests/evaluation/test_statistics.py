"""Intervals: paired, by picture, as wide as they should be. Divergence: zero only for the same."""

import numpy as np
import pytest

from trio_deploy.evaluation.statistics import Bootstrap, Estimate, divergence, student, top_tokens
from trio_deploy.pipeline.sampling import log_softmax


def test_the_interval_of_a_mean_is_as_wide_as_theory_says():
    rng = np.random.default_rng(1)
    scores = (rng.random(2000) < 0.9).astype(float)
    found = Bootstrap([str(n) for n in range(2000)]).mean(scores)
    half = 1.96 * np.sqrt(scores.mean() * (1 - scores.mean()) / 2000)
    assert found.value == pytest.approx(scores.mean())
    assert found.high - found.low == pytest.approx(2 * half, rel=0.08)


def test_questions_about_one_picture_are_drawn_together():
    scores = np.repeat([1.0, 0.0] * 50, 16)
    pictures = np.repeat(np.arange(100), 16).astype(str)
    together = Bootstrap(list(pictures)).mean(scores)
    apart = Bootstrap([str(n) for n in range(1600)]).mean(scores)
    ratio = (together.high - together.low) / (apart.high - apart.low)
    assert ratio == pytest.approx(4, rel=0.15)  # as if there were 16 times fewer


def test_differences_are_paired():
    rng = np.random.default_rng(2)
    full = np.ones(1000)
    hard = rng.random(1000) < 0.5
    better, worse = np.where(hard, 0.0, 1.0), np.where(hard, 0.0, 1.0)
    worse[np.flatnonzero(~hard)[:20]] = 0.0  # wrong wherever `better` is, and 20 times more
    bootstrap = Bootstrap([str(n) for n in range(1000)])
    difference = bootstrap.difference(better, worse, full)
    assert difference.value == pytest.approx(0.02) and difference.low > 0.01
    one, other = bootstrap.retention(better, full), bootstrap.retention(worse, full)
    assert one.low < other.high  # each alone says nothing


def test_retention_is_relative_to_the_unpruned_model_and_of_the_chosen_questions():
    scores, full = np.array([1.0, 0.0, 1.0, 0.0]), np.array([1.0, 1.0, 1.0, 0.0])
    bootstrap = Bootstrap(list("abcd"))
    assert bootstrap.retention(scores, full).value == pytest.approx(2 / 3)
    chosen = np.array([True, True, False, False])
    assert bootstrap.retention(scores, full, chosen).value == pytest.approx(1 / 2)
    nothing = bootstrap.retention(scores, np.zeros(4))
    assert np.isnan(nothing.value) and np.isnan(nothing.low)


def answers(rng: np.random.Generator, share: float, pictures: int, each: int, correlation: float):
    """Right or wrong, float [pictures * each]: beta-binomial, so correlated within a picture."""
    if correlation:
        more = (1 - correlation) / correlation
        share = rng.beta(share * more, (1 - share) * more, (pictures, 1))
    return (rng.random((pictures, each)) < share).ravel().astype(float)


RUNS = 200


@pytest.mark.parametrize("correlation", [0, 0.05, 0.2])
@pytest.mark.parametrize(
    ("share", "pictures", "each"),
    [
        (0.994, 40, 16),
        (0.998, 40, 16),
        (0.97, 10, 16),
        (0.97, 40, 16),
        (0.8, 20, 16),
        (0.99, 200, 1),
    ],
)
def test_intervals_hold_the_truth_as_often_as_they_say(share, pictures, each, correlation):
    rng = np.random.default_rng(5)
    bootstrap = Bootstrap([str(n // each) for n in range(pictures * each)], draws=400)
    whole = np.ones(pictures * each)
    held = np.zeros(2)
    for _ in range(RUNS):
        scores = answers(rng, share, pictures, each, correlation if each > 1 else 0)
        found = (bootstrap.mean(scores), bootstrap.retention(scores, whole))
        held += [one.low <= share <= one.high for one in found]
    # 95 %, less what two in a hundred runs of this many would miss, and less where pictures are few
    # and answers about one strongly alike (docs/evaluation.md).
    assert (held / RUNS >= 0.91).all()


@pytest.mark.parametrize("correlation", [0, 0.2])
@pytest.mark.parametrize("rates", [(0.002, 0.0), (0.002, 0.002), (0.01, 0.0), (0.02, 0.01)])
def test_intervals_of_differences_hold_the_truth(rates, correlation):
    rng = np.random.default_rng(6)
    bootstrap = Bootstrap([str(n // 16) for n in range(640)], draws=400)
    held = 0
    for _ in range(RUNS):
        one, other = (1 - answers(rng, rate, 40, 16, correlation) if rate else np.ones(640)
                      for rate in rates)  # fmt: skip
        found = bootstrap.difference(one, other, np.ones(640))
        held += found.low <= rates[1] - rates[0] <= found.high
    assert held / RUNS >= 0.91


def test_all_right_is_not_certain():
    pictures = [str(n // 16) for n in range(640)]
    found = Bootstrap(pictures).mean(np.ones(640))
    # By hand: 640 questions are worth 640 / (1 + 15 · 0.1) = 256, times (1.960 / 2.023)² = 240.4;
    # Wilson's lower end is 240.4 / (240.4 + 1.96²) = 98.4 %.
    assert (found.value, found.high) == (1.0, 1.0)
    assert found.low == pytest.approx(240.4 / (240.4 + 3.8415), abs=1e-4)
    same = Bootstrap(pictures).difference(np.ones(640), np.ones(640), np.ones(640))
    # Bonett and Price: ± 1.96 · √(2 / 242.4 / 242.4).
    assert same.value == 0 and same.high == -same.low == pytest.approx(0.01143, abs=1e-4)


def test_one_question_a_picture_all_right_is_wilsons_bound():
    found = Bootstrap([str(n) for n in range(400)]).mean(np.ones(400))
    assert found.low == pytest.approx(400 / (400 + 3.84), abs=2e-4)  # Student's t for 399


@pytest.mark.parametrize(("pictures", "known"), [(9, False), (10, True)])
def test_fewer_than_ten_pictures_give_no_interval(pictures, known):
    scores = np.tile([1.0, 0.0], 8 * pictures)
    bootstrap = Bootstrap([str(n // 16) for n in range(16 * pictures)])
    whole = np.ones(16 * pictures)
    for found in (
        bootstrap.mean(scores),
        bootstrap.retention(scores, whole),
        bootstrap.difference(scores, whole, whole),
    ):
        assert not np.isnan(found.value) and found.known == known
        assert Estimate.from_json(found.to_json()) == found
    few = np.arange(16 * pictures) < 16 * 3  # ten pictures, but three of this kind
    assert not bootstrap.mean(scores, few).known


def test_retention_goes_no_further_than_every_answer_right():
    pictures = [str(n) for n in range(100)]
    full = np.ones(100)
    assert Bootstrap(pictures).retention(full, full).high == 1
    full[:2] = 0
    assert Bootstrap(pictures).retention(full, full).high == pytest.approx(100 / 98)


def test_students_quantile_is_that_of_the_tables():
    assert [student(n) for n in (9, 15, 39, 1000)] == pytest.approx(
        [2.2622, 2.1314, 2.0227, 1.9623], abs=5e-4
    )


def test_the_same_questions_get_the_same_draws():
    scores = np.arange(50) / 50
    names = [str(n % 7) for n in range(50)]
    assert Bootstrap(names).mean(scores) == Bootstrap(names).mean(scores)


@pytest.mark.parametrize("size", [61, 2000])
def test_divergence_is_that_of_the_distributions(size):
    rng = np.random.default_rng(3)
    p = log_softmax(rng.normal(size=size) * 6)
    q = log_softmax(rng.normal(size=size) * 6)
    exact = float((np.exp(p) * (p - q)).sum())
    found = divergence(*top_tokens(p), q)
    assert divergence(*top_tokens(p), p) == pytest.approx(0, abs=1e-9)
    if size <= 256:
        assert found == pytest.approx(exact, rel=1e-9)
    else:  # the tail counts as one token
        assert 0 < found <= exact and found == pytest.approx(exact, rel=0.05)
