"""Exporting with quantised weights: the manifest, the files, and what cannot be combined."""

from __future__ import annotations

import json
from pathlib import Path

import msgspec
import numpy as np
import pytest
from msgspec.structs import replace

from tests.support.bundles import Bundles
from tests.support.quantised import calibration_of
from trio_deploy import Bundle, export_model
from trio_deploy.bundle.describe import inspect
from trio_deploy.bundle.manifest import Manifest, Quantization
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.config.options import ExportOptions
from trio_deploy.config.recipe import read_recipe
from trio_deploy.errors import TrioError
from trio_deploy.export import job
from trio_deploy.export.attach import attach_weights
from trio_deploy.export.job import quantization_of, quantize_of, resolve_job
from trio_deploy.quant.matrix import dequantised, round_to_nearest
from trio_deploy.quant.schemes import decode
from trio_deploy.runtimes.registry import load_target

PACKAGE = Path(__file__).parents[2] / "trio_deploy"
TINY = PACKAGE / "data" / "tiny"


@pytest.fixture
def int4(bundles: Bundles) -> Bundle:
    return Bundle.load(bundles.path("tiny", quantize="int4"))


def test_a_manifest_says_what_is_stored(int4: Bundle) -> None:
    assert int4.manifest.quantization == Quantization(
        scheme="int4",
        bits=4,
        block=128,
        symmetric=True,
        selections="int8",
        head="int8",
        source="rtn",
        revision=1,
    )
    name = "language_model.layers.2.mlp.up_proj.weight"
    assert int4.manifest.tensors[f"{name}.int4"].dtype == "uint8"
    assert name not in int4.manifest.tensors
    int4.check_places()


def test_older_runtimes_refuse_quantised_bundles_alone(int4: Bundle, bundles: Bundles) -> None:
    """Those that know schema 2 say that the schema is newer than they understand."""
    plain = Bundle.load(bundles.path("tiny"))
    assert json.loads(int4.manifest.dump())["schema"] == 3
    raw = json.loads(plain.manifest.dump())
    assert raw["schema"] == 2 and "quantization" not in raw


def test_a_schema_without_its_quantization_is_refused(int4: Bundle) -> None:
    raw = json.loads(int4.manifest.dump())
    with pytest.raises(TrioError, match="schema 2, not 3"):
        Manifest.from_json(raw | {"schema": 2})
    with pytest.raises(TrioError, match="schema 4, newer"):
        Manifest.from_json(raw | {"schema": 4})


def test_codes_are_those_of_the_checkpoint_rounded(int4: Bundle) -> None:
    name = "language_model.layers.2.mlp.up_proj.weight"
    entry = next(
        entry
        for other, entry in Checkpoint.from_path(TINY).tensors.items()
        if other.endswith("layers.2.mlp.up_proj.weight") and "vision" not in other
    )
    values = np.fromfile(entry.file, "<f4" if entry.dtype == "F32" else "<f2",
                         int(np.prod(entry.shape)), offset=entry.offset)  # fmt: skip
    values = values.reshape(entry.shape).astype(np.float32)
    codes, scale = (int4.manifest.tensors[f"{name}.int4{end}"] for end in ("", ".scale"))
    found = decode(
        np.fromfile(int4.path / codes.file, np.uint8, codes.nbytes, offset=codes.offset).reshape(
            codes.shape
        ),
        np.fromfile(
            int4.path / scale.file, np.float32, int(np.prod(scale.shape)), offset=scale.offset
        ).reshape(scale.shape),
        4,
        entry.shape[1],
    )
    assert np.array_equal(found, dequantised(round_to_nearest(values, 4, 128)))


def test_inspect_prints_the_share_of_each_width(int4: Bundle) -> None:
    text = inspect(int4, interface=False)
    assert "quantised  int4 (rtn), blocks of 128, selections and head int8" in text
    assert "in 4 bit" in text and "in 8 bit" in text and "in float32" in text


def test_weights_are_quantised_when_they_are_attached(int4: Bundle, tmp_path: Path) -> None:
    planned = export_model(
        "tiny", tmp_path / "b", quantize="int4", graphs_only=True, progress=False
    )
    assert planned.manifest.tensors == int4.manifest.tensors
    whole = attach_weights(planned, TINY, progress=False)
    for name in (n for n in int4.manifest.files if n.startswith("weights/")):
        assert (whole.path / name).read_bytes() == (int4.path / name).read_bytes()


def test_codes_of_fp8_are_attached_to_graphs_with_their_calibration(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"quantize": "fp8", "target": "l4", "calibration": calibration_of(TINY)}
    at_once, planned = (
        export_model("tiny", tmp_path / name, graphs_only=only, progress=False, **options)
        for name, only in (("a", False), ("b", True))
    )
    monkeypatch.setattr(job, "ROUNDING", 7)
    whole = attach_weights(planned, TINY, progress=False)
    said = at_once.manifest.quantization
    # The codes are of the version that rounds, not of the one that made the graphs.
    assert said is not None and whole.manifest.quantization == replace(said, revision=7)
    assert whole.manifest.tensors == at_once.manifest.tensors
    files = [name for name in at_once.manifest.files if name.endswith((".onnx", ".safetensors"))]
    for name in files:
        assert (whole.path / name).read_bytes() == (at_once.path / name).read_bytes(), name
    assert any(place.dtype == "float8_e4m3fn" for place in whole.manifest.tensors.values())


def test_a_recipe_or_a_target_may_name_the_scheme(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(f"checkpoint: {TINY.resolve()}\nquantize: int8\n")
    recipe, silent = read_recipe(file), read_recipe("tiny")
    file.write_text("runtime: onnxruntime\ndtype: float32\nquantize: int4-g32\n")
    target, cpu = load_target(file), load_target("cpu")
    for named, device, option, expected in (
        (silent, cpu, None, None),
        (recipe, cpu, None, "int8"),
        (recipe, target, None, "int8"),
        (silent, target, None, "int4-g32"),
        (recipe, target, "int4", "int4"),
        (recipe, target, "none", None),
    ):
        assert quantize_of(named, device, ExportOptions(quantize=option)) == expected


def test_float_selections_have_the_values_of_the_checkpoint(int4: Bundle, bundles: Bundles) -> None:
    """Of their layers' matrices and of the head, and nothing else is float that was not."""
    path = bundles.path("tiny", quantize="int4", selections="float")
    floats = Bundle.load(path)
    said = floats.manifest.quantization
    assert said is not None and said.selections == "float"
    assert "selections float, head int8" in inspect(floats, interface=False)
    more = floats.manifest.tensors.keys() - int4.manifest.tensors.keys()
    layer = floats.schedule.points[2].layer  # those before it read no matrix
    assert {name for name in more if "layers" not in name} == {"lm_head.weight"}
    assert {name.split(".")[2] for name in more if "layers" in name} == {str(layer)}
    assert {"weight"} == {name.rpartition(".")[2] for name in more}
    fewer = int4.manifest.tensors.keys() - floats.manifest.tensors.keys()
    assert {name.split(".")[2] for name in fewer} == {str(layer)}
    assert all(".weight.int8" in name for name in fewer)
    plain = Bundle.load(bundles.path("tiny"))
    for name in more:
        mine, theirs = (b.manifest.tensors[name] for b in (floats, plain))
        a, b = (
            np.fromfile(of.path / place.file, np.uint8, place.nbytes, offset=place.offset)
            for of, place in ((floats, mine), (plain, theirs))
        )
        assert np.array_equal(a, b), name
    assert set(more) <= set(floats.stages["select_3"].tensors)


def test_weights_are_attached_to_graphs_with_float_selections(
    bundles: Bundles, tmp_path: Path
) -> None:
    options = {"quantize": "int4", "selections": "float"}
    at_once = Bundle.load(bundles.path("tiny", **options))
    planned = export_model("tiny", tmp_path / "b", graphs_only=True, progress=False, **options)
    whole = attach_weights(planned, TINY, progress=False)
    assert whole.manifest.tensors == at_once.manifest.tensors
    for name in (n for n in at_once.manifest.files if n.startswith("weights/")):
        assert (whole.path / name).read_bytes() == (at_once.path / name).read_bytes()


def test_a_recipe_or_a_target_may_name_what_selections_compute_with(tmp_path: Path) -> None:
    recipe, target = tmp_path / "mine.yaml", tmp_path / "device.yaml"
    recipe.write_text(f"checkpoint: {TINY.resolve()}\nquantize: int8\nselections: float\n")
    target.write_text("runtime: onnxruntime\ndtype: float32\nquantize: int4\nselections: float\n")
    for model, device, option, expected in (
        (str(recipe), "cpu", {}, "float"),
        (str(recipe), "cpu", {"selections": "int8"}, "int8"),
        ("tiny", str(target), {}, "float"),
        ("tiny", str(target), {"quantize": "none"}, None),
    ):
        job = resolve_job(model, tmp_path / "b", ExportOptions(target=device, **option))
        said = quantization_of(job.graphs)
        assert (said and said.selections) == expected
    recipe.write_text(f"checkpoint: {TINY.resolve()}\nselections: floats\n")
    with pytest.raises(TrioError, match=r"selections cannot be 'floats' \(did you mean 'float'"):
        read_recipe(recipe)


def test_float_selections_are_refused_where_there_are_none(tmp_path: Path) -> None:
    for options, words in (
        ({"selections": "float"}, "name a scheme by --quantize, or leave --selections out"),
        ({"selections": "float", "quantize": "none"}, "beside quantised weights"),
        ({"selections": "half", "quantize": "int4"}, "unknown selections 'half': choose one of"),
    ):
        with pytest.raises(TrioError, match=words):
            export_model("tiny", tmp_path / "b", progress=False, **options)
    assert not (tmp_path / "b").exists()


def test_unknown_schemes_are_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TrioError, match="unknown quantisation 'int3'"):
        export_model("tiny", tmp_path / "b", quantize="int3", progress=False)
    assert not (tmp_path / "b").exists()


def test_quantised_weights_cannot_be_links(tmp_path: Path) -> None:
    with pytest.raises(TrioError, match="--link-weights keeps the checkpoint's files"):
        export_model("tiny", tmp_path / "b", quantize="int8", link_weights=True, progress=False)
    file = tmp_path / "mine.yaml"
    file.write_text(f"checkpoint: {TINY.resolve()}\nquantize: int8\n")
    with pytest.raises(TrioError, match="and weights in int8 are written into other ones"):
        export_model(file, tmp_path / "b", link_weights=True, progress=False)
    floats = {"quantize": "none", "dtype": "float16", "link_weights": True}
    plain = export_model(file, tmp_path / "b", progress=False, **floats)
    assert plain.manifest.quantization is None


def test_manifests_of_float_bundles_are_unchanged(bundles: Bundles) -> None:
    plain = Bundle.load(bundles.path("tiny")).manifest
    assert "quantization" not in json.loads(plain.dump())
    assert msgspec.structs.replace(plain).quantization is None
