"""Weights of a graph as views of one memory map a file, shared by all graphs that use them.

ONNX Runtime maps a weight file once a session. Handing every session the same mapped tensors keeps
one mapping instead. Where each tensor lies is read from the graph itself; since the runtime does
without the `onnx` package, the few protobuf fields that say so are walked through by hand
(onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto fields below).
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from trio_deploy.errors import TrioError

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL = 1, 2, 8, 13
_DTYPES = {
    1: np.dtype(np.float32),
    10: np.dtype(np.float16),
    16: np.dtype(ml_dtypes.bfloat16),
}


@dataclass(frozen=True)
class External:
    """Where one initializer's data lie: file relative to the graph's folder, offset in bytes."""

    file: str
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype


def external_tensors(graph: Path) -> dict[str, External]:
    """The initializers of a graph file whose data lie in other files.

    Raises:
        TrioError: the file is not an ONNX model.
    """
    content = memoryview(graph.read_bytes())
    found: dict[str, External] = {}
    try:
        for field, body in _fields(content):
            if field != _GRAPH:
                continue
            for inner, tensor in _fields(_message(body)):
                if inner == _INITIALIZER:
                    found.update(_external(_message(tensor)))
    except (IndexError, ValueError, UnicodeDecodeError) as error:
        raise TrioError(f"{graph.name} is damaged: export the bundle again") from error
    return found


def _external(tensor: memoryview) -> dict[str, External]:
    dims: list[int] = []
    places: dict[str, str] = {}
    name, kind = "", 0
    for field, value in _fields(tensor):
        if field == _DIMS:
            dims += [value] if isinstance(value, int) else list(_varints(value))
        elif field == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _NAME:
            name = bytes(_message(value)).decode()
        elif field == _EXTERNAL:
            entry = {key: bytes(_message(item)).decode() for key, item in _fields(_message(value))}
            places[entry[1]] = entry[2]
    if not places or kind not in _DTYPES:
        return {}
    offset = int(places.get("offset", "0"))
    return {name: External(places["location"], offset, tuple(dims), _DTYPES[kind])}


def _fields(data: memoryview) -> Iterator[tuple[int, int | memoryview]]:
    """(field number, varint or bytes) of a protobuf message."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        wire = key & 7
        value: int | memoryview
        if wire == 0:
            value, at = _varint(data, at)
        else:
            if wire == 2:
                size, at = _varint(data, at)
            elif wire in (1, 5):
                size = 8 if wire == 1 else 4
            else:
                raise ValueError(f"wire type {wire}")
            if at + size > len(data):
                raise ValueError("a field ends beyond the file")
            value, at = data[at : at + size], at + size
        yield key >> 3, value


def _message(value: int | memoryview) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where a message belongs")
    return value


def _varints(data: memoryview) -> Iterator[int]:
    at = 0
    while at < len(data):
        value, at = _varint(data, at)
        yield value


def _varint(data: memoryview, at: int) -> tuple[int, int]:
    value = shift = 0
    while True:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7


class WeightMap:
    """Read-only views of weight files, each file mapped once."""

    def __init__(self) -> None:
        self._files: dict[Path, mmap.mmap] = {}

    def view(self, folder: Path, tensor: External) -> np.ndarray:
        """The tensor's values; offsets need no alignment.

        Raises:
            TrioError: the file is too short or outside the folder.
        """
        path = (folder / tensor.file).resolve()
        if not path.is_relative_to(folder.resolve()):
            raise TrioError(f"a graph refers to {tensor.file}, which is outside of its folder")
        if path not in self._files:
            with path.open("rb") as file:
                self._files[path] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        count = int(np.prod(tensor.shape, dtype=np.int64))
        try:
            flat = np.frombuffer(self._files[path], tensor.dtype, count, tensor.offset)
        except ValueError as error:
            raise TrioError(f"{tensor.file} is too short: copy the bundle again") from error
        return flat.reshape(tensor.shape)
