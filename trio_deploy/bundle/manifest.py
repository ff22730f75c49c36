"""manifest.json: the contents of a bundle."""

from __future__ import annotations

import json
from typing import Any, Literal

import msgspec

from trio_deploy.checkpoint.fit import CheckpointInfo
from trio_deploy.checkpoint.processor_files import GenerationInfo
from trio_deploy.checkpoint.resolve import MANIFEST as MANIFEST
from trio_deploy.config.options import Calibration
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import TrioError
from trio_deploy.files import convert
from trio_deploy.quant.stored_weight import ITEM_BITS, Part
from trio_deploy.schedule.schedule import Schedule

SCHEMA = 2
QUANTISED_SCHEMA = 3
"""Schema of manifests with `quantization`, which readers of schema 2 refuse: they know no codes."""
WEIGHTS = "weights"
ENGINES = "engines"  # of TensorRT, a folder per target, built on the machine that runs them

Kind = Literal["vision", "embed", "prefill", "select", "decode"]
"""Task of a stage: `prefill` runs a segment of layers, `select` prunes before one."""

Role = Literal[
    "image",  # input of the vision tower, fed by its name
    "features",  # [R,d] image features of the batch
    "deepstack",  # [R,d] features that are added behind a decoder layer, by its name
    "ids",  # int64 [B,S] token ids
    "token_embeddings",  # [B,S,d] rows of the table of embeddings, which the host looks up
    "source",  # int64 [B,S] where each token's embedding comes from
    "tokens",  # [B,S,d] embeddings or hidden states
    "positions",  # int64 [B,S], or [B,3,S]: time, row and column
    "feature_index",  # int64 [B,S] each token's feature row, -1: none
    "lengths",  # int64 [B] valid new tokens per row
    "past_lengths",  # int64 [B] tokens per row in the cache; [B,segments] in a decode graph
    "visual",  # bool [B,S]
    "per_token",  # a value per token (per image row where the vision tower returns it), by its name
    "cache",  # keys or values of one layer
    "count",  # int64 [B] visual tokens to keep
    "width",  # int64 [1] longest row that remains
    "seed",  # int64 [B]
    "index",  # int64 [B,W] places of the tokens kept
    "score",  # f32 [B,S] what a selection ranked tokens by
    "converged",  # bool [B]
    "logits",  # f32 [B,V]
]
"""Meaning of a graph's input or output, by which the pipeline feeds and reads it."""


class ModelInfo(msgspec.Struct, frozen=True):
    """Origin of the weights.

    Attributes:
        name: recipe name, or the checkpoint folder's.
        source: hub id, or the checkpoint folder's name; never a path of the exporting machine.
        revision: hub commit, if known.
        config: the checkpoint's config.json, unchanged.
    """

    name: str
    source: str
    revision: str | None
    config: dict[str, Any]


def stage_label(kind: str, index: int | None = None) -> str:
    """What timings and recorded references call a stage: `embed`, `prefill_1`."""
    return kind if index is None else f"{kind}_{index}"


def kind_of_label(label: str) -> str:
    """The kind of the stage that `stage_label` made a label of."""
    return label.partition("_")[0]


class TensorInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """An input or output of a graph.

    Attributes:
        shape: sizes, and names of dynamic dimensions.
        layer: number of the decoder layer whose cache it is.
        part: `key` or `value` of a cache.
    """

    name: str
    dtype: str
    shape: tuple[int | str, ...]
    role: Role
    layer: int | None = None
    part: Literal["key", "value"] | None = None


class StageInfo(msgspec.Struct, frozen=True, omit_defaults=True):
    """One graph of a bundle.

    Attributes:
        name: unique name, for messages and reports; carries no meaning.
        index: number of the segment (`prefill`) or of the pruning point (`select`), which precedes
            the segment of the same number; a segment without layers has no stage.
        layers: numbers of the decoder layers it runs.
        method: selection method of a `select`.
        file: path of the graph in the bundle.
        inputs, outputs: in the graph's order.
        tensors: names of the weights it refers to, entries of `Manifest.tensors`.
        weight_inputs: those of them that are inputs of the graph, which the runtime binds; they
            are not among `inputs`.
        looked_up: names of the weights whose rows the host looks up for `token_embeddings`, in
            memory-mapped files; they are not among `tensors`.
    """

    name: str
    kind: Kind
    index: int | None = None
    layers: tuple[int, ...] = ()
    method: str | None = None
    file: str = ""
    inputs: tuple[TensorInfo, ...] = ()
    outputs: tuple[TensorInfo, ...] = ()
    tensors: tuple[str, ...] = ()
    weight_inputs: tuple[str, ...] = ()
    looked_up: tuple[str, ...] = ()

    @property
    def constants(self) -> tuple[str, ...]:
        """Names of the weights that are constants of the graph, whose data it refers to."""
        return tuple(name for name in self.tensors if name not in self.weight_inputs)

    @property
    def label(self) -> str:
        """`prefill_1`: what timings and recorded references call the stage, whatever its name."""
        return stage_label(self.kind, self.index)

    def inputs_of(self, role: Role) -> list[TensorInfo]:
        """Inputs with a role, in order."""
        return [tensor for tensor in self.inputs if tensor.role == role]

    def outputs_of(self, role: Role) -> list[TensorInfo]:
        """Outputs with a role, in order."""
        return [tensor for tensor in self.outputs if tensor.role == role]

    def input_name(self, role: Role) -> str:
        """Name of the first input with a role.

        Raises:
            TrioError: there is none.
        """
        return self._name(self.inputs_of(role), "input", role)

    def output_name(self, role: Role) -> str:
        """Name of the first output with a role.

        Raises:
            TrioError: there is none.
        """
        return self._name(self.outputs_of(role), "output", role)

    def _name(self, found: list[TensorInfo], side: str, role: Role) -> str:
        if not found:
            raise TrioError(
                f"the stage {self.name} has no {side} with the role {role}: export the bundle again"
            )
        return found[0].name


class TensorPlace(msgspec.Struct, frozen=True):
    """Where a part of a weight is stored.

    Attributes:
        file: path in the bundle, `weights/….safetensors`.
        offset: first byte, counted from the start of the file.
        dtype: `float32`, `float16` or `bfloat16`; of codes `uint8` (in blocks), `int8`,
            `int4` or `float4_e2m1fn`, whose scales are `float8_e4m3fn`.
    """

    file: str
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    dtype: str


class Quantization(msgspec.Struct, frozen=True):
    """How the matrices of a bundle were quantised.

    Attributes:
        scheme: name of the menu (`quant/schemes.py`): what is stored, however it came to be.
        bits: of the matrices of decoder layers.
        block: entries that share a scale at most; 0: a row.
        symmetric: whether no matrix has zero points.
        selections: what selections compute with: `int8`, copies in 8 bit, or `float`, the values
            that were quantised.
        head: of the output head, `int8`, unless the checkpoint has it in 4 bit.
        source: where the codes come from: `rtn`, rounding to nearest at export, or the form of
            the checkpoint, `compressed-tensors`, `awq` or `gptq`.
        revision: of what `source` does; codes of one revision are the same.
        calibration: what activations are rounded by, in `fp8`.
    """

    scheme: str
    bits: int
    block: int
    symmetric: bool
    selections: str
    head: str
    source: str
    revision: int
    calibration: Calibration | None = None


class FileInfo(msgspec.Struct, frozen=True):
    """Size in bytes, and the checksum; `sha256` is None for linked or still missing weights."""

    size: int
    sha256: str | None


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """Contents of manifest.json.

    Attributes:
        dtype: float type of hidden states, KV cache and stored weights.
        dialect: `ort`, `onnx` or `primitive`.
        schedule: pruning points as plain JSON, `[{"layer", "keep", "method"}, ...]`.
        budgets: tokens kept at each pruning point at budgets for which the recipe has schedules,
            `{"0.222": [keep, ...], ...}`; empty for bundles made without a recipe.
        decode: `shared` (prefill graphs decode too) or `separate` (a decode graph).
        stages: in the order in which they run; `decode`, if there is one, comes last.
        tensors: place of each part of a weight that a graph refers to, by its name.
        weights: `copied`, `linked` (hard links) or `planned` (`trio attach-weights` adds them).
        target: name of the engines/ file it was exported for, which need not be where it runs;
            `runtime`, `provider` and `precision` are that target's.
        quantization: how matrices were quantised; None: all weights are float.
        checkpoint: what it was made from, for `trio check --checkpoint`; None for older bundles
            and for graphs that were made without weights at hand.
        files: every other file of the bundle, by path relative to the bundle, `/` as separator.
    """

    schema: int = SCHEMA
    model: ModelInfo
    target: str = "cpu"
    runtime: str = "onnxruntime"
    provider: str | None = None
    precision: str | None = None
    dtype: str
    dialect: str
    schedule: list[dict[str, Any]]
    budgets: dict[str, list[int | float]] = msgspec.field(default_factory=dict)
    probe: str
    positions: str
    threshold: float
    decode: str
    stages: tuple[StageInfo, ...]
    tensors: dict[str, TensorPlace]
    generation: GenerationInfo
    weights: str
    files: dict[str, FileInfo]
    versions: dict[str, str]
    checkpoint: CheckpointInfo | None = None
    quantization: Quantization | None = None

    @classmethod
    def from_json(cls, raw: Any) -> Manifest:
        """Read what `dump` wrote.

        Raises:
            TrioError: another schema, a missing or unknown key, a value of the wrong kind, or
                entries that do not fit together.
        """
        schema = schema_of(raw)
        known = SCHEMA if raw.get("quantization") is None else QUANTISED_SCHEMA
        if schema != known:
            raise TrioError(f"it has schema {schema}, not {known}: export the bundle again")
        _check_budgets(raw.get("budgets", {}), raw.get("schedule"))
        manifest = convert(raw, cls)
        manifest.check()
        return manifest

    def check(self) -> None:
        """Compare entries with each other.

        Raises:
            TrioError: a stage's name occurs twice; a stage refers to a file or tensor that has no
                entry; a tensor lies outside its file, or its size is not that of its shape; a
                sampling option is unknown or out of range.
        """
        names = [stage.name for stage in self.stages]
        for name in names:
            if names.count(name) > 1:
                raise TrioError(f"it has two stages {name!r}: export the bundle again")
        for stage in self.stages:
            if stage.file not in self.files:
                raise TrioError(
                    f"the graph of {stage.name}, {stage.file}, is not among its files: export the "
                    "bundle again"
                )
            for name in (*stage.tensors, *stage.looked_up):
                if name not in self.tensors:
                    raise TrioError(
                        f"the tensor {name} of {stage.name} has no place: export the bundle again"
                    )
            if unknown := set(stage.weight_inputs) - set(stage.tensors):
                raise TrioError(
                    f"the graph of {stage.name} takes {min(unknown)} as an input, which is not "
                    "among its weights: export the bundle again"
                )
        for name, place in self.tensors.items():
            _check_place(name, place, self.files)
        SamplingOptions.from_json(self.generation.sampling)

    def dump(self) -> bytes:
        """The bytes of manifest.json: deterministic, without dates or paths of this machine.

        Raises:
            TrioError: a number is not finite.
        """
        plain = msgspec.to_builtins(self)
        plain["files"] = dict(sorted(plain["files"].items()))
        if self.quantization is None:
            del plain["quantization"]
        else:
            plain["schema"] = QUANTISED_SCHEMA
        try:
            text = json.dumps(plain, indent=1, ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise TrioError(f"cannot write {MANIFEST}: {error}") from None
        return (text + "\n").encode()


def schema_of(raw: Any) -> int:
    """The schema number of a manifest's JSON.

    Raises:
        TrioError: not an object, no number, or a newer one than this version reads.
    """
    if not isinstance(raw, dict):
        raise TrioError("it is not a JSON object: export the bundle again")
    schema = raw.get("schema")
    if not isinstance(schema, int) or isinstance(schema, bool) or schema < 1:
        raise TrioError('it has no "schema" number: it is not the manifest of a TRIO bundle')
    if schema > QUANTISED_SCHEMA:
        raise TrioError(
            f"it has schema {schema}, newer than this trio-deploy understands "
            f"({QUANTISED_SCHEMA}): "
            "upgrade trio-deploy, or export the bundle again with this version"
        )
    return schema


def _check_place(name: str, place: TensorPlace, files: dict[str, FileInfo]) -> None:
    if place.file not in files:
        raise TrioError(
            f"the tensor {name} is in {place.file}, which is not among its files: export the "
            "bundle again"
        )
    if place.dtype not in ITEM_BITS:
        raise TrioError(
            f"the tensor {name} has the unknown type {place.dtype!r}: upgrade trio-deploy"
        )
    size = Part(name, place.shape, place.dtype).nbytes
    if min(place.shape, default=0) < 0 or place.nbytes != size:
        raise TrioError(
            f"the tensor {name} of shape {list(place.shape)} cannot have {place.nbytes} bytes: "
            "export the bundle again"
        )
    if place.offset < 0 or place.offset + place.nbytes > files[place.file].size:
        raise TrioError(
            f"the tensor {name} lies outside {place.file}, which has "
            f"{files[place.file].size} bytes: export the bundle again"
        )


def _check_budgets(raw: Any, points: Any) -> None:
    """Compare `budgets` with `schedule`.

    Raises:
        TrioError: which of them is wrong, and how.
    """
    if not isinstance(raw, dict):
        raise TrioError(f'its "budgets" map budgets to what points keep, but are {raw!r}')
    if not raw:
        return
    own = Schedule.from_json(points)
    for budget, keeps in raw.items():
        try:
            known = 0 < float(budget) < 1
        except ValueError:
            known = False
        if not known:
            raise TrioError(f'its "budgets" name {budget!r}, which is no share between 0 and 1')
        numbers = isinstance(keeps, list) and all(type(keep) in (int, float) for keep in keeps)
        if not numbers or len(keeps) != len(own.points):
            raise TrioError(
                f"its budget {budget} must say what each of the {len(own.points)} pruning points "
                f"keeps, not {keeps!r}"
            )
        try:
            own.with_keeps(keeps).validate(num_layers=max(own.layers, default=0) + 1)
        except TrioError as error:
            raise TrioError(f"its budget {budget} is not possible: {error}") from None
