"""A bundle says what is wrong with it, and a half-written one never stands at its place."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from trio_deploy import Bundle, Schedule, TrioError
from trio_deploy.bundle import writer as writer_module
from trio_deploy.bundle.manifest import (
    MANIFEST,
    FileInfo,
    Manifest,
    ModelInfo,
    StageInfo,
    TensorInfo,
    TensorPlace,
)
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.checkpoint.processor_files import GenerationInfo
from trio_deploy.export.cache import find_bundle


def manifest(**changes) -> Manifest:
    values = {
        "model": ModelInfo("m", "org/m", "abc", {"model_type": "llava"}),
        "dtype": "float32",
        "dialect": "ort",
        "schedule": [{"layer": 1, "keep": 0.5, "method": "trio"}],
        "probe": "last",
        "positions": "renumber",
        "threshold": 0.8,
        "decode": "shared",
        "stages": (
            StageInfo(
                "embed",
                "embed",
                file="embed.onnx",
                inputs=(TensorInfo("input_ids", "int64", ("B", "S"), "ids"),),
                outputs=(TensorInfo("inputs_embeds", "float32", ("B", "S", 64), "tokens"),),
            ),
        ),
        "tensors": {},
        "generation": GenerationInfo((2,), 3, 1),
        "files": {},
        "versions": {"trio-deploy": "0"},
        "weights": "copied",
    }
    return Manifest(**(values | changes))


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_bundle(target: Path, force: bool = False, content: bytes = b"graph", **changes) -> Bundle:
    with BundleWriter(target, force=force) as writer:
        writer.write("embed.onnx", content)
        writer.write("weights/model.safetensors", b"weights" * 10)
        writer.write("tokens.json", b'{"eos_token": "</s>"}')
        writer.write("chat_template.jinja", "{{ messages }} ü".encode())
        writer.write(MANIFEST, manifest(files=dict(writer.files), **changes).dump())
    return Bundle.load(target)


@pytest.fixture
def target(tmp_path):
    return tmp_path / "deep" / "b"


def edit_manifest(target: Path, edit) -> None:
    raw = json.loads((target / MANIFEST).read_text())
    edit(raw)
    (target / MANIFEST).write_text(json.dumps(raw))


def test_the_manifest_survives_json():
    place = TensorPlace("weights/w.safetensors", 16, 8, (1, 2), "float32")
    files = {"embed.onnx": FileInfo(5, None), "weights/w.safetensors": FileInfo(24, None)}
    it = manifest(files=files, budgets={"0.3": [0.25]}, tensors={"w": place})
    assert Manifest.from_json(json.loads(it.dump())) == it


def test_a_bundle_written_before_budgets_were_has_none(target):
    write_bundle(target, budgets={"0.3": [0.2]})
    assert Bundle.load(target).budgets == {0.3: Schedule.parse("1:0.2")}
    edit_manifest(target, lambda raw: raw.pop("budgets"))
    assert Bundle.load(target).budgets == {}


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ([0.2], r"\"budgets\" map budgets to what points keep, but are \[0.2\]"),
        ({"much": [0.2]}, "name 'much', which is no share between 0 and 1"),
        ({"1.5": [0.2]}, "name '1.5'"),
        ({"nan": [0.2]}, "name 'nan'"),
        ({"0.3": 0.2}, r"budget 0.3 must say what each of the 1 pruning points keeps, not 0.2"),
        ({"0.3": [0.2, 0.1]}, "budget 0.3 must say what each of the 1"),
        ({"0.3": ["0.2"]}, "budget 0.3 must say"),
        ({"0.3": [True]}, "budget 0.3 must say"),
        ({"0.3": [1.2]}, "budget 0.3 is not possible: .* at most 1"),
    ],
)
def test_a_budget_that_does_not_suit_the_schedule_is_named(target, budgets, message):
    write_bundle(target)
    edit_manifest(target, lambda raw: raw.update(budgets=budgets))
    with pytest.raises(TrioError, match=rf"cannot use .*manifest\.json: its .*{message}"):
        Bundle.load(target)


def test_a_written_bundle_loads_and_answers(target):
    it = write_bundle(target)
    assert list(it.stages) == ["embed"]
    assert it.graph("embed") == target / "embed.onnx"
    assert it.schedule.layers == (1,)
    assert it.tokens["eos_token"] == "</s>"
    assert it.chat_template == "{{ messages }} ü"
    Bundle.load(target, verify=True)
    with pytest.raises(TrioError, match="no stage 'select_9'"):
        it.graph("select_9")


def test_a_folder_without_manifest_is_no_bundle_nor_is_a_file(tmp_path):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "none"):
        with pytest.raises(TrioError, match="is not a bundle"):
            Bundle.load(path)


def test_a_damaged_manifest_is_named(target):
    write_bundle(target)
    (target / MANIFEST).write_text("{")
    with pytest.raises(TrioError, match=r"manifest\.json is not valid JSON"):
        Bundle.load(target)


def place(**changes) -> dict[str, object]:
    """JSON of a tensor's place in the bundle of `write_bundle`."""
    file = "weights/model.safetensors"
    return {"file": file, "offset": 4, "nbytes": 4, "shape": [1], "dtype": "float32"} | changes


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda raw: raw.update(schema=99), "schema 99, newer .* upgrade"),
        (lambda raw: raw.pop("schema"), "not the manifest"),
        (lambda raw: raw.pop("dialect"), "missing required field `dialect`"),
        (lambda raw: raw.update(threshold="much"), "one of its values is wrong .*threshold"),
        (lambda raw: raw.update(stages={}), "one of its values is wrong .*stages"),
        (lambda raw: raw["files"].pop("embed.onnx"), "not among its files"),
        (lambda raw: raw.update(dialekt="ort"), "key dialekt is unknown; did you mean 'dialect'"),
        (
            lambda raw: raw["stages"][0].update(kinds=1),
            r"key stages\.0\.kinds is unknown; .*'kind",
        ),
        (lambda raw: raw["stages"][0].update(kind="embedding"), r"one of its values .*stages\[0\]"),
        (lambda raw: raw["stages"].append(raw["stages"][0]), "two stages 'embed'"),
        (lambda raw: raw["stages"][0].update(tensors=["w"]), "tensor w of embed has no place"),
        (lambda raw: raw["files"]["tokens.json"].update(size="5"), r"in files, tokens\.json"),
        (lambda raw: raw.update(tensors={"w": place(file="weights/none")}), "not among its files"),
        (lambda raw: raw.update(tensors={"w": place(offset=67)}), r"tensor w lies outside"),
        (lambda raw: raw.update(tensors={"w": place(offset=-1)}), r"tensor w lies outside"),
        (lambda raw: raw.update(tensors={"w": place(shape=[2])}), r"cannot have 4 bytes"),
        (lambda raw: raw.update(tensors={"w": place(dtype="int3")}), r"unknown type 'int3'"),
    ],
)
def test_an_unusable_manifest_says_why(target, edit, message):
    write_bundle(target)
    edit_manifest(target, edit)
    with pytest.raises(TrioError, match=message):
        Bundle.load(target)


def test_a_missing_file_is_named(target):
    write_bundle(target)
    (target / "weights" / "model.safetensors").unlink()
    with pytest.raises(TrioError, match=r"lacks weights/model\.safetensors"):
        Bundle.load(target)


def test_a_file_of_another_size_is_named(target):
    write_bundle(target)
    for content in (b"gra", b"graph, and more", b""):
        (target / "embed.onnx").write_bytes(content)
        with pytest.raises(
            TrioError, match=rf"embed\.onnx .* has {len(content)} bytes where .* says 5"
        ):
            Bundle.load(target)


def test_a_flipped_byte_is_found_on_request_and_named(target):
    write_bundle(target)
    (target / "weights" / "model.safetensors").write_bytes(b"weightS" * 10)
    Bundle.load(target)
    with pytest.raises(TrioError, match=r"weights/model\.safetensors .* is damaged"):
        Bundle.load(target, verify=True)


@pytest.mark.parametrize(
    "path",
    ["../b.bin", "/etc/passwd", "weights/../../b.bin", "C:\\b", "C:b", "..\\b", "", "a\0b"],
)
def test_a_path_that_leaves_the_folder_is_refused(target, path):
    write_bundle(target)
    (target.parent / "b.bin").write_bytes(b"12345")
    edit_manifest(target, lambda raw: raw["files"].update({path: {"size": 5, "sha256": None}}))
    with pytest.raises(TrioError, match="leaves the bundle"):
        Bundle.load(target)


def test_a_graph_outside_the_folder_is_refused(target):
    write_bundle(target)

    def edit(raw):
        raw["stages"][0]["file"] = "../embed.onnx"
        raw["files"]["../embed.onnx"] = {"size": 5, "sha256": None}

    edit_manifest(target, edit)
    with pytest.raises(TrioError, match="leaves the bundle"):
        Bundle.load(target)


def test_a_symlink_out_of_the_folder_is_refused(target):
    write_bundle(target)
    (target.parent / "elsewhere").write_bytes(b"graph")
    (target / "embed.onnx").unlink()
    (target / "embed.onnx").symlink_to(target.parent / "elsewhere")
    with pytest.raises(TrioError, match=r"embed\.onnx in the bundle is a symbolic link"):
        Bundle.load(target)


@pytest.mark.parametrize("name", ["embed.onnx", "weights"])
def test_a_symlink_to_itself_is_refused(name, target):
    write_bundle(target)
    if (target / name).is_dir():
        shutil.rmtree(target / name)
    else:
        (target / name).unlink()
    (target / name).symlink_to(name)
    with pytest.raises(TrioError, match=rf"{name}.*(leads to no file|lacks weights)|lacks {name}"):
        Bundle.load(target)


@pytest.mark.parametrize(
    ("link", "says"), [("elsewhere", "leads to no file"), (MANIFEST, "cannot read .*: Too many")]
)
def test_a_manifest_that_is_a_link_to_nothing_is_not_absent(link, says, target):
    write_bundle(target)
    (target / MANIFEST).unlink()
    (target / MANIFEST).symlink_to(link)
    for load in (Bundle.load, lambda folder: Bundle.load(find_bundle(folder))):
        with pytest.raises(TrioError, match=says):
            load(target)


def test_a_file_in_a_folder_of_too_long_a_name_is_refused(target):
    write_bundle(target)
    name = f"{'x' * 300}/embed.onnx"
    edit_manifest(target, lambda raw: raw["files"].update({name: {"size": 5, "sha256": None}}))
    with pytest.raises(TrioError, match="longer than a path can be") as refused:
        Bundle.load(target)
    assert len(str(refused.value)) < 400


def test_a_symlinked_weights_folder_is_refused(target):
    write_bundle(target)
    shutil.move(target / "weights", target.parent / "weights")
    (target / "weights").symlink_to(target.parent / "weights")
    with pytest.raises(TrioError, match="symbolic link"):
        Bundle.load(target)


def test_a_bundle_reached_through_a_symlink_is_fine(target, tmp_path):
    write_bundle(target)
    (tmp_path / "link").symlink_to(target)
    Bundle.load(tmp_path / "link", verify=True)


def write_linked_bundle(target):
    """A bundle whose weights have no checksum yet."""
    with BundleWriter(target) as writer:
        writer.write("embed.onnx", b"graph")
        writer.path("weights/w.safetensors").write_bytes(b"1234")
        writer.record("weights/w.safetensors", None)
        it = manifest(files=dict(writer.files), weights="linked")
        writer.write(MANIFEST, it.dump())


def test_seal_records_missing_checksums(target):
    write_linked_bundle(target)
    it = Bundle.load(target, verify=True)
    assert it.files_without_checksum == ["weights/w.safetensors"]
    it.record_checksums()
    (target / "weights" / "w.safetensors").write_bytes(b"1235")
    with pytest.raises(TrioError, match=r"w\.safetensors .* is damaged"):
        Bundle.load(target, verify=True)


def test_recording_checksums_blesses_no_file_that_has_one(target):
    write_linked_bundle(target)
    (target / "embed.onnx").write_bytes(b"grapH")
    before = Bundle.load(target).manifest.files["embed.onnx"]
    after = Bundle.load(target).record_checksums().manifest.files
    assert after["embed.onnx"] == before and after["weights/w.safetensors"].sha256
    with pytest.raises(TrioError, match=r"embed\.onnx .* is damaged"):
        Bundle.load(target, verify=True)


def test_planned_weights_may_be_missing_until_they_are_needed(target):
    with BundleWriter(target) as writer:
        writer.write("embed.onnx", b"graph")
        files = dict(writer.files) | {"weights/w.safetensors": FileInfo(4, None)}
        writer.write(MANIFEST, manifest(files=files, weights="planned").dump())
    it = Bundle.load(target, verify=True)
    with pytest.raises(TrioError, match="trio attach-weights"):
        it.require_weights()


def test_an_existing_target_is_refused_and_kept(target):
    write_bundle(target)
    with pytest.raises(TrioError, match="exists already: pass --force"):
        write_bundle(target, content=b"other")
    assert (target / "embed.onnx").read_bytes() == b"graph"


def test_force_replaces_a_bundle_only_when_the_new_one_is_whole(target):
    write_bundle(target)
    with pytest.raises(RuntimeError), BundleWriter(target, force=True) as writer:
        writer.write("embed.onnx", b"other")
        raise RuntimeError
    assert (target / "embed.onnx").read_bytes() == b"graph"
    write_bundle(target, force=True, content=b"other")
    assert (target / "embed.onnx").read_bytes() == b"other"
    assert names(target.parent) == ["b"]


def test_replacing_works_where_names_cannot_be_exchanged(target, monkeypatch):
    write_bundle(target)
    monkeypatch.setattr(sys, "platform", "darwin")
    write_bundle(target, force=True, content=b"other")
    assert (target / "embed.onnx").read_bytes() == b"other"
    assert names(target.parent) == ["b"]


def test_force_does_not_replace_what_is_no_bundle(target):
    target.mkdir(parents=True)
    (target / "thesis.tex").write_text("years of work")
    with pytest.raises(TrioError, match="is not a bundle, so --force does not replace it"):
        write_bundle(target, force=True)
    assert (target / "thesis.tex").exists()


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit, ValueError])
def test_leaving_by_an_exception_leaves_nothing(target, error):
    with pytest.raises(error), BundleWriter(target) as writer:
        writer.write("weights/w.safetensors", b"half")
        raise error
    assert names(target.parent) == []
    write_bundle(target)


def test_a_failing_last_step_leaves_nothing(target, monkeypatch):
    def fail(path):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer_module, "fsync", fail)
    with pytest.raises(TrioError, match=r"disk .* is too full"):
        write_bundle(target)
    assert names(target.parent) == []


def test_a_full_disk_says_how_much_is_needed_and_free(target):
    with (
        pytest.raises(TrioError, match=r"at least 4\.77 GiB \(\d+ bytes\) and .* are free"),
        BundleWriter(target, needed=5_120_000_000) as writer,
    ):
        writer.write("embed.onnx", b"half")
        raise OSError(errno.ENOSPC, "No space left on device")
    assert names(target.parent) == []


@pytest.mark.parametrize("code", [errno.EFBIG, errno.EIO, errno.EROFS])
def test_a_disk_that_fails_is_an_error_that_names_the_bundle(code, target):
    with (
        pytest.raises(TrioError, match=rf"cannot write the bundle {target} \(.*nothing was left"),
        BundleWriter(target) as writer,
    ):
        writer.write("embed.onnx", b"half")
        raise OSError(code, os.strerror(code))
    assert names(target.parent) == []


@pytest.mark.skipif(os.geteuid() != 0 if hasattr(os, "geteuid") else True, reason="needs mount")
def test_a_disk_that_is_really_full(tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        big = bytes(1 << 20)
        with (
            pytest.raises(TrioError, match="too full") as refused,
            BundleWriter(disk / "b", needed=len(big)) as writer,
        ):
            writer.write("embed.onnx", big)
        assert names(disk) == []
        needed, free = re.findall(r"\((\d+) bytes\)", str(refused.value))
        assert int(needed) == len(big) > 65_536 >= int(free) > 0
        write_bundle(disk / "b")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_leftovers_of_a_killed_run_are_removed_by_the_next(target):
    program = (
        "import os, sys\n"
        "from trio_deploy.bundle.writer import BundleWriter\n"
        "writer = BundleWriter(sys.argv[1]).__enter__()\n"
        "writer.write('weights/w.safetensors', b'half')\n"
        "os.kill(os.getpid(), 9)\n"
    )
    subprocess.run([sys.executable, "-c", program, str(target)], capture_output=True)
    assert len(names(target.parent)) == 1
    write_bundle(target)
    assert names(target.parent) == ["b"]


def test_the_temporary_folder_of_a_living_run_is_left_alone(target):
    with BundleWriter(target) as writer:
        writer.write("embed.onnx", b"mine")
        write_bundle(target.parent / "b", content=b"faster")
        assert (writer.folder / "embed.onnx").read_bytes() == b"mine"
        shutil.rmtree(target)
        writer.write(MANIFEST, manifest(files=dict(writer.files)).dump())
    assert (target / "embed.onnx").read_bytes() == b"mine"


def test_a_target_that_appears_meanwhile_is_not_overwritten(target):
    with pytest.raises(TrioError, match="exists already"), BundleWriter(target) as writer:
        writer.write("embed.onnx", b"mine")
        write_bundle(target, content=b"theirs")
    assert (target / "embed.onnx").read_bytes() == b"theirs"
