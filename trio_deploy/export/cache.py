"""Bundles of models that are named where a bundle is expected: exported once, then reused.

The cache is a folder of the user (`TRIO_CACHE`, else the system's place for caches). A bundle in it
is known by everything that changes it: the files of the checkpoint, the recipe, the options of the
export, the target and the package itself. Whoever exports holds a lock, which others wait for.
"""

from __future__ import annotations

import glob
import importlib.util
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import asdict, dataclass, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from trio_deploy import __version__
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import MANIFEST
from trio_deploy.checkpoint.fingerprint import READ_WHOLE, digest, exported_files, of_checkpoint
from trio_deploy.checkpoint.processor_files import read_chosen_template
from trio_deploy.checkpoint.resolve import HUB_ID, Source, name_of, resolve
from trio_deploy.config.options import ExportOptions, RuntimeOptions
from trio_deploy.config.recipe import list_recipes, with_schedule_file
from trio_deploy.config.target import Target
from trio_deploy.config.yaml_files import PACKAGE
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import parse_config
from trio_deploy.files import exists, is_folder, sha256_of, user_path
from trio_deploy.runtimes.registry import (
    default_target,
    load_target,
    require_runnable,
    runtime_spec,
)
from trio_deploy.schedule.budget import (
    budgets_for_layers,
    resolve_schedule,
    schedule_at_budget,
)

if TYPE_CHECKING:  # a bundle's own folder is opened without them
    import filelock

FOLDER = "TRIO_CACHE"
"""Environment variable with the folder of the cache."""

_NEEDED = ("onnx", "onnx_ir", "onnxscript")  # the extra [export]
# Code that decides what a bundle holds. The version alone stays the same in a checkout.
_CODE = "files.py schedule config quant families checkpoint bundle graphs selection runtimes export"


def cache_folder() -> Path:
    """Folder of the cache, which need not exist."""
    import platformdirs

    named = os.environ.get(FOLDER)
    return user_path(named) if named else platformdirs.user_cache_path("trio-deploy")


def find_bundle(
    bundle: str | os.PathLike[str],
    options: RuntimeOptions | None = None,
    *,
    to_run: bool = False,
    budgets: Sequence[float | None] = (),
    before_export: Callable[[], object] | None = None,
    export: ExportOptions | None = None,
    progress: bool = True,
) -> Path:
    """Folder of a bundle, or of a model's bundle in the cache, which is exported if it is missing.

    Args:
        bundle: folder of a bundle; else a recipe's name or file, a checkpoint's folder or a hub id.
        options: how the bundle will be run; a model is exported for its target, else for the
            default target of its runtime.
        to_run: it will be run in this process: what this cannot run is not exported.
        budgets: what will be asked for, None for the bundle's own: a model that cannot have one of
            them is not exported.
        before_export: called, before anything is downloaded if possible, where a model has to be
            exported, which it can refuse by raising.
        export: how a model is exported, for the target of `options` whatever it says of one; None:
            by its recipe.
        progress: show a progress bar for weights, and notes on stderr.

    Raises:
        TrioError: it is none of these, or cannot be exported, or run as the arguments say.
    """
    folder = Path(bundle)
    if is_bundle(bundle):
        return folder
    model = os.fspath(bundle)
    if is_folder(folder) and not exists(folder / "config.json"):
        raise TrioError(
            f"{model} is neither a bundle, which has a {MANIFEST}, nor a checkpoint, which has a "
            "config.json: pass the folder of one of them"
        )
    if HUB_ID.fullmatch(model) and not exists(folder) and is_folder(folder.parent):
        raise TrioError(
            f"there is no folder {model}: pass the folder of a bundle or a checkpoint (if you mean "
            f"the hub id, `trio export --model {model}` gets it)"
        )
    how = with_schedule_file(export or ExportOptions())
    use = _Use(model, options or RuntimeOptions(), to_run, budgets, before_export, how)
    # Before anything is downloaded for it.
    checked = (exists(folder) or _is_name(model)) and not _has_entry(model)
    if checked:
        use.check()
    source = resolve(model, weights_needed=True)
    assert source.folder is not None  # since weights are needed
    return _Cached(use, source, progress, checked).find()


def is_bundle(path: str | os.PathLike[str]) -> bool:
    """Whether a path is that of a bundle's folder, rather than a model's.

    A manifest that is a link to nothing is one that cannot be read, and not one that is absent.
    """
    return exists(Path(path) / MANIFEST)


@dataclass(frozen=True)
class _Use:
    """What a model's bundle is wanted for; the fields are arguments of `find_bundle`."""

    model: str
    options: RuntimeOptions
    to_run: bool
    budgets: Sequence[float | None]
    before_export: Callable[[], object] | None
    export: ExportOptions

    @cached_property
    def target(self) -> Target:
        """What the model is exported for, so that it runs as the options say."""
        return load_target(self.options.target or default_target(self.options.runtime))

    def check(self) -> None:
        """Check what is known of a bundle that would have to be exported.

        Raises:
            TrioError: it cannot be exported, or would be of no use.
        """
        if self.to_run:
            require_runnable(self.options, self.target)
            if runtime_spec(self.options.runtime or self.target.runtime).needs_engines:
                named = self.options.target
                name = self.target.name if isinstance(named, Target | None) else named
                raise TrioError(
                    f"there are no engines of {self.model} for {name}: make them on this machine "
                    f"with `trio build {self.model} --target {name}`"
                )
        if budgets := [budget for budget in self.budgets if budget is not None]:
            self._check_budgets(budgets)
        if self.before_export is not None:
            self.before_export()
        if missing := [name for name in _NEEDED if importlib.util.find_spec(name) is None]:
            raise TrioError(
                f"{self.model} has to be exported first, which needs the package {missing[0]}: "
                "pip install 'trio-deploy[export]', or pass the folder of a bundle"
            )

    def _check_budgets(self, budgets: Sequence[float]) -> None:
        found = resolve(self.model, weights_needed=False)
        layers = parse_config(found.raw_config).text.num_layers
        published = found.recipe.schedules if found.recipe else {}
        own = resolve_schedule(layers, published=published)
        for budget in budgets:
            schedule_at_budget(budget, layers, own, budgets_for_layers(published, own))


@dataclass(frozen=True)
class Entry:
    """A bundle in the cache.

    Attributes:
        size: bytes of its files, hard links included.
        used: when it was last used, seconds since 1970.
    """

    bundle: Bundle
    size: int
    used: float

    @property
    def name(self) -> str:
        return self.bundle.path.name


def list_cache() -> list[Entry]:
    """The bundles in the cache, the last used first; those that cannot be read are left out."""
    found = []
    for manifest in _bundles().glob(f"*/{MANIFEST}"):
        folder = manifest.parent
        if folder.name.startswith("."):  # being written
            continue
        try:
            bundle = Bundle.load(folder)
        except TrioError:
            continue
        size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
        found.append(Entry(bundle, size, folder.stat().st_mtime))
    return sorted(found, key=lambda entry: entry.used, reverse=True)


def clear_cache(names: Iterable[str] = ()) -> tuple[list[str], list[str]]:
    """Remove bundles from the cache, and what exports that were killed have left.

    Args:
        names: models or bundles, such as `tiny` or `tiny-0123456789ab`; none: all.

    Returns:
        Names of the bundles that were removed, and of those that are being exported now.

    Raises:
        TrioError: there is no bundle of a name.
    """
    import filelock

    wanted, folder = list(names), _bundles()
    all_of_them = sorted(
        {_name(path) for path in folder.iterdir() if path.is_dir()} if folder.is_dir() else ()
    )
    chosen = [n for n in all_of_them if not wanted or n in wanted or n[: -_DIGITS - 1] in wanted]
    known = {*all_of_them, *(name[: -_DIGITS - 1] for name in all_of_them)}
    if missing := [name for name in wanted if name not in known]:
        raise TrioError(f"the cache has no bundle of {missing[0]}: `trio cache` lists what it has")
    removed, busy = [], []
    for name in chosen:
        try:
            with _lock(name).acquire(timeout=0):
                for path in [folder / name, *folder.glob(f".{name}.*")]:
                    shutil.rmtree(path, ignore_errors=True)
        except filelock.Timeout:
            busy.append(name)
        else:
            removed.append(name)
    return removed, busy


_DIGITS = 12  # of the key in a bundle's name


@dataclass(frozen=True)
class _Cached:
    """A model's bundle in the cache; `checked`: its use has been checked."""

    use: _Use
    source: Source
    progress: bool
    checked: bool

    @property
    def name(self) -> str:
        return f"{_slug(self.source.name)}-{self.key}"

    @property
    def key(self) -> str:
        """Checksum of everything that changes the bundle."""
        folder, recipe = self.source.folder, self.source.recipe
        assert folder is not None
        large = [file for file in exported_files(folder) if file.stat().st_size > READ_WHOLE]
        what = [
            [__version__, _code()],
            of_checkpoint(folder, recipe),
            # Large files are read in places alone.
            [[file.name, file.stat().st_mtime_ns] for file in large],
            [self.source.name, self.source.source, self.source.revision],
            repr(self.use.export),
            read_chosen_template(self.use.export.chat_template),
            repr(sorted(asdict(self.use.target).items())),
        ]
        return digest(what)[:_DIGITS]

    def find(self) -> Path:
        """The bundle's folder, exported first if it is missing or damaged.

        Raises:
            TrioError: it cannot be exported, or the cache cannot be written.
        """
        folder = _bundles() / self.name
        if not _whole(folder):
            try:
                with self._locked():
                    if not _whole(folder):  # nobody else has exported it meanwhile
                        self._export(folder)
            except OSError as error:
                raise TrioError(
                    f"cannot write to the cache {cache_folder()} ({error.strerror}): name another "
                    f"folder by {FOLDER}"
                ) from error
        elif not is_folder(Path(self.use.model)):
            self._note(f"{self._absent()}using the bundle of {self.use.model} in {folder}")
        with suppress(OSError):  # a cache that others own
            os.utime(folder)  # when it was last used
        return folder

    def _export(self, folder: Path) -> None:
        if not self.checked:
            self.use.check()
        from trio_deploy.export.job import export_model

        model, target = self.use.model, self.use.target
        self._note(f"{self._absent()}exporting {model} for {target.name} to {folder}")
        options = replace(self.use.export, target=target, force=True)
        try:
            export_model(model, folder, options, progress=self.progress)
        except TrioError as error:
            raise TrioError(
                f"cannot export {model} to the cache: {error} (`trio export` takes options)"
            ) from error

    def _locked(self) -> AbstractContextManager[object]:
        import filelock

        lock = _lock(self.name)
        try:
            return lock.acquire(timeout=0)
        except filelock.Timeout:
            self._note(f"another process is exporting {self.use.model}: waiting for it")
            return lock.acquire()

    def _absent(self) -> str:
        return "" if exists(Path(self.use.model)) else f"there is no folder {self.use.model}: "

    def _note(self, text: str) -> None:
        if self.progress:
            print(f"trio: {text}", file=sys.stderr)


def _bundles() -> Path:
    return cache_folder() / "bundles"


def _lock(name: str) -> filelock.FileLock:
    """The lock of a bundle in the cache. Its file stays, since others may be waiting for it."""
    import filelock

    folder = cache_folder() / "locks"
    folder.mkdir(parents=True, exist_ok=True)
    return filelock.FileLock(folder / f"{name}.lock")


def _whole(folder: Path) -> bool:
    if not folder.is_dir():
        return False
    try:
        Bundle.load(folder)
    except TrioError:
        return False
    return True


def _name(folder: Path) -> str:
    """Name of the bundle that a folder of the cache holds, or was to hold."""
    return folder.name.lstrip(".").partition(".trio-")[0]


def _slug(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).lstrip(".") or "model"


def _has_entry(model: str) -> bool:
    """Whether the cache has a bundle of a model, of its present files or of older ones."""
    name = f"{glob.escape(_slug(name_of(model)))}-{'?' * _DIGITS}"
    return any(_bundles().glob(f"{name}/{MANIFEST}"))


def _is_name(model: str) -> bool:
    return model in list_recipes() or HUB_ID.fullmatch(model) is not None


@cache
def _code() -> str:
    """Checksum of the code that decides what a bundle holds."""
    places = [PACKAGE / name for name in _CODE.split()]
    files = [f for place in places for f in (place.rglob("*.py") if place.is_dir() else [place])]
    return digest(sorted([str(file.relative_to(PACKAGE)), sha256_of(file)] for file in files))
