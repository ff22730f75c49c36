"""A Hugging Face checkpoint folder: its config.json and its weights, float and quantised."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

from trio_deploy.checkpoint.folder import read_object
from trio_deploy.checkpoint.quantised import QuantisedEntry, weights_of
from trio_deploy.checkpoint.safetensors import DTYPES, TensorEntry, read_headers
from trio_deploy.errors import TrioError
from trio_deploy.families.names import (
    EMBEDDINGS,
    HEAD,
    LAYERS,
    canonical_name,
    map_checkpoint_names,
)
from trio_deploy.families.registry import family_of
from trio_deploy.files import is_folder
from trio_deploy.quant.quantization_config import read_quantization_config
from trio_deploy.quant.schemes import StoredMatrix

WeightEntry = TensorEntry | QuantisedEntry
"""A weight of a checkpoint: a float tensor, or a quantised matrix."""


class Checkpoint:
    """A folder as `save_pretrained` writes it or the hub delivers it.

    Attributes:
        path: the folder.
        tensors: name in the checkpoint → where it lies.
        config: config.json.
    """

    def __init__(
        self, path: Path, tensors: Mapping[str, TensorEntry], config: Mapping[str, Any]
    ) -> None:
        self.path = path
        self.tensors = dict(tensors)
        self.config = dict(config)

    @classmethod
    def from_path(cls, folder: str | Path) -> Checkpoint:
        """Read config.json and the headers of all weight files.

        Raises:
            TrioError: the folder, config.json, or a shard is missing; a file is corrupt or
                shorter than its header says; or there are no .safetensors weights.
        """
        folder = Path(folder)
        if not is_folder(folder):
            raise TrioError(f"there is no checkpoint folder at {folder}: correct the path")
        config = read_object(folder / "config.json")
        if config is None:
            raise TrioError(
                f"{folder} is not a checkpoint, since it has no config.json: pass the folder of one"
            )
        return cls(folder, read_headers(folder), config)

    @cached_property
    def weights(self) -> dict[str, WeightEntry]:
        """Weights by name: the tensors, those of a quantised matrix as one weight.

        Raises:
            TrioError: tensors of a quantised matrix are missing or contradict each other or
                config.json, or their form cannot be read.
        """
        return weights_of(self.tensors, read_quantization_config(self.config))

    @property
    def stored(self) -> dict[str, StoredMatrix] | None:
        """Quantised matrices of decoder layers and the head by canonical name; None: none are.

        Where there is no head of its own, the embeddings are it.
        """
        family = family_of(self.config)
        named = {canonical_name(family, name): entry for name, entry in self.weights.items()}
        head = HEAD if HEAD in named else EMBEDDINGS
        found = {
            name: StoredMatrix(entry.bits, entry.block, entry.symmetric)
            for name, entry in named.items()
            if isinstance(entry, QuantisedEntry) and (name == head or name.startswith(LAYERS))
        }
        return found or None

    def verify(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, WeightEntry]:
        """Check that the weights a model needs are there, of the right shape and a usable type.

        Types may differ from weight to weight: a bundle has one float type, and converts to it.

        Args:
            shapes: canonical name → shape of each weight that the graphs use.

        Returns:
            canonical name → the weight, in the order of `shapes`.

        Raises:
            TrioError: naming the file and the tensor.
        """
        names = map_checkpoint_names(family_of(self.config), self.weights, shapes)
        found: dict[str, WeightEntry] = {}
        for canonical, name in names.items():
            entry = self.weights[name]
            if isinstance(entry, TensorEntry) and entry.dtype not in DTYPES:
                raise TrioError(
                    f"tensor {name!r} in {entry.file} is {entry.dtype}, and weights must be F32, "
                    "F16 or BF16: use the checkpoint before quantisation"
                )
            if entry.shape != shapes[canonical]:
                raise TrioError(
                    f"tensor {name!r} in {entry.file} has shape {list(entry.shape)}, but "
                    f"config.json asks for {list(shapes[canonical])}: download both again, since "
                    "they do not belong together"
                )
            found[canonical] = entry
        return found
