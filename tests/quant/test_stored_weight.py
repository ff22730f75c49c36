"""Stored weights: sizes, layout by part, and that float weights lie where they always have."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from trio_deploy.bundle.weights import Layout, PartSource, plan_layout, write_layout
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.checkpoint.safetensors import TensorEntry, read_header
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.quant.stored_weight import Part, StoredWeight, float_weight, parts_of

#: A weight of two parts, between float ones: [3, 8] in blocks of 4 with a scale each.
CODES = Part("up_proj.weight.q", (3, 8), "float16")
SCALES = Part("up_proj.weight.scale", (3, 2), "float32")
WEIGHTS = [
    float_weight("norm.weight", [5], "float16"),
    StoredWeight("up_proj.weight", (3, 8), (CODES, SCALES)),
    float_weight("lm_head.weight", [2, 8], "bfloat16"),
]


def digest(layout: Layout) -> str:
    """Checksum of every header and place."""
    made = hashlib.sha256()
    for shard in layout.shards:
        made.update(repr((shard.file, shard.names, shard.size)).encode() + shard.header)
    for name, place in layout.places.items():
        fields = (name, place.file, place.offset, place.nbytes, place.shape, place.dtype)
        made.update(repr(fields).encode())
    return made.hexdigest()


def test_a_float_weight_is_one_part_of_its_own_name() -> None:
    weight = float_weight("lm_head.weight", [2, 8], "bfloat16")
    assert weight.parts == (Part("lm_head.weight", (2, 8), "bfloat16"),)
    assert weight.shape == (2, 8)


@pytest.mark.parametrize(("dtype", "size"), [("float32", 4), ("float16", 2), ("bfloat16", 2)])
def test_sizes(dtype: str, size: int) -> None:
    assert float_weight("w", [3, 8], dtype).nbytes == 24 * size
    assert Part("scalar", (), dtype).nbytes == size
    assert Part("empty", (0, 8), dtype).nbytes == 0


def test_a_weight_is_as_large_as_its_parts() -> None:
    assert [weight.nbytes for weight in WEIGHTS] == [10, 48 + 24, 32]
    assert [part.name for part in parts_of(WEIGHTS)] == [
        "norm.weight",
        CODES.name,
        SCALES.name,
        "lm_head.weight",
    ]


def test_parts_lie_one_after_another_each_in_its_type() -> None:
    layout = plan_layout(parts_of(WEIGHTS))
    start = len(layout.shards[0].header)
    assert [
        (name, place.offset - start, place.nbytes, place.shape, place.dtype)
        for name, place in layout.places.items()
    ] == [
        ("norm.weight", 0, 10, (5,), "float16"),
        (CODES.name, 10, 48, (3, 8), "float16"),
        (SCALES.name, 58, 24, (3, 2), "float32"),
        ("lm_head.weight", 82, 32, (2, 8), "bfloat16"),
    ]
    assert layout.nbytes == start + 114


def test_a_part_may_begin_a_new_file() -> None:
    layout = plan_layout(parts_of(WEIGHTS), shard_bytes=60)
    assert [shard.names for shard in layout.shards] == [
        ("norm.weight", CODES.name),
        (SCALES.name, "lm_head.weight"),
    ]


def test_written_parts_are_read_again(tmp_path: Path) -> None:
    """Each part is converted from its own source to its own type."""
    parts = parts_of(WEIGHTS)
    values = {part.name: np.arange(np.prod(part.shape), dtype=np.float32) for part in parts}
    sources = {}
    for index, part in enumerate(parts):
        file = tmp_path / f"{index}.bin"
        file.write_bytes(values[part.name].tobytes())
        entry = TensorEntry(file, 0, values[part.name].nbytes, part.shape, "F32")
        sources[part.name] = PartSource(entry)
    layout = plan_layout(parts)
    with BundleWriter(tmp_path / "bundle") as writer:
        write_layout(writer, layout, sources)
    (shard,) = layout.shards
    written = tmp_path / "bundle" / shard.file
    found = read_header(written)
    assert [found[part.name].dtype for part in parts] == ["F16", "F16", "F32", "BF16"]
    for part in parts:
        place = layout.places[part.name]
        entry = found[part.name]
        assert (entry.offset, entry.nbytes, entry.shape) == (
            place.offset,
            place.nbytes,
            part.shape,
        )
    for part, dtype in ((CODES, np.float16), (SCALES, np.float32)):
        entry = found[part.name]
        read = np.fromfile(written, dtype, len(values[part.name]), offset=entry.offset)
        assert (read == values[part.name]).all()


@pytest.mark.parametrize(
    ("recipe", "dtype", "expected"),
    [
        (
            "llava-1.5-7b",
            "float16",
            "9a612fd3e8c383dbc69c27a720934a8f505178bb4fcc4ba94da05923547c8f08",
        ),
        (
            "llava-1.5-7b",
            "float32",
            "0b063d4733d320d845c8e0bbbc343d6bd19d2550055812f57063b761d34acae6",
        ),
        (
            "llava-next-mistral-7b",
            "bfloat16",
            "fa2cbf35c815a7519114450a4bb455eceeb9e3c02514277f17b4f6ce2b88c2a6",
        ),
    ],
)
def test_float_weights_lie_where_they_always_have(recipe: str, dtype: str, expected: str) -> None:
    """Bundles exported without weights have places in the layout: a change would invalidate them.

    The digests are those of the layout before weights had parts.
    """
    config = parse_config(load_recipe(recipe).architecture)
    assert (
        digest(plan_layout(parts_of(GraphOptions(dtype=dtype).stored_weights(config)))) == expected
    )
