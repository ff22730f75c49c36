"""TensorRT 8.6, 10.x and 11.x and TensorRT-RTX behind one interface: every difference is here.

Nothing asks for a release number: each difference is asked for by the name that the bindings have
or lack. Read from the bindings of 8.6.1, 10.0, 10.3, 10.15, 11.0, 11.4 and of TensorRT-RTX 1.7
(docs/tensorrt.md; `tests/runtimes/tensorrt/test_bindings.py` compares this file with any bindings
that are installed):

=====================================  ======================================================
`EXPLICIT_BATCH`                       required in 8.6, the only mode in 10, removed in 11
`STRONGLY_TYPED`                       from 10; in 8.6 layers that must stay float32 are marked,
                                       under `OBEY_PRECISION_CONSTRAINTS` (removed in 11, with the
                                       builder flags `FP16`, `BF16`, `INT8`)
INT64, BF16                            from 10; 8.6 narrows INT64 to INT32
`TacticSource.CUBLAS`, `CUDNN` …       removed in 11
`PROFILE_SHARING_0806`                 must be set in 8.6, so that several contexts share a profile
`IProgressMonitor`                     from 10
`get_aliased_input_tensor`             from 10.15: a KV cache is updated in place
`IAttention`                           parsed from 10.15: one fused kernel or no engine, unless
                                       decomposition is allowed
`device_memory_size`, contexts         `…_v2` from 10.3 and alone in 11; contexts without memory
without memory                         of their own by `ExecutionContextAllocationStrategy` from 10
`set_compute_capability`               TensorRT-RTX alone: it compiles for listed GPUs, without one
                                       and without a driver, and keeps no timing cache
`REQUIRE_USER_ALLOCATION`              TensorRT-RTX alone: what it takes to record a run
`create_runtime_cache`,                TensorRT-RTX alone: kernels are finished on the device, and
`is_stream_capturable`                 kept; a context may not be ready to be recorded
=====================================  ======================================================
"""

from __future__ import annotations

import importlib
import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import ml_dtypes
import msgspec
import numpy as np

from trio_deploy.errors import OutOfMemory, TrioError
from trio_deploy.files import format_bytes

#: Flavour → its module. `rtx` compiles ahead of time, on machines without a GPU.
MODULES = {"tensorrt": "tensorrt", "rtx": "tensorrt_rtx_bindings"}
_INSTALL = {
    "tensorrt": "TensorRT is not installed: pip install 'trio-deploy[tensorrt]' (on a Jetson it "
    "comes with JetPack: use a Python environment with --system-site-packages)",
    "rtx": "TensorRT-RTX is not installed: pip install 'trio-deploy[rtx]' (wheels for Linux on "
    "x86-64 and Windows)",
}
Log = Callable[[str, str], None]
"""Function of a severity (`ERROR`, `WARNING`, `INFO`, `VERBOSE`) and a message."""
Progress = Callable[[str, int, int], None]
"""Function of a phase's name, its completed steps and its total steps."""
Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Minimum, typical and maximum shape (or values) of an input."""

_DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
_LIBRARIES = ("CUBLAS", "CUBLAS_LT", "CUDNN")  # tactics that need libraries other than TensorRT's
# Layers without arithmetic, whose precision cannot be set.
_WITHOUT_PRECISION = (
    *("CONSTANT", "SHAPE", "ASSERTION", "RECURRENCE", "TRIP_LIMIT", "ITERATOR", "LOOP_OUTPUT"),
    *("CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT"),
)
_NO_ROOM = re.compile(
    r"out ?of ?memory|memory ?allocation|could not be allocated|unable to allocate", re.IGNORECASE
)
_MAX_MESSAGES = 20  # number of last messages kept for errors
# Size that a skipped tactic requested: "on requested size of N", which is in bytes for some kinds
# of layers and in MiB for others, and "Tactic Device request: N MB".
_REQUEST = re.compile(r"requested size of (\d+)|device request: (\d+) ?MB", re.IGNORECASE)
_NO_TACTIC = "could not find any implementation"
# TensorRT keeps the first logger of a process and uses it until the process ends.
_LOGGERS: list[Any] = []


class OutOfDeviceMemory(OutOfMemory):
    """TensorRT requested more GPU memory than is free; its message says what takes less."""

    def __init__(self, message: str) -> None:
        super().__init__(message, "the GPU")


class ProfileLike(Protocol):
    """Ranges of one optimisation profile.

    Attributes:
        name: name for messages.
        shapes: input with a dynamic axis → its shapes.
        values: input whose values determine shapes (`width` of a selection) → its values.
    """

    @property
    def name(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, Bounds]: ...

    @property
    def values(self) -> Mapping[str, Bounds]: ...


class BuildOptions(msgspec.Struct, frozen=True):
    """How an engine is built.

    Attributes:
        dtype: the graph's float type, which TensorRT before 10 does not infer.
        workspace: maximum bytes of scratch memory of a layer's tactic; None: as much as the GPU
            has. It allocates nothing but excludes tactics; fused nodes keep their intermediate
            results there.
        compute_capabilities: GPUs to compile for, such as `8.9`; empty: this machine's GPU, or all
            that a compiler ahead of time has by default.
        detailed: whether the log (`VERBOSE`) has every kernel with its tensors.
    """

    dtype: str = "float32"
    workspace: int | None = None
    compute_capabilities: tuple[str, ...] = ()
    detailed: bool = False


_DEFAULTS = BuildOptions()


@dataclass(frozen=True)
class Built:
    """A serialized engine, and the timing cache of its build."""

    plan: memoryview
    timing_cache: bytes


@dataclass(frozen=True)
class IoTensor:
    """An engine's input or output.

    Attributes:
        dtype: element type in memory: int32 where TensorRT narrows the graph's int64.
        shape: sizes; -1 for a dynamic axis.
        on_host: whether it is read from the host's memory when shapes are inferred.
        alias: input that this output must share memory with; "" if none.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool
    alias: str


def load(flavour: str = "tensorrt") -> TensorRT:
    """Load the installed TensorRT.

    TensorRT proper needs a driver for anything: it is checked first, since without one
    `tensorrt.Runtime` ends the process (8.6).

    Args:
        flavour: one of `MODULES`.

    Raises:
        TrioError: TensorRT is missing, broken or older than 8.6, or has no CUDA driver.
    """
    if flavour == "tensorrt":
        from trio_deploy.runtimes.tensorrt.device import require_driver

        require_driver()
    name = MODULES[flavour]
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        known = (name, f"{name}_bindings", name.replace("_bindings", "") + "_libs")
        if error.name not in known:
            raise
        raise TrioError(_INSTALL[flavour]) from error
    except (ImportError, OSError) as error:
        raise TrioError(
            f"{_INSTALL[flavour].partition(' is ')[0]} is installed, but does not load ({error}): "
            "install it again"
        ) from error
    return TensorRT(module)


@dataclass(frozen=True)
class JustInTime:
    """How the kernels of one engine of TensorRT-RTX are finished on the device.

    Attributes:
        config: IRuntimeConfig, of which contexts are made.
        cache: IRuntimeCache of the kernels that were compiled so far.
    """

    config: Any
    cache: Any

    def kernels(self) -> bytes:
        """The kernels, for `TensorRT.just_in_time` in a later process on this GPU and driver."""
        return bytes(memoryview(self.cache.serialize()))


class TensorRT:
    """One version of TensorRT or TensorRT-RTX.

    Attributes:
        module: the module of the bindings.
        version: such as "10.3.0"; TensorRT-RTX has numbers of its own.
        compiles_ahead: whether it builds for listed GPUs on any machine, and only then.
        strongly_typed: whether an engine uses its graph's types.
        narrows_int64: whether int64 inputs and outputs become int32.
        updates_in_place: whether a cache's past and present share a buffer (KVCacheUpdate).
    """

    def __init__(self, module: Any) -> None:
        """Wrap a module of bindings.

        Raises:
            TrioError: the version is too old.
        """
        self.module = module
        self.version = str(module.__version__)
        self.compiles_ahead = hasattr(module.IBuilderConfig, "set_compute_capability")
        self.name = f"TensorRT{'-RTX' if self.compiles_ahead else ''} {self.version}"
        self.strongly_typed = hasattr(module.NetworkDefinitionCreationFlag, "STRONGLY_TYPED")
        self.narrows_int64 = not hasattr(module.DataType, "INT64")
        self.updates_in_place = hasattr(module.ICudaEngine, "get_aliased_input_tensor")
        shares_profiles = self.strongly_typed or hasattr(
            module.PreviewFeature, "PROFILE_SHARING_0806"
        )
        if not shares_profiles:
            raise TrioError(f"{self.name} is too old: 8.6 or later is needed")
        self._messages: deque[str] = deque(maxlen=_MAX_MESSAGES)
        self._requests: deque[str] = deque(
            maxlen=_MAX_MESSAGES
        )  # warnings of tactics without memory
        self._logs: list[Log] = []
        self._interrupts: list[BaseException] = []
        self.logger = _logger(module, self._say, self._interrupts)
        _LOGGERS.append(self.logger)
        self._runtime: Any = None

    # ------------------------------------------------------------------------------- building

    def build(
        self,
        onnx: Path,
        profiles: Sequence[ProfileLike],
        options: BuildOptions = _DEFAULTS,
        *,
        timing_cache: bytes = b"",
        log: Log | None = None,
        progress: Progress | None = None,
    ) -> Built:
        """Build an engine of a graph.

        Args:
            profiles: in the engine's order.
            timing_cache: cache of an earlier build on this GPU; one of another GPU is ignored, and
                every one by a compiler ahead of time, which times nothing.
            log: function that receives the builder's messages.
            progress: function called during the build (from TensorRT 10); an exception in it ends
                the build and is raised here.

        Raises:
            TrioError: the graph cannot be parsed, an input has no profile, or the build failed.
        """
        trt, dtype = self.module, options.dtype
        if dtype == "bfloat16" and not self.strongly_typed:
            raise TrioError(f"{self.name} has no bfloat16: export with --dtype float16")
        self._interrupts.clear()
        with _Logging(self, log):
            builder = self._made(trt.Builder, self.logger)
            network = builder.create_network(self._network_flags())
            parser = self._parse(network, onnx, profiles)  # owns weights until they are built in
            self._allow_decomposition(network)
            config = self._configured(builder, options)
            if dtype == "float16" and not self.strongly_typed:
                config.set_flag(trt.BuilderFlag.FP16)
                config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
                self._keep_float32(network, onnx)
            for profile in profiles:
                self._add_profile(builder, network, config, profile, onnx.name)
            cache = None if self.compiles_ahead else self._timing_cache(config, timing_cache)
            monitor = None
            if progress is not None and hasattr(trt, "IProgressMonitor"):
                monitor = _monitor(trt, progress, self._interrupts)
                config.progress_monitor = monitor
            plan = builder.build_serialized_network(network, config)
            del parser
            if monitor is not None and monitor.error is not None:
                raise monitor.error
            if self._interrupts:
                raise self._interrupts[0]
            if plan is None:
                advice = self._memory_advice(options.workspace)
                raise TrioError(
                    f"{self.name} could not build {onnx.name}: {self._last_errors()}{advice}"
                )
            timings = b"" if cache is None else bytes(memoryview(cache.serialize()))
            return Built(memoryview(plan), timings)

    def _configured(self, builder: Any, options: BuildOptions) -> Any:
        """The configuration of a build, without what depends on its graph."""
        trt, config = self.module, builder.create_builder_config()
        if options.workspace is not None:
            config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, options.workspace)
        # No TF32: selections compare cosines with a threshold, which takes full float32.
        config.clear_flag(trt.BuilderFlag.TF32)
        self._without_libraries(config)
        if not self.strongly_typed:  # contexts may share a profile, the default from 10
            config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
        if hasattr(trt.BuilderFlag, "REQUIRE_USER_ALLOCATION"):  # a step of decoding is recorded
            config.set_flag(trt.BuilderFlag.REQUIRE_USER_ALLOCATION)
        if options.detailed:
            config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
        if options.compute_capabilities:
            self._compile_for(config, options.compute_capabilities)
        return config

    def _compile_for(self, config: Any, capabilities: Sequence[str]) -> None:
        if not self.compiles_ahead:
            raise TrioError(f"{self.name} builds for this machine's GPU alone")
        known = self.module.ComputeCapability.__members__
        config.num_compute_capabilities = len(capabilities)
        for number, capability in enumerate(capabilities):
            kind = f"SM{capability.replace('.', '')}"
            if kind not in known:
                has = ", ".join(f"{name[2:-1]}.{name[-1]}" for name in known if name[:2] == "SM")
                raise TrioError(
                    f"{self.name} does not compile for compute capability {capability}: it has "
                    f"{has}"
                )
            config.set_compute_capability(known[kind], number)

    def _network_flags(self) -> int:
        flag = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flag.STRONGLY_TYPED if self.strongly_typed else flag.EXPLICIT_BATCH)

    def _parse(self, network: Any, onnx: Path, profiles: Sequence[ProfileLike]) -> Any:
        """Fill the network; returns the parser, whose memory the network's weights lie in."""
        parser = self._made(self.module.OnnxParser, network, self.logger)
        if parser.parse(_graph(onnx, profiles), str(onnx)):  # the path locates the weights
            return parser
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise TrioError(
            f"{self.name} cannot parse {onnx.name}: " + ("; ".join(errors) or self._last_errors())
        )

    def _allow_decomposition(self, network: Any) -> None:
        """Allow several kernels for an attention that no fused kernel supports."""
        kind = getattr(self.module.LayerType, "ATTENTION_INPUT", None)
        for number in range(network.num_layers if kind is not None else 0):
            layer = network.get_layer(number)
            if layer.type == kind:
                layer.__class__ = self.module.IAttentionInputLayer  # bindings return an ILayer
                layer.attention.decomposable = True

    def _without_libraries(self, config: Any) -> None:
        """Use TensorRT's own kernels only, so that engines need no cuBLAS or cuDNN."""
        sources = self.module.TacticSource
        chosen = config.get_tactic_sources()
        for name in _LIBRARIES:
            if hasattr(sources, name):
                chosen &= ~(1 << int(getattr(sources, name)))
        config.set_tactic_sources(chosen)

    def _keep_float32(self, network: Any, onnx: Path) -> None:
        """Keep in float32 what the graph computes in float32 (before strong typing).

        Layers that read float32, comparisons included, are set to compute in it, and float32
        results to be stored so. As in trtexec, layers that compute shapes are left alone; casts,
        and layers of indices alone, have no precision.

        Raises:
            TrioError: TensorRT takes products with float16 weights for float32, which is slow.
        """
        trt = self.module
        wide = trt.DataType.FLOAT
        kinds = [getattr(trt.LayerType, name, None) for name in _WITHOUT_PRECISION]
        products = _half_products(onnx)
        kept = 0
        for number in range(network.num_layers):
            layer = network.get_layer(number)
            inputs = [layer.get_input(i) for i in range(layer.num_inputs)]
            outputs = [layer.get_output(i) for i in range(layer.num_outputs)]
            shaping = [t for t in (*inputs[:1], *outputs) if t is not None and t.is_shape_tensor]
            if layer.type in kinds or shaping:
                continue
            computes = layer.type != trt.LayerType.CAST and any(
                t is not None and t.dtype == wide for t in inputs
            )
            results = [i for i, t in enumerate(outputs) if t.dtype == wide]
            for name in (outputs[i].name for i in results):
                if name in products:
                    raise TrioError(
                        f"{self.name} takes the product with {products[name]} in "
                        f"{onnx.name} for float32, though it is float16 in the graph, and would "
                        "run it all in float32: use TensorRT 10 or later, or export with "
                        "--dtype float32"
                    )
            if computes:
                layer.precision = wide
            for i in results:
                layer.set_output_type(i, wide)
            kept += computes or bool(results)
        self._say("INFO", f"{kept} of {network.num_layers} layers of {onnx.name} keep float32")

    def _add_profile(
        self, builder: Any, network: Any, config: Any, profile: ProfileLike, graph: str
    ) -> None:
        made = builder.create_optimization_profile()
        where = f"profile {profile.name} of {graph}"
        for number in range(network.num_inputs):
            tensor = network.get_input(number)
            name = tensor.name
            if any(size < 0 for size in tensor.shape):
                if name not in profile.shapes:
                    raise TrioError(f"{where} has no shapes for the input {name}")
                self._bound(made.set_shape, name, profile.shapes[name], where)
            if tensor.is_shape_tensor:
                if name not in profile.values:
                    raise TrioError(f"{where} has no values for the input {name}")
                self._bound(made.set_shape_input, name, profile.values[name], where)
        if config.add_optimization_profile(made) < 0:
            raise TrioError(f"TensorRT rejects {where}: {self._last_errors()}")

    def _bound(self, setter: Callable[..., None], name: str, bounds: Bounds, where: str) -> None:
        try:
            setter(name, *bounds)
        except RuntimeError as error:  # of the bindings
            raise TrioError(f"TensorRT rejects {name} {bounds} in {where}: {error}") from error

    def _timing_cache(self, config: Any, content: bytes) -> Any:
        for start in (content, b""):
            cache = config.create_timing_cache(start)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        raise TrioError(f"TensorRT creates no timing cache: {self._last_errors()}")

    # -------------------------------------------------------------------------------- running

    def deserialize(self, plan: bytes | memoryview, name: str) -> Any:
        """Load an engine (ICudaEngine) from a plan.

        Args:
            name: the file's name, for messages.

        Raises:
            TrioError: the plan does not load.
        """
        if self._runtime is None:
            self._runtime = self._made(self.module.Runtime, self.logger)
        self.forget_errors()
        try:
            engine = self._runtime.deserialize_cuda_engine(plan)
        except RuntimeError as error:
            raise self.failed(f"{name} does not load ({error})") from error
        if engine is None:
            raise self.failed(f"{name} does not load")
        return engine

    def tensors(self, engine: Any) -> Iterator[IoTensor]:
        """Inputs and outputs of an engine, in its order."""
        trt = self.module
        known = {
            getattr(trt.DataType, n): d for n, d in _DTYPES.items() if hasattr(trt.DataType, n)
        }
        for number in range(engine.num_io_tensors):
            name = engine.get_tensor_name(number)
            is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
            alias = ""
            if not is_input and hasattr(engine, "get_aliased_input_tensor"):
                alias = engine.get_aliased_input_tensor(name) or ""
            yield IoTensor(
                name,
                known[engine.get_tensor_dtype(name)],
                tuple(engine.get_tensor_shape(name)),
                is_input,
                engine.get_tensor_location(name) == trt.TensorLocation.HOST,
                alias,
            )

    def scratch_bytes(self, engine: Any) -> int:
        """Scratch bytes of a running context, at the largest shapes of any profile."""
        if hasattr(engine, "device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        return int(engine.device_memory_size)

    def just_in_time(self, engine: Any, kernels: bytes = b"", *, eager: bool) -> JustInTime:
        """How an engine of TensorRT-RTX is run.

        Args:
            kernels: of an earlier `JustInTime`; those of another GPU or driver are ignored.
            eager: whether a new shape waits for its kernels; else they are compiled in the
                background, and kernels of any shape run meanwhile.

        Raises:
            TrioError: the engine takes no such configuration.
        """
        trt = self.module
        self.forget_errors()
        config = engine.create_runtime_config()
        config.set_execution_context_allocation_strategy(
            trt.ExecutionContextAllocationStrategy.USER_MANAGED
        )
        strategies = trt.DynamicShapesKernelSpecializationStrategy
        config.dynamic_shapes_kernel_specialization_strategy = (
            strategies.EAGER if eager else strategies.LAZY
        )
        config.cuda_graph_strategy = (
            trt.CudaGraphStrategy.DISABLED
        )  # decode steps are recorded here
        cache = config.create_runtime_cache()
        if kernels:
            cache.deserialize(kernels)
        if not config.set_runtime_cache(cache):
            raise self.failed(f"{self.name} takes no runtime cache")
        return JustInTime(config, cache)

    def context(self, engine: Any, just_in_time: JustInTime | None = None) -> Any:
        """Create an execution context, which needs memory from `lend` to run.

        Args:
            just_in_time: how an engine of TensorRT-RTX is run; None: an engine of TensorRT.

        Raises:
            OutOfDeviceMemory: the device has no room for the context's state.
            TrioError: creating it failed for another reason.
        """
        self.forget_errors()
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if just_in_time is not None:
            context = engine.create_execution_context(just_in_time.config)
        elif strategies is not None:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None:
            raise self.failed("TensorRT creates no execution context")
        return context

    def recordable(self, context: Any, stream: int) -> bool:
        """Whether a run of a context may be recorded on a stream."""
        capturable = getattr(context, "is_stream_capturable", None)
        return capturable is None or bool(capturable(stream))

    def lend(self, context: Any, address: int, size: int) -> None:
        """Set the scratch memory of a context, aligned to 256 bytes."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size)
        else:
            context.device_memory = address

    # -------------------------------------------------------------------------------- messages

    def _made(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """Construct an object of the bindings, which raise TypeError if that fails."""
        self.forget_errors()
        try:
            return kind(*arguments)
        except TypeError as error:
            raise TrioError(
                f"{self.name} does not start on this machine: {self._last_errors()}"
            ) from error

    def _say(self, severity: str, message: str) -> None:
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self._messages.append(message.strip())
        if severity != "VERBOSE" and _REQUEST.search(message):
            self._requests.append(message.strip())
        for log in self._logs:
            log(severity, message)

    def forget_errors(self) -> None:
        """Discard messages so far, which cannot explain the next failure."""
        self._messages.clear()
        self._requests.clear()

    def failed(self, what: str) -> TrioError:
        """Error for a failed call, with TensorRT's last messages; `OutOfDeviceMemory` if they name
        a lack of memory."""
        text = f"{what}: {self._last_errors()}"
        return OutOfDeviceMemory(text) if _NO_ROOM.search(text) else TrioError(text)

    def last_errors(self) -> str:
        """TensorRT's last messages."""
        return self._last_errors()

    def _memory_advice(self, workspace: int | None) -> str:
        """Remedy for a node without a tactic; "" if memory was not the reason.

        The last messages are about the node at which the build ended.
        """
        if _NO_TACTIC not in " ".join(self._messages).lower():
            return ""
        allowed = "" if workspace is None else f"workspace_gib {workspace / 2**30:g} of the target"
        if self._requests:
            last = self._requests[-1]
            asked, said = _requested_bytes(last), last.splitlines()[0]
            asks = f"; a tactic requested {format_bytes(asked)} of scratch memory"
            if workspace is None or asked <= workspace:
                return (
                    f"{asks}, more than the GPU had free: end other programs on it, or lower the "
                    f"limits of the target (TensorRT: {said})"
                )
            return (
                f"{asks}, beyond {allowed}: raise workspace_gib to at least {_whole_gib(asked)}, "
                f"or leave it out for as much as the GPU has (TensorRT: {said})"
            )
        if allowed:
            return f"; {allowed} may be too little for it: raise it, or leave it out"
        return ""

    def _last_errors(self) -> str:
        return "; ".join(list(self._messages)[-3:]) or "it gave no reason"


def _requested_bytes(message: str) -> int:
    """Bytes that a tactic requested, from the message about skipping it."""
    found = _REQUEST.search(message)
    assert found is not None
    if found[2] is not None:
        return int(found[2]) * 2**20
    size = int(found[1])
    return size * 2**20 if size < 2**20 else size  # no tactic is skipped for less than a MiB


def _whole_gib(size: int) -> int:
    return -(-size // 2**30)


class _Logging:
    """Context in which TensorRT's messages also go to a function."""

    def __init__(self, tensorrt: TensorRT, log: Log | None) -> None:
        self._logs = tensorrt._logs
        self._log = log
        tensorrt.forget_errors()

    def __enter__(self) -> None:
        if self._log is not None:
            self._logs.append(self._log)

    def __exit__(self, *_: object) -> None:
        if self._log is not None:
            self._logs.remove(self._log)


def _logger(trt: Any, say: Log, interrupts: list[BaseException]) -> Any:
    names = {getattr(trt.ILogger, name): name for name in _SEVERITIES}

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.ILogger.__init__(self)

        def log(self, severity: Any, message: str) -> None:
            try:
                say(names.get(severity, "INFO"), message)
            except Exception:  # the bindings would print it and continue
                return
            except BaseException as error:  # Ctrl-C: raised again after the build
                interrupts.append(error)

    return Logger()


def _monitor(trt: Any, progress: Progress, interrupts: list[BaseException]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.steps: dict[str, int] = {}
            self.error: BaseException | None = None

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self.steps[phase_name] = num_steps
            self._tell(phase_name, 0)

        def phase_finish(self, phase_name: str) -> None:
            self._tell(phase_name, self.steps.pop(phase_name, 0))

        def step_complete(self, phase_name: str, step: int) -> bool:
            self._tell(phase_name, step + 1)
            return self.error is None and not interrupts  # False ends the build

        def _tell(self, phase: str, done: int) -> None:
            try:
                progress(phase, done, self.steps.get(phase, done))
            except BaseException as error:  # Ctrl-C too: exceptions must not pass through TensorRT
                self.error = self.error or error

    return Monitor()


def _graph(file: Path, profiles: Sequence[ProfileLike]) -> bytes:
    """Serialize a graph with axes fixed that all profiles agree on, as KVCacheUpdate requires."""
    from trio_deploy.runtimes.tensorrt.dry_run.rules import read_graph

    model = read_graph(file)
    for entry in model.graph.input:
        bounds = [p.shapes[entry.name] for p in profiles if entry.name in p.shapes]
        if len(bounds) < len(profiles) or not bounds:
            continue
        for axis, dim in enumerate(entry.type.tensor_type.shape.dim):
            sizes = {shape[axis] for each in bounds for shape in each}
            if not dim.HasField("dim_value") and len(sizes) == 1:
                dim.dim_value = sizes.pop()
    return bytes(model.SerializeToString())


def _half_products(file: Path) -> dict[str, str]:
    """Result of each product with a float16 matrix → the matrix's name."""
    from onnx import TensorProto

    from trio_deploy.runtimes.tensorrt.dry_run.rules import read_graph

    graph = read_graph(file).graph
    weights = {
        tensor.name: tensor.name
        for tensor in graph.initializer
        if tensor.data_type == TensorProto.FLOAT16 and len(tensor.dims) > 1
    }
    found: dict[str, str] = {}
    for node in graph.node:
        weight = next((weights[name] for name in node.input if name in weights), None)
        if weight is not None and node.op_type == "Transpose":
            weights[node.output[0]] = weight
        elif weight is not None and node.op_type in ("MatMul", "Gemm", "Conv"):
            found[node.output[0]] = weight
    return found


def _parser_error(error: Any) -> str:
    name = error.node_name() if hasattr(error, "node_name") else ""
    operator = error.node_operator() if hasattr(error, "node_operator") else ""
    if not name and not operator:
        return f"{error.desc()} (node {error.node()})"
    return f"{error.desc()} (node {name or error.node()}, {operator or 'unknown operator'})"
