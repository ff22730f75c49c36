"""An atomic writer of bundles: the folder appears complete, or not at all."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import secrets
import shutil
import socket
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import ClassVar

from trio_deploy.bundle.manifest import MANIFEST, FileInfo
from trio_deploy.errors import TrioError
from trio_deploy.files import (
    exchange,
    exists,
    format_bytes,
    fsync,
    is_empty_folder,
    safe_path,
    write_remedy,
)


@dataclass
class BundleWriter:
    """Writes a bundle into a temporary folder beside the target and moves it there when complete.

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
        except (OSError, ValueError) as error:  # ValueError: a zero byte in the name
            reason = getattr(error, "strerror", error)
            raise TrioError(
                f"cannot write to {self.target.parent} ({reason}): choose another --out"
            ) from error
        return self

    def refuse_existing(self) -> None:
        """Raises TrioError where something stands at the target that may not be replaced."""
        if not self.target.name:
            raise TrioError(f"{self.target} cannot be a {self.kind}: name a folder for it")
        if not exists(self.target):
            return
        if not self.force:
            raise TrioError(
                f"{self.target} exists already: pass --force to replace it, or choose another --out"
            )
        if not (self.target / self.marker).is_file() and not is_empty_folder(self.target):
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
        if not isinstance(error, OSError):
            return
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise self._too_full() from error
        if error.errno in (errno.EFBIG, errno.EIO, errno.EROFS):  # they name no file themselves
            raise TrioError(
                f"cannot write the {self.kind} {self.target} ({error.strerror}): "
                f"{write_remedy(error)} (nothing was left behind)"
            ) from error

    def require_space(self, left: int) -> None:
        """Check that `left` more bytes can be written.

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
            fsync(path)
        fsync(self.folder)
        if not exists(self.target):
            self.folder.rename(self.target)
        elif not self.force:
            raise TrioError(
                f"{self.target} exists already, another run must have written it meanwhile: "
                "choose another --out"
            )
        else:
            # Once the names are exchanged the new bundle stands; the old one only takes up space.
            exchange(self.folder, self.target)
            shutil.rmtree(self.folder, ignore_errors=True)
        fsync(self.target.parent)

    def _discard(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


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
