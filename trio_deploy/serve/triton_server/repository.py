"""Write a model repository that a stock Triton Inference Server loads.

    repository/
      trio.json                                                            what it was made of
      trio_vlm/            config.pbtxt, 1/model.py, 1/bundle/             answers
    and with `stages` each graph as a model of its own, for composed pipelines:
      trio_vision/         config.pbtxt, 1/model.onnx/{model.onnx, weights/}  (or 1/model.plan)
      trio_embed/, trio_prefill_0/, trio_select_1/, …
      trio_embeddings/     config.pbtxt                                    vision, then embed

ONNX files refer to their weights by paths below their own folder, and the onnxruntime backend loads
a folder `model.onnx` with the graph inside as a model of several files (Triton's documentation,
"model repository", ONNX models). So every stage gets such a folder, with hard links to the weight
files of the bundle that its graph reads.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import trio_deploy
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import MANIFEST, StageInfo
from trio_deploy.bundle.weights import Progress, byte_bar, place_file
from trio_deploy.bundle.writer import BundleWriter
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import Target, list_targets
from trio_deploy.errors import TrioError
from trio_deploy.files import safe_path, user_path
from trio_deploy.runtimes.registry import (
    default_target,
    load_target,
    require_runtime_of,
    runtime_spec,
)
from trio_deploy.runtimes.tensorrt.record import RECORD as ENGINES_RECORD
from trio_deploy.runtimes.tensorrt.record import Record
from trio_deploy.schedule.budget import read_budget
from trio_deploy.serve.triton_server.config_files import (
    EngineTraits,
    engine_config,
    ensemble_config,
    graph_config,
    vlm_config,
)
from trio_deploy.serve.triton_server.pbtxt import format_message
from trio_deploy.serve.triton_server.settings import check_settings

DEVICES = ("cpu", "gpu")
#: File that says what the repository was made of; Triton reads folders only.
RECORD = "trio.json"

_BUNDLE = "1/bundle"
_MODEL_PY = b'''"""Loaded by Triton's python backend, whose Python needs trio-deploy installed."""

from trio_deploy.serve.triton_server.model import TritonPythonModel

__all__ = ["TritonPythonModel"]
'''
# The processes of models read their names and paths as ASCII.
_NAME = re.compile(r"(?=.*[A-Za-z0-9])[A-Za-z0-9_-]+")


class RepositoryWriter(BundleWriter):
    """Atomic writer of a model repository, like that of a bundle."""

    kind = "model repository"
    marker = RECORD


@dataclass(frozen=True)
class Options:
    """How to serve a bundle.

    Attributes:
        runtime: how the bundle is run; becomes settings of `NAME_vlm`.
        device: `cpu` or `gpu`, what instances run on.
        instances: processes of `NAME_vlm`, each of which loads the model.
        stages: write the stages and the ensemble as models, too.
        name: prefix of all models' names.
        settings: parameters of `NAME_vlm`, such as limits; see `settings.py`.
        link: hard-link the bundle's files instead of copying them.
    """

    runtime: RuntimeOptions = field(default_factory=RuntimeOptions)
    device: str = "cpu"
    instances: int = 1
    stages: bool = False
    name: str = "trio"
    settings: Mapping[str, str] = field(default_factory=dict)
    link: bool = False

    @property
    def budget(self) -> float | None:
        """Budget of requests that name none; None: the bundle's own.

        Raises:
            TrioError: the setting is no budget.
        """
        text = self.settings.get("budget")
        return read_budget(text) if text else None


def write_repository(
    bundle: Bundle, out: Path, options: Options | None = None, force: bool = False
) -> list[str]:
    """Write the repository in a temporary folder, and move it to `out` once it is complete.

    Returns:
        Names of its models.

    Raises:
        TrioError: `out` exists already, an option or setting is wrong, the bundle lacks the
            weights or engines that the runtime needs, or it cannot have the budget.
    """
    options = options or Options()
    bundle.require_weights()
    asked = options.runtime
    target = asked.target if isinstance(asked.target, Target | None) else load_target(asked.target)
    if target is not None:
        require_runtime_of(target.name, target.runtime, asked.runtime)
    runtime = asked.runtime or (target.runtime if target else bundle.manifest.runtime)
    _check_options(options, runtime)
    if options.stages and any(stage.weight_inputs for stage in bundle.manifest.stages):
        raise TrioError(
            "Triton cannot serve these stages as models of their own, since each request would "
            "have to bring their weights: leave out --stages, or export with --weights constants"
        )
    if options.stages and any(stage.looked_up for stage in bundle.manifest.stages):
        raise TrioError(
            "Triton cannot serve these stages as models of their own, since each request would "
            "have to bring its token embeddings: leave out --stages, or export with --embeddings "
            "device"
        )
    settings = check_settings(_parameters(options, runtime, target))
    if options.budget is not None:
        bundle.schedule_at(options.budget)  # its error says why there is none
    files = list(_files(bundle, runtime, target))
    writer = RepositoryWriter(out, force, sum(path.stat().st_size for _, path in files))
    with writer:
        models = _Models(writer, bundle, options, settings)
        models.add_vlm(files)
        if options.stages:
            models.add_stages(
                _plans(bundle, target) if runtime_spec(runtime).needs_engines else None
            )
        writer.write(RECORD, _record(bundle, models.names))
    return models.names


def require_servable(options: Options, out: Path, force: bool = False) -> None:
    """Check, before a model is exported to be served, what is known without its bundle.

    Raises:
        TrioError: `out` exists already, or an option or setting is wrong.
    """
    asked = options.runtime
    target = load_target(asked.target or default_target(asked.runtime))
    require_runtime_of(target.name, target.runtime, asked.runtime)
    runtime = target.runtime
    _check_options(options, runtime)
    check_settings(_parameters(options, runtime, target if asked.target else None))
    RepositoryWriter(Path(os.path.abspath(out)), force).refuse_existing()  # noqa: PTH100


def path_warning(out: Path) -> str | None:
    """Why Triton cannot serve a repository from this path; None if it can."""
    path = str(out.expanduser().absolute())
    if path.isascii():
        return None
    return (
        f"Triton's python backend does not load models from {path}, since the path has characters "
        "beyond ASCII: copy the repository elsewhere before serving it"
    )


def _check_options(options: Options, runtime: str) -> None:
    spec = runtime_spec(runtime)
    if options.device not in DEVICES:
        raise TrioError(f"unknown device {options.device!r}: choose cpu or gpu")
    if options.instances < 1:
        raise TrioError(f"instances must be 1 or more, got {options.instances}")
    if not _NAME.fullmatch(options.name):
        raise TrioError(
            f"models cannot be called {options.name!r}_vlm: use ASCII letters, digits, - and _"
        )
    if options.device not in spec.devices:
        raise TrioError(
            f"{spec.title} does not run on --device {options.device}: pass --device "
            f"{' or '.join(spec.devices)}, or another --runtime"
        )
    provider = options.runtime.provider
    if provider is not None and provider != spec.devices[options.device]:
        fitting = [device for device, known in spec.devices.items() if known == provider]
        raise TrioError(
            f"--provider {provider} does not run on --device {options.device}: pass --device "
            f"{' or '.join(fitting) or options.device}, or leave --provider out"
        )


def _parameters(options: Options, runtime: str, target: Target | None) -> dict[str, str]:
    """Parameters of NAME_vlm: its bundle and runtime, then the caller's settings."""
    parameters = {"bundle": _BUNDLE, "runtime": runtime}
    if target is not None:
        parameters["target"] = _target_parameter(options)
    provider = options.runtime.provider or runtime_spec(runtime).devices[options.device]
    given = {
        "provider": provider,
        "precision": options.runtime.precision,
        "threads": options.runtime.threads,
        "low_memory": "true" if options.runtime.low_memory else None,
    }
    parameters |= {name: str(value) for name, value in given.items() if value is not None}
    # Not by model_warmup: Triton 2.51 crashes if a decoupled model refuses that request, which
    # limits and deadlines can cause.
    parameters["warm_up"] = "true"
    clash = sorted(set(options.settings) & {"bundle", "runtime", "target"})
    if clash:
        raise TrioError(f"{clash[0]} is not a setting: use the options of this command")
    return parameters | dict(options.settings)


def _target_parameter(options: Options) -> str:
    """A shipped target's name, or the path of the user's own file in the model's folder.

    Raises:
        TrioError: Triton cannot open a file of that name.
    """
    given = options.runtime.target
    target = given.name if isinstance(given, Target) else str(given)
    if not Path(target).name.isascii():
        raise TrioError(
            f"the target's file is called {Path(target).name!r}, but Triton's python backend opens "
            "only names of ASCII characters: rename it"
        )
    return target if target in list_targets() else f"1/{Path(target).name}"


def _files(bundle: Bundle, runtime: str, target: Target | None) -> Iterable[tuple[str, Path]]:
    """(path relative to the bundle, file) of every file that serving needs."""
    for name in [MANIFEST, *bundle.manifest.files]:
        yield name, safe_path(bundle.path, name)
    if runtime_spec(runtime).needs_engines:
        folder, record = _engines(bundle, target)
        files = [folder / ENGINES_RECORD, *(record.check_file(folder, s) for s in record.stages)]
        for file in files:
            yield file.relative_to(bundle.path).as_posix(), file


def _engines(bundle: Bundle, target: Target | None) -> tuple[Path, Record]:
    folder = bundle.path / "engines" / (target.name if target else bundle.manifest.target)
    return folder, Record.load(folder)


def _plans(bundle: Bundle, target: Target | None) -> dict[str, tuple[Path, EngineTraits]]:
    """Engines of TensorRT by stage. Before version 10 it narrows int64 to int32."""
    folder, record = _engines(bundle, target)
    if record.flavour != "tensorrt":
        raise TrioError(
            f"Triton has no backend for engines of {record.library.name}: leave out --stages"
        )
    narrow = int(record.tensorrt.split(".")[0]) < 10
    return {
        stage: (
            record.check_file(folder, stage),
            EngineTraits(
                len(entry.profiles),
                frozenset(name for profile in entry.profiles for name in profile.values),
                narrow,
            ),
        )
        for stage, entry in record.stages.items()
    }


class _Models:
    """Writes models into a repository."""

    def __init__(
        self,
        writer: RepositoryWriter,
        bundle: Bundle,
        options: Options,
        settings: Mapping[str, str],
    ) -> None:
        self.names: list[str] = []
        self._writer = writer
        self._bundle = bundle
        self._options = options
        self._settings = settings

    def add_vlm(self, files: Sequence[tuple[str, Path]]) -> None:
        """Add the model that answers, which contains the bundle."""
        name = f"{self._options.name}_vlm"
        with byte_bar(sum(path.stat().st_size for _, path in files), "bundle") as bar:
            for relative, path in files:
                self._place(path, f"{name}/{_BUNDLE}/{relative}", self._options.link, bar.update)
        if self._settings.get("target", "").startswith("1/"):
            target = user_path(str(self._options.runtime.target))
            self._writer.write(f"{name}/{self._settings['target']}", target.read_bytes())
        self._writer.write(f"{name}/1/model.py", _MODEL_PY)
        self._config(
            name, vlm_config(self._settings, self._options.device, self._options.instances)
        )

    def add_stages(self, plans: Mapping[str, tuple[Path, EngineTraits]] | None) -> None:
        """Add each stage as a model, and vision + embed as an ensemble.

        Args:
            plans: TensorRT engines by stage; None: ONNX Runtime serves the graphs.
        """
        for stage in self._bundle.manifest.stages:
            if plans is None:
                self._add_graph(stage)
            else:
                self._add_plan(stage, *plans[stage.name])
        embed = self._bundle.only("embed")
        self._add_ensemble(embed, plans is not None and plans[embed.name][1].narrow)

    def _add_graph(self, stage: StageInfo) -> None:
        name = self._stage_name(stage)
        folder = f"{name}/1/model.onnx"
        graph = self._bundle.graph(stage.name)
        self._place(graph, f"{folder}/model.onnx", self._options.link)
        for weights in sorted({place.file for place in self._bundle.places(stage.name).values()}):
            placed = self._writer.path(f"{self._options.name}_vlm/{_BUNDLE}/{weights}")
            self._place(placed, f"{folder}/{weights}", link=True)
        self._config(name, graph_config(stage, self._options.device))

    def _add_plan(self, stage: StageInfo, plan: Path, traits: EngineTraits) -> None:
        name = self._stage_name(stage)
        self._place(plan, f"{name}/1/model.plan", self._options.link)
        self._config(name, engine_config(stage, traits, self._options.device))

    def _add_ensemble(self, embed: StageInfo, narrow: bool) -> None:
        """Add an ensemble from pixels and token ids to the first segment's embeddings."""
        name = f"{self._options.name}_embeddings"
        self._writer.write(f"{name}/1/.keep", b"")  # object stores drop empty folders
        steps = [(self._stage_name(s), s) for s in (self._bundle.only("vision"), embed)]
        self._config(name, ensemble_config(steps, narrow))

    def _stage_name(self, stage: StageInfo) -> str:
        return f"{self._options.name}_{stage.name}"

    def _place(
        self, source: Path, relative: str, link: bool, progress: Progress = lambda count: None
    ) -> None:
        place_file(source, self._writer.path(relative), link, progress)
        self._writer.record(relative, None)

    def _config(self, name: str, fields: Mapping[str, Any]) -> None:
        self._writer.write(
            f"{name}/config.pbtxt", format_message({"name": name, **fields}).encode()
        )
        self.names.append(name)


def _record(bundle: Bundle, names: Sequence[str]) -> bytes:
    record = {
        "trio_deploy": trio_deploy.__version__,
        "bundle": bundle.manifest.model.name,
        "models": list(names),
    }
    return (json.dumps(record, indent=1) + "\n").encode()
