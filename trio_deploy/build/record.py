"""record.json: what a folder of engines holds, and on which GPU and TensorRT it was built."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trio_deploy.build.profiles import Profile
from trio_deploy.bundle import sha256_of, write_atomically
from trio_deploy.errors import TrioError
from trio_deploy.recipe import Limits

SCHEMA = 1
RECORD = "record.json"


@dataclass(frozen=True)
class Gpu:
    """A GPU: its name, `compute_capability` as "8.7", and the driver's version."""

    name: str
    compute_capability: str
    driver: str


@dataclass(frozen=True)
class StageRecord:
    """One engine.

    Attributes:
        file: in the folder of the record.
        bytes: its size.
        graph_sha256: of the graph that it was made from.
        fingerprint: of graph, weights, profiles and options: another one means to build again.
        profiles: in the engine's order.
        seconds: that the build took.
    """

    file: str
    sha256: str
    bytes: int
    graph_sha256: str
    fingerprint: str
    profiles: tuple[Profile, ...]
    seconds: float = 0.0


@dataclass(frozen=True)
class Record:
    """What record.json says; `stages` grows as engines are built."""

    target: str
    tensorrt: str
    gpu: Gpu
    dialect: str
    dtype: str
    decode_layout: str
    limits: Limits
    stages: dict[str, StageRecord] = field(default_factory=dict)
    schema: int = SCHEMA

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read record.json of a folder of engines.

        Raises:
            TrioError: there is none, it is damaged, or a newer trio-deploy wrote it.
        """
        file = folder / RECORD
        try:
            raw = json.loads(file.read_bytes())
        except FileNotFoundError:
            raise TrioError(
                f"{folder} holds no engines (no {RECORD}): make them with `trio build`"
            ) from None
        except OSError as error:
            raise TrioError(f"cannot read {file}: {error.strerror}") from error
        except ValueError as error:
            raise TrioError(f"{file} is damaged ({error}): run `trio build` again") from error
        try:
            if int(raw["schema"]) > SCHEMA:
                raise TrioError(
                    f"{file} was written by a newer trio-deploy (schema {raw['schema']}): "
                    "upgrade trio-deploy, or run `trio build` again"
                )
            return cls(
                target=str(raw["target"]),
                tensorrt=str(raw["tensorrt"]),
                gpu=Gpu(**raw["gpu"]),
                dialect=str(raw["dialect"]),
                dtype=str(raw["dtype"]),
                decode_layout=str(raw["decode_layout"]),
                limits=Limits(**raw["limits"]),
                stages={name: _stage(entry) for name, entry in raw["stages"].items()},
                schema=int(raw["schema"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TrioError(f"{file} is damaged ({error}): run `trio build` again") from error

    def to_json(self) -> dict[str, Any]:
        """Plain values, as record.json has them."""
        raw = asdict(self)
        for name, stage in self.stages.items():
            raw["stages"][name]["profiles"] = [profile.to_json() for profile in stage.profiles]
        return raw

    def save(self, folder: Path) -> None:
        """Write record.json, wholly or not at all."""
        content = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / RECORD, content.encode())

    def with_stage(self, name: str, stage: StageRecord) -> Record:
        """The record with one more engine."""
        return replace(self, stages={**self.stages, name: stage})

    def require_same(self, gpu: Gpu, tensorrt: str) -> None:
        """Refuse engines that were built for another kind of GPU or by another TensorRT.

        Raises:
            TrioError: says for which, and what is here.
        """
        if (self.gpu.name, self.gpu.compute_capability) != (gpu.name, gpu.compute_capability):
            raise TrioError(
                f"the engines for {self.target} were built on {_text(self.gpu)}, but this is "
                f"{_text(gpu)}, where they do not run: run `trio build` here"
            )
        if self.tensorrt != tensorrt:
            raise TrioError(
                f"the engines for {self.target} were built by TensorRT {self.tensorrt}, but this "
                f"is {tensorrt}, which does not load them: run `trio build` here"
            )

    def check_file(self, folder: Path, stage: str, *, verify: bool = False) -> Path:
        """The engine of a stage.

        Args:
            verify: compare its checksum too, which reads the whole file.

        Raises:
            TrioError: it was not built, or its file is missing, cut short or damaged.
        """
        entry = self.stages.get(stage)
        if entry is None:
            raise TrioError(
                f"{folder} has no engine of {stage}: an interrupted `trio build` goes on where it "
                "stopped, run it again"
            )
        file = folder / entry.file
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise TrioError(f"the engine {file} is missing: run `trio build` again") from None
        if size != entry.bytes:
            raise TrioError(
                f"the engine {file} has {size} bytes where its record says {entry.bytes}: it is "
                "cut short; run `trio build` again"
            )
        if verify and sha256_of(file) != entry.sha256:
            raise TrioError(f"the engine {file} is damaged: run `trio build` again")
        return file


def _text(gpu: Gpu) -> str:
    return f"{gpu.name} (compute capability {gpu.compute_capability})"


def _stage(raw: dict[str, Any]) -> StageRecord:
    return StageRecord(
        file=_file_name(raw["file"]),
        sha256=str(raw["sha256"]),
        bytes=int(raw["bytes"]),
        graph_sha256=str(raw["graph_sha256"]),
        fingerprint=str(raw["fingerprint"]),
        profiles=tuple(Profile.from_json(profile) for profile in raw["profiles"]),
        seconds=float(raw.get("seconds", 0.0)),
    )


def _file_name(name: Any) -> str:
    """A file of the folder itself: a record must not lead out of it."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file")
    return name
