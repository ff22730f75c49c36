"""How to add a model family, shown by adding one here.

Where tower, connector and language model are known (a CLIP tower, two linear layers and Llama, as
here), a family is one file, `families/<name>.py`, that ends in a `FAMILY`:

- `read` turns config.json into a `ModelConfig` and refuses what the graphs cannot do;
- `settings` reads preprocessor_config.json, as far as `arrange` needs it;
- `prefixes` turn the names in its checkpoints into the canonical ones of the graphs' modules;
- `arrange` makes of an image the tower's inputs, the text that stands for the image (each
  `VISUAL_TOKEN` in it becomes one visual token), and which feature row each visual token takes;
- `counts` says what an image of some size brings, and `request_limits` what the largest does;
- `hub` is how its checkpoints lie on the hub, for ones with random weights, and what a prompt
  without a template writes for a picture;
- `reference` names an adapter in `reference/adapters.py`, which reads images in its own way, by
  transformers' code where there is any, so that `trio check` finds a mistake in `arrange`;
- `tiny` is a config.json of small sizes, for tests with random weights.

`families/registry.py` gets one line, `reference/adapters.py` one more if no adapter fits, and
export/ a recipe. Nothing else knows the family. A new tower, connector or rope is a class of its
own in graphs/, and its sizes are another configuration in `families/base.py`.

The family of this test, "halves", shows the left and the right half of an image as one tile each:
`left <16 visual tokens> right <16 visual tokens>`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from tests.support.pictures import make_picture
from trio_deploy import Bundle, Pipeline, Request, check, export_model
from trio_deploy.families.base import (
    VISUAL_TOKEN,
    Family,
    ImageCounts,
    Layout,
    Limits,
    ModelConfig,
)
from trio_deploy.families.clip_hub import clip_hub
from trio_deploy.families.clip_images import clip_settings
from trio_deploy.families.hf_config import (
    CLIP_LLAMA_PREFIXES,
    read_clip_llama,
    tiny_clip_llama,
)
from trio_deploy.families.names import canonical_name
from trio_deploy.families.pixels import ImageSettings, fit, grid_boxes, normalise
from trio_deploy.families.registry import FAMILIES
from trio_deploy.reference.adapters import ADAPTERS, Call, Features, Llava
from trio_deploy.reference.row import Row
from trio_deploy.verify.report import format_report

# --- families/halves.py ---------------------------------------------------------------------------

_DEFAULTS = {
    "image_token_index": 32000,
    "projector_hidden_act": "gelu",
    "vision_feature_select_strategy": "default",
    "vision_feature_layer": -2,
    "multimodal_projector_bias": True,
    "tie_word_embeddings": False,
}


def arrange(image: Image.Image, settings: ImageSettings, config: ModelConfig) -> Layout:
    """The left half as a tile, then the right half."""
    vision, middle = config.vision, max(1, image.width // 2)
    tiles, boxes = [], []
    for left, right in ((0, middle), (min(middle, image.width - 1), image.width)):
        tile, view = fit(image.crop((left, 0, right, image.height)), settings)
        grid = grid_boxes(vision.side, vision.side, vision.patch_size)
        box = view.to_image(grid, (right - left, image.height))
        tiles.append(tile)
        boxes.append(box + np.array([left, 0, left, 0]))
    half = VISUAL_TOKEN * vision.rows_per_tile
    count = 2 * vision.rows_per_tile
    return Layout(
        feeds={"pixel_values": normalise(np.stack(tiles), settings)},
        feature_rows=count,
        text=f"left {half} right {half}",
        rows=np.arange(count, dtype=np.int64),
        boxes=np.concatenate(boxes),
        size=(image.height, image.width),
    )


def counts(size: tuple[int, int], config: ModelConfig) -> ImageCounts:
    """Both tiles, whatever the image's (height, width)."""
    return config.vision.counts(2, 2 * config.vision.rows_per_tile)


def request_limits(config: ModelConfig) -> Limits:
    """Two tiles per image."""
    vision = config.vision
    return Limits(
        tiles=2,
        tile_rows=vision.rows_per_tile,
        tile_values=3 * vision.image_size**2,
        visual_tokens=2 * vision.rows_per_tile,
        picture=(2 * vision.image_size, vision.image_size),
        rows_at_once=8 * vision.rows_per_tile,
    )


FAMILY = Family(
    name="halves",
    architecture="LlavaForConditionalGeneration",
    prefixes=(
        ("sight.", "vision_tower."),
        ("bridge.", "multi_modal_projector."),
        ("words.head.", "lm_head."),
        ("words.", "language_model."),
        *CLIP_LLAMA_PREFIXES,  # transformers' own names, by which the oracle loads the weights
    ),
    settings=clip_settings,
    read=lambda raw: read_clip_llama(raw, "halves", _DEFAULTS),
    arrange=arrange,
    counts=counts,
    request_limits=request_limits,
    reference="halves",
    tiny=partial(tiny_clip_llama, "LlavaForConditionalGeneration", model_type="halves"),
    hub=replace(
        clip_hub("halves", "LlavaForConditionalGeneration", lambda tower: {}),
        prefixes=(
            ("vision_tower.", "sight."),
            ("multi_modal_projector.", "bridge."),
            ("lm_head.", "words.head."),
            ("language_model.", "words."),
        ),
    ),
)

# --- reference/adapters.py ------------------------------------------------------------------------


class Halves(Llava):
    """Two tiles per image, each packed row by row, the left one first."""

    def features(self, row: Row, scores: Any) -> Features:
        if row.pixel_values is None:
            return super().features(row, scores)
        tiles = torch.as_tensor(row.pixel_values).to(self.text.embed_tokens.weight)
        assert len(tiles) == 2 * len(row.image_sizes) and not scores
        output = self.model.model.get_image_features(tiles)
        rows = torch.cat(list(getattr(output, "pooler_output", output)))
        per_tile = len(rows) // len(tiles)
        order = [
            tile * per_tile + place
            for image in range(len(row.image_sizes))
            for tile in (2 * image, 2 * image + 1)
            for place in range(per_tile)
        ]
        call = Call({"pixel_values": np.asarray(row.pixel_values)}, slice(None))
        return Features(rows, torch.tensor(order), rows[order], {}, (), [call])


# --------------------------------------------------------------------------------------------------


def write_checkpoint(llava: Path, folder: Path) -> Path:
    """A random LLaVA checkpoint under this family's names."""
    shutil.copytree(llava, folder)
    config = json.loads((folder / "config.json").read_text()) | {"model_type": "halves"}
    (folder / "config.json").write_text(json.dumps(config))

    def renamed(name: str) -> str:
        return FAMILY.hub.name(canonical_name(FAMILIES["llava"], name))

    tensors = load_file(folder / "model.safetensors")
    save_file(
        {renamed(name): tensor for name, tensor in tensors.items()}, folder / "model.safetensors"
    )
    return folder


@pytest.fixture(scope="module")
def families() -> Iterator[Mapping[str, Family]]:
    """The registries with the new family in them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, "halves", FAMILY)
        patch.setitem(ADAPTERS, "halves", Halves)
        yield FAMILIES


@pytest.fixture(scope="module")
def bundle(families, llava_checkpoint, tmp_path_factory) -> Bundle:
    folder = tmp_path_factory.mktemp("halves")
    checkpoint = write_checkpoint(llava_checkpoint, folder / "checkpoint")
    return export_model(checkpoint, folder / "bundle", schedule="1:0.5,2:0.25", progress=False)


def test_it_answers_and_its_image_is_text_and_visual_tokens(bundle):
    pipeline = Pipeline.open(bundle, threads=2)
    request = Request("what is this ?", [make_picture(90, 40)], max_new_tokens=3)
    prepared = pipeline.prepare(request)
    prompt, (image,) = prepared.prompt, prepared.processed
    visual = np.flatnonzero(prompt.visual)
    assert len(visual) == 32 and visual[16] - visual[15] == 2, "a word stands between the halves"
    assert image.feeds["pixel_values"].shape[0] == 2
    left, right = image.boxes[:16], image.boxes[16:]
    assert left[:, 2].max() <= 45 <= right[:, 0].min() and right[:, 2].max() <= 90
    answer = pipeline.generate(request)
    assert [len(kept) for kept in answer.kept_visual] == [16, 8]


def test_it_passes_check(bundle):
    report = check(bundle, threads=2)
    assert report.passed, format_report(report)


def test_check_finds_one_row_in_the_wrong_place(bundle, families, monkeypatch):
    def wrong(image: Image.Image, settings: ImageSettings, config: ModelConfig) -> Layout:
        layout = arrange(image, settings, config)
        rows = layout.rows.copy()
        rows[20] = rows[21]
        return replace(layout, rows=rows)

    monkeypatch.setitem(families, "halves", replace(FAMILY, arrange=wrong))
    report = check(bundle, threads=2)
    assert not report.passed
    assert next(row.stage for row in report.rows if not row.passed) == "source_index"
