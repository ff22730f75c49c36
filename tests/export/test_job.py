"""Exporting: what lands in a bundle, where its weights come from, and what is refused."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import msgspec
import numpy as np
import onnx
import pytest
from PIL import Image

from tests.support.checkpoints import (
    CHAT_TEMPLATE,
    EOS,
    IMAGE,
    PAD,
    make_llava,
    make_llava_next,
    read_tensor,
)
from tests.support.waiting import WAIT_S
from trio_deploy import Bundle, Request, Schedule, TrioError, export_model
from trio_deploy.bundle import weights as weights_module
from trio_deploy.bundle.describe import inspect
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.resolve import load_recipe
from trio_deploy.config.options import ExportOptions, SelectionOptions
from trio_deploy.export import job as export_module
from trio_deploy.export.attach import attach_weights
from trio_deploy.export.graphs import open_weights
from trio_deploy.families.names import map_checkpoint_names
from trio_deploy.families.registry import family_of, parse_config
from trio_deploy.files import sha256_of
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.pipeline.prepare import RequestPreparer
from trio_deploy.schedule.budget import solve

SCHEDULE = "1:0.5,3:0.25"


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def external(bundle: Bundle) -> dict[str, np.ndarray]:
    """Every tensor that the graphs refer to, read from where they say it is."""
    tensors = {}
    for stage in bundle.stages:
        proto = onnx.load(str(bundle.graph(stage)), load_external_data=False)
        for tensor in proto.graph.initializer:
            if tensor.data_location == onnx.TensorProto.EXTERNAL:
                place = {item.key: item.value for item in tensor.external_data}
                file = bundle.path / place["location"]
                raw = file.read_bytes()[int(place["offset"]) :][: int(place["length"])]
                dtype = onnx.helper.tensor_dtype_to_np_dtype(tensor.data_type)
                tensors[tensor.name] = np.frombuffer(raw, dtype).reshape(tensor.dims)
    return tensors


def expected(folder: Path) -> dict[str, np.ndarray]:
    """The checkpoint's tensors under their canonical names."""
    checkpoint = Checkpoint.from_path(folder)
    sources = checkpoint.verify(canonical_tensors(parse_config(checkpoint.config)))
    return {name: read_tensor(entry) for name, entry in sources.items()}


@pytest.fixture(scope="module")
def built():
    """Graphs of earlier tests, by what they were built for."""
    return {}


@pytest.fixture
def afresh():
    """For a test that is about the building itself."""


@pytest.fixture(autouse=True)
def _build_graphs_once(request, built, monkeypatch):
    """Most tests here are about files around the graphs, so the same graphs serve many of them."""
    if "afresh" in request.fixturenames:
        return
    build = export_module.build_graphs

    def cached(config, layers, options):
        key = (config, layers, options)
        if key not in built:
            models = build(config, layers, options)
            built[key] = models, [v for m in models.values() for v in open_weights(m)]
        models, values = built[key]
        for value in values:
            value.const_value = None
        return models

    monkeypatch.setattr(export_module, "build_graphs", cached)


@pytest.fixture(scope="module")
def exported(llava_checkpoint, tmp_path_factory) -> Bundle:
    out = tmp_path_factory.mktemp("exported") / "b"
    return export_model(llava_checkpoint, out, schedule=SCHEDULE, progress=False)


@pytest.fixture
def checkpoint(llava_checkpoint, tmp_path) -> Path:
    """A copy that a test may damage."""
    return Path(shutil.copytree(llava_checkpoint, tmp_path / "checkpoint"))


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty Hugging Face cache, and no way to the hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    return tmp_path / "hub"


def snapshot_of(cache: Path, checkpoint: Path) -> Path:
    """A checkpoint in the Hugging Face cache as org/name, whose branch main is commit abc."""
    repository = cache / "models--org--name"
    snapshot = Path(shutil.copytree(checkpoint, repository / "snapshots" / "abc"))
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text("abc")
    return snapshot


def test_a_bundle_holds_all_that_a_runtime_needs(exported):
    again = Bundle.load(exported.path, verify=True)
    segments = ["prefill_0", "select_1", "prefill_1", "select_2", "prefill_2"]
    assert list(again.stages) == ["vision", "embed", *segments]
    assert again.manifest.dtype == "float32"
    assert again.manifest.weights == "copied"
    assert again.manifest.decode == "shared"
    assert again.manifest.generation.eos_token_ids == (EOS,)
    assert again.manifest.generation.pad_token_id == PAD
    assert again.schedule.layers == (1, 3)
    assert again.chat_template == CHAT_TEMPLATE
    assert again.tokens["image_token"] == "<image>"
    assert again.tokens["image_token_id"] == IMAGE
    assert again.tokens["bos_token"] == "<s>"
    assert again.preprocessor
    assert again.tokenizer_path.is_file()
    assert again.config == parse_config(again.manifest.model.config)
    assert again.files_without_checksum == []


def test_the_manifest_names_inputs_and_outputs_as_the_graphs_do(exported):
    for stage, info in exported.stages.items():
        graph = onnx.load(str(exported.graph(stage)), load_external_data=False).graph
        assert [t.name for t in info.inputs] == [v.name for v in graph.input]
        assert [t.name for t in info.outputs] == [v.name for v in graph.output]
    select = {t.name: t for t in exported.stages["select_1"].inputs}
    assert select["visual_mask"].dtype == "bool"
    assert select["hidden_states"].dtype == "float32"
    assert select["hidden_states"].shape[-1] == exported.config.text.hidden_size


def test_graphs_refer_to_the_checkpoints_own_bytes(exported, llava_checkpoint):
    ours, theirs = external(exported), expected(llava_checkpoint)
    assert ours
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    copied = exported.path / "weights" / "model.safetensors"
    assert sha256_of(copied) == sha256_of(llava_checkpoint / "model.safetensors")


def test_the_manifest_places_weights_as_the_graphs_do(exported, tmp_path):
    exported.check_places()
    tensors = exported.manifest.tensors
    assert external(exported).keys() == tensors.keys()
    one, other = [n for n in tensors if n.endswith("q_proj.weight")][:2]
    swapped = tensors | {one: tensors[other], other: tensors[one]}
    manifest = msgspec.structs.replace(exported.manifest, tensors=swapped)
    with pytest.raises(TrioError, match=rf"disagree on where {re.escape(one)} is stored"):
        Bundle(exported.path, manifest).check_places()
    stages = (msgspec.structs.replace(manifest.stages[0], tensors=()), *manifest.stages[1:])
    with pytest.raises(TrioError, match=r"graph of vision disagree on whether it reads"):
        Bundle(exported.path, msgspec.structs.replace(manifest, stages=stages)).check_places()


def test_no_weight_is_inlined_into_a_graph(exported):
    for stage in exported.stages:
        assert exported.graph(stage).stat().st_size < 400_000


def test_onnx_runtime_takes_every_graph(exported):
    ort = pytest.importorskip("onnxruntime")
    for stage in exported.stages:
        ort.InferenceSession(exported.graph(stage), providers=["CPUExecutionProvider"])


@pytest.mark.usefixtures("afresh")
def test_exporting_twice_gives_the_same_bytes(exported, llava_checkpoint, tmp_path):
    again = export_model(llava_checkpoint, tmp_path / "again", schedule=SCHEDULE, progress=False)
    for path in sorted(exported.path.rglob("*")):
        if path.is_file():
            other = again.path / path.relative_to(exported.path)
            assert other.read_bytes() == path.read_bytes(), path.name


def test_no_path_of_this_machine_enters_the_bundle(exported, llava_checkpoint):
    text = (exported.path / "manifest.json").read_text()
    assert str(llava_checkpoint.parent) not in text


@pytest.mark.parametrize("layout", ["5.x", "4.52", "hub"])
@pytest.mark.parametrize("tie", [False, True])
def test_every_checkpoint_layout_exports(layout, tie, tmp_path):
    folder = make_llava_next(tmp_path / "c", layout=layout, tie=tie, shards=2, layers=3, hidden=32)
    it = export_model(folder, tmp_path / "b", schedule="1:0.5", progress=False)
    theirs = expected(folder)
    ours = external(it)
    assert ("lm_head.weight" in ours) is not tie
    for name, tensor in ours.items():
        np.testing.assert_array_equal(tensor, theirs[name], err_msg=name)
    assert it.chat_template == CHAT_TEMPLATE
    assert len(names(it.path / "weights")) == 2


@pytest.mark.parametrize("stored", ["float16", "bfloat16"])
def test_another_dtype_is_converted_tensor_by_tensor(stored, tmp_path):
    folder = make_llava(tmp_path / "c", dtype=stored, layers=3, hidden=32)
    it = export_model(folder, tmp_path / "b", schedule="1:0.5", progress=False)
    assert it.manifest.dtype == "float32"
    theirs = expected(folder)
    for name, tensor in external(it).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, theirs[name].astype(np.float32), err_msg=name)
    Bundle.load(it.path, verify=True)


def test_a_checkpoint_of_mixed_types_becomes_a_bundle_of_one(checkpoint, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    norm = checkpoint_name(checkpoint, "language_model.norm.weight")
    tensors[norm] = tensors[norm].astype(np.float16)
    save_file(tensors, file, metadata={"format": "pt"})
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    theirs = expected(checkpoint)
    for name, tensor in external(it).items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, theirs[name].astype(np.float32), err_msg=name)
    with pytest.raises(TrioError, match=r"cannot make float32 out of .*float16, float32: leave"):
        export_model(
            checkpoint, tmp_path / "c", schedule=SCHEDULE, link_weights=True, progress=False
        )


def test_a_quantised_checkpoint_is_refused_by_name(checkpoint, tmp_path):
    from safetensors.numpy import load_file, save_file

    file = checkpoint / "model.safetensors"
    tensors = load_file(file)
    norm = checkpoint_name(checkpoint, "language_model.norm.weight")
    tensors[norm] = tensors[norm].astype(np.int8)
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(
        TrioError, match=rf"'{norm}' .* is I8, and weights must be F32, F16 or BF16"
    ):
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert names(tmp_path) == ["checkpoint"]


def test_converted_weights_are_valid_safetensors(tmp_path):
    from safetensors.numpy import load_file

    folder = make_llava(tmp_path / "c", dtype="bfloat16", layers=3, hidden=32)
    it = export_model(folder, tmp_path / "b", schedule="1:0.5", progress=False)
    (file,) = (it.path / "weights").iterdir()
    ours = external(it)
    stored = load_file(file)
    assert set(stored) == set(ours)
    for name, tensor in ours.items():
        np.testing.assert_array_equal(stored[name], tensor)


def test_a_value_too_large_for_fp16_names_its_tensor(checkpoint, tmp_path):
    poke(checkpoint, "language_model.norm.weight", 1e6)
    with pytest.raises(TrioError, match=r"language_model\.norm\.weight holds 1e\+06.*float16"):
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, dtype="float16", progress=False)
    assert names(tmp_path) == ["checkpoint"]


def test_linked_weights_share_the_checkpoints_bytes(checkpoint, tmp_path, capsys):
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, link_weights=True)
    linked, source = it.path / "weights" / "model.safetensors", checkpoint / "model.safetensors"
    assert linked.stat().st_ino == source.stat().st_ino
    assert it.manifest.weights == "linked"
    assert it.files_without_checksum == ["weights/model.safetensors"]
    assert "none yet of 1" in inspect(it)
    assert "onnx.load and onnx.checker refuse" in capsys.readouterr().err
    ort = pytest.importorskip("onnxruntime")
    ort.InferenceSession(it.graph("prefill_1"), providers=["CPUExecutionProvider"])


def test_linking_follows_symlinks_as_the_hub_cache_has_them(checkpoint, tmp_path):
    blob = tmp_path / "blobs" / sha256_of(checkpoint / "model.safetensors")
    blob.parent.mkdir()
    shutil.move(checkpoint / "model.safetensors", blob)
    (checkpoint / "model.safetensors").symlink_to(blob)
    it = export_model(
        checkpoint, tmp_path / "b", schedule=SCHEDULE, link_weights=True, progress=False
    )
    linked = it.path / "weights" / "model.safetensors"
    assert not linked.is_symlink()
    assert linked.stat().st_ino == blob.stat().st_ino
    assert it.files_without_checksum == [], "the cache names a blob by its checksum"
    Bundle.load(it.path, verify=True)


@pytest.mark.parametrize("code", [errno.EPERM, errno.EXDEV])
def test_linking_falls_back_to_copying(checkpoint, tmp_path, monkeypatch, capsys, code):
    def refuse(source, target):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(weights_module.os, "link", refuse)
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, link_weights=True)
    assert it.manifest.weights == "copied"
    assert "refused hard links" in capsys.readouterr().err
    Bundle.load(it.path, verify=True)


def test_linking_into_another_dtype_is_refused(checkpoint, tmp_path):
    with pytest.raises(TrioError, match=r"--link-weights cannot make float16.*--dtype float32"):
        export_model(
            checkpoint, tmp_path / "b", schedule=SCHEDULE, link_weights=True, dtype="float16"
        )


def test_graphs_alone_need_neither_weights_nor_network(cache, tmp_path):
    it = export_model("llava-1.5-7b", tmp_path / "b", graphs_only=True, progress=False)
    assert it.manifest.weights == "planned"
    assert it.preprocessor
    assert it.schedule.layers == (1, 10, 15)
    assert not (it.path / "weights").exists()
    assert sum(f.stat().st_size for f in it.path.iterdir()) < 10_000_000
    with pytest.raises(TrioError, match="attach-weights"):
        it.require_weights()
    assert "attach-weights" in inspect(it)


@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads Linux's own account")
def test_a_full_size_export_of_graphs_is_quick_and_small(cache, tmp_path):
    """The bound on time is the benchmark's; here memory, which does not depend on the load."""
    program = (
        "import sys\n"
        "from trio_deploy.export.job import export_model\n"
        "export_model('llava-next-7b', sys.argv[1], graphs_only=True, progress=False)\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(*[line.split()[1] for line in lines if line.startswith('VmHWM')])\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "b")], capture_output=True, text=True
    )
    assert out.returncode == 0, out.stderr
    assert int(out.stdout) < 500 * 1024


@pytest.mark.parametrize(("stored", "layout"), [("float32", "5.x"), ("bfloat16", "hub")])
def test_attached_weights_complete_a_bundle(stored, layout, tmp_path):
    folder = make_llava_next(tmp_path / "c", dtype=stored, layout=layout, layers=3, hidden=32)
    planned = export_model(
        folder, tmp_path / "b", schedule="1:0.5", graphs_only=True, progress=False
    )
    graphs = {s: planned.graph(s).read_bytes() for s in planned.stages}
    (planned.path / "golden").mkdir()
    (planned.path / "golden" / "x.bin").write_bytes(b"kept")
    it = attach_weights(planned.path, folder, progress=False)
    assert it.manifest.weights == "copied"
    assert {s: it.graph(s).read_bytes() for s in it.stages} == graphs
    assert (it.path / "golden" / "x.bin").read_bytes() == b"kept"
    theirs = expected(folder)
    for name, tensor in external(it).items():
        np.testing.assert_array_equal(tensor, theirs[name].astype(np.float32), err_msg=name)
    Bundle.load(it.path, verify=True).require_weights()
    assert it.tokenizer_path.is_file()
    assert it.chat_template == CHAT_TEMPLATE
    assert names(tmp_path) == ["b", "c"]
    with pytest.raises(TrioError, match="has its weights already"):
        attach_weights(it, folder)


def test_what_a_checkpoint_lacks_stays_as_the_planned_bundle_has_it(tmp_path):
    folder = make_llava(tmp_path / "c", layers=3, hidden=32)
    planned = export_model(
        folder, tmp_path / "b", schedule="1:0.5", graphs_only=True, progress=False
    )
    settings = planned.preprocessor
    edit_json(folder / "processor_config.json", lambda raw: raw.pop("image_processor"))
    assert not (folder / "preprocessor_config.json").exists()
    it = attach_weights(planned, folder, progress=False)
    assert it.preprocessor == settings
    Bundle.load(it.path, verify=True).require_weights()


def test_attaching_another_models_weights_says_what_differs(tmp_path):
    ours = make_llava(tmp_path / "c", layers=3, hidden=32)
    other = make_llava(tmp_path / "d", layers=4, hidden=32)
    planned = export_model(ours, tmp_path / "b", schedule="1:0.5", graphs_only=True, progress=False)
    with pytest.raises(TrioError, match=r"text\.num_layers is 4 there and 3 in the bundle"):
        attach_weights(planned, other, progress=False)
    assert Bundle.load(planned.path).manifest.weights == "planned"


def test_a_checkpoint_with_a_longer_context_fits_the_planned_graphs(tmp_path):
    ours = make_llava(tmp_path / "c", layers=3, hidden=32, max_positions=512)
    longer = make_llava(tmp_path / "d", layers=3, hidden=32, max_positions=1024)
    planned = export_model(ours, tmp_path / "b", schedule="1:0.5", graphs_only=True, progress=False)
    assert attach_weights(planned, longer, progress=False).config.text.max_positions == 1024


def test_an_interrupted_attachment_leaves_the_planned_bundle(tmp_path, monkeypatch):
    folder = make_llava(tmp_path / "c", layers=3, hidden=32)
    planned = export_model(
        folder, tmp_path / "b", schedule="1:0.5", graphs_only=True, progress=False
    )
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights_module, "_converted", interrupt)
        attach_weights(planned, folder, progress=False)
    assert Bundle.load(planned.path).manifest.weights == "planned"
    assert names(tmp_path) == ["b", "c"]
    attach_weights(planned, folder, progress=False)


def interrupt(*args, **kwargs):
    raise KeyboardInterrupt


def full_disk(*args, **kwargs):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("step", ["_copy", "keep_files", "write_weights"])
def test_an_interrupt_leaves_no_half_bundle_and_a_rerun_works(
    step, checkpoint, tmp_path, monkeypatch
):
    module = weights_module if step == "_copy" else export_module
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(weights_module, "_reflink", lambda *a: False)
        patch.setattr(module, step, interrupt)
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert names(tmp_path) == ["checkpoint"]
    export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)


def test_a_real_interrupt_in_the_middle_leaves_no_half_bundle(checkpoint, tmp_path):
    program = (
        "import signal, sys, time\n"
        # a background job inherits that interrupts are ignored; a command at a terminal does not
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from trio_deploy.cli import main as cli; from trio_deploy.bundle import weights\n"
        "weights._reflink = lambda *a: False\n"
        "copy = weights._copy\n"
        "def slow(*a):\n"
        "    result = copy(*a)\n"
        "    print('copying', flush=True)\n"
        "    time.sleep(600)\n"
        "    return result\n"
        "weights._copy = slow\n"
        "sys.exit(cli.main(sys.argv[1:]))\n"
    )
    arguments = ["export", "--model", checkpoint, "--out", tmp_path / "b", "--schedule", SCHEDULE]
    process = subprocess.Popen(
        [sys.executable, "-c", program, *map(str, arguments)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "copying\n", process.communicate()[1]
    assert len(names(tmp_path)) == 2
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=WAIT_S)
    assert process.returncode == 130
    assert "interrupted" in error
    assert "Traceback" not in error
    assert names(tmp_path) == ["checkpoint"]


def test_a_disk_that_fills_up_is_explained_and_leaves_nothing(checkpoint, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(TrioError, match=r"too full.*needs.*free"):
        patch.setattr(weights_module, "_reflink", lambda *a: False)
        patch.setattr(weights_module, "_copy", full_disk)
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert names(tmp_path) == ["checkpoint"]
    export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_a_disk_too_full_to_begin_with_is_noticed_before_copying(
    dtype, checkpoint, tmp_path, monkeypatch
):
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(weights_module, "_reflink", lambda *a: False)
    with pytest.raises(TrioError, match=r"too full: .*\(1000 bytes\) are free") as refused:
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, dtype=dtype, progress=False)
    message = str(refused.value)
    assert f"the disk of {tmp_path / 'b'} is" in message, "the user's folder, not a hidden one"
    assert names(tmp_path) == ["checkpoint"]
    monkeypatch.undo()
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, dtype=dtype, progress=False)
    needed = int(re.search(r"\((\d+) bytes\) and", message)[1])
    whole = sum(info.size for info in it.manifest.files.values())
    assert needed == whole, "graphs and small files take room as well"


def test_an_existing_bundle_needs_force(exported, llava_checkpoint):
    with pytest.raises(TrioError, match="exists already"):
        export_model(llava_checkpoint, exported.path, schedule=SCHEDULE, progress=False)
    export_model(llava_checkpoint, exported.path, schedule=SCHEDULE, force=True, progress=False)


def poke(folder: Path, name: str, value: float) -> None:
    """Overwrites the first element of an fp32 tensor."""
    entry = Checkpoint.from_path(folder).tensors[checkpoint_name(folder, name)]
    with entry.file.open("r+b") as file:
        file.seek(entry.offset)
        file.write(struct.pack("<f", value))


def checkpoint_name(folder: Path, name: str) -> str:
    it = Checkpoint.from_path(folder)
    return map_checkpoint_names(family_of(it.config), it.tensors, [name])[name]


def edit_json(path: Path, edit) -> None:
    raw = json.loads(path.read_text())
    edit(raw)
    path.write_text(json.dumps(raw))


def test_a_tensor_of_the_wrong_shape_is_named(checkpoint, tmp_path):
    edit_json(
        checkpoint / "config.json", lambda raw: raw["text_config"].update(intermediate_size=96)
    )
    with pytest.raises(TrioError, match=r"mlp.*has shape \[.*config\.json asks for"):
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)


def test_a_truncated_checkpoint_is_refused(checkpoint, tmp_path):
    file = checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(TrioError, match=r"model\.safetensors"):
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("config.json", r"has no config\.json"),
        ("tokenizer.json", r"no tokenizer\.json: copy it"),
        ("processor_config.json", r"neither preprocessor_config\.json nor"),
        ("model.safetensors", "safetensors"),
    ],
)
def test_a_missing_file_of_the_checkpoint_is_named(file, message, checkpoint, tmp_path):
    (checkpoint / file).unlink()
    with pytest.raises(TrioError, match=message):
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert not (tmp_path / "b").exists()


def test_a_tokenizer_of_another_model_is_noticed(checkpoint, tmp_path):
    edit_json(checkpoint / "config.json", lambda raw: raw.update(image_token_index=93))
    with pytest.raises(TrioError, match="no token 93, which .* the image token"):
        export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json", "named"])
def test_the_chat_template_is_found_wherever_a_release_put_it(place, checkpoint, tmp_path):
    template = "T {{ messages }}"
    for name in ("chat_template.jinja", "chat_template.json"):
        (checkpoint / name).unlink(missing_ok=True)
    for name in ("processor_config.json", "tokenizer_config.json"):
        edit_json(checkpoint / name, lambda raw: raw.pop("chat_template", None))
    if place == "chat_template.json":
        (checkpoint / place).write_text(json.dumps({"chat_template": template}))
    elif place == "tokenizer_config.json":
        edit_json(checkpoint / place, lambda raw: raw.update(chat_template=template))
    elif place == "named":
        named = [{"name": "tool", "template": "X"}, {"name": "default", "template": template}]
        edit_json(checkpoint / "tokenizer_config.json", lambda raw: raw.update(chat_template=named))
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert it.chat_template == template


def test_several_end_tokens_are_kept(checkpoint, tmp_path):
    edit_json(checkpoint / "generation_config.json", lambda raw: raw.update(eos_token_id=[2, 7]))
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert it.manifest.generation.eos_token_ids == (2, 7)


def test_end_tokens_come_from_the_tokenizer_where_no_configuration_has_them(checkpoint, tmp_path):
    (checkpoint / "generation_config.json").unlink()
    edit_json(checkpoint / "config.json", lambda raw: raw["text_config"].pop("eos_token_id", 0))
    edit_json(checkpoint / "config.json", lambda raw: raw.pop("eos_token_id", 0))
    it = export_model(checkpoint, tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert it.manifest.generation.eos_token_ids == (EOS,)


def test_an_unknown_model_lists_the_recipes_and_the_nearest(tmp_path):
    with pytest.raises(TrioError, match=r"did you mean llava-next-7b\?.*tiny"):
        export_model("llava-next-7B", tmp_path / "b")


@pytest.mark.parametrize(
    ("model", "otherwise"),
    [("llava-1.5-7b", "--graphs-only"), ("nobody/no-such-model", "a recipe's name")],
)
def test_a_hub_model_out_of_reach_says_how_to_pass_a_folder(model, otherwise, cache, tmp_path):
    with pytest.raises(TrioError, match=rf"hf download .*--model FOLDER.*{otherwise}"):
        export_model(model, tmp_path / "b", progress=False)
    assert not (tmp_path / "b").exists()


def test_a_hub_model_is_found_in_the_local_cache(cache, llava_checkpoint, tmp_path):
    snapshot = snapshot_of(cache, llava_checkpoint)
    (snapshot.parent / "half").mkdir()
    it = export_model("org/name", tmp_path / "b", schedule=SCHEDULE, progress=False)
    assert it.manifest.model.name == "org/name"
    assert it.manifest.model.revision == "abc"


def test_a_half_downloaded_snapshot_is_not_taken(cache, llava_checkpoint, tmp_path):
    (snapshot_of(cache, llava_checkpoint) / "model.safetensors").unlink()
    with pytest.raises(TrioError, match=r"cache has a copy without model\.safetensors, and"):
        export_model("org/name", tmp_path / "b", schedule=SCHEDULE, progress=False)


@pytest.mark.parametrize(
    "index",
    ["", "{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {}}', '{"weight_map": {"a": []}}'],
)
def test_a_snapshot_with_a_damaged_index_is_not_taken(index, cache, llava_checkpoint, tmp_path):
    snapshot = snapshot_of(cache, llava_checkpoint)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors.index.json").write_text(index)
    with pytest.raises(TrioError, match=r"a copy without model\.safetensors\.index\.json"):
        export_model("org/name", tmp_path / "b", schedule=SCHEDULE, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"schedule": "1:0.5", "budget": 0.5}, "either --budget or --schedule"),
        ({"schedule": "2:0.5,1:0.2"}, "must increase"),
        ({"schedule": "1:0.5,9:0.2"}, "layer 9"),
        ({"schedule": "1:0.2,2:0.5"}, "must not increase"),
        ({"budget": 0.01}, r"above 0\.25$"),
        ({}, r"above 0\.25 \(0\.111 is the default: pass another as --budget\)"),
        ({"schedule": "1:0.5", "dtype": "int3"}, "unknown dtype 'int3'"),
        ({"schedule": "1:0.5", "dialect": "onxx"}, "[Uu]nknown dialect 'onxx'"),
        ({"schedule": "1:0.5", "target": "cpu-openvino", "dialect": "ort"}, "choose primitive"),
        (
            {"schedule": "1:0.5", "dtype": "bfloat16"},
            "target cpu, cannot run bfloat16 graphs: choose --dtype float32 or float16, or a "
            r"--target that can \(a100, cpu-openvino, ",
        ),
        ({"schedule": "1:0.5", "dtype": "bfloat16", "target": "cuda"}, "cannot run bfloat16"),
        (
            {"schedule": "1:0.5", "target": "jetson-orin-nano-8gb", "dialect": "onnx"},
            "tensorrt 10.3, the runtime .* does not read .* the onnx dialect: choose primitive",
        ),
        ({"schedule": "1:0.5", "target": "cpuu"}, "no target called 'cpuu'"),
        ({"schedule": "1:0.5", "positions": "random"}, "[Uu]nknown positions"),
        ({"schedule": "1:0.5", "threshold": 3.0}, "threshold is 3.0"),
        ({"schedule": "1:0.5", "graphs_only": True, "link_weights": True}, "leave out"),
        ({"graphs_only": True, "chat_template": "none"}, "pass it to trio attach-weights"),
        ({"chat_template": "no-such-file"}, "there is no file no-such-file"),
    ],
)
def test_impossible_wishes_are_refused_before_anything_is_written(
    arguments, message, llava_checkpoint, tmp_path
):
    with pytest.raises(TrioError, match=message):
        export_model(llava_checkpoint, tmp_path / "b", progress=False, **arguments)
    assert names(tmp_path) == []


def test_a_budget_becomes_a_schedule_with_that_average(llava_checkpoint, tmp_path):
    it = export_model(llava_checkpoint, tmp_path / "b", budget=0.5, progress=False)
    assert it.schedule.average(10_000, 4) == pytest.approx(5000, rel=1e-3)


def test_a_recipes_schedules_that_the_graphs_can_run_go_along(tmp_path):
    schedules = load_recipe("tiny").schedules
    it = export_model("tiny", tmp_path / "b", budget=0.111, graphs_only=True, progress=False)
    assert it.schedule == schedules["0.111"]
    assert it.budgets == {float(budget): schedule for budget, schedule in schedules.items()}
    assert it.schedule_at(0.222) == schedules["0.222"]
    for line in (f"  at 0.222 {schedules['0.222']}", f"  at 0.333 {schedules['0.333']}"):
        assert line in inspect(it)
    assert "at 0.111" not in inspect(it)
    diverse = export_model(
        "tiny", tmp_path / "d", budget=0.222, method="dart", graphs_only=True, progress=False
    )
    assert diverse.schedule_at(0.111) == schedules["0.111"].with_method("dart")


def test_a_bundle_with_other_points_than_the_recipes_solves_its_budgets(llava_checkpoint, tmp_path):
    for name, model, points in (
        ("one-shot", "tiny", "0:0.1:divprune"),
        ("methods", "tiny", "0:0.2,3:0.1,8:0.05"),
        ("unpruned", "tiny", Schedule()),
        ("no recipe", llava_checkpoint, SCHEDULE),
    ):
        it = export_model(model, tmp_path / name, schedule=points, graphs_only=True, progress=False)
        assert it.manifest.budgets == {} and "  at " not in inspect(it, interface=False)
        if it.schedule.points:
            layers, methods = it.schedule.layers, it.schedule.methods
            depth = it.config.text.num_layers
            assert it.schedule_at(0.333) == solve(0.333, depth, layers, methods)


@pytest.mark.parametrize("dialect", ["onnx", "primitive"])
def test_other_dialects_export(dialect, llava_checkpoint, tmp_path):
    it = export_model(
        llava_checkpoint, tmp_path / "b", schedule=SCHEDULE, dialect=dialect, progress=False
    )
    assert it.manifest.decode == ("separate" if dialect == "onnx" else "shared")
    assert ("decode" in it.stages) is (dialect == "onnx")


def test_inspect_says_what_a_bundle_holds(exported):
    text = inspect(exported)
    for piece in ("float32", "dialect ort", "1:0.5, 3:0.25", "select_1.onnx", "keep_index",
                  "present.1.key … present.2.value", "weights"):  # fmt: skip
        assert piece in text, piece


def test_what_a_recipe_rules_out_is_said_before_weights_are_downloaded(tmp_path, monkeypatch):
    def download(*args):
        raise AssertionError("14 GB")

    monkeypatch.setattr("trio_deploy.checkpoint.resolve.hub_folder", download)
    for model in ("llava-next-7b", "llava-hf/llava-v1.6-vicuna-7b-hf"):
        for wrong, words in (
            ({"schedule": "encoder"}, "no schedule called 'encoder'"),
            ({"schedule": "40:0.1"}, "this model has layers 0 to 31"),
            ({"budget": 0.01}, "cannot be reached"),
            ({"dtype": "fp16"}, "unknown dtype"),
        ):
            with pytest.raises(TrioError, match=words):
                export_model(model, tmp_path / "b", **wrong)


def test_options_are_an_object_or_keywords_and_keywords_win(tmp_path):
    options = ExportOptions(budget=0.5, graphs_only=True, selection=SelectionOptions(threshold=0.7))
    made = export_model("tiny", tmp_path / "b", options, threshold=0.6, progress=False)
    assert made.manifest.threshold == 0.6 and made.manifest.weights == "planned"
    again = export_model("tiny", tmp_path / "b", options, force=True, progress=False)
    assert again.manifest.threshold == 0.7


def test_a_base_model_takes_raw_prompts_alone(llava_checkpoint, tmp_path):
    small = Path(shutil.copytree(llava_checkpoint, tmp_path / "c"))
    (small / "chat_template.jinja").unlink()
    with pytest.raises(TrioError, match="--chat-template none for a base model"):
        export_model(small, tmp_path / "b", schedule="1:0.5", progress=False)
    it = export_model(small, tmp_path / "b", schedule="1:0.5", chat_template="none", progress=False)
    planned = export_model(
        small, tmp_path / "p", schedule="1:0.5", graphs_only=True, progress=False
    )
    with pytest.raises(TrioError, match="--chat-template none for a base model"):
        attach_weights(planned, small, progress=False)
    attached = attach_weights(planned, small, chat_template="none", progress=False)
    for bundle in (it, attached):
        assert "chat_template.jinja" not in bundle.manifest.files
    preparer = RequestPreparer(it)
    asked = preparer.prepare(Request("what ?", Image.new("RGB", (8, 8))))
    text = preparer.encoder.decode(asked.prompt.ids.tolist())
    assert asked.prompt.visual.any() and text == "what?"
    with pytest.raises(TrioError, match="no chat template, so messages cannot be rendered"):
        preparer.prepare(Request([{"role": "user", "content": "what ?"}]))
