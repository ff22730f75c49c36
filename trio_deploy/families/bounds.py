"""The numbers in config.json and preprocessor_config.json: least and greatest value of each.

The bounds lie far beyond any model's values. They are there so that a damaged or hostile file is
refused by the name of its key before anything is made in the sizes it gives.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from trio_deploy.errors import TrioError
from trio_deploy.files import brief

#: Whole numbers by key, in whatever section of config.json it stands.
WHOLE: Mapping[str, tuple[int, int]] = {
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "num_hidden_layers": (1, 512),
    "num_attention_heads": (1, 4096),
    "num_key_value_heads": (1, 4096),
    "head_dim": (1, 4096),
    "vocab_size": (1, 1 << 22),
    "max_position_embeddings": (1, 1 << 30),
    "original_max_position_embeddings": (1, 1 << 30),
    "sliding_window": (1, 1 << 30),
    "image_size": (1, 8192),
    "patch_size": (1, 8192),
    "num_channels": (1, 1 << 10),
}

#: Whole numbers in the vision_config of a tower of patches, likewise.
PATCH_TOWER: Mapping[str, tuple[int, int]] = {
    "depth": (1, 512),
    "embed_dim": (1, 1 << 16),
    "hidden_size": (1, 1 << 16),
    "intermediate_size": (1, 1 << 20),
    "mlp_ratio": (1, 64),
    "num_heads": (1, 4096),
    "in_channels": (1, 1 << 10),
    "patch_size": (1, 1024),
    "spatial_merge_size": (1, 16),
    "temporal_patch_size": (1, 16),
    "out_hidden_size": (1, 1 << 16),
    "window_size": (1, 1 << 16),
    "num_position_embeddings": (1, 1 << 20),
}

#: Real numbers by key, likewise.
REAL: Mapping[str, tuple[float, float]] = {
    "rms_norm_eps": (1e-20, 1.0),
    "layer_norm_eps": (1e-20, 1.0),
    "rope_theta": (1.0, 1e12),
    "factor": (1e-3, 1e6),
    "low_freq_factor": (1e-3, 1e6),
    "high_freq_factor": (1e-3, 1e6),
}

#: Keys that are true or false.
FLAGS = ("attention_bias", "mlp_bias", "multimodal_projector_bias", "tie_word_embeddings")

#: Real numbers of preprocessor_config.json; sides of images are bounded as `image_size`.
IMAGE: Mapping[str, tuple[float, float]] = {
    "rescale_factor": (1e-9, 1e3),
    "image_mean": (0.0, 1e3),
    "image_std": (1e-6, 1e3),
}

MAX_PATCHES = 512  # along one side of a tile
MAX_CANVASES = 256
MAX_CANVAS_SIDE = 1 << 15


def whole(value: Any, name: str, bounds: tuple[int, int]) -> int:
    """A whole number within bounds.

    Args:
        name: of the key, with the file and section for the message.

    Raises:
        TrioError: it is no whole number, or out of bounds.
    """
    least, most = bounds
    if isinstance(value, bool) or not isinstance(value, int) or not least <= value <= most:
        raise TrioError(f"{name} must be a whole number from {least} to {most}, not {brief(value)}")
    return value


def real(value: Any, name: str, bounds: tuple[float, float]) -> float:
    """A finite number within bounds.

    Raises:
        TrioError: it is no number, or out of bounds (as what is not finite is).
    """
    least, most = bounds
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not least <= value <= most:
        raise TrioError(f"{name} must be a number from {least:g} to {most:g}, not {brief(value)}")
    return float(value)


def flag(value: Any, name: str) -> bool:
    """True or false.

    Raises:
        TrioError: it is neither; a word or a number does not stand for one.
    """
    if not isinstance(value, bool):
        raise TrioError(f"{name} must be true or false, not {brief(value)}")
    return value


def canvases(raw: Any, name: str, area: int) -> tuple[tuple[int, int], ...]:
    """(height, width) of the canvases of any-resolution tiling.

    Args:
        area: pixels of a canvas, at most.

    Raises:
        TrioError: they are no list of pairs, too many, or too large.
    """
    pairs = isinstance(raw, Sequence) and all(
        isinstance(pair, Sequence) and len(pair) == 2 for pair in raw
    )
    if not pairs or isinstance(raw, str):
        raise TrioError(f"{name} must be a list of [height, width] pairs, not {brief(raw)}")
    if not 0 < len(raw) <= MAX_CANVASES:
        raise TrioError(f"{name} must have from 1 to {MAX_CANVASES} pairs: it {_has(len(raw))}")
    found = tuple(
        (whole(pair[0], name, (1, MAX_CANVAS_SIDE)), whole(pair[1], name, (1, MAX_CANVAS_SIDE)))
        for pair in raw
    )
    for height, width in found:
        if height * width > area:
            raise TrioError(f"{name} has a canvas of {height} x {width}, more than {area} pixels")
    return found


def _has(count: int) -> str:
    return f"has {count}" if count else "is empty"
