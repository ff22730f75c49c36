"""The random choice is the one that its formula gives, in every version."""

from __future__ import annotations

import numpy as np

from trio_deploy.schedule.view import View
from trio_deploy.selection import random


def test_a_seed_keeps_the_same_tokens_in_every_version() -> None:
    visual = np.arange(9) >= 2
    view = View(
        layer=2, hidden=np.zeros((9, 4)), visual=visual, keep=3, threshold=0.8, seed=1234567
    )
    kept, scores = random.reference(view)
    keys = 1234567 % 4091, 1234567 // 4091
    expected = np.zeros(9)
    for place in range(2, 9):
        x = place
        for turn in range(1, 9):
            constant = 7919 * turn + 104729 * 3 * turn**2
            x = pow(x + keys[(turn - 1) % 2] + constant, 3, 4091)
        expected[place] = (x + 1) / 4091
    assert scores.tolist() == expected.tolist()
    assert kept.tolist() == np.argsort(-expected)[:3].tolist()
