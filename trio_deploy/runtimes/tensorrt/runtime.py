"""TensorRT: run the engines that `trio build` made, on buffers that stay in the GPU's memory.

All work is on one stream, so each engine reads what the previous one wrote; the host waits only for
logits. Engines share one scratch buffer. The engines of a decode step are recorded as one CUDA
graph at the second run: at the first run TensorRT still does work that it defers after a new shape.
"""

from __future__ import annotations

import mmap
import warnings
import weakref
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import ENGINES, StageInfo, TensorPlace
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import Target
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.base import Array, Execution, RuntimeSpec, Step, TensorSpec, check_feeds
from trio_deploy.runtimes.mapped_weights import WeightMap
from trio_deploy.runtimes.tensorrt.bindings import (
    IoTensor,
    JustInTime,
    OutOfDeviceMemory,
    TensorRT,
    load,
)
from trio_deploy.runtimes.tensorrt.device import Device, DeviceArray, Event, Graph, format_mib
from trio_deploy.runtimes.tensorrt.gpu import this_gpu
from trio_deploy.runtimes.tensorrt.profiles import Profile, buffer_bytes
from trio_deploy.runtimes.tensorrt.record import Record, runtime_of
from trio_deploy.runtimes.tensorrt.target import (
    DIALECTS,
    TARGET_KEYS,
    check_target,
    target_dialects,
    target_schemes,
)

# Letter of a dynamic axis → its meaning, and the limits of a target (engines/*.yaml) that bound it.
_LIMITS = {
    "B": ("rows", "max_batch"),
    "T": ("image tiles", "max_images"),
    "R": ("rows of image features", "max_images or max_batch"),
    "S": ("tokens per row", "max_text_tokens or max_visual_tokens"),
    "C": (
        "tokens per row in the KV cache",
        "max_new_tokens, max_text_tokens, max_budget or max_visual_tokens",
    ),
    "W": ("tokens per row after pruning", "max_budget or max_text_tokens"),
}
# Engines whose checksums this process has verified: file, modification time, checksum.
_VERIFIED: set[tuple[Path, int, str]] = set()

T = TypeVar("T")


def engine_folder(bundle: Bundle, target: str | None = None) -> Path:
    """Folder of a bundle's engines.

    Args:
        target: name of the target; None: the bundle's, else the only one built.

    Raises:
        TrioError: none were built, or several were and `target` names none of them.
    """
    folder = bundle.path / ENGINES
    built = sorted(file.parent.name for file in folder.glob("*/record.json"))
    if target is None and bundle.manifest.target in built:
        target = bundle.manifest.target
    if target is None and len(built) == 1:
        target = built[0]
    if target in built:
        return folder / str(target)
    if not built:
        wanted = f" --target {target}" if target else ""
        raise TrioError(
            f"{bundle.path} has no TensorRT engines: make them on this machine with `trio build "
            f"{bundle.path}{wanted}`, or run its graphs with --runtime onnxruntime"
        )
    raise TrioError(
        f"{bundle.path} has engines for {', '.join(built)}"
        + (f", not for {target}" if target else "")
        + ": choose one with --target"
    )


class TrtRuntime:
    """The engines of one target.

    Attributes:
        flavour: library whose engines it runs (`bindings.MODULES`).
        record: record of the engines, and of the GPU and TensorRT they were built with.
        device: the GPU.
        gpu: its identity.
        max_rows: maximum rows per batch.
        recordings: number of CUDA graphs recorded so far.
    """

    concurrent = False  # one stream, one scratch buffer
    flavour = "tensorrt"

    def __init__(
        self,
        folder: Path,
        bundle: Bundle | None = None,
        *,
        tensorrt: TensorRT | None = None,
        cuda_graphs: bool = True,
    ) -> None:
        """Open the GPU and check that the engines were built for it.

        Args:
            folder: folder of the engines and their record.json.
            bundle: bundle of the engines, whose graphs must be the ones they were built from.
            tensorrt: TensorRT to use; None: the installed one.
            cuda_graphs: record decode steps as CUDA graphs.

        Raises:
            TrioError: no driver or TensorRT, or engines of another GPU, TensorRT or bundle.
        """
        self.tensorrt = tensorrt or load(self.flavour)
        self.device = Device()
        self.gpu = this_gpu(self.device)
        self.record = Record.load(folder)
        if self.record.flavour != self.flavour:
            raise TrioError(
                f"the engines in {folder} are of {self.record.library.name}, which "
                f"{self.tensorrt.name} does not load: run with --runtime {runtime_of(folder)}"
            )
        self.record.require_same(self.gpu, self.tensorrt.version)
        self.max_rows: int | None = self.record.limits.max_batch
        self.cuda_graphs = cuda_graphs
        self.recordings = 0
        self._folder, self._bundle = folder, bundle
        self._scratch: Any = None
        self._scratch_size, self._scratch_needed = 0, 1
        self._cache_limit = self.device.cache_limit
        self._files = WeightMap()
        self._weights: dict[tuple[Path, str, int], DeviceArray] = {}
        if bundle is not None:
            self._cache_limit = self.device.cache_limit = buffer_bytes(
                bundle.config,
                bundle.schedule,
                self.record.limits,
                bundle.budgets,
                buffers=1 if self.record.dialect == "onnx" else 2,
                item=4 if self.record.dtype == "float32" else 2,
            )

    def shares_cache(self, dialect: str) -> bool:
        """`Runtime.shares_cache`: KVCacheUpdate works in place, `primitive` graphs do not."""
        if dialect != self.record.dialect:
            raise TrioError(
                f"the engines were built from {self.record.dialect} graphs, but this bundle has "
                f"{dialect} graphs: run `trio build` again"
            )
        return dialect == "onnx"

    def open(
        self,
        path: Path,
        weights: Mapping[str, TensorPlace] | None = None,
        *,
        keep_precision: bool = False,
        shares_weights: bool = False,
    ) -> TrtEngine:
        """Load the engine of a graph; its precision was fixed when it was built.

        Raises:
            TrioError: it is missing, damaged, does not load, or was built from another graph.
        """
        info = None
        if self._bundle is not None:
            stages = self._bundle.manifest.stages
            info = next((each for each in stages if each.file == path.name), None)
        stage = path.stem if info is None else info.name
        file = self.record.check_file(self._folder, stage)
        entry = self.record.stages[stage]
        if self._bundle is not None:
            known = self._bundle.manifest.files[path.name].sha256
            if known not in (None, entry.graph_sha256):
                raise TrioError(
                    f"{file} was built from another {path.name} than the bundle's: run "
                    "`trio build` again"
                )
        self._require_undamaged(file, stage)
        with file.open("rb") as source:
            plan = mmap.mmap(source.fileno(), 0, access=mmap.ACCESS_READ)
        needs = f"the engine of {stage} needs at least {format_mib(entry.bytes)}"
        try:
            engine = self.with_room(
                lambda: self.tensorrt.deserialize(memoryview(plan), str(file)), needs
            )
        except OutOfDeviceMemory:
            raise
        except TrioError as error:
            raise TrioError(f"{error}; run `trio build --force` on this machine") from error
        bound = {
            tensor.name: self._weight(path.parent, (weights or {})[tensor.name])
            for tensor in self.tensorrt.tensors(engine)
            if tensor.is_input and tensor.name in (weights or {})
        }
        made = TrtEngine(self, stage, engine, entry.profiles, info, bound)
        made.just_in_time = self.finish(made)
        return made

    def finish(self, engine: TrtEngine) -> JustInTime | None:
        """How an engine's kernels are finished on the device; None: they are."""
        return None

    def _weight(self, folder: Path, place: TensorPlace) -> DeviceArray:
        """A weight in the GPU's memory, one copy for all engines that take it as an input."""
        key = (folder.resolve(), place.file, place.offset)
        if key not in self._weights:
            view = self._files.view(folder, place)
            # It is never freed, so it must not count against the memory of requests.
            self._cache_limit += place.nbytes
            self.device.cache_limit += place.nbytes
            there = self.device.empty(view.shape, view.dtype, f"the weights in {place.file}")
            self._weights[key] = self.device.upload(view, there)
        return self._weights[key]

    def _require_undamaged(self, file: Path, stage: str) -> None:
        """Verify an engine's checksum first, since a damaged engine may crash TensorRT."""
        key = (file.resolve(), file.stat().st_mtime_ns, self.record.stages[stage].sha256)
        if key not in _VERIFIED:
            self.record.check_file(self._folder, stage, verify=True)
            _VERIFIED.add(key)

    def with_room(self, action: Callable[[], T], needs: str) -> T:
        """Run an action that allocates GPU memory; if it fails, free cached memory and retry.

        Args:
            needs: what is needed for what, for a message.

        Raises:
            OutOfDeviceMemory: there is no room; the message says how much was free.
        """
        try:
            return action()
        except OutOfDeviceMemory:
            self.device.release()
        try:
            return action()
        except OutOfDeviceMemory as error:
            raise self.no_room(needs, error) from error

    def no_room(self, needs: str, error: TrioError) -> OutOfDeviceMemory:
        """Error to raise when TensorRT ran out of memory, with what was free and what to do."""
        free, total = self.device.memory()
        target = self.record.target
        return OutOfDeviceMemory(
            f"the GPU is out of memory: {needs}, and {format_mib(free)} of {format_mib(total)} are "
            f"free; end other programs on this GPU, or lower the limits of {target} and run "
            f"`trio build` again (`trio plan --target {target}` says what fits): {error}"
        )

    def sequence(self, steps: Sequence[Step]) -> Step:
        """`Runtime.sequence`, recorded as one CUDA graph."""
        return _Sequence(self, [step for step in steps if isinstance(step, _Step)])

    def moment(self) -> Event:
        """`Runtime.moment`: an event on the stream."""
        return self.device.event()

    def need_scratch(self, nbytes: int) -> None:
        """Make `scratch` at least this large."""
        self._scratch_needed = max(self._scratch_needed, nbytes)

    def scratch(self) -> tuple[Any, int]:
        """Scratch memory that all execution contexts share, and its size in bytes."""
        if self._scratch_size < self._scratch_needed:
            size = self._scratch_needed
            self._scratch = self.device.block(size, "the engines' intermediate results")
            self._scratch_size = size
            self.device.cache_limit = self._cache_limit + size  # it is never cached
        return self._scratch, self._scratch_size


class _Context:
    """An execution context with a profile and scratch memory.

    Attributes:
        host_inputs: inputs that it reads from the host's memory, kept alive while it runs.
    """

    def __init__(self, engine: TrtEngine, profile: int) -> None:
        tensorrt, device = engine.runtime.tensorrt, engine.runtime.device
        self.profile = profile
        self._scratch, size = engine.runtime.scratch()
        self.trt = engine.runtime.with_room(
            lambda: tensorrt.context(engine.trt, engine.just_in_time), engine.needs
        )
        tensorrt.lend(self.trt, self._scratch.address, size)
        self.host_inputs: list[np.ndarray] = []
        if profile != self.trt.active_optimization_profile:
            tensorrt.forget_errors()
            try:
                self.trt.set_optimization_profile_async(profile, int(device.stream))
            except RuntimeError as error:  # of the bindings
                raise TrioError(f"{engine.stage}: {tensorrt.last_errors()}") from error
            device.synchronize()


class TrtEngine:
    """One engine. Its integers are int64 for callers, even where TensorRT narrows them.

    Attributes:
        info: the stage; None for a graph on its own.
        just_in_time: how its kernels are finished on the device; None: they are.
    """

    just_in_time: JustInTime | None = None

    def __init__(
        self,
        runtime: TrtRuntime,
        stage: str,
        engine: Any,
        profiles: Sequence[Profile],
        info: StageInfo | None,
        bound: Mapping[str, DeviceArray],
    ) -> None:
        """Use `TrtRuntime.open`.

        Args:
            info: names the dynamic axes of inputs.
            bound: weights that are inputs of the engine, by name.
        """
        self.runtime, self.stage, self.trt, self.bound = runtime, stage, engine, bound
        self.info = info
        self.profiles = tuple(profiles)
        tensors = () if info is None else (*info.inputs, *info.outputs)
        self._axes = {tensor.name: tensor.shape for tensor in tensors}
        self._caches = {tensor.name for tensor in tensors if tensor.role == "cache"}
        self._pruned = info is not None and (info.index or 0) > (info.kind == "select")
        if engine.num_optimization_profiles != len(self.profiles):
            raise TrioError(
                f"the engine of {stage} has {engine.num_optimization_profiles} profiles where its "
                f"record says {len(self.profiles)}: run `trio build` again"
            )
        self._tensors = {tensor.name: tensor for tensor in runtime.tensorrt.tensors(engine)}
        self.inputs = {
            t.name: replace(_spec(t), most=_most(t.name, self.profiles))
            for t in self._tensors.values()
            if t.is_input and t.name not in bound
        }
        self.outputs = {t.name: _spec(t) for t in self._tensors.values() if not t.is_input}
        self._idle: dict[int, list[_Context]] = {}
        scratch = runtime.tensorrt.scratch_bytes(engine)
        runtime.need_scratch(scratch)
        weights = runtime.record.stages[stage].bytes
        self.needs = (
            f"to run {stage} takes {format_mib(scratch)} of scratch memory, and some for its "
            f"state, in addition to the {format_mib(weights)} of its engine"
        )

    @property
    def execution(self) -> Execution:
        """`Engine.execution`; engines are strongly typed, so they compute in the graphs' type."""
        record = self.runtime.record
        return Execution(self.runtime.gpu.name, record.dtype, record.target)

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        host: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """`Engine.run`; an output that aliases an input overwrites the array that was fed."""
        into = into or {}
        context = self._context(self._profile(feeds))
        try:
            inputs = {name: self.input(name, feeds[name]) for name in self.inputs}
            inputs |= self.bound
            self.set_inputs(context, inputs)
            given = {name: a for name, a in into.items() if not isinstance(a, np.ndarray)}
            outputs = self.set_outputs(context, inputs, given)
            self.execute(context)
        finally:
            self._idle.setdefault(context.profile, []).append(context)
        for name, array in into.items():
            if isinstance(array, np.ndarray):
                array[...] = self._download(name, outputs[name])
        return {
            name: self._download(name, array) if host is None or name in host else array
            for name, array in outputs.items()
            if name not in into
        }

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Step:
        """`Engine.bind`, with a context of its own until the step is deleted."""
        context = self._context(self._profile(feeds))
        step = _Step(self, context, feeds, into)
        # The context keeps this shape until the step and its recording are deleted.
        idle = self._idle.setdefault(context.profile, [])
        weakref.finalize(step, idle.append, context).atexit = False
        return step

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> DeviceArray:
        """`Engine.empty`, in the GPU's memory."""
        return self.runtime.device.empty(shape, dtype, f"buffers of {self.stage} (KV cache)")

    def empties(self, shapes: Sequence[tuple[int, ...]], dtype: np.dtype) -> list[DeviceArray]:
        """`Engine.empties`, in one block of the GPU's memory."""
        return self.runtime.device.empties(shapes, dtype, f"buffers of {self.stage} (KV cache)")

    def forget_contexts(self) -> None:
        """Free contexts that no step is bound to, with the scratch memory that they hold."""
        self._idle.clear()

    def stored(self, name: str) -> np.dtype:
        """Element type of a tensor in memory."""
        return self._tensors[name].dtype

    def on_host(self, name: str) -> bool:
        """Whether an input is read from the host's memory, since shapes depend on its values."""
        return self._tensors[name].on_host

    def execute(self, context: _Context) -> None:
        """Put one run of a context on the stream, after `set_inputs` and `set_outputs`."""
        self.runtime.tensorrt.forget_errors()
        if context.trt.execute_async_v3(int(self.runtime.device.stream)):
            return
        error = self.runtime.tensorrt.failed(f"{self.stage} failed")
        if isinstance(error, OutOfDeviceMemory):
            raise self.runtime.no_room(self.needs, error)
        raise error

    def _profile(self, feeds: Mapping[str, Array]) -> int:
        """Number of the first profile of which a use covers the feeds."""
        check_feeds(self, feeds)
        problems = []
        for number, profile in enumerate(self.profiles):
            for use in profile.parts:
                problem = self._exceeds(use, feeds)
                if not problem:
                    return number
                problems.append(problem)
        raise TrioError(min(problems)[1])

    def _exceeds(self, profile: Profile, feeds: Mapping[str, Array]) -> tuple[int, str] | None:
        """How far the feeds are outside a profile, and a message; None if it covers them."""
        for name, bounds in profile.shapes.items():
            shape = tuple(feeds[name].shape)
            named = self._axes.get(name, (None,) * len(shape))
            if len(shape) != len(bounds.max):
                return (1, f"input {name} of {self.stage} has the wrong number of axes: {shape}")
            for axis, (least, size, largest) in enumerate(
                zip(bounds.min, shape, bounds.max, strict=True)
            ):
                if not least <= size <= largest:
                    letter = str(named[axis])[:1]
                    return self._refusal(f"{name} {shape}", letter, size, least, largest)
        for name, bounds in profile.values.items():
            for least, size, largest in zip(
                bounds.min, np.ravel(feeds[name]).tolist(), bounds.max, strict=True
            ):
                if not least <= size <= largest:
                    return self._refusal(name, "W", size, least, largest)
        return None

    def _refusal(
        self, what: str, axis: str, size: int, least: int, largest: int
    ) -> tuple[int, str]:
        meaning, limits = _LIMITS.get(axis, (f"entries of {what}", "a limit"))
        if axis == "S" and self._pruned:
            limits = _LIMITS["W"][1]
        target = self.runtime.record.target
        text = (
            f"the request needs {size} {meaning} in {self.stage}, whose engine for {target} takes "
            f"{least} to {largest}: "
        )
        if size > largest:
            text += f"raise {limits} in a copy of the target's file and run `trio build` again with"
            text += " it as --target, or ask for less"
        else:
            text += "the engine was not built for fewer"
        return (abs(size - (largest if size > largest else least)), text)

    def _context(self, profile: int) -> _Context:
        idle = self._idle.get(profile)
        return idle.pop() if idle else _Context(self, profile)

    def input(self, name: str, value: Array) -> Array:
        """An input in its stored type, on the device, or on the host if TensorRT reads it there."""
        dtype = self.stored(name)
        if isinstance(value, np.ndarray):
            narrow = np.ascontiguousarray(value, dtype)
            return narrow if self.on_host(name) else self.runtime.device.upload(narrow)
        if self.on_host(name):
            return self.runtime.device.download(value)
        if value.dtype != dtype or not value.contiguous:
            raise TrioError(
                f"input {name} of {self.stage} must be contiguous {dtype}, got {value.dtype}"
            )
        return value

    def set_inputs(self, context: _Context, inputs: Mapping[str, Array]) -> None:
        """Set addresses and shapes of a context's inputs."""
        self.runtime.tensorrt.forget_errors()
        for name, array in inputs.items():
            accepted = context.trt.set_input_shape(name, tuple(array.shape))
            if not accepted or not context.trt.set_tensor_address(name, _address(array)):
                raise TrioError(f"{self.stage} refuses {name}: {self._errors()}")
        context.host_inputs = [array for array in inputs.values() if isinstance(array, np.ndarray)]
        try:
            missing = context.trt.infer_shapes()
        except RuntimeError as error:  # of the bindings
            raise TrioError(f"{self.stage} refuses these shapes: {self._errors()}") from error
        if missing:
            raise TrioError(f"{self.stage}: TensorRT lacks the shapes of {', '.join(missing)}")

    def set_outputs(
        self, context: _Context, inputs: Mapping[str, Array], given: Mapping[str, DeviceArray]
    ) -> dict[str, DeviceArray]:
        """Set where a context writes its outputs; allocate those that are not given."""
        shapes = {name: tuple(context.trt.get_tensor_shape(name)) for name in self.outputs}
        for name, shape in shapes.items():
            if any(size < 0 for size in shape):
                raise TrioError(f"the shape of {name} of {self.stage} depends on data: {shape}")
        outputs: dict[str, DeviceArray] = {}
        made = self._presents({n: s for n, s in shapes.items() if n not in given})
        for name, shape in shapes.items():
            tensor = self._tensors[name]
            if name in given:
                array = given[name]
            elif tensor.alias:
                array = inputs[tensor.alias]
            elif name in made:
                array = made[name]
            else:
                use = f"{name} of {self.stage}"
                array = self.runtime.device.empty(shape, tensor.dtype, use)
            if tuple(array.shape) != shape or array.dtype != tensor.dtype:
                raise TrioError(
                    f"{name} of {self.stage} is {tensor.dtype} {shape}, not {array.dtype} "
                    f"{array.shape}"
                )
            if tensor.alias and _address(inputs[tensor.alias]) != array.address:
                raise TrioError(f"{name} of {self.stage} must be the memory of {tensor.alias}")
            if not context.trt.set_tensor_address(name, array.address):
                raise TrioError(f"{self.stage} refuses memory for {name}: {self._errors()}")
            outputs[name] = array
        return outputs

    def _presents(self, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, DeviceArray]:
        """Memory for a segment's new keys and values, in one block."""
        names = [n for n in shapes if n in self._caches and not self._tensors[n].alias]
        if not names:
            return {}
        use = f"keys and values of {self.stage}"
        dtype = self._tensors[names[0]].dtype
        made = self.runtime.device.empties([shapes[name] for name in names], dtype, use)
        return dict(zip(names, made, strict=True))

    def _errors(self) -> str:
        return self.runtime.tensorrt.last_errors()

    def _download(self, name: str, array: DeviceArray) -> np.ndarray:
        found = self.runtime.device.download(array)
        return found.astype(self.outputs[name].dtype, copy=False)


class _Step:
    """A bound run, which copies the host's inputs and outputs through pinned memory."""

    def __init__(
        self,
        engine: TrtEngine,
        context: _Context,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array],
    ) -> None:
        device = engine.runtime.device
        self._engine, self._context, self._device = engine, context, device
        self._sent: list[tuple[np.ndarray, np.ndarray, DeviceArray | None]] = []
        self._fetched: list[tuple[DeviceArray, np.ndarray, np.ndarray]] = []
        self._inputs: dict[str, Array] = dict(engine.bound)
        self._outputs: dict[str, DeviceArray] = {}
        for name in engine.inputs:
            value = feeds[name]
            if not isinstance(value, np.ndarray):
                self._inputs[name] = engine.input(name, value)
                continue
            pinned = device.pinned(value.shape, engine.stored(name))
            there = None if engine.on_host(name) else device.empty(value.shape, pinned.dtype)
            self._sent.append((value, pinned, there))
            self._inputs[name] = pinned if there is None else there
        for name, value in into.items():
            if isinstance(value, np.ndarray):
                pinned = device.pinned(value.shape, engine.stored(name))
                self._outputs[name] = device.empty(value.shape, pinned.dtype)
                self._fetched.append((self._outputs[name], pinned, value))
            else:
                self._outputs[name] = value
        self.take()
        engine.set_inputs(context, self._inputs)
        engine.set_outputs(context, self._inputs, self._outputs)

    def __call__(self) -> None:
        self.take()
        self.enqueue()
        self._device.synchronize()
        self.give()

    def take(self) -> None:
        """Read the host's arrays."""
        for array, pinned, _ in self._sent:
            pinned[...] = array

    def enqueue(self) -> None:
        """Put the run on the stream."""
        for _, pinned, there in self._sent:
            if there is not None:
                self._device.send(pinned, there.address)
        self._engine.execute(self._context)
        for there, pinned, _ in self._fetched:
            self._device.fetch(there, pinned)

    def require_recordable(self) -> None:
        """Raise TrioError where the run cannot be recorded."""
        tensorrt = self._engine.runtime.tensorrt
        if not tensorrt.recordable(self._context.trt, int(self._device.stream)):
            raise TrioError(f"{tensorrt.name} cannot record {self._engine.stage}")

    def give(self) -> None:
        """Write the host's arrays, when the stream is done."""
        for _, pinned, array in self._fetched:
            array[...] = pinned


class _Sequence:
    """Consecutive steps, recorded as one CUDA graph at the second run."""

    def __init__(self, runtime: TrtRuntime, steps: Sequence[_Step]) -> None:
        self._runtime, self._steps = runtime, steps
        self._runs = 0
        self._graph: Graph | None = None

    def __call__(self) -> None:
        for step in self._steps:
            step.take()
        if self._runs == 1 and self._runtime.cuda_graphs:
            self._record()
        self._runs += 1
        if self._graph is None:
            self._enqueue()
        else:
            self._graph.launch()
        self._runtime.device.synchronize()
        for step in self._steps:
            step.give()

    def _enqueue(self) -> None:
        for step in self._steps:
            step.enqueue()

    def _record(self) -> None:
        try:
            for step in self._steps:
                step.require_recordable()
            self._graph = self._runtime.device.record(self._enqueue)
        except TrioError as error:
            # A step without a graph is slower, not wrong.
            self._runtime.cuda_graphs = False
            warnings.warn(f"decode steps run without CUDA graphs: {error}", stacklevel=2)
        else:
            self._runtime.recordings += 1


def _most(name: str, profiles: Sequence[Profile]) -> tuple[int, ...] | None:
    """The greatest size of each axis of an input; None where no profile has it."""
    shapes = [each.shapes[name].max for each in profiles if name in each.shapes]
    return tuple(map(max, zip(*shapes, strict=True))) if shapes else None


def _spec(tensor: IoTensor) -> TensorSpec:
    dtype = np.dtype(np.int64) if tensor.dtype == np.int32 else tensor.dtype
    shape = tuple(None if size < 0 else size for size in tensor.shape)
    return TensorSpec(tensor.name, dtype, shape)


def _address(array: Array) -> int:
    """Address of the first entry."""
    return array.ctypes.data if isinstance(array, np.ndarray) else array.address


def open_with(kind: type[TrtRuntime], options: RuntimeOptions, bundle: Bundle | None) -> TrtRuntime:
    """Open a bundle's engines, those of the options' target or the only ones.

    Raises:
        TrioError: no bundle, no engines of the target, or as `TrtRuntime`.
    """
    if bundle is None:
        raise TrioError("TensorRT runs the engines of a bundle: open the bundle")
    target = options.target
    name = target.name if isinstance(target, Target) else target and Path(target).stem
    return kind(engine_folder(bundle, name or None), bundle)


#: Why TensorRT and TensorRT-RTX do not take the options of other runtimes.
REFUSALS = {
    "provider": "execution providers are ONNX Runtime's",
    "precision": "it is fixed when engines are built, so export with another --dtype",
    "threads": "it computes on the GPU",
    "low_memory": "its weights are in the GPU's memory",
}


RUNTIME = RuntimeSpec(
    name="tensorrt",
    title="TensorRT",
    dialects=DIALECTS,
    dtypes=("float32", "float16", "bfloat16"),
    options={},
    refusals=REFUSALS,
    open=partial(open_with, TrtRuntime),
    target_keys=TARGET_KEYS,
    devices={"gpu": None},
    needs_engines=True,
    check_target=check_target,
    target_dialects=target_dialects,
    target_schemes=target_schemes,
)
