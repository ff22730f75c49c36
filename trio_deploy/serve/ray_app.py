"""The application of `trio serve` under Ray Serve, for several machines.

Ray's own command starts it, with options and limits as NAME=VALUE:

    serve run trio_deploy.serve.ray_app:app bundle=/models/tiny replicas=2 no_auth=true
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.serve.limits import parse_settings, setting_kinds
from trio_deploy.serve.openai.app import Served, build_app
from trio_deploy.serve.openai.gate import Doors, digest_of
from trio_deploy.serve.openai.keys import API_KEY, with_environment
from trio_deploy.serve.openai.settings import Settings
from trio_deploy.serve.service import Service, switch_threads_often

_RETRY_AFTER_S = 2.0  # told to clients that Ray itself refuses


@dataclass(frozen=True)
class RayOptions:
    """What a replica serves, and how many there are.

    Attributes:
        bundle: folder of the bundle, at the same path on every machine.
        name: what clients call the model; None: as the folder.
        replicas: at first, and at least.
        max_replicas: at most, by the requests that each has; None: as many as `replicas`.
        gpus, cpus: what Ray reserves per replica, so that no two share a GPU.
        runtime, target, provider, precision, threads: as in `RuntimeOptions`.
        no_auth: ask for no key, though other machines may reach Ray's proxies.
        allowed_host: the name by which clients reach Ray's proxies, without keys; IP addresses and
            names of this machine are known anyway.
        drain_s: seconds for running answers to finish when a replica ends.
    """

    bundle: str
    name: str | None = None
    replicas: int = 1
    max_replicas: int | None = None
    gpus: float | None = None
    cpus: float | None = None
    runtime: str | None = None
    target: str | None = None
    provider: str | None = None
    precision: str | None = None
    threads: int | None = None
    no_auth: bool = False
    allowed_host: str | None = None
    drain_s: float = 30.0


@dataclass(frozen=True)
class Asked:
    """All that a replica is made of.

    Attributes:
        keys: digests of keys that clients need.
    """

    options: RayOptions
    settings: Settings
    keys: list[bytes]

    @classmethod
    def parse(cls, texts: Mapping[str, str]) -> Asked:
        """Read options and limits by name.

        Raises:
            TrioError: an unknown name, a wrong value, no bundle, or neither keys nor `no_auth`.
        """
        kinds = setting_kinds(RayOptions)
        own = parse_settings({name: text for name, text in texts.items() if name in kinds}, kinds)
        if not Path(own.get("bundle", "")).joinpath("manifest.json").is_file():
            raise TrioError(f"bundle={own.get('bundle', '')} is no folder of a bundle: name one")
        settings = Settings.parse({k: v for k, v in texts.items() if k not in kinds})
        options = RayOptions(**own)
        if (options.max_replicas or options.replicas) < options.replicas:
            raise TrioError("max_replicas must be at least replicas")
        keys = with_environment()
        if bool(keys) == options.no_auth:
            raise TrioError(
                f"set {API_KEY} to the key that clients need, or say no_auth=true: one of the two"
            )
        return cls(options, settings, [digest_of(key) for key in keys])

    def open(self) -> Served:
        """Open the bundle and answer the warm-up.

        Raises:
            TrioError: as `Pipeline.open` and `Service`.
        """
        options = self.options
        chosen = {each.name: getattr(options, each.name, None) for each in fields(RuntimeOptions)}
        pipeline = Pipeline.open(
            options.bundle, **{name: value for name, value in chosen.items() if value is not None}
        )
        # With keys any name will do: a page of another site does not know them.
        hosts = None if self.keys else {(options.allowed_host or "localhost").lower()}
        return Served(
            pipeline,
            Service(pipeline, self.settings.service),
            name=options.name or Path(options.bundle).resolve().name,
            limits=self.settings.http,
            doors=Doors(self.keys, hosts, any_address=True),
        )


class Replica:
    """One process of Ray Serve, with the whole application in it."""

    def __init__(self, asked: Asked) -> None:
        switch_threads_often()
        self._served = asked.open()

    def __serve_build_asgi_app__(self) -> Any:
        return build_app(self._served)

    def check_health(self) -> None:
        """Ray starts the replica again if this raises."""
        if not self._served.service.alive:
            raise RuntimeError("the threads that answer have ended")

    def __del__(self) -> None:
        if hasattr(self, "_served"):
            self._served.service.close(timeout=0.0)


def app(args: Mapping[str, str]) -> Any:
    """What `serve run trio_deploy.serve.ray_app:app NAME=VALUE…` runs.

    Raises:
        TrioError: as `Asked.parse`.
    """
    from ray import serve
    from ray.serve.config import BackpressureConfig

    asked = Asked.parse({name: str(value) for name, value in args.items()})
    options, limits = asked.options, asked.settings.service.batcher
    reserved = {"num_gpus": options.gpus, "num_cpus": options.cpus}
    scaling: dict[str, Any] = {"num_replicas": options.replicas}
    if options.max_replicas is not None:
        scaling = {
            "autoscaling_config": {
                "min_replicas": options.replicas,
                "max_replicas": options.max_replicas,
                "target_ongoing_requests": limits.max_rows,
            }
        }
    deployment = serve.deployment(
        name="trio",
        max_ongoing_requests=limits.max_rows + limits.max_queue,
        max_queued_requests=limits.max_queue,
        backpressure_config=BackpressureConfig(status_code=429, retry_after_s=_RETRY_AFTER_S),
        graceful_shutdown_timeout_s=options.drain_s,
        ray_actor_options={name: value for name, value in reserved.items() if value is not None},
        **scaling,
    )
    return deployment(serve.ingress()(Replica)).bind(asked)
