"""Greedy suppression does what the method's wording says."""

import numpy as np

from trio_deploy.selection.nms import cosines_of, greedy_by_cosines, greedy_select


def unit(*degrees: float) -> np.ndarray:
    angle = np.radians(degrees)
    return np.stack([np.cos(angle), np.sin(angle)], axis=1)


def test_keeps_the_most_salient_and_skips_their_near_copies():
    features = unit(0, 10, 90, 100, 180)  # cos 10 degrees = 0.98: two pairs of copies
    kept = greedy_select(np.array([5.0, 4.0, 1.0, 3.0, 2.0]), features, 3, 0.8)
    assert kept.tolist() == [0, 3, 4]


def test_a_suppressed_token_does_not_suppress():
    features = unit(0, 30, 60)  # neighbours are alike (0.87), the ends are not (0.5)
    assert greedy_select(np.array([3.0, 2.0, 1.0]), features, 2, 0.8).tolist() == [0, 2]


def test_the_best_suppressed_fill_up_what_is_missing():
    features = unit(0, 1, 2, 3)
    assert greedy_select(np.array([1.0, 4.0, 2.0, 3.0]), features, 3, 0.8).tolist() == [1, 2, 3]


def test_equal_scores_go_to_the_lower_index():
    assert greedy_select(np.zeros(3), unit(0, 90, 180), 2, 0.8).tolist() == [0, 1]


def test_keeps_all_or_none_at_the_ends():
    assert greedy_select(np.arange(3.0), unit(0, 1, 2), 7, 0.8).tolist() == [0, 1, 2]
    assert greedy_select(np.arange(3.0), unit(0, 1, 2), 0, 0.8).tolist() == []


def test_similarity_equal_to_the_threshold_suppresses():
    features = np.array([[1.0, 0.0], [0.8, 0.6], [-1.0, 0.0]])
    scores = np.array([3.0, 2.0, 1.0])
    assert greedy_select(scores, features, 2, 0.8).tolist() == [0, 2]
    assert greedy_by_cosines(scores, cosines_of(features), 2, 0.8).tolist() == [0, 2]


def test_known_cosines_give_the_same_tokens():
    random = np.random.default_rng(0)
    for keep in (0, 1, 5, 20, 40, 50):
        features = np.repeat(random.standard_normal((10, 3)), 4, axis=0)
        features += 0.3 * random.standard_normal(features.shape)
        scores = random.integers(0, 9, 40).astype(float)  # with ties
        expected = greedy_select(scores, features, keep, 0.8)
        found = greedy_by_cosines(scores, cosines_of(features), keep, 0.8)
        assert found.tolist() == expected.tolist()
