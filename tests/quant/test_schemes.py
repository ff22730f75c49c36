"""The menu of schemes: which matrix is stored how, and that weight files hold exactly that."""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from trio_deploy.bundle.weights import PartSource, plan_layout, write_layout
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.safetensors import TensorEntry, read_header
from trio_deploy.errors import TrioError
from trio_deploy.quant.matrix import dequantised, round_to_nearest
from trio_deploy.quant.narrow_floats import round_to_e2m1, scale_of_matrix
from trio_deploy.quant.packing import Form, pack
from trio_deploy.quant.schemes import (
    SCHEMES,
    StoredMatrix,
    coded_part,
    coding_of,
    coding_of_stored,
    decode,
    head_coding,
    layer_coding,
    quantised_weight,
    scheme_named,
    split_name,
    stored_arrays,
)
from trio_deploy.quant.stored_weight import Coding, Part


@pytest.mark.parametrize(
    ("scheme", "bits", "columns", "form", "expected"),
    [
        ("int8", 8, 4096, "signed", Coding(8, 4096, "signed", "float32")),
        ("int8", 8, 4096, "blocks", Coding(8, 128, "blocks", "float16")),
        ("int4", 4, 4096, "signed", Coding(4, 128, "signed", "float16")),
        ("int4", 4, 576, "signed", Coding(4, 64, "signed", "float16")),
        ("int4", 4, 576, "blocks", Coding(4, 64, "blocks", "float16")),
        ("int4", 4, 1000, "signed", Coding(8, 1000, "signed", "float32")),
        ("int4", 4, 1000, "blocks", Coding(4, 128, "blocks", "float16")),
        ("int4", 8, 4096, "blocks", Coding(8, 128, "blocks", "float16")),
        ("int4-g32", 4, 576, "signed", Coding(4, 32, "signed", "float16")),
        ("int4-g32", 4, 48, "signed", Coding(8, 48, "signed", "float32")),
        ("int4-g32", 8, 4096, "blocks", Coding(8, 128, "blocks", "float16")),
    ],
)
def test_blocks_divide_a_row_or_the_row_is_stored_otherwise(
    scheme: str, bits: int, columns: int, form: Form, expected: Coding
) -> None:
    assert coding_of(SCHEMES[scheme], bits, columns, form, "float16") == expected


def test_parts_are_named_by_their_bits() -> None:
    blocks = quantised_weight("w", (6, 200), Coding(4, 128, "blocks", "float32"))
    assert blocks.parts == (
        Part("w.int4", (6, 2, 64), "uint8"),
        Part("w.int4.scale", (6, 2), "float32"),
    )
    signed = quantised_weight("w", (6, 128), Coding(4, 64, "signed", "float16"))
    assert signed.parts == (
        Part("w.int4", (6, 128), "int4"),
        Part("w.int4.scale", (6, 2), "float16"),
    )
    assert signed.nbytes == 6 * 64 + 6 * 2 * 2
    whole = quantised_weight("w", (6, 128), Coding(4, 128, "signed", "float16"))
    assert whole.parts[1].shape == (6, 1)  # TensorRT takes 4 bit in blocks alone
    rows = quantised_weight("w", (6, 50), Coding(8, 50, "signed", "float32"))
    assert rows.parts == (Part("w.int8", (6, 50), "int8"), Part("w.int8.scale", (6,), "float32"))
    floats = quantised_weight("w", (6, 128), Coding(4, 16, "signed", "float8_e4m3fn", kind="fp"))
    assert floats.parts == (
        Part("w.fp4", (6, 128), "float4_e2m1fn"),
        Part("w.fp4.scale", (6, 8), "float8_e4m3fn"),
        Part("w.fp4.matrix", (), "float32"),
    )
    assert floats.nbytes == 6 * 64 + 6 * 8 + 4
    assert split_name("a.weight.int4") == ("a.weight", "int4")
    assert split_name("a.weight.int8") == ("a.weight", "int8")
    assert split_name("a.weight.fp4") == ("a.weight", "fp4")
    assert split_name("a.weight.int8.scale") is None and split_name("a.weight") is None


@pytest.mark.parametrize(
    ("selects", "columns", "expected"),
    [
        (False, 64, Coding(4, 16, "signed", "float8_e4m3fn", kind="fp")),
        (False, 40, Coding(8, 40, "signed", "float32")),
        (True, 64, Coding(8, 64, "signed", "float32")),
    ],
)
def test_floats_of_4_bit_are_for_segments_and_rows_of_whole_blocks(
    selects: bool, columns: int, expected: Coding
) -> None:
    scheme = SCHEMES["nvfp4"]
    assert layer_coding(scheme, "w", columns, selects, "signed", "float16") == expected
    assert head_coding(scheme, "w", columns, selects, "signed", "float16") == Coding(
        8, columns, "signed", "float32"
    )


CODINGS = [
    Coding(4, 128, "blocks", "float32"),
    Coding(8, 128, "blocks", "float16"),
    Coding(4, 64, "signed", "float16"),
    Coding(8, 320, "signed", "float32"),
]

FLOATS_OF_4_BIT = Coding(4, 16, "signed", "float8_e4m3fn", kind="fp")


@pytest.mark.parametrize("coding", CODINGS, ids=str)
def test_weight_files_hold_what_numpy_packs(
    coding: Coding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the bit, rounded a few rows at a time, codes and scales even in files of their own."""
    columns = 576 if coding.form == "blocks" else 320
    values = np.random.default_rng(0).normal(0, 0.1, (7, columns)).astype(ml_dtypes.bfloat16)
    file = tmp_path / "checkpoint.bin"
    file.write_bytes(b"before" + values.tobytes())
    entry = TensorEntry(file, 6, values.nbytes, values.shape, "BF16")
    weight = quantised_weight("w", values.shape, coding)
    layout = plan_layout(weight.parts, shard_bytes=1)
    assert len(layout.shards) == 2
    monkeypatch.setattr("trio_deploy.bundle.weights._CHUNK", 3 * columns * 4)
    with BundleWriter(tmp_path / "bundle") as writer:
        write_layout(writer, layout, {p.name: PartSource(entry, weight) for p in weight.parts})
    kind = np.dtype(coding.scale_dtype)
    matrix = round_to_nearest(values, coding.bits, coding.block, kind)
    expected = pack(matrix, coding.form)
    read = {}
    for part, of in zip(weight.parts, ("codes", "scale"), strict=True):
        place = layout.places[part.name]
        written = tmp_path / "bundle" / place.file
        raw = written.read_bytes()[place.offset : place.offset + place.nbytes]
        assert raw == expected[of].astype(kind if of == "scale" else np.uint8).tobytes() or (
            raw == expected[of].tobytes()
        )
        found = read_header(written)[part.name]
        assert (found.offset, found.nbytes, found.shape) == (
            place.offset,
            place.nbytes,
            coded_part(part)[1],
        )
        read[of] = np.frombuffer(raw, np.uint8 if of == "codes" else kind).reshape(found.shape)
    found = decode(read["codes"], read["scale"], coding.bits, columns)
    assert np.array_equal(found, dequantised(matrix))


def test_files_hold_floats_of_4_bit_whose_scale_is_that_of_the_whole_matrix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its greatest value is in the last rows, which are read last."""
    values = np.random.default_rng(0).normal(0, 0.1, (7, 64)).astype(ml_dtypes.bfloat16)
    values[6, 5] = 3
    file = tmp_path / "checkpoint.bin"
    file.write_bytes(values.tobytes())
    entry = TensorEntry(file, 0, values.nbytes, values.shape, "BF16")
    weight = quantised_weight("w", values.shape, FLOATS_OF_4_BIT)
    layout = plan_layout(weight.parts)
    monkeypatch.setattr("trio_deploy.bundle.weights._CHUNK", 3 * 64 * 4)
    with BundleWriter(tmp_path / "bundle") as writer:
        write_layout(writer, layout, {p.name: PartSource(entry, weight) for p in weight.parts})
    raw = {}
    for part, of in zip(weight.parts, ("codes", "scale", "matrix"), strict=True):
        place = layout.places[part.name]
        content = (tmp_path / "bundle" / place.file).read_bytes()
        raw[of] = content[place.offset : place.offset + place.nbytes]
    wide = values.astype(np.float32)
    of_matrix = scale_of_matrix(3.0)
    codes, scale = round_to_e2m1(wide, of_matrix)
    assert raw == {
        "codes": codes.tobytes(),
        "scale": scale.tobytes(),
        "matrix": of_matrix.tobytes(),
    }
    header = read_header(tmp_path / "bundle" / layout.shards[0].file)
    assert [header[p.name].dtype for p in weight.parts] == ["U8", "F8_E4M3", "F32"]


@pytest.mark.parametrize("coding", [*CODINGS[:3], FLOATS_OF_4_BIT], ids=str)
def test_a_matrix_is_never_in_memory_as_a_whole(
    coding: Coding, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of 4 MiB, in pieces of 64 KiB as float32: a few of those, and the scales."""
    shape = (2048, 1024)
    file = tmp_path / "checkpoint.bin"
    with file.open("wb") as out:
        out.truncate(2 * shape[0] * shape[1])
    entry = TensorEntry(file, 0, file.stat().st_size, shape, "F16")
    weight = quantised_weight("w", shape, coding)
    layout = plan_layout(weight.parts)
    monkeypatch.setattr("trio_deploy.bundle.weights._CHUNK", 1 << 16)
    tracemalloc.start()
    try:
        with BundleWriter(tmp_path / "bundle") as writer:
            write_layout(writer, layout, {p.name: PartSource(entry, weight) for p in weight.parts})
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    scales = layout.places[weight.parts[1].name].nbytes
    assert peak - scales < 1 << 20


@pytest.mark.parametrize("coding", [CODINGS[2], FLOATS_OF_4_BIT], ids=str)
def test_a_value_that_is_not_finite_is_named(coding: Coding, tmp_path: Path) -> None:
    values = np.ones((4, 64), np.float32)
    values[2, 3] = np.inf
    file = tmp_path / "checkpoint.bin"
    file.write_bytes(values.tobytes())
    weight = quantised_weight("w", values.shape, coding)
    source = PartSource(TensorEntry(file, 0, values.nbytes, values.shape, "F32"), weight)
    layout = plan_layout(weight.parts)
    with (
        pytest.raises(TrioError, match=r"checkpoint.bin: w: a value is not finite"),
        BundleWriter(tmp_path / "bundle") as writer,
    ):
        write_layout(writer, layout, {part.name: source for part in weight.parts})
    assert not (tmp_path / "bundle").exists()


def test_headers_of_codes_are_those_of_bytes() -> None:
    """safetensors has no type of 4 bit."""
    weight = quantised_weight("w", (6, 128), CODINGS[2])
    header = plan_layout(weight.parts).shards[0].header
    entries = json.loads(header[8:])
    assert entries["w.int4"] == {"dtype": "U8", "shape": [6, 64], "data_offsets": [0, 384]}
    assert entries["w.int4.scale"]["dtype"] == "F16"


def test_unknown_schemes_are_refused() -> None:
    with pytest.raises(TrioError, match="choose one of int8, int4, int4-g32, fp8, nvfp4, none"):
        scheme_named("int3")


@pytest.mark.parametrize("form", ["blocks", "signed"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("columns", [24, 40, 64, 200])
def test_rows_of_a_checkpoint_with_one_scale_each_keep_their_values(
    form: Form, bits: int, columns: int
) -> None:
    """Also where no block divides them, and the last one is short."""
    values = np.random.default_rng(0).normal(0, 0.1, (6, columns)).astype(np.float32)
    matrix = round_to_nearest(values, bits, columns)
    coding = coding_of_stored(StoredMatrix(bits, columns, True), 4, columns, form, "float32")
    arrays = stored_arrays(matrix, coding)
    parts = quantised_weight("w", values.shape, coding).parts
    assert [a.nbytes for a in arrays] == [part.nbytes for part in parts]
    assert np.array_equal(decode(*arrays, coding.bits, columns), dequantised(matrix))
