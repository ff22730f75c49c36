"""Check by structural digests that the computation of every exported graph is unchanged.

    python scripts/graph_digests.py                     # check all; exit status 1 on a difference
    python scripts/graph_digests.py --only tiny/ort     # the cases whose name contains this
    python scripts/graph_digests.py --write             # renew the table

The table, tests/fixtures/graph_digests.json, names each case
`recipe/dialect-decode/dtype/schedule`. Only the package's command line is used, so the table stays
valid when the code that builds the graphs moves.

A value's digest covers the operator that makes it (domain, type, attributes, bodies, number of
outputs) and the digests of its inputs, in order. Of a graph count:

- inputs, in order: name, type, shape; outputs, in order: name, type, shape, digest of the value;
- checkpoint tensors: name, type, shape, file, offset, length, whether used or not;
- other constants: type, shape and bytes, not their names;
- the set of all values, so that a node whose result is not used counts, too; a value that is
  computed twice counts once;
- versions of the operator sets and of the format.

The order of nodes, names of nodes and intermediate values, the producer, doc strings and metadata
do not count. The digest of a file's bytes, which does cover those, is kept beside it: how many of
them differ is printed and fails nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, ValueInfoProto

from trio_deploy.cli.main import main as trio

TABLE = Path(__file__).parent.parent / "tests" / "fixtures" / "graph_digests.json"

FULL_SIZE = (
    "llava-next-7b",  # in every variant, and with other schedules
    "llama3-llava-next-8b",
    "llava-1.5-13b",
    "llava-1.5-7b",
    "llava-next-mistral-7b",
)
#: The Qwen families: one model of each in every dialect, and the others.
PATCHES = ("qwen2-vl-7b", "qwen2.5-vl-7b", "qwen3-vl-8b")
MORE_PATCHES = (
    "qwen2-vl-2b",
    "qwen2.5-vl-3b",
    "qwen3-vl-2b",
    "qwen3-vl-4b",
    "cosmos-reason1-7b",
    "cosmos-reason2-2b",
    "cosmos-reason2-8b",
)
METHODS = (
    "trio",
    "topk-gradient",
    "fastv",
    "dart",
    "divprune",
    "random",
    "cls-attention",
    "vscan",
    "cdpruner",
)
CLASS_TOKEN = ("cls-attention", "vscan")  # not for towers of patches

#: Dialect and decode layout, dtype → a target that accepts them, usually as its defaults.
VARIANTS = {
    ("ort-shared", "float32"): "cpu",
    ("ort-shared", "float16"): "cuda",
    ("onnx-separate", "float32"): "cpu",
    ("onnx-separate", "float16"): "h200",
    ("primitive-shared", "float32"): "cpu-openvino",
    ("primitive-shared", "float16"): "jetson-orin-nx-16gb",
    ("primitive-separate", "float32"): "jetson-thor",
    ("primitive-separate", "float16"): "jetson-thor",
}
ONE_LAYOUT = {key: VARIANTS[key] for key in VARIANTS if key[0] != "primitive-separate"}
FLOAT16 = {key: VARIANTS[key] for key in VARIANTS if key[1] == "float16"}
EVERY_DIALECT = {key: FLOAT16[key] for key in FLOAT16 if key in ONE_LAYOUT}
ORT16 = {("ort-shared", "float16"): "cuda"}
ORT = {("ort-shared", "float32"): "cpu"}
BFLOAT16 = {("primitive-shared", "bfloat16"): "cpu-openvino"}

#: Methods one after another, after layer 0: as many as the tiny model has room for.
_EVERY_METHOD = ",".join(f"{2 * i + 1}:{0.9 - 0.1 * i:.1f}:{m}" for i, m in enumerate(METHODS[:8]))
_AT_ENCODER = {f"encoder-{m}": ("--schedule", f"0:0.5:{m},8:0.15:{m}") for m in METHODS}
_OFTEN = ("trio", "divprune", "cls-attention", "vscan")  # what recipes have before layer 0, or may

# Name of a schedule → options of `trio export`.
_DEFAULT: dict[str, tuple[str, ...]] = {"default": ()}
_TINY = {
    **_DEFAULT,
    "every-method": ("--schedule", _EVERY_METHOD),
    "cdpruner": ("--schedule", "1:0.5:cdpruner,9:0.2:cdpruner"),
    **{name: _AT_ENCODER[name] for name in (f"encoder-{m}" for m in _OFTEN)},
    "counts-shifted": (
        *("--schedule", "1:92,10:54,15:22", "--probe", "shifted"),
        *("--positions", "renumber", "--threshold", "0.7"),
    ),
}
_TINY_REST = {name: options for name, options in _AT_ENCODER.items() if name not in _TINY}
_LARGE_ENCODER = {"encoder-0.111": ("--schedule", "encoder-0.111")}
_LARGE_METHODS = {m: ("--schedule", f"1:0.4:{m},16:0.1:{m}") for m in METHODS}
_PATCHES_METHODS = [m for m in METHODS if m not in CLASS_TOKEN]
_PATCHES_EACH = ",".join(f"{2 * i}:{0.9 - 0.1 * i:.1f}:{m}" for i, m in enumerate(_PATCHES_METHODS))


class UnsupportedGraph(Exception):
    """A model has a part that the digest does not cover."""


@dataclass(frozen=True)
class Case:
    """One export: `name` as in the table, `options` for `trio export`."""

    name: str
    options: tuple[str, ...]


@dataclass(frozen=True)
class Digests:
    """Digests of one graph: of what it computes, and of its file's bytes."""

    structure: str
    bytes: str


def cases() -> list[Case]:
    """List all exports of the table."""
    large, *others = FULL_SIZE
    return [
        *_cases("tiny", _TINY, VARIANTS),
        *_cases("tiny", _TINY_REST, ORT),
        *_cases("tiny", {"every-method": _TINY["every-method"]}, BFLOAT16),
        *_cases(large, _DEFAULT, VARIANTS),
        *_cases(large, _LARGE_ENCODER, ORT | FLOAT16),
        *_cases(large, _LARGE_METHODS, ORT),
        *(case for recipe in others for case in _cases(recipe, _DEFAULT, ONE_LAYOUT)),
        *(case for recipe in PATCHES for case in _cases(recipe, _DEFAULT, EVERY_DIALECT)),
        *_cases(PATCHES[-1], {"methods": ("--schedule", _PATCHES_EACH)}, EVERY_DIALECT),
        *(case for recipe in MORE_PATCHES for case in _cases(recipe, _DEFAULT, ORT16)),
    ]


def _cases(
    recipe: str,
    schedules: Mapping[str, tuple[str, ...]],
    variants: Mapping[tuple[str, str], str],
) -> Iterator[Case]:
    for (layout, dtype), target in variants.items():
        dialect = layout.split("-")[0]
        common = ("--model", recipe, "--target", target, "--dialect", dialect, "--dtype", dtype)
        for name, options in schedules.items():
            yield Case(f"{recipe}/{layout}/{dtype}/{name}", common + options)


def export_digests(case: Case) -> dict[str, Digests]:
    """Export into a temporary folder and digest what was written, by stage.

    Raises:
        RuntimeError: the export failed.
    """
    said = io.StringIO()
    with tempfile.TemporaryDirectory() as temporary:
        out = Path(temporary) / "bundle"
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            status = trio(["export", "--graphs-only", "--out", str(out), *case.options])
        if status:
            raise RuntimeError(said.getvalue().strip() or f"exit status {status}")
        return {file.stem: _file_digests(file.read_bytes()) for file in sorted(out.glob("*.onnx"))}


_known: dict[str, Digests] = {}  # by digest of bytes: many exports write the same vision graph


def _file_digests(content: bytes) -> Digests:
    key = hashlib.sha256(content).hexdigest()
    if key not in _known:
        structure = model_digest(onnx.load_model_from_string(content))
        _known[key] = Digests(structure, key[:16])
    return _known[key]


def model_digest(model: ModelProto) -> str:
    """Digest what a model computes, 32 hexadecimal digits.

    Raises:
        UnsupportedGraph: the model has functions or sparse tensors, or a value without a source.
    """
    if model.functions:
        raise UnsupportedGraph("functions")
    versions = sorted((_domain(entry.domain), entry.version) for entry in model.opset_import)
    graph = model.graph
    values = {info.name: _hash("input", *_interface(info)) for info in graph.input}
    made = _evaluate(graph, values, depth=0)
    outputs = [(*_interface(info), _find(values, info.name)) for info in graph.output]
    inputs = [_interface(info) for info in graph.input]
    return _hash("model", model.ir_version, versions, inputs, outputs, sorted(made))[:32]


def _evaluate(graph: GraphProto, values: dict[str, str], depth: int) -> set[str]:
    """Add the digests of a graph's values to `values`; return those of constants and nodes."""
    if graph.sparse_initializer:
        raise UnsupportedGraph("sparse tensors")
    made = set()
    for tensor in graph.initializer:
        values[tensor.name] = _initializer(tensor)
        made.add(values[tensor.name])
    for node in graph.node:
        digest = _node(node, values, depth)
        made.add(digest)
        for index, name in enumerate(node.output):
            values[name] = _hash("value", digest, index)
    return made


def _node(node: NodeProto, values: Mapping[str, str], depth: int) -> str:
    attributes = sorted(
        (attribute.name, _attribute(attribute, values, depth)) for attribute in node.attribute
    )
    inputs = [_find(values, name) if name else "" for name in _trimmed(node.input)]
    outputs = [bool(name) for name in _trimmed(node.output)]
    return _hash(
        "node", _domain(node.domain), node.op_type, node.overload, attributes, inputs, outputs
    )


def _attribute(attribute: AttributeProto, values: Mapping[str, str], depth: int) -> tuple[Any, ...]:
    if attribute.ref_attr_name:
        raise UnsupportedGraph("attributes of functions")
    kind = attribute.type
    if kind == AttributeProto.GRAPH:
        return kind, _body(attribute.g, values, depth + 1)
    if kind == AttributeProto.GRAPHS:
        return kind, tuple(_body(graph, values, depth + 1) for graph in attribute.graphs)
    if kind == AttributeProto.TENSOR:
        return kind, _initializer(attribute.t)
    value = onnx.helper.get_attribute_value(attribute)
    plain = (int, float, bytes)
    if not isinstance(value, plain) and not all(isinstance(item, plain) for item in value):
        raise UnsupportedGraph(f"attribute {attribute.name}")
    return kind, value if isinstance(value, plain) else tuple(value)


def _body(graph: GraphProto, outer: Mapping[str, str], depth: int) -> str:
    """Digest a body: its inputs are numbered, captured values have their outer digests."""
    values = dict(outer)
    for index, info in enumerate(graph.input):
        values[info.name] = _hash("body input", depth, index, *_interface(info)[1:])
    made = _evaluate(graph, values, depth)
    outputs = [(*_interface(info)[1:], _find(values, info.name)) for info in graph.output]
    return _hash("body", len(graph.input), outputs, sorted(made))


def _initializer(tensor: TensorProto) -> str:
    shape = tuple(tensor.dims)
    if tensor.data_location == TensorProto.EXTERNAL:
        place = sorted((entry.key, entry.value) for entry in tensor.external_data)
        return _hash("external", tensor.name, tensor.data_type, shape, place)
    content = tensor.raw_data or onnx.numpy_helper.to_array(tensor).tobytes()
    return _hash("constant", tensor.data_type, shape, hashlib.sha256(content).hexdigest())


def _interface(info: ValueInfoProto) -> tuple[str, int, tuple[int | str, ...] | None]:
    """Return name, type and shape; None for a shape that is not given."""
    kind = info.type.tensor_type
    if not info.type.HasField("tensor_type"):
        raise UnsupportedGraph(f"{info.name} is not a tensor")
    if not kind.HasField("shape"):
        return info.name, kind.elem_type, None
    dims = tuple(
        dim.dim_value if dim.HasField("dim_value") else dim.dim_param for dim in kind.shape.dim
    )
    return info.name, kind.elem_type, dims


def _find(values: Mapping[str, str], name: str) -> str:
    if name not in values:
        raise UnsupportedGraph(f"the value {name} is used before it is computed")
    return values[name]


def _trimmed(names: Sequence[str]) -> list[str]:
    """Drop absent optional values at the end, which may be written or not."""
    kept = list(names)
    while kept and not kept[-1]:
        kept.pop()
    return kept


def _domain(name: str) -> str:
    return "" if name == "ai.onnx" else name


def _hash(*parts: Any) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()


Table = dict[str, dict[str, Digests]]


def read_table(path: Path) -> Table:
    """Read case → stage → digests; an empty table where there is no file."""
    if not path.exists():
        return {}
    return {
        case: {
            stage: Digests(digest, entry["bytes"][stage])
            for stage, digest in entry["structure"].items()
        }
        for case, entry in json.loads(path.read_text(encoding="utf-8")).items()
    }


def write_table(table: Table, path: Path) -> None:
    """Write the table, cases in the order of `cases()`."""
    order = {case.name: place for place, case in enumerate(cases())}
    content = {
        name: {
            "structure": {stage: found.structure for stage, found in table[name].items()},
            "bytes": {stage: found.bytes for stage, found in table[name].items()},
        }
        for name in sorted(table, key=lambda name: order.get(name, len(order)))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def differences(
    known: Mapping[str, Digests], found: Mapping[str, Digests], case: str
) -> Iterator[str]:
    """Name the stages of a case whose structure differs, which are missing, or which are new."""
    for stage in sorted(known.keys() | found.keys()):
        if stage not in found:
            yield f"missing  {case}/{stage}"
        elif stage not in known:
            yield f"new      {case}/{stage}"
        elif known[stage].structure != found[stage].structure:
            yield f"differs  {case}/{stage}"


def collect(wanted: Sequence[Case]) -> tuple[Table, list[str]]:
    """Export the cases one after another; return their digests and what failed."""
    table: Table = {}
    failed = []
    for number, case in enumerate(wanted, 1):
        began = time.perf_counter()
        try:
            table[case.name] = export_digests(case)
            said = f"{len(table[case.name])} graphs"
        except (RuntimeError, UnsupportedGraph) as error:
            failed.append(f"failed   {case.name}: {error}")
            said = "failed"
        took = time.perf_counter() - began
        print(f"[{number:3}/{len(wanted)}] {case.name}: {said}, {took:.1f} s", file=sys.stderr)
    return table, failed


def compare(known: Table, found: Table, only: str) -> list[str]:
    """Print how many digests of bytes differ; list what differs in structure."""
    said = []
    for case in sorted(key for key in known.keys() | found.keys() if only in key):
        said += differences(known.get(case, {}), found.get(case, {}), case)
    pairs = [
        (known[case][stage].bytes, digests.bytes)
        for case, stages in found.items()
        for stage, digests in stages.items()
        if stage in known.get(case, {})
    ]
    changed = sum(before != now for before, now in pairs)
    print(f"{changed} of {len(pairs)} graphs differ in their bytes (for information)")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Check or renew the table; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="renew the table")
    parser.add_argument("--only", default="", metavar="SUBSTRING", help="of the cases' names")
    parser.add_argument("--table", type=Path, default=TABLE, help=f"default: {TABLE.name}")
    args = parser.parse_args(argv)
    wanted = [case for case in cases() if args.only in case.name]
    known = read_table(args.table)
    found, failed = collect(wanted)
    if args.write and not failed:
        write_table({**known, **found} if args.only else found, args.table)
        print(f"{args.table}: {len(found)} cases written")
        return 0
    problems = failed + ([] if args.write else compare(known, found, args.only))
    if not wanted and not problems:
        problems = [f"nothing is called {args.only!r}"]
    print("\n".join(problems) or f"{sum(map(len, found.values()))} graphs have their structure")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
