"""A checkpoint read for graphs: its configuration and the tensors that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trio_deploy.checkpoint.checkpoint import Checkpoint, WeightEntry
from trio_deploy.checkpoint.fit import CheckpointInfo, describe_checkpoint, fit_config
from trio_deploy.checkpoint.folder import refuse_adapter
from trio_deploy.checkpoint.safetensors import TensorEntry
from trio_deploy.errors import TrioError
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors

_NAMED = 4  # unused tensors that a note names


@dataclass(frozen=True)
class ReadCheckpoint:
    """A checkpoint whose config.json and tensors fit each other.

    Attributes:
        config: as the tensors have it.
        tensors: canonical name → tensor, for those that graphs use.
        info: what a bundle records of it.
        notes: what a user should know of it, a sentence each.
    """

    config: ModelConfig
    tensors: Mapping[str, TensorEntry]
    info: CheckpointInfo
    notes: tuple[str, ...]


def read_checkpoint(folder: Path) -> ReadCheckpoint:
    """Read config.json and the headers of the weights, and compare the two.

    Raises:
        TrioError: a file is missing or damaged, an adapter is not merged, or config.json and the
            tensors contradict each other in a way that transformers does not resolve.
    """
    refuse_adapter(folder)
    checkpoint = Checkpoint.from_path(folder)
    said = parse_config(checkpoint.config)
    config = fit_config(checkpoint, said)
    shapes = canonical_tensors(config)
    tensors = _floats(checkpoint.verify(shapes))
    info = describe_checkpoint(checkpoint, config, shapes)
    notes = []
    if said.text.tie_word_embeddings and not config.text.tie_word_embeddings:
        notes.append(
            "config.json ties the output head to the embeddings, but the weights hold a head "
            "with other values: that head is used, as transformers does"
        )
    if info.unused:
        more = f" and {len(info.unused) - _NAMED} more" if len(info.unused) > _NAMED else ""
        notes.append(
            "config.json has no use for these tensors of the checkpoint, which are left out, as "
            f"transformers does: {', '.join(info.unused[:_NAMED])}{more}"
        )
    return ReadCheckpoint(config, tensors, info, tuple(notes))


def _floats(weights: Mapping[str, WeightEntry]) -> dict[str, TensorEntry]:
    """Weights that are all float.

    Raises:
        TrioError: one is quantised, which cannot be exported yet.
    """
    floats = {name: entry for name, entry in weights.items() if isinstance(entry, TensorEntry)}
    if len(floats) < len(weights):
        raise TrioError(
            "the checkpoint is quantised, which cannot be exported yet: use the fp32, fp16 or bf16 "
            "checkpoint it was made from"
        )
    return floats
