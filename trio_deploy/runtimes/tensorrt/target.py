"""What TensorRT and TensorRT-RTX need to know of a target, and what follows from it."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError

#: TensorRT's parser reads the `onnx` dialect (Attention, RotaryEmbedding, TensorScatter) from here.
ONNX_DIALECT_SINCE = (10, 15)
DIALECTS = ("onnx", "primitive")
OLDEST_TENSORRT = (8, 6)
DECODE_LAYOUTS = ("separate", "shared")

_SHARED_KEYS = ("decode_layout", "weights", "memory_gib", "reserved_gib", "limits")
#: Keys of a target's file that are TensorRT's, and TensorRT-RTX's.
TARGET_KEYS = (*_SHARED_KEYS, "tensorrt", "compute_capability", "workspace_gib")
RTX_KEYS = (*_SHARED_KEYS, "compute_capabilities")
#: Runtime → flavour of the library that builds and runs its engines (`bindings.MODULES`).
FLAVOURS = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}
#: Compute capabilities that TensorRT-RTX 1.7 compiles our graphs for.
RTX_CAPABILITIES = ("8.0", "8.6", "8.9", "12.0", "12.1")


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX.

    Attributes:
        flavour: one of `FLAVOURS`' values.
        version: such as "10.3"; "": not known. TensorRT-RTX has numbers of its own.
    """

    flavour: str
    version: str = ""

    @property
    def name(self) -> str:
        """Name for messages, with the version."""
        title = "TensorRT-RTX" if self.flavour == "rtx" else "TensorRT"
        return f"{title} {self.version}".rstrip()

    @property
    def dialects(self) -> tuple[str, ...]:
        """Dialects that it reads, the preferred one first."""
        return DIALECTS if self.flavour == "rtx" else dialects_of_version(self.version)


def require_engines(
    target: Target, remedy: str = "export the bundle for one, such as --target l4"
) -> Library:
    """The library that builds a target's engines; reject a target that runs graphs.

    Args:
        remedy: end of the message.

    Raises:
        TrioError: the target's runtime has no engines.
    """
    flavour = FLAVOURS.get(target.runtime)
    if flavour is None:
        runtimes = " or ".join(f"`runtime: {name}`" for name in FLAVOURS)
        raise TrioError(
            f"the target {target.name} runs {target.runtime}: engines are for targets with "
            f"{runtimes}; {remedy} (`ls engines`)"
        )
    return Library(flavour, target.tensorrt or "")


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


def target_schemes(target: Target) -> tuple[str, ...]:
    """Schemes of quantised weights that stay narrow in engines of a target.

    By its documentation TensorRT 8.6 computes with codes only where activations have codes too; 4
    bit came with 10.0, in blocks of 64 and 128. For GPUs that have no floats of few bits the
    compiler refuses them.
    """
    from trio_deploy.quant.schemes import SCHEMES  # needs numpy

    library = require_engines(target)
    version = None if library.flavour == "rtx" else parse_version(library.version)
    if version is not None and version < (10, 0):
        return ()
    gpus = target.compute_capabilities or (target.compute_capability,)
    able = ["int8", "int4"]
    for scheme in SCHEMES.values():
        if scheme.kind == "fp" and (version is None or version >= parse_version(scheme.tensorrt)):
            least = parse_version(scheme.capability)
            if all(gpu is not None and parse_version(gpu) >= least for gpu in gpus):
                able.append(scheme.name)
    return tuple(able)


def target_dialects(target: Target) -> tuple[str, ...]:
    """Dialects that the TensorRT of a target reads, the preferred one first."""
    return require_engines(target).dialects


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
    if target.dialect == "onnx" and target.dialect not in dialects:
        raise TrioError(
            f"TensorRT {target.tensorrt} does not read the onnx dialect, which needs 10.15: choose "
            f"{' or '.join(dialects)}"
        )
    capability = target.compute_capability
    if capability is not None and not re.fullmatch(r"\d+\.\d", capability):
        raise TrioError(f'compute_capability must be in quotes, like "8.7", not {capability!r}')
    _refuse_turing(capability, "a GPU of 8.0 or later")
    if target.workspace_gib == 0:
        raise TrioError(
            "workspace_gib 0 leaves no scratch memory: leave it out for TensorRT's default, all of "
            "the device's memory"
        )
    return _with_layout(target)


def check_rtx_target(target: Target) -> Target:
    """Check what is TensorRT-RTX's of a target, and fill in dialect and decode layout.

    Raises:
        TrioError: no GPUs to compile for, or some that it does not compile for, or values that do
            not go together.
    """
    known = ", ".join(RTX_CAPABILITIES)
    if not target.compute_capabilities:
        raise TrioError(
            "the key 'compute_capabilities' must list the GPUs to compile for, like "
            f'["8.6", "8.9"]: choose from {known}'
        )
    for capability in target.compute_capabilities:
        _refuse_turing(capability, f"from {known}")
        if capability not in RTX_CAPABILITIES:
            raise TrioError(
                f"TensorRT-RTX does not compile for compute capability {capability!r}: choose from "
                f"{known}, or a target with `runtime: tensorrt`"
            )
    return _with_layout(target)


def _refuse_turing(capability: str | None, others: str) -> None:
    """Raise TrioError for 7.5, whose selections TensorRT-RTX 1.7 does not compile."""
    if capability == "7.5":
        raise TrioError(
            "compute capability 7.5 cannot run selections: NVIDIA's compiler has no float32 matrix "
            f"products there, in which they compare tokens; choose {others}"
        )


def _with_layout(target: Target) -> Target:
    """Fill in dialect and decode layout, of which the one decides the other.

    Raises:
        TrioError: values that do not go together.
    """
    dialect = target.dialect or target_dialects(target)[0]
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
    memory, reserved = target.memory_gib, target.reserved_gib
    if memory is not None and reserved >= memory:
        raise TrioError(f"reserved_gib {reserved:g} leaves nothing of {memory:g} GiB")
    return replace(target, dialect=dialect, decode_layout=layout)
