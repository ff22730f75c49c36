"""TensorRT-RTX: run engines that were compiled ahead of time, on GeForce RTX and other RTX cards.

`trio build` compiles them on any machine; what depends on the GPU and its driver is compiled on the
device, by each engine's first run there. Its kernels are then kept beside the engines, in
`runtime-cache/<GPU and driver>/`, which may be deleted. All else is as with TensorRT.
"""

from __future__ import annotations

import re
import warnings
import weakref
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from tqdm import tqdm

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.errors import TrioError
from trio_deploy.files import write_atomically
from trio_deploy.runtimes.base import RuntimeSpec
from trio_deploy.runtimes.tensorrt.bindings import JustInTime
from trio_deploy.runtimes.tensorrt.device import require_driver
from trio_deploy.runtimes.tensorrt.first_run import run_at_corners
from trio_deploy.runtimes.tensorrt.record import Gpu
from trio_deploy.runtimes.tensorrt.runtime import REFUSALS, TrtEngine, TrtRuntime, open_with
from trio_deploy.runtimes.tensorrt.target import (
    DIALECTS,
    RTX_KEYS,
    check_rtx_target,
    target_schemes,
)

#: Folder beside the engines.
RUNTIME_CACHE = "runtime-cache"


class RtxRuntime(TrtRuntime):
    """The engines of one target, with the kernels that this GPU has compiled of them.

    Attributes:
        kernels: folder of the kernels of this GPU and driver.
    """

    flavour = "rtx"

    def __init__(self, folder: Path, bundle: Bundle | None = None, **options: Any) -> None:
        """Open the GPU and check that the engines were compiled for it; see `TrtRuntime`."""
        require_driver()  # without one, no package that is missing is worth installing
        super().__init__(folder, bundle, **options)
        self.kernels = folder / RUNTIME_CACHE / _slug(self.gpu)
        self._kept: dict[Path, _Kept] = {}
        self._bar: Any = None
        # Kernels of other shapes are compiled as requests bring them.
        weakref.finalize(self, _keep_all, self._kept)

    def open(
        self,
        path: Path,
        weights: Mapping[str, TensorPlace] | None = None,
        **options: bool,
    ) -> TrtEngine:
        """Load the engine of a graph, and run it once if this GPU has no kernels of it.

        Raises:
            TrioError: as `TrtRuntime.open`, or the first run failed.
        """
        engine = super().open(path, weights, **options)
        if engine.info is not None and not self._file(engine.stage).is_file():
            self._run_first(engine)
        return engine

    def finish(self, engine: TrtEngine) -> JustInTime:
        """How an engine's kernels are finished: from those of an earlier process, if there are."""
        file = self._file(engine.stage)
        try:
            known = file.read_bytes()
        except OSError:
            known = b""
        # A decode step has one shape and is recorded; prompts have many, and need not wait.
        eager = engine.info is not None and engine.info.kind == "decode"
        made = self.tensorrt.just_in_time(engine.trt, known, eager=eager)
        self._kept[file] = _Kept(made, known)
        return made

    def _run_first(self, engine: TrtEngine) -> None:
        assert engine.info is not None
        stage = engine.stage
        if self._bar is None:
            missing = sum(not self._file(name).is_file() for name in self.record.stages)
            self._bar = tqdm(total=missing, unit="engine", desc="first runs", disable=None)
        self._bar.set_postfix_str(stage)
        try:
            run_at_corners(engine, engine.info)
        except TrioError as error:
            raise TrioError(
                f"the engine of {stage} does not run on {self.gpu.name}: {error}"
            ) from error
        engine.forget_contexts()  # they hold scratch memory that others cannot use
        _keep(self._file(stage), self._kept)
        self._bar.update()
        if self._bar.n >= self._bar.total:
            self._bar.close()

    def _file(self, stage: str) -> Path:
        """File of an engine's kernels; another engine of the stage has another."""
        return self.kernels / f"{stage}-{self.record.stages[stage].sha256[:16]}.cache"


class _Kept:
    """The kernels of an engine, and those of them that are on disk."""

    def __init__(self, made: JustInTime, stored: bytes) -> None:
        self.made, self.stored = made, stored


def _keep(file: Path, kept: Mapping[Path, _Kept]) -> None:
    """Write an engine's kernels, if there are more than on disk; warn if that fails."""
    entry = kept[file]
    found = entry.made.kernels()
    if found == entry.stored:
        return
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, found)
    except (OSError, TrioError) as error:
        warnings.warn(
            f"compiled kernels are not kept, so the next start compiles them again: {error}",
            stacklevel=2,
        )
        return
    entry.stored = found
    for other in file.parent.glob(f"{file.name.rpartition('-')[0]}-*.cache"):
        if other != file:
            other.unlink(missing_ok=True)  # of an engine that was rebuilt


def _keep_all(kept: Mapping[Path, _Kept]) -> None:
    for file in kept:
        if file.is_file():  # else its first run failed, and is to be repeated
            _keep(file, kept)


def _slug(gpu: Gpu) -> str:
    """Name of a folder for a GPU and its driver."""
    text = f"{gpu.name} {gpu.driver_version or f'CUDA {gpu.driver}'}"
    return re.sub(r"[^A-Za-z0-9.]+", "-", text).strip("-")


RUNTIME = RuntimeSpec(
    name="tensorrt-rtx",
    title="TensorRT-RTX",
    dialects=DIALECTS,
    dtypes=("float32", "float16", "bfloat16"),
    options={},
    refusals=REFUSALS,
    open=partial(open_with, RtxRuntime),
    default_target="rtx",
    target_keys=RTX_KEYS,
    target_schemes=target_schemes,
    devices={"gpu": None},
    needs_engines=True,
    check_target=check_rtx_target,
)
