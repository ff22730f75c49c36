"""Layout of a bundle's weight files, and how they are written.

Two layouts exist. *Kept*: the checkpoint's own .safetensors files, whole, copied or hard-linked.
*Planned*: files of our own, whose offsets follow from names, shapes and dtype alone, so that graphs
can be written before any weight is at hand. Tensors are never transposed. Graphs refer to a tensor
by file, offset and length; ONNX Runtime and OpenVINO take any byte offset (odd ones are tested).
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import struct
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from trio_deploy.bundle.manifest import WEIGHTS, TensorPlace
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.checkpoint import WeightEntry
from trio_deploy.checkpoint.quantised import QuantisedEntry
from trio_deploy.checkpoint.safetensors import DTYPES as NUMPY_DTYPES
from trio_deploy.checkpoint.safetensors import TensorEntry
from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import dequantised
from trio_deploy.quant.narrow_floats import greatest, scale_of_matrix
from trio_deploy.quant.schemes import coded_part, encode, stored_arrays
from trio_deploy.quant.stored_weight import Part, StoredWeight

Progress = Callable[[int], object]
"""Called with the number of bytes processed since the last call."""

SAFETENSORS = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}
DTYPES = {code: name for name, code in SAFETENSORS.items()}
_CODES = {**SAFETENSORS, "uint8": "U8", "int8": "I8", "float8_e4m3fn": "F8_E4M3"}
_CHUNK = 1 << 24
_SHARD = 4_000_000_000  # below the 4 GiB that FAT file systems can hold in a file
_ALIGN = 64


def byte_bar(total: int, title: str, shown: bool = True) -> Any:
    """Return a progress bar of bytes, shown on a terminal; its `update` is a `Progress`."""
    return tqdm(
        total=total,
        unit="B",
        unit_scale=True,
        unit_divisor=1024,
        desc=title,
        disable=None if shown else True,
    )


@dataclass(frozen=True)
class PartSource:
    """What a part is made from.

    Attributes:
        entry: the checkpoint's tensor, or its quantised matrix.
        weight: the weight that the part belongs to, if it is quantised.
    """

    entry: WeightEntry
    weight: StoredWeight | None = None


@dataclass(frozen=True)
class Shard:
    """One planned file: its header's bytes and its parts in the order of their data."""

    file: str
    header: bytes
    names: tuple[str, ...]
    size: int


@dataclass(frozen=True)
class Layout:
    """A planned layout; `places` by name of the part, in the order of the files."""

    shards: tuple[Shard, ...]
    places: dict[str, TensorPlace]

    @property
    def nbytes(self) -> int:
        """Bytes of all files together."""
        return sum(shard.size for shard in self.shards)


def plan_layout(parts: Sequence[Part], shard_bytes: int = _SHARD) -> Layout:
    """Lay the parts of weights out in safetensors files, deterministically.

    Args:
        parts: names differ; the order is kept.
        shard_bytes: a file is closed before a part that would take its data beyond this.
    """
    groups: list[list[Part]] = [[]]
    filled = 0
    for part in parts:
        if groups[-1] and filled + part.nbytes > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(part)
        filled += part.nbytes
    shards: list[Shard] = []
    places: dict[str, TensorPlace] = {}
    for number, group in enumerate(groups, start=1):
        file = f"{WEIGHTS}/model-{number:05}-of-{len(groups):05}.safetensors"
        entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
        end = 0
        starts: list[int] = []
        for part in group:
            starts.append(end)
            end += part.nbytes
            dtype, shape = coded_part(part)
            entries[part.name] = {
                "dtype": _CODES[dtype],
                "shape": list(shape),
                "data_offsets": [starts[-1], end],
            }
        text = json.dumps(entries, separators=(",", ":")).encode()
        text += b" " * (-(len(text) + 8) % _ALIGN)
        header = struct.pack("<Q", len(text)) + text
        for part, start in zip(group, starts, strict=True):
            places[part.name] = TensorPlace(
                file, len(header) + start, part.nbytes, part.shape, part.dtype
            )
        names = tuple(part.name for part in group)
        shards.append(Shard(file, header, names, len(header) + end))
    return Layout(tuple(shards), places)


def write_layout(
    writer: BundleWriter,
    layout: Layout,
    sources: Mapping[str, PartSource],
    progress: Progress = lambda count: None,
) -> None:
    """Write a planned layout from a checkpoint, converting or quantising tensors.

    Memory stays at a few chunks of 16 MiB whatever the tensors' sizes, but for a matrix that the
    checkpoint holds quantised, which is read whole. Scales are kept until they are written behind
    the codes of their matrix.

    Args:
        sources: what each part is made from, by name of the part.

    Raises:
        TrioError: the disk is too full, a value does not fit into float16, or one that is to be
            quantised is not finite; names the tensor.
    """
    writer.require_space(layout.nbytes)
    rest: dict[str, list[np.ndarray]] = {}
    for shard in layout.shards:
        digest = hashlib.sha256()
        with writer.path(shard.file).open("wb") as out:
            digest.update(shard.header)
            out.write(shard.header)
            for name in shard.names:
                for chunk in _chunks(name, sources[name], layout.places[name], rest):
                    digest.update(chunk)
                    out.write(chunk)
                    progress(len(chunk))
        writer.record(shard.file, digest.hexdigest())


def _chunks(
    name: str, source: PartSource, place: TensorPlace, rest: dict[str, list[np.ndarray]]
) -> Iterable[bytes | memoryview]:
    """The bytes of a part, in pieces.

    Args:
        rest: pieces of the parts beside codes, of the matrices whose codes were written, by name;
            taken out when they are due.
    """
    weight, entry = source.weight, source.entry
    if weight is None or weight.coding is None:
        if isinstance(entry, QuantisedEntry):  # where graphs have floats alone
            values = dequantised(entry.read())
            return [_convert(name, values, NUMPY_DTYPES[SAFETENSORS[place.dtype]])]
        return _converted(name, entry, place)
    codes, *others = (part.name for part in weight.parts)
    if name != codes:
        return (part.reshape(-1).view(np.uint8).data for part in rest.pop(name))
    if isinstance(entry, TensorEntry):
        return _quantised(entry, weight, rest)
    try:
        first, *arrays = stored_arrays(entry.read(), weight.coding)
    except TrioError as error:
        raise TrioError(f"{entry.file}: {weight.name}: {error}") from None
    rest |= {other: [array] for other, array in zip(others, arrays, strict=True)}
    return [first.reshape(-1).view(np.uint8).data]


def _quantised(
    entry: TensorEntry, weight: StoredWeight, rest: dict[str, list[np.ndarray]]
) -> Iterator[memoryview]:
    """Codes of a matrix, some rows at a time, whose scales are added to `rest`.

    A matrix with a scale of its own is read twice, first for its greatest value.
    """
    assert weight.coding is not None
    scale_of, *others = (part.name for part in weight.parts[1:])
    most, of_matrix = 0.0, None
    if others:
        for rows in _rows(entry, weight):
            with _named(entry, weight.name):
                most = max(most, greatest(rows))
        of_matrix = scale_of_matrix(most)
        rest[others[0]] = [of_matrix]
    scales = rest[scale_of] = []
    for rows in _rows(entry, weight):
        with _named(entry, weight.name):
            codes, scale = encode(rows, weight.coding, of_matrix)
        scales.append(scale)
        yield codes.reshape(-1).view(np.uint8).data


@contextlib.contextmanager
def _named(entry: TensorEntry, name: str) -> Iterator[None]:
    """Say in an error which tensor of which file it is about."""
    try:
        yield
    except TrioError as error:
        raise TrioError(f"{entry.file}: {name}: {error}") from None


def _rows(entry: TensorEntry, weight: StoredWeight) -> Iterator[np.ndarray]:
    """A float matrix of the checkpoint, some rows at a time."""
    rows, columns = weight.shape
    kind = NUMPY_DTYPES[entry.dtype]
    at_once = max(1, _CHUNK // (columns * 4))
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        for start in range(0, rows, at_once):
            count = min(at_once, rows - start)
            raw = file.read(count * columns * kind.itemsize)
            if len(raw) < count * columns * kind.itemsize:
                raise _truncated(entry.file, weight.name)
            yield np.frombuffer(raw, kind).reshape(count, columns)


def _truncated(file: Path, name: str) -> TrioError:
    return TrioError(f"{file} ends inside {name}: the file is truncated, download it again")


def _converted(name: str, entry: TensorEntry, place: TensorPlace) -> Iterable[bytes | memoryview]:
    source, target = NUMPY_DTYPES[entry.dtype], NUMPY_DTYPES[SAFETENSORS[place.dtype]]
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        left = entry.nbytes
        while left:
            raw = file.read(min(left, _CHUNK))
            if not raw:
                raise _truncated(entry.file, name)
            left -= len(raw)
            yield raw if source == target else _convert(name, np.frombuffer(raw, source), target)


def _convert(name: str, values: np.ndarray, target: np.dtype) -> memoryview:
    wide = values.astype(np.float32, copy=False)
    with np.errstate(over="ignore"):
        narrow = wide.astype(target, copy=False)
    if target == np.float16 and bool((np.isinf(narrow) & np.isfinite(wide)).any()):
        raise TrioError(
            f"{name} holds {np.abs(wide[np.isfinite(wide)]).max():.4g}, more than float16 can "
            "(65504): export with --dtype float32 or bfloat16"
        )
    return narrow.view(np.uint8).data


def dtype_of(entry: WeightEntry) -> str:
    """Float type of a checkpoint's weight; of a quantised matrix the name of its form."""
    return entry.form.source if isinstance(entry, QuantisedEntry) else DTYPES[entry.dtype]


def kept_places(sources: Mapping[str, TensorEntry]) -> dict[str, TensorPlace]:
    """References into the checkpoint's own files, as `keep_files` puts them into the bundle."""
    return {
        name: TensorPlace(
            f"{WEIGHTS}/{entry.file.name}",
            entry.offset,
            entry.nbytes,
            tuple(entry.shape),
            DTYPES[entry.dtype],
        )
        for name, entry in sources.items()
    }


@dataclass(frozen=True)
class Kept:
    """Result of `keep_files`: number of files hard-linked, and bytes written."""

    linked: int
    written: int


def keep_files(
    writer: BundleWriter,
    files: Iterable[Path],
    link: bool,
    progress: Progress = lambda count: None,
) -> Kept:
    """Put whole checkpoint files into `weights/`: as hard links, reflinks or copies.

    A linked file gets a checksum only where its name in the Hugging Face cache is one.

    Raises:
        TrioError: the disk is too full for the copies.
    """
    linked = written = 0
    waiting = [file.resolve() for file in sorted(set(files))]
    names = [file.name for file in sorted(set(files))]
    for index, (file, name) in enumerate(zip(waiting, names, strict=True)):
        relative = f"{WEIGHTS}/{name}"
        target = writer.path(relative)
        if link and link_file(file, target):
            linked += 1
            writer.record(relative, _name_in_cache(file))
            progress(target.stat().st_size)
        elif _reflink(file, target):
            writer.record(relative, _hash(file, progress))
        else:
            left = sum(other.stat().st_size for other in waiting[index:])
            writer.require_space(left)
            writer.record(relative, _copy(file, target, progress))
            written += target.stat().st_size
    return Kept(linked, written)


def link_file(source: Path, target: Path) -> bool:
    """Hard-link a file, links resolved; False if the file system refuses."""
    refusals = (
        errno.EPERM,
        errno.EXDEV,
        errno.EACCES,
        errno.EMLINK,
        errno.ENOSYS,
        errno.EOPNOTSUPP,
        errno.ENOTSUP,
    )
    try:
        os.link(source.resolve(), target)
    except OSError as error:
        if error.errno in refusals:
            return False
        raise
    return True


def place_file(
    source: Path, target: Path, link: bool, progress: Progress = lambda count: None
) -> None:
    """Put a file at `target`: by a hard link if asked for, else by a reflink, else by a copy.

    Where the file system has no hard links, or `target` is on another one, it is copied.
    """
    if (link and link_file(source, target)) or _reflink(source, target):
        progress(target.stat().st_size)
    else:
        _copy(source, target, progress)


def _name_in_cache(file: Path) -> str | None:
    """The Hugging Face cache names a large file by its SHA-256."""
    name = file.name
    is_hash = len(name) == 64 and all(c in "0123456789abcdef" for c in name)
    return name if is_hash and file.parent.name == "blobs" else None


def _hash(file: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _copy(file: Path, target: Path, progress: Progress) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as source, target.open("wb") as out:
        while chunk := source.read(_CHUNK):
            digest.update(chunk)
            out.write(chunk)
            progress(len(chunk))
    return digest.hexdigest()


def _reflink(file: Path, target: Path) -> bool:
    """Copies a file by sharing its blocks (Btrfs, XFS, …); False where that is not possible."""
    if sys.platform != "linux":
        return False
    import fcntl

    ficlone = 0x40049409  # _IOW(0x94, 9, int), linux/fs.h
    with file.open("rb") as source, target.open("wb") as out, contextlib.suppress(OSError):
        fcntl.ioctl(out.fileno(), ficlone, source.fileno())
        return True
    target.unlink()
    return False
