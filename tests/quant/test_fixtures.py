"""Matrices that quantisation libraries wrote are read to the values that they unpack themselves.

scripts/make_quantised_fixtures.py made them.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from trio_deploy.quant.forms import FORMS
from trio_deploy.quant.matrix import dequantised
from trio_deploy.quant.quantization_config import read_quantization_config

FIXTURES = Path(__file__).parents[1] / "fixtures" / "quantised"
VALUES = json.loads((FIXTURES / "values.json").read_text())


@pytest.mark.parametrize("name", sorted(VALUES))
def test_matrices_have_the_values_that_their_library_unpacks(name: str) -> None:
    said = read_quantization_config(json.loads((FIXTURES / name / "config.json").read_text()))
    assert said is not None and name.startswith(said.form)
    tensors = load_file(FIXTURES / name / "model.safetensors")
    form, left = FORMS[said.form], set(tensors)
    for module, digest in VALUES[name].items():
        parts = {
            part: tensors[f"{module}.{part}"]
            for part in (*form.needed, *form.optional)
            if f"{module}.{part}" in tensors
        }
        matrix = form.read(parts, module)
        assert {matrix.bits} == said.bits
        assert matrix.block == (matrix.codes.shape[1] if name.endswith("tensors-int8") else 32)
        assert (matrix.zero is None) == said.symmetric
        assert not said.leaves_out(module)
        found = hashlib.sha256(dequantised(matrix).astype("<f4").tobytes()).hexdigest()
        assert found == digest
        left -= {f"{module}.{part}" for part in parts}
    assert not left and len(VALUES[name]) == 7


def test_the_same_weights_differ_by_their_rounding_alone() -> None:
    """8 bit is near to what 4 bit is of, so all forms hold the same matrices."""
    read = {}
    for name in ("compressed-tensors-int8", "compressed-tensors", "gptq", "gptq8", "awq"):
        tensors = load_file(FIXTURES / name / "model.safetensors")
        form = FORMS[name.partition("-int8")[0].rstrip("8")]
        (key,) = (key for key in tensors if key.endswith(f"gate_proj.{form.codes}"))
        module = key.removesuffix(f".{form.codes}")
        parts = {k.rpartition(".")[2]: t for k, t in tensors.items() if k.startswith(f"{module}.")}
        read[name] = dequantised(form.read(parts, name))
    precise = read.pop("gptq8")
    for name, values in read.items():
        error = np.linalg.norm(values - precise) / np.linalg.norm(precise)
        assert error < (0.02 if name.endswith("int8") else 0.15), name
