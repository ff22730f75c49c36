"""Files: atomic writes, checksums, safe paths, sizes as text."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import secrets
import sys
from pathlib import Path, PurePosixPath, PureWindowsPath

from trio_deploy.errors import TrioError

_CHUNK = 1 << 22


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


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()


def _is_empty_folder(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


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
