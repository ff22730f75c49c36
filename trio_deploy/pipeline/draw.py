"""Draw which visual tokens were kept: dropped patches dimmed, one panel per pruning point."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout
from trio_deploy.pipeline.request import Generation

_PANEL = 336  # longest side of one panel in pixels
_NARROWEST = 84  # shorter side, to which longer and narrower pictures are stretched
_GAP = 8
_CAPTION = 22
_DIMMED = 0.18  # of a dropped patch's brightness
_PAPER, _INK = (255, 255, 255), (30, 30, 30)


def draw_generation(generation: Generation) -> Image.Image:
    """Draw all images of an answer, one row of panels each.

    Raises:
        TrioError: the prompt had no image.
    """
    if not generation.images:
        raise TrioError("there is no image to draw: the prompt is text alone")
    strips = [
        draw_kept(image, processed, generation.kept_of_image(number), pruned_before(generation))
        for number, (image, processed) in enumerate(
            zip(generation.images, generation.processed, strict=True)
        )
    ]
    return _stack(strips)


def draw_questions(captions: Sequence[str], generations: Sequence[Generation]) -> Image.Image:
    """Draw one image, and beside it what the last pruning point kept for each of several questions.

    Args:
        captions: text under each generation's panel.
        generations: answers about one image, pruned to the end by the same schedule.
    """
    first = generations[0]
    image, processed = first.images[0], first.processed[0]
    whole = kept_panels(image, processed, [])[0]
    panels = [_panel(whole, f"all {len(processed.rows)} visual tokens")]
    for caption, generation in zip(captions, generations, strict=True):
        last = generation.kept_of_image(0)[-1]
        panels.append(_panel(kept_panels(image, processed, [last])[1], caption))
    return _row(panels)


def pruned_before(generation: Generation) -> list[int]:
    """For each pruning point of an answer, the layer that it precedes."""
    starts = [start for start, _, _ in generation.layer_ranges]
    return starts[len(starts) - len(generation.kept) :]


def draw_kept(
    image: Image.Image,
    processed: Layout,
    kept: Sequence[np.ndarray],
    layers: Sequence[int] | None = None,
) -> Image.Image:
    """Draw one image in panels: what the model sees of it, then what each pruning point kept.

    A part that is cropped away before the vision tower is left out. A pixel is bright if any token
    that covers it was kept; with LLaVA-NeXT every pixel is covered twice, by a token of the whole
    image and by one of a tile.

    Args:
        image: upright RGB, as `Preprocessor.open_image` gives it.
        kept: for each pruning point, which of the image's own visual tokens were kept.
        layers: for each pruning point, the layer that it precedes; for the captions.
    """
    total = len(processed.rows)
    whole, *pruned = kept_panels(image, processed, kept)
    x0, y0, x1, y1 = _seen(processed)
    crop = "" if (x1 - x0, y1 - y0) == image.size else f", of {x1 - x0} x {y1 - y0} pixels"
    panels = [_panel(whole, f"all {total} tokens{crop}")]
    for number, (tokens, picture) in enumerate(zip(kept, pruned, strict=True)):
        where = f"from layer {layers[number]}" if layers is not None else f"point {number + 1}"
        panels.append(_panel(picture, f"{where}: {len(tokens)} of {total}"))
    return _row(panels)


def _row(panels: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new(
        "RGB",
        (sum(panel.width + _GAP for panel in panels) + _GAP, panels[0].height + 2 * _GAP),
        _PAPER,
    )
    left = _GAP
    for panel in panels:
        sheet.paste(panel, (left, _GAP))
        left += panel.width + _GAP
    return sheet


def kept_panels(
    image: Image.Image, processed: Layout, kept: Sequence[np.ndarray]
) -> list[Image.Image]:
    """The panels of `draw_kept` without captions: the image, then each pruning point."""
    seen = _seen(processed)
    part = image.convert("RGB").crop(seen)
    scale = _PANEL / max(part.size)
    width, height = (max(_NARROWEST, round(side * scale)) for side in part.size)
    small = part.resize((width, height), Image.Resampling.LANCZOS)
    return [small, *(_dim(small, _lit(processed, tokens, seen, small.size)) for tokens in kept)]


def _placed(boxes: np.ndarray) -> np.ndarray:
    """The boxes of tokens that have a place, [n, 4]."""
    return boxes[~np.isnan(boxes).any(axis=1)]


def _seen(processed: Layout) -> tuple[int, int, int, int]:
    """The part of the image that its tokens cover together: x0, y0, x1, y1 in whole pixels."""
    height, width = processed.size
    boxes = _placed(processed.boxes)
    if not len(boxes):
        return 0, 0, width, height
    left, top = np.rint(boxes[:, :2].min(axis=0)).astype(int)
    right, bottom = np.rint(boxes[:, 2:].max(axis=0)).astype(int)
    return int(left), int(top), int(max(right, left + 1)), int(max(bottom, top + 1))


def _lit(
    processed: Layout, tokens: np.ndarray, seen: tuple[int, int, int, int], size: tuple[int, int]
) -> np.ndarray:
    """Pixels of the panel that a kept token covers, bool [height, width]."""
    width, height = size
    left, top, right, bottom = seen
    scale = np.array([width / (right - left), height / (bottom - top)] * 2)
    lit = np.zeros((height, width), np.bool_)
    boxes = (_placed(processed.boxes[tokens]) - np.array([left, top] * 2)) * scale
    for x0, y0, x1, y1 in np.rint(boxes).astype(int):
        lit[max(y0, 0) : max(y1, y0 + 1), max(x0, 0) : max(x1, x0 + 1)] = True
    return lit


def _dim(image: Image.Image, lit: np.ndarray) -> Image.Image:
    """Make pixels that are not lit darker and grey."""
    colours = np.asarray(image, np.float32)
    grey = colours.mean(axis=2, keepdims=True) * _DIMMED
    return Image.fromarray(np.where(lit[..., None], colours, grey).astype(np.uint8), "RGB")


def _panel(image: Image.Image, caption: str) -> Image.Image:
    font = ImageFont.load_default(13)
    width = max(image.width, round(font.getlength(caption)) + 4)
    panel = Image.new("RGB", (width, image.height + _CAPTION), _PAPER)
    panel.paste(image, (0, 0))
    ImageDraw.Draw(panel).text((2, image.height + 3), caption, fill=_INK, font=font)
    return panel


def _stack(strips: Sequence[Image.Image]) -> Image.Image:
    sheet = Image.new(
        "RGB",
        (max(strip.width for strip in strips), sum(strip.height for strip in strips)),
        _PAPER,
    )
    top = 0
    for strip in strips:
        sheet.paste(strip, (0, top))
        top += strip.height
    return sheet
