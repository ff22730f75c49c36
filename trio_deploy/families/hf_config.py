"""Shared readers of config.json: both styles, and transformers' defaults for missing keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig, RopeConfig, TextConfig, VisionConfig
from trio_deploy.families.bounds import MAX_PATCHES, REAL, WHOLE, canvases, flag, real, whole
from trio_deploy.families.pixels import MAX_PIXELS
from trio_deploy.files import brief

#: Activations that the graphs can express.
ACTIVATIONS = ("gelu", "quick_gelu", "gelu_pytorch_tanh", "gelu_new")


#: Name layouts of CLIP + Llama checkpoints: transformers 4.52 and later put `model.` in front of
#: all but the head, older releases kept the language model as a separate model, 5.x has no
#: `vision_model`.
CLIP_LLAMA_PREFIXES = (
    ("model.", ""),
    ("vision_tower.vision_model.", "vision_tower."),
    ("language_model.lm_head.", "lm_head."),
    ("language_model.model.", "language_model."),
)

#: CLIP ViT-L/14 at 336 pixels, the tower if config.json has no `vision_config`.
CLIP_LARGE_336 = {
    "model_type": "clip_vision_model",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 24,
    "num_attention_heads": 16,
    "image_size": 336,
    "patch_size": 14,
}

TEXT_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "llama": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": None,  # as many as there are query heads
        "head_dim": None,  # hidden_size / num_attention_heads
        "hidden_act": "silu",
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": None,
    },
    "mistral": {
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": None,
        "hidden_act": "silu",
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        "sliding_window": 4096,
    },
}

VISION_DEFAULTS: Mapping[str, Mapping[str, Any]] = {
    "clip_vision_model": {
        "hidden_size": 768,
        "intermediate_size": 3072,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_channels": 3,
        "image_size": 224,
        "patch_size": 32,
        "hidden_act": "quick_gelu",
        "layer_norm_eps": 1e-5,
    },
}


def read_clip_llama(
    raw: Mapping[str, Any],
    family: str,
    defaults: Mapping[str, Any],
    *,
    tie_from_text: bool = False,
    tiled: bool = False,
) -> ModelConfig:
    """config.json of a CLIP tower, two linear layers and Llama or Mistral.

    Args:
        family: its name.
        defaults: top-level keys that may be missing, with transformers' values.
        tie_from_text: whether `tie_word_embeddings` inside `text_config` counts as well.
        tiled: whether an image is cut into tiles of the canvases in `image_grid_pinpoints`, with
            an `image_newline` embedding behind each row of patches.

    Raises:
        TrioError: an option that is not supported, or a value that makes no sense.
    """
    top = {**defaults, **given(raw)}
    text_raw = section_of(raw, "text_config", "llama", TEXT_DEFAULTS, {})
    vision = _vision(
        section_of(raw, "vision_config", "clip_vision_model", VISION_DEFAULTS, CLIP_LARGE_336), top
    )
    if tiled and not vision.drop_cls:
        raise TrioError(
            f"config.json: vision_feature_select_strategy 'full' does not work with the tiles of "
            f"{family}: only 'default' does"
        )
    tied = flag_of(top, "tie_word_embeddings", "")
    in_text = flag_of(text_raw, "tie_word_embeddings", "text_config")
    text = read_text(text_raw, tied or (tie_from_text and in_text))
    image_token_id = whole(
        top.get("image_token_id", top["image_token_index"]),
        "config.json: image_token_index",
        (0, WHOLE["vocab_size"][1]),
    )
    if image_token_id >= text.vocab_size:
        raise TrioError(
            f"config.json: image_token_index {image_token_id} lies outside the vocabulary of "
            f"{text.vocab_size}"
        )
    return ModelConfig(
        family=family,
        vision=vision,
        text=text,
        projector_act=activation_of(top["projector_hidden_act"], "projector_hidden_act"),
        projector_bias=flag_of(top, "multimodal_projector_bias", ""),
        image_token_id=image_token_id,
        grid_pinpoints=_pinpoints(top["image_grid_pinpoints"], vision) if tiled else (),
        newline=tiled,
    )


def clip_llama_json(
    architecture: str,
    vision: Mapping[str, Any],
    text: Mapping[str, Any],
    *,
    tile: int,
    patch: int,
    **top: Any,
) -> dict[str, Any]:
    """A config.json of a CLIP tower, two linear layers and Llama.

    Args:
        architecture: transformers' class.
        vision, text: sizes, in transformers' words, of the tower and of the language model.
        tile, patch: pixels along one side.
        top: further keys, `model_type` among them.
    """
    return {
        "architectures": [architecture],
        "projector_hidden_act": "gelu",
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": False,
        "text_config": {
            "model_type": "llama",
            "hidden_act": "silu",
            "rms_norm_eps": 1e-6,
            "rope_theta": 10000.0,
            "tie_word_embeddings": False,
            **text,
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "hidden_act": "quick_gelu",
            "layer_norm_eps": 1e-5,
            "image_size": tile,
            "patch_size": patch,
            "projection_dim": vision["hidden_size"],
            **vision,
        },
        **top,
    }


def tiny_clip_llama(architecture: str, **top: Any) -> dict[str, Any]:
    """A config.json of small sizes: 16 patches per tile of 32 pixels, four layers of width 64."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }
    text = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "vocab_size": 128,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 3,
    }
    return clip_llama_json(architecture, vision, text, tile=32, patch=8, image_token_index=4, **top)


def given(section: Mapping[str, Any]) -> dict[str, Any]:
    """Keys with a value; null means the default."""
    return {key: value for key, value in section.items() if value is not None}


def section_of(
    raw: Mapping[str, Any],
    name: str,
    model_type: str,
    defaults: Mapping[str, Mapping[str, Any]],
    absent: Mapping[str, Any],
) -> dict[str, Any]:
    """A sub-configuration over the defaults of its model type, or over `absent` if missing."""
    section = raw.get(name)
    if section is None:
        section = absent
    if not isinstance(section, Mapping):
        raise TrioError(f"config.json: {name} must be an object")
    model_type = section.get("model_type", model_type)
    if not isinstance(model_type, str) or model_type not in defaults:
        raise TrioError(
            f"config.json: {name} is of type {brief(model_type)}, which is not supported: "
            f"{', '.join(defaults)} {'are' if len(defaults) > 1 else 'is'}"
        )
    merged = {"model_type": model_type, **defaults[model_type], **given(section)}
    if "sliding_window" in section:
        merged["sliding_window"] = section["sliding_window"]  # null switches Mistral's default off
    return merged


def _name(key: str, part: str) -> str:
    """What messages call a key; `part` is the section it stands in, "" for the top."""
    return f"config.json: {part}.{key}" if part else f"config.json: {key}"


def count_of(section: Mapping[str, Any], key: str, part: str) -> int:
    return whole(section[key], _name(key, part), WHOLE[key])


def side_of(section: Mapping[str, Any], key: str, part: str) -> int:
    """One side of a square, which may be given as a pair."""
    value = section[key]
    if isinstance(value, (list, tuple)) and len(value) == 2 and value[0] == value[1]:
        value = value[0]
    return whole(value, _name(key, part), WHOLE[key])


def real_of(section: Mapping[str, Any], key: str, part: str) -> float:
    return real(section[key], _name(key, part), REAL[key])


def flag_of(section: Mapping[str, Any], key: str, part: str) -> bool:
    return flag(section[key], _name(key, part))


def activation_of(name: Any, key: str) -> str:
    if name not in ACTIVATIONS:
        raise TrioError(
            f"config.json: {key} {brief(name)} is not supported: {', '.join(ACTIVATIONS)} are"
        )
    return str(name)


def _vision(section: Mapping[str, Any], top: Mapping[str, Any]) -> VisionConfig:
    part = "vision_config"
    num_layers = count_of(section, "num_hidden_layers", part)
    image_size, patch_size = (
        side_of(section, "image_size", part),
        side_of(section, "patch_size", part),
    )
    hidden_size = count_of(section, "hidden_size", part)
    num_heads = count_of(section, "num_attention_heads", part)
    if image_size < patch_size or hidden_size % num_heads:
        raise TrioError(
            "config.json: vision_config needs an image_size of at least one patch and a "
            "hidden_size that its heads divide"
        )
    if image_size // patch_size > MAX_PATCHES:
        raise TrioError(
            f"config.json: vision_config.patch_size {patch_size} cuts an image_size of "
            f"{image_size} into more than {MAX_PATCHES} patches per side"
        )
    if count_of(section, "num_channels", part) != 3:
        raise TrioError("config.json: only vision towers with num_channels 3 are supported")
    strategy = top["vision_feature_select_strategy"]
    if strategy not in ("default", "full"):
        raise TrioError(
            f"config.json: vision_feature_select_strategy {brief(strategy)} is neither 'default' "
            "nor 'full'"
        )
    return VisionConfig(
        hidden_size=hidden_size,
        intermediate_size=count_of(section, "intermediate_size", part),
        num_layers=num_layers,
        num_heads=num_heads,
        image_size=image_size,
        patch_size=patch_size,
        layer_norm_eps=real_of(section, "layer_norm_eps", part),
        hidden_act=activation_of(section["hidden_act"], "vision_config.hidden_act"),
        feature_layers=_feature_layers(top["vision_feature_layer"], num_layers),
        drop_cls=strategy == "default",
    )


def _feature_layers(raw: Any, num_layers: int) -> tuple[int, ...]:
    states = num_layers + 1  # the embeddings, then each layer's output
    layers = raw if isinstance(raw, (list, tuple)) else [raw]
    if len(layers) > states:
        raise TrioError(f"config.json: vision_feature_layer has more entries than {states} states")
    resolved = []
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or not -states <= layer < states:
            raise TrioError(
                f"config.json: vision_feature_layer {brief(layer)} does not exist in a tower of "
                f"{num_layers} layers"
            )
        resolved.append(layer % states)
    if not resolved:
        raise TrioError("config.json: vision_feature_layer is empty")
    return tuple(resolved)


def read_text(section: Mapping[str, Any], tied: bool, *, part: str = "text_config") -> TextConfig:
    """The language model's section, defaults filled in; without q/k norms and with one position.

    Args:
        tied: whether the embeddings serve as the output head.
        part: the section's name; "" where its keys stand at the top.

    Raises:
        TrioError: an option that is not supported, or a value that makes no sense.
    """
    if section["hidden_act"] != "silu":
        raise TrioError(
            f"config.json: hidden_act {brief(section['hidden_act'])} of the language model is not "
            "supported: silu is"
        )
    max_positions = count_of(section, "max_position_embeddings", part)
    window = (
        None if section["sliding_window"] is None else count_of(section, "sliding_window", part)
    )
    if window is not None and window < max_positions:
        raise TrioError(
            f"config.json: sliding-window attention ({window} of {max_positions} positions) is "
            "not supported: set sliding_window to null if the model was trained without it"
        )
    hidden_size = count_of(section, "hidden_size", part)
    num_heads = count_of(section, "num_attention_heads", part)
    num_kv_heads = num_heads
    if section["num_key_value_heads"] is not None:
        num_kv_heads = count_of(section, "num_key_value_heads", part)
    if num_heads % num_kv_heads:
        raise TrioError(
            f"config.json: {num_heads} attention heads cannot share {num_kv_heads} key/value heads"
        )
    if section["head_dim"] is not None:
        head_dim = count_of(section, "head_dim", part)
    elif hidden_size % num_heads:
        raise TrioError(
            f"config.json: hidden_size {hidden_size} is not divisible by {num_heads} heads"
        )
    else:
        head_dim = hidden_size // num_heads
    if head_dim % 2:
        raise TrioError(f"config.json: head_dim {head_dim} is odd: rotary embeddings need pairs")
    bias = flag_of(section, "attention_bias", part)
    return TextConfig(
        hidden_size=hidden_size,
        intermediate_size=count_of(section, "intermediate_size", part),
        num_layers=count_of(section, "num_hidden_layers", part),
        num_heads=num_heads,
        num_kv_heads=num_kv_heads,
        head_dim=head_dim,
        vocab_size=count_of(section, "vocab_size", part),
        max_positions=max_positions,
        rms_norm_eps=real_of(section, "rms_norm_eps", part),
        rope=_rope(section, part),
        qkv_bias=bias,
        o_bias=bias,
        mlp_bias=flag_of(section, "mlp_bias", part),
        tie_word_embeddings=tied,
    )


_ROPE_KEYS = frozenset(
    {
        *("rope_type", "type", "rope_theta", "partial_rotary_factor", "factor"),
        *("low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    }
)


def _rope(section: Mapping[str, Any], part: str) -> RopeConfig:
    """Read `rope_parameters` (transformers 5), or `rope_theta` with `rope_scaling` (before).

    Where both are there, transformers takes `rope_scaling` alone.
    """
    for key in ("rope_parameters", "rope_scaling"):
        if not isinstance(section.get(key, {}), Mapping):
            raise TrioError(f"{_name(key, part)} must be an object")
    parameters = given(section.get("rope_scaling") or section.get("rope_parameters") or {})
    theta = real_of({"rope_theta": section["rope_theta"], **parameters}, "rope_theta", part)
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    partial = parameters.get("partial_rotary_factor", section.get("partial_rotary_factor", 1.0))
    if isinstance(partial, bool) or partial != 1:
        raise TrioError(
            f"{_name('partial_rotary_factor', part)} {brief(partial)} is not supported: 1 is"
        )
    unknown = parameters.keys() - _ROPE_KEYS
    if unknown and kind in ("default", "linear", "llama3"):
        raise TrioError(
            f"config.json: {brief(min(unknown))} among the rope parameters is not supported: the "
            "positions would come out otherwise than the model was trained with"
        )
    try:
        if kind == "default":
            return RopeConfig(theta)
        if kind == "linear":
            return RopeConfig(theta, "linear", factor=real_of(parameters, "factor", part))
        if kind == "llama3":
            return _llama3(parameters, theta, part)
    except KeyError as error:
        raise TrioError(f"config.json: rope type {kind!r} needs {error.args[0]!r}") from None
    raise TrioError(
        f"config.json: rope_type {brief(kind)} is not supported: default, linear and llama3 are"
    )


def _llama3(parameters: Mapping[str, Any], theta: float, part: str) -> RopeConfig:
    low = real_of(parameters, "low_freq_factor", part)
    high = real_of(parameters, "high_freq_factor", part)
    if low >= high:
        raise TrioError(
            f"{_name('low_freq_factor', part)} {low:g} must be below high_freq_factor {high:g}"
        )
    return RopeConfig(
        theta,
        "llama3",
        factor=real_of(parameters, "factor", part),
        low_freq_factor=low,
        high_freq_factor=high,
        original_max_positions=count_of(parameters, "original_max_position_embeddings", part),
    )


def _pinpoints(raw: Any, vision: VisionConfig) -> tuple[tuple[int, int], ...]:
    pinpoints = canvases(raw, "config.json: image_grid_pinpoints", MAX_PIXELS)
    tile = vision.image_size
    for height, width in pinpoints:
        if height < tile or width < tile or height % tile or width % tile:
            raise TrioError(
                f"config.json: the canvas {[height, width]} in image_grid_pinpoints is not made "
                f"of whole {tile}-pixel tiles"
            )
    return pinpoints
