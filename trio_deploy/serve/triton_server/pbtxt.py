"""Protobuf's text format, as far as a model's config.pbtxt needs it.

Written without the protobuf package; the tests read it back with Triton's message definition.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


class Enum(str):
    """Name of an enumeration's value, written without quotes."""

    __slots__ = ()


def format_message(fields: Mapping[str, Any]) -> str:
    """Format a message from its fields, in their order.

    Args:
        fields: a mapping is a message, a sequence a repeated field, anything else a scalar;
            None omits a field.
    """
    return "".join(f"{line}\n" for line in _lines(fields, ""))


def _lines(fields: Mapping[str, Any], indent: str) -> list[str]:
    lines: list[str] = []
    for name, value in fields.items():
        if value is None:
            continue
        if isinstance(value, Mapping):
            lines += [f"{indent}{name} {{", *_lines(value, indent + "  "), f"{indent}}}"]
        elif isinstance(value, Sequence) and not isinstance(value, str):
            if value and isinstance(value[0], Mapping):
                for item in value:
                    lines += _lines({name: item}, indent)
            else:
                lines.append(f"{indent}{name}: [{', '.join(map(_scalar, value))}]")
        else:
            lines.append(f"{indent}{name}: {_scalar(value)}")
    return lines


def _scalar(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, str):
        return '"' + "".join(_ESCAPES.get(c, c) for c in value) + '"'
    return str(value)


_ESCAPES = {"\\": "\\\\", '"': '\\"', "\n": "\\n", "\r": "\\r", "\t": "\\t"}
