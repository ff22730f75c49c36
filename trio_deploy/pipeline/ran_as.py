"""How a bundle ran, for results that are kept: read back from its engines, not from the request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import ENGINES
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError
from trio_deploy.files import is_folder
from trio_deploy.runtimes.base import Engine, float_type
from trio_deploy.runtimes.registry import (
    complete_options,
    load_target,
    require_runtime_of,
    runtime_spec,
)


class RanAs(msgspec.Struct, frozen=True, omit_defaults=True):
    """What produced a result.

    Attributes:
        runtime: name of the runtime; of a baseline, that of its software.
        target: name of the target whose settings were used; None: of no target.
        dialect: dialect of the graphs; None of a baseline, which has none.
        dtype: float type of weights, embeddings and hidden states.
        precision: float type that the layers' products are computed in.
        device: processor, provider or GPU, by the runtime's name for it.
        quantized: scheme of the weights; None: they are float.
        activations: what activations are rounded to in products with quantised weights, by
            the runtime (`int8`) or by the graphs themselves (`fp8`); None: to nothing.
    """

    runtime: str
    target: str | None
    dialect: str | None
    dtype: str
    precision: str
    device: str
    quantized: str | None = None
    activations: str | None = None

    @classmethod
    def of(cls, bundle: Bundle, options: RuntimeOptions, engines: Mapping[str, Engine]) -> RanAs:
        """Read back from the opened engines of a bundle.

        Args:
            options: options that they were opened with, completed.
            engines: by name of the stage.
        """
        segments = [engines[stage.name].execution for stage in bundle.of_kind("prefill")]
        built_for, quantized = segments[0].target, bundle.manifest.quantization
        by_runtime = next((each.activations for each in segments if each.activations), None)
        by_graphs = quantized is not None and quantized.calibration is not None
        return cls(
            str(options.runtime),
            built_for or target_name(bundle, options),
            bundle.manifest.dialect,
            float_type(engines[bundle.only("embed").name].outputs),
            " and ".join(dict.fromkeys(each.precision for each in segments)),
            " and ".join(dict.fromkeys(each.device for each in segments)),
            None if quantized is None else quantized.scheme,
            "fp8" if by_graphs else by_runtime,
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(msgspec.to_builtins(self))

    def __str__(self) -> str:
        graphs = f"{self.dialect} graphs in {self.dtype}" if self.dialect else self.dtype
        target = f", target {self.target}" if self.target else ""
        weights = f", weights in {self.quantized}" if self.quantized else ""
        rounded = f" with activations in {self.activations}" if self.activations else ""
        return (
            f"{self.runtime} on {self.device}{target}, {graphs}{weights}, computed in "
            f"{self.precision}{rounded}"
        )


def require_served(bundle: Bundle, options: RuntimeOptions, dtype: str | None = None) -> None:
    """Refuse a target or float type that a bundle was not exported for, before it is measured.

    Raises:
        TrioError: the bundle's graphs are of another type, or are none that the target reads, or
            the target is of another runtime than the one named.
    """
    manifest, asked = bundle.manifest, options.target
    if dtype not in (None, manifest.dtype):
        raise TrioError(
            f"{bundle.path} is in {manifest.dtype}, not in {dtype}: export another bundle with "
            f"--dtype {dtype}"
        )
    if asked is None:
        return
    runtime = _runtime_of(bundle, asked)
    name = target_name(bundle, RuntimeOptions(target=asked, runtime=runtime))
    require_runtime_of(str(name), str(runtime), options.runtime)
    if asked == manifest.target or (
        isinstance(asked, str) and is_folder(bundle.path / ENGINES / asked)
    ):
        return
    target = asked if isinstance(asked, Target) else load_target(str(asked))
    readable = runtime_spec(target.runtime).readable_dialects(target)
    problem = ""
    if manifest.dialect not in readable:
        problem = f"the target {target.name} reads no {manifest.dialect} graphs"
    elif manifest.dtype != target.dtype:
        problem = f"the target {target.name} is in {target.dtype}"
    if problem:
        raise TrioError(
            f"{bundle.path} has {manifest.dialect} graphs in {manifest.dtype}, and {problem}: "
            f"export another bundle with --target {asked}"
        )


def target_name(bundle: Bundle, options: RuntimeOptions) -> str | None:
    """Name of the target whose settings a bundle runs with.

    None: the runtime alone was named, and is not the bundle's.

    Args:
        options: completed options.
    """
    target, manifest = options.target, bundle.manifest
    if isinstance(target, Target):
        return target.name
    if target is not None:
        return Path(target).stem if Path(target).suffix in (".yaml", ".yml") else str(target)
    return manifest.target if options.runtime == manifest.runtime else None


def _runtime_of(bundle: Bundle, target: str | Path | Target) -> str | None:
    """Runtime of a target, whose file may be on the machine that made the bundle."""
    if target == bundle.manifest.target:
        return bundle.manifest.runtime
    return complete_options(bundle, RuntimeOptions(target=target)).runtime
