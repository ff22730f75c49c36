"""TensorRT 8.6, 10.x and 11.x behind one interface: every difference between them is here.

Read from the bindings of 8.6.1, 10.0, 10.3, 10.15, 11.0 and 11.4 (docs/tensorrt.md;
`tests/runtimes/tensorrt/test_bindings.py` compares this file with any bindings that are installed):

=====================================  ======================================================
`EXPLICIT_BATCH`                       needed in 8.6, the only mode in 10, gone in 11
`STRONGLY_TYPED`                       from 10; in 8.6 layers that must stay float32 are told so,
                                       under `OBEY_PRECISION_CONSTRAINTS` (gone in 11, with the
                                       builder flags `FP16`, `BF16`, `INT8`)
INT64, BF16                            from 10; 8.6 narrows INT64 to INT32
`TacticSource.CUBLAS`, `CUDNN` …       gone in 11
`PROFILE_SHARING_0806`                 to be asked for in 8.6; several contexts then share a profile
`IProgressMonitor`                     from 10
`get_aliased_input_tensor`             from 10.15: a KV cache is updated in place
`IAttention`                           read from 10.15 on: one fused kernel or no engine, unless it
                                       is told that it may be split up
`device_memory_size`, contexts         `…_v2` from 10.3 and alone in 11; contexts without memory
without memory                         of their own by `ExecutionContextAllocationStrategy` from 10
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
import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.files import format_bytes

OLDEST = (8, 6)
Log = Callable[[str, str], None]
"""Takes a severity (`ERROR`, `WARNING`, `INFO`, `VERBOSE`) and a message."""
Progress = Callable[[str, int, int], None]
"""Takes the name of a phase, the steps done and all of its steps."""
Bounds = tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
"""Least, typical and largest shape (or values) of an input."""

_DTYPES = {
    "FLOAT": np.dtype(np.float32),
    "HALF": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "INT64": np.dtype(np.int64),
    "INT32": np.dtype(np.int32),
    "BOOL": np.dtype(np.bool_),
}
_SEVERITIES = ("INTERNAL_ERROR", "ERROR", "WARNING", "INFO", "VERBOSE")
_LIBRARIES = ("CUBLAS", "CUBLAS_LT", "CUDNN")  # tactics that need libraries beside TensorRT's own
# Layers whose precision is not theirs to choose: they hold no arithmetic.
_WITHOUT_PRECISION = (
    *("CONSTANT", "SHAPE", "ASSERTION", "RECURRENCE", "TRIP_LIMIT", "ITERATOR", "LOOP_OUTPUT"),
    *("CONDITION", "CONDITIONAL_INPUT", "CONDITIONAL_OUTPUT"),
)
_NO_ROOM = re.compile(
    r"out ?of ?memory|memory ?allocation|could not be allocated|unable to allocate", re.IGNORECASE
)
_REMEMBERED = 20  # of the last messages, for an error
# What a tactic that was left out asked for: "on requested size of N", which is in bytes for some
# kinds of layers and in MiB for others, and "Tactic Device request: N MB".
_ASKED = re.compile(r"requested size of (\d+)|device request: (\d+) ?MB", re.IGNORECASE)
_NO_TACTIC = "could not find any implementation"
# TensorRT keeps the first logger of a process and writes to it as long as the process lives.
_LOGGERS: list[Any] = []


class OutOfDeviceMemory(TrioError):
    """TensorRT asked for memory of the GPU that there is not."""


class ProfileLike(Protocol):
    """What one optimisation profile admits.

    Attributes:
        name: for messages.
        shapes: of every input with an axis that is not fixed.
        values: of every input whose values make shapes (`width` of a selection).
    """

    @property
    def name(self) -> str: ...

    @property
    def shapes(self) -> Mapping[str, Bounds]: ...

    @property
    def values(self) -> Mapping[str, Bounds]: ...


@dataclass(frozen=True)
class Built:
    """A serialized engine, and the timing cache that its build leaves."""

    plan: memoryview
    timing_cache: bytes


@dataclass(frozen=True)
class IoTensor:
    """An engine's input or output.

    Attributes:
        dtype: as it lies in memory: int32 where the graph says int64 and TensorRT narrows it.
        shape: -1 where an axis is not fixed.
        on_host: read from the host's memory when shapes are inferred.
        alias: the input whose memory this output must have, "" where there is none.
    """

    name: str
    dtype: np.dtype
    shape: tuple[int, ...]
    is_input: bool
    on_host: bool
    alias: str


def load() -> TensorRT:
    """The installed TensorRT.

    The driver is asked first: without one `tensorrt.Runtime` ends the process (8.6).

    Raises:
        TrioError: no CUDA driver, or TensorRT is missing, broken or older than 8.6.
    """
    from trio_deploy.runtimes.tensorrt.device import require_driver

    require_driver()
    try:
        module = importlib.import_module("tensorrt")
    except ModuleNotFoundError as error:
        if error.name not in ("tensorrt", "tensorrt_bindings", "tensorrt_libs"):
            raise
        raise TrioError(
            "TensorRT is not installed: pip install 'trio-deploy[tensorrt]' (on a Jetson it comes "
            "with JetPack: use a Python environment with --system-site-packages)"
        ) from error
    except (ImportError, OSError) as error:
        raise TrioError(f"TensorRT is installed, but does not load: {error}") from error
    return TensorRT(module)


class TensorRT:
    """One version of TensorRT.

    Attributes:
        module: the `tensorrt` module.
        version: as it calls itself, "10.3.0".
        strongly_typed: whether a graph's types are the engine's.
        narrows_int64: whether int64 inputs and outputs become int32.
        updates_in_place: whether a cache's past and present are one buffer (KVCacheUpdate).
    """

    def __init__(self, module: Any) -> None:
        """Wrap a module that is called `tensorrt`.

        Raises:
            TrioError: a version that is too old.
        """
        self.module = module
        self.version = str(module.__version__)
        self.release = tuple(int(n) for n in re.findall(r"\d+", self.version)[:2])
        if self.release < OLDEST:
            raise TrioError(
                f"TensorRT {self.version} is too old: {OLDEST[0]}.{OLDEST[1]} or later is needed"
            )
        self.strongly_typed = self.release >= (10, 0)
        self.narrows_int64 = self.release < (10, 0)
        self.updates_in_place = self.release >= (10, 15)
        self._messages: deque[str] = deque(maxlen=_REMEMBERED)
        self._asked: deque[str] = deque(maxlen=_REMEMBERED)  # warnings of tactics without memory
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
        *,
        workspace: int | None = None,
        dtype: str = "float32",
        timing_cache: bytes = b"",
        log: Log | None = None,
        progress: Progress | None = None,
    ) -> Built:
        """Make an engine of a graph for this machine's GPU.

        Args:
            profiles: in the order in which the engine numbers them.
            workspace: bytes that a layer's tactic may use; None: as much as the GPU has. A ceiling
                and no allocation, it leaves tactics out; fused nodes hold their intermediate
                results there.
            dtype: the graph's float type; before TensorRT 10 it must be told.
            timing_cache: what an earlier build on this GPU left; one of another GPU is ignored.
            log: takes all that the builder says.
            progress: called as the builder goes on (from TensorRT 10); raising in it ends the
                build and is raised here.

        Raises:
            TrioError: the graph cannot be parsed, an input has no profile, or nothing was built.
        """
        trt = self.module
        if dtype == "bfloat16" and not self.strongly_typed:
            raise TrioError(f"TensorRT {self.version} has no bfloat16: export with --dtype float16")
        self._interrupts.clear()
        with _Listening(self, log):
            builder = self._made(trt.Builder, self.logger)
            network = builder.create_network(self._network_flags())
            self._parse(network, onnx, profiles)
            self._allow_decomposition(network)
            config = builder.create_builder_config()
            if workspace is not None:
                config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, workspace)
            # float32 means float32: selections compare cosines with a threshold.
            config.clear_flag(trt.BuilderFlag.TF32)
            self._without_libraries(config)
            if not self.strongly_typed:  # the rule from 10 on: contexts may share a profile
                config.set_preview_feature(trt.PreviewFeature.PROFILE_SHARING_0806, True)
            if dtype == "float16" and not self.strongly_typed:
                config.set_flag(trt.BuilderFlag.FP16)
                config.set_flag(trt.BuilderFlag.OBEY_PRECISION_CONSTRAINTS)
                self._keep_float32(network, onnx)
            for profile in profiles:
                self._add_profile(builder, network, config, profile, onnx.name)
            cache = self._timing_cache(config, timing_cache)
            monitor = None
            if progress is not None and hasattr(trt, "IProgressMonitor"):
                monitor = _monitor(trt, progress, self._interrupts)
                config.progress_monitor = monitor
            plan = builder.build_serialized_network(network, config)
            if monitor is not None and monitor.error is not None:
                raise monitor.error
            if self._interrupts:
                raise self._interrupts[0]
            if plan is None:
                advice = self._memory_advice(workspace)
                raise TrioError(
                    f"TensorRT could not build {onnx.name}: {self._last_errors()}{advice}"
                )
            return Built(memoryview(plan), bytes(memoryview(cache.serialize())))

    def _network_flags(self) -> int:
        flag = self.module.NetworkDefinitionCreationFlag
        return 1 << int(flag.STRONGLY_TYPED if self.strongly_typed else flag.EXPLICIT_BATCH)

    def _parse(self, network: Any, onnx: Path, profiles: Sequence[ProfileLike]) -> None:
        parser = self._made(self.module.OnnxParser, network, self.logger)
        if parser.parse(_graph(onnx, profiles), str(onnx)):  # weights lie where the path says
            return
        errors = [_parser_error(parser.get_error(i)) for i in range(parser.num_errors)]
        raise TrioError(
            f"TensorRT {self.version} cannot parse {onnx.name}: "
            + ("; ".join(errors) or self._last_errors())
        )

    def _allow_decomposition(self, network: Any) -> None:
        """Where no fused kernel takes an attention's type, head size or mask, several may do."""
        kind = getattr(self.module.LayerType, "ATTENTION_INPUT", None)
        for number in range(network.num_layers if kind is not None else 0):
            layer = network.get_layer(number)
            if layer.type == kind:
                layer.__class__ = self.module.IAttentionInputLayer  # bindings call it an ILayer
                layer.attention.decomposable = True

    def _without_libraries(self, config: Any) -> None:
        """Only TensorRT's own kernels: engines then need no cuBLAS or cuDNN beside it."""
        sources = self.module.TacticSource
        chosen = config.get_tactic_sources()
        for name in _LIBRARIES:
            if hasattr(sources, name):
                chosen &= ~(1 << int(getattr(sources, name)))
        config.set_tactic_sources(chosen)

    def _keep_float32(self, network: Any, onnx: Path) -> None:
        """What the graph computes in float32 stays so (before strong typing).

        Layers that read float32 are told to compute in it, comparisons too; results in float32 to
        be stored so. As in trtexec, what makes shapes is told nothing; casts, and layers of indices
        alone, have no precision.

        Raises:
            TrioError: TensorRT takes products with float16 weights for float32, all would be slow.
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
                        f"TensorRT {self.version} takes the product with {products[name]} in "
                        f"{onnx.name} for float32, though it is float16 in the graph, and would "
                        "run all of it in float32: use TensorRT 10 or later, or export with "
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
                    raise TrioError(f"{where} does not say which shapes {name} may have")
                self._bound(made.set_shape, name, profile.shapes[name], where)
            if tensor.is_shape_tensor:
                if name not in profile.values:
                    raise TrioError(f"{where} does not say which values {name} may have")
                self._bound(made.set_shape_input, name, profile.values[name], where)
        if config.add_optimization_profile(made) < 0:
            raise TrioError(f"TensorRT refuses {where}: {self._last_errors()}")

    def _bound(self, setter: Callable[..., None], name: str, bounds: Bounds, where: str) -> None:
        try:
            setter(name, *bounds)
        except RuntimeError as error:  # of the bindings
            raise TrioError(f"TensorRT refuses {name} {bounds} in {where}: {error}") from error

    def _timing_cache(self, config: Any, content: bytes) -> Any:
        for start in (content, b""):
            cache = config.create_timing_cache(start)
            if cache is not None and config.set_timing_cache(cache, False):
                return cache
        raise TrioError(f"TensorRT makes no timing cache: {self._last_errors()}")

    # -------------------------------------------------------------------------------- running

    def deserialize(self, plan: bytes | memoryview, name: str) -> Any:
        """The engine (ICudaEngine) of a plan.

        Args:
            name: of the file, for messages.

        Raises:
            TrioError: it does not load.
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
        """Inputs and outputs of an engine in its order."""
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
        """What a context needs while it runs, at the largest shapes of any profile."""
        if hasattr(engine, "device_memory_size_v2"):
            return int(engine.device_memory_size_v2)
        return int(engine.device_memory_size)

    def context(self, engine: Any) -> Any:
        """An execution context that must be given memory by `lend`.

        Raises:
            OutOfDeviceMemory: the device has no room for its state.
            TrioError: there is none for another reason.
        """
        self.forget_errors()
        strategies = getattr(self.module, "ExecutionContextAllocationStrategy", None)
        if strategies is not None:
            context = engine.create_execution_context(strategies.USER_MANAGED)
        else:
            context = engine.create_execution_context_without_device_memory()
        if context is None:
            raise self.failed("TensorRT makes no execution context")
        return context

    def lend(self, context: Any, address: int, size: int) -> None:
        """Give a context device memory to work in, aligned to 256 bytes."""
        if hasattr(context, "set_device_memory"):
            context.set_device_memory(address, size)
        else:
            context.device_memory = address

    # -------------------------------------------------------------------------------- messages

    def _made(self, kind: Callable[..., Any], *arguments: Any) -> Any:
        """Construct, where the bindings raise TypeError for an object that could not be made."""
        self.forget_errors()
        try:
            return kind(*arguments)
        except TypeError as error:
            raise TrioError(
                f"TensorRT {self.version} does not start on this machine: {self._last_errors()}"
            ) from error

    def _say(self, severity: str, message: str) -> None:
        if severity in ("INTERNAL_ERROR", "ERROR"):
            self._messages.append(message.strip())
        if severity != "VERBOSE" and _ASKED.search(message):
            self._asked.append(message.strip())
        for log in self._logs:
            log(severity, message)

    def forget_errors(self) -> None:
        """What TensorRT said until now is not the reason of what fails next."""
        self._messages.clear()
        self._asked.clear()

    def failed(self, what: str) -> TrioError:
        """The error for what TensorRT did not do, with what it said last: `OutOfDeviceMemory`
        where it says that it lacks memory."""
        text = f"{what}: {self._last_errors()}"
        return OutOfDeviceMemory(text) if _NO_ROOM.search(text) else TrioError(text)

    def last_errors(self) -> str:
        """What TensorRT said last, for a message."""
        return self._last_errors()

    def _memory_advice(self, workspace: int | None) -> str:
        """What to do about a node that no tactic takes, "" where memory was not the reason.

        What was said last is of the node at which the build ended.
        """
        if _NO_TACTIC not in " ".join(self._messages).lower():
            return ""
        allowed = "" if workspace is None else f"workspace_gib {workspace / 2**30:g} of the target"
        if self._asked:
            asked, said = _asked_bytes(self._asked[-1]), self._asked[-1].splitlines()[0]
            asks = f"; a tactic asked for {format_bytes(asked)} of scratch memory"
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


def _asked_bytes(message: str) -> int:
    """What a tactic asked for, by what TensorRT says of leaving it out."""
    found = _ASKED.search(message)
    assert found is not None
    if found[2] is not None:
        return int(found[2]) * 2**20
    size = int(found[1])
    return size * 2**20 if size < 2**20 else size  # nothing smaller than a MiB is left out


def _whole_gib(size: int) -> int:
    return -(-size // 2**30)


class _Listening:
    """Sends what TensorRT says to a function while inside."""

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
            except Exception:  # the bindings would print it and go on
                return
            except BaseException as error:  # Ctrl-C: raised again when the build is over
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
            except BaseException as error:  # Ctrl-C too; nothing may pass through TensorRT
                self.error = self.error or error

    return Monitor()


def _graph(file: Path, profiles: Sequence[ProfileLike]) -> bytes:
    """A graph whose axes of one size in all profiles are fixed: KVCacheUpdate asks for it."""
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
    """Results of products with float16 matrices, and the names of those."""
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
