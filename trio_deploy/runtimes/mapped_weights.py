"""Weights as views of one memory map per file, shared by all graphs that use them.

ONNX Runtime maps a weight file once per session. Passing every session the same mapped tensors
keeps one mapping instead.
"""

from __future__ import annotations

import mmap
from pathlib import Path

import numpy as np

from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.errors import TrioError
from trio_deploy.files import safe_path
from trio_deploy.quant.stored_weight import FLOATS

_DTYPES = {**FLOATS, "uint8": np.dtype(np.uint8), "int8": np.dtype(np.int8)}


class WeightMap:
    """Read-only views of weight files, each file mapped once."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}

    def view(self, folder: Path, place: TensorPlace) -> np.ndarray:
        """The tensor's values; offsets need no alignment.

        Raises:
            TrioError: the file is too short or outside the folder.
        """
        path = safe_path(folder, place.file).resolve()
        if path not in self._files:
            with path.open("rb") as file:
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(place.shape, dtype=np.int64))
        try:
            flat = np.frombuffer(self._files[path], _DTYPES[place.dtype], count, place.offset)
        except ValueError as error:
            raise TrioError(f"{place.file} is too short: copy the bundle again") from error
        return flat.reshape(place.shape)
