"""`trio build --dry-run`: check a bundle's graphs against a version of TensorRT, without a GPU.

Every graph is parsed, the sizes of all its tensors are resolved at the minimum, typical and maximum
shapes of its profiles, and operators, element types, constants, loops and operators on sizes are
compared with the operator table of the version (`data/tensorrt/operators.yaml`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from google.protobuf.message import DecodeError
from onnx import ModelProto, NodeProto, TensorProto, helper

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError
from trio_deploy.files import format_bytes
from trio_deploy.runtimes.tensorrt.dry_run.operators import OperatorTable, operator_table
from trio_deploy.runtimes.tensorrt.dry_run.shapes import (
    Resolved,
    Step,
    UnknownShape,
    activation_bytes,
    reads,
    resolve,
    shape_path,
)
from trio_deploy.runtimes.tensorrt.profiles import Profile, profiles
from trio_deploy.runtimes.tensorrt.target import (
    OLDEST_TENSORRT,
    Library,
    parse_version,
    require_engines,
)

#: The operator table that holds for TensorRT-RTX, which publishes none: its parser is of one line
#: with that of TensorRT 10.15, and takes every graph that we export.
_RTX_TABLE = "10.15"
_CORNERS = ("min", "opt", "max")
#: Type that activations may be rounded to, by a pair of QuantizeLinear and DequantizeLinear.
_ROUNDED = "float8e4m3fn"
#: By type of 4 bit: entries that may share a scale, and the scheme that has them.
_BLOCKS = {"int4": ((64, 128), "int4"), "float4e2m1": ((16,), "nvfp4")}
#: Opset that the type of some codes came with.
_OPSETS_OF_CODES = {TensorProto.INT4: 21, TensorProto.FLOAT4E2M1: 23}

#: Operator → numbers of the inputs whose elements it computes with; others: the first.
_DATA_INPUTS: Mapping[str, slice] = {
    **dict.fromkeys(("Add", "Sub", "Mul", "Div", "Max", "Min", "Pow", "Equal"), slice(None)),
    **dict.fromkeys(("Less", "LessOrEqual", "Greater", "GreaterOrEqual"), slice(None)),
    **dict.fromkeys(("MatMul", "Gemm", "Concat", "And", "Or", "Range"), slice(None)),
    **dict.fromkeys(("LayerNormalization", "RMSNormalization", "Conv"), slice(None)),
    "Where": slice(1, None),
    "Loop": slice(2, None),
    "Attention": slice(0, 3),
    "RotaryEmbedding": slice(0, 3),
    "TensorScatter": slice(0, 2),
    "ConstantOfShape": slice(0, 0),
    "Shape": slice(0, 0),
}


@dataclass(frozen=True)
class Finding:
    """A remark about a graph.

    Attributes:
        error: whether TensorRT rejects the graph for it.
    """

    stage: str
    message: str
    error: bool


@dataclass(frozen=True)
class StageCheck:
    """Facts about one graph.

    Attributes:
        operators: operator → number of nodes, bodies of loops included.
        types: element types that occur.
        shape_operators: operators that compute sizes.
        corners: profile and corner → shape of each output.
        activations: maximum bytes in use at once at the largest sizes, without fusion and with
            Attention split up.
    """

    stage: str
    operators: dict[str, int]
    types: tuple[str, ...]
    shape_operators: tuple[str, ...]
    profiles: tuple[Profile, ...]
    corners: dict[str, dict[str, tuple[int, ...]]]
    activations: int


@dataclass(frozen=True)
class DryRun:
    """Result of `trio build --dry-run`."""

    bundle: str
    target: str
    library: Library
    table: OperatorTable
    stages: tuple[StageCheck, ...]
    findings: tuple[Finding, ...]

    @property
    def passed(self) -> bool:
        return not any(finding.error for finding in self.findings)

    def to_json(self) -> dict[str, Any]:
        """Plain values; sizes in elements, activations in bytes."""
        return {
            "bundle": self.bundle,
            "target": self.target,
            "flavour": self.library.flavour,
            "tensorrt": self.library.version,
            "operator_table": {"version": self.table.version, "source": self.table.source},
            "passed": self.passed,
            "stages": {
                check.stage: {
                    "operators": check.operators,
                    "types": list(check.types),
                    "shape_operators": list(check.shape_operators),
                    "profiles": [profile.to_json() for profile in check.profiles],
                    "corners": {
                        corner: {name: list(shape) for name, shape in outputs.items()}
                        for corner, outputs in check.corners.items()
                    },
                    "activation_bytes_at_most": check.activations,
                }
                for check in self.stages
            },
            "findings": [
                {"stage": f.stage, "message": f.message, "error": f.error} for f in self.findings
            ],
        }

    def to_text(self) -> str:
        lines = [
            f"{self.bundle} for {self.target}, {self.library.name} "
            f"(operator table of {self.table.version})",
            "",
            f"{'stage':<11}{'nodes':>7}{'operators':>11}{'profiles':>10}{'activations':>13}  types",
        ]
        for check in self.stages:
            lines.append(
                f"{check.stage:<11}{sum(check.operators.values()):>7}{len(check.operators):>11}"
                f"{len(check.profiles):>10}{'<= ' + format_bytes(check.activations):>13}  "
                + ", ".join(check.types)
            )
        lines += ["", f"operators  {' '.join(self._all('operators'))}"]
        lines += [f"on sizes   {' '.join(self._all('shape_operators'))}", ""]
        for finding in self.findings:
            lines.append(
                f"{'error' if finding.error else 'note':<7}{finding.stage}: {finding.message}"
            )
        count = sum(len(check.corners) for check in self.stages)
        if self.passed:
            lines.append(
                f"graphs: passed, {len(self.stages)} of them at the smallest, typical and largest "
                f"sizes of their profiles ({count} in all); nothing was built"
            )
        else:
            lines.append("graphs: failed, TensorRT cannot build them")
        return "\n".join(lines)

    def _all(self, kind: str) -> list[str]:
        return sorted({name for check in self.stages for name in getattr(check, kind)})


def require_dialect(dialect: str, library: Library, bundle: str) -> None:
    """Reject a bundle whose graphs a TensorRT does not read.

    Raises:
        TrioError: the dialect is not supported; the message names a dialect that is.
    """
    able = library.dialects
    if dialect not in able:
        raise TrioError(
            f"{bundle} has graphs in the {dialect} dialect, but {library.name} reads "
            f"{' or '.join(able)}: export again with --target TARGET of this device, or with "
            f"--dialect {able[0]}"
        )


def dry_run(
    bundle: Bundle,
    target: Target,
    *,
    tensorrt: str | None = None,
    stages: Sequence[str] | None = None,
) -> DryRun:
    """Check the graphs of a bundle, with or without weights.

    Args:
        tensorrt: version of TensorRT that will build; None: the target's.
        stages: stages to check; None: all.

    Raises:
        TrioError: the target has no TensorRT or does not suit the bundle, a stage is unknown, or a
            graph cannot be read. What TensorRT does not support is a finding.
    """
    library = require_engines(target)
    if tensorrt is not None:
        if library.flavour == "rtx":
            raise TrioError(
                f"--tensorrt is a version of TensorRT, but {target.name} is a target of "
                "TensorRT-RTX: leave it out, or name another --target"
            )
        library = replace(library, version=tensorrt)
        if parse_version(tensorrt) < OLDEST_TENSORRT:
            raise TrioError(f"TensorRT {tensorrt} is too old: 8.6 is the oldest supported version")
    require_dialect(bundle.manifest.dialect, library, str(bundle.path))
    table = operator_table(library.version or _RTX_TABLE)
    for stage in stages or ():
        bundle.graph(stage)  # its error lists the stages
    checks: list[StageCheck] = []
    findings: list[Finding] = []
    for stage, found in profiles(bundle, target).items():
        if stages is not None and stage not in stages:
            continue
        model = read_graph(bundle.graph(stage))
        check, remarks = check_graph(stage, model, found, table)
        checks.append(check)
        findings += [*remarks, *_workspace(check, target)]
    return DryRun(
        bundle=bundle.manifest.model.name,
        target=target.name,
        library=library,
        table=table,
        stages=tuple(checks),
        findings=tuple(findings),
    )


def _workspace(check: StageCheck, target: Target) -> Iterator[Finding]:
    """Note activations that may exceed the workspace, where fused nodes keep their results.

    It is no error: fused nodes may need less than the same nodes one by one.
    """
    limit = target.workspace_gib
    if limit is not None and check.activations > limit * 2**30:
        needs = format_bytes(check.activations)
        message = (
            f"has activations of up to {needs}, beyond workspace_gib {limit:g} of {target.name}: "
            f"TensorRT may find no implementation: raise it to {-(-check.activations // 2**30)} or "
            "leave it out"
        )
        yield Finding(check.stage, message, False)


def read_graph(file: Path) -> ModelProto:
    """Read a graph without the data of its weights.

    Raises:
        TrioError: the file cannot be parsed.
    """
    try:
        return onnx.load(str(file), load_external_data=False)
    except (OSError, DecodeError) as error:
        raise TrioError(f"{file} cannot be read as ONNX: export the bundle again") from error


def check_graph(
    stage: str, model: ModelProto, found: Sequence[Profile], table: OperatorTable
) -> tuple[StageCheck, list[Finding]]:
    """Check one graph against an operator table, at the corners of its profiles."""
    messages = list(_opsets(model, table))
    corners: dict[str, dict[str, tuple[int, ...]]] = {}
    activations = 0
    unknown: dict[tuple[str, str, str], str] = {}
    largest: Resolved | None = None
    ranges = [part for profile in found for part in (profile, *profile.uses)]
    for profile in ranges:
        for number, corner in enumerate(_CORNERS):
            label = corner if len(ranges) == 1 else f"{profile.name} {corner}"
            shapes = {name: bounds[number] for name, bounds in profile.shapes.items()}
            values = {name: bounds[number] for name, bounds in profile.values.items()}
            try:
                resolved = resolve(model, shapes, values)
            except UnknownShape as error:
                unknown.setdefault((error.node.op_type, error.node.name, str(error)), label)
                continue
            corners[label] = {
                entry.name: resolved.tensors[entry.name].shape for entry in model.graph.output
            }
            activations = max(activations, activation_bytes(model, resolved))
            if largest is None or corner == "max":
                largest = resolved
                messages += _volumes(resolved, table, label)
    for (operator, name, reason), label in unknown.items():
        messages.append((f"{operator} {reason} ({name or 'unnamed'}, at {label})", True))
    operators: Counter[str] = Counter()
    types: set[str] = set()
    on_sizes: set[str] = set()
    if largest is not None:
        operators = Counter(step.node.op_type for step in largest.steps)
        types = {dtype_name(tensor.dtype) for tensor in largest.tensors.values()}
        path = shape_path(model.graph, largest)
        on_sizes = {node.op_type for node in path.values()}
        where: dict[tuple[str, str], list[str]] = {}
        for step in largest.steps:
            for reason in _node(step, table):
                where.setdefault((step.node.op_type, reason), []).append(step.node.name)
        messages += [(_at(*key, names), True) for key, names in where.items()]
        messages += _aliases(model, largest, found)
    for name in sorted(on_sizes - set(table.shape_operators)):
        messages.append((f"computes sizes with {name}, which TensorRT does not support", True))
    for name in _unused(model):
        messages.append((f"no node uses the input {name}", False))
    for name in sorted(set(table.serial) & set(operators)):
        messages.append((f"{name} becomes a loop over its axis, one step per element", False))
    findings = [Finding(stage, text, error) for text, error in dict.fromkeys(messages)]
    check = StageCheck(
        stage=stage,
        operators=dict(sorted(operators.items())),
        types=tuple(sorted(types - {"undefined"})),
        shape_operators=tuple(sorted(on_sizes)),
        profiles=tuple(found),
        corners=corners,
        activations=activations,
    )
    return check, findings


def _unused(model: ModelProto) -> list[str]:
    """Inputs that neither a node nor an output of the graph uses."""
    used = {entry.name for entry in model.graph.output} | set(reads(model.graph))
    return [entry.name for entry in model.graph.input if entry.name not in used]


def dtype_name(dtype: int) -> str:
    """Name of an element type: `float32` for onnx.TensorProto.FLOAT."""
    name = str(TensorProto.DataType.Name(dtype)).lower()
    return {"float": "float32", "double": "float64"}.get(name, name)


_Messages = Iterator[tuple[str, bool]]


def _opsets(model: ModelProto, table: OperatorTable) -> _Messages:
    for entry in model.opset_import:
        oldest, newest = table.opset
        if entry.domain:
            yield f"uses operators of {entry.domain}, which need plugins", True
        elif newest < entry.version <= _opset_of_codes(model) and table.codes:
            yield (
                f"has opset {entry.version}, which codes of 4 bit need; {oldest} to {newest} are "
                "documented, and the parser's source does not ask",
                False,
            )
        elif not oldest <= entry.version <= newest:
            yield f"has opset {entry.version}; opsets {oldest} to {newest} are supported", True


def _opset_of_codes(model: ModelProto) -> int:
    """Opset that a graph has for its codes of 4 bit; 0: it has none."""
    types = {tensor.data_type for tensor in model.graph.initializer}
    return max((_OPSETS_OF_CODES.get(each, 0) for each in types), default=0)


def _volumes(resolved: Resolved, table: OperatorTable, label: str) -> _Messages:
    made = [(tensor.elements, step.node) for step in resolved.steps for tensor in step.outputs]
    largest, node = max(made, key=lambda pair: pair[0])
    if table.max_elements is not None and largest > table.max_elements:
        message = (
            f"{node.op_type} makes {largest} elements at {label}, but a tensor has at most "
            f"{table.max_elements}: lower the target's limits"
        )
        yield message, True


def _node(step: Step, table: OperatorTable) -> Iterator[str]:
    node = step.node
    if node.op_type == "DequantizeLinear" and not node.domain:
        yield from _dequantise(step, table)
        return
    if node.op_type == "QuantizeLinear" and not node.domain:
        yield from _quantise(step, table)
        return
    if node.domain or node.op_type not in table.operators:
        yield "is not supported"
        return
    for tensor in step.inputs[_DATA_INPUTS.get(node.op_type, slice(0, 1))]:
        if tensor is not None and not table.takes(node.op_type, dtype_name(tensor.dtype)):
            yield f"does not support {dtype_name(tensor.dtype)}"
    for tensor in step.outputs:
        if dtype_name(tensor.dtype) == "float64":
            yield "makes float64, which is computed in float32"
    for number in table.constant.get(node.op_type, ()):
        if number < len(step.inputs):
            given = step.inputs[number]
            if given is not None and not given.constant:
                yield f"needs its input {number} as a constant"
    if table.narrows_int64:
        yield from _narrowing(step)
    rule = _RULES.get(node.op_type)
    if rule is not None:
        yield from rule(step, table)


def _quantise(step: Step, table: OperatorTable) -> Iterator[str]:
    """What a version does not take of activations that are rounded."""
    scale, codes = step.inputs[1], step.outputs[0]
    assert scale is not None
    dtype = dtype_name(codes.dtype)
    if dtype != _ROUNDED or dtype not in table.codes:
        yield f"does not round activations to {dtype}: export without --quantize"
    elif not scale.constant or scale.elements != 1:
        yield "needs one scale, which is known when the engine is built"


def _dequantise(step: Step, table: OperatorTable) -> Iterator[str]:
    """What a version does not take of a quantised matrix."""
    codes, scale = step.inputs[:2]
    assert codes is not None and scale is not None
    dtype, attributes = dtype_name(codes.dtype), _attributes(step.node)
    if dtype not in table.codes:
        yield f"does not keep weights in {dtype}: export without --quantize"
        return
    rounded = dtype == _ROUNDED
    if not scale.constant or not (codes.constant or rounded):
        yield "takes codes that are not weights"
    if any(tensor is not None for tensor in step.inputs[2:]):
        yield "has zero points: quantise symmetrically"
    block = attributes.get("block_size", 0)
    sizes, scheme = _BLOCKS.get(dtype, ((), ""))
    if sizes and block not in sizes:
        needed = " or ".join(map(str, sizes))
        yield f"has blocks of {block}, not of {needed}: export with --quantize {scheme}"
    if sizes and codes.shape[-1] % 2:
        yield f"has rows of {codes.shape[-1]} codes of 4 bit, an odd number"
    if dtype == "int8" and block:
        yield "has codes of 8 bit in blocks: only a scale per row stays narrow for certain"


def _narrowing(step: Step) -> Iterator[str]:
    if step.node.op_type == "Slice":  # its ends beyond int32 mean the end, and are clamped
        return
    limits = np.iinfo(np.int32)
    for tensor in step.inputs:
        if tensor is None or not tensor.constant or tensor.dtype != TensorProto.INT64:
            continue
        value = tensor.value
        if value is None or not value.size:
            continue
        if value.min() < limits.min or value.max() > limits.max:
            yield "has a constant beyond int32"


def _topk(step: Step, table: OperatorTable) -> Iterator[str]:
    count, attributes = step.inputs[1], _attributes(step.node)
    if count is None or count.value is None:
        yield "takes a number of elements that is not known"
    elif int(count.value.max()) > table.max_topk:
        yield f"takes {int(count.value.max())} of at most {table.max_topk}"
    if attributes.get("sorted", 1) != 1:
        yield "must sort"


def _attention(step: Step, _: OperatorTable) -> Iterator[str]:
    inputs = step.inputs
    if any(tensor is not None for tensor in inputs[4:]):
        yield "has past_key, past_value or nonpad_kv_seqlen"
    if len([output for output in step.node.output if output]) > 1:
        yield "has more outputs than the first"
    if any(tensor is not None and len(tensor.shape) != 4 for tensor in inputs[:4]):
        yield "has an input that is not of four dimensions"
    for attribute in ("softcap", "qk_matmul_output_mode"):
        if _attributes(step.node).get(attribute):
            yield f"has {attribute}"


def _tensor_scatter(step: Step, _: OperatorTable) -> Iterator[str]:
    """Check TensorScatter by TensorRT's reference of KVCacheUpdate; types are in the table."""
    if len(step.inputs) > 2 and step.inputs[2] is not None:
        places = dtype_name(step.inputs[2].dtype)
        if places not in ("int32", "int64"):
            yield f"does not support positions in {places}"
    if len({tensor.dtype for tensor in step.inputs[:2] if tensor is not None}) > 1:
        yield "has a cache and new entries of different types"
    if any(tensor is None or len(tensor.shape) != 4 for tensor in step.inputs[:2]):
        yield "has an input that is not of four dimensions"
    if _attributes(step.node).get("axis", -2) not in (-2, 2):
        yield "writes along another axis than -2"


def _first_output_only(step: Step, _: OperatorTable) -> Iterator[str]:
    if len([output for output in step.node.output if output]) > 1:
        yield "has more outputs than the first"


_RULES: Mapping[str, Any] = {
    "TopK": _topk,
    "Attention": _attention,
    "TensorScatter": _tensor_scatter,
    "LayerNormalization": _first_output_only,
}


def _aliases(model: ModelProto, resolved: Resolved, found: Sequence[Profile]) -> _Messages:
    """Check that a cache updated in place is an input and an output of the graph, of fixed size."""
    inputs = {entry.name for entry in model.graph.input}
    outputs = {entry.name for entry in model.graph.output}
    for step in resolved.steps:
        if step.node.op_type != "TensorScatter":
            continue
        cache = step.node.input[0]
        if cache not in inputs or step.node.output[0] not in outputs:
            yield "TensorScatter updates a tensor that is not an input and an output", True
            continue
        capacities = {shape[2] for profile in found for shape in profile.shapes[cache]}
        if len(capacities) > 1:
            yield f"{cache} must have one fixed capacity, but its profiles have several", True


def _attributes(node: NodeProto) -> dict[str, Any]:
    return {entry.name: helper.get_attribute_value(entry) for entry in node.attribute}


def _at(operator: str, reason: str, names: Sequence[str]) -> str:
    """A reason with its node, or the first of several nodes."""
    others = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return f"{operator} {reason} ({names[0] or 'unnamed'}{others})"
