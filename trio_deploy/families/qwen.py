"""What Qwen's vision-language families share: config.json, preprocessing, layout of a picture."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.families.base import (
    PATCHES_AT_ONCE,
    VISUAL_TOKEN,
    ImageCounts,
    Layout,
    Limits,
    ModelConfig,
    PatchTowerConfig,
    TextConfig,
)
from trio_deploy.families.bounds import IMAGE, PATCH_TOWER, WHOLE, flag, real, whole
from trio_deploy.families.hf_config import flag_of, given, read_text
from trio_deploy.families.patches import (
    PatchSettings,
    block_order,
    largest_picture,
    most_windows,
    patch_values,
    position_taps,
    smart_resize,
    token_boxes,
    windows,
)
from trio_deploy.families.pixels import MAX_PIXELS, ImageSettings
from trio_deploy.files import brief

#: Name layouts of Qwen's checkpoints: the hub's, which has `visual.`, `model.` and `lm_head.`; and
#: that of transformers 4.52 and later in memory, which Qwen3-VL's have.
PREFIXES = (
    ("model.visual.", "visual."),
    ("model.language_model.", "language_model."),
    ("model.", "language_model."),
)

_TOP = {
    "image_token_id": 151655,
    "tie_word_embeddings": False,
}

#: For a config.json of small sizes, at the top and of the language model.
TINY_TOP = {
    "image_token_id": 4,
    "video_token_id": 5,
    "vision_start_token_id": 6,
    "vision_end_token_id": 7,
    "tie_word_embeddings": False,
}
TINY_TEXT = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}

#: Keys of the language model that have no default.
_ROPE = ("rope_scaling", "rope_parameters")  # of which transformers takes the first
_WINDOWS = ("use_sliding_window", "max_window_layers", "layer_types")

#: Defaults of transformers' Qwen2-VL image processor, which Qwen3-VL uses, too.
_PREPROCESSING = {
    "do_resize": True,
    "size": {"shortest_edge": 56 * 56, "longest_edge": 28 * 28 * 1280},
    "resample": 3,
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}


def top_level(raw: Mapping[str, Any]) -> tuple[int, bool]:
    """The id of the token that stands for a picture, and whether the top says `tied`."""
    top = {**_TOP, **given(raw)}
    token = whole(top["image_token_id"], "config.json: image_token_id", (0, WHOLE["vocab_size"][1]))
    return token, flag_of(top, "tie_word_embeddings", "")


def text_section(
    raw: Mapping[str, Any], model_type: str, defaults: Mapping[str, Any]
) -> tuple[dict[str, Any], str]:
    """The language model's keys over their defaults, and the section's name.

    The name is "" where they stand at the top of config.json, as in older checkpoints.

    Raises:
        TrioError: the section is no object, of another type, or asks for windows of attention.
    """
    section, part = raw.get("text_config"), "text_config"
    if section is None:
        keys = (*defaults, *_ROPE, *_WINDOWS)
        section, part = {key: raw[key] for key in keys if key in raw}, ""
    if not isinstance(section, Mapping):
        raise TrioError("config.json: text_config must be an object")
    if (named := section.get("model_type", model_type)) != model_type:
        raise TrioError(
            f"config.json: text_config is of type {brief(named)}, which is not supported: "
            f"{model_type} is"
        )
    merged = {**defaults, **given(section)}
    windowed = flag(merged.get("use_sliding_window", False), "config.json: use_sliding_window")
    if not windowed:
        merged["sliding_window"] = None
    kinds = merged.get("layer_types", [])
    if not isinstance(kinds, Sequence) or any(kind != "full_attention" for kind in kinds):
        raise TrioError(
            "config.json: layer_types has other layers than full_attention, which are not supported"
        )
    return merged, part


def read_qwen_text(
    section: Mapping[str, Any], part: str, tied: bool, mrope: Sequence[int], interleaved: bool
) -> TextConfig:
    """The language model, whose tokens have three positions; without biases and q/k norms.

    Args:
        section, part: as of `text_section`.
        mrope: frequencies along time, rows and columns, where the rope parameters do not say.
        interleaved: whether the three take turns, or stand one after another.
    """
    key = next((key for key in _ROPE if section.get(key)), None)
    found = section[key] if key else {}
    if key and isinstance(found, Mapping):  # what is no object is refused with the others
        parameters = given(found)
        mrope = parameters.pop("mrope_section", mrope)
        if parameters.pop("mrope_interleaved", interleaved) is not interleaved:
            raise TrioError(
                f"config.json: mrope_interleaved must be {str(interleaved).lower()} in this family"
            )
        for name in ("rope_type", "type"):
            if parameters.get(name) == "mrope":  # transformers takes it for `default`
                parameters[name] = "default"
        section = {**section, key: parameters}
    text = read_text(section, tied, part=part)
    axes = _axes(mrope, text.head_dim // 2, interleaved)
    return replace(text, rope=replace(text.rope, axes=axes))


def _axes(sections: Any, frequencies: int, interleaved: bool) -> tuple[int, ...]:
    """The axis of each frequency: 0 time, 1 row, 2 column."""
    counts = [
        whole(count, "config.json: mrope_section", (0, WHOLE["head_dim"][1]))
        for count in (sections if isinstance(sections, (list, tuple)) else [sections])
    ]
    if len(counts) != 3 or sum(counts) != frequencies:
        raise TrioError(
            f"config.json: mrope_section must be three numbers of sum {frequencies}, half of "
            f"head_dim, not {brief(sections)}"
        )
    if not interleaved:
        return tuple(axis for axis, count in enumerate(counts) for _ in range(count))
    return tuple(i % 3 if i < 3 * counts[i % 3] else 0 for i in range(frequencies))


def vision_section(
    raw: Mapping[str, Any], names: Sequence[str], defaults: Mapping[str, Any]
) -> dict[str, Any]:
    """The tower's keys over their defaults.

    Args:
        names: model types that it may say.

    Raises:
        TrioError: it is no object, or of another type.
    """
    section = raw.get("vision_config", {})
    if not isinstance(section, Mapping):
        raise TrioError("config.json: vision_config must be an object")
    if (named := section.get("model_type", names[0])) not in names:
        raise TrioError(
            f"config.json: vision_config is of type {brief(named)}, which is not supported: "
            f"{names[0]} is"
        )
    section = given(section)
    if "in_chans" in section:  # the hub's name
        section.setdefault("in_channels", section["in_chans"])
    rope = section.get("rope_parameters", {})
    if not isinstance(rope, Mapping) or rope.get("rope_theta", 10000.0) != 10000.0:
        raise TrioError(
            "config.json: vision_config.rope_parameters is not supported: only a theta of 10000 is"
        )
    return {**defaults, **section}


def tower_count(section: Mapping[str, Any], key: str) -> int:
    """A whole number of vision_config; one side of a square may be a pair, as there."""
    value = section[key]
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return whole(value, f"config.json: vision_config.{key}", PATCH_TOWER[key])


def layer_indexes(section: Mapping[str, Any], key: str, depth: int) -> tuple[int, ...]:
    """Numbers of layers of the tower, rising.

    Raises:
        TrioError: they are no such list.
    """
    value, name = section[key], f"config.json: vision_config.{key}"
    if not isinstance(value, (list, tuple)) or len(value) > depth:
        raise TrioError(f"{name} must be a list of layers, not {brief(value)}")
    layers = tuple(whole(layer, name, (0, depth - 1)) for layer in value)
    if list(layers) != sorted(set(layers)):
        raise TrioError(f"{name} must rise, not {brief(value)}")
    return layers


def qwen_config(
    family: str, vision: PatchTowerConfig, width: int, text: TextConfig, image_token_id: int
) -> ModelConfig:
    """A model of these parts, whose pictures have the sizes that transformers' processor allows.

    Args:
        width: of the features that the tower's merger yields.

    Raises:
        TrioError: the parts do not fit each other.
    """
    if width != text.hidden_size:
        raise TrioError(
            f"config.json: the vision tower yields features of width {width}, but the language "
            f"model has a hidden_size of {text.hidden_size}"
        )
    if vision.hidden_size % vision.num_heads or vision.hidden_size // vision.num_heads % 4:
        raise TrioError(
            f"config.json: vision_config's width {vision.hidden_size} needs heads of a multiple of "
            f"4 numbers, which {vision.num_heads} heads do not have"
        )
    if vision.in_channels != 3:
        raise TrioError("config.json: only vision towers with in_channels 3 are supported")
    if len(vision.deepstack_layers) > text.num_layers:
        raise TrioError(
            "config.json: vision_config.deepstack_visual_indexes has more entries than the "
            "language model has layers"
        )
    size = _PREPROCESSING["size"]
    return ModelConfig(
        family=family,
        vision=vision,
        text=text,
        projector_act="gelu",
        projector_bias=True,
        image_token_id=image_token_id,
        pixels=(size["shortest_edge"], size["longest_edge"]),  # type: ignore[index]
    )


def patch_settings(
    raw: Mapping[str, Any], config: ModelConfig
) -> tuple[dict[str, Any], PatchSettings]:
    """Read preprocessor_config.json of transformers' Qwen2-VL image processor.

    Returns:
        The keys that are read, defaults filled in; and the settings.

    Raises:
        TrioError: settings that are malformed or do not fit the vision tower.
    """
    vision = config.patch_tower
    own = {
        "patch_size": vision.patch_size,
        "temporal_patch_size": vision.temporal_patch_size,
        "merge_size": vision.merge,
    }
    filled: dict[str, Any] = {
        **_PREPROCESSING,
        **own,
        **{key: raw[key] for key in (*_PREPROCESSING, *own) if raw.get(key) is not None},
    }
    for key, value in own.items():
        if whole(filled[key], _of(key), (1, 1024)) != value:
            raise TrioError(
                f"{_of(key)} is {filled[key]}, but the vision tower takes {value}: the two files "
                "belong to different checkpoints"
            )
    if not _flag(filled, "do_resize"):
        raise TrioError(f"{_of('do_resize')} false is not supported: pictures must be resized")
    pixels = _pixel_bounds(filled["size"], raw)
    if pixels[1] < vision.factor**2:
        raise TrioError(
            f"{_of('size')}: at most {pixels[1]} pixels are less than one visual token, which has "
            f"{vision.factor**2}"
        )
    filled["size"] = {"shortest_edge": pixels[0], "longest_edge": pixels[1]}
    normalised = _flag(filled, "do_normalize")
    image = ImageSettings(
        size=None,
        crop=None,
        resample=whole(filled["resample"], _of("resample"), (0, max(Image.Resampling))),
        scale=(
            real(filled["rescale_factor"], _of("rescale_factor"), IMAGE["rescale_factor"])
            if _flag(filled, "do_rescale")
            else None
        ),
        mean=_channels(filled, "image_mean") if normalised else None,
        std=_channels(filled, "image_std") if normalised else None,
    )
    return filled, PatchSettings(pixels, image)


def _pixel_bounds(size: Any, raw: Mapping[str, Any]) -> tuple[int, int]:
    """Least and most pixels: called edges in `size`, pixels in older files, which count first."""
    if not isinstance(size, Mapping):
        raise TrioError(
            f"{_of('size')} must be an object with shortest_edge and longest_edge, in pixels, not "
            f"{brief(size)}"
        )
    found = []
    for edge, old in (("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")):
        value = next(
            (given for given in (raw.get(old), size.get(edge), size.get(old)) if given is not None),
            None,
        )
        if value is None:
            raise TrioError(f"{_of('size')} has no {edge}, the number of pixels")
        found.append(whole(value, _of(f"size.{edge}"), (1, MAX_PIXELS)))
    if found[0] > found[1]:
        raise TrioError(
            f"{_of('size')}: at least {found[0]} pixels, but at most {found[1]}: raise the most "
            "pixels, or lower the least"
        )
    return found[0], found[1]


def _of(key: str) -> str:
    """What messages call a key."""
    return f"the image preprocessing settings: {key}"


def _flag(raw: Mapping[str, Any], key: str) -> bool:
    return flag(raw[key], _of(key))


def _channels(raw: Mapping[str, Any], key: str) -> tuple[float, ...]:
    """A number per channel, or one for all three."""
    values = raw[key] if isinstance(raw[key], (list, tuple)) else [raw[key]] * 3
    if len(values) != 3:
        raise TrioError(f"{_of(key)} must have three values, not {len(values)}")
    return tuple(real(value, _of(key), IMAGE[key]) for value in values)


def arrange(image: Image.Image, settings: PatchSettings, config: ModelConfig) -> Layout:
    """Resize to whole squares of patches; each square is a visual token."""
    vision = config.patch_tower
    size = (image.height, image.width)
    resized = smart_resize(size, vision.factor, settings.pixels)
    grid = (resized[0] // vision.patch_size, resized[1] // vision.patch_size)
    patches = patch_values(
        image,
        resized,
        vision.patch_size,
        vision.merge,
        vision.temporal_patch_size,
        settings.image,
    )
    feeds = {"pixel_values": patches[None], "patch_position": block_order(grid, vision.merge)}
    if vision.window is not None:
        feeds["window_index"], feeds["window_slot"] = windows(grid, vision.merge, vision.window)
    if vision.position_side is not None:
        feeds["position_taps"], feeds["position_weights"] = position_taps(
            grid, vision.merge, vision.position_side
        )
    boxes = token_boxes(grid, vision.merge, size)
    count = len(boxes)
    return Layout(
        feeds=feeds,
        feature_rows=count,
        text=VISUAL_TOKEN * count,
        rows=np.arange(count, dtype=np.int64),
        boxes=boxes,
        size=size,
        grids=((1, grid[0] // vision.merge, grid[1] // vision.merge),),
    )


def counts(size: tuple[int, int], config: ModelConfig) -> ImageCounts:
    """Patches of the resized picture; each square of them is a visual token."""
    vision = config.patch_tower
    assert config.pixels is not None
    height, width = smart_resize(size, vision.factor, config.pixels)
    rows, columns = height // vision.factor, width // vision.factor
    patches = rows * columns * vision.merge**2
    # As `arrange` makes them: float32 values and weights, int64 places.
    per_patch = 4 * vision.patch_values + 2 * 8
    windowed = 0
    if vision.window is not None:
        number = -(-rows // vision.window) * -(-columns // vision.window)
        windowed = (number * vision.window_slots + patches) * 8
    if vision.position_side is not None:
        per_patch += 4 * (8 + 4)
    return ImageCounts(patches * per_patch + windowed, patches, rows * columns)


def request_limits(config: ModelConfig) -> Limits:
    """One entry per image, of as many patches as the most pixels hold."""
    vision = config.patch_tower
    assert config.pixels is not None
    tokens, picture = largest_picture(vision.factor, config.pixels)
    patches = tokens * vision.merge**2
    axes = {"L": (vision.merge**2, patches, patches)}
    if vision.window is not None:
        usual = math.ceil(tokens / vision.window**2)
        axes["W"] = (1, usual, most_windows(tokens, vision.window))
    return Limits(
        tiles=1,
        tile_rows=tokens,
        tile_values=patches * vision.patch_values,
        visual_tokens=tokens,
        picture=picture,
        rows_at_once=PATCHES_AT_ONCE // vision.merge**2,
        axes=axes,
    )
