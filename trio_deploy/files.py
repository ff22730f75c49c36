"""Files: atomic writes, checksums, safe paths, bounded readers of JSON and YAML, sizes as text."""

from __future__ import annotations

import contextlib
import ctypes
import difflib
import errno
import hashlib
import json
import math
import os
import secrets
import sys
from collections.abc import Iterable
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from trio_deploy.errors import TrioError

#: Largest files that `read_json` and `read_yaml` read, in bytes.
MAX_JSON = 1 << 26
MAX_YAML = 1 << 20

_T = TypeVar("_T")
_CHUNK = 1 << 22
_MAX_DEPTH = 64  # of lists and mappings within each other
_MAX_VALUES = 4_000_000  # aliases of YAML make a few lines stand for any number


# -------------------------------------------------------------------------------- paths, checksums


def safe_path(root: Path, relative: str) -> Path:
    """Resolve a path of a manifest to a file inside the bundle.

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
    """Hex SHA-256 of a file, read in chunks."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


# ------------------------------------------------------------------------------ JSON and YAML files


def read_json(file: Path, remedy: str) -> Any:
    """Read the value of a JSON file; `remedy` says in an error what to do about a bad file.

    Raises:
        FileNotFoundError: there is no such file.
        TrioError: it cannot be read, is too large, or `parse_json` refuses it.
    """
    return parse_json(_read_bounded(file, MAX_JSON, remedy), str(file), remedy)


def parse_json(content: bytes, name: str, remedy: str) -> Any:
    """Parse JSON without repeated keys, numbers that are not finite, or deep nesting.

    Raises:
        TrioError: it is not such JSON; names `name` and says `remedy`.
    """
    try:
        value = json.loads(content, object_pairs_hook=_unique, parse_constant=_refuse_constant)
        _check_extent(value)
    except (ValueError, RecursionError) as error:
        raise TrioError(f"{name} is not valid JSON ({_reason(error)}): {remedy}") from None
    return value


def read_yaml(file: Path, remedy: str) -> Any:
    """Read the value of a YAML file, as `read_json` does.

    Raises:
        FileNotFoundError: there is no such file.
        TrioError: it cannot be read, is too large, or is not YAML of plain values, without repeated
            keys, numbers that are not finite, or deep nesting.
    """
    content = _read_bounded(file, MAX_YAML, remedy)
    try:
        value = yaml.load(content.decode("utf-8"), _UniqueKeyLoader)  # a SafeLoader
        _check_extent(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:
        raise TrioError(f"{file} is not valid YAML ({_reason(error)}): {remedy}") from None
    return value


class _UniqueKeyLoader(yaml.SafeLoader):
    """A SafeLoader that refuses repeated keys, of which the last would win in silence."""

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _refuse_repeated([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node


def convert(raw: Any, kind: type[_T]) -> _T:
    """Convert plain JSON values to a msgspec struct.

    Raises:
        TrioError: a key is unknown or missing, or a value is of the wrong kind; names the place.
    """
    try:
        _refuse_unknown(raw, msgspec.inspect.type_info(kind), "")
        return msgspec.convert(raw, kind)
    except msgspec.ValidationError as error:
        where = _failing_key(raw, kind)
        raise TrioError(f"one of its values is wrong{where} ({error})") from None
    except RecursionError:
        raise TrioError("lists or mappings nest too deeply") from None


def nearest_name(name: str, known: Iterable[str]) -> str:
    """A suggestion for a message about an unknown name: `; did you mean 'x'?`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]!r}?" if near else ""


def _refuse_unknown(raw: Any, kind: Any, path: str) -> None:
    """Raises TrioError for a key that a struct has no field for."""
    if isinstance(kind, msgspec.inspect.UnionType):
        for each in kind.types:
            _refuse_unknown(raw, each, path)
    elif isinstance(kind, msgspec.inspect.StructType) and isinstance(raw, dict):
        fields = {field.encode_name: field.type for field in kind.fields}
        for key, value in raw.items():
            if key not in fields:
                raise TrioError(f"its key {path}{key} is unknown{nearest_name(key, fields)}")
            _refuse_unknown(value, fields[key], f"{path}{key}.")
    elif isinstance(kind, msgspec.inspect.DictType) and isinstance(raw, dict):
        for key, value in raw.items():
            _refuse_unknown(value, kind.value_type, f"{path}{key}.")
    elif isinstance(kind, (msgspec.inspect.VarTupleType, msgspec.inspect.ListType)):
        for number, value in enumerate(raw if isinstance(raw, list) else ()):
            _refuse_unknown(value, kind.item_type, f"{path}{number}.")


def _failing_key(raw: Any, kind: type) -> str:
    """Which entry of a mapping is wrong, since msgspec's paths leave out keys of mappings."""
    hints = get_type_hints(kind)
    for name, hint in hints.items():
        value = raw.get(name) if isinstance(raw, dict) else None
        if get_origin(hint) is dict and isinstance(value, dict):
            for key, entry in value.items():
                try:
                    msgspec.convert(entry, get_args(hint)[1])
                except msgspec.ValidationError:
                    return f" in {name}, {key}"
    return ""


def _read_bounded(file: Path, limit: int, remedy: str) -> bytes:
    try:
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from None
    except OSError as error:
        raise TrioError(f"cannot read {file}: {error.strerror}") from error
    if len(content) > limit:
        raise TrioError(f"{file} is larger than {format_bytes(limit)}: {remedy}")
    return content


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        twice = next(key for number, key in enumerate(keys) if key in keys[:number])
        raise ValueError(f"the key {twice!r} occurs twice")


def _refuse_constant(text: str) -> None:
    raise ValueError(f"{text} is not a finite number")


def _check_extent(value: Any) -> None:
    """Raises ValueError for deep nesting, too many values, or a number that is not finite."""
    sizes: dict[int, int] = {}

    def size(value: Any, depth: int) -> int:
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{value} is not a finite number")
        if not isinstance(value, (dict, list)):
            return 1
        if depth > _MAX_DEPTH:
            raise ValueError(f"lists or mappings nest deeper than {_MAX_DEPTH}")
        if id(value) not in sizes:
            children = value.values() if isinstance(value, dict) else value
            sizes[id(value)] = 1 + sum(size(child, depth + 1) for child in children)
        return sizes[id(value)]

    if size(value, 1) > _MAX_VALUES:
        raise ValueError(f"it has more than {_MAX_VALUES} values")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or mappings nest too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    return " ".join(str(error).split())


# ---------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file by one that is wholly written, or leave the old one alone."""
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
    """Format a number of bytes with three significant digits at least: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def exists(path: Path) -> bool:
    """Whether anything is at a path, a dangling link included."""
    return path.exists() or path.is_symlink()


def is_empty_folder(path: Path) -> bool:
    """Whether a path is a folder with nothing in it."""
    return path.is_dir() and not any(path.iterdir())


def fsync(path: Path) -> None:
    """Flush a file or folder to the disk where the system can, but not hard-linked weights."""
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


def exchange(new: Path, old: Path) -> None:
    """Exchange the names of two paths, in one step on Linux.

    Elsewhere `old` is moved aside first, and moved back if the second step fails.
    """
    if sys.platform == "linux" and not old.is_symlink():
        with contextlib.suppress(AttributeError, OSError):
            libc = ctypes.CDLL(None, use_errno=True)
            at_cwd, rename_exchange = -100, 2
            result = libc.renameat2(
                at_cwd, os.fsencode(new), at_cwd, os.fsencode(old), ctypes.c_uint(rename_exchange)
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
