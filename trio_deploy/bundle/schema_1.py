"""Manifests of schema 1, which named stages and tensors where schema 2 describes them.

What they lack is read from stages' names and from the graphs: where each weight is stored. Since
bundles open without the `onnx` package, the few protobuf fields that say so are decoded here
(onnx.proto: ModelProto.graph = 7, GraphProto.initializer = 5, TensorProto fields below).
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from trio_deploy.bundle.manifest import (
    SCHEMA,
    Kind,
    Manifest,
    StageInfo,
    TensorInfo,
    TensorPlace,
)
from trio_deploy.bundle.roles import tensor_info
from trio_deploy.errors import TrioError
from trio_deploy.files import safe_path
from trio_deploy.quant.stored_weight import Part

_GRAPH, _INITIALIZER = 7, 5
_DIMS, _DATA_TYPE, _NAME, _EXTERNAL = 1, 2, 8, 13
_DTYPES = {1: "float32", 2: "uint8", 3: "int8", 10: "float16", 16: "bfloat16", 22: "int4"}


def upgrade(raw: dict[str, Any], folder: Path) -> Manifest:
    """Turn the JSON of a schema-1 manifest into today's structs; graphs in `folder` are read.

    Raises:
        TrioError: a key is missing or unknown, a value is of the wrong kind, or a graph is damaged.
    """
    plain = {key: value for key, value in raw.items() if key != "graphs"}
    plain["schema"] = SCHEMA
    try:
        methods = [str(point.get("method", "trio")) for point in raw["schedule"]]
        stages = [_stage(name, graph, methods) for name, graph in raw["graphs"].items()]
    except KeyError as error:
        raise TrioError(f"its key {error} is missing") from error
    except (TypeError, ValueError, AttributeError, IndexError) as error:
        raise TrioError(f"one of its values is of the wrong kind ({error})") from error
    tensors: dict[str, TensorPlace] = {}
    described = []
    for stage in stages:
        file = safe_path(folder, stage.file)
        places = external_tensors(file) if file.is_file() else {}  # a missing file is named later
        tensors |= places
        described.append({**_plain(stage), "tensors": list(places)})
    plain["stages"] = described
    plain["tensors"] = {name: _plain(place) for name, place in tensors.items()}
    return Manifest.from_json(plain)


def external_tensors(graph: Path) -> dict[str, TensorPlace]:
    """Find the initializers of a graph file whose data lie in other files.

    Raises:
        TrioError: the file is not an ONNX model.
    """
    content = memoryview(graph.read_bytes())
    found: dict[str, TensorPlace] = {}
    try:
        for field, body in _fields(content):
            if field != _GRAPH:
                continue
            for inner, tensor in _fields(_message(body)):
                if inner == _INITIALIZER:
                    found.update(_external(_message(tensor)))
    except (IndexError, KeyError, ValueError, UnicodeDecodeError) as error:
        raise TrioError(f"{graph.name} is damaged: export the bundle again") from error
    return found


def _plain(struct: StageInfo | TensorPlace) -> dict[str, Any]:
    return dict(msgspec.to_builtins(struct))


def _stage(name: str, graph: dict[str, Any], methods: list[str]) -> StageInfo:
    """A stage from its name: vision, embed, prefill_0, select_1, prefill_1, ..., decode."""
    word, _, number = name.partition("_")
    kinds: dict[str, Kind] = {
        "vision": "vision",
        "embed": "embed",
        "prefill": "prefill",
        "select": "select",
        "decode": "decode",
    }
    if word not in kinds:
        raise ValueError(f"{name} is no stage")
    kind = kinds[word]
    inputs, outputs = (
        tuple(_tensor(kind, tensor, side == "inputs") for tensor in graph[side])
        for side in ("inputs", "outputs")
    )
    layers = dict.fromkeys(tensor.layer for tensor in outputs if tensor.layer is not None)
    index = int(number) if number else None
    return StageInfo(
        name=name,
        kind=kind,
        index=index,
        layers=tuple(layers),
        method=methods[index - 1] if kind == "select" and index else None,
        file=str(graph["file"]),
        inputs=inputs,
        outputs=outputs,
    )


def _tensor(kind: Kind, raw: dict[str, Any], is_input: bool) -> TensorInfo:
    return tensor_info(
        kind, str(raw["name"]), str(raw["dtype"]), tuple(raw["shape"]), is_input=is_input
    )


def _external(tensor: memoryview) -> dict[str, TensorPlace]:
    shape: list[int] = []
    entries: dict[str, str] = {}
    name, kind = "", 0
    for field, value in _fields(tensor):
        if field == _DIMS:
            shape += [value] if isinstance(value, int) else list(_varints(value))
        elif field == _DATA_TYPE and isinstance(value, int):
            kind = value
        elif field == _NAME:
            name = bytes(_message(value)).decode()
        elif field == _EXTERNAL:
            entry = {key: bytes(_message(item)).decode() for key, item in _fields(_message(value))}
            entries[entry[1]] = entry[2]
    if not entries or kind not in _DTYPES:
        return {}
    part = Part(name, tuple(shape), _DTYPES[kind])
    offset = int(entries.get("offset", "0"))
    return {name: TensorPlace(entries["location"], offset, part.nbytes, part.shape, part.dtype)}


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
    while shift < 64:
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
    raise ValueError("a number has more than 64 bits")
