"""A model named in place of a bundle is exported once into the cache, and then reused."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import filelock
import pytest

from trio_deploy import Bundle, Pipeline, Request, RuntimeOptions, TrioError
from trio_deploy.checkpoint import fingerprint
from trio_deploy.checkpoint.resolve import load_recipe, name_of, resolve
from trio_deploy.config.recipe import recipe_folder
from trio_deploy.export import cache, job
from trio_deploy.export.cache import clear_cache, find_bundle, list_cache


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """An empty cache of this test alone."""
    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def exports(own_cache, bundles, monkeypatch):
    """Replaces the export by a copy of the tiny bundle; lists models and targets."""
    done = []

    def export(model, out, options, progress):
        done.append((model, options.target.name))
        shutil.rmtree(out, ignore_errors=True)
        shutil.copytree(bundles.path("tiny"), out)

    monkeypatch.setattr(job, "export_model", export)
    return done


@pytest.fixture
def checkpoint(tmp_path):
    """A copy of the tiny model's checkpoint, which a test may change."""
    return shutil.copytree(load_recipe("tiny").checkpoint, tmp_path / "mine")


def test_a_pipeline_opens_a_recipe_and_answers(capsys):
    pipeline = Pipeline.open("tiny", threads=1)
    picture = Path(__file__).parents[2] / "examples" / "scene.png"
    assert pipeline.generate(Request("what color is the circle?", picture)).text == "white"
    assert pipeline.bundle.path.parent.parent == Path(os.environ["TRIO_CACHE"])


def test_a_model_is_exported_once_and_it_is_said(exports, capsys):
    folder = find_bundle("tiny")
    said = capsys.readouterr().err
    assert said == f"trio: there is no folder tiny: exporting tiny for cpu to {folder}\n"
    assert Bundle.load(folder).manifest.model.name == "tiny"
    assert find_bundle("tiny") == folder
    assert capsys.readouterr().err == (
        f"trio: there is no folder tiny: using the bundle of tiny in {folder}\n"
    )
    assert exports == [("tiny", "cpu")]
    assert find_bundle(folder, progress=False) == folder, "a bundle is itself"


def test_what_changes_the_bundle_changes_the_place(exports, checkpoint, monkeypatch):
    found = [find_bundle(checkpoint)]
    assert find_bundle(str(checkpoint)) == found[0]
    found.append(find_bundle(checkpoint, RuntimeOptions(target="cpu-openvino")))
    assert find_bundle(checkpoint, RuntimeOptions(runtime="openvino")) == found[-1]
    assert exports == [(str(checkpoint), "cpu"), (str(checkpoint), "cpu-openvino")]
    weights = checkpoint / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    found.append(find_bundle(checkpoint))
    with monkeypatch.context() as patch:  # a large file is read in places alone
        patch.setattr(fingerprint, "READ_WHOLE", 0)
        patch.setattr(cache, "READ_WHOLE", 0)
        found.append(find_bundle(checkpoint))
        content[len(content) // 2 + 5000] ^= 1
        weights.write_bytes(content)
        os.utime(weights, ns=(1, 1))
        found.append(find_bundle(checkpoint))
    (checkpoint / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes() + b" ")
    found.append(find_bundle(checkpoint))
    with monkeypatch.context() as patch:
        patch.setattr(cache, "__version__", "99")
        found.append(find_bundle(checkpoint))
    monkeypatch.setattr(cache, "_code", lambda: "changed")
    found.append(find_bundle(checkpoint))
    assert len(set(found)) == len(found) == len(exports)


def test_the_code_that_exports_is_part_of_what_is_known():
    assert all((cache.PACKAGE / place).exists() for place in cache._CODE.split())


def test_a_damaged_bundle_is_exported_again(exports):
    folder = find_bundle("tiny")
    with (folder / "vision.onnx").open("ab") as file:
        file.write(b"more")
    assert find_bundle("tiny") == folder
    assert len(exports) == 2
    assert Bundle.load(folder)


def test_two_processes_at_once_export_once(own_cache):
    program = "from trio_deploy.export.cache import find_bundle\nprint(find_bundle('tiny'))"
    children = [
        subprocess.Popen(
            [sys.executable, "-c", program],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    out, err = zip(*(child.communicate(timeout=240) for child in children), strict=True)
    assert [child.returncode for child in children] == [0, 0], err
    assert out[0] == out[1] and Bundle.load(out[0].strip())
    assert "".join(err).count("exporting tiny for cpu") == 1
    assert [entry.name for entry in list_cache()] == [Path(out[0].strip()).name]


def test_without_the_extra_it_is_named_before_anything_is_downloaded(exports, monkeypatch):
    def find_spec(name):
        return None if name == "onnxscript" else True

    def download(*args, **kwargs):
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    words = r"needs the package onnxscript: pip install 'trio-deploy\[export\]', or pass the folder"
    with monkeypatch.context() as patch:
        patch.setattr(importlib.util, "find_spec", find_spec)
        for model in ("llava-1.5-7b", "someone/model", "tiny"):
            with pytest.raises(TrioError, match=f"{model} has to be exported first, which {words}"):
                find_bundle(model)
    folder = find_bundle("tiny")
    monkeypatch.setattr(importlib.util, "find_spec", find_spec)
    assert find_bundle("tiny") == folder, "what was exported is found without the extra"
    with pytest.raises(TrioError, match=words):
        find_bundle("tiny", RuntimeOptions(target="cpu-openvino"))
    assert len(exports) == 1


def test_another_model_in_the_cache_does_not_hide_that_the_extra_is_missing(exports, monkeypatch):
    find_bundle("tiny")

    def download(*args, **kwargs):
        raise AssertionError("something was downloaded")

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "onnxscript" else True
    )
    for model in ("llava-1.5-7b", "someone/model", "llava-hf/llava-1.5-7b-hf"):
        with pytest.raises(TrioError, match=f"{model} has to be exported first"):
            find_bundle(model)


def test_the_name_in_the_cache_is_known_without_the_checkpoint(checkpoint, tmp_path, monkeypatch):
    for model in ("tiny", str(checkpoint), str(recipe_folder() / "tiny.yaml")):
        assert name_of(model) == resolve(model, weights_needed=False).name
    monkeypatch.chdir(checkpoint)
    assert name_of(".") == checkpoint.name
    assert name_of("llava-hf/llava-1.5-7b-hf") == "llava-1.5-7b"
    assert name_of("someone/model") == "someone/model"


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"runtime": "openvino"}, "OpenVINO is not installed"),
        ({"target": "cpu-openvino"}, "OpenVINO is not installed"),
        ({"provider": "cuda"}, "has no CUDAExecutionProvider"),
        ({"target": "cuda"}, "has no CUDAExecutionProvider"),
        ({"threads": 0}, "threads must be 1 to 1024"),
        ({"target": "cpu", "precision": "bfloat16"}, "precision is no option of ONNX Runtime"),
        ({"target": "l4"}, "there are no engines of tiny for l4.*`trio build tiny --target l4`"),
    ],
)
def test_a_model_that_this_machine_cannot_run_is_not_exported(exports, monkeypatch, options, words):
    monkeypatch.setitem(sys.modules, "openvino", None)
    with pytest.raises(TrioError, match=words):
        Pipeline.open("tiny", **options)
    assert exports == [] and list_cache() == []
    find_bundle("tiny")
    with pytest.raises(TrioError, match=words):
        Pipeline.open("tiny", **options)
    assert exports == [("tiny", "cpu")]


@pytest.mark.parametrize(
    ("runtime", "target"),
    [
        ("openvino", "cpu"),
        ("onnxruntime", "cpu-openvino"),
        ("tensorrt", "rtx"),
        ("tensorrt", "cpu"),
    ],
)
def test_a_model_is_not_exported_for_a_target_of_another_runtime(exports, runtime, target):
    with pytest.raises(TrioError, match=f"target {target} is of .*, not of {runtime}: name one"):
        Pipeline.open("tiny", target=target, runtime=runtime)
    assert exports == []


def test_what_is_checked_before_an_export_is_checked_once(exports, checkpoint, monkeypatch):
    checked = []
    real = cache._Use.check
    monkeypatch.setattr(cache._Use, "check", lambda use: (checked.append(use.model), real(use)))
    asked = []
    for model in ("tiny", str(checkpoint)):
        find_bundle(model, before_export=lambda: asked.append(1))
    assert checked == ["tiny", str(checkpoint)] and len(asked) == 2
    find_bundle("tiny", before_export=lambda: asked.append(1))
    assert len(checked) == len(asked) == 2, "nothing is exported"
    (checkpoint / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes() + b" ")
    find_bundle(checkpoint)
    assert len(checked) == len(exports) == 3, "known to be missing only once its files are read"


def test_a_budget_that_a_model_cannot_have_is_known_before_it_is_exported(exports, checkpoint):
    with pytest.raises(TrioError, match="a budget of 0.001 cannot be reached"):
        find_bundle(checkpoint, budgets=[None, 0.5, 0.001])
    assert exports == []
    assert find_bundle(checkpoint, budgets=[None, 0.5]) and len(exports) == 1


def test_what_is_neither_bundle_nor_model_is_refused_without_asking_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("out").mkdir()
    for name, words in (
        ("out", "out is neither a bundle, .* nor a checkpoint"),
        ("out/b", "there is no folder out/b: pass the folder of a bundle or a checkpoint"),
        ("tinny", "unknown model 'tinny'.*did you mean tiny"),
        ("./tiny", "the folder ./tiny does not exist"),
    ):
        with pytest.raises(TrioError, match=words):
            find_bundle(name)


def test_a_cache_that_cannot_be_written_is_named(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TRIO_CACHE", str(tmp_path / "file"))
    with pytest.raises(TrioError, match=f"cannot write to the cache {tmp_path}/file .*TRIO_CACHE"):
        find_bundle("tiny")


def test_the_cache_is_cleared_by_model_by_bundle_or_wholly(exports, own_cache, checkpoint):
    assert list_cache() == [] and clear_cache() == ([], [])
    one, other = find_bundle("tiny"), find_bundle(checkpoint)
    second = find_bundle("tiny", RuntimeOptions(target="cpu-openvino"))
    leftover = one.with_name(f".{one.name}.trio-host-1-00000000")
    leftover.mkdir()
    assert {entry.name for entry in list_cache()} == {one.name, other.name, second.name}
    assert all(entry.size > 10**6 for entry in list_cache())
    with pytest.raises(TrioError, match="no bundle of tinny"):
        clear_cache(["tinny"])
    assert clear_cache([second.name]) == ([second.name], [])
    with filelock.FileLock(own_cache / "locks" / f"{one.name}.lock"):
        assert clear_cache(["tiny"]) == ([], [one.name]), "it is being exported"
    assert clear_cache(["tiny"]) == ([one.name], [])
    assert not leftover.exists()
    assert clear_cache() == ([other.name], [])
    assert list_cache() == []
