"""DivPrune's reference on tokens that point away from each other."""

from __future__ import annotations

import numpy as np

from trio_deploy.schedule.view import View
from trio_deploy.selection import divprune


def test_a_token_is_lonely_at_distances_above_1_too() -> None:
    angle = np.radians([0, 100, 230])  # the last is 130 degrees from both others
    hidden = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    view = View(layer=0, hidden=hidden, visual=np.ones(3, bool), keep=1, threshold=0.8)
    kept, scores = divprune.reference(view)
    assert kept.tolist() == [2]
    assert scores[2] == 2.0, "the first one's"
