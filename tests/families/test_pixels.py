"""Pictures of every kind come out as a viewer shows them; what is no picture is refused."""

from __future__ import annotations

import io
import os
import re
import struct
import threading
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from transformers import AutoProcessor
from transformers.image_utils import load_image

from tests.support.checkpoints import preprocessor_of
from tests.support.pictures import make_picture
from trio_deploy import TrioError
from trio_deploy.families.pixels import MAX_PIXELS, header_size, open_image


def _bytes(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    stream = io.BytesIO()
    image.save(stream, kind, **options)
    return stream.getvalue()


def _png_chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _huge_png(width: int, height: int) -> bytes:
    """A few bytes that claim to be a picture of that size."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + _png_chunk(b"IHDR", header)
        + _png_chunk(b"IDAT", zlib.compress(b"\0" * 1000))
        + _png_chunk(b"IEND", b"")
    )


def test_path_bytes_and_image_give_the_same(tmp_path: Path, picture):
    file = tmp_path / "a.png"
    picture.save(file)
    for source in (file, str(file), file.read_bytes(), picture, Image.open(file)):
        opened = open_image(source)
        assert opened.mode == "RGB"
        np.testing.assert_array_equal(np.asarray(opened), np.asarray(picture))


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_rotation_is_applied_as_load_image_does(tmp_path: Path, orientation):
    file = tmp_path / "a.jpg"
    exif = Image.Exif()
    exif[0x0112] = orientation
    make_picture(60, 40).save(file, exif=exif)
    np.testing.assert_array_equal(np.asarray(open_image(file)), np.asarray(load_image(str(file))))
    assert open_image(file).size == ((60, 40) if orientation < 5 else (40, 60))


def _modes() -> dict[str, Image.Image]:
    picture = make_picture(40, 30)
    alpha = Image.fromarray(np.tile(np.linspace(0, 255, 40).astype(np.uint8), (30, 1)))
    rgba = picture.copy()
    rgba.putalpha(alpha)
    transparent = picture.quantize(16)
    transparent.info["transparency"] = 3
    return {
        "RGB": picture,
        "RGBA": rgba,
        "LA": rgba.convert("LA"),
        "L": picture.convert("L"),
        "1": picture.convert("1"),
        "P": picture.quantize(16),
        "P with transparency": transparent,
        "CMYK": picture.convert("CMYK"),
        "YCbCr": picture.convert("YCbCr"),
        "HSV": picture.convert("HSV"),
    }


@pytest.mark.parametrize("mode", _modes())
def test_every_mode_comes_out_as_from_transformers(llava_checkpoint: Path, mode):
    image = _modes()[mode]
    ours = preprocessor_of(llava_checkpoint)(image)
    processor = AutoProcessor.from_pretrained(llava_checkpoint).image_processor
    theirs = processor(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours.feeds["pixel_values"], theirs)


def test_transparency_is_laid_on_white():
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    assert open_image(_bytes(image)).getpixel((0, 0)) == (255, 255, 255)


def test_sixteen_bit_grey_is_scaled_not_clipped():
    ramp = np.linspace(0, 65535, 256).astype(np.uint16)[None].repeat(2, 0)
    opened = np.asarray(open_image(_bytes(Image.fromarray(ramp))))
    np.testing.assert_array_equal(opened[0, :, 0], np.arange(256))
    assert (opened[..., 0] == opened[..., 1]).all()


@pytest.mark.parametrize(
    ("array", "expected"),
    [
        (np.array([[0, 30000, 65535]], np.int32), [0, 117, 255]),
        (np.array([[0, 100, 255]], np.int32), [0, 100, 255]),
        (np.array([[0, 0.5, 1]], np.float32), [0, 128, 255]),
        (np.array([[0, 100, 255]], np.float32), [0, 100, 255]),
        (np.array([[np.nan, -5, 300]], np.float32), [0, 0, 255]),
    ],
)
def test_deep_greys_from_tiff_files(array, expected):
    opened = np.asarray(open_image(_bytes(Image.fromarray(array), "TIFF")))
    assert opened[0, :, 0].tolist() == expected


def test_an_animation_gives_its_first_frame():
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    data = _bytes(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert open_image(data).getpixel((0, 0)) == (255, 0, 0)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_truncated_file_is_refused(tmp_path: Path, kind):
    data = _bytes(make_picture(200, 150), kind)
    file = tmp_path / "cut"
    file.write_bytes(data[: len(data) // 2])
    with pytest.raises(TrioError, match="cut cannot be read as a picture"):
        open_image(file)


@pytest.mark.parametrize("data", [b"", b"hello", b"\x89PNG\r\n\x1a\n", bytes(1000)])
def test_what_is_no_picture_is_refused(data):
    with pytest.raises(TrioError, match="cannot be read as a picture") as said:
        open_image(data)
    assert " object" not in str(said.value) and "<_io" not in str(said.value)


def test_postscript_is_never_run():
    data = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n%%EndComments\nshowpage\n"
    with pytest.raises(TrioError, match="cannot be read as a picture"):
        open_image(data)


def test_a_flipped_byte_is_refused():
    data = bytearray(_bytes(make_picture(50, 50)))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(TrioError, match="cannot be read as a picture"):
        open_image(bytes(data))


@pytest.mark.parametrize("size", [(0, 5), (5, 0), (0, 0)])
def test_a_zero_side_is_refused(size):
    with pytest.raises(TrioError, match="no pixels"):
        open_image(Image.new("RGB", size))
    with pytest.raises(TrioError):
        open_image(_huge_png(*size))


@pytest.mark.parametrize("side", [9_500, 14_000, 60_000])
def test_a_decompression_bomb_is_refused_without_warnings(side):
    assert side * side > MAX_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(TrioError, match=f"at most {MAX_PIXELS} pixels") as refused:
            open_image(_huge_png(side, side))
    numbers = {int(n) for n in re.findall(r"\d{4,}", str(refused.value))}
    assert numbers <= {side, MAX_PIXELS}, "one limit, ours"


def test_a_missing_file_and_a_strange_object_are_refused(tmp_path: Path):
    with pytest.raises(TrioError, match="no image file"):
        open_image(tmp_path / "nothing.png")
    with pytest.raises(TrioError, match="not dict"):
        open_image({})


def test_a_picture_too_narrow_to_resize_is_refused(llava_checkpoint: Path):
    preprocessor = preprocessor_of(llava_checkpoint)
    with pytest.raises(TrioError, match="too long and narrow"):
        preprocessor(Image.new("RGB", (1, 100_000)))


def test_any_path_like_is_a_path(tmp_path: Path) -> None:
    class Elsewhere:
        def __fspath__(self) -> str:
            return str(tmp_path / "red.png")

    Image.new("RGB", (3, 2), "red").save(tmp_path / "red.png")
    assert open_image(Elsewhere()).size == (3, 2)


def test_a_pipe_is_refused_and_not_waited_for(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe.png"
    os.mkfifo(pipe)
    found: list[object] = []
    reader = threading.Thread(target=lambda: found.append(header_size(pipe)), daemon=True)
    reader.start()
    reader.join(20)
    assert found == [None]
    with pytest.raises(TrioError, match="there is no image file at .*pipe"):
        open_image(pipe)
