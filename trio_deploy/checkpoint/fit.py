"""What config.json says against the tensors that a checkpoint holds.

Where the two contradict each other the tensors decide, as in transformers 5, or the checkpoint is
refused.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from trio_deploy.checkpoint.checkpoint import Checkpoint, WeightEntry
from trio_deploy.checkpoint.safetensors import TensorEntry, header_bytes
from trio_deploy.errors import TrioError
from trio_deploy.families.base import OUTSIDE_GRAPHS, ModelConfig, VisionConfig
from trio_deploy.families.names import EMBEDDINGS, HEAD, canonical_name, refuse_adapters
from trio_deploy.families.registry import family_of

_LAYER = re.compile(r"(.+?\.(?:layers|blocks))\.(\d+)\.")
_TOWER_LAYER = re.compile(r"vision_tower\.encoder\.layers\.(\d+)\.")
# Buffers that older releases saved, and that every model makes itself.
_BUFFERS = ("position_ids", "rotary_emb.inv_freq")
_CHUNK = 1 << 22


class CheckpointInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """The checkpoint that a bundle was made from, so that the two can be compared later.

    Attributes:
        config: SHA-256 of config.json.
        headers: SHA-256 of the header of each .safetensors file, by the file's name.
        tied: whether the embeddings serve as the output head, as the tensors decided.
        unused: names of the tensors that a model of this config.json has no use for.
    """

    config: str
    headers: dict[str, str]
    tied: bool
    unused: tuple[str, ...] = ()


def fit_config(checkpoint: Checkpoint, config: ModelConfig) -> ModelConfig:
    """The configuration as the tensors have it: with an output head of its own, or tied.

    As transformers 5 does it, embeddings serve as the head where config.json ties them, unless
    the weights hold a head with other values: then that head is used. Where config.json does not
    tie them, a head must be there.

    Args:
        config: of the checkpoint's config.json.

    Raises:
        TrioError: the weights have fewer layers than config.json says, no head, or adapters that
            were not merged.
    """
    refuse_adapters(checkpoint.tensors)
    family = family_of(checkpoint.config)
    tensors = {canonical_name(family, name): entry for name, entry in checkpoint.weights.items()}
    _check_layers(tensors, config)
    head, table = tensors.get(HEAD), tensors.get(EMBEDDINGS)
    if not config.text.tie_word_embeddings:
        if head is None and table is not None:
            raise TrioError(
                f"{checkpoint.path} has no lm_head.weight, and its config.json does not say that "
                "the embeddings serve as the output head: set tie_word_embeddings to true at the "
                "top of config.json if the model was trained so, else download the weights again"
            )
        return config
    own = head is not None and table is not None and not _same_values(head, table)
    return config.with_tied_head(not own)


def first_difference(planned: Any, given: Any, prefix: str = "") -> str | None:
    """Describe the first field in which two configurations need different graphs.

    Args:
        planned: of a bundle.
        given: of a checkpoint.
    """
    for item in fields(planned):
        ours, theirs = getattr(planned, item.name), getattr(given, item.name)
        if ours == theirs or item.name in OUTSIDE_GRAPHS:
            continue
        if hasattr(ours, "__dataclass_fields__") and type(ours) is type(theirs):
            if inner := first_difference(ours, theirs, f"{prefix}{item.name}."):
                return inner
            continue
        if item.name == "tie_word_embeddings":
            return f"the output head is {_head(theirs)} there and {_head(ours)} in the bundle"
        return f"{prefix}{item.name} is {theirs} there and {ours} in the bundle"
    return None


def _head(tied: bool) -> str:
    return "the embeddings" if tied else "a tensor of its own"


def describe_checkpoint(
    checkpoint: Checkpoint, config: ModelConfig, used: Collection[str]
) -> CheckpointInfo:
    """What a bundle records of its checkpoint.

    Args:
        config: as `fit_config` returns it.
        used: canonical names of the tensors that graphs use.
    """
    return CheckpointInfo(
        config=hashlib.sha256((checkpoint.path / "config.json").read_bytes()).hexdigest(),
        headers=header_digests(checkpoint),
        tied=config.text.tie_word_embeddings,
        unused=unused_tensors(checkpoint, config, used),
    )


def header_digests(checkpoint: Checkpoint) -> dict[str, str]:
    """SHA-256 of the header of each .safetensors file, by the file's name."""
    files: set[Path] = {entry.file for entry in checkpoint.tensors.values()}
    return {
        file.name: hashlib.sha256(header_bytes(file)).hexdigest()
        for file in sorted(files, key=lambda file: file.name)
    }


def unused_tensors(
    checkpoint: Checkpoint, config: ModelConfig, used: Collection[str]
) -> tuple[str, ...]:
    """Names of the tensors that a model of this configuration has no use for.

    What every checkpoint holds besides is left out: buffers, the layers of the tower above those
    whose features are read with the norm behind them, and a head that equals the embeddings.
    """
    known = {*used, HEAD, EMBEDDINGS}
    family = family_of(checkpoint.config)
    names = {name: canonical_name(family, name) for name in checkpoint.weights}
    unused = (
        name
        for name, canonical in names.items()
        if canonical not in known and not name.endswith(_BUFFERS) and not _unread(canonical, config)
    )
    return tuple(sorted(unused))


def _unread(name: str, config: ModelConfig) -> bool:
    """Whether a tensor belongs to the part of the vision tower behind the features."""
    if not isinstance(config.vision, VisionConfig):
        return False
    layer = _TOWER_LAYER.match(name)
    if layer is not None:
        return max(config.vision.feature_layers) <= int(layer[1]) < config.vision.num_layers
    return name.startswith("vision_tower.post_layernorm.")


def _check_layers(names: Collection[str], config: ModelConfig) -> None:
    """Raises TrioError where the weights lack layers; before anything is made for each of them."""
    tower, read = config.vision.layers_read
    parts = {
        "language_model.layers": (config.text.num_layers, "text_config"),
        tower: (read, "vision_config"),
    }
    held = dict.fromkeys(parts, 0)
    for name in names:
        if (layer := _LAYER.match(name)) is not None and layer[1] in held:
            held[layer[1]] = max(held[layer[1]], int(layer[2]) + 1)
    for model, (needed, part) in parts.items():
        if held[model] and needed > held[model]:
            raise TrioError(
                f"config.json asks for {needed} layers in {part}, but the weights hold "
                f"{held[model]} of {model.rpartition('.')[0]}: the two do not belong together, or "
                "the download is incomplete"
            )


def _same_values(one: WeightEntry, other: WeightEntry) -> bool:
    """Whether two weights are float tensors that are equal to the byte."""
    if not (isinstance(one, TensorEntry) and isinstance(other, TensorEntry)):
        return False
    if (one.dtype, one.shape) != (other.dtype, other.shape):
        return False
    with one.file.open("rb") as first, other.file.open("rb") as second:
        first.seek(one.offset)
        second.seek(other.offset)
        left = one.nbytes
        while left:
            size = min(left, _CHUNK)
            if first.read(size) != second.read(size):
                return False
            left -= size
    return True
