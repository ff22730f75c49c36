"""What TensorRT needs to know of a target: its version, and what follows from that."""

from __future__ import annotations

import re
from dataclasses import replace

from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError

#: TensorRT's parser reads the `onnx` dialect (Attention, RotaryEmbedding, TensorScatter) from here.
ONNX_DIALECT_SINCE = (10, 15)
DIALECTS = ("onnx", "primitive")
OLDEST_TENSORRT = (8, 6)
DECODE_LAYOUTS = ("separate", "shared")

#: Keys of a target's file that are TensorRT's.
TARGET_KEYS = (
    "tensorrt",
    "decode_layout",
    "weights",
    "compute_capability",
    "memory_gib",
    "reserved_gib",
    "workspace_gib",
    "limits",
)


def require_tensorrt(target: Target) -> None:
    """Reject a target with another runtime.

    Raises:
        TrioError: the target's runtime is not TensorRT.
    """
    if target.runtime != "tensorrt":
        raise TrioError(
            f"the target {target.name} runs {target.runtime}: engines are for targets with "
            "`runtime: tensorrt`; export the bundle for one, such as --target l4 (`ls engines`)"
        )


def parse_version(text: str) -> tuple[int, int]:
    """(major, minor) of `10.3` or `8.6.1.post1`.

    Raises:
        TrioError: not of this form.
    """
    match = re.match(r"(\d+)\.(\d+)", text)
    if match is None:
        raise TrioError(f"{text!r} is no version of TensorRT: write it as 10.3")
    return int(match[1]), int(match[2])


def dialects_of_version(version: str) -> tuple[str, ...]:
    """Dialects that a version of TensorRT reads, the preferred one first."""
    newest = parse_version(version) >= ONNX_DIALECT_SINCE
    return DIALECTS if newest else ("primitive",)


def target_dialects(target: Target) -> tuple[str, ...]:
    """Dialects that the TensorRT of a target reads, the preferred one first."""
    return dialects_of_version(str(target.tensorrt))


def check_target(target: Target) -> Target:
    """Check what is TensorRT's of a target; dialect and decode layout follow from the version.

    Raises:
        TrioError: the version is missing or too old, or values that do not go together.
    """
    if target.tensorrt is None:
        raise TrioError("the key 'tensorrt' must give a version in quotes, like \"10.3\"")
    if parse_version(target.tensorrt) < OLDEST_TENSORRT:
        raise TrioError(f"TensorRT {target.tensorrt} is too old: 8.6 is the oldest supported")
    dialects = target_dialects(target)
    dialect = target.dialect or dialects[0]
    if dialect == "onnx" and dialect not in dialects:
        raise TrioError(
            f"TensorRT {target.tensorrt} does not read the onnx dialect, which needs 10.15: choose "
            f"{' or '.join(dialects)}"
        )
    layout = target.decode_layout or ("separate" if dialect == "onnx" else "shared")
    if layout not in DECODE_LAYOUTS:
        raise TrioError(
            f"decode_layout cannot be {layout!r}: choose one of {', '.join(DECODE_LAYOUTS)}"
        )
    if dialect == "onnx" and layout == "shared":
        raise TrioError(
            "the onnx dialect decodes with an engine of its own: choose decode_layout separate, or "
            "dialect primitive, whose segments can decode too"
        )
    if target.weights == "inputs" and dialect != "onnx":
        raise TrioError(
            f"{dialect} graphs cannot take their weights as inputs: choose weights constants, or "
            "dialect onnx, which TensorRT reads from 10.15"
        )
    capability = target.compute_capability
    if capability is not None and not re.fullmatch(r"\d+\.\d", capability):
        raise TrioError(f'compute_capability must be in quotes, like "8.7", not {capability!r}')
    memory, reserved = target.memory_gib, target.reserved_gib
    if memory is not None and reserved >= memory:
        raise TrioError(f"reserved_gib {reserved:g} leaves nothing of {memory:g} GiB")
    if target.workspace_gib == 0:
        raise TrioError(
            "workspace_gib 0 leaves no scratch memory: leave it out for TensorRT's default, all of "
            "the device's memory"
        )
    return replace(target, dialect=dialect, decode_layout=layout)
