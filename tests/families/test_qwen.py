"""config.json, preprocessing settings and pictures of the Qwen families, in every layout."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.checkpoints import preprocessor_of
from tests.support.damage import damaged_value
from tests.support.pictures import make_picture
from tests.support.qwen_checkpoints import LAYOUTS, flat, make_qwen, preprocessing
from tests.support.qwen_models import ARCHITECTURES, FAMILIES, config_json, model_config
from trio_deploy import TrioError
from trio_deploy.checkpoint.resolve import from_folder, source_config
from trio_deploy.config.recipe import list_recipes, read_recipe
from trio_deploy.export.checkpoint import read_checkpoint
from trio_deploy.families.base import grids_of
from trio_deploy.families.bounds import PATCH_TOWER
from trio_deploy.families.preprocessing import Preprocessor, with_max_pixels
from trio_deploy.families.registry import (
    check_methods,
    check_positions,
    get_family,
    parse_config,
    request_limits,
)
from trio_deploy.schedule.methods import METHODS

SIZES = [(28, 28), (1, 1), (640, 480), (99, 1000), (2048, 300), (300, 2048), (512, 512), (33, 47)]


def _changed(family: str, part: str, **values: Any) -> dict[str, Any]:
    raw = config_json(family)
    (raw[part] if part else raw).update(values)
    return raw


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_checkpoint_of_every_layout_is_the_same_model(tmp_path, family, layout):
    hub = layout == "hub"
    folder = make_qwen(tmp_path, family, layout=layout, tie=hub, shards=2 if hub else 1)
    read = read_checkpoint(folder)
    wanted = model_config(family).with_tied_head(hub)
    assert replace(read.config, pixels=None) == wanted
    assert not read.notes and not read.info.unused
    factor = wanted.patch_tower.factor
    assert source_config(from_folder(folder)).pixels == (4 * factor**2, 48 * factor**2)


@pytest.mark.parametrize("family", FAMILIES)
def test_defaults_are_those_of_transformers(family):
    """A config.json that says as little as it can."""
    width = 8192 if family != "qwen3_vl" else 4096
    vision = {"hidden_size" if family == "qwen2_vl" else "out_hidden_size": width}
    raw = {"model_type": family, "vision_config": vision}
    ours = parse_config(raw)
    theirs = getattr(transformers, ARCHITECTURES[family]).config_class.from_dict(raw)
    text, tower = theirs.text_config, theirs.vision_config
    assert ours.image_token_id == theirs.image_token_id
    assert ours.text.rope.theta == text.rope_parameters["rope_theta"]
    assert (ours.text.hidden_size, ours.text.intermediate_size, ours.text.vocab_size) == (
        *(text.hidden_size, text.intermediate_size, text.vocab_size),
    )
    assert (ours.text.num_layers, ours.text.num_heads, ours.text.num_kv_heads) == (
        *(text.num_hidden_layers, text.num_attention_heads, text.num_key_value_heads),
    )
    assert (ours.text.rms_norm_eps, ours.text.max_positions, ours.text.head_dim) == (
        *(text.rms_norm_eps, text.max_position_embeddings, 128),
    )
    vision = ours.patch_tower
    assert vision.hidden_size == getattr(tower, "embed_dim", tower.hidden_size)
    assert (vision.num_layers, vision.num_heads, vision.patch_size, vision.merge) == (
        *(tower.depth, tower.num_heads, tower.patch_size, tower.spatial_merge_size),
    )
    inner = getattr(tower, "intermediate_size", vision.hidden_size * 4)
    assert (vision.intermediate_size, vision.hidden_act) == (inner, tower.hidden_act)
    assert vision.full_layers == tuple(getattr(tower, "fullatt_block_indexes", ()))
    assert vision.deepstack_layers == tuple(getattr(tower, "deepstack_visual_indexes", ()))


@pytest.mark.parametrize("family", FAMILIES)
def test_axes_of_the_frequencies_are_those_of_transformers(family):
    """Angles of three positions that differ, by transformers' own rotary embedding."""
    import torch

    from tests.support.qwen_models import shared_model

    rotary = shared_model(family).model.language_model.rotary_emb
    positions = torch.tensor([3.0, 50.0, 700.0])[:, None, None]
    cos, _ = rotary(torch.zeros(1, 1, 64), positions.long())
    rope = parse_config(config_json(family)).text.rope
    angles = positions[list(rope.axes or ()), 0, 0] * rotary.inv_freq
    np.testing.assert_allclose(cos[0, 0, :8], angles.cos(), atol=1e-6)


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_tied_heads_may_be_said_inside_text_config(family):
    raw = _changed(family, "text_config", tie_word_embeddings=True)
    theirs = getattr(transformers, ARCHITECTURES[family]).config_class.from_dict(raw)
    assert parse_config(raw).text.tie_word_embeddings is theirs.tie_word_embeddings is True


REFUSED = [
    ("qwen2_vl", "text_config", {"use_sliding_window": True, "sliding_window": 64}, "sliding"),
    ("qwen2_vl", "text_config", {"layer_types": ["sliding_attention"]}, "layer_types"),
    ("qwen2_vl", "text_config", {"model_type": "qwen2"}, "'qwen2'.*qwen2_vl_text"),
    ("qwen2_vl", "text_config", {"hidden_act": "gelu"}, "hidden_act"),
    ("qwen2_vl", "text_config", {"rope_parameters": {"mrope_section": [1, 2, 3]}}, "sum 8"),
    ("qwen2_vl", "text_config", {"rope_parameters": {"mrope_section": 8}}, "mrope_section"),
    ("qwen2_vl", "text_config", {"rope_parameters": {"rope_type": "yarn"}}, "'yarn'"),
    ("qwen2_vl", "text_config", {"rope_parameters": {"mystery": 1}}, "'mystery'"),
    ("qwen2_vl", "text_config", {"rope_parameters": 7}, "rope_parameters must be an object"),
    ("qwen3_vl", "text_config", {"rope_parameters": {"mrope_interleaved": False}}, "must be true"),
    ("qwen2_vl", "vision_config", {"model_type": "clip_vision_model"}, "'clip_vision_model'"),
    ("qwen2_vl", "vision_config", {"hidden_size": 32}, "width 32.*hidden_size of 64"),
    ("qwen2_vl", "vision_config", {"num_heads": 5}, "multiple of 4"),
    ("qwen2_vl", "vision_config", {"in_channels": 1}, "in_channels 3"),
    ("qwen2_vl", "vision_config", {"hidden_act": "relu"}, "'relu'"),
    ("qwen2_vl", "vision_config", {"rope_parameters": {"rope_theta": 5.0}}, "10000"),
    ("qwen2_5_vl", "vision_config", {"hidden_act": "gelu"}, "silu"),
    ("qwen2_5_vl", "vision_config", {"window_size": 27}, "window_size 27"),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": [2, 6]}, "fullatt_block_indexes"),
    ("qwen2_5_vl", "vision_config", {"fullatt_block_indexes": 2}, "fullatt_block_indexes"),
    ("qwen3_vl", "vision_config", {"num_position_embeddings": 140}, "no square"),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [3, 1]}, "rise"),
    ("qwen3_vl", "vision_config", {"deepstack_visual_indexes": [0, 1, 2, 3, 4, 5]}, "more entries"),
    ("qwen2_vl", "", {"text_config": 7}, "text_config must be an object"),
    ("qwen2_vl", "", {"vision_config": 7}, "vision_config must be an object"),
    ("qwen2_vl", "", {"image_token_id": -1}, "image_token_id"),
    ("qwen2_vl", "", {"quantization_config": {"bits": 4}}, "quantised"),
]


@pytest.mark.parametrize(("family", "part", "values", "says"), REFUSED)
def test_what_is_not_supported_is_named(family, part, values, says):
    with pytest.raises(TrioError, match=says):
        parse_config(_changed(family, part, **values))


@pytest.mark.parametrize("key", PATCH_TOWER)
def test_a_bad_number_of_the_tower_is_refused_by_its_key(key):
    family = next(
        name
        for name in FAMILIES
        if key in getattr(transformers, ARCHITECTURES[name]).config_class().vision_config.to_dict()
    )
    for value in (math.nan, math.inf, -5, 0, 0.5, "x", True, [], {}, [3, 4], 10**12):
        with pytest.raises(TrioError, match=key) as caught:
            parse_config(_changed(family, "vision_config", **{key: value}))
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 300


def test_numbers_at_the_top_of_a_flat_file_are_bounded_under_their_own_names():
    raw = flat(_rope_of_5(config_json("qwen2_vl")))
    assert parse_config(raw).text == model_config("qwen2_vl").text
    with pytest.raises(TrioError, match=r"config\.json: hidden_size must be"):
        parse_config(raw | {"hidden_size": 0})


def _rope_of_5(raw: dict[str, Any]) -> dict[str, Any]:
    return {**raw, "vision_config": {"in_channels": 3, **raw["vision_config"]}}


@given(data=st.data())
@settings(max_examples=150)
def test_a_damaged_config_works_or_is_refused_in_one_line(data):
    raw = config_json(data.draw(st.sampled_from(FAMILIES)))
    raw["vision_config"].setdefault("in_channels", 3)
    damaged = data.draw(damaged_value(flat(raw) if data.draw(st.booleans()) else raw))
    try:
        request_limits(parse_config(damaged))
    except TrioError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


@given(data=st.data())
@settings(max_examples=150)
def test_damaged_image_settings_work_or_are_refused_in_one_line(data):
    family = data.draw(st.sampled_from(FAMILIES))
    more = {"min_pixels": 3000, "max_pixels": 9000, "do_resize": True, "resample": 3}
    more |= {"rescale_factor": 0.1, "image_mean": [1, 1, 1]}
    damaged = data.draw(damaged_value(preprocessing(family) | more))
    try:
        preprocessor = Preprocessor(damaged, parse_config(config_json(family)))
        assert request_limits(preprocessor.config).visual_tokens > 0
        if preprocessor.config.pixels[1] < 10**6:
            preprocessor(make_picture(40, 30))
    except TrioError as error:
        assert "\n" not in str(error) and len(str(error)) < 500


# ------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("family", FAMILIES)
def test_pixels_and_tokens_equal_transformers(family, size):
    settings = preprocessing(family)
    config = parse_config(config_json(family))
    preprocessor = Preprocessor(settings, config)
    image = make_picture(*size)
    ours = preprocessor(image)
    theirs = Qwen2VLImageProcessorPil(
        **{key: value for key, value in settings.items() if key != "image_processor_type"}
    )(images=[image], return_tensors="np")
    np.testing.assert_array_equal(ours.feeds["pixel_values"][0], theirs["pixel_values"])
    (_, rows, columns) = theirs["image_grid_thw"][0]
    assert ours.grids == ((1, rows // 2, columns // 2),)
    count = rows * columns // 4
    assert len(ours.rows) == len(ours.boxes) == ours.feature_rows == ours.text.count("\ufffc")
    counts = get_family(family).counts(ours.size, preprocessor.config)
    assert len(ours.rows) == count == counts.visual_tokens == counts.patches // 4
    assert counts.input_bytes == sum(values.nbytes for values in ours.feeds.values())
    assert preprocessor.least_tokens(image) <= count
    assert ours.boxes[-1].tolist() == [*ours.boxes[-1][:2], *size]
    vision = config.patch_tower
    wanted = {"pixel_values", "patch_position"}
    wanted |= {"window_index", "window_slot"} if vision.window else set()
    wanted |= {"position_taps", "position_weights"} if vision.position_side else set()
    assert set(ours.feeds) == wanted


RECIPES = [name for name in list_recipes() if name.startswith(("qwen", "cosmos"))]
ANY_SIZE = [
    *[(28, 28), (1, 1), (27, 29), (33, 47), (640, 480), (481, 639), (1008, 1008), (1000, 999)],
    *[(2048, 300), (300, 2048), (99, 1000), (2048, 1536), (4000, 20), (20, 3990), (5600, 28)],
]


_picture = cache(make_picture)


@cache
def _processed(settings: str, size: tuple[int, int]) -> tuple[np.ndarray, list[int]]:
    """Patches and grid by transformers, of settings as JSON."""
    made = Qwen2VLImageProcessorPil(**json.loads(settings))
    theirs = made(images=[_picture(*size)], return_tensors="np")
    return theirs["pixel_values"], theirs["image_grid_thw"][0].tolist()


def test_there_are_ten_recipes():
    assert len(RECIPES) == 10


@pytest.mark.parametrize("recipe", RECIPES)
def test_pixels_at_the_bounds_of_every_recipe_equal_transformers(recipe):
    """Its own least pixels and most, of pictures smaller and larger than both and very long."""
    read = read_recipe(recipe)
    config = parse_config(read.architecture)
    raw = with_max_pixels(read.preprocessing, config, read.max_pixels)
    preprocessor = Preprocessor(raw, config)
    least, most = preprocessor.config.pixels
    assert (least, most) == (read.preprocessing["size"]["shortest_edge"], read.max_pixels)
    settings = {key: value for key, value in raw.items() if key != "image_processor_type"}
    # The same bounds, as transformers is told of them.
    settings["size"] = {"shortest_edge": least, "longest_edge": most}
    counts = []
    for size in ANY_SIZE:
        ours = preprocessor(_picture(*size))
        pixels, grid = _processed(json.dumps(settings, sort_keys=True), size)
        np.testing.assert_array_equal(ours.feeds["pixel_values"][0], pixels)
        assert ours.grids == ((1, grid[1] // 2, grid[2] // 2),)
        assert len(ours.rows) == len(pixels) // 4
        counts.append(len(ours.rows))
    assert max(counts) <= request_limits(preprocessor.config).visual_tokens
    factor = config.patch_tower.factor
    assert min(counts) >= least // factor**2 and max(counts) > 0.95 * most // factor**2


def test_a_picture_that_is_too_long_is_refused():
    preprocessor = Preprocessor(preprocessing("qwen2_vl"), parse_config(config_json("qwen2_vl")))
    for call in (preprocessor, preprocessor.least_tokens):
        with pytest.raises(TrioError, match="too long and narrow"):
            call(make_picture(2010, 10))


@pytest.mark.parametrize(
    "changes",
    [
        {"size": None, "min_pixels": 4000, "max_pixels": 50000},
        {"size": {"shortest_edge": 1, "longest_edge": 2}, "min_pixels": 4000, "max_pixels": 50000},
        {"size": {"shortest_edge": 4000, "longest_edge": 50000}},
        {"size": {"min_pixels": 4000, "max_pixels": 50000}},
    ],
)
def test_bounds_are_pixels_under_their_new_and_old_names(changes):
    config = parse_config(config_json("qwen2_vl"))
    preprocessor = Preprocessor(preprocessing("qwen2_vl") | changes, config)
    assert preprocessor.config.pixels == (4000, 50000)
    written = preprocessor.to_json()
    assert written["size"] == {"shortest_edge": 4000, "longest_edge": 50000}
    assert Preprocessor.from_json(written, config).config == preprocessor.config
    most = with_max_pixels(preprocessing("qwen2_vl") | changes, config, 40000)
    assert Preprocessor(most, config).config.pixels == (4000, 40000)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"size": 448}, "size must be an object"),
        ({"size": {"shortest_edge": 4000}}, "longest_edge"),
        ({"size": {"shortest_edge": 4000, "longest_edge": 10**12}}, "longest_edge must be"),
        ({"size": {"shortest_edge": 4000, "longest_edge": "x"}}, "longest_edge must be"),
        ({"min_pixels": 60000, "max_pixels": 50000}, "at least 60000"),
        ({"min_pixels": 1, "max_pixels": 700}, "less than one visual token"),
        ({"patch_size": 16}, "patch_size is 16.*takes 14"),
        ({"merge_size": 4}, "merge_size is 4"),
        ({"temporal_patch_size": 1}, "temporal_patch_size is 1"),
        ({"do_resize": False}, "do_resize"),
        ({"do_normalize": "yes"}, "do_normalize"),
        ({"image_mean": [0.5, 0.5]}, "three values"),
        ({"image_std": 0}, "image_std"),
        ({"rescale_factor": math.inf}, "rescale_factor"),
        ({"resample": 9}, "resample"),
    ],
)
def test_settings_that_make_no_sense_are_refused(changes, says):
    config = parse_config(config_json("qwen2_vl"))
    with pytest.raises(TrioError, match=says):
        Preprocessor(preprocessing("qwen2_vl") | changes, config)


def test_most_pixels_mean_nothing_where_tiles_have_one_size(llava_checkpoint):
    config = parse_config(json.loads((llava_checkpoint / "config.json").read_text()))
    assert with_max_pixels({"size": 1}, config, None) == {"size": 1}
    with pytest.raises(TrioError, match="max_pixels has no meaning for a llava model"):
        with_max_pixels({}, config, 1000)


def test_limits_follow_the_most_pixels():
    config = parse_config(config_json("qwen2_vl"))
    small = Preprocessor(preprocessing("qwen2_vl"), config).config
    limits = request_limits(small)
    # 48 squares, or a row of √(200 · 48) where one side is 200 times as long as the other.
    assert limits.visual_tokens == limits.tile_rows == 97
    assert request_limits(config).visual_tokens == 1280
    assert request_limits(config).tiles_at_once == 1 < limits.tiles_at_once


# ------------------------------------------------------------------------- what has no meaning


@pytest.mark.parametrize("family", FAMILIES)
def test_methods_and_positions_without_meaning_are_refused(family):
    config = parse_config(config_json(family))
    for method in METHODS:
        if method in ("cls-attention", "vscan"):
            with pytest.raises(TrioError, match=f"{method} reads .* class token.*divprune"):
                check_methods(config, [method])
        else:
            check_methods(config, [method])
    assert check_positions(config, None) == "original" == check_positions(config, "original")
    with pytest.raises(TrioError, match="'renumber' have no meaning"):
        check_positions(config, "renumber")


def test_llava_keeps_its_positions_and_methods(llava_checkpoint: Path):
    config = parse_config(json.loads((llava_checkpoint / "config.json").read_text()))
    check_methods(config, METHODS)
    assert [check_positions(config, each) for each in (None, "original")] == [
        *("renumber", "original")
    ]
    assert grids_of([preprocessor_of(llava_checkpoint)(make_picture())], config) is None
