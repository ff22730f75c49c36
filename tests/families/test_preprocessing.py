"""Pixel values, token counts and token order against transformers' own processors and models."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import (
    AutoProcessor,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from tests.support.checkpoints import preprocessor_of
from tests.support.pictures import make_picture
from trio_deploy import TrioError
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.families.llava_next import counts as llava_next_counts
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import parse_config

SIZES = [
    (32, 32),
    (64, 64),
    (100, 60),
    (60, 100),
    (33, 31),
    (31, 33),
    (640, 480),
    (480, 640),
    (200, 20),
    (20, 200),
    (1, 1),
    (1, 90),
    (90, 1),
    (7, 5),
    (257, 129),
    (500, 499),
]


@pytest.fixture(scope="module")
def llava(llava_checkpoint: Path):
    return _load(llava_checkpoint)


@pytest.fixture(scope="module")
def llava_next(llava_next_checkpoint: Path):
    return _load(llava_next_checkpoint)


def _load(folder: Path):
    checkpoint = Checkpoint.from_path(folder)
    config = parse_config(checkpoint.config)
    return config, preprocessor_of(folder), AutoProcessor.from_pretrained(folder)


def _expanded(processor, image: Image.Image) -> int:
    """How many `<image>` tokens transformers' processor puts into the prompt."""
    batch = processor(images=[image], text="<image> what is this", return_tensors="pt")
    return int((batch["input_ids"] == processor.image_token_id).sum())


@pytest.mark.parametrize("size", SIZES)
def test_llava_pixels_and_token_count_equal_transformers(llava, size):
    config, preprocessor, processor = llava
    image = make_picture(*size)
    ours = preprocessor(image)
    theirs = processor.image_processor(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(ours.feeds["pixel_values"], theirs)
    assert ours.feeds["pixel_values"].dtype == np.float32
    assert ours.rows.dtype == np.int64
    assert len(ours.rows) == len(ours.boxes) == _expanded(processor, image)
    assert ours.rows.tolist() == list(range(config.vision.rows_per_tile))
    assert preprocessor.least_tokens(image) == len(ours.rows)
    assert ours.size == (size[1], size[0])


@pytest.mark.parametrize("size", SIZES)
def test_llava_next_pixels_and_token_count_equal_transformers(llava_next, size):
    config, preprocessor, processor = llava_next
    image = make_picture(*size)
    ours = preprocessor(image)
    theirs = processor.image_processor(images=[image], return_tensors="np")
    np.testing.assert_array_equal(ours.feeds["pixel_values"], theirs["pixel_values"][0])
    assert ours.size == tuple(theirs["image_sizes"][0])
    assert len(ours.rows) == len(ours.boxes) == _expanded(processor, image)
    counts = [llava_next_counts(s, config).visual_tokens for s in (ours.size, ours.size[::-1])]
    assert counts[0] == len(ours.rows)
    assert preprocessor.least_tokens(image) == min(counts)


@pytest.fixture(scope="module")
def packing_model() -> LlavaNextForConditionalGeneration:
    """transformers' LLaVA-NeXT at the real model's grid, without its weight."""
    recipe = load_recipe("llava-next-7b")
    raw = {**recipe.architecture}
    raw["text_config"] = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
        "num_key_value_heads": 1,
        "vocab_size": 32064,
    }
    raw["vision_config"] = {
        **raw["vision_config"],
        "hidden_size": 8,
        "intermediate_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 1,
    }
    return LlavaNextForConditionalGeneration(LlavaNextConfig(**raw))


@pytest.mark.parametrize(
    "size",
    [
        *[(336, 336), (672, 672), (640, 480), (480, 640), (1000, 300), (300, 1000), (899, 1024)],
        *[(1, 500), (500, 1), (17, 13), (337, 335), (2000, 667), (673, 336)],
    ],
)
def test_token_order_equals_pack_image_features(packing_model, size):
    """At the real grid: numbered feature rows, packed by transformers, are exactly `rows`."""
    recipe = load_recipe("llava-next-7b")
    config = parse_config(recipe.architecture)
    ours = Preprocessor(recipe.preprocessing, config)(make_picture(*size))
    tiles, p = len(ours.feeds["pixel_values"]), config.vision.rows_per_tile
    numbered = torch.arange(tiles * p, dtype=torch.float64).reshape(tiles, p, 1)
    packed, _ = packing_model.model.pack_image_features(
        [numbered],
        torch.tensor([[size[1], size[0]]]),
        "default",
        image_newline=torch.full((1,), -1.0, dtype=torch.float64),
    )
    assert ours.rows.tolist() == packed[0][:, 0].long().tolist()


@pytest.mark.parametrize(
    ("size", "visual"), [((672, 672), 2928), ((640, 480), 2340), ((336, 336), 1176)]
)
def test_rows_with_newlines_of_known_sizes(size, visual):
    recipe = load_recipe("llava-next-7b")
    config = parse_config(recipe.architecture)
    assert len(Preprocessor(recipe.preprocessing, config)(make_picture(*size)).rows) == visual


def test_llava_15_has_576_tokens_an_image():
    recipe = load_recipe("llava-1.5-7b")
    config = parse_config(recipe.architecture)
    processed = Preprocessor(recipe.preprocessing, config)(make_picture(640, 480))
    assert len(processed.rows) == 576
    assert processed.feeds["pixel_values"].shape == (1, 3, 336, 336)


VARIANTS = [
    (CLIPImageProcessorPil, {"resample": 2}),
    (CLIPImageProcessorPil, {"size": {"height": 32, "width": 32}, "do_center_crop": False}),
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 20}}),  # smaller than the crop: padded
    (CLIPImageProcessorPil, {"size": {"shortest_edge": 41}}),  # odd margins
    (CLIPImageProcessorPil, {"do_resize": False}),
    (CLIPImageProcessorPil, {"do_rescale": False}),
    (CLIPImageProcessorPil, {"do_normalize": False}),
    (CLIPImageProcessorPil, {"rescale_factor": 1 / 127.5, "image_mean": [1.0, 1.0, 1.0]}),
    (LlavaImageProcessorPil, {"do_pad": True}),
    (LlavaImageProcessorPil, {"do_pad": True, "do_center_crop": False}),
]


@pytest.mark.parametrize(("kind", "options"), VARIANTS)
@pytest.mark.parametrize("size", [(100, 60), (60, 101), (21, 30)])
def test_settings_are_honoured_as_transformers_does(llava, kind, options, size):
    config, _, _ = llava
    processor = kind(
        **{"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}, **options}
    )
    preprocessor = Preprocessor.from_json(processor.to_dict(), config)
    again = Preprocessor.from_json(preprocessor.to_json(), config)
    image = make_picture(*size)
    theirs = processor(images=[image], return_tensors="np")["pixel_values"]
    np.testing.assert_array_equal(preprocessor(image).feeds["pixel_values"], theirs)
    np.testing.assert_array_equal(again(image).feeds["pixel_values"], theirs)


def test_next_takes_exact_sizes_too(llava_next):
    config, _, processor = llava_next
    theirs = LlavaNextImageProcessorPil(
        size={"height": 32, "width": 32},
        crop_size={"height": 32, "width": 32},
        image_grid_pinpoints=processor.image_processor.image_grid_pinpoints,
    )
    image = make_picture(120, 50)
    ours = Preprocessor(theirs.to_dict(), config)(image)
    expected = theirs(images=[image], return_tensors="np")["pixel_values"][0]
    np.testing.assert_array_equal(ours.feeds["pixel_values"], expected)


def test_old_files_give_sizes_as_numbers(llava):
    config, preprocessor, _ = llava
    old = Preprocessor({"size": 32, "crop_size": 32}, config)
    image = make_picture()
    np.testing.assert_array_equal(
        old(image).feeds["pixel_values"], preprocessor(image).feeds["pixel_values"]
    )


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"crop_size": {"height": 48, "width": 48}}, "takes 32 x 32"),
        ({"do_center_crop": False, "size": {"shortest_edge": 32}}, "no fixed size"),
        ({"crop_size": {"height": "?"}}, r"crop_size\.height must be a whole number"),
        ({"size": {"shortest_edge": 32, "longest_edge": 64}}, "longest_edge"),
        ({"image_mean": [1.0]}, "three values"),
        ({"resample": 99}, "resample must be a whole number from 0 to"),
    ],
)
def test_settings_that_do_not_fit_are_refused(llava, settings, says):
    config, _, _ = llava
    base = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    with pytest.raises(TrioError, match=says):
        Preprocessor({**base, **settings}, config)


def test_canvases_that_differ_from_the_models_are_refused(llava_next):
    config, preprocessor, _ = llava_next
    same = {**preprocessor.to_json(), "image_grid_pinpoints": [*map(list, config.grid_pinpoints)]}
    assert Preprocessor(same, config)
    with pytest.raises(TrioError, match="image_grid_pinpoints"):
        Preprocessor({**same, "image_grid_pinpoints": [[32, 64]]}, config)


class TestBoxes:
    """Where in the picture a visual token comes from."""

    def test_llava_grid_covers_the_central_square(self, llava):
        _, preprocessor, _ = llava
        boxes = preprocessor(make_picture(160, 80)).boxes.reshape(4, 4, 4)
        np.testing.assert_allclose(boxes[0, 0], [40, 0, 60, 20], atol=1)
        np.testing.assert_allclose(boxes[3, 3], [100, 60, 120, 80], atol=1)

    def test_llava_next_covers_the_whole_picture_twice(self, llava_next):
        _, preprocessor, _ = llava_next
        processed = preprocessor(make_picture(160, 80))  # canvas 64 wide, 32 high
        base, tiled = processed.boxes[:16], processed.boxes[16:].reshape(4, 9, 4)
        np.testing.assert_allclose(base[0], [0, 0, 40, 20])
        np.testing.assert_allclose(base[-1], [120, 60, 160, 80])
        np.testing.assert_allclose(tiled[0, 0], [0, 0, 20, 20])
        np.testing.assert_allclose(tiled[3, 7], [140, 60, 160, 80])
        assert np.isnan(tiled[:, 8]).all(), "newlines have no place"
        assert (processed.rows.reshape(-1)[16:].reshape(4, 9)[:, 8] == -1).all()

    @pytest.mark.parametrize("size", SIZES)
    def test_boxes_lie_in_the_picture(self, llava_next, size):
        _, preprocessor, _ = llava_next
        processed = preprocessor(make_picture(*size))
        boxes = processed.boxes[processed.rows >= 0]
        assert not np.isnan(boxes).any()
        assert (boxes >= 0).all()
        assert (boxes <= np.array([*size, *size])).all()
        assert (boxes[:, :2] <= boxes[:, 2:]).all()

    def test_a_token_sees_what_its_box_shows(self, llava_next):
        """Paint one box of the picture: only the tiles' patches of that box change."""
        _, preprocessor, _ = llava_next
        image = Image.new("RGB", (128, 128), "black")
        token = 16 + 9 * 2 + 5  # canvas 64 x 64: row 2, column 5
        box = preprocessor(image).boxes[token]
        image.paste("white", tuple(int(v) for v in box))
        processed = preprocessor(image)
        row = processed.rows[token]
        tile, patch = divmod(int(row), 16)
        y, x = divmod(patch, 4)
        pixels = processed.feeds["pixel_values"][tile, 0, y * 8 : y * 8 + 8, x * 8 : x * 8 + 8]
        assert pixels[3:5, 3:5].min() > 1.5
