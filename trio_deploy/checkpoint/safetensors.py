"""Where each tensor of a checkpoint folder lies in its .safetensors files.

The headers are read here (eight bytes of length, then JSON), so that neither the safetensors
package nor torch is needed, and no weight byte is touched. Format:
the README of the safetensors package.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trio_deploy.checkpoint.folder import has_file, read_object
from trio_deploy.errors import TrioError
from trio_deploy.files import brief, parse_json

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"

#: Longest header that is read, in bytes: the limit of the safetensors package itself.
MAX_HEADER = 100_000_000

#: safetensors' names of the types that weights may have → numpy's.
DTYPES: dict[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "F16": np.dtype("<f2"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}

#: The same of the whole numbers that quantised checkpoints hold.
INTEGERS: dict[str, np.dtype[Any]] = {
    "I64": np.dtype("<i8"),
    "I32": np.dtype("<i4"),
    "I8": np.dtype("i1"),
}

_MAX_VALUES = 4_000_000  # in a header: ten a tensor
_MAX_RANK = 64
_REMEDY = "download it again"

#: Bits an element, for checking the lengths of tensors we have no other use for.
_BITS = {
    "F64": 64,
    "F32": 32,
    "F16": 16,
    "BF16": 16,
    "I64": 64,
    "I32": 32,
    "I16": 16,
    "I8": 8,
    "U64": 64,
    "U32": 32,
    "U16": 16,
    "U8": 8,
    "BOOL": 8,
    "F8_E4M3": 8,
    "F8_E5M2": 8,
}


@dataclass(frozen=True)
class TensorEntry:
    """Where a tensor lies.

    Attributes:
        file: the .safetensors file (in a Hugging Face cache, a symbolic link to it).
        offset: first byte, counted from the start of the file.
        nbytes: length in bytes.
        dtype: as safetensors calls it; `F32`, `F16` or `BF16` for float weights.
    """

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str

    def read(self) -> np.ndarray:
        """Read the tensor whole: of a type in `DTYPES` or `INTEGERS`."""
        kind = DTYPES.get(self.dtype) or INTEGERS[self.dtype]
        with self.file.open("rb") as stream:
            stream.seek(self.offset)
            raw = stream.read(self.nbytes)
        if len(raw) < self.nbytes:
            raise TrioError(f"{self.file} is truncated: {_REMEDY}")
        return np.frombuffer(raw, kind).reshape(self.shape)


def read_header(file: Path) -> dict[str, TensorEntry]:
    """The tensors of one .safetensors file, checked against the file's length.

    Raises:
        TrioError: not a .safetensors file, a corrupt or oversized header, or a truncated file.
    """
    raw = header_bytes(file)
    header = parse_json(raw[8:], f"the header of {file}", _REMEDY, values=_MAX_VALUES)
    if not isinstance(header, dict):
        raise TrioError(f"{file} has a corrupt header, which is not a JSON object: {_REMEDY}")
    return _entries(file, header, len(raw), file.stat().st_size)


def header_bytes(file: Path) -> bytes:
    """The length and the JSON text that a .safetensors file begins with.

    Raises:
        TrioError: not a .safetensors file, or one that ends before its header does.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            start = stream.read(8)
            if start.startswith(b"version "):
                raise TrioError(
                    f"{file} is a Git LFS pointer, not the weights: fetch them with `git lfs pull`"
                )
            if len(start) < 8:
                raise TrioError(f"{file} is truncated at {size} bytes: {_REMEDY}")
            (length,) = struct.unpack("<Q", start)
            if length > MAX_HEADER:
                raise TrioError(
                    f"{file} is not a .safetensors file, since its header would be {length} bytes "
                    f"long: {_REMEDY}"
                )
            if 8 + length > size:
                raise TrioError(
                    f"{file} is truncated, since its header alone ends at byte {8 + length}, the "
                    f"file at byte {size}: {_REMEDY}"
                )
            return start + stream.read(length)
    except OSError as error:
        raise TrioError(f"{file} cannot be read: {error.strerror or error}") from error


def _entries(file: Path, header: dict[str, Any], data: int, size: int) -> dict[str, TensorEntry]:
    entries: dict[str, TensorEntry] = {}
    for name, raw in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = raw["dtype"], tuple(raw["shape"])
            begin, end = raw["data_offsets"]
            numbers = all(type(x) is int and 0 <= x < 2**63 for x in (*shape, begin, end))
            whole = isinstance(dtype, str) and len(shape) <= _MAX_RANK and numbers
        except (KeyError, TypeError, ValueError):
            whole = False
        if not whole or begin > end:
            raise TrioError(
                f"{file} has a corrupt header, with a bad entry for tensor {name!r}: {_REMEDY}"
            )
        if dtype in _BITS and (end - begin) * 8 != math.prod(shape) * _BITS[dtype]:
            raise TrioError(
                f"{file} has a corrupt header, since tensor {name!r} of type {dtype} and shape "
                f"{list(shape)} cannot have {end - begin} bytes: {_REMEDY}"
            )
        if data + end > size:
            raise TrioError(
                f"{file} is truncated, since tensor {name!r} ends at byte {data + end}, the file "
                f"at byte {size}: {_REMEDY}"
            )
        entries[name] = TensorEntry(file, data + begin, end - begin, shape, dtype)
    _check_overlap(file, entries)
    return entries


def _check_overlap(file: Path, entries: Mapping[str, TensorEntry]) -> None:
    last, end = "", 0
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < end:
            raise TrioError(
                f"{file} has a corrupt header, in which {name!r} and {last!r} overlap: {_REMEDY}"
            )
        last, end = name, entry.offset + entry.nbytes


def missing_weights(folder: Path) -> list[str]:
    """Names of the weight files that a folder lacks.

    Raises:
        TrioError: the index of the weights is damaged, or a file is a link that leads nowhere.
    """
    if has_file(folder / SINGLE):
        return []
    index = read_object(folder / INDEX)
    if index is None:
        return [SINGLE]
    shards = set(_weight_map(folder, index).values())
    return sorted(shard for shard in shards if not has_file(folder / shard))


def read_headers(folder: Path) -> dict[str, TensorEntry]:
    """Read the headers of the weights, and take from them what transformers takes.

    The single file comes before the index. Of an index, each listed shard counts as a whole, with
    tensors that the index does not name; a tensor that two shards hold comes from the later name.

    Raises:
        TrioError: there are no weights, a shard is missing, or a file is corrupt or shorter than
            its header says.
    """
    single = folder / SINGLE
    if has_file(single):
        return read_header(single)
    index = read_object(folder / INDEX)
    if index is None:
        others = [p.name for p in sorted(folder.iterdir()) if p.suffix in (".bin", ".pth", ".pt")]
        remedy = (
            f"convert {others[0]} with transformers' `save_pretrained`"
            if others
            else "download the weights"
        )
        raise TrioError(
            f"{folder} has no weights, since neither {SINGLE} nor {INDEX} is there: {remedy}"
        )
    weight_map = _weight_map(folder, index)
    tensors: dict[str, TensorEntry] = {}
    for shard, name in sorted({shard: name for name, shard in weight_map.items()}.items()):
        tensors |= _shard(folder, shard, name)
    for name, shard in weight_map.items():
        if name not in tensors:
            raise TrioError(
                f"{folder / shard} lacks tensor {name!r}, which {INDEX} says it has: {_REMEDY}"
            )
    return tensors


def _weight_map(folder: Path, index: Mapping[str, Any]) -> dict[str, str]:
    """Tensor → shard, as the index says."""
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise TrioError(f"{folder / INDEX} has no weight_map: {_REMEDY}")
    for tensor, shard in weight_map.items():
        if not _is_name(shard):
            raise TrioError(
                f"tensor {brief(tensor)} of {folder / INDEX} points to {brief(shard)}, which is "
                f"not the name of a file in the folder: {_REMEDY}"
            )
    return weight_map


def _is_name(value: Any) -> bool:
    """Whether a value is the name of a file in the folder."""
    text = isinstance(value, str) and "\0" not in value and value != ".."
    return text and bool(value) and Path(value).name == value


def _shard(folder: Path, shard: str, tensor: str) -> dict[str, TensorEntry]:
    file = folder / shard
    if not has_file(file):
        raise TrioError(
            f"shard {shard} is missing from {folder}, and tensor {tensor!r} is in it: {_REMEDY}"
        )
    return read_header(file)
