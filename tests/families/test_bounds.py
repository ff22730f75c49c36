"""Every number of config.json and preprocessor_config.json: a bad value is refused by its key."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

from trio_deploy import TrioError
from trio_deploy.checkpoint.folder import image_settings
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.families.bounds import FLAGS, IMAGE, MAX_CANVASES, REAL, WHOLE
from trio_deploy.families.clip_images import (
    CLIP_PREPROCESSING,
    clip_processor_files,
    clip_settings,
)
from trio_deploy.families.hf_config import TEXT_DEFAULTS, VISION_DEFAULTS
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import FAMILIES, parse_config

#: Families of a CLIP tower; Qwen's are in test_qwen.py.
CLIP = [name for name, family in FAMILIES.items() if family.settings is clip_settings]
NOT_FINITE = (math.nan, math.inf, -math.inf)
BAD_WHOLE = (*NOT_FINITE, -5, 0, 0.5, "x", "7", True, [], {}, [3, 4], 10**12, 10**30)
BAD_REAL = (*NOT_FINITE, -1, 0, "x", "1", True, [], {}, 1e300, -1e-300)
BAD_FLAG = (*NOT_FINITE, 0, 1, "true", "false", [], {})

ROPE = {
    "rope_type": "llama3",
    "rope_theta": 1e4,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
VISION = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "image_size",
    "patch_size",
    "num_channels",
    "layer_norm_eps",
)

#: Where keys of the tables stand: path of the key.
PLACES = [
    *(("vision_config", key) for key in VISION),
    *(("text_config", "rope_parameters", key) for key in ROPE if key != "rope_type"),
    *(
        ("text_config", key)
        for key in (*WHOLE, *REAL, *FLAGS)
        if key not in (*VISION[4:], *ROPE, "multimodal_projector_bias")
    ),
    ("text_config", "rope_theta"),
    ("multimodal_projector_bias",),
    ("tie_word_embeddings",),
    ("image_token_index",),
]


def _bad(key: str) -> tuple[Any, ...]:
    if key in FLAGS:
        return BAD_FLAG
    if key in REAL:
        return BAD_REAL
    return tuple(value for value in BAD_WHOLE if value != 0) if "index" in key else BAD_WHOLE


def _config(family: str) -> dict[str, Any]:
    raw: dict[str, Any] = json.loads(json.dumps(FAMILIES[family].tiny()))
    return raw


def _read(folder: Path, raw: dict[str, Any]) -> Any:
    """Write config.json, and read it as an export does."""
    (folder / "config.json").write_text(json.dumps(raw))
    return parse_config(from_folder(folder).raw_config)


def _refused(call: Callable[[], Any], key: str, value: Any) -> None:
    with pytest.raises(TrioError) as caught:
        call()
    message = str(caught.value)
    assert key in message, (value, message)
    assert "\n" not in message
    assert len(message) < 400


@pytest.mark.parametrize("family", CLIP)
@pytest.mark.parametrize("place", PLACES, ids=".".join)
def test_a_bad_value_in_config_json_is_refused_by_its_key(tmp_path, family, place):
    for value in _bad(place[-1]):
        raw = _config(family)
        if "rope_parameters" in place:
            raw["text_config"]["rope_parameters"] = dict(ROPE)
            assert _read(tmp_path, raw).text.rope.scaling == "llama3"
        section = raw
        for name in place[:-1]:
            section = section[name]
        section[place[-1]] = value
        _refused(lambda raw=raw: _read(tmp_path, raw), place[-1], value)


def test_every_number_among_the_defaults_has_bounds():
    """A number that a family begins to read is in the tables, so that the tests above meet it."""
    for defaults in chain(TEXT_DEFAULTS.values(), VISION_DEFAULTS.values()):
        for key, value in defaults.items():
            if isinstance(value, bool):
                assert key in FLAGS
            elif isinstance(value, int) or value is None:
                assert key in WHOLE
            elif isinstance(value, float):
                assert key in REAL
    tested = {place[-1] for place in PLACES}
    assert tested >= {*WHOLE, *REAL, *FLAGS}


@pytest.mark.parametrize("value", [*NOT_FINITE, 4, -99, 0.5, "x", True, {}, [], ["x"], [-2] * 99])
def test_a_feature_layer_that_no_tower_has_is_refused(tmp_path, value):
    raw = _config("llava") | {"vision_feature_layer": value}
    _refused(lambda: _read(tmp_path, raw), "vision_feature_layer", value)


@pytest.mark.parametrize(
    "value",
    [
        "32",
        7,
        {"a": 1},
        [[32, 64], [32]],
        [[32, "64"]],
        [[32, 0]],
        [[32, -64]],
        [[32, 64.0]],
        [[32, math.nan]],
        [[32, True]],
        [[1 << 15, 1 << 15]],
        [[10**12, 32]],
        [[32, 32]] * (MAX_CANVASES + 1),
    ],
    ids=range(13),
)
def test_canvases_that_make_no_sense_are_refused(tmp_path, value):
    raw = _config("llava_next") | {"image_grid_pinpoints": value}
    _refused(lambda: _read(tmp_path, raw), "image_grid_pinpoints", value)


@pytest.mark.parametrize("key", ["text_config", "vision_config"])
@pytest.mark.parametrize("value", [7, "x", [], True])
def test_a_section_that_is_no_object_is_refused(tmp_path, key, value):
    _refused(lambda: _read(tmp_path, _config("llava") | {key: value}), key, value)


@pytest.mark.parametrize("key", ["rope_parameters", "rope_scaling"])
@pytest.mark.parametrize("value", [7, "x", [], False, 0])
def test_rope_parameters_that_are_no_object_are_refused(tmp_path, key, value):
    raw = _config("llava")
    raw["text_config"][key] = value
    _refused(lambda: _read(tmp_path, raw), key, value)


@pytest.mark.parametrize("value", [7, [], {}, True, ["llama"]])
@pytest.mark.parametrize("place", [(), ("text_config",), ("vision_config",)])
def test_a_model_type_that_is_no_name_is_refused(tmp_path, place, value):
    raw = _config("llava")
    section = raw
    for name in place:
        section = section[name]
    section["model_type"] = value
    _refused(lambda: _read(tmp_path, raw), "supported", value)


@pytest.mark.parametrize("value", [7, "LlavaForConditionalGeneration", {}, [7, None]])
def test_architectures_that_are_no_list_of_names_are_refused(tmp_path, value):
    _refused(lambda: _read(tmp_path, {"architectures": value}), "not supported", value)


def test_low_and_high_frequencies_of_rope_are_apart(tmp_path):
    raw = _config("llava")
    raw["text_config"]["rope_parameters"] = ROPE | {"high_freq_factor": 1.0}
    _refused(lambda: _read(tmp_path, raw), "low_freq_factor", 1.0)


def test_patches_are_not_smaller_than_a_tower_can_take(tmp_path):
    raw = _config("llava")
    raw["vision_config"] |= {"image_size": 8192, "patch_size": 1}
    _refused(lambda: _read(tmp_path, raw), "patch_size", 1)


# ------------------------------------------------------------------------- preprocessor_config.json


def _settings(family: str) -> dict[str, Any]:
    files = clip_processor_files(parse_config(_config(family)))
    return files["preprocessor_config.json"]


def _image_cases() -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Key, the settings to replace, and the bad value."""
    for key in CLIP_PREPROCESSING:
        if key.startswith("do_") and key != "do_pad":
            yield from ((key, {key: value}, value) for value in BAD_FLAG)
    for value in BAD_FLAG:
        pads = {"image_processor_type": "LlavaImageProcessor", "do_pad": value}
        yield "do_pad", pads, value
    for value in (*BAD_WHOLE, {"height": 32}, {"shortest_edge": "x"}):
        yield "size", {"size": value}, value
        if value != [3, 4]:
            yield "crop_size", {"crop_size": value}, value
    for value in BAD_WHOLE:
        yield "shortest_edge", {"size": {"shortest_edge": value}}, value
        yield "height", {"size": {"height": value, "width": 32}}, value
        yield "width", {"size": {"height": 32, "width": value}}, value
        yield "height", {"crop_size": {"height": value, "width": 32}}, value
        yield "width", {"crop_size": {"height": 32, "width": value}}, value
    for value in BAD_WHOLE:
        if value != 0:  # nearest neighbour
            yield "resample", {"resample": value}, value
    for value in BAD_REAL:
        yield "rescale_factor", {"rescale_factor": value}, value
        for key in ("image_mean", "image_std"):
            if not (key == "image_mean" and value == 0):
                yield key, {key: [0.5, 0.5, value]}, value
                yield key, {key: value}, value
        yield "image_std", {"image_std": [0.5, 0.5]}, value


@pytest.mark.parametrize("inside", [False, True], ids=["preprocessor_config", "processor_config"])
@pytest.mark.parametrize("family", CLIP)
def test_a_bad_value_in_the_image_settings_is_refused_by_its_key(tmp_path, family, inside):
    config = parse_config(_config(family))
    file = tmp_path / ("processor_config.json" if inside else "preprocessor_config.json")
    for key, change, value in _image_cases():
        settings = _settings(family) | change
        file.write_text(json.dumps({"image_processor": settings} if inside else settings))
        _refused(lambda: Preprocessor(image_settings(tmp_path), config), key, (key, value))


def test_every_number_of_the_image_settings_has_bounds():
    numbers = {
        key
        for key, value in CLIP_PREPROCESSING.items()
        if isinstance(value, float | list) and not isinstance(value, bool)
    }
    assert numbers == set(IMAGE)


def test_image_settings_that_are_no_object_are_refused():
    config = parse_config(_config("llava"))
    for value in (7, "x", [], True):
        _refused(
            lambda value=value: Preprocessor({"image_processor": value}, config), "object", value
        )
