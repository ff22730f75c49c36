"""Opening pictures from anywhere, and the resizing and cropping of CLIP's image processor.

Pillow and numpy only. The arithmetic is that of transformers' Pillow image processors, down to
the order of the floating-point operations, so that pixel values come out equal.
"""

from __future__ import annotations

import io
import math
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from trio_deploy.errors import TrioError
from trio_deploy.files import is_file

#: Most pixels of a picture that is decoded or made by resizing. This is Pillow's own warning
#: threshold (a quarter of a GiB as RGB); nothing here needs more, and a small file that unpacks to
#: more is an attack or a mistake.
MAX_PIXELS = 89_478_485

#: Formats that are decoded, in Pillow's names. Not all that Pillow knows: for some it starts a
#: program (Ghostscript for EPS), which an untrusted picture must not do.
FORMATS = ("AVIF", "BMP", "GIF", "ICO", "JPEG", "JPEG2000", "MPO", "PNG", "PPM", "TIFF", "WEBP")

_SIZED = tuple(form for form in FORMATS if form != "ICO")  # whose headers tell the picture's size


@dataclass(frozen=True)
class ImageSettings:
    """The settings of preprocessor_config.json, defaults filled in.

    Attributes:
        size: `shortest` side, or exact (height, width); None: no resizing.
        crop: (height, width) of the central crop; None: no cropping.
        resample: Pillow's number of the resampling filter.
        scale: factor on 0…255 pixel values; None: none.
        mean, std: per channel, after scaling; None: no normalisation.
        pad_to_square: whether the image is first padded to a square in the mean colour.
    """

    size: int | tuple[int, int] | None
    crop: tuple[int, int] | None
    resample: int
    scale: float | None
    mean: tuple[float, ...] | None
    std: tuple[float, ...] | None
    pad_to_square: bool = False

    @property
    def base_size(self) -> tuple[int, int]:
        """(height, width) of the overview tile of any-resolution models."""
        if self.size is None:
            raise TrioError("the image settings have no size: any-resolution tiling needs one")
        return (self.size, self.size) if isinstance(self.size, int) else self.size


@dataclass(frozen=True)
class View:
    """Where a scaled image lies on a canvas: offset of its top left corner, and its size."""

    top: float
    left: float
    size: tuple[int, int]

    def to_image(self, boxes: np.ndarray, image_size: tuple[int, int]) -> np.ndarray:
        """Boxes [..., 4] (x0, y0, x1, y1) on the canvas as pixels of the image (width, height).

        Parts of a box that lie on padding are cut off.
        """
        width, height = image_size
        offset = np.array([self.left, self.top] * 2, dtype=np.float64)
        scale = np.array([width / self.size[1], height / self.size[0]] * 2)
        return np.clip((boxes - offset) * scale, 0, np.array([width, height] * 2))


def open_image(source: Any, name: str | None = None) -> Image.Image:
    """Read a picture as upright RGB, as a viewer shows it.

    EXIF rotation is applied; transparency is laid on white (as transformers does); palettes, CMYK
    and greys become RGB; 16-bit greys are scaled to 8 bits rather than clipped.

    Args:
        source: a path, the bytes of a file, a Pillow image, or an array uint8 [height, width, 3].
        name: what an error calls a picture that is no path; None: "the image".

    Raises:
        TrioError: not a picture in one of `FORMATS`, a damaged one, one without pixels, or one
            with more than `MAX_PIXELS`.
    """
    name = name or "the image"
    if isinstance(source, Image.Image):
        return _to_rgb(source, name)
    if isinstance(source, np.ndarray):
        return _to_rgb(_from_array(source), name)
    if isinstance(source, (bytes, bytearray, memoryview)):
        return _decode(io.BytesIO(bytes(source)), name)
    if isinstance(source, (str, os.PathLike)):
        path = Path(source)
        if not is_file(path):
            raise TrioError(f"there is no image file at {path}")
        try:
            with path.open("rb") as file:
                return _decode(file, str(path))
        except OSError as error:
            raise TrioError(f"{path} cannot be read: {error.strerror or error}") from error
    raise TrioError(
        f"an image must be a path, bytes, a Pillow image or an array, not {type(source).__name__}"
    )


def _from_array(array: np.ndarray) -> Image.Image:
    if array.dtype != np.uint8 or array.ndim != 3 or array.shape[2] != 3 or not array.size:
        raise TrioError(
            f"an array must be a picture of uint8 [height, width, 3], not of {array.dtype} "
            f"{list(array.shape)}"
        )
    return Image.fromarray(np.ascontiguousarray(array))


def encoded_size(data: bytes) -> tuple[int, int]:
    """(width, height) from a picture file's header, without decoding it.

    Raises:
        TrioError: not a picture in one of `FORMATS` but ICO, whose header need not tell the size
            of the picture inside.
    """
    with _opened(io.BytesIO(data), "the image", _SIZED) as image:
        return image.size


def header_size(source: Any) -> tuple[int, int] | None:
    """(height, width) of anything that `open_image` takes, without decoding it.

    None where that cannot be told: the source is no picture, or its header does not say it.
    A path of anything but a file is not opened: a pipe's reader waits for its writer.
    """
    if isinstance(source, Image.Image):
        width, height = source.size
    elif isinstance(source, np.ndarray):
        height, width = source.shape[:2] if source.ndim == 3 else (0, 0)
    else:
        try:
            is_path = isinstance(source, (str, os.PathLike))
            if is_path and not is_file(Path(source)):
                return None
            with (
                Path(source).open("rb") if is_path else io.BytesIO(source) as file,
                _opened(file, "the image", _SIZED) as image,
            ):
                width, height = image.size
        except (TrioError, OSError, TypeError, ValueError):
            return None
    return (height, width) if width > 0 and height > 0 else None


def resize(image: Image.Image, size: tuple[int, int], settings: ImageSettings) -> Image.Image:
    """Scale to (height, width) with the settings' filter."""
    if size[0] * size[1] > MAX_PIXELS:
        raise TrioError(
            f"an image of {image.width} x {image.height} pixels is too long and narrow: resized "
            f"for the model it would have {size[1]} x {size[0]}; crop it first"
        )
    return image.resize((size[1], size[0]), resample=Image.Resampling(settings.resample))


def fit(image: Image.Image, settings: ImageSettings) -> tuple[np.ndarray, View]:
    """Pad to a square, resize and crop as CLIP's processor does, as far as the settings say.

    Returns:
        uint8 [h, w, 3], and where the image lies on it.
    """
    top = left = 0.0
    width, height = image.size
    if settings.pad_to_square and width != height:
        side = max(width, height)
        if side * side > MAX_PIXELS:
            raise TrioError(
                f"an image of {width} x {height} pixels is too long and narrow to pad to a "
                "square: crop it first"
            )
        background = tuple(int(x * 255) for x in settings.mean or (0.0, 0.0, 0.0))
        square = Image.new("RGB", (side, side), background)
        top, left = (side - height) // 2, (side - width) // 2
        square.paste(image, (int(left), int(top)))
        image = square
    scaled = _target_size(image, settings.size)
    ratio_y, ratio_x = scaled[0] / image.height, scaled[1] / image.width
    pixels = np.asarray(resize(image, scaled, settings))
    top, left = top * ratio_y, left * ratio_x
    if settings.crop is not None:
        pixels, shift_y, shift_x = _center_crop(pixels, settings.crop)
        top, left = top + shift_y, left + shift_x
    if settings.pad_to_square:
        scaled = (round(height * ratio_y), round(width * ratio_x))
    return pixels, View(top, left, scaled)


def normalise(tiles: np.ndarray, settings: ImageSettings) -> np.ndarray:
    """uint8 [T, h, w, 3] → float32 [T, 3, h, w], scaled and normalised.

    Each of the 256 values is computed once per channel, exactly as transformers computes every
    pixel: scaled in float64, rounded to float32, normalised in float32.
    """
    values: np.ndarray = np.arange(256, dtype=np.float64)
    if settings.scale is not None:
        values = values * settings.scale
    table = np.repeat(values.astype(np.float32)[None], 3, axis=0)
    if settings.mean is not None and settings.std is not None:
        mean = np.array(settings.mean, dtype=np.float32)[:, None]
        std = np.array(settings.std, dtype=np.float32)[:, None]
        table = (table - mean) / std
    planes = tiles.transpose(0, 3, 1, 2)
    return np.stack([table[c][planes[:, c]] for c in range(3)], axis=1)


def grid_boxes(rows: int, columns: int, patch: int) -> np.ndarray:
    """float64 [rows*columns, 4]: x0, y0, x1, y1 of each patch of a grid, row by row."""
    y, x = np.divmod(np.arange(rows * columns), columns)
    return np.stack([x, y, x + 1, y + 1], axis=1).astype(np.float64) * patch


def _target_size(image: Image.Image, size: int | tuple[int, int] | None) -> tuple[int, int]:
    if size is None:
        return image.height, image.width
    if isinstance(size, tuple):
        return size
    short, long = sorted(image.size)
    scaled = int(size * long / short)
    return (scaled, size) if image.width <= image.height else (size, scaled)


def _center_crop(pixels: np.ndarray, crop: tuple[int, int]) -> tuple[np.ndarray, int, int]:
    """Central crop of [h, w, 3], padded with black where the image is smaller; and the shift."""
    height, width = pixels.shape[:2]
    top, left = (height - crop[0]) // 2, (width - crop[1]) // 2
    if height >= crop[0] and width >= crop[1]:
        return pixels[top : top + crop[0], left : left + crop[1]], -top, -left
    larger = (max(crop[0], height), max(crop[1], width))
    pad_y, pad_x = math.ceil((larger[0] - height) / 2), math.ceil((larger[1] - width) / 2)
    canvas = np.zeros((*larger, 3), dtype=np.uint8)
    canvas[pad_y : pad_y + height, pad_x : pad_x + width] = pixels
    top, left = top + pad_y, left + pad_x
    y, x = max(0, top), max(0, left)
    cut = canvas[y : min(larger[0], top + crop[0]), x : min(larger[1], left + crop[1])]
    return cut, pad_y - y, pad_x - x


def _decode(file: Any, name: str) -> Image.Image:
    with _opened(file, name, FORMATS) as image:
        _check_size(image, name)
        image.load()
        return _to_rgb(image, name)


@contextmanager
def _opened(file: Any, name: str, formats: Sequence[str]) -> Iterator[Image.Image]:
    """The picture in a file, not decoded yet; whatever fails inside is one `TrioError`."""
    Image.init()
    known = [form for form in formats if form in Image.OPEN]  # older Pillows lack AVIF
    try:
        with warnings.catch_warnings():
            # The size is checked against our own limit and with our own message.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(file, formats=known) as image:
                yield image
    except (TrioError, MemoryError):
        raise
    except Image.DecompressionBombError:  # Pillow's own limit, above ours, before there is a size
        raise _bomb(name, "it is far too large") from None
    except UnidentifiedImageError:  # whose words name Python's file object
        raise TrioError(
            f"{name} cannot be read as a picture: it is damaged or not in a supported format "
            f"({', '.join(known)})"
        ) from None
    except Exception as error:  # a decoder may raise anything on a broken file
        raise TrioError(f"{name} cannot be read as a picture: {error}") from error


def _check_size(image: Image.Image, name: str) -> None:
    width, height = image.size
    if width < 1 or height < 1:
        raise TrioError(f"{name} has no pixels: it is {width} x {height}")
    if width * height > MAX_PIXELS:
        raise _bomb(name, f"it has {width} x {height} pixels")


def _bomb(name: str, why: str) -> TrioError:
    return TrioError(
        f"{name} is refused as a decompression bomb: {why}, but at most {MAX_PIXELS} pixels are "
        "decoded: scale it down first"
    )


def _to_rgb(image: Image.Image, name: str) -> Image.Image:
    _check_size(image, name)
    try:
        image = ImageOps.exif_transpose(image)
        if image.mode == "F" or image.mode.startswith("I"):
            return _deep_grey_to_rgb(image)
        if "A" in image.getbands() or image.info.get("transparency") is not None:
            image = image.convert("RGBA")
            white = Image.new("RGBA", image.size, (255, 255, 255, 255))
            image = Image.alpha_composite(white, image)
        return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # lazily decoded images fail here
        raise TrioError(f"{name} cannot be read as a picture: {error}") from error


def _deep_grey_to_rgb(image: Image.Image) -> Image.Image:
    """16-bit and 32-bit greys to RGB; Pillow's own conversion would clip them to white.

    Integers above 255 count as 16 bits, fractions of one (floating-point TIFF) as 0…1.
    """
    grey = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        scale = 255.0 if grey.max() <= 1.0 else 1.0
    else:
        sixteen = image.mode.startswith("I;16") or grey.max() > 255
        scale = 255.0 / 65535.0 if sixteen else 1.0
    bytes_ = np.clip(np.rint(grey * scale), 0, 255).astype(np.uint8)
    return Image.fromarray(bytes_).convert("RGB")
