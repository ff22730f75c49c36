"""The form of the files that `trio bench --out` writes, by which they are checked when read."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import msgspec

from trio_deploy.bench.case import GROUPS, OTHER
from trio_deploy.errors import TrioError
from trio_deploy.files import convert, read_json
from trio_deploy.pipeline.ran_as import RanAs

SCHEMA = 1

_Count = Annotated[int, msgspec.Meta(ge=0)]
_Amount = Annotated[float, msgspec.Meta(ge=0)]
_Above0 = Annotated[float, msgspec.Meta(gt=0)]


class _Spread(msgspec.Struct):
    median: _Amount
    q1: _Amount
    q3: _Amount
    least: _Amount
    most: _Amount
    runs: _Count


class _FirstToken(_Spread):
    median: _Above0
    q3: _Above0


class _Tokens(msgspec.Struct):
    prompt: _Count
    visual: _Count
    keep: list[_Count]
    ranges: list[tuple[_Count, _Count, _Count]]


class _Ratios(msgspec.Struct):
    name: str
    first_token: _Above0 | None
    prefill: _Above0 | None
    flops_limit: _Above0 | None
    flops_limit_free_selection: _Above0 | None
    of_limit: _Above0 | None
    tokens_per_s: _Above0 | None
    kv_bytes: _Above0 | None
    peak_mib: _Above0 | None


class _Case(msgspec.Struct):
    name: str
    kind: str
    budget: float | None
    runtime: str | None
    precision: str
    tokens: _Tokens
    first_token_s: _FirstToken
    prefill_s: _Spread | None
    groups_s: dict[str, _Spread] | None
    stages_s: dict[str, _Spread] | None
    tokens_per_s: _Spread | None
    kv_bytes: _Count | None
    kv_bytes_counted: _Count | None
    flops: dict[str, _Count] | None
    peak_mib: _Amount | None
    against_unpruned: _Ratios
    ran_as: RanAs | None = None
    remark: str = ""


class _Model(msgspec.Struct):
    name: str
    layers: _Count
    hidden_size: _Count
    vocab_size: _Count
    dtype: str
    dialect: str
    schedule: str


class _Workload(msgspec.Struct):
    images: _Count
    width: _Count
    height: _Count
    visual_tokens: _Count
    text_tokens: _Count
    new_tokens: _Count
    runs: _Count
    warm_up: _Count


class _Machine(msgspec.Struct):
    cpu: str
    cores: _Count | None
    threads: _Count | None
    memory_gib: _Amount | None
    system: str
    versions: dict[str, str]


class _File(msgspec.Struct):
    command: str
    schema: int
    machine: _Machine
    load_before: _Amount | None
    load_after: _Amount | None
    model: _Model
    workload: _Workload
    cases: Annotated[list[_Case], msgspec.Meta(min_length=1)]
    skipped: dict[str, str]


def read_measured(file: Path) -> dict[str, Any]:
    """Read the figures of one measurement, not of a sweep.

    Raises:
        TrioError: it cannot be read, is damaged, of another version, or something else.
    """
    remedy = "write one with `trio bench BUNDLE --out NAME` and pass NAME.json"
    problem = f"{file} holds no measurements of trio bench"
    try:
        raw = read_json(file, remedy)
    except FileNotFoundError:
        raise TrioError(f"{problem} (there is no such file): {remedy}") from None
    if not isinstance(raw, dict) or raw.get("schema") != SCHEMA or "cases" not in raw:
        raise TrioError(f"{problem} (it is something else): {remedy}")
    try:
        for case in convert(raw, _File).cases:
            if case.groups_s is not None and set(case.groups_s) != {*GROUPS, OTHER}:
                raise TrioError(f"the case {case.name} has other groups of stages")
            if case.flops is not None and "prefill" not in case.flops:
                raise TrioError(f"the case {case.name} counts no operations of the prefill")
    except TrioError as error:
        raise TrioError(f"{problem} that can be read: {error}; {remedy}") from None
    return raw
