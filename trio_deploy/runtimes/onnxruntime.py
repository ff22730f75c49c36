"""ONNX Runtime, with each weight in memory once.

A segment's session copies its matrices into private memory, rearranged ("prepacking"), and unmaps
the file, so layers that only segments use are in memory once. Select and embed graphs use the same
tensors as segments: they read the file's pages, mapped once for all of them, which belong to the
page cache and may be evicted; a select graph rearranges only the key projection, by which it
multiplies all its rows. Matrices that are inputs of the graphs are read from the mapped file by all
stages. With `low_memory` all sessions read the file's pages, and no weight is in private memory.
Measurements: docs/measurements.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import math
import mmap
import os
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.config.target import Target
from trio_deploy.config.yaml_files import nearest
from trio_deploy.errors import TrioError
from trio_deploy.quant.schemes import WHOLE_NUMBERS
from trio_deploy.runtimes.base import (
    Array,
    Execution,
    HostRuntime,
    RuntimeSpec,
    Step,
    TensorSpec,
    check_feeds,
    float_type,
)
from trio_deploy.runtimes.failures import failure
from trio_deploy.runtimes.machine import cores_to_name
from trio_deploy.runtimes.mapped_weights import WeightMap

_LARGE = 2**22  # bytes of memory that is worth a mapping of its own
_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
_SHARED = ("float32", "float16", "uint8", "int8")  # types of weights that sessions share
_DTYPES = {
    "tensor(float)": np.dtype(np.float32),
    "tensor(float16)": np.dtype(np.float16),
    "tensor(bfloat16)": np.dtype(ml_dtypes.bfloat16),
    "tensor(int64)": np.dtype(np.int64),
    "tensor(int32)": np.dtype(np.int32),
    "tensor(bool)": np.dtype(np.bool_),
}


def _onnxruntime() -> Any:
    try:
        import onnxruntime
    except ImportError as error:
        raise TrioError(
            "ONNX Runtime is not installed: pip install 'trio-deploy[cpu]' "
            "(or 'trio-deploy[gpu]' for an NVIDIA GPU)"
        ) from error
    return onnxruntime


def installed_twice() -> bool:
    """Whether onnxruntime and onnxruntime-gpu are both installed, one overwriting the other."""
    found = 0
    for name in ("onnxruntime", "onnxruntime-gpu"):
        try:
            importlib.metadata.distribution(name)
            found += 1
        except importlib.metadata.PackageNotFoundError:
            continue
    return found == 2


@functools.cache
def _share_arena(ort: Any) -> None:
    """Register one CPU arena for all sessions of this process that use shared allocators."""
    kind = ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    memory = ort.OrtMemoryInfo("Cpu", kind, 0, ort.OrtMemType.DEFAULT)
    # If the application has already registered an arena, that one is used.
    with contextlib.suppress(Exception):
        ort.create_and_register_allocator(memory, None)


class OrtRuntime(HostRuntime):
    """Opens sessions with common options and shared weights; see `registry.open_runtime`."""

    def __init__(
        self,
        *,
        threads: int | None = None,
        low_memory: bool = False,
        provider: str | None = None,
    ) -> None:
        self._ort = _onnxruntime()
        if installed_twice():
            warnings.warn(
                "onnxruntime and onnxruntime-gpu are both installed and overwrite each other's "
                "files; uninstall both, then install one",
                stacklevel=2,
            )
        self.provider = _PROVIDERS.get((provider or "cpu").lower(), provider or "")
        self._check_available()
        _share_arena(self._ort)
        self._threads = threads or cores_to_name()
        self._low_memory = low_memory
        self._weights = WeightMap()
        # One OrtValue per mapped tensor for all sessions, which do not keep it alive themselves.
        self._values: dict[tuple[Path, str, int], Any] = {}

    def _check_available(self) -> None:
        if self.provider not in {*_PROVIDERS.values(), *self._ort.get_all_providers()}:
            raise TrioError(f"unknown provider {self.provider!r}: choose {' or '.join(_PROVIDERS)}")
        available = self._ort.get_available_providers()
        if self.provider not in available:
            hint = (
                ": pip install 'trio-deploy[gpu]' in an environment without onnxruntime, or pass "
                "--provider cpu"
                if self.provider == _PROVIDERS["cuda"]
                else ""
            )
            raise TrioError(
                f"this ONNX Runtime has no {self.provider}, only {', '.join(available)}{hint}"
            )

    def shares_cache(self, dialect: str) -> bool:
        """`Runtime.shares_cache`: GroupQueryAttention writes in place into a buffer of any size."""
        return dialect == "ort"

    def open(
        self,
        path: Path,
        weights: Mapping[str, TensorPlace] | None = None,
        *,
        keep_precision: bool = False,
        shares_weights: bool = False,
    ) -> OrtEngine:
        """Load a graph.

        Raises:
            TrioError: the graph does not load, or not on the requested provider.
        """
        ort = self._ort
        on_cpu = self.provider == _PROVIDERS["cpu"]
        options = ort.SessionOptions()
        options.log_severity_level = 3
        if self._threads is not None:
            options.intra_op_num_threads = self._threads
        # Stages run one after another, each with threads of its own: a stage's threads must not
        # spin while the next one works.
        options.add_session_config_entry("session.force_spinning_stop", "1")
        # Products that it makes of DequantizeLinear and MatMul are in float, as these say.
        options.add_session_config_entry("session.qdq_matmulnbits_accuracy_level", "1")
        if on_cpu:
            # Stages share one arena. A memory pattern would add a second block to the one that the
            # first run of each new prompt length allocates in it.
            options.add_session_config_entry("session.use_env_allocators", "1")
            options.enable_mem_pattern = False
        places = weights or {}
        kinds = {place.dtype for place in places.values()}
        if "float8_e4m3fn" in kinds:
            # Its rewriting of quantised graphs makes operators of narrow floats, which it has not.
            options.add_session_config_entry("session.disable_quant_qdq", "1")
        shared: list[Any] = []
        if on_cpu and (shares_weights or self._low_memory):
            if self._low_memory:
                options.add_session_config_entry("session.disable_prepacking", "1")
            for name, place in places.items():
                # There are no CPU kernels for bfloat16, and no arrays of 4 bit or narrow floats.
                if place.dtype in _SHARED:
                    shared.append(self._weight(path.parent, place))
                    options.add_initializer(name, shared[-1])
        try:
            graph = self._graph(path, options)
            session = ort.InferenceSession(graph, options, providers=[self.provider])
        except Exception as error:  # ONNX Runtime raises many types for this
            raise failure(f"ONNX Runtime cannot load {path.name}", error) from error
        used = session.get_providers()
        if self.provider not in used:
            raise TrioError(
                f"{self.provider} was requested, but ONNX Runtime uses {', '.join(used)}: see its "
                "log for the reason (for CUDA: the CUDA and cuDNN libraries it needs)"
            )
        bound = {
            entry.name: self._weight(path.parent, places[entry.name])
            for entry in session.get_inputs()
            if entry.name in places
        }
        # Codes in bytes are MatMulNBits' own, except in selections, which dequantise them.
        rounded = "int8" if "uint8" in kinds and not keep_precision else None
        return OrtEngine(session, "cpu" if on_cpu else "cuda", shared, bound, rounded)

    def _graph(self, path: Path, options: Any) -> str | bytes:
        """What a session is made of: the graph's file, or its content."""
        return str(path)

    def _weight(self, folder: Path, place: TensorPlace) -> Any:
        """A weight where sessions read it: mapped, or once in the memory of the GPU."""
        key = (folder.resolve(), place.file, place.offset)
        if key not in self._values:
            device = "cpu" if self.provider == _PROVIDERS["cpu"] else "cuda"
            view = self._weights.view(folder, place)
            self._values[key] = self._ort.OrtValue.ortvalue_from_numpy(view, device, 0)
        return self._values[key]


class OrtEngine:
    """One session."""

    def __init__(
        self,
        session: Any,
        device: str,
        shared: list[Any],
        bound: Mapping[str, Any],
        activations: str | None = None,
    ) -> None:
        """Use `OrtRuntime.open`.

        Args:
            shared: weights that the session refers to and does not keep alive.
            bound: weights that are inputs of the graph, by name.
            activations: as of `Execution`.
        """
        self._session = session
        self._device = device
        self._shared = shared
        self._bound = bound
        self._ort = _onnxruntime()
        self.inputs = _specs([each for each in session.get_inputs() if each.name not in bound])
        self.outputs = _specs(session.get_outputs())
        # A graph is computed in its own type, by the first of the session's providers that can.
        precision = float_type(self.inputs, self.outputs)
        self.execution = Execution(session.get_providers()[0], precision, activations=activations)

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        host: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """`Engine.run`; outputs that are not in `into` are on the host."""
        check_feeds(self, feeds)
        into = into or {}
        binding, _ = self._binding(feeds, into)
        free = [name for name in self.outputs if name not in into]
        for name in free:
            binding.bind_output(name, "cpu")
        _run(self._session, binding)
        values = dict(zip([*into, *free], binding.get_outputs(), strict=True))
        return {name: _numpy(values[name]) for name in free}

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Step:
        """`Engine.bind`, with an I/O binding of its own."""
        check_feeds(self, feeds)
        binding, values = self._binding(feeds, into)
        copied = [
            (value, feeds[name])
            for name, value in values.items()
            if self._device != "cpu" and isinstance(feeds[name], np.ndarray)
        ]
        return _Step(self._session, binding, copied, {**feeds, **into})

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """`Engine.empty`: a numpy array on the CPU, an OrtValue on a GPU."""
        if self._device == "cpu":
            return _untouched(shape, dtype)
        make = self._ort.OrtValue.ortvalue_from_shape_and_type
        return make(shape, dtype.type, self._device, 0)

    def _binding(
        self, feeds: Mapping[str, Array], into: Mapping[str, Array]
    ) -> tuple[Any, dict[str, Any]]:
        binding = self._session.io_binding()
        values = {name: self._value(feeds[name], self._device) for name in self.inputs}
        for name, value in {**values, **self._bound}.items():
            binding.bind_ortvalue_input(name, value)
        for name, array in into.items():
            # One value per buffer: the present and the past of a cache may be the same.
            known = next((values[other] for other in feeds if feeds[other] is array), None)
            binding.bind_ortvalue_output(name, known or self._value(array, "cpu"))
        return binding, values

    def _value(self, array: Array, device: str) -> Any:
        if not isinstance(array, np.ndarray):
            return array
        if not array.flags.c_contiguous:
            raise TrioError("an array is not contiguous: pass contiguous arrays")
        return self._ort.OrtValue.ortvalue_from_numpy(array, device, 0)


def _run(session: Any, binding: Any) -> None:
    try:
        session.run_with_iobinding(binding)
    except Exception as error:  # ONNX Runtime raises many types for this
        raise failure("ONNX Runtime failed", error) from error


class _Step:
    """A bound run, and references to the arrays whose memory it uses."""

    def __init__(
        self,
        session: Any,
        binding: Any,
        copied: list[tuple[Any, np.ndarray]],
        arrays: dict[str, Array],
    ) -> None:
        self._session = session
        self._binding = binding
        self._copied = copied
        self._arrays = arrays

    def __call__(self) -> None:
        for value, array in self._copied:  # on a GPU, inputs from the host are copies
            value.update_inplace(array)
        _run(self._session, self._binding)


def _untouched(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """Uninitialised memory of which the system provides only the small pages that are written.

    Numpy asks for pages of 2 MiB: writing the first tokens of every row and head of a large cache
    would then provide, and clear, all of it.

    Raises:
        MemoryError: there is not so much.
    """
    nbytes = math.prod(shape) * dtype.itemsize
    if nbytes < _LARGE:
        return np.empty(shape, dtype)
    try:
        # Private, so that a forked process has a copy of its own, as of numpy's memory.
        own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if os.name == "posix" else {}
        memory = mmap.mmap(-1, nbytes, **own)
        if hasattr(mmap, "MADV_NOHUGEPAGE"):
            with contextlib.suppress(OSError):  # a system without large pages
                memory.madvise(mmap.MADV_NOHUGEPAGE)
    except OSError as error:
        raise MemoryError(str(error)) from error
    return np.frombuffer(memory, np.uint8).view(dtype).reshape(shape)


def _specs(args: list[Any]) -> dict[str, TensorSpec]:
    return {arg.name: TensorSpec(arg.name, _DTYPES[arg.type], tuple(arg.shape)) for arg in args}


def _numpy(value: Any) -> np.ndarray:
    """The value as a numpy array, without a copy where ONNX Runtime allows it."""
    return value.numpy()


def _open(options: RuntimeOptions, bundle: Bundle | None) -> OrtRuntime:
    if options.low_memory and bundle is not None and bundle.manifest.quantization is not None:
        raise TrioError(
            "quantised weights cannot be kept in the page cache alone: without its own arrangement "
            "of their codes ONNX Runtime takes a hundred times as long and more memory: leave out "
            "low memory, since the weights are small already"
        )
    return OrtRuntime(
        threads=options.threads, low_memory=options.low_memory, provider=options.provider
    )


def _check_target(target: Target) -> Target:
    provider = target.provider or "cpu"
    if provider not in _PROVIDERS:
        raise TrioError(
            f"provider cannot be {provider!r}{nearest(provider, _PROVIDERS)}: choose one of "
            f"{', '.join(_PROVIDERS)}"
        )
    return dataclasses.replace(target, provider=provider)


RUNTIME = RuntimeSpec(
    name="onnxruntime",
    title="ONNX Runtime",
    dialects=("ort", "onnx", "primitive"),
    # No bfloat16: it has no kernels on CPUs, and the Python interface cannot pass such arrays.
    dtypes=("float32", "float16"),
    # ONNX Runtime's own names of providers end in ExecutionProvider.
    options={"provider": (*_PROVIDERS, "*ExecutionProvider"), "threads": (), "low_memory": ()},
    refusals={
        "precision": "it computes in the bundle's own dtype, so export with that dtype, or run "
        "with --runtime openvino"
    },
    open=_open,
    default_target="cpu",
    target_keys=("provider", "weights"),
    devices={"cpu": "cpu", "gpu": "cuda"},
    check_target=_check_target,
    holds_scores=("onnx", "primitive"),
    schemes=(*WHOLE_NUMBERS, "fp8"),
)
