"""record.json: the engines of a folder, and the library and GPU they were built with or for."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from trio_deploy.config.target import Limits
from trio_deploy.errors import TrioError
from trio_deploy.files import read_json, sha256_of, write_atomically
from trio_deploy.runtimes.tensorrt.profiles import Profile
from trio_deploy.runtimes.tensorrt.target import FLAVOURS, Library

SCHEMA = 2  # schema 1 did not record first runs
RECORD = "record.json"

#: Words in the name of a Jetson's board for its carrier and power mode, not for its module.
_NOT_THE_MODULE = ("engineering", "reference", "developer", "kit", "super")
#: Share of memory by which GPUs of one kind may differ, since firmware reserves a varying part.
_MEMORY_TOLERANCE = 0.1


@dataclass(frozen=True)
class Gpu:
    """Identity of a GPU. CUDA's name is not enough: the GPU of every Jetson Orin is "Orin", 8.7.

    Attributes:
        name: CUDA's name.
        compute_capability: such as "8.7".
        driver: newest CUDA version that the driver supports, such as "12.4".
        multiprocessors: number of active multiprocessors; None in older records.
        memory_gib: GiB of memory without what firmware reserves; None in older records.
        model: name of a Jetson's board; "" on other machines.
        driver_version: the driver's own version, such as "550.54.15"; "": unknown.
        l4t: release of Jetson Linux, such as "36.4.3"; "" on other machines.
    """

    name: str
    compute_capability: str
    driver: str
    multiprocessors: int | None = None
    memory_gib: float | None = None
    model: str = ""
    driver_version: str = ""
    l4t: str = ""

    def same_kind(self, other: Gpu) -> bool:
        """Whether engines may move between two GPUs; a property unknown for one is ignored."""
        return self._same_module(other) and (
            None in (self.multiprocessors, other.multiprocessors)
            or self.multiprocessors == other.multiprocessors
        )

    def slowed_down(self, other: Gpu) -> bool:
        """Whether two GPUs are one kind of Jetson with different active multiprocessors."""
        return bool(self.model and other.model) and (
            self._same_module(other) and not self.same_kind(other)
        )

    def to_text(self) -> str:
        """Name for messages, with what distinguishes it from other GPUs of that name."""
        about = [f"compute capability {self.compute_capability}"]
        if self.multiprocessors is not None:
            about.append(f"{self.multiprocessors} multiprocessors")
        if self.memory_gib is not None:
            about.append(f"{self.memory_gib:g} GiB")
        if self.model:
            about.append(self.model)
        return f"{self.name} ({', '.join(about)})"

    def _same_module(self, other: Gpu) -> bool:
        if (self.name, self.compute_capability) != (other.name, other.compute_capability):
            return False
        if self.memory_gib is not None and other.memory_gib is not None:
            largest = max(self.memory_gib, other.memory_gib)
            if abs(self.memory_gib - other.memory_gib) > _MEMORY_TOLERANCE * largest:
                return False
        if self.model and other.model:
            return _module(self.model) == _module(other.model)
        return True


@dataclass(frozen=True)
class StageRecord:
    """Record of one engine.

    Attributes:
        file: file name in the record's folder.
        sha256: checksum of the file.
        bytes: size of the file.
        graph_sha256: checksum of the graph that the engine was built from.
        fingerprint: checksum of graph, weights, profiles and options; if it changes, the engine is
            rebuilt.
        profiles: optimisation profiles, in the engine's order.
        seconds: duration of the build.
        verified: whether the engine has completed its first run where it was built.
    """

    file: str
    sha256: str
    bytes: int
    graph_sha256: str
    fingerprint: str
    profiles: tuple[Profile, ...]
    seconds: float = 0.0
    verified: bool = False


@dataclass(frozen=True)
class Record:
    """Content of record.json; `stages` grows as engines are built.

    Attributes:
        tensorrt: version of TensorRT or TensorRT-RTX.
        gpu: the GPU that engines were built on; None: compiled ahead of time, for any GPU of
            `compute_capabilities`.
        flavour: library that built them, and loads them: a value of `target.FLAVOURS`.
    """

    target: str
    tensorrt: str
    gpu: Gpu | None
    dialect: str
    dtype: str
    decode_layout: str
    limits: Limits
    stages: dict[str, StageRecord] = field(default_factory=dict)
    schema: int = SCHEMA
    flavour: str = "tensorrt"
    compute_capabilities: tuple[str, ...] = ()

    @classmethod
    def load(cls, folder: Path) -> Record:
        """Read a folder's record.json.

        Raises:
            TrioError: the file is missing or damaged, or a newer trio-deploy wrote it.
        """
        file = folder / RECORD
        try:
            raw = read_json(file, "run `trio build` again")
        except FileNotFoundError:
            raise TrioError(
                f"{folder} holds no engines (no {RECORD}): make them with `trio build`"
            ) from None
        try:
            if int(raw["schema"]) > SCHEMA:
                raise TrioError(
                    f"{file} was written by a newer trio-deploy (schema {raw['schema']}): "
                    "upgrade trio-deploy, or run `trio build` again"
                )
            flavour = str(raw.get("flavour", "tensorrt"))
            return cls(
                flavour=flavour,
                compute_capabilities=tuple(map(str, raw.get("compute_capabilities", ()))),
                target=str(raw["target"]),
                tensorrt=str(raw["tensorrt"]),
                gpu=Gpu(**raw["gpu"]) if flavour == "tensorrt" else None,
                dialect=str(raw["dialect"]),
                dtype=str(raw["dtype"]),
                decode_layout=str(raw["decode_layout"]),
                limits=Limits(**raw["limits"]),
                stages={name: _stage(entry) for name, entry in raw["stages"].items()},
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise TrioError(f"{file} is damaged ({error}): run `trio build` again") from error

    @property
    def library(self) -> Library:
        """What built the engines."""
        return Library(self.flavour, self.tensorrt)

    @property
    def compiled_ahead(self) -> bool:
        """Whether engines run first on each device, not where they were built."""
        return self.gpu is None

    @property
    def built_for(self) -> str:
        """The GPUs of the engines, for messages."""
        if self.gpu is None:
            return f"compute capability {', '.join(self.compute_capabilities)}"
        return f"{self.gpu.name} (compute capability {self.gpu.compute_capability})"

    def to_json(self) -> dict[str, Any]:
        """JSON values as in record.json."""
        raw = asdict(self)
        raw.pop("gpu" if self.compiled_ahead else "compute_capabilities")
        for name, stage in self.stages.items():
            raw["stages"][name]["profiles"] = [profile.to_json() for profile in stage.profiles]
        return raw

    def save(self, folder: Path) -> None:
        """Write record.json atomically."""
        content = json.dumps(self.to_json(), indent=1, ensure_ascii=False) + "\n"
        write_atomically(folder / RECORD, content.encode())

    def with_stage(self, name: str, stage: StageRecord) -> Record:
        """Copy with one more engine."""
        return replace(self, stages={**self.stages, name: stage})

    def with_verified(self, name: str) -> Record:
        """Copy in which an engine is verified."""
        return self.with_stage(name, replace(self.stages[name], verified=True))

    def without_stage(self, name: str) -> Record:
        """Copy without an engine."""
        return replace(self, stages={n: entry for n, entry in self.stages.items() if n != name})

    def require_same(self, gpu: Gpu, tensorrt: str) -> None:
        """Reject engines that were built for another kind of GPU or by another TensorRT.

        Raises:
            TrioError: the GPU or TensorRT differs; the message names both.
        """
        if self.gpu is None:
            self._require_compiled_for(gpu)
        elif not self.gpu.same_kind(gpu):
            todo = "run `trio build` here"
            if self.gpu.slowed_down(gpu):
                todo = (
                    "a power mode switches multiprocessors off: return to the mode that they were "
                    "built in (nvpmodel), or run `trio build` in this one"
                )
            raise TrioError(
                f"the engines for {self.target} were built on {self.gpu.to_text()}, but this is "
                f"{gpu.to_text()}, where they do not run: {todo}"
            )
        if self.tensorrt != tensorrt:
            raise TrioError(
                f"the engines for {self.target} were built by {self.library.name}, but this "
                f"is {tensorrt}, which does not load them: run `trio build` here"
            )

    def _require_compiled_for(self, gpu: Gpu) -> None:
        if gpu.compute_capability not in self.compute_capabilities:
            raise TrioError(
                f"the engines for {self.target} were compiled for {self.built_for}, but this is "
                f"{gpu.to_text()}: run `trio build` with a --target whose compute_capabilities "
                "name it"
            )

    def check_file(
        self, folder: Path, stage: str, *, verify: bool = False, first_run: bool = False
    ) -> Path:
        """Path of a stage's engine, after checking the file.

        Args:
            verify: also compare its checksum, which reads the whole file.
            first_run: also accept an engine that has not completed its first run.

        Raises:
            TrioError: it was not built, its file is missing, truncated or damaged, or its first
                run was not completed.
        """
        entry = self.stages.get(stage)
        if entry is None:
            raise TrioError(
                f"{folder} has no engine of {stage}: run `trio build` again, which continues "
                "where it stopped"
            )
        file = folder / entry.file
        try:
            size = file.stat().st_size
        except FileNotFoundError:
            raise TrioError(f"the engine {file} is missing: run `trio build` again") from None
        if size != entry.bytes:
            raise TrioError(
                f"the engine {file} has {size} bytes where its record says {entry.bytes}: it is "
                "truncated; run `trio build` again"
            )
        if not (entry.verified or first_run or self.compiled_ahead):
            raise TrioError(
                f"the engine {file} was built, but its first run was not completed (was the "
                "process killed, such as for lack of memory?): run `trio build` again, which tries "
                f"it once more; if that ends the same way, `trio build --force --stage {stage}` "
                "builds another"
            )
        if verify and sha256_of(file) != entry.sha256:
            raise TrioError(f"the engine {file} is damaged: run `trio build` again")
        return file


def runtime_of(folder: Path) -> str:
    """Runtime of a folder's engines; TensorRT's if its record cannot be read, which says why."""
    try:
        flavour = Record.load(folder).flavour
    except TrioError:
        flavour = ""
    return next((name for name, each in FLAVOURS.items() if each == flavour), "tensorrt")


def _module(model: str) -> str:
    """Name of a Jetson's module, from the name of its board in the device tree."""
    words = model.lower().replace("-", " ").split()
    return " ".join(word for word in words if word not in _NOT_THE_MODULE)


def _stage(raw: dict[str, Any]) -> StageRecord:
    return StageRecord(
        file=_file_name(raw["file"]),
        sha256=str(raw["sha256"]),
        bytes=int(raw["bytes"]),
        graph_sha256=str(raw["graph_sha256"]),
        fingerprint=str(raw["fingerprint"]),
        profiles=tuple(Profile.from_json(profile) for profile in raw["profiles"]),
        seconds=float(raw.get("seconds", 0.0)),
        # Schema 1 listed an engine before its first run, so whether it is verified is unknown.
        verified=bool(raw.get("verified", False)),
    )


def _file_name(name: Any) -> str:
    """Name of a file directly in the folder; a record must not name others."""
    if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
        raise ValueError(f"{name!r} is not the name of a file")
    return name
