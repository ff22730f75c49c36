"""CDPruner's reference against the determinant itself; its rule on choices that break it."""

from __future__ import annotations

import numpy as np
import pytest

from trio_deploy.schedule.view import Selected, View
from trio_deploy.selection import cdpruner


def view(seed: int, *, size: int = 24, keep: int = 9, visual: int = 30) -> View:
    """Visual tokens with a few groups of near-copies, text in front and behind."""
    random = np.random.default_rng(seed)
    hidden = random.standard_normal((visual + 8, size))
    hidden[8:20] = hidden[7] + 0.3 * random.standard_normal((12, size))
    places = np.zeros(len(hidden), bool)
    places[3 : 3 + visual] = True
    return View(layer=0, hidden=hidden, visual=places, keep=keep, threshold=0.8)


def kernel(case: View) -> np.ndarray:
    """r_i r_j cos_ij of the visual tokens, written down as in the paper."""
    unit = case.hidden / np.linalg.norm(case.hidden, axis=1, keepdims=True)
    pictures, question = unit[case.visual], unit[case.places[-1] + 1 :]
    mean = (pictures @ question.T).mean(axis=1)
    relevance = (mean - mean.min() + 1e-6) / (mean.max() - mean.min() + 1e-6)
    return np.outer(relevance, relevance) * (pictures @ pictures.T)


@pytest.mark.parametrize("seed", range(5))
def test_each_token_makes_the_determinant_greatest(seed: int) -> None:
    case = view(seed)
    kept, scores = cdpruner.reference(case)
    table, chosen = kernel(case), []
    for place in kept:
        free = [i for i in range(len(table)) if i not in chosen]
        logs = [np.linalg.slogdet(table[np.ix_([*chosen, i], [*chosen, i])])[1] for i in free]
        best = free[int(np.argmax(logs))]
        assert case.places[best] == place
        before = np.linalg.slogdet(table[np.ix_(chosen, chosen)])[1] if chosen else 0.0
        assert scores[place] == pytest.approx(np.exp(max(logs) - before), rel=1e-6)
        chosen.append(best)


def test_where_no_gain_is_left_the_most_relevant_tokens_fill_up() -> None:
    case = view(0, size=6, keep=20)
    kept, scores = cdpruner.reference(case)
    assert len(set(kept.tolist())) == 20
    taken = [place for place in kept if scores[place] > 0]
    assert 0 < len(taken) <= 6
    relevance = dict(zip(case.places.tolist(), np.diag(kernel(case)), strict=True))
    left = [relevance[place] for place in case.places.tolist() if place not in kept]
    assert min(relevance[place] for place in kept[len(taken) :]) >= max(left)


def test_the_rule_takes_the_reference_and_refuses_another_choice() -> None:
    case = view(3)
    kept, scores = cdpruner.reference(case)
    given = {"hidden": case.hidden, "visual": case.visual, "threshold": 0.8}
    right = Selected(np.sort(kept), scores, length=len(case.hidden), **given)
    assert cdpruner.rule(right)
    other = np.setdiff1d(case.places, kept)[0]
    swapped = scores.copy()
    swapped[other], swapped[kept[0]] = scores[kept[0]], 0.0
    wrong = np.sort(np.append(kept[1:], other))
    assert not cdpruner.rule(Selected(wrong, swapped, length=len(case.hidden), **given))
