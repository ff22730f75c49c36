"""Quantised checkpoints: each weight comes back as float or as codes, and what is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.support.quantised_checkpoints import DECODER, FORMS, quantise_checkpoint
from trio_deploy.checkpoint.checkpoint import Checkpoint
from trio_deploy.checkpoint.fit import fit_config, unused_tensors
from trio_deploy.checkpoint.quantised import QuantisedEntry
from trio_deploy.checkpoint.safetensors import TensorEntry
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import parse_config
from trio_deploy.graphs.weights import canonical_tensors
from trio_deploy.quant.matrix import dequantised

QUERY = "language_model.layers.0.self_attn.q_proj.weight"
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def folders(llava_checkpoint: Path, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """Quantised and float checkpoints of the same values, by form."""
    root = tmp_path_factory.mktemp("quantised")
    return {f: quantise_checkpoint(llava_checkpoint, root / f, f) for f in FORMS}


@pytest.fixture
def copy(folders, tmp_path: Path) -> Callable[[str], Path]:
    """A quantised checkpoint to break."""
    return lambda form: Path(shutil.copytree(folders[form][0], tmp_path / "c"))


def weights(folder: Path) -> dict[str, Any]:
    checkpoint = Checkpoint.from_path(folder)
    config = fit_config(checkpoint, parse_config(checkpoint.config))
    return checkpoint.verify(canonical_tensors(config))


def change_tensors(folder: Path, change: Callable[[Tensors], object]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def change_config(folder: Path, **values: Any) -> None:
    raw = json.loads((folder / "config.json").read_text())
    raw["quantization_config"] |= values
    (folder / "config.json").write_text(json.dumps(raw))


@pytest.mark.parametrize("form", FORMS)
def test_weights_have_the_values_of_the_float_checkpoint(folders, form: str) -> None:
    ours, plain = (weights(folder) for folder in folders[form])
    assert list(ours) == list(plain)
    for name, entry in ours.items():
        assert isinstance(entry, QuantisedEntry) == bool(DECODER.fullmatch(name))
        matrix = entry.read()
        if isinstance(entry, QuantisedEntry):
            assert (entry.bits, entry.block, entry.symmetric) == (4, 32, form != "awq")
            assert entry.shape == matrix.codes.shape
            matrix = dequantised(matrix)
        assert np.array_equal(matrix, plain[name].read())


@pytest.mark.parametrize("form", FORMS)
def test_tensors_of_matrices_are_not_left_over(folders, form: str) -> None:
    checkpoint = Checkpoint.from_path(folders[form][0])
    config = parse_config(checkpoint.config)
    assert unused_tensors(checkpoint, config, canonical_tensors(config)) == ()


def test_one_layer_may_be_float_and_one_matrix_of_8_bit(llava_checkpoint, tmp_path) -> None:
    folder, plain = quantise_checkpoint(
        llava_checkpoint,
        tmp_path,
        "compressed-tensors",
        bits=8,
        block=64,
        which=lambda name: DECODER.fullmatch(name) and "layers.1." not in name,
    )
    ours, wanted = weights(folder), weights(plain)
    assert isinstance(ours[QUERY], QuantisedEntry) and ours[QUERY].bits == 8
    assert isinstance(ours[QUERY.replace("layers.0", "layers.1")], TensorEntry)
    assert np.array_equal(dequantised(ours[QUERY].read()), wanted[QUERY].read())


def drop(end: str) -> Callable[[Tensors], object]:
    return lambda tensors: tensors.pop(next(name for name in tensors if name.endswith(end)))


def as_type(end: str, kind: Any) -> Callable[[Tensors], object]:
    def change(tensors: Tensors) -> None:
        name = next(name for name in tensors if name.endswith(end))
        tensors[name] = tensors[name].astype(kind)

    return change


def twice(tensors: Tensors) -> None:
    name = next(name for name in tensors if name.endswith("q_proj.weight_packed"))
    tensors[name.removesuffix("_packed")] = np.zeros((64, 64), np.float32)


def zero_points(tensors: Tensors) -> None:
    for name in tensors:
        if name.endswith("qzeros"):
            tensors[name] = np.full_like(tensors[name], np.int32(-0x77777778))  # 8 in each field


def other_order(tensors: Tensors) -> None:
    name = next(name for name in tensors if name.endswith("g_idx"))
    tensors[name] = np.ascontiguousarray(tensors[name][::-1])


@pytest.mark.parametrize(
    "form,change,says",
    [
        ("awq", drop("qzeros"), r"has the codes of .*, but there is no tensor qzeros"),
        ("gptq", drop("scales"), r"there is no tensor scales"),
        ("compressed-tensors", drop("weight_shape"), "no tensor weight_shape"),
        ("awq", drop("qweight"), "lacks tensor 'language_model.layers"),
        ("awq", as_type("qweight", np.int64), "qweight' is I64, which awq does not have there"),
        ("gptq", as_type("scales", np.int32), "scales' is I32, which gptq does not have there"),
        ("compressed-tensors", twice, "both as a float tensor and quantised"),
        ("gptq", zero_points, "checkpoint_format is gptq_v2, say so there"),
        ("gptq", other_order, "ordered by activation"),
    ],
)
def test_damaged_tensors_are_named(copy, form: str, change, says: str) -> None:
    folder = copy(form)
    change_tensors(folder, change)
    with pytest.raises(TrioError, match=says):
        weights(folder)


def test_zero_points_of_gptq_v2_are_as_they_are(copy) -> None:
    folder = copy("gptq")
    change_tensors(folder, zero_points)
    change_config(folder, checkpoint_format="gptq_v2")
    assert weights(folder)[QUERY].symmetric


def test_what_config_json_says_must_not_differ(copy) -> None:
    folder = copy("gptq")
    change_config(folder, bits=8)
    with pytest.raises(TrioError, match=r"has 4 bit, not 8: the quantization_config of config.js"):
        weights(folder)
    change_config(folder, bits=4, modules_to_not_convert=["k_proj"])
    with pytest.raises(TrioError, match=r"k_proj is quantised, although"):
        weights(folder)


def test_codes_without_quantization_config_are_refused(copy) -> None:
    folder = copy("awq")
    raw = json.loads((folder / "config.json").read_text())
    del raw["quantization_config"]
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match=r"holds quantised weights \('.*qweight'\), but config.js"):
        weights(folder)


def test_matrices_of_another_size_are_refused(copy) -> None:
    folder = copy("awq")
    raw = json.loads((folder / "config.json").read_text())
    raw["text_config"]["intermediate_size"] *= 2
    (folder / "config.json").write_text(json.dumps(raw))
    with pytest.raises(TrioError, match=r"_proj.weight' in .* has shape .*config.json asks"):
        weights(folder)
