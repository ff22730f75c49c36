"""Build engines of a bundle's graphs, one after another, in `engines/<target>/`.

An engine and its record are written atomically, so an interrupted build continues with the next
engine. An engine is rebuilt if its graph, weights, profiles, TensorRT or GPU have changed. It is
verified once its first run has ended: an engine whose first run ended the process is recorded as
not verified, and is tried once more. Each engine is built in a process of its own, whose death is
that stage's failure. TensorRT-RTX compiles ahead of time, without a GPU; its engines run first on
each device.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol, TextIO

from tqdm import tqdm

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import ENGINES
from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError
from trio_deploy.files import format_bytes, sha256_of
from trio_deploy.runtimes.tensorrt.bindings import BuildOptions, Log, Progress
from trio_deploy.runtimes.tensorrt.compiling import Compiled, Job
from trio_deploy.runtimes.tensorrt.dry_run.rules import require_dialect
from trio_deploy.runtimes.tensorrt.profiles import Profile, profiles
from trio_deploy.runtimes.tensorrt.record import Gpu, Record, StageRecord
from trio_deploy.runtimes.tensorrt.target import DIALECTS, Library, require_engines

TIMING_CACHE = "timing.cache"
LOG = "build.log"
LOCK = ".lock"

_GIB = 2**30
#: Minimum share of a target's memory on a GPU: firmware and error correction take some.
_MEMORY_SHARE = 0.85
_LOGGED = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO")  # VERBOSE writes hundreds of megabytes


class Compiler(Protocol):
    """What builds the engines of a folder; see `compiling.ChildCompiler`."""

    @property
    def version(self) -> str:
        """TensorRT's version."""
        ...

    def compile(self, job: Job, log: Log, progress: Progress) -> Compiled:
        """Build an engine into the job's file; TrioError if that fails."""
        ...


Verify = Callable[[Path, str], None]
"""Function that loads the engine of a stage in a folder and runs it; TrioError if that fails."""


@dataclass(frozen=True)
class Outcome:
    """Result of a build: the stages built now, and those kept from an earlier build."""

    folder: Path
    record: Record
    built: tuple[str, ...]
    kept: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """Folder, stages built and kept, and the record."""
        return {
            "folder": str(self.folder),
            "built": list(self.built),
            "kept": list(self.kept),
            "record": self.record.to_json(),
        }

    def to_text(self) -> str:
        record = self.record
        lines = [
            f"{self.folder}: {len(record.stages)} engines for {record.built_for}, "
            f"{record.library.name}"
        ]
        for name, stage in record.stages.items():
            how = f"built in {stage.seconds:.0f} s" if name in self.built else "kept"
            lines.append(f"  {name:<12}{format_bytes(stage.bytes):>10}  {how}")
        if record.compiled_ahead:
            lines.append(
                "nothing was run: on each device the first `trio run` compiles what depends on it, "
                "and tries every engine"
            )
        return "\n".join(lines)


def require_buildable(bundle: Bundle, target: Target, stages: Sequence[str] | None = None) -> None:
    """Check what can be checked without a GPU, a driver or TensorRT.

    Raises:
        TrioError: the target has another runtime, no TensorRT reads the bundle's graphs, a stage
            is unknown, or the weights are missing.
    """
    library = require_engines(target)
    if bundle.manifest.dialect not in DIALECTS:
        require_dialect(bundle.manifest.dialect, library, str(bundle.path))
    _chosen(bundle, stages)
    bundle.require_weights()


def build_engines(
    bundle: Bundle,
    target: Target,
    compiler: Compiler,
    gpu: Gpu | None,
    *,
    verify: Verify | None,
    stages: Sequence[str] | None = None,
    force: bool = False,
    progress: bool = True,
) -> Outcome:
    """Build the engines that a bundle lacks.

    Args:
        compiler: builds one engine at a time.
        gpu: the GPU to build on; None for a target that is compiled ahead of time.
        verify: called for every engine as soon as it is built; an engine that fails is deleted. An
            engine that an earlier build could not verify is verified now, and rebuilt if it fails.
            None: engines run first on the device.
        stages: stages to build; None: all.
        force: rebuild engines that exist.
        progress: show a bar on stderr.

    Raises:
        TrioError: the bundle has no weights or does not suit TensorRT, the GPU is not the target's,
            another build is running in the folder, the disk is too full, or an engine cannot be
            built or run.
    """
    require_buildable(bundle, target, stages)
    if gpu is not None:
        _require_gpu(target, gpu)
    library = replace(require_engines(target), version=compiler.version)
    require_dialect(bundle.manifest.dialect, library, str(bundle.path))
    wanted = _chosen(bundle, stages)
    folder = bundle.path / ENGINES / target.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise TrioError(f"cannot write to {folder}: {error.strerror}") from error
    job = _Build(bundle, target, library, compiler, gpu, folder, profiles(bundle, target), verify)
    with _locked(folder):
        return _make(job, wanted, force=force, progress=progress)


@dataclass(frozen=True)
class _Build:
    """Arguments of `build_engines`, with the folder and profiles of its engines."""

    bundle: Bundle
    target: Target
    library: Library
    compiler: Compiler
    gpu: Gpu | None
    folder: Path
    profiles: Mapping[str, Sequence[Profile]]
    verify: Verify | None


def _make(job: _Build, wanted: Sequence[str], *, force: bool, progress: bool) -> Outcome:
    """Build, in the locked folder of a job, the wanted stages that it lacks."""
    bundle, folder = job.bundle, job.folder
    record = _record(job)
    prints = {stage: _fingerprint(job, stage, record) for stage in wanted}
    missing = [
        stage for stage in wanted if force or not _is_built(folder, record, stage, prints[stage])
    ]
    _require_space(bundle, folder, missing)
    # Stale engines must not run together with new ones if this build is interrupted.
    kept = {name: entry for name, entry in record.stages.items() if name not in missing}
    record = replace(record, stages=kept)
    record.save(folder)
    for leftover in folder.glob(".*.engine.*"):
        leftover.unlink(missing_ok=True)
    made: list[str] = []
    shown = tqdm(
        total=len(wanted), unit="engine", desc="engines", disable=None if progress else True
    )
    with shown, _log(folder / LOG) as log:
        for stage in wanted:
            if stage not in missing and (job.verify is None or record.stages[stage].verified):
                shown.update()
                continue
            if stage not in missing:
                try:
                    record = _verified(job, record, stage, log, shown)
                    shown.update()
                    continue
                except TrioError as error:
                    log("WARNING", f"{stage} of an earlier build does not run: {error}")
                    record = record.without_stage(stage)
            entry = _build(job, stage, prints[stage], log, shown)
            made.append(stage)
            record = record.with_stage(stage, entry)
            record.save(folder)
            try:
                record = _verified(job, record, stage, log, shown)
            except TrioError as error:
                raise TrioError(
                    f"the engine of {stage} was built, but does not run: {error}"
                ) from error
            shown.update()
    order = {name: record.stages[name] for name in bundle.stages if name in record.stages}
    record = replace(record, stages=order)
    record.save(folder)
    return Outcome(
        folder, record, tuple(made), tuple(stage for stage in wanted if stage not in made)
    )


def _verified(job: _Build, record: Record, stage: str, log: Log, bar: Any) -> Record:
    """Run an engine for the first time, if here, and record that; delete an engine that fails.

    The run may be interrupted or end the process (out of memory, a crash): the record on disk then
    says that the engine has not been verified.
    """
    if job.verify is None:
        return record
    bar.set_postfix_str(f"{stage}: first run")
    log("INFO", f"==== {stage}: first run")
    try:
        job.verify(job.folder, stage)
    except Exception:
        _delete(job.folder, record, stage)
        raise
    record = record.with_verified(stage)
    record.save(job.folder)
    return record


def _build(job: _Build, stage: str, fingerprint: str, log: Log, bar: Any) -> StageRecord:
    """Build one engine into the folder."""
    found, target = job.profiles[stage], job.target

    def tell(phase: str, done: int, steps: int) -> None:
        bar.set_postfix_str(f"{stage}: {phase} {done}/{steps}")

    bar.set_postfix_str(stage)
    log("INFO", f"==== {stage}: {len(found)} profile(s), {job.library.name}")
    for profile in found:
        log("INFO", f"profile {json.dumps(profile.to_json())}")
    options = BuildOptions(
        job.bundle.manifest.dtype,
        None if target.workspace_gib is None else int(target.workspace_gib * _GIB),
        target.compute_capabilities,
    )
    ahead = job.gpu is None  # such a compiler times nothing
    file = job.folder / f"{stage}.engine"
    try:
        done = job.compiler.compile(
            Job(
                graph=str(job.bundle.graph(stage)),
                plan=str(file),
                profiles=tuple(found),
                options=options,
                timing_cache="" if ahead else str(job.folder / TIMING_CACHE),
                flavour=job.library.flavour,
            ),
            log,
            tell,
        )
    except TrioError as error:
        raise TrioError(f"{error} (engines built before it are kept)") from error
    log("INFO", f"==== {stage}: {done.plan_bytes} bytes in {done.seconds:.1f} s")
    return StageRecord(
        file=file.name,
        sha256=sha256_of(file),
        bytes=done.plan_bytes,
        graph_sha256=_graph_sha256(job.bundle, stage),
        fingerprint=fingerprint,
        profiles=tuple(found),
        seconds=round(done.seconds, 1),
    )


def _require_gpu(target: Target, gpu: Gpu) -> None:
    choose = (
        "build on the device where the engines run, choose another --target, or change a copy of "
        "the target's file"
    )
    if target.compute_capability not in (None, gpu.compute_capability):
        raise TrioError(
            f"the target {target.name} has compute capability {target.compute_capability}, but "
            f"this GPU, {gpu.name}, has {gpu.compute_capability}: {choose}"
        )
    if target.memory_gib is None or gpu.memory_gib is None:
        return
    if gpu.memory_gib < _MEMORY_SHARE * target.memory_gib:
        raise TrioError(
            f"the target {target.name} has {target.memory_gib:g} GiB of memory, but this GPU, "
            f"{gpu.model or gpu.name}, has {gpu.memory_gib:g} GiB: {choose}"
        )


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Keep other builds out of a folder; the lock ends with the process.

    Raises:
        TrioError: another build is running there, or the folder cannot be written to.
    """
    try:
        file = (folder / LOCK).open("w")
    except OSError as error:
        raise TrioError(f"cannot write to {folder}: {error.strerror}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise TrioError(
                    f"another `trio build` is running in {folder}: wait for it to finish, then run "
                    "this one again"
                ) from None
            # The file system has no locks: continue without one.
        yield


def _chosen(bundle: Bundle, stages: Sequence[str] | None) -> list[str]:
    for stage in stages or ():
        bundle.graph(stage)  # its error lists the stages
    return [stage for stage in bundle.stages if stages is None or stage in stages]


def _record(job: _Build) -> Record:
    """The folder's record if it is for this GPU, TensorRT and bundle, else an empty one."""
    manifest, folder = job.bundle.manifest, job.folder
    fresh = Record(
        target=job.target.name,
        tensorrt=job.compiler.version,
        gpu=job.gpu,
        dialect=manifest.dialect,
        dtype=manifest.dtype,
        decode_layout=manifest.decode,
        limits=job.target.limits,
        flavour=job.library.flavour,
        compute_capabilities=job.target.compute_capabilities,
    )
    try:
        known = Record.load(folder)
    except TrioError:  # missing or damaged: all engines are built
        return fresh
    if known.gpu is not None and job.gpu is not None and not known.gpu.same_kind(job.gpu):
        # TensorRT may not distinguish these GPUs, and would use timings of one for the other.
        (folder / TIMING_CACHE).unlink(missing_ok=True)
        return fresh
    same = replace(known, limits=fresh.limits, gpu=job.gpu, stages={})
    return replace(fresh, stages=known.stages) if same == fresh else fresh


def _fingerprint(job: _Build, stage: str, record: Record) -> str:
    """Checksum of an engine's inputs: graph, weights, profiles, TensorRT and GPU."""
    bundle = job.bundle
    weights = _weight_files(bundle, stage)
    files = bundle.manifest.files
    parts = {
        "graph": _graph_sha256(bundle, stage),
        "weights": {name: _identity(bundle, name, files) for name in weights},
        "profiles": [profile.to_json() for profile in job.profiles[stage]],
        "workspace_gib": job.target.workspace_gib,
        "dtype": record.dtype,
        "tensorrt": record.tensorrt,
        "gpu": list(record.compute_capabilities)
        if record.gpu is None
        else [record.gpu.name, record.gpu.compute_capability],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _graph_sha256(bundle: Bundle, stage: str) -> str:
    known = bundle.manifest.files[bundle.stages[stage].file].sha256
    return known or sha256_of(bundle.graph(stage))


def _identity(bundle: Bundle, name: str, files: Mapping[str, Any]) -> list[Any]:
    """Checksum of a weight file, or size and modification time if none was recorded."""
    info = files[name]
    if info.sha256 is not None:
        return [info.sha256]
    return [info.size, (bundle.path / name).stat().st_mtime_ns]


def _weight_files(bundle: Bundle, stage: str) -> list[str]:
    return sorted({place.file for place in bundle.constant_places(stage).values()})


def weight_bytes(bundle: Bundle, stage: str) -> int:
    """Bytes of the weights that are constants of a graph: about the size of its engine."""
    return sum(place.nbytes for place in bundle.constant_places(stage).values())


def _is_built(folder: Path, record: Record, stage: str, fingerprint: str) -> bool:
    entry = record.stages.get(stage)
    if entry is None or entry.fingerprint != fingerprint:
        return False
    try:
        record.check_file(folder, stage, verify=True, first_run=True)
    except TrioError:
        return False
    return True


def _require_space(bundle: Bundle, folder: Path, missing: Sequence[str]) -> None:
    needed = sum(weight_bytes(bundle, stage) for stage in missing)
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise TrioError(
            f"the disk of {folder} is too full: free some space; the engines need about "
            f"{format_bytes(needed)}, and {format_bytes(free)} are free"
        )


def _delete(folder: Path, record: Record, stage: str) -> None:
    (folder / record.stages[stage].file).unlink(missing_ok=True)
    record.without_stage(stage).save(folder)


@contextmanager
def _log(file: Path) -> Iterator[Log]:
    """Append the builder's messages to a file."""
    with file.open("a", encoding="utf-8") as out:
        yield _Lines(out)


class _Lines:
    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._start = time.monotonic()

    def __call__(self, severity: str, message: str) -> None:
        if severity in _LOGGED:
            seconds = time.monotonic() - self._start
            with suppress(OSError):  # a full disk is reported when an engine is written
                self._out.write(f"[{seconds:9.2f}] {severity:<7} {message.rstrip()}\n")
                self._out.flush()
