"""How a bundle ran, for results that are kept: read back from its engines, not from the request."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import Target
from trio_deploy.runtimes.base import Engine, float_type


class RanAs(msgspec.Struct, frozen=True):
    """What produced a result.

    Attributes:
        runtime: name of the runtime; of a baseline, that of its software.
        target: name of the target whose settings were used; None: of no target.
        dialect: dialect of the graphs; None of a baseline, which has none.
        dtype: float type of weights, embeddings and hidden states.
        precision: float type that the layers' products are computed in.
        device: processor, provider or GPU, by the runtime's name for it.
    """

    runtime: str
    target: str | None
    dialect: str | None
    dtype: str
    precision: str
    device: str

    @classmethod
    def of(cls, bundle: Bundle, options: RuntimeOptions, engines: Mapping[str, Engine]) -> RanAs:
        """Read back from the opened engines of a bundle.

        Args:
            options: options that they were opened with, completed.
            engines: by name of the stage.
        """
        segments = [engines[stage.name].execution for stage in bundle.of_kind("prefill")]
        manifest = bundle.manifest
        built_for = segments[0].target
        return cls(
            str(options.runtime),
            built_for or _target(options, manifest.target, manifest.runtime),
            manifest.dialect,
            float_type(engines[bundle.only("embed").name].outputs),
            " and ".join(dict.fromkeys(each.precision for each in segments)),
            " and ".join(dict.fromkeys(each.device for each in segments)),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values."""
        return dict(msgspec.to_builtins(self))

    def __str__(self) -> str:
        graphs = f"{self.dialect} graphs in {self.dtype}" if self.dialect else self.dtype
        target = f", target {self.target}" if self.target else ""
        return f"{self.runtime} on {self.device}{target}, {graphs}, computed in {self.precision}"


def _target(options: RuntimeOptions, exported: str, runtime: str) -> str | None:
    """Name of the target whose settings the options have; `exported`: the bundle's."""
    target = options.target
    if isinstance(target, Target):
        return target.name
    if target is not None:
        return Path(target).stem if Path(target).suffix in (".yaml", ".yml") else str(target)
    return exported if options.runtime == runtime else None
