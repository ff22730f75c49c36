"""Pictures of any size as rows of patches: resizing, order, windows, positions.

Pillow and numpy only, and equal to transformers' Qwen2-VL image processor in every number. A grid
is (rows, columns) of patches. Patches stand in the order of `block_order` everywhere: blocks of
m x m patches, which the connector merges into one visual token, row by row; inside a block row by
row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.families.pixels import ImageSettings, normalise, resize

MOST_ASPECT = 200
"""The longer side of a picture by the shorter, at most."""


@dataclass(frozen=True)
class PatchSettings:
    """Preprocessing of pictures that are resized to any multiple of a block of patches.

    Attributes:
        pixels: least and most pixels of a resized picture.
        image: filter and normalisation.
    """

    pixels: tuple[int, int]
    image: ImageSettings


def smart_resize(size: tuple[int, int], factor: int, pixels: tuple[int, int]) -> tuple[int, int]:
    """(height, width) in multiples of `factor` that suit a picture of `size`.

    Args:
        factor: pixels along one side of a block of patches.
        pixels: least and most of them.

    Raises:
        TrioError: the picture is too long and narrow.
    """
    height, width = size
    least, most = pixels
    if max(size) > MOST_ASPECT * min(size):
        raise TrioError(
            f"an image of {width} x {height} pixels is too long and narrow: one side may be "
            f"{MOST_ASPECT} times as long as the other: crop it first"
        )
    # Python's round takes halves to the even number, as transformers does.
    fitted = round(height / factor) * factor, round(width / factor) * factor
    if fitted[0] * fitted[1] > most:
        scale = math.sqrt(height * width / most)
        return (
            max(factor, math.floor(height / scale / factor) * factor),
            max(factor, math.floor(width / scale / factor) * factor),
        )
    if fitted[0] * fitted[1] < least:
        scale = math.sqrt(least / (height * width))
        return (
            math.ceil(height * scale / factor) * factor,
            math.ceil(width * scale / factor) * factor,
        )
    return fitted


def patch_values(
    image: Image.Image,
    size: tuple[int, int],
    patch: int,
    merge: int,
    frames: int,
    settings: ImageSettings,
) -> np.ndarray:
    """The patches of an RGB image resized to (height, width), float32 [L, 3·frames·patch²].

    Args:
        frames: frames per patch; a picture fills all of them alike.
    """
    pixels = np.asarray(resize(image, size, settings))
    planes = normalise(pixels[None], settings)[0]  # [3, height, width]
    down, across = size[0] // (patch * merge), size[1] // (patch * merge)
    blocks = planes.reshape(3, down, merge, patch, across, merge, patch)
    blocks = blocks.transpose(1, 4, 2, 5, 0, 3, 6)  # row, column, row, column, channel, y, x
    repeated = np.broadcast_to(
        blocks[:, :, :, :, :, None], (*blocks.shape[:5], frames, patch, patch)
    )
    return repeated.reshape(down * across * merge**2, 3 * frames * patch**2)


def block_order(grid: tuple[int, int], merge: int) -> np.ndarray:
    """Row and column of each patch, int64 [L, 2]."""
    rows, columns = grid
    places = np.moveaxis(np.indices((rows, columns)), 0, -1)
    blocks = places.reshape(rows // merge, merge, columns // merge, merge, 2)
    return blocks.swapaxes(1, 2).reshape(-1, 2).astype(np.int64)


def windows(grid: tuple[int, int], merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Cut a grid into windows of `side` x `side` merged blocks; those at the far edges are smaller.

    Returns:
        int64 [W, K], the patches of each window, K = (side·merge)², -1 in empty slots, which come
        last; int64 [L], where each patch stands in it (window · K + slot).
    """
    rows, columns = grid[0] // merge, grid[1] // merge
    down, across = -(-rows // side), -(-columns // side)
    padded = np.full((down * side, across * side), -1, dtype=np.int64)
    padded[:rows, :columns] = np.arange(rows * columns).reshape(rows, columns)
    blocks = padded.reshape(down, side, across, side).swapaxes(1, 2).reshape(down * across, -1)
    patches = np.where(
        blocks[:, :, None] < 0, -1, blocks[:, :, None] * merge**2 + np.arange(merge**2)
    )
    index = patches.reshape(len(blocks), -1)
    # Empty slots behind the others.
    index = np.take_along_axis(index, np.argsort(index < 0, axis=1, kind="stable"), axis=1)
    window, slot = np.nonzero(index >= 0)
    slots = np.empty(grid[0] * grid[1], dtype=np.int64)
    slots[index[window, slot]] = window * index.shape[1] + slot
    return index, slots


def position_taps(grid: tuple[int, int], merge: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Resample a learned table of side x side positions bilinearly to a grid, corners aligned.

    Returns:
        int64 [L, 4], rows of the table for each patch; float32 [L, 4], their weights.
    """
    order = block_order(grid, merge)
    taps, weights = zip(*(_axis_taps(order[:, a], grid[a], side) for a in (0, 1)), strict=True)
    index = taps[0][:, :, None] * side + taps[1][:, None, :]
    return index.reshape(-1, 4), (weights[0][:, :, None] * weights[1][:, None, :]).reshape(-1, 4)


def _axis_taps(place: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray]:
    """Two entries of an axis of `side` for each place on one of `size`, and their weights."""
    source = place.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    floor = np.floor(source)
    offsets = np.arange(2)
    taps = np.clip(floor.astype(np.int64)[:, None] + offsets, 0, side - 1)
    away = np.abs(source[:, None] - floor[:, None] - offsets.astype(np.float32))
    return taps, np.maximum(np.float32(1) - away, np.float32(0))


def token_boxes(grid: tuple[int, int], merge: int, size: tuple[int, int]) -> np.ndarray:
    """What each merged block of a grid shows, float64 [L/m², 4].

    Returns:
        x0, y0, x1, y1 in pixels of an image of (height, width).
    """
    rows, columns = grid[0] // merge, grid[1] // merge
    y, x = np.divmod(np.arange(rows * columns), columns)
    boxes = np.stack([x, y, x + 1, y + 1], axis=1).astype(np.float64)
    return boxes * np.array([size[1] / columns, size[0] / rows] * 2)


def largest_picture(factor: int, pixels: tuple[int, int]) -> tuple[int, tuple[int, int]]:
    """The most blocks that a picture can become, and (width, height) of one with the most.

    A picture larger than the most pixels is rounded down, so it has as many blocks as fit, unless
    it is so narrow that its shorter side is one block. One smaller than the least is rounded up on
    both sides, which exceeds the most where the two bounds lie close together.

    Args:
        factor, pixels: as of `smart_resize`.
    """
    least, most = (bound / factor**2 for bound in pixels)
    whole = [
        (rows * columns, rows, (columns * factor, rows * factor))
        for rows in range(1, math.isqrt(max(1, int(most))) + 1)
        if (columns := int(most // rows)) and columns <= MOST_ASPECT * rows
    ]
    narrow = (2 * MOST_ASPECT * factor, 2 * factor)
    whole.append((math.prod(smart_resize(narrow[::-1], factor, pixels)) // factor**2, 0, narrow))
    blocks, _, picture = max(whole)
    shortest = math.sqrt(least / MOST_ASPECT)
    enlarged = [math.ceil(shortest) * math.ceil(least / shortest)]
    for rows in range(math.floor(shortest) + 2, math.isqrt(math.ceil(least)) + 2):
        enlarged.append(rows * math.ceil(least / (rows - 1)))
    return max(blocks, *enlarged), picture


def most_windows(blocks: int, side: int) -> int:
    """The most windows of `side` x `side` blocks that a grid of so many blocks is cut into."""
    return max(
        -(-rows // side) * -(-min(blocks // rows, 2 * MOST_ASPECT * rows) // side)
        for rows in range(1, math.isqrt(blocks) + 1)
    )
