"""The order of the window scan."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from trio_deploy.reference.encoder_scores import window_order


@pytest.mark.parametrize("side", [4, 6, 8, 12])
def test_the_local_scan_goes_round_the_windows(side):
    attention = (
        torch.tensor(np.random.default_rng(0).normal(size=(2, 1 + side * side))).softmax(-1).float()
    )
    order = window_order(attention)
    place = np.arange(side * side)
    window = place // side // 6 * 10 + place % side // 6
    for tile in range(2):
        weights = attention[tile, 1:].numpy()
        taken = np.argsort(-order[tile].numpy(), kind="stable")
        count = len(np.unique(window))
        first = taken[:count]  # the best of each window, the best of all in front
        assert set(first) == {
            max(np.flatnonzero(window == w), key=lambda i: weights[i]) for w in np.unique(window)
        }
        assert first[0] == weights.argmax()
        assert (np.diff(weights[first]) <= 0).all()
