"""Parameters of a `trio_vlm` model, from the strings of its config.pbtxt."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.runtimes.registry import check_options
from trio_deploy.serve.limits import ServiceLimits, parse_settings, setting_kinds


@dataclass(frozen=True)
class Settings:
    """How a model of Triton's serves a bundle.

    Attributes:
        bundle: its folder, absolute or relative to the model's.
        warm_up: answer questions, within the limits, before the model is ready.
        watch: end the server when the model's process dies; see `watch.py`.
        options: how to run the bundle; a target's file may be relative to the model's folder, too.
        limits: what is accepted.
    """

    bundle: str
    warm_up: bool = True
    watch: bool = True
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    limits: ServiceLimits = field(default_factory=ServiceLimits)

    @classmethod
    def parse(cls, parameters: Mapping[str, str]) -> Settings:
        """Read parameters: those of this class, of its options and of its limits, all in one.

        Raises:
            TrioError: an unknown name, a value that is not of its kind or out of range.
        """
        options = setting_kinds(RuntimeOptions)
        kinds = options | setting_kinds(cls, ServiceLimits, BatcherLimits)
        values = parse_settings(parameters, kinds)
        if "bundle" not in values:
            raise TrioError("the parameter 'bundle' must name the folder of the bundle")
        runtime = RuntimeOptions(**{name: values[name] for name in options if name in values})
        check_options(runtime)
        return cls(
            **{name: values[name] for name in setting_kinds(cls) if name in values},
            options=runtime,
            limits=ServiceLimits.from_settings(values),
        )


def check_settings(parameters: Mapping[str, str]) -> dict[str, str]:
    """The same parameters, once they are known to be right.

    Raises:
        TrioError: as `Settings.parse`.
    """
    Settings.parse(parameters)
    return dict(parameters)
