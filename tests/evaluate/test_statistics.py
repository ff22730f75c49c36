"""Intervals: paired, by picture, as wide as they should be. Divergence: zero only for the same."""

import numpy as np
import pytest

from trio_deploy.evaluate.statistics import Bootstrap, divergence, top_tokens
from trio_deploy.runtime.sampling import log_softmax


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
