"""Checkpoint folders: whole ones are read to the byte, broken ones named to the tensor."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.checkpoints import make_llava, read_tensor
from trio_deploy import TrioError
from trio_deploy.bundle.weights import PartSource, plan_layout, write_layout
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.folder import image_settings
from trio_deploy.checkpoint.safetensors import (
    MAX_HEADER,
    TensorEntry,
    read_header,
)
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.quant.stored_weight import Part

QUERY = "language_model.model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def sharded(tmp_path_factory) -> Path:
    return make_llava(tmp_path_factory.mktemp("sharded") / "c", layout="hub", shards=3, layers=2)


@pytest.fixture
def copy(sharded: Path, tmp_path: Path) -> Path:
    """A sharded checkpoint to break."""
    return Path(shutil.copytree(sharded, tmp_path / "c"))


@pytest.fixture
def single(llava_checkpoint: Path, tmp_path: Path) -> Path:
    """A single-file checkpoint to break."""
    return Path(shutil.copytree(llava_checkpoint, tmp_path / "c"))


def _header(file: Path) -> tuple[dict, int]:
    with file.open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length)), 8 + length


def _rewrite_header(file: Path, change) -> None:
    """Change the header in place of the old one, keeping the data."""
    header, data = _header(file)
    change(header)
    raw = json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + file.read_bytes()[data:])


def _shard_of(folder: Path, name: str) -> Path:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    return folder / index["weight_map"][name]


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_tensors_are_read_to_the_byte(tmp_path: Path, dtype):
    folder = make_llava(tmp_path / "c", dtype=dtype, layers=1)
    checkpoint = Checkpoint.from_path(folder)
    theirs = load_file(folder / "model.safetensors")
    assert set(checkpoint.tensors) == set(theirs)
    wanted = np.dtype(ml_dtypes.bfloat16 if dtype == "bfloat16" else dtype)
    for name, expected in theirs.items():
        ours = read_tensor(checkpoint.tensors[name])
        assert ours.dtype == wanted
        assert ours.tobytes() == expected.tobytes()
        assert ours.shape == expected.shape
        ours += 1  # writable


def test_offsets_count_from_the_start_of_the_file(llava_checkpoint: Path):
    checkpoint = Checkpoint.from_path(llava_checkpoint)
    raw = (llava_checkpoint / "model.safetensors").read_bytes()
    entry = checkpoint.tensors[QUERY]
    assert raw[entry.offset : entry.offset + entry.nbytes] == read_tensor(entry).tobytes()
    assert entry.dtype == "F32"


def test_shards_and_a_single_file_hold_the_same(sharded: Path, tmp_path: Path):
    one = Checkpoint.from_path(make_llava(tmp_path / "c", layout="hub", layers=2))
    many = Checkpoint.from_path(sharded)
    assert len({entry.file for entry in many.tensors.values()}) == 3
    assert set(one.tensors) == set(many.tensors)
    for name, entry in one.tensors.items():
        assert np.array_equal(read_tensor(entry), read_tensor(many.tensors[name]))


def test_a_hugging_face_cache_is_read_through_its_links(sharded: Path, tmp_path: Path):
    """snapshots/<revision>/ holds relative links into blobs/."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    for i, file in enumerate(sorted(sharded.iterdir())):
        shutil.copy(file, blobs / f"{i}")
        (snapshot / file.name).symlink_to(f"../../blobs/{i}")
    checkpoint = Checkpoint.from_path(snapshot)
    original = Checkpoint.from_path(sharded)
    assert np.array_equal(
        read_tensor(checkpoint.tensors[QUERY]), read_tensor(original.tensors[QUERY])
    )
    assert checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))
    _shard_of(snapshot, QUERY).resolve().unlink()
    with pytest.raises(TrioError, match="link to .*blobs.*does not exist"):
        Checkpoint.from_path(snapshot)


def test_image_settings_are_found_in_new_and_old_files(
    llava_checkpoint: Path, sharded: Path, tmp_path: Path
):
    assert image_settings(tmp_path) == {}
    new, old = image_settings(llava_checkpoint), image_settings(sharded)
    assert new["crop_size"] == old["crop_size"] == {"height": 32, "width": 32}


def test_unused_tensors_may_have_any_type(single: Path):
    """Older checkpoints carry integer position buffers."""
    file = single / "model.safetensors"
    tensors = load_file(file)
    tensors["vision_tower.vision_model.embeddings.position_ids"] = np.arange(17)
    save_file(tensors, file)
    checkpoint = Checkpoint.from_path(single)
    assert checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))


class TestMissing:
    def test_folder(self, tmp_path: Path):
        with pytest.raises(TrioError, match="no checkpoint folder"):
            Checkpoint.from_path(tmp_path / "nothing")

    def test_config(self, single: Path):
        (single / "config.json").unlink()
        with pytest.raises(TrioError, match="no config.json"):
            Checkpoint.from_path(single)

    def test_weights(self, single: Path):
        (single / "model.safetensors").unlink()
        with pytest.raises(TrioError, match="no weights"):
            Checkpoint.from_path(single)
        (single / "pytorch_model.bin").touch()
        with pytest.raises(TrioError, match="no weights.*: convert pytorch_model.bin"):
            Checkpoint.from_path(single)

    def test_shard(self, copy: Path):
        shard = _shard_of(copy, QUERY)
        shard.unlink()
        with pytest.raises(TrioError, match=f"shard {shard.name} is missing.*tensor '"):
            Checkpoint.from_path(copy)

    def test_tensor_that_the_index_promises(self, copy: Path):
        shard = _shard_of(copy, QUERY)
        tensors = load_file(shard)
        del tensors[QUERY]
        save_file(tensors, shard)
        with pytest.raises(TrioError, match=f"{shard.name} lacks tensor '{QUERY}'"):
            Checkpoint.from_path(copy)

    def test_tensor_that_the_model_needs(self, single: Path):
        file = single / "model.safetensors"
        tensors = load_file(file)
        del tensors[QUERY]
        save_file(tensors, file)
        checkpoint = Checkpoint.from_path(single)
        with pytest.raises(TrioError, match="lacks tensor 'language_model.layers.1.self_attn.q"):
            checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))


class TestBroken:
    def test_truncated_shard(self, copy: Path):
        shard = _shard_of(copy, QUERY)
        shard.write_bytes(shard.read_bytes()[:-5])
        with pytest.raises(
            TrioError, match=f"{shard.name} is truncated, since tensor '.*download it again"
        ):
            Checkpoint.from_path(copy)

    @pytest.mark.parametrize("length", [0, 5, 8, 100])
    def test_truncated_header(self, single: Path, length):
        file = single / "model.safetensors"
        file.write_bytes(file.read_bytes()[:length])
        with pytest.raises(TrioError, match="model.safetensors is truncated"):
            Checkpoint.from_path(single)

    def test_header_length_bomb(self, single: Path):
        file = single / "model.safetensors"
        file.write_bytes(struct.pack("<Q", MAX_HEADER + 1) + bytes(64))
        with pytest.raises(TrioError, match="not a .safetensors file"):
            Checkpoint.from_path(single)

    @pytest.mark.parametrize(
        "header", [b"{", b"[]", b"\xff\xfe", b'{"a": 1}', b'{"a": {}}', b"[" * 50_000]
    )
    def test_corrupt_header(self, single: Path, header):
        file = single / "model.safetensors"
        file.write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
        with pytest.raises(TrioError, match=r"header of .* not valid JSON|corrupt header"):
            Checkpoint.from_path(single)

    @pytest.mark.parametrize(
        ("entry", "says"),
        [
            ({"data_offsets": [0, 3]}, "cannot have 3 bytes"),
            ({"data_offsets": [8, 0]}, "bad entry"),
            ({"data_offsets": [0, 4], "shape": [10**18, 10**18]}, "cannot have 4 bytes"),
            ({"data_offsets": [0, 4], "shape": [2**63]}, "bad entry"),
            ({"data_offsets": [0, 4], "shape": [2**62] * 100_000}, "bad entry"),
            ({"data_offsets": [0, 4], "shape": [True]}, "bad entry"),
            ({"data_offsets": [0, 4], "shape": {"1": 1}}, "bad entry"),
            ({"data_offsets": [0, 2**62]}, "cannot have"),
            ({"data_offsets": [0, 4], "dtype": ["F32"]}, "bad entry"),
            ({"data_offsets": [-4, 0]}, "bad entry"),
            ({"data_offsets": [0.0, 4.0]}, "bad entry"),
            ({"shape": "?"}, "bad entry"),
            ({"shape": [-1, -1]}, "bad entry"),
            ({"shape": [10**30]}, "cannot have"),
            ({"dtype": "F16"}, "cannot have"),
        ],
    )
    def test_entry_that_makes_no_sense(self, single: Path, entry, says):
        file = single / "model.safetensors"
        _rewrite_header(file, lambda header: header[QUERY].update(entry))
        with pytest.raises(TrioError, match=f"{says}|{QUERY}"):
            Checkpoint.from_path(single)

    def test_overlapping_tensors(self, single: Path):
        def overlap(header: dict) -> None:
            key = QUERY.replace("q_proj", "o_proj")
            assert header[key]["shape"] == header[QUERY]["shape"]
            header[key]["data_offsets"] = header[QUERY]["data_offsets"]

        _rewrite_header(single / "model.safetensors", overlap)
        with pytest.raises(TrioError, match="overlap"):
            Checkpoint.from_path(single)

    def test_git_lfs_pointer(self, single: Path):
        (single / "model.safetensors").write_text("version 1\noid sha256:0\nsize 9\n")
        with pytest.raises(TrioError, match="git lfs pull"):
            Checkpoint.from_path(single)

    @pytest.mark.parametrize(
        "shard", ["../c/x.safetensors", "/x", "..", "", 3, "a/b", "a\0b", ["x"], {}, None]
    )
    def test_index_that_leaves_the_folder(self, copy: Path, shard):
        file = copy / "model.safetensors.index.json"
        index = json.loads(file.read_text())
        index["weight_map"][QUERY] = shard
        file.write_text(json.dumps(index))
        with pytest.raises(TrioError, match="not the name of a file"):
            Checkpoint.from_path(copy)

    @pytest.mark.parametrize("text", ["{", "[]", "\x00"])
    @pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
    def test_json(self, copy: Path, name, text):
        (copy / name).write_text(text)
        with pytest.raises(TrioError, match=name):
            Checkpoint.from_path(copy)

    def test_index_without_a_map(self, copy: Path):
        (copy / "model.safetensors.index.json").write_text("{}")
        with pytest.raises(TrioError, match="no weight_map"):
            Checkpoint.from_path(copy)

    def test_file_that_shrinks_while_in_use(self, single: Path, tmp_path: Path):
        checkpoint = Checkpoint.from_path(single)
        sources = checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))
        layout = plan_layout([Part(n, entry.shape, "float16") for n, entry in sources.items()])
        (single / "model.safetensors").write_bytes(b"")
        with pytest.raises(TrioError, match="truncated"), BundleWriter(tmp_path / "b") as writer:
            write_layout(writer, layout, {n: PartSource(entry) for n, entry in sources.items()})


class TestUnfit:
    """Readable files that do not belong to the configuration."""

    def _save(self, folder: Path, change) -> Checkpoint:
        file = folder / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)
        return Checkpoint.from_path(folder)

    def test_wrong_shape(self, single: Path):
        checkpoint = self._save(
            single, lambda tensors: tensors.update({QUERY: np.zeros((64, 60), np.float32)})
        )
        with pytest.raises(TrioError, match=rf"'{QUERY}' in .* has shape \[64, 60\].*\[64, 64\]"):
            checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))

    @pytest.mark.parametrize("dtype", ["float64", "int8", "uint8"])
    def test_wrong_dtype(self, single: Path, dtype):
        checkpoint = self._save(
            single, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(dtype)})
        )
        with pytest.raises(TrioError, match=f"'{QUERY}' in .*model.safetensors is [FIU]"):
            checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))

    def test_mixed_float_types_fit(self, single: Path):
        """A bundle has one type, which all of them are converted to."""
        checkpoint = self._save(
            single, lambda tensors: tensors.update({QUERY: tensors[QUERY].astype(np.float16)})
        )
        found = checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))
        assert {entry.dtype for entry in found.values()} == {"F16", "F32"}


def test_a_header_of_the_safetensors_package_is_read(tmp_path: Path):
    file = tmp_path / "a.safetensors"
    save_file({"a": np.ones((2, 3), np.float32), "empty": np.zeros((0, 4), np.float16)}, file)
    entries = read_header(file)
    assert entries["a"] == TensorEntry(file, entries["a"].offset, 24, (2, 3), "F32")
    assert read_tensor(entries["empty"]).shape == (0, 4)
