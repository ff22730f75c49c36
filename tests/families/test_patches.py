"""Patches, their order, windows and position taps against transformers' own."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    Qwen2VLImageProcessorPil,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import (
    smart_resize as theirs_resized,
)
from transformers.vision_utils import (
    get_vision_interpolation_indices_and_weights,
    get_vision_position_ids,
    get_vision_window_index,
)

from tests.support.pictures import make_picture
from trio_deploy import TrioError
from trio_deploy.families.patches import (
    block_order,
    largest_picture,
    most_windows,
    patch_values,
    position_taps,
    smart_resize,
    token_boxes,
    windows,
)
from trio_deploy.families.pixels import ImageSettings

GRIDS = [(2, 2), (2, 60), (8, 8), (10, 14), (36, 40), (60, 36), (18, 4)]
SIZES = [
    *[(28, 28), (1, 1), (3, 200), (200, 3), (56, 84), (640, 480), (99, 1000), (1000, 99)],
    *[(2048, 300), (300, 2048), (1008, 1008), (70, 42), (41, 43), (14, 14)],
]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("patch", [14, 16])
def test_patches_equal_transformers_to_the_bit(size, patch):
    image = make_picture(*size)
    pixels = (56 * 56, 512 * 512)
    processor = Qwen2VLImageProcessorPil(
        patch_size=patch,
        size={"shortest_edge": pixels[0], "longest_edge": pixels[1]},
        image_mean=[0.5, 0.4, 0.3],
        image_std=[0.2, 0.3, 0.4],
    )
    theirs = processor(images=[image], return_tensors="np")
    settings = ImageSettings(None, None, 3, 1 / 255, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
    resized = smart_resize((image.height, image.width), 2 * patch, pixels)
    ours = patch_values(image, resized, patch, 2, 2, settings)
    assert theirs["image_grid_thw"].tolist() == [[1, resized[0] // patch, resized[1] // patch]]
    assert ours.dtype == np.float32
    np.testing.assert_array_equal(ours, theirs["pixel_values"])


def test_sizes_equal_transformers_for_thousands_of_pictures():
    draw = np.random.default_rng(0)
    for _ in range(3000):
        factor = int(draw.choice([28, 32]))
        least = int(draw.integers(1, 200)) * 1000
        pixels = (least, least + int(draw.integers(1, 2000)) * 1000)
        height, width = (int(2 ** draw.uniform(0, 12)) for _ in range(2))
        if max(height, width) > 200 * min(height, width):
            with pytest.raises(TrioError, match="too long and narrow"):
                smart_resize((height, width), factor, pixels)
            continue
        theirs = theirs_resized(height, width, factor, *pixels)
        assert smart_resize((height, width), factor, pixels) == theirs
        blocks, _ = largest_picture(factor, pixels)
        assert theirs[0] * theirs[1] <= blocks * factor**2


@pytest.mark.parametrize(
    "pixels", [(3136, 1003520), (65536, 1048576), (3136, 8 * 784), (784, 99**2)]
)
def test_the_largest_picture_has_the_most_blocks(pixels):
    blocks, (width, height) = largest_picture(28, pixels)
    assert np.prod(smart_resize((height, width), 28, pixels)) == blocks * 28**2


@pytest.mark.parametrize("grid", GRIDS)
def test_the_order_of_patches_equals_transformers(grid):
    theirs = get_vision_position_ids(torch.tensor([[1, *grid]]), 2)
    np.testing.assert_array_equal(block_order(grid, 2), theirs)


@pytest.mark.parametrize("grid", GRIDS)
@pytest.mark.parametrize("side", [4, 3, 1])
def test_windows_hold_the_patches_that_transformers_puts_together(grid, side):
    index, slots = windows(grid, 2, side)
    order, bounds = get_vision_window_index(torch.tensor([[1, *grid]]), 2, side * 2 * 14, 14)
    blocks = np.split(
        (order.numpy()[:, None] * 4 + np.arange(4)).reshape(-1), bounds.numpy()[1:-1].tolist()
    )
    assert index.shape[1] == (2 * side) ** 2
    assert [row[row >= 0].tolist() for row in index] == [block.tolist() for block in blocks]
    np.testing.assert_array_equal(index.reshape(-1)[slots], np.arange(grid[0] * grid[1]))
    # Empty slots stand last.
    assert (np.diff((index < 0).astype(int), axis=1) >= 0).all()


def test_no_grid_is_cut_into_more_windows_than_the_most():
    for blocks in (1, 7, 40, 90):
        cut = [
            len(windows((2 * rows, 2 * (count // rows)), 2, 4)[0])
            for count in range(1, blocks + 1)
            for rows in range(1, count + 1)
        ]
        assert max(cut) == most_windows(blocks, 4)


@pytest.mark.parametrize("grid", [*GRIDS, (48, 48)])
@pytest.mark.parametrize("side", [12, 48])
def test_position_taps_equal_transformers(grid, side):
    index, weights = position_taps(grid, 2, side)
    theirs = get_vision_interpolation_indices_and_weights(
        torch.tensor([[1, *grid]]), side, align_corners=True, spatial_merge_size=2
    )
    np.testing.assert_array_equal(index, theirs[0])
    np.testing.assert_array_equal(weights, theirs[1])
    assert weights.dtype == np.float32


def test_the_boxes_of_tokens_tile_the_picture():
    boxes = token_boxes((4, 6), 2, (50, 90))
    assert boxes[0].tolist() == [0, 0, 30, 25] and boxes[-1].tolist() == [60, 25, 90, 50]
    assert len(boxes) == 6 and boxes[1].tolist() == [30, 0, 60, 25]
