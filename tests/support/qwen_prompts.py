"""Prompts of the Qwen models with random pictures, as the oracle's rows and as transformers'."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from tests.support.qwen_models import IMAGE, model_config, pixels
from trio_deploy.reference.row import Row

START, END = 288, 289


def row_of(family: str, parts: Sequence[int | tuple[int, int]], seed: int = 0) -> Row:
    """A prompt of text, a number of tokens, and pictures, (rows, columns) of visual tokens."""
    random = np.random.default_rng(seed)
    config = model_config(family)
    ids: list[int] = []
    patches, grids = [], []
    for number, part in enumerate(parts):
        if isinstance(part, int):
            ids += random.integers(5, 280, part).tolist()
            continue
        ids += [START, *[IMAGE] * (part[0] * part[1]), END]
        grids.append((1, *part))
        grid = (1, 2 * part[0], 2 * part[1])
        patches.append(pixels(config, grid, seed=10 * seed + number)[0])
    return Row(np.array(ids), np.concatenate(patches) if patches else None, seed=seed, grids=grids)


def inputs_of(row: Row) -> dict[str, Any]:
    """The same prompt as transformers' models take it."""
    ids = torch.as_tensor(row.input_ids)[None]
    inputs: dict[str, Any] = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if row.pixel_values is not None:
        grids = [[t, 2 * h, 2 * w] for t, h, w in row.grids]
        inputs |= {
            "pixel_values": torch.as_tensor(row.pixel_values),
            "image_grid_thw": torch.tensor(grids),
            "mm_token_type_ids": (ids == IMAGE).int(),
        }
    return inputs
