"""A checkpoint read for graphs: its configuration and the tensors that they use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from trio_deploy.checkpoint.checkpoint import Checkpoint, WeightEntry
from trio_deploy.checkpoint.fit import CheckpointInfo, describe_checkpoint, fit_config
from trio_deploy.checkpoint.folder import refuse_adapter
from trio_deploy.checkpoint.quantised import QuantisedEntry
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.quant.schemes import StoredMatrix

_NAMED = 4  # unused tensors that a note names


@dataclass(frozen=True)
class ReadCheckpoint:
    """A checkpoint whose config.json and tensors fit each other.

    Attributes:
        config: as the tensors have it.
        tensors: canonical name → weight, for those that graphs use.
        stored: matrices of decoder layers and the head that are quantised, by canonical name;
            None: there are none.
        info: what a bundle records of it.
        notes: what a user should know of it, a sentence each.
    """

    config: ModelConfig
    tensors: Mapping[str, WeightEntry]
    stored: Mapping[str, StoredMatrix] | None
    info: CheckpointInfo
    notes: tuple[str, ...]

    @property
    def form(self) -> str | None:
        """The form of quantised matrices; None: there are none."""
        entries = (e for e in self.tensors.values() if isinstance(e, QuantisedEntry))
        return next((entry.form.source for entry in entries), None)


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
    tensors = checkpoint.verify(shapes)
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
    return ReadCheckpoint(config, tensors, checkpoint.stored, info, tuple(notes))
