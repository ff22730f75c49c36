"""Damage of a valid file at a random place, for property-based tests.

`damaged_bytes` knows no format: bytes are flipped, cut out or put in. `damaged_value` keeps the
format of JSON and YAML: a value becomes one of another kind or far out of range, a
key goes or comes.
"""

from __future__ import annotations

import contextlib
import copy
import json
import resource
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from hypothesis import strategies as st

#: What a field may hold that was not meant for it.
ODD: list[Any] = [
    *[None, True, False, 0, 1, -1, 2, 7, 65_537, 2**31, 2**53 + 1, 2**63, 2**64, 10**30, -(10**30)],
    *[0.0, 0.5, -0.5, 1.0, 1e-300, 1e300, float("nan"), float("inf"), float("-inf")],
    *["", "x", "0", "1.5", "nan", "None", "é", "\0", "\n", "../x", "/", ".", "x" * 5_000, "\ud800"],
    *[[], {}, [[]], [{}], [0], [None], ["x"], [1, 2], [1.5] * 100, {"a": 1}, {"": None}],
]


def with_value(raw: Any, keys: Sequence[str | int], value: Any) -> Any:
    """A copy of a plain value, with one place in it changed.

    Args:
        keys: names and positions on the way to the place.
    """
    changed = copy.deepcopy(raw)
    *way, last = keys
    place = changed
    for key in way:
        place = place[key]
    place[last] = value
    return changed


_odd = st.sampled_from(ODD).map(copy.deepcopy)


@st.composite
def damaged_bytes(draw: st.DrawFn, content: bytes) -> bytes:
    """Content with one to three places flipped, cut out, put in, or cut off behind."""
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(0, len(content) - 1)))
        how = draw(st.sampled_from(["flip", "cut", "insert", "end"]))
        if how == "flip":
            flipped = bytes([content[at] ^ draw(st.integers(1, 255))]) if content else b""
            content = content[:at] + flipped + content[at + 1 :]
        elif how == "cut":
            content = content[:at] + content[at + draw(st.integers(1, 64)) :]
        elif how == "insert":
            new = draw(st.one_of(st.binary(max_size=16), st.sampled_from([b"{", b'"', b"[", b"9"])))
            content = content[:at] + new + content[at:]
        else:
            content = content[:at]
    return content


@st.composite
def damaged_value(draw: st.DrawFn, value: Any) -> Any:
    """A value with one to three of its parts replaced, removed or added."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        places = list(_places(value))
        if not places:
            return draw(_odd)
        parent, key = draw(st.sampled_from(places))
        how = draw(st.sampled_from(["replace", "replace", "replace", "remove", "add", "nest"]))
        if how == "replace":
            parent[key] = draw(_odd)
        elif how == "remove":
            del parent[key]
        elif how == "nest":
            parent[key] = [parent[key]]
        elif isinstance(parent, dict):
            parent[draw(st.sampled_from(["", "x", "shape", "type", "é"]))] = draw(_odd)
        else:
            parent.insert(key, draw(_odd))
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Parent and key of each part of a value."""
    for key in list(value) if isinstance(value, dict) else range(len(value)):
        yield value, key
        if isinstance(value[key], (dict, list)):
            yield from _places(value[key])


def damaged_json(value: Any) -> st.SearchStrategy[bytes]:
    """A damaged JSON file: structurally three times out of four, else its bytes."""
    whole = json.dumps(value, indent=1).encode()
    structural = damaged_value(value).map(lambda one: json.dumps(one).encode())
    return st.one_of(structural, structural, structural, damaged_bytes(whole))


def damaged_yaml(file: Path) -> st.SearchStrategy[bytes]:
    """A damaged YAML file, likewise."""
    whole = file.read_bytes()
    value = yaml.safe_load(whole)
    structural = damaged_value(value).map(
        lambda one: yaml.safe_dump(one, allow_unicode=False).encode("utf-8", "surrogatepass")
    )
    return st.one_of(structural, structural, structural, damaged_bytes(whole))


@contextlib.contextmanager
def limits(memory_mib: int = 1024, cpu_s: int = 20) -> Iterator[None]:
    """Bound what this process may take more than it has, so that a test fails and not the machine.

    Raises:
        MemoryError: an allocation beyond `memory_mib` of address space.
        TimeoutError: more than `cpu_s` of processor time.
    """

    def stop(*_: object) -> None:
        raise TimeoutError(f"more than {cpu_s} s of processor time")

    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(
        resource.RLIMIT_AS, (pages * resource.getpagesize() + (memory_mib << 20), before[1])
    )
    handler = signal.signal(signal.SIGVTALRM, stop)
    signal.setitimer(signal.ITIMER_VIRTUAL, cpu_s)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, handler)
        resource.setrlimit(resource.RLIMIT_AS, before)
