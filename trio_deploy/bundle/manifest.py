"""manifest.json: what a bundle says of itself."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

from trio_deploy.checkpoint.processor_files import GenerationInfo
from trio_deploy.checkpoint.resolve import MANIFEST as MANIFEST
from trio_deploy.errors import TrioError
from trio_deploy.schedule.schedule import Schedule

SCHEMA = 1
WEIGHTS = "weights"
ENGINES = "engines"  # of TensorRT, a folder a target, made where they run


# --------------------------------------------------------------------------------------- manifest


@dataclass(frozen=True)
class ModelInfo:
    """Where the weights come from.

    Attributes:
        name: recipe name, or the checkpoint folder's.
        source: hub id, or the checkpoint folder's name; never a path of the exporting machine.
        revision: hub commit if known.
        config: the checkpoint's config.json as it was.
    """

    name: str
    source: str
    revision: str | None
    config: dict[str, Any]


@dataclass(frozen=True)
class TensorInfo:
    """A graph's input or output; a dimension is a size, or the name of a dynamic one."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class GraphInfo:
    """One stage: its file in the bundle and what it takes and gives, in the graph's own order."""

    file: str
    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes, and the checksum; `sha256` is None for linked or still missing weights."""

    size: int
    sha256: str | None


@dataclass(frozen=True)
class Manifest:
    """What manifest.json says.

    Attributes:
        dtype: float type of hidden states, KV cache and stored weights.
        dialect: `ort`, `onnx` or `primitive`.
        schedule: pruning points as plain JSON, `[{"layer", "keep", "method"}, ...]`.
        budgets: what the same points keep at budgets that the recipe has schedules for, `{"0.222":
            [keep, ...], ...}`; none in bundles that were made without a recipe or before these.
        decode: `shared` (prefill graphs decode too) or `separate` (decode.onnx).
        weights: `copied`, `linked` (hard links) or `planned` (`trio attach-weights` fills them in).
        target: name of the engines/ file it was exported for, which need not be where it runs;
            `runtime`, `provider` and `precision` are that target's.
        files: every other file of the bundle, by path relative to the bundle, `/` as separator.
    """

    model: ModelInfo
    dtype: str
    dialect: str
    schedule: list[dict[str, Any]]
    probe: str
    positions: str
    threshold: float
    decode: str
    graphs: dict[str, GraphInfo]
    generation: GenerationInfo
    files: dict[str, FileInfo]
    versions: dict[str, str]
    weights: str
    target: str = "cpu"
    runtime: str = "onnxruntime"
    provider: str | None = None
    precision: str | None = None
    budgets: dict[str, list[float | int]] = field(default_factory=dict)
    schema: int = SCHEMA

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` is the inverse."""

        def tensors(infos: tuple[TensorInfo, ...]) -> list[dict[str, Any]]:
            return [{"name": t.name, "dtype": t.dtype, "shape": list(t.shape)} for t in infos]

        return {
            "schema": self.schema,
            "model": {
                "name": self.model.name,
                "source": self.model.source,
                "revision": self.model.revision,
                "config": self.model.config,
            },
            "target": self.target,
            "runtime": self.runtime,
            "provider": self.provider,
            "precision": self.precision,
            "dtype": self.dtype,
            "dialect": self.dialect,
            "schedule": self.schedule,
            "budgets": self.budgets,
            "probe": self.probe,
            "positions": self.positions,
            "threshold": self.threshold,
            "decode": self.decode,
            "graphs": {
                stage: {
                    "file": graph.file,
                    "inputs": tensors(graph.inputs),
                    "outputs": tensors(graph.outputs),
                }
                for stage, graph in self.graphs.items()
            },
            "generation": {
                "eos_token_ids": list(self.generation.eos_token_ids),
                "pad_token_id": self.generation.pad_token_id,
                "bos_token_id": self.generation.bos_token_id,
            },
            "weights": self.weights,
            "files": {
                path: {"size": info.size, "sha256": info.sha256}
                for path, info in sorted(self.files.items())
            },
            "versions": self.versions,
        }

    @classmethod
    def from_json(cls, raw: Any) -> Manifest:
        """Reads what `to_json` wrote.

        Raises:
            TrioError: not an object, a newer schema, a missing key or a value of the wrong kind.
        """
        if not isinstance(raw, dict):
            raise TrioError("it is not a JSON object")
        schema = raw.get("schema")
        if not isinstance(schema, int) or isinstance(schema, bool):
            raise TrioError('it has no "schema" number: it is not the manifest of a TRIO bundle')
        if schema > SCHEMA:
            raise TrioError(
                f"it has schema {schema}, newer than this trio-deploy understands ({SCHEMA}): "
                "upgrade trio-deploy, or export the bundle again with this version"
            )

        def tensors(items: list[dict[str, Any]]) -> tuple[TensorInfo, ...]:
            return tuple(
                TensorInfo(str(t["name"]), str(t["dtype"]), tuple(t["shape"])) for t in items
            )

        try:
            model, generation = raw["model"], raw["generation"]
            return cls(
                model=ModelInfo(
                    str(model["name"]),
                    str(model["source"]),
                    model.get("revision"),
                    dict(model["config"]),
                ),
                dtype=str(raw["dtype"]),
                dialect=str(raw["dialect"]),
                schedule=[dict(point) for point in raw["schedule"]],
                probe=str(raw["probe"]),
                positions=str(raw["positions"]),
                threshold=float(raw["threshold"]),
                decode=str(raw["decode"]),
                graphs={
                    str(stage): GraphInfo(
                        str(graph["file"]), tensors(graph["inputs"]), tensors(graph["outputs"])
                    )
                    for stage, graph in raw["graphs"].items()
                },
                generation=GenerationInfo(
                    tuple(int(i) for i in generation["eos_token_ids"]),
                    generation.get("pad_token_id"),
                    generation.get("bos_token_id"),
                ),
                files={
                    str(path): FileInfo(int(info["size"]), info.get("sha256"))
                    for path, info in raw["files"].items()
                },
                versions={str(k): str(v) for k, v in raw["versions"].items()},
                weights=str(raw["weights"]),
                target=str(raw.get("target", "cpu")),
                runtime=str(raw.get("runtime", "onnxruntime")),
                provider=raw.get("provider"),
                precision=raw.get("precision"),
                budgets=_budgets(raw.get("budgets", {}), raw["schedule"]),
                schema=schema,
            )
        except KeyError as error:
            raise TrioError(f"its key {error} is missing") from error
        except (TypeError, ValueError, AttributeError) as error:
            raise TrioError(f"one of its values is of the wrong kind ({error})") from error

    def dump(self) -> bytes:
        """The bytes of manifest.json: deterministic, no dates and no paths of this machine."""
        return (json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n").encode()


def _budgets(raw: Any, points: Any) -> dict[str, list[float | int]]:
    """The manifest's `budgets`, which have to suit its `schedule`.

    Raises:
        TrioError: which of them is wrong, and how.
    """
    if not isinstance(raw, dict):
        raise TrioError(f'its "budgets" map budgets to what points keep, but are {raw!r}')
    if not raw:
        return {}
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
    return dict(raw)
