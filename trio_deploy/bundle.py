"""The exported folder: its manifest, the checks on loading it, and a writer that leaves no halves.

A bundle is one self-contained folder without pickles: `manifest.json`, the graphs (`*.onnx`) at the
top, `weights/*.safetensors` that they point into, `tokenizer.json`, `tokens.json`,
`preprocessor.json`, `chat_template.jinja`. This module needs nothing beyond the standard library
and the plain-data parts of the package, so that a device can load a bundle with the runtime alone.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from types import TracebackType
from typing import Any, ClassVar

from trio_deploy.errors import TrioError
from trio_deploy.models import parse_config
from trio_deploy.models.config import ModelConfig
from trio_deploy.schedule import Schedule, for_points

SCHEMA = 1
MANIFEST = "manifest.json"
WEIGHTS = "weights"
TOKENIZER = "tokenizer.json"
TOKENS = "tokens.json"
PREPROCESSOR = "preprocessor.json"
CHAT_TEMPLATE = "chat_template.jinja"
ENGINES = "engines"  # of TensorRT, a folder a target, made where they run
_CHUNK = 1 << 22


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
class GenerationInfo:
    """Token ids that end or fill a sequence."""

    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    bos_token_id: int | None = None


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


# ----------------------------------------------------------------------------------------- bundle


def safe_path(root: Path, relative: str) -> Path:
    """The file that a manifest's path means, inside the bundle and nowhere else.

    Raises:
        TrioError: an absolute path, one with `..`, or one whose symlink leads out of the bundle.
    """
    pure = PurePosixPath(relative)
    windows = PureWindowsPath(relative)
    if (
        not relative
        or pure.is_absolute()
        or windows.drive
        or "\\" in relative
        or "\0" in relative
        or ".." in pure.parts
    ):
        raise TrioError(
            f"the bundle's manifest names {relative!r}, a path that leaves the bundle: "
            "do not use this bundle; export it again"
        )
    path = root.joinpath(*pure.parts)
    if not path.resolve().is_relative_to(root.resolve()):
        raise TrioError(
            f"{relative} in the bundle is a symbolic link that leads out of it: "
            "put the file itself there"
        )
    return path


def sha256_of(path: Path) -> str:
    """Hex SHA-256 of a file, read in pieces."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


@dataclass(frozen=True)
class Bundle:
    """A loaded bundle. Everything that a runtime without torch needs is reached from here."""

    path: Path
    manifest: Manifest

    @classmethod
    def load(cls, path: str | os.PathLike[str], verify: bool = False) -> Bundle:
        """Reads the manifest and checks the folder against it.

        Args:
            verify: also compare checksums, which reads every byte; weights without a recorded
                checksum (linked ones) are compared by size alone, see `Bundle.seal`.

        Raises:
            TrioError: no bundle there, a newer schema, a path that leaves the folder, or a file
                that is missing, of another size or (with `verify`) of other content; named.
        """
        root = Path(path)
        file = root / MANIFEST
        try:
            raw = json.loads(file.read_bytes())
        except (FileNotFoundError, NotADirectoryError):
            raise TrioError(
                f"{root} is not a bundle, since it has no {MANIFEST}: make one with trio-export"
            ) from None
        except OSError as error:
            raise TrioError(f"cannot read {file}: {error.strerror}") from error
        except ValueError as error:
            raise TrioError(
                f"{file} is damaged, it is not valid JSON ({error}): export the bundle again"
            ) from error
        try:
            manifest = Manifest.from_json(raw)
        except TrioError as error:
            raise TrioError(f"cannot use {file}: {error}") from error
        bundle = cls(root, manifest)
        bundle.check(verify=verify)
        return bundle

    def check(self, verify: bool = False) -> None:
        """Compares the folder with the manifest; see `load` for what it raises."""
        for stage, graph in self.manifest.graphs.items():
            if graph.file not in self.manifest.files:
                raise TrioError(
                    f"{self.path / MANIFEST} is damaged: the graph of {stage}, {graph.file}, is "
                    "not among its files; export the bundle again"
                )
        paths = {name: safe_path(self.path, name) for name in self.manifest.files}
        planned = self.manifest.weights == "planned"
        for name, info in self.manifest.files.items():
            if planned and _is_weight(name):
                continue
            file = paths[name]
            if not file.is_file():
                raise TrioError(
                    f"the bundle {self.path} lacks {name}: copy the whole folder again, or export "
                    "the bundle again"
                )
            size = file.stat().st_size
            if size != info.size:
                raise TrioError(
                    f"{name} in the bundle {self.path} has {size} bytes where the manifest says "
                    f"{info.size}: copy it again, or export the bundle again"
                )
            if verify and info.sha256 is not None and sha256_of(file) != info.sha256:
                raise TrioError(
                    f"{name} in the bundle {self.path} is damaged (its SHA-256 is not the "
                    "manifest's): copy it again, or export the bundle again"
                )

    def seal(self) -> Bundle:
        """Records checksums of weights that have none yet (linked ones), so `verify` covers them.

        Returns:
            The bundle with the new manifest, which has also been written.

        Raises:
            TrioError: the manifest cannot be written.
        """
        files = dict(self.manifest.files)
        for name, info in files.items():
            if info.sha256 is None and self.manifest.weights != "planned":
                files[name] = FileInfo(info.size, sha256_of(safe_path(self.path, name)))
        manifest = replace(self.manifest, files=files)
        try:
            write_atomically(self.path / MANIFEST, manifest.dump())
        except OSError as error:
            raise TrioError(
                f"cannot record checksums in {self.path / MANIFEST} ({error.strerror}): "
                "make the bundle writable"
            ) from error
        return replace(self, manifest=manifest)

    @property
    def unsealed(self) -> list[str]:
        """Files without a recorded checksum."""
        return [name for name, info in self.manifest.files.items() if info.sha256 is None]

    @cached_property
    def config(self) -> ModelConfig:
        """The model's dimensions, parsed from the checkpoint's own config.json."""
        return parse_config(self.manifest.model.config)

    @cached_property
    def schedule(self) -> Schedule:
        """The pruning points the graphs were cut at, with the budget they default to."""
        return Schedule.from_json(self.manifest.schedule)

    @cached_property
    def budgets(self) -> dict[float, Schedule]:
        """The recipe's schedules that these graphs can run, by their budgets."""
        return {
            float(budget): self.schedule.with_keeps(keeps)
            for budget, keeps in self.manifest.budgets.items()
        }

    def schedule_at(self, budget: float) -> Schedule:
        """What a budget means for this bundle: the recipe's schedule, else a solved one.

        Raises:
            TrioError: the graphs cannot reach it.
        """
        return for_points(budget, self.config.text.num_layers, self.schedule, self.budgets)

    @property
    def stages(self) -> list[str]:
        """Stage names in the order they run (`decode`, where there is one, comes last)."""
        return list(self.manifest.graphs)

    def graph(self, stage: str) -> Path:
        """The .onnx file of a stage.

        Raises:
            TrioError: this bundle has no such stage.
        """
        if stage not in self.manifest.graphs:
            raise TrioError(
                f"the bundle {self.path} has no stage {stage!r}; it has {', '.join(self.stages)}"
            )
        return safe_path(self.path, self.manifest.graphs[stage].file)

    def require_weights(self) -> None:
        """Raises TrioError where the bundle was made with --graphs-only and still is."""
        if self.manifest.weights == "planned":
            raise TrioError(
                f"the bundle {self.path} has graphs but no weights (--graphs-only): complete it "
                "with `trio attach-weights BUNDLE CHECKPOINT`"
            )

    @property
    def tokenizer_path(self) -> Path:
        """tokenizer.json, for `tokenizers.Tokenizer.from_file`."""
        self.require_weights()
        return safe_path(self.path, TOKENIZER)

    @cached_property
    def tokens(self) -> dict[str, Any]:
        """tokens.json: `bos_token`, `eos_token`, `pad_token`, `unk_token`, `image_token` (strings
        or null) and `image_token_id`."""
        return dict(self._json(TOKENS))

    @cached_property
    def preprocessor(self) -> dict[str, Any]:
        """preprocessor.json, what `models.preprocessing.Preprocessor.to_json` gave."""
        return dict(self._json(PREPROCESSOR))

    @cached_property
    def chat_template(self) -> str | None:
        """The Jinja chat template, or None where the checkpoint has none."""
        if CHAT_TEMPLATE not in self.manifest.files:
            return None
        return safe_path(self.path, CHAT_TEMPLATE).read_text(encoding="utf-8")

    def _json(self, name: str) -> Any:
        file = safe_path(self.path, name)
        try:
            return json.loads(file.read_bytes())
        except FileNotFoundError:
            raise TrioError(f"the bundle {self.path} lacks {name}: export it again") from None
        except ValueError as error:
            raise TrioError(f"{file} is damaged ({error}): export the bundle again") from error


def _is_weight(name: str) -> bool:
    return name.startswith(WEIGHTS + "/")


# ---------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replaces a file by one that is wholly written, or leaves the old one alone."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def format_bytes(count: float) -> str:
    """`1.5 GiB`; three significant digits at least."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


@dataclass
class BundleWriter:
    """Writes a bundle into a temporary folder beside the target and moves it there when whole.

    Used as a context manager: leaving it normally moves the folder, leaving it by any exception
    (an interrupt included) removes what was written and keeps what stood at the target. A run that
    was killed leaves a temporary folder behind, which the next run to the same target removes.

    Subclasses write folders of other kinds: `kind` names them in messages, and `marker` is the file
    by which `force` knows that it replaces such a folder and nothing else.

    Attributes:
        target: the bundle's folder.
        force: replace a bundle that stands there; without it an existing target is refused.
        needed: bytes of all that will be written, as far as known, for the message about a full
            disk.
        folder: where to write until the bundle is whole.
        files: sizes and checksums of what was written through this writer.
    """

    kind: ClassVar[str] = "bundle"
    marker: ClassVar[str] = MANIFEST

    target: Path
    force: bool = False
    needed: int = 0
    folder: Path = field(init=False)
    files: dict[str, FileInfo] = field(init=False, default_factory=dict)
    _free: int = field(init=False, default=0)

    def __enter__(self) -> BundleWriter:
        self.target = Path(os.path.abspath(self.target))  # noqa: PTH100  (keep symlinks as named)
        self.refuse_existing()
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
            for leftover in _leftovers(self.target):
                shutil.rmtree(leftover, ignore_errors=True)
            self._free = shutil.disk_usage(self.target.parent).free
            self.folder = self.target.with_name(_temporary_name(self.target.name))
            self.folder.mkdir()
        except OSError as error:
            raise TrioError(
                f"cannot write to {self.target.parent} ({error.strerror}): choose another --out"
            ) from error
        return self

    def refuse_existing(self) -> None:
        """Raises TrioError where something stands at the target that may not be replaced."""
        if not self.target.name:
            raise TrioError(f"{self.target} cannot be a {self.kind}: name a folder for it")
        if not _exists(self.target):
            return
        if not self.force:
            raise TrioError(
                f"{self.target} exists already: pass --force to replace it, or choose another --out"
            )
        if not (self.target / self.marker).is_file() and not _is_empty_folder(self.target):
            raise TrioError(
                f"{self.target} exists and is not a {self.kind}, so --force does not replace it: "
                "choose another --out"
            )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is None:
            try:
                self._commit()
                return
            except BaseException as failure:
                error = failure
                self._discard()
                self._explain(failure)
                raise
        self._discard()
        self._explain(error)

    def _explain(self, error: BaseException) -> None:
        full = (errno.ENOSPC, errno.EDQUOT)
        if isinstance(error, OSError) and error.errno in full:
            raise self._too_full() from error

    def require_space(self, left: int) -> None:
        """Checks that `left` more bytes can be written.

        Raises:
            TrioError: they cannot; says how many bytes the whole bundle needs and how many were
                free for it.
        """
        if left > shutil.disk_usage(self.folder).free:
            written = sum(info.size for info in self.files.values())
            self.needed = max(self.needed, written + left)
            raise self._too_full()

    def _too_full(self) -> TrioError:
        needed, free = self.needed, self._free
        other = "" if needed > free else " (a quota or another program leaves less)"
        return TrioError(
            f"the disk of {self.target} is too full: the {self.kind} needs at least "
            f"{format_bytes(needed)} ({needed} bytes) and {format_bytes(free)} ({free} bytes) are "
            f"free{other}; make room or choose another --out (nothing was left behind)"
        )

    def path(self, relative: str) -> Path:
        """Where to write a file of the bundle; makes its folder."""
        path = safe_path(self.folder, relative)
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def write(self, relative: str, content: bytes) -> None:
        """Writes a small file and records it."""
        with self.path(relative).open("wb") as file:
            file.write(content)
        self.record(relative, hashlib.sha256(content).hexdigest())

    def record(self, relative: str, sha256: str | None) -> None:
        """Enters a file written by other means into `files`."""
        self.files[relative] = FileInfo(self.path(relative).stat().st_size, sha256)

    def _commit(self) -> None:
        for path in sorted(self.folder.rglob("*")):
            _fsync(path)
        _fsync(self.folder)
        if not _exists(self.target):
            self.folder.rename(self.target)
        elif not self.force:
            raise TrioError(
                f"{self.target} exists already, another run must have written it meanwhile: "
                "choose another --out"
            )
        else:
            # Once the names are exchanged the new bundle stands; the old one only takes up space.
            _exchange(self.folder, self.target)
            shutil.rmtree(self.folder, ignore_errors=True)
        _fsync(self.target.parent)

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _host() -> str:
    return re.sub(r"[^A-Za-z0-9]+", "_", socket.gethostname()) or "host"


def _temporary_name(name: str) -> str:
    return f".{name}.trio-{_host()}-{os.getpid()}-{secrets.token_hex(4)}"


def _leftovers(target: Path) -> Iterator[Path]:
    """Temporary folders of runs on this machine that no longer live."""
    pattern = re.compile(
        rf"\.{re.escape(target.name)}\.trio-{re.escape(_host())}-(\d+)-[0-9a-f]{{8}}"
    )
    for path in target.parent.iterdir():
        match = pattern.fullmatch(path.name)
        if match and not _alive(int(match[1])):
            yield path


def _alive(pid: int) -> bool:
    if sys.platform == "win32":
        return False  # a folder in use cannot be removed there anyway
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _fsync(path: Path) -> None:
    """Flushes a file or folder to the disk where the system can; linked weights are left alone."""
    with contextlib.suppress(PermissionError, IsADirectoryError):
        if path.is_symlink() or (path.is_file() and path.stat().st_nlink > 1):
            return
        descriptor = os.open(path, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        except OSError as error:
            if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
                raise
        finally:
            os.close(descriptor)


def _exchange(new: Path, old: Path) -> None:
    """Puts `new` at `old`'s place and `old` at `new`'s: in one step where Linux can.

    Elsewhere `old` is moved aside first, and put back should the second step fail.
    """
    if sys.platform == "linux" and not old.is_symlink():
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None, use_errno=True)
            at_cwd, exchange = -100, 2
            result = libc.renameat2(
                at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), ctypes.c_uint(exchange)
            )
            if result == 0:
                return
    aside = new.with_name(new.name[:-8] + secrets.token_hex(4))
    old.rename(aside)
    try:
        new.rename(old)
    except BaseException:
        aside.rename(old)
        raise
    aside.rename(new)
