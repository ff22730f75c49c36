"""How to add a dialect, shown with one that differs from `primitive` in a single operator.

1. Derive a class from `graphs.dialects.base.Dialect`, or from the dialect that it resembles, in a
   file of its own in graphs/dialects/. Give it a `name`, the version of the standard operators
   (`opset`, and `decode_opset` for decode.onnx) and, where it needs them, further operator sets in
   `domains`. The other attributes of `Dialect` say how a runtime is to be treated; their defaults
   are the careful choice.
2. Override the operators in which it differs. A method gets `op`, which writes nodes, and values
   whose types and shapes are known; an operator without an ONNX schema declares its result with
   `typed`. `prefill_window` and `decode_window` prepare what `attention` of every layer reads.
3. Enter the class in graphs/dialects/table.py, and its name in the `dialects` of the RuntimeSpec of
   each runtime that reads it.

Nothing else changes: `trio export --dialect NAME` writes all stages, selection included.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from tests.support.pictures import make_picture
from trio_deploy import Pipeline, Request, export_model
from trio_deploy.graphs.dialects.primitive import PrimitiveDialect
from trio_deploy.graphs.dialects.table import DIALECTS
from trio_deploy.graphs.values import dtype_of, shape_of, typed
from trio_deploy.graphs.weight import Weight
from trio_deploy.runtimes import onnxruntime

SCHEDULE = "0:0.9:divprune,1:0.7,2:0.4:fastv"


class EinsumDialect(PrimitiveDialect):
    """`primitive`, but products with weights are Einsum: no transposed copy of a weight."""

    name = "einsum"

    def linear(
        self, op: Any, x: ir.Value, weight: Weight, bias: ir.Value | None = None
    ) -> ir.Value:
        y = op.Einsum(x, weight, equation="...i,oi->...o")
        typed(y, dtype_of(x), [*shape_of(x)[:-1], shape_of(weight)[0]])
        return y if bias is None else op.Add(y, bias)


def operators(bundle: Path) -> set[str]:
    graphs = [onnx.load(file, load_external_data=False).graph for file in bundle.glob("*.onnx")]
    return {node.op_type for graph in graphs for node in graph.node}


def test_a_dialect_of_its_own_exports_and_answers_as_the_one_it_resembles(
    llava_next_checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(DIALECTS, "einsum", EinsumDialect)
    known = onnxruntime.RUNTIME
    reads = replace(known, dialects=(*known.dialects, "einsum"))
    monkeypatch.setattr(onnxruntime, "RUNTIME", reads)
    answers = {}
    for dialect in ("primitive", "einsum"):
        bundle = export_model(
            llava_next_checkpoint,
            tmp_path / dialect,
            dialect=dialect,
            schedule=SCHEDULE,
            progress=False,
        )
        assert bundle.manifest.dialect == dialect
        pipeline = Pipeline.open(bundle, threads=1)
        request = Request("What is it?", [make_picture()], max_new_tokens=6)
        answers[dialect] = pipeline.generate_batch([request])[0]
    assert operators(tmp_path / "einsum") - operators(tmp_path / "primitive") == {"Einsum"}
    primitive, einsum = answers["primitive"], answers["einsum"]
    assert einsum.token_ids == primitive.token_ids
    for ours, theirs in zip(einsum.kept, primitive.kept, strict=True):
        np.testing.assert_array_equal(ours, theirs)
