"""Targets: a device and the runtime on it, one file each in engines/."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trio_deploy.config.yaml_files import (
    DTYPES,
    _choice,
    _find,
    _names,
    _nearest,
    _read,
    _shipped,
    _text,
)
from trio_deploy.errors import TrioError

RUNTIMES = ("onnxruntime", "openvino", "tensorrt")

#: Which dialects of the graphs a runtime reads.
DIALECTS = {
    "onnxruntime": ("ort", "onnx", "primitive"),
    "openvino": ("primitive",),
    "tensorrt": ("onnx", "primitive"),
}

#: In which float types a runtime runs graphs: ONNX Runtime has no bfloat16 arithmetic on CPUs, and
#: its Python interface hands no bfloat16 over, whatever the provider.
GRAPH_DTYPES = {
    "onnxruntime": ("float32", "float16"),
    "openvino": DTYPES,
    "tensorrt": DTYPES,
}

#: Execution providers of ONNX Runtime, in short.
PROVIDERS = ("cpu", "cuda")
_TARGET_KEYS = ("description", "runtime", "provider", "dialect", "dtype", "precision")
_TENSORRT_KEYS = (
    "tensorrt",
    "decode_layout",
    "compute_capability",
    "memory_gib",
    "reserved_gib",
    "workspace_gib",
    "limits",
)

#: TensorRT's parser reads the `onnx` dialect (Attention, RotaryEmbedding, TensorScatter) from here.
ONNX_DIALECT_SINCE = (10, 15)
OLDEST_TENSORRT = (8, 6)
DECODE_LAYOUTS = ("separate", "shared")


@dataclass(frozen=True)
class Limits:
    """What engines of a target are built for; what lies beyond is refused when it is asked for.

    Attributes:
        max_batch, max_images: rows at once, and images a row.
        max_text_tokens, max_visual_tokens: of a row's prompt.
        max_new_tokens: generated for a row.
        max_budget: the largest share of visual tokens that a request may ask for.
        typical_*: what the engines are tuned for.
    """

    max_batch: int = 1
    max_images: int = 1
    max_text_tokens: int = 512
    max_visual_tokens: int = 4096
    max_new_tokens: int = 256
    max_budget: float = 1.0
    typical_batch: int = 1
    typical_text_tokens: int = 64
    typical_visual_tokens: int = 4096
    typical_new_tokens: int = 64


@dataclass(frozen=True)
class Target:
    """A device and the runtime on it.

    Attributes:
        name: the file's name without its ending.
        runtime: `onnxruntime`, `openvino` or `tensorrt`.
        dialect: of the graphs: `ort`, `onnx` or `primitive`.
        dtype: of graphs and weights.
        precision: in which the runtime computes matrix products, where it can choose; else dtype.
        provider: ONNX Runtime's, `cpu` or `cuda`; None for other runtimes.
        tensorrt: version on the device, `10.3`; this and all that follows for TensorRT alone.
        decode_layout: `separate` (a decode engine of all layers) or `shared` (the engines of the
            segments decode too, and weights are on the device once); None: by the dialect.
        compute_capability: of the GPU, `8.7`; None where any will do.
        memory_gib: of the device; None where it is not known.
        reserved_gib: of it, what the system and others need.
        workspace_gib: what a layer may use as scratch memory, at most; None: as much as there is,
            which is TensorRT's default.
        limits: of requests.
    """

    name: str
    runtime: str
    dialect: str
    dtype: str
    precision: str
    description: str = ""
    provider: str | None = None
    tensorrt: str | None = None
    decode_layout: str | None = None
    compute_capability: str | None = None
    memory_gib: float | None = None
    reserved_gib: float = 0.0
    workspace_gib: float | None = None
    limits: Limits = Limits()

    @property
    def usable_gib(self) -> float | None:
        """Memory that engines and buffers may take; None where it is not known."""
        return None if self.memory_gib is None else self.memory_gib - self.reserved_gib


def target_folder() -> Path:
    """Where the shipped targets lie: inside an installed package, or engines/ of a checkout."""
    return _shipped("targets", "engines")


def list_targets() -> list[str]:
    """Names of the shipped targets."""
    return _names(target_folder())


def load_target(name_or_path: str | Path) -> Target:
    """Read a target by its name or from a file.

    Raises:
        TrioError: no such target, an unknown or missing key, or a value that is wrong.
    """
    file = _find(name_or_path, target_folder(), "target")
    raw = _read(file, _TARGET_KEYS + _TENSORRT_KEYS)
    runtime = _choice(file, raw, "runtime", RUNTIMES)
    if runtime == "tensorrt":
        return _tensorrt_target(file, raw)
    for key in _TENSORRT_KEYS:
        if key in raw:
            raise TrioError(f"{file}: {key} belongs to TensorRT, not to {runtime}.")
    dtype = _choice(file, raw, "dtype", DTYPES)
    provider = None
    if runtime == "onnxruntime":
        provider = _choice(file, raw, "provider", PROVIDERS, "cpu")
    elif "provider" in raw:
        raise TrioError(f"{file}: a provider belongs to ONNX Runtime, not to {runtime}.")
    return Target(
        name=file.stem,
        runtime=runtime,
        dialect=_choice(file, raw, "dialect", DIALECTS[runtime]),
        dtype=dtype,
        precision=_choice(file, raw, "precision", DTYPES, dtype),
        description=_text(file, raw, "description") or "",
        provider=provider,
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


def tensorrt_dialects(version: str) -> tuple[str, ...]:
    """Dialects that a version of TensorRT reads, the better one first."""
    newest = parse_version(version) >= ONNX_DIALECT_SINCE
    return ("onnx", "primitive") if newest else ("primitive",)


def _tensorrt_target(file: Path, raw: Mapping[str, Any]) -> Target:
    if "provider" in raw:
        raise TrioError(f"{file}: a provider belongs to ONNX Runtime, not to tensorrt.")
    version = raw.get("tensorrt")
    if not isinstance(version, str):
        raise TrioError(
            f"{file}: the key 'tensorrt' must give a version in quotes, like \"10.3\", not "
            f"{version!r}."
        )
    try:
        known = parse_version(version)
    except TrioError as error:
        raise TrioError(f"{file}: {error}.") from None
    if known < OLDEST_TENSORRT:
        raise TrioError(f"{file}: TensorRT {version} is too old; 8.6 is the oldest that will do.")
    dialects = tensorrt_dialects(version)
    dialect = _choice(file, raw, "dialect", DIALECTS["tensorrt"], dialects[0])
    if dialect not in dialects:
        raise TrioError(
            f"{file}: TensorRT {version} does not read the {dialect} dialect, which needs 10.15: "
            f"choose {' or '.join(dialects)}."
        )
    layout = _choice(
        file, raw, "decode_layout", DECODE_LAYOUTS, "separate" if dialect == "onnx" else "shared"
    )
    if dialect == "onnx" and layout == "shared":
        raise TrioError(
            f"{file}: the onnx dialect decodes with an engine of its own: choose decode_layout "
            "separate, or dialect primitive, whose segments can decode too."
        )
    dtype = _choice(file, raw, "dtype", DTYPES)
    capability = raw.get("compute_capability")
    if capability is not None and not (
        isinstance(capability, str) and re.fullmatch(r"\d+\.\d", capability)
    ):
        raise TrioError(
            f'{file}: compute_capability must be in quotes, like "8.7", not {capability!r}.'
        )
    memory = _number(file, raw, "memory_gib", None)
    reserved = _number(file, raw, "reserved_gib", 0.0)
    assert reserved is not None
    if memory is not None and reserved >= memory:
        raise TrioError(f"{file}: reserved_gib {reserved:g} leaves nothing of {memory:g} GiB.")
    workspace = _number(file, raw, "workspace_gib", None)
    if workspace == 0:
        raise TrioError(
            f"{file}: workspace_gib 0 leaves no scratch memory: leave it out for TensorRT's "
            "default, all of the device's memory"
        )
    return Target(
        name=file.stem,
        runtime="tensorrt",
        dialect=dialect,
        dtype=dtype,
        precision=_choice(file, raw, "precision", DTYPES, dtype),
        description=_text(file, raw, "description") or "",
        tensorrt=version,
        decode_layout=layout,
        compute_capability=capability,
        memory_gib=memory,
        reserved_gib=reserved,
        workspace_gib=workspace,
        limits=_limits(file, raw.get("limits", {})),
    )


def _number(file: Path, raw: Mapping[str, Any], key: str, default: float | None) -> float | None:
    value = raw.get(key, default)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise TrioError(f"{file}: {key} must be a number of GiB, not {value!r}.")
    return float(value)


def _limits(file: Path, raw: Any) -> Limits:
    if not isinstance(raw, dict):
        raise TrioError(f"{file}: `limits` must be a mapping.")
    known = {entry.name: entry.default for entry in fields(Limits)}
    for key, value in raw.items():
        if key not in known:
            raise TrioError(
                f"{file}: unknown limit {key!r}.{_nearest(str(key), known)} "
                f"Known are {', '.join(known)}."
            )
        if key == "max_budget":
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value <= 1:
                raise TrioError(f"{file}: max_budget must be above 0 and at most 1, not {value!r}.")
        elif type(value) is not int or value < (0 if "visual" in key or "images" in key else 1):
            raise TrioError(f"{file}: {key} must be a positive whole number, not {value!r}.")
    limits = Limits(**raw)
    for name in ("batch", "text_tokens", "visual_tokens", "new_tokens"):
        typical, most = getattr(limits, f"typical_{name}"), getattr(limits, f"max_{name}")
        if f"typical_{name}" not in raw:
            limits = replace(limits, **{f"typical_{name}": min(typical, most)})
        elif typical > most:
            raise TrioError(f"{file}: typical_{name} {typical} exceeds max_{name} {most}.")
    return limits
