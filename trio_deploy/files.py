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
import reprlib
import secrets
import stat
import sys
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

import msgspec
import yaml

from trio_deploy.errors import TrioError

#: Largest files that are read whole, in bytes. YAML's reader takes most time and memory per byte.
MAX_JSON = 1 << 26
MAX_YAML = 1 << 17
MAX_TEXT = 1 << 20
#: Most values (numbers, texts, lists, mappings) in a file; each may take 250 bytes of memory.
MAX_VALUES = 1_000_000

# PyYAML's reader lets errors of other kinds through, such as of an index, for damaged escapes.
_YAML_ERRORS = (ValueError, LookupError, TypeError, AttributeError, RecursionError, yaml.YAMLError)

_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxdict, _REPR.maxlist = 4, 8, 8
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80

_T = TypeVar("_T")
_CHUNK = 1 << 22
_MAX_DEPTH = 64  # of lists and mappings within each other
_MAX_BITS = 128  # tokenizer_config.json's usual model_max_length, 10**30, has 100
_MAX_MERGED = 10_000  # keys that `<<` copies
_SHOWN = 200  # characters of a value or a reason in a message


# -------------------------------------------------------------------------------- paths, checksums


def safe_path(root: Path, relative: str) -> Path:
    """Resolve a path of a manifest to a file inside the bundle.

    Raises:
        TrioError: an absolute path, one with `..`, one longer than paths can be, or one whose
            symlink leads out of the bundle, to itself or to nothing.
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
            f"the bundle's manifest names {brief(relative)}, a path that leaves the bundle: "
            "do not use this bundle; export it again"
        )
    if any(len(os.fsencode(part)) > 255 for part in pure.parts) or len(relative) > 2048:
        raise TrioError(
            f"the bundle's manifest names {brief(relative)}, longer than a path can be: "
            "do not use this bundle; export it again"
        )
    path = root.joinpath(*pure.parts)
    if not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root)):  # takes loops, too
        raise TrioError(
            f"{relative} in the bundle is a symbolic link that leads out of it: "
            "put the file itself there"
        )
    if path.is_symlink() and not path.exists():
        raise TrioError(
            f"{relative} in the bundle is a symbolic link that leads to no file: "
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


def read_json(file: Path, remedy: str, *, limit: int = MAX_JSON, values: int = MAX_VALUES) -> Any:
    """Read the value of a JSON file; `remedy` says in an error what to do about a bad file.

    Args:
        limit: bytes of the file, at most.
        values: as of `parse_json`.

    Raises:
        FileNotFoundError: there is no such file.
        TrioError: it cannot be read, is too large, or `parse_json` refuses it.
    """
    return parse_json(read_bytes(file, remedy, limit), str(file), remedy, values=values)


def parse_json(content: bytes | str, name: str, remedy: str, *, values: int = MAX_VALUES) -> Any:
    """Parse JSON without repeated keys, deep nesting, or values that other code may stumble over.

    Such are numbers that are not finite or have more than 128 bits, and text that is no Unicode.

    Args:
        values: numbers, texts, lists and mappings in it, at most.

    Raises:
        TrioError: it is not such JSON; names `name` and says `remedy`.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8-sig")
        # Before they are made: of the shortest ones a small file has very many.
        if sum(map(text.count, ",[{")) > values:
            raise ValueError(f"it has more than {values} values")
        value = json.loads(text, object_pairs_hook=_unique)
        _check_extent(value, values)
    except (ValueError, RecursionError) as error:
        raise TrioError(f"{name} is not valid JSON ({_reason(error)}): {remedy}") from None
    return value


def read_yaml(file: Path, remedy: str) -> Any:
    """Read the value of a YAML file, as `read_json` does.

    Raises:
        FileNotFoundError: there is no such file.
        TrioError: it cannot be read, is too large, or is not YAML of the values that JSON has too,
            within the bounds of `parse_json`.
    """
    content = read_bytes(file, remedy, MAX_YAML)
    try:
        value = yaml.load(content.decode("utf-8-sig"), _BoundedLoader)  # a SafeLoader
        _check_extent(value, MAX_VALUES)
    except _YAML_ERRORS as error:
        raise TrioError(f"{file} is not valid YAML ({_reason(error)}): {remedy}") from None
    return value


def read_text(file: Path, remedy: str, *, limit: int = MAX_TEXT) -> str:
    """Read a file of UTF-8 text, without a byte order mark.

    Raises:
        FileNotFoundError: there is no such file.
        TrioError: it cannot be read, is too large, or is not UTF-8.
    """
    try:
        return read_bytes(file, remedy, limit).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise TrioError(f"{file} is not UTF-8 text ({_reason(error)}): {remedy}") from None


def read_bytes(file: Path, remedy: str, limit: int) -> bytes:
    """Read a file of at most `limit` bytes.

    Raises:
        FileNotFoundError: there is no such file.
        TrioError: it cannot be read or is larger, or would have to be waited for (a named pipe).
    """
    try:
        # A pipe that is named in a folder may never have a writer; a shell's `<(…)` has one.
        if stat.S_ISFIFO(file.stat().st_mode) and not str(file).startswith(("/dev/", "/proc/")):
            raise TrioError(f"{file} is a pipe and no file: {remedy}")
        with file.open("rb") as stream:
            content = stream.read(limit + 1)
    except FileNotFoundError:
        raise
    except NotADirectoryError as error:
        raise FileNotFoundError(*error.args) from None
    except (OSError, ValueError) as error:  # ValueError: a name with a zero byte
        raise TrioError(f"cannot read {file}: {getattr(error, 'strerror', error)}") from error
    if len(content) > limit:
        raise TrioError(f"{file} is larger than {format_bytes(limit)}: {remedy}")
    return content


def brief(value: Any) -> str:
    """A value of a file as text for a message: on one line and cut where it is long."""
    text = _REPR.repr(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


class _BoundedLoader(yaml.SafeLoader):
    """A SafeLoader that refuses repeated keys, of which the last would win in silence.

    It also bounds what `<<` copies: aliases of aliases make a few lines stand for any number.
    """

    merged = 0

    def compose_mapping_node(self, anchor: dict[Any, yaml.Node]) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        _refuse_repeated([key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)])
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        for key, value in list(node.value):
            if key.tag != "tag:yaml.org,2002:merge":
                continue
            for each in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if isinstance(each, yaml.MappingNode) and each is not node:
                    self.flatten_mapping(each)
                    self.merged += len(each.value)
                if self.merged > _MAX_MERGED:
                    raise ValueError(f"`<<` merges more than {_MAX_MERGED} keys")
        super().flatten_mapping(node)


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


def require_unicode(text: str, what: str) -> str:
    """Return a text that has an encoding in UTF-8; `what` names it in the error.

    Raises:
        TrioError: it has half of a surrogate pair, as JSON or a command line can spell it.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise TrioError(
            f"{what} is not valid Unicode, at character {error.start}: correct or remove it"
        ) from None
    return text


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


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    _refuse_repeated([key for key, _ in pairs])
    return dict(pairs)


def _refuse_repeated(keys: list[str]) -> None:
    if len(set(keys)) < len(keys):
        twice = Counter(keys).most_common(1)[0][0]
        raise ValueError(f"the key {brief(twice)} occurs twice")


class _BadValue(ValueError):
    """A value that `parse_json` refuses.

    Attributes:
        keys: of the mappings and numbers of the entries around it, innermost first.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.keys: list[str] = []

    def __str__(self) -> str:
        place = ".".join(reversed(self.keys))
        return f"{place}: {self.args[0]}" if place else str(self.args[0])


def _check_extent(value: Any, values: int) -> None:
    """Raises ValueError for deep nesting, too many values, or one that `parse_json` refuses."""
    # By identity, since aliases of YAML make one list stand in many places: values and height.
    known: dict[int, tuple[int, int]] = {}

    def measure(value: Any, depth: int) -> tuple[int, int]:
        if not isinstance(value, (dict, list)):
            _check_scalar(value)
            return 1, 0
        if depth <= _MAX_DEPTH and id(value) not in known:
            for key in value if isinstance(value, dict) else ():
                _check_scalar(key)
            count = height = 0
            for key, child in value.items() if isinstance(value, dict) else enumerate(value):
                try:
                    below = measure(child, depth + 1)
                except _BadValue as error:
                    error.keys.append(f"{key!s:.40}")
                    raise
                count, height = count + below[0], max(height, below[1])
            known[id(value)] = 1 + count, 1 + height
        if depth > _MAX_DEPTH or depth - 1 + known[id(value)][1] > _MAX_DEPTH:
            raise ValueError(f"lists or mappings nest deeper than {_MAX_DEPTH}")
        return known[id(value)]

    if measure(value, 1)[0] > values:
        raise ValueError(f"it has more than {values} values")


def _check_scalar(value: Any) -> None:
    """Raises ValueError for a value that `parse_json` refuses."""
    if isinstance(value, str):
        if not value.isascii():
            try:
                value.encode()
            except UnicodeEncodeError:
                raise _BadValue(f"the text {brief(value)} is no Unicode") from None
    elif isinstance(value, float):
        if not math.isfinite(value):
            raise _BadValue(f"{value} is not a finite number")
    elif isinstance(value, int):
        if value.bit_length() > _MAX_BITS:
            raise _BadValue(f"a number has more than {_MAX_BITS} bits")
    elif value is not None:  # a date or a set of YAML
        raise _BadValue(f"{brief(value)} is a {type(value).__name__}: write it in quotes")


def _reason(error: Exception) -> str:
    if isinstance(error, RecursionError):
        return "lists or mappings nest too deeply"
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        return f"{error.problem}, line {error.problem_mark.line + 1}"
    text = " ".join(str(error).split())
    if "integer string conversion" in text:  # Python's words advise to lift its limit
        return "a number has too many digits"
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"


# ---------------------------------------------------------------------------------------- writing


def write_atomically(path: Path, content: bytes | memoryview) -> None:
    """Replace a file by one that is wholly written, or leave the old one alone.

    Raises:
        TrioError: it cannot be written; names it.
    """
    write_together({path: content})


def write_together(contents: Mapping[Path, bytes | memoryview]) -> None:
    """Replace files by ones that are wholly written: all of them, or none where one fails.

    What can be known is known before the first one is replaced: none of them is a folder, and each
    new one is on the disk.

    Raises:
        TrioError: a file cannot be written; names it.
    """
    for path in contents:
        if is_folder(path):
            raise TrioError(f"cannot write {path}: it is a folder, so write elsewhere")
    written: list[tuple[Path, Path]] = []
    path = Path()
    try:
        for path, content in contents.items():
            temporary = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
            written.append((temporary, path))
            with temporary.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        for temporary, path in written:
            temporary.replace(path)
    except BaseException as error:
        for temporary, _ in written:
            with contextlib.suppress(OSError, ValueError):  # of a path that cannot be one
                temporary.unlink(missing_ok=True)
        if isinstance(error, (OSError, ValueError)):
            size, reason = format_bytes(len(contents[path])), getattr(error, "strerror", error)
            raise TrioError(
                f"cannot write {path} of {size} ({reason}): {write_remedy(error)}"
            ) from error
        raise


def write_remedy(error: OSError | ValueError) -> str:
    """What to do about a file that cannot be written, for a message."""
    number = getattr(error, "errno", None)
    if number in (errno.ENOSPC, errno.EDQUOT):
        return "make room on its disk, or write elsewhere"
    if number in (errno.EACCES, errno.EPERM, errno.EROFS):
        return "make its folder writable, or write elsewhere"
    return "write elsewhere"


def format_bytes(count: float) -> str:
    """Format a number of bytes with three significant digits at least: `1.5 GiB`."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.3g} {unit}"
        count /= 1024
    return f"{count:.4g} TiB"


def user_path(text: str | os.PathLike[str]) -> Path:
    """The path that a user wrote, with `~` in front replaced.

    Raises:
        TrioError: `~name` of nobody.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise TrioError(
            f"{brief(os.fspath(text))} begins with the home folder of nobody: correct the path"
        ) from None


def exists(path: Path) -> bool:
    """Whether anything is at a path, a dangling link included; False for one that cannot be."""
    try:
        return path.exists() or path.is_symlink()
    except (OSError, ValueError):
        return False


def is_file(path: Path) -> bool:
    """Whether a file is at a path; also False for a path that cannot be one."""
    try:
        return path.is_file()
    except (OSError, ValueError):  # a name of 300 characters, a zero byte
        return False


def is_folder(path: Path) -> bool:
    """Whether a folder is at a path; also False for a path that cannot be one."""
    try:
        return path.is_dir()
    except (OSError, ValueError):
        return False


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
