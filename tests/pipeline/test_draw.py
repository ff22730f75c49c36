"""`--show` draws the part of a picture that the model sees, large enough to see it."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from trio_deploy.families.base import Layout
from trio_deploy.families.patches import token_boxes
from trio_deploy.pipeline.draw import draw_kept, kept_panels


def layout(size, box):
    """Four tokens in the quarters of a box (x0, y0, x1, y1), and one without a place."""
    x0, y0, x1, y1 = box
    x, y = (x0 + x1) / 2, (y0 + y1) / 2
    boxes = [[x0, y0, x, y], [x, y0, x1, y], [x0, y, x, y1], [x, y, x1, y1], [np.nan] * 4]
    return Layout({}, 4, "", np.arange(5), np.array(boxes, float), size)


@pytest.mark.parametrize(
    ("size", "box"),
    [
        ((60, 2048), (994, 0, 1054, 60)),
        ((900, 30), (0, 435, 30, 465)),
        ((480, 640), (80, 0, 560, 480)),
    ],
)
def test_what_is_cropped_away_is_not_drawn(size, box):
    image = Image.new("RGB", (size[1], size[0]), "red")
    image.paste("blue", box)
    whole, kept = kept_panels(image, layout(size, box), [np.array([0, 4])])
    assert whole.size == kept.size == (336, 336), "the square that the model sees fills the panel"
    assert (np.asarray(whole) == [0, 0, 255]).all()
    bright = (np.asarray(kept) == [0, 0, 255]).all(axis=2)
    assert bright[:168, :168].all() and bright.sum() == 168 * 168


@pytest.mark.parametrize("size", [(10, 3000), (700, 1), (1, 1)])
def test_a_long_and_narrow_picture_that_is_seen_as_a_whole_is_wide_enough_to_see(size):
    image = Image.new("RGB", (size[1], size[0]), "blue")
    whole, kept = kept_panels(image, layout(size, (0, 0, size[1], size[0])), [np.array([1, 3])])
    assert min(whole.size) >= 84 and max(whole.size) == 336
    bright = (np.asarray(kept) == [0, 0, 255]).all(axis=2)
    assert bright.mean() == pytest.approx(0.5, abs=0.01)


@pytest.mark.parametrize("grid", [(1, 1), (1, 97), (97, 1), (6, 8), (2, 3), (36, 40), (60, 36)])
def test_a_picture_of_any_shape_is_lit_where_its_kept_tokens_are(grid):
    """Grids of the Qwen families: a token is a cell of the whole picture."""
    rows, columns = grid
    size = (rows * 7, columns * 5)
    boxes = token_boxes((2 * rows, 2 * columns), 2, size)
    processed = Layout({}, len(boxes), "", np.arange(len(boxes)), boxes, size)
    kept = np.flatnonzero(np.random.default_rng(0).random(len(boxes)) < 0.3)
    image = Image.new("RGB", size[::-1], "blue")
    whole, panel = kept_panels(image, processed, [kept])
    lit = (np.asarray(panel) == [0, 0, 255]).all(axis=2)
    assert max(whole.size) == 336 and min(whole.size) >= 84
    # The pixel in the middle of each cell, and nothing else that is whole.
    middle = ((boxes[:, 1::2].mean(axis=1), rows * 7), (boxes[:, ::2].mean(axis=1), columns * 5))
    y, x = (
        (at / side * pixels).astype(int)
        for (at, side), pixels in zip(middle, lit.shape, strict=True)
    )
    assert np.flatnonzero(lit[y, x]).tolist() == kept.tolist()


def test_the_caption_says_how_much_is_seen(monkeypatch):
    said = []
    monkeypatch.setattr(
        "trio_deploy.pipeline.draw._panel", lambda image, caption: said.append(caption) or image
    )
    image = Image.new("RGB", (640, 480))
    draw_kept(image, layout((480, 640), (80, 0, 560, 480)), [np.array([0])], [3])
    draw_kept(image, layout((480, 640), (0, 0, 640, 480)), [np.array([0])], [3])
    assert said == [
        "all 5 tokens, of 480 x 480 pixels", "from layer 3: 1 of 5",
        "all 5 tokens", "from layer 3: 1 of 5",
    ]  # fmt: skip
