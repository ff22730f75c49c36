"""OpenVINO, for `primitive` graphs; CPUs with AMX or AVX512-BF16 also run in bfloat16.

Select graphs compute in float32, since bfloat16 similarities would move tokens across the
threshold; with precision bfloat16 only their products with weights are in bfloat16. Weights are
mapped from the bundle's files.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import OutOfMemory, TrioError
from trio_deploy.quant.schemes import WHOLE_NUMBERS
from trio_deploy.runtimes.base import (
    Array,
    Execution,
    HostRuntime,
    RuntimeSpec,
    Step,
    TensorSpec,
    check_feeds,
)
from trio_deploy.runtimes.failures import failure
from trio_deploy.runtimes.machine import cores_to_name, usable_cores
from trio_deploy.runtimes.openvino_passes import Passes, is_coded

# Compiled kernels that a graph keeps, per kind of kernel: those used last. Every new length of a
# prompt compiles its own, and OpenVINO's default of 5000 keeps them all, 9 MiB per length with the
# shipped model. Measured there, one thread, processor time per request: 100 new lengths 119 ms by
# default, 117 ms with 64, 175 ms with 0; one length again and again 67, 73 and 156 ms, since a
# prompt and its decode steps take turns; resident after the 100 lengths 1180, 657 and 581 MiB.
_KERNELS = "64"

# Activations that share a scale in products with quantised weights: by default 32, which takes 1.4
# times as long in prompts.
_GROUP = "128"

_HINTS = {"float32": "f32", "bfloat16": "bf16"}
_FLOAT_TYPES = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}  # as compiled models say


class OvRuntime(HostRuntime):
    """Compiles graphs with common options; see `registry.open_runtime`."""

    def __init__(self, *, threads: int | None = None, precision: str = "float32") -> None:
        try:
            import openvino
        except ImportError as error:
            raise TrioError(
                "OpenVINO is not installed: pip install 'trio-deploy[openvino]'"
            ) from error
        if precision not in _HINTS:
            raise TrioError(f"OpenVINO computes in float32 or bfloat16, not in {precision}")
        self._openvino = openvino
        self._core = openvino.Core()
        self._passes = Passes()
        self._precision = precision
        self._threads = threads or cores_to_name()
        able = self._core.get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if precision == "bfloat16" and "BF16" not in able:
            raise TrioError(
                "this CPU has no bfloat16 arithmetic (AMX or AVX512-BF16): use precision float32"
            )

    def shares_cache(self, dialect: str) -> bool:
        """`Runtime.shares_cache`: no, since a step rewrites the whole `primitive` cache."""
        if dialect != "primitive":
            raise TrioError(
                f"OpenVINO reads the primitive dialect, but this bundle has {dialect!r} graphs: "
                "export it with --dialect primitive"
            )
        return False

    def open(
        self,
        path: Path,
        weights: Mapping[str, TensorPlace] | None = None,
        *,
        keep_precision: bool = False,
        shares_weights: bool = False,
    ) -> OvEngine:
        """Load a graph; with precision bfloat16 its caches, if any, are bfloat16 too.

        Raises:
            TrioError: the graph does not load.
        """
        return OvEngine(self._openvino, partial(self._compile, path, keep_precision))

    def _compile(self, path: Path, keep_precision: bool) -> tuple[Any, str | None]:
        """The compiled model, and what it rounds activations to."""
        precision = "float32" if keep_precision else self._precision
        options: dict[str, Any] = {
            "INFERENCE_PRECISION_HINT": _HINTS[precision],
            "PERFORMANCE_HINT": "LATENCY",
            "NUM_STREAMS": "1",
            "CPU_RUNTIME_CACHE_CAPACITY": _KERNELS,
        }
        if precision == "float32":
            options["EXECUTION_MODE_HINT"] = "ACCURACY"
        if self._threads is not None:
            options["INFERENCE_NUM_THREADS"] = self._threads
        try:
            model = self._core.read_model(str(path))
            if _takes_prompts(model):
                self._passes.split_queries(model)
            if coded := any(is_coded(node) for node in model.get_ops()):
                if keep_precision:
                    self._passes.dequantise(model)
                else:
                    options["DYNAMIC_QUANTIZATION_GROUP_SIZE"] = _GROUP
            if keep_precision:
                self._passes.sort_ranks(model)
            if self._precision == "bfloat16" and keep_precision:
                self._passes.narrow_products(model)
            elif self._precision == "bfloat16":
                model = self._passes.narrow_caches(model)
            if self._precision == "bfloat16" and 1 in (self._threads, usable_cores()):
                self._passes.unfuse_mlps(model)
            compiled = self._core.compile_model(model, "CPU", options)
            return compiled, "int8" if coded and not keep_precision else None
        except (RuntimeError, MemoryError) as error:
            raise failure(f"OpenVINO cannot load {path.name}", error) from error


class OvEngine:
    """One compiled model."""

    def __init__(self, openvino: Any, compile_model: Callable[[], tuple[Any, Any]]) -> None:
        """Compile; again after memory ran out, which leaves a model between two prompts' shapes."""
        self._openvino = openvino
        self._compile = compile_model
        model, activations = compile_model()
        self._model: Any = model
        self._sound = True
        self.inputs = _specs(model.inputs)
        self.outputs = _specs(model.outputs)
        hint = model.get_property("INFERENCE_PRECISION_HINT").get_type_name()
        self.execution = Execution(
            ", ".join(model.get_property("EXECUTION_DEVICES")),
            _FLOAT_TYPES.get(hint, hint),
            activations=activations,
        )

    def run(
        self,
        feeds: Mapping[str, Array],
        into: Mapping[str, Array] | None = None,
        *,
        host: Collection[str] | None = None,
    ) -> dict[str, Array]:
        """`Engine.run`; all outputs are on the host."""
        check_feeds(self, feeds)
        into = into or {}
        # A new request per run: nothing writes to its outputs again, so results are not copied.
        request = self._bound(feeds, into)
        self.infer(request)
        names = [name for name in self.outputs if name not in into]
        # OpenVINO returns bfloat16 as float16.
        return {
            name: request.get_tensor(name).data.view(self.outputs[name].dtype) for name in names
        }

    def bind(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Step:
        """`Engine.bind`, with a request of its own."""
        check_feeds(self, feeds)
        return _Step(self, self._bound(feeds, into), {**feeds, **into})

    def empty(self, shape: tuple[int, ...], dtype: np.dtype) -> Array:
        """`Engine.empty`, in the host's memory."""
        return np.empty(shape, dtype)

    def _bound(self, feeds: Mapping[str, Array], into: Mapping[str, Array]) -> Any:
        if not self._sound:
            self._model = None  # both at once would take twice the memory, just after it ran out
            (self._model, _), self._sound = self._compile(), True
        try:
            request = self._model.create_infer_request()
        except (RuntimeError, MemoryError) as error:
            raise failure("OpenVINO failed", error) from error
        for arrays, specs in ((feeds, self.inputs), (into, self.outputs)):
            for name, array in arrays.items():
                request.set_tensor(name, self._tensor(array.view(specs[name].dtype)))
        return request

    def infer(self, request: Any) -> None:
        """Run a request of this engine."""
        try:
            request.start_async()
            request.wait()
        except (RuntimeError, MemoryError) as error:
            failed = failure("OpenVINO failed", error)
            self._sound = self._sound and not isinstance(failed, OutOfMemory)
            raise failed from error

    def _tensor(self, array: np.ndarray) -> Any:
        """Tensor that shares the array's memory.

        `array` must be a view in the port's type: numpy has two int64 types, OpenVINO accepts one.
        """
        ov = self._openvino
        if array.dtype == ml_dtypes.bfloat16:
            return ov.Tensor(array.view(np.uint16), ov.Shape(array.shape), ov.Type.bf16)
        return ov.Tensor(array, shared_memory=True)


class _Step:
    """A bound request, and references to the arrays whose memory it uses."""

    def __init__(self, engine: OvEngine, request: Any, arrays: dict[str, Array]) -> None:
        self._engine = engine
        self._request = request
        self._arrays = arrays

    def __call__(self) -> None:
        self._engine.infer(self._request)


def _takes_prompts(model: Any) -> bool:
    """Whether a graph is a segment of layers: each may be given a whole prompt, pruned or not."""
    rows = any(port.get_any_name() in ("inputs_embeds", "hidden_states") for port in model.inputs)
    return rows and any(port.get_any_name().startswith("present.") for port in model.outputs)


def _specs(ports: list[Any]) -> dict[str, TensorSpec]:
    specs = {}
    for port in ports:
        name = port.get_any_name()
        shape = tuple(
            None if size.is_dynamic else size.get_length() for size in port.get_partial_shape()
        )
        kind = port.get_element_type()
        # numpy has no bfloat16, and OpenVINO's `to_dtype` returns float16 for it.
        bfloat = kind.get_type_name() == "bf16"
        dtype = np.dtype(ml_dtypes.bfloat16 if bfloat else kind.to_dtype())
        specs[name] = TensorSpec(name, dtype, shape)
    return specs


def _open(options: RuntimeOptions, bundle: Bundle | None) -> OvRuntime:
    return OvRuntime(threads=options.threads, precision=options.precision or "float32")


RUNTIME = RuntimeSpec(
    name="openvino",
    title="OpenVINO",
    dialects=("primitive",),
    dtypes=("float32", "float16", "bfloat16"),
    options={"precision": tuple(_HINTS), "threads": ()},
    refusals={
        "provider": "execution providers are ONNX Runtime's",
        "low_memory": "it manages its weights itself, so run with --runtime onnxruntime",
    },
    open=_open,
    default_target="cpu-openvino",
    schemes=WHOLE_NUMBERS,
)
