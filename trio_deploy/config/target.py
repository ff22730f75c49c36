"""Targets: a device and the runtime on it, one file each in engines/."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from trio_deploy.config.yaml_files import (
    DTYPES,
    choice,
    find_file,
    names_in,
    nearest,
    read_keys,
    shipped_folder,
    text_of,
)
from trio_deploy.errors import TrioError
from trio_deploy.schedule.budget import check_budget

#: Keys that only some runtimes take; each says which, in its RuntimeSpec.
RUNTIME_KEYS = (
    "provider",
    "tensorrt",
    "decode_layout",
    "weights",
    "compute_capability",
    "compute_capabilities",
    "memory_gib",
    "reserved_gib",
    "workspace_gib",
    "limits",
)
#: How graphs hold their matrices.
WEIGHTS = ("constants", "inputs")
#: What selections compute with beside quantised weights.
SELECTIONS = ("int8", "float")
#: Where the table of token embeddings is: in the graphs that look tokens up, or mapped on the host.
TABLES = ("device", "host")
_KEYS = (
    "description",
    "runtime",
    "dialect",
    "dtype",
    "precision",
    "quantize",
    "selections",
    "embeddings",
    *RUNTIME_KEYS,
)


@dataclass(frozen=True)
class Limits:
    """Request limits engines are built for; larger requests are rejected.

    Attributes:
        max_batch, max_images: rows per batch, and images per row.
        max_text_tokens, max_visual_tokens: prompt tokens per row.
        max_new_tokens: generated tokens per row.
        max_budget: largest share of visual tokens that a request may ask for.
        typical_*: sizes that engines are tuned for.
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

    `runtimes.registry.load_target` checks it and fills in what its runtime decides.

    Attributes:
        name: name of the file without its ending.
        runtime: name of the runtime.
        dialect: dialect of the graphs; "": the runtime's choice.
        dtype: float type of graphs and weights.
        precision: float type of matrix products, where the runtime can choose it; else dtype.
        provider: execution provider of ONNX Runtime; None for other runtimes.
        tensorrt: version of TensorRT on the device, such as `10.3`.
        decode_layout: `separate` (a decode engine of all layers) or `shared` (the engines of the
            segments decode too, and weights are on the device once).
        weights: whether matrices are `constants` of the graphs or their `inputs`.
        compute_capability: compute capability of the GPU, such as `8.7`; None: any.
        compute_capabilities: those that engines are compiled for ahead of time.
        memory_gib: GiB of device memory; None: unknown.
        reserved_gib: GiB of it that the system and other programs need.
        workspace_gib: maximum GiB of scratch memory per layer; None: no limit.
        limits: request limits engines are built for.
        quantize: scheme to quantise by, as of `ExportOptions`.
        selections: what selections compute with beside quantised weights, as of `ExportOptions`.
        embeddings: where the table of token embeddings is, as of `ExportOptions`.
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
    weights: str = "constants"
    compute_capability: str | None = None
    compute_capabilities: tuple[str, ...] = ()
    memory_gib: float | None = None
    reserved_gib: float = 0.0
    workspace_gib: float | None = None
    limits: Limits = Limits()
    quantize: str | None = None
    selections: str | None = None
    embeddings: str = "device"

    @property
    def usable_gib(self) -> float | None:
        """GiB that engines and buffers may take; None: unknown."""
        return None if self.memory_gib is None else self.memory_gib - self.reserved_gib


def target_folder() -> Path:
    """Folder of the shipped targets: in an installed package, or engines/ of a checkout."""
    return shipped_folder("targets", "engines")


def list_targets() -> list[str]:
    """Names of the shipped targets."""
    return names_in(target_folder())


def find_target(name_or_path: str | Path) -> Path:
    """File of a target.

    Raises:
        TrioError: there is no such target.
    """
    return find_file(name_or_path, target_folder(), "target")


def read_target(file: Path) -> Target:
    """Read a target's file, without checking that its runtime accepts the values.

    Raises:
        TrioError: an unknown or missing key, or a value of the wrong kind.
    """
    raw = read_keys(file, _KEYS)
    runtime, dtype = text_of(file, raw, "runtime"), choice(file, raw, "dtype", DTYPES)
    if not runtime:
        raise TrioError(f"{file}: the key 'runtime' is missing: name one")
    reserved = _gib(file, raw, "reserved_gib")
    return Target(
        name=file.stem,
        runtime=runtime,
        dialect=text_of(file, raw, "dialect") or "",
        dtype=dtype,
        precision=choice(file, raw, "precision", DTYPES, dtype),
        description=text_of(file, raw, "description") or "",
        provider=text_of(file, raw, "provider"),
        tensorrt=_version(file, raw, "tensorrt"),
        decode_layout=text_of(file, raw, "decode_layout"),
        weights=choice(file, raw, "weights", WEIGHTS, WEIGHTS[0]),
        compute_capability=_version(file, raw, "compute_capability"),
        compute_capabilities=_versions(file, raw, "compute_capabilities"),
        memory_gib=_gib(file, raw, "memory_gib"),
        reserved_gib=0.0 if reserved is None else reserved,
        workspace_gib=_gib(file, raw, "workspace_gib"),
        limits=_limits(file, raw.get("limits", {})),
        quantize=text_of(file, raw, "quantize"),
        selections=choice(file, raw, "selections", SELECTIONS) if "selections" in raw else None,
        embeddings=choice(file, raw, "embeddings", TABLES, TABLES[0]),
    )


def _version(file: Path, raw: Mapping[str, Any], key: str) -> str | None:
    value = raw.get(key)
    if value is not None and not isinstance(value, str):
        raise TrioError(f'{file}: {key} must be a version in quotes, like "10.3", not {value!r}')
    return value


def _versions(file: Path, raw: Mapping[str, Any], key: str) -> tuple[str, ...]:
    value = raw.get(key, [])
    if not isinstance(value, list) or not all(isinstance(each, str) for each in value):
        raise TrioError(
            f'{file}: {key} must be a list of versions in quotes, like ["8.6"], not {value!r}'
        )
    return tuple(dict.fromkeys(value))


def _gib(file: Path, raw: Mapping[str, Any], key: str) -> float | None:
    value = raw.get(key)
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or value < 0:
        raise TrioError(f"{file}: {key} must be a number of GiB, not {value!r}")
    return float(value)


def _limits(file: Path, raw: Any) -> Limits:
    if not isinstance(raw, dict):
        raise TrioError(f"{file}: `limits` is not a mapping: write keys and values")
    known = {entry.name: entry.default for entry in fields(Limits)}
    for key, value in raw.items():
        if key not in known:
            raise TrioError(
                f"{file}: unknown limit {key!r}{nearest(str(key), known)}; known are "
                f"{', '.join(known)}"
            )
        if key == "max_budget":
            try:
                check_budget(value)
            except TrioError as error:
                raise TrioError(f"{file}: max_budget: {error}") from None
        elif type(value) is not int or value < (0 if "visual" in key or "images" in key else 1):
            raise TrioError(f"{file}: {key} must be a positive whole number, not {value!r}")
    limits = Limits(**raw)
    for name in ("batch", "text_tokens", "visual_tokens", "new_tokens"):
        typical, largest = getattr(limits, f"typical_{name}"), getattr(limits, f"max_{name}")
        if f"typical_{name}" not in raw:
            limits = replace(limits, **{f"typical_{name}": min(typical, largest)})
        elif typical > largest:
            raise TrioError(
                f"{file}: typical_{name} {typical} exceeds max_{name} {largest}: lower it"
            )
    return limits
