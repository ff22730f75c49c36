"""Positions of prompts along three axes against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
)
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from trio_deploy.families.rope import grid_positions, plain_positions

MODELS = {
    "qwen2_vl": (Qwen2VLModel, Qwen2VLConfig),
    "qwen2_5_vl": (Qwen2_5_VLModel, Qwen2_5_VLConfig),
    "qwen3_vl": (Qwen3VLModel, Qwen3VLConfig),
}


def theirs_of(name: str, visual: np.ndarray, grids) -> tuple[np.ndarray, int]:
    """What transformers computes for one prompt: positions [3, S], and length + delta."""
    architecture, config = MODELS[name]
    with torch.device("meta"):
        model = architecture.__new__(architecture)
    torch.nn.Module.__init__(model)
    model.config = config()
    positions, deltas = model.get_rope_index(
        torch.zeros(1, len(visual), dtype=torch.int64),
        torch.from_numpy(visual[None].astype(np.int32)),
        image_grid_thw=torch.tensor([[1, 2 * rows, 2 * columns] for _, rows, columns in grids]),
    )
    return positions[:, 0].numpy(), len(visual) + int(deltas[0, 0])


@pytest.mark.parametrize("name", MODELS)
def test_positions_equal_transformers_for_a_hundred_prompts(name):
    draw = np.random.default_rng(0)
    for _ in range(100):
        grids, parts = [], [np.zeros(int(draw.integers(0, 9)), bool)]
        for _ in range(int(draw.integers(1, 5))):
            grids.append((1, *(int(x) for x in draw.integers(1, 13, 2))))
            parts += [np.ones(np.prod(grids[-1]), bool), np.zeros(int(draw.integers(1, 9)), bool)]
        visual = np.concatenate(parts)
        theirs, following = theirs_of(name, visual, grids)
        ours = grid_positions(visual, grids)
        np.testing.assert_array_equal(ours, theirs)
        assert ours.dtype == np.int64 and ours.max() + 1 == following


def test_a_prompt_may_end_with_a_picture():
    visual = np.array([False, True, True, True, True, True, True])
    theirs, following = theirs_of("qwen3_vl", visual, [(1, 2, 3)])
    ours = grid_positions(visual, [(1, 2, 3)])
    np.testing.assert_array_equal(ours, theirs)
    assert ours.max() + 1 == following == 4


def test_text_alone_counts_along_all_axes():
    assert grid_positions(np.zeros(3, bool), []).tolist() == [[0, 1, 2]] * 3
    assert plain_positions(3).tolist() == [[0, 1, 2]]
