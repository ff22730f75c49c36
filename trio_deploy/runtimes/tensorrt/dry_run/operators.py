"""Operators that a version of TensorRT supports, from `data/tensorrt/operators.yaml`."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Any

import yaml

from trio_deploy.runtimes.tensorrt.target import parse_version


@dataclass(frozen=True)
class OperatorTable:
    """Operators, types and limits of TensorRT's ONNX parser, from one version on.

    Attributes:
        version: first version that the table is for.
        source: documents that the table was taken from.
        opset: oldest and newest supported operator set.
        bfloat16: whether float operators support bfloat16.
        narrows_int64: whether int64 becomes int32.
        max_topk: maximum number of elements of TopK.
        max_elements: maximum elements per tensor; None: undocumented.
        serial: operators that become a loop over an axis.
        constant: operator → numbers of inputs that must be constants.
        operators: operator → its element types, letters of F, f, I, B (see the data file).
        shape_operators: operators that may compute sizes.
        codes: types of quantised matrices that stay narrow where activations are float.
    """

    version: str
    source: str
    opset: tuple[int, int]
    bfloat16: bool
    narrows_int64: bool
    max_topk: int
    max_elements: int | None
    serial: Collection[str]
    constant: Mapping[str, Collection[int]]
    operators: Mapping[str, str]
    shape_operators: Collection[str]
    codes: Collection[str] = ()

    def takes(self, operator: str, dtype: str) -> bool:
        """Whether an operator of the table supports an element type, such as "float16"."""
        types = self.operators[operator]
        if dtype in ("float32", "float16"):
            return "F" in types or "f" in types
        if dtype == "bfloat16":
            return "F" in types and self.bfloat16
        if dtype in ("int32", "int64"):
            return "I" in types
        return dtype == "bool" and "B" in types


def operator_table(version: str) -> OperatorTable:
    """The table for a version of TensorRT: the newest one that is not newer than it."""
    wanted = parse_version(version)
    fitting = [table for table in _tables() if parse_version(table.version) <= wanted]
    return fitting[-1] if fitting else _tables()[0]


@cache
def _tables() -> tuple[OperatorTable, ...]:
    file = resources.files("trio_deploy").joinpath("data/tensorrt/operators.yaml")
    raw: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    shape_operators = frozenset(raw["shape_operators"])
    return tuple(
        OperatorTable(shape_operators=shape_operators, **{**table, "opset": tuple(table["opset"])})
        for table in raw["tables"]
    )
