"""TensorRT and CUDA acted out on a CPU, to test what runs around them. No proof of TensorRT itself.

What is true of the real ones and enforced here:

* Work is put on a stream and done when it is waited for: what is read too early is not there yet.
* Fresh memory holds garbage (NaN), scratch memory is overwritten by every run, and nothing may
  reach outside of its allocation.
* What is copied to the device is read when the stream comes to it, from pinned memory.
* While a stream is recorded nothing runs, and memory that is not pinned, allocation, waiting and a
  context's first run with a new shape are errors.
* Shapes must lie within the profile; every tensor needs an address, empty ones too; outputs that
  are inputs in place must have their address, all others must not overlap an input; inputs whose
  values make shapes are read from the host when shapes are inferred.
* An input that no node reads is none of the engine's.
* Each version has the names that its bindings have (`tests/runtimes/tensorrt/tensorrt_api.json`)
  and the types: before TensorRT 10 int64 is int32.

Engines compute with ONNX Runtime on the graph that they were "built" from.
"""

from __future__ import annotations

import ctypes
import enum
import hashlib
import itertools
import json
import sys
import time
import types
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

_ALIGNED = 256
SCRATCH = 4096  # what every engine says that it needs


# ------------------------------------------------------------------------------------------ CUDA


class cudaError_t(enum.IntEnum):
    cudaSuccess = 0
    cudaErrorInvalidValue = 1
    cudaErrorMemoryAllocation = 2
    cudaErrorStreamCaptureUnsupported = 900
    cudaErrorStreamCaptureInvalidated = 901
    cudaErrorInsufficientDriver = 35


class cudaMemcpyKind(enum.IntEnum):
    cudaMemcpyHostToHost = 0
    cudaMemcpyHostToDevice = 1
    cudaMemcpyDeviceToHost = 2
    cudaMemcpyDeviceToDevice = 3


class cudaStreamCaptureMode(enum.IntEnum):
    cudaStreamCaptureModeGlobal = 0
    cudaStreamCaptureModeThreadLocal = 1


Work = Callable[[], None]


class Cuda(types.ModuleType):
    """cuda-python's `cuda.bindings.runtime` on the host's memory.

    Attributes:
        total: bytes of the "device".
        multiprocessors: how many it has switched on.
        launches: graphs started.
        fetched: sizes of what was copied to the host.
        allocations: device memory, address → array.
        recordable: whether streams can be recorded.
    """

    cudaError_t = cudaError_t
    cudaMemcpyKind = cudaMemcpyKind
    cudaStreamCaptureMode = cudaStreamCaptureMode
    cudaStreamNonBlocking = 1

    def __init__(
        self, *, name: str, capability: tuple[int, int], total: int, multiprocessors: int
    ) -> None:
        super().__init__("cuda.bindings.runtime")
        self.total, self._name, self._capability = total, name, capability
        self.multiprocessors = multiprocessors
        self.allocations: dict[int, np.ndarray] = {}
        self.pinned: dict[int, np.ndarray] = {}
        self.queue: list[Work] = []
        self.recording: list[Work] | None = None
        self.launches = 0
        self.fetched: list[int] = []
        self.recordable = True
        self._handles = itertools.count(1)
        self._graphs: dict[int, list[Work]] = {}
        self._events: dict[int, float] = {}

    # memory

    def used(self) -> int:
        return sum(array.nbytes for array in self.allocations.values())

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int | None]:
        if self.recording is not None:
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if self.used() + size > self.total:
            return cudaError_t.cudaErrorMemoryAllocation, None
        whole = np.full(size + _ALIGNED, 0xFF, np.uint8)  # NaN in every float type
        skip = -whole.ctypes.data % _ALIGNED
        array = whole[skip : skip + size]
        self.allocations[array.ctypes.data] = array
        return cudaError_t.cudaSuccess, array.ctypes.data

    def cudaFree(self, address: int) -> tuple[cudaError_t]:
        self.flush()
        del self.allocations[address]
        return (cudaError_t.cudaSuccess,)

    def cudaMallocHost(self, size: int) -> tuple[cudaError_t, int]:
        array = np.zeros(size, np.uint8)
        self.pinned[array.ctypes.data] = array
        return cudaError_t.cudaSuccess, array.ctypes.data

    def cudaFreeHost(self, address: int) -> tuple[cudaError_t]:
        del self.pinned[address]
        return (cudaError_t.cudaSuccess,)

    def cudaMemGetInfo(self) -> tuple[cudaError_t, int, int]:
        return cudaError_t.cudaSuccess, self.total - self.used(), self.total

    def device_bytes(self, address: int, nbytes: int) -> np.ndarray:
        """Bytes of the device's memory, which must lie in one allocation."""
        return _inside(self.allocations, address, nbytes, "device memory")

    def is_device(self, address: int) -> bool:
        return any(a <= address < a + array.nbytes for a, array in self.allocations.items())

    # copies

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> tuple[cudaError_t]:
        if kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            to, come = self.device_bytes(target, nbytes), self.device_bytes(source, nbytes)
            self.put(lambda: np.copyto(to, come))
            return (cudaError_t.cudaSuccess,)
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        host = source if to_device else target
        pinned = any(a <= host < a + array.nbytes for a, array in self.pinned.items())
        assert pinned or not to_device, "pageable memory may be read when it has changed"
        if self.recording is not None and not pinned:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        device = self.device_bytes(target if to_device else source, nbytes)
        there = (
            _inside(self.pinned, host, nbytes, "pinned memory") if pinned else _view(host, nbytes)
        )
        if to_device:
            self.put(lambda: np.copyto(device, there))
        else:

            def fetch() -> None:
                self.fetched.append(nbytes)
                np.copyto(there, device)

            self.put(fetch)
            if not pinned:
                self.flush()
        return (cudaError_t.cudaSuccess,)

    def cudaMemcpy2DAsync(
        self,
        target: int,
        target_pitch: int,
        source: int,
        source_pitch: int,
        width: int,
        height: int,
        kind: int,
        stream: int,
    ) -> tuple[cudaError_t]:
        assert kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if width > min(target_pitch, source_pitch):
            return (cudaError_t.cudaErrorInvalidValue,)
        to = self._lines(target, target_pitch, width, height)
        come = self._lines(source, source_pitch, width, height)
        self.put(lambda: np.copyto(to, come))
        return (cudaError_t.cudaSuccess,)

    def cudaMemsetAsync(
        self, target: int, value: int, nbytes: int, stream: int
    ) -> tuple[cudaError_t]:
        whole = self.device_bytes(target, nbytes)
        self.put(lambda: whole.fill(value))
        return (cudaError_t.cudaSuccess,)

    def cudaMemset2DAsync(
        self, target: int, pitch: int, value: int, width: int, height: int, stream: int
    ) -> tuple[cudaError_t]:
        if width > pitch:
            return (cudaError_t.cudaErrorInvalidValue,)
        lines = self._lines(target, pitch, width, height)
        self.put(lambda: lines.fill(value))
        return (cudaError_t.cudaSuccess,)

    def _lines(self, address: int, pitch: int, width: int, height: int) -> np.ndarray:
        whole = self.device_bytes(address, pitch * (height - 1) + width)
        return np.lib.stride_tricks.as_strided(whole, (height, width), (pitch, 1))

    # streams, events, graphs

    def put(self, work: Work) -> None:
        (self.queue if self.recording is None else self.recording).append(work)

    def flush(self) -> None:
        while self.queue:
            self.queue.pop(0)()

    def cudaStreamCreateWithFlags(self, flags: int) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, next(self._handles)

    def cudaStreamDestroy(self, stream: int) -> tuple[cudaError_t]:
        return (cudaError_t.cudaSuccess,)

    def cudaStreamSynchronize(self, stream: int) -> tuple[cudaError_t]:
        if self.recording is not None:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.flush()
        return (cudaError_t.cudaSuccess,)

    def cudaEventCreate(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, next(self._handles)

    def cudaEventRecord(self, event: int, stream: int) -> tuple[cudaError_t]:
        def note() -> None:
            self._events[event] = time.perf_counter()

        self.put(note)
        return (cudaError_t.cudaSuccess,)

    def cudaEventSynchronize(self, event: int) -> tuple[cudaError_t]:
        self.flush()
        return (cudaError_t.cudaSuccess,)

    def cudaEventElapsedTime(self, start: int, stop: int) -> tuple[cudaError_t, float]:
        return cudaError_t.cudaSuccess, 1e3 * (self._events[stop] - self._events[start])

    def cudaEventDestroy(self, event: int) -> tuple[cudaError_t]:
        return (cudaError_t.cudaSuccess,)

    def cudaStreamBeginCapture(self, stream: int, mode: int) -> tuple[cudaError_t]:
        if not self.recordable:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        self.recording = []
        return (cudaError_t.cudaSuccess,)

    def cudaStreamEndCapture(self, stream: int) -> tuple[cudaError_t, int]:
        graph, self.recording = self.recording, None
        assert graph is not None
        handle = next(self._handles)
        self._graphs[handle] = graph
        return cudaError_t.cudaSuccess, handle

    def cudaGraphInstantiate(self, graph: int, flags: int) -> tuple[cudaError_t, int]:
        handle = next(self._handles)
        self._graphs[handle] = list(self._graphs[graph])
        return cudaError_t.cudaSuccess, handle

    def cudaGraphDestroy(self, graph: int) -> tuple[cudaError_t]:
        del self._graphs[graph]
        return (cudaError_t.cudaSuccess,)

    cudaGraphExecDestroy = cudaGraphDestroy

    def cudaGraphLaunch(self, graph: int, stream: int) -> tuple[cudaError_t]:
        self.launches += 1
        for work in self._graphs[graph]:
            self.put(work)
        return (cudaError_t.cudaSuccess,)

    # the rest

    def cudaSetDevice(self, number: int) -> tuple[cudaError_t]:
        return (cudaError_t.cudaSuccess,)

    def cudaGetDeviceProperties(self, number: int) -> tuple[cudaError_t, Any]:
        major, minor = self._capability
        properties = types.SimpleNamespace(
            name=self._name.encode(),
            major=major,
            minor=minor,
            multiProcessorCount=self.multiprocessors,
            totalGlobalMem=self.total,
        )
        return cudaError_t.cudaSuccess, properties

    def cudaDriverGetVersion(self) -> tuple[cudaError_t, int]:
        return cudaError_t.cudaSuccess, 12040

    def cudaGetLastError(self) -> tuple[cudaError_t]:
        return (cudaError_t.cudaSuccess,)

    def cudaGetErrorName(self, status: int) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, cudaError_t(status).name.encode()

    def cudaGetErrorString(self, status: int) -> tuple[cudaError_t, bytes]:
        return cudaError_t.cudaSuccess, cudaError_t(status).name[9:].encode()


class Driver:
    """libcuda with one GPU, or with none."""

    def __init__(self, gpus: int = 1, status: int = 0) -> None:
        self._gpus, self._status = gpus, status

    def cuInit(self, flags: int) -> int:
        return self._status

    def cuDeviceGetCount(self, count: Any) -> int:
        count._obj.value = self._gpus
        return 0


def _inside(memory: dict[int, np.ndarray], address: int, nbytes: int, what: str) -> np.ndarray:
    for start, array in memory.items():
        if start <= address < start + array.nbytes:
            offset = address - start
            assert offset + nbytes <= array.nbytes, f"{nbytes} bytes reach beyond {what}"
            return array[offset : offset + nbytes]
    raise AssertionError(f"{address:#x} is not {what}")


def _view(address: int, nbytes: int) -> np.ndarray:
    return np.frombuffer((ctypes.c_byte * nbytes).from_address(address), np.uint8)


# -------------------------------------------------------------------------------------- TensorRT

_KINDS = {
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.INT64: ("INT64", np.int64),
    TensorProto.INT32: ("INT32", np.int32),
    TensorProto.BOOL: ("BOOL", np.bool_),
}
_LAYERS = {
    "Cast": "CAST",
    "Constant": "CONSTANT",
    "MatMul": "MATRIX_MULTIPLY",
    "Shape": "SHAPE",
}
# What hands values on to a shape, and which inputs of which operators take a shape.
_PASS_ON = set(
    "Add Sub Mul Div Cast Concat Gather Identity Max Min Reshape Squeeze Unsqueeze".split()
)
_TAKE_SHAPE = {
    "Range": (0, 1, 2),
    "ConstantOfShape": (0,),
    "Expand": (1,),
    "Reshape": (1,),
    "Slice": (1, 2, 3, 4),
    "Tile": (1,),
    "TopK": (1,),
}


def make(version: str, cuda: Cuda) -> types.ModuleType:
    """A module `tensorrt` of a version."""
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    release = tuple(int(part) for part in version.split(".")[:2])
    old, new = release < (10, 0), release >= (11, 0)
    trt.spoiled = {}
    """Graph name → output that its engine gets wrong."""
    trt.needs = {}
    """Graph name → bytes of scratch memory without which no tactic takes one of its nodes."""
    trt.says = []
    """(severity, message) that every build says before anything else."""

    def enumeration(name: str, members: str) -> Any:
        return enum.IntEnum(name, members.split(), start=0)

    trt.DataType = enumeration(
        "DataType", "FLOAT HALF INT8 INT32 BOOL UINT8" + ("" if old else " INT64 BF16")
    )
    trt.TensorIOMode = enumeration("TensorIOMode", "NONE INPUT OUTPUT")
    trt.TensorLocation = enumeration("TensorLocation", "DEVICE HOST")
    trt.MemoryPoolType = enumeration("MemoryPoolType", "WORKSPACE DLA_MANAGED_SRAM TACTIC_DRAM")
    trt.TacticSource = enumeration(
        "TacticSource",
        ("" if new else "CUBLAS CUBLAS_LT CUDNN ") + "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
    )
    trt.LayerType = enumeration(
        "LayerType", "CONSTANT SHAPE CAST MATRIX_MULTIPLY ELEMENTWISE RECURRENCE TRIP_LIMIT"
    )
    trt.NetworkDefinitionCreationFlag = enumeration(
        "NetworkDefinitionCreationFlag",
        " ".join((["EXPLICIT_BATCH"] if not new else []) + ([] if old else ["STRONGLY_TYPED"])),
    )
    trt.BuilderFlag = enumeration(
        "BuilderFlag", "DEBUG TF32" + ("" if new else " FP16 OBEY_PRECISION_CONSTRAINTS")
    )
    if old:
        trt.PreviewFeature = enumeration("PreviewFeature", "PROFILE_SHARING_0806")
    else:
        trt.ExecutionContextAllocationStrategy = enumeration(
            "ExecutionContextAllocationStrategy", "STATIC ON_PROFILE_CHANGE USER_MANAGED"
        )

        class IProgressMonitor:
            def __init__(self) -> None:
                self.constructed = True

        trt.IProgressMonitor = IProgressMonitor

    class ILogger:
        INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)

        def __init__(self) -> None:
            self.constructed = True

    trt.ILogger = ILogger

    def dtype(kind: int) -> Any:
        name = _KINDS[kind][0]
        return getattr(trt.DataType, "INT32" if old and name == "INT64" else name)

    class ITensor:
        def __init__(self, info: onnx.ValueInfoProto, shapes: set[str]) -> None:
            self.name = info.name
            self.kind = info.type.tensor_type.elem_type
            self.dtype = dtype(self.kind)
            dims = info.type.tensor_type.shape.dim
            self.shape = tuple(d.dim_value if d.HasField("dim_value") else -1 for d in dims)
            self.is_shape_tensor = info.name in shapes

    class ILayer:
        def __init__(self, operator: str, inputs: list[Any], outputs: list[Any]) -> None:
            self.type = getattr(trt.LayerType, _LAYERS.get(operator, "ELEMENTWISE"))
            self._inputs, self._outputs = inputs, outputs
            self.num_inputs, self.num_outputs = len(inputs), len(outputs)
            self.precision: Any = None
            self.output_types: dict[int, Any] = {}

        def get_input(self, number: int) -> Any:
            return self._inputs[number]

        def get_output(self, number: int) -> Any:
            return self._outputs[number]

        if not new:

            def set_output_type(self, number: int, kind: Any) -> None:
                self.output_types[number] = kind

    class INetworkDefinition:
        def __init__(self, flags: int) -> None:
            self.flags = flags
            self.path: Path | None = None
            self.inputs: list[Any] = []
            self.layers: list[ILayer] = []

        @property
        def num_inputs(self) -> int:
            return len(self.inputs)

        @property
        def num_layers(self) -> int:
            return len(self.layers)

        def get_input(self, number: int) -> Any:
            return self.inputs[number]

        def get_layer(self, number: int) -> ILayer:
            return self.layers[number]

    class IOptimizationProfile:
        def __init__(self) -> None:
            self.shapes: dict[str, list[Any]] = {}
            self.values: dict[str, list[Any]] = {}

        def set_shape(self, input: str, min: Any, opt: Any, max: Any) -> None:
            if any(not a <= b <= c for a, b, c in zip(min, opt, max, strict=True)):
                raise RuntimeError(f"bounds of {input} do not rise")
            self.shapes[input] = [list(min), list(opt), list(max)]

        def set_shape_input(self, input: str, min: Any, opt: Any, max: Any) -> None:
            self.values[input] = [list(min), list(opt), list(max)]

    class ITimingCache:
        def __init__(self, content: bytes) -> None:
            self.content = content

        def serialize(self) -> bytes:
            return self.content + b"+"

    class IBuilderConfig:
        def __init__(self) -> None:
            self.flags = {trt.BuilderFlag.TF32}
            self.pools: dict[Any, int] = {}
            self.profiles: list[IOptimizationProfile] = []
            self.sources = (1 << len(trt.TacticSource)) - 1
            self.cache: ITimingCache | None = None
            self.preview: set[Any] = set()

        if not old:
            progress_monitor: Any = None

        def set_flag(self, flag: Any) -> None:
            self.flags.add(flag)

        def clear_flag(self, flag: Any) -> None:
            self.flags.discard(flag)

        def set_memory_pool_limit(self, pool: Any, pool_size: int) -> None:
            self.pools[pool] = pool_size

        def get_tactic_sources(self) -> int:
            return self.sources

        def set_tactic_sources(self, tactic_sources: int) -> bool:
            self.sources = tactic_sources
            return True

        def create_timing_cache(self, serialized_timing_cache: bytes) -> ITimingCache:
            return ITimingCache(serialized_timing_cache)

        def set_timing_cache(self, cache: ITimingCache, ignore_mismatch: bool) -> bool:
            if cache.content.startswith(b"other"):
                return False
            self.cache = cache
            return True

        def add_optimization_profile(self, profile: IOptimizationProfile) -> int:
            self.profiles.append(profile)
            return len(self.profiles) - 1

        def set_preview_feature(self, feature: Any, enable: bool) -> None:
            self.preview.add(feature)

    class ParserError:
        def __init__(self, text: str) -> None:
            self._text = text

        def desc(self) -> str:
            return self._text

        def node(self) -> int:
            return 0

        if not old:

            def node_name(self) -> str:
                return "a_node"

            def node_operator(self) -> str:
                return "AnOperator"

    class OnnxParser:
        def __init__(self, network: INetworkDefinition, logger: ILogger) -> None:
            self._network = network
            self._errors: list[ParserError] = []

        def parse(self, model: bytes, path: str | None = None) -> bool:
            network = self._network
            proto = onnx.load_model_from_string(model)
            plugins = [node.op_type for node in proto.graph.node if node.domain]
            if plugins:
                self._errors.append(ParserError(f"Plugin not found: {plugins[0]}"))
                return False
            assert path is not None, "weights are looked for where the path says"
            network.path = Path(path).resolve()
            shapes = _shape_inputs(proto.graph)
            network.inputs = [ITensor(info, shapes) for info in proto.graph.input]
            inferred = onnx.shape_inference.infer_shapes(proto).graph
            weights = [
                onnx.helper.make_tensor_value_info(w.name, w.data_type, w.dims)
                for w in inferred.initializer
            ]
            values = [*inferred.value_info, *inferred.output, *weights]
            known = {
                v.name: ITensor(v, set()) for v in values if v.type.tensor_type.elem_type in _KINDS
            }
            known.update({tensor.name: tensor for tensor in network.inputs})
            network.layers = [
                ILayer(
                    node.op_type,
                    [known.get(name) for name in node.input],
                    [known[name] for name in node.output],
                )
                for node in inferred.node
                if all(name in known for name in node.output)
            ]
            return True

        @property
        def num_errors(self) -> int:
            return len(self._errors)

        def get_error(self, index: int) -> ParserError:
            return self._errors[index]

    class Builder:
        def __init__(self, logger: ILogger) -> None:
            assert logger.constructed
            self._logger: Any = logger

        def create_network(self, flags: int = 0) -> INetworkDefinition:
            return INetworkDefinition(flags)

        def create_builder_config(self) -> IBuilderConfig:
            return IBuilderConfig()

        def create_optimization_profile(self) -> IOptimizationProfile:
            return IOptimizationProfile()

        def build_serialized_network(self, network: Any, config: Any) -> bytes | None:
            trt.last = network, config
            flags = trt.NetworkDefinitionCreationFlag
            wanted = flags.EXPLICIT_BATCH if old else flags.STRONGLY_TYPED
            assert network.flags == 1 << wanted, "the wrong kind of network"
            workspace = config.pools.get(trt.MemoryPoolType.WORKSPACE, cuda.total)
            assert workspace > 0
            assert trt.BuilderFlag.TF32 not in config.flags
            monitor = None if old else config.progress_monitor
            if monitor is not None:
                assert monitor.constructed
                monitor.phase_start("building", None, 2)
                for step in range(2):
                    if not monitor.step_complete("building", step):
                        return None
                monitor.phase_finish("building")
            problem = _profile_problem(network, config.profiles)
            if problem:
                self._logger.log(ILogger.ERROR, problem)
                return None
            for severity, message in trt.says:
                self._logger.log(severity, message)
            needs = trt.needs.get(network.path.stem, 0)
            if needs > min(workspace, cuda.total):  # the words of TensorRT 10's log
                text = "UNSUPPORTED_STATE: Skipping tactic 0 due to insufficient memory on "
                text += f"requested size of {needs} detected for tactic 0x0000000000000000."
                self._logger.log(ILogger.WARNING, text)
                text = "Error Code 10: Internal Error (Could not find any implementation for node "
                self._logger.log(ILogger.ERROR, text + "{ForeignNode[a...b]}.)")
                return None
            self._logger.log(ILogger.INFO, f"built {network.path.name}")
            read = _read_names(onnx.load(network.path, load_external_data=False).graph)
            content = {
                "graph": str(network.path),
                "version": version,
                "inputs": {t.name: list(t.shape) for t in network.inputs if t.name in read},
                "values": [t.name for t in network.inputs if t.is_shape_tensor],
                "shared_profiles": not old or bool(config.preview),
                "profiles": [{"shapes": p.shapes, "values": p.values} for p in config.profiles],
            }
            text = json.dumps(content).encode()
            return hashlib.sha256(text).digest() + text

    class ICudaEngine:
        def __init__(self, content: dict[str, Any], logger: Any) -> None:
            self.logger = logger
            self.path = Path(content["graph"])
            graph = onnx.load(self.path, load_external_data=False).graph
            self.session: Any = None
            self.values, self.profiles = content["values"], content["profiles"]
            self.shared_profiles, self.contexts = content["shared_profiles"], 0
            self.inputs = {
                info.name: ITensor(info, set())
                for info in graph.input
                if info.name in content["inputs"]
            }
            for name, shape in content["inputs"].items():
                self.inputs[name].shape = tuple(shape)
            self.outputs = {info.name: ITensor(info, set()) for info in graph.output}
            self.tensors = {**self.inputs, **self.outputs}
            self.names = list(self.tensors)
            self.num_io_tensors = len(self.names)
            self.num_optimization_profiles = len(self.profiles)
            self.aliases = {
                node.output[0]: node.input[0]
                for node in graph.node
                if node.op_type == "TensorScatter"
            }

        def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if self.session is None:
                options = onnxruntime.SessionOptions()
                options.intra_op_num_threads, options.log_severity_level = 1, 4
                self.session = onnxruntime.InferenceSession(
                    str(self.path), options, providers=["CPUExecutionProvider"]
                )
            return dict(zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True))

        def get_tensor_name(self, index: int) -> str:
            return self.names[index]

        def get_tensor_mode(self, name: str) -> Any:
            modes = trt.TensorIOMode
            return modes.INPUT if name in self.inputs else modes.OUTPUT

        def get_tensor_dtype(self, name: str) -> Any:
            return self.tensors[name].dtype

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            return self.tensors[name].shape

        def get_tensor_location(self, name: str) -> Any:
            return trt.TensorLocation.HOST if name in self.values else trt.TensorLocation.DEVICE

        def _context(self) -> IExecutionContext:
            self.contexts += 1
            assert self.shared_profiles or self.contexts <= self.num_optimization_profiles
            return IExecutionContext(self)

        if old:

            def create_execution_context_without_device_memory(self) -> IExecutionContext:
                return self._context()

        else:

            def create_execution_context(self, strategy: Any) -> IExecutionContext:
                assert strategy == trt.ExecutionContextAllocationStrategy.USER_MANAGED
                return self._context()

        if release >= (10, 15):

            def get_aliased_input_tensor(self, name: str) -> str | None:
                return self.aliases.get(name)

        if release >= (10, 3):
            device_memory_size_v2 = SCRATCH
        if not new:
            device_memory_size = SCRATCH

    class IExecutionContext:
        def __init__(self, engine: ICudaEngine) -> None:
            self.engine = engine
            self.active_optimization_profile = 0
            self._shapes: dict[str, tuple[int, ...]] = {}
            self._addresses: dict[str, int] = {}
            self._found: dict[Any, dict[str, tuple[int, ...]]] = {}
            self._settled: Any = None  # the shapes of the last run that was not recorded
            self._lent: tuple[int, int] = (0, 0)

        if release >= (10, 3):

            def set_device_memory(self, memory: int, size: int) -> None:
                self._lend(memory, size)

        @property
        def device_memory(self) -> int:
            return self._lent[0]

        @device_memory.setter
        def device_memory(self, memory: int) -> None:
            self._lend(memory, SCRATCH)

        def _lend(self, memory: int, size: int) -> None:
            assert memory % _ALIGNED == 0
            assert size >= SCRATCH
            self._lent = (memory, size)

        def set_optimization_profile_async(self, profile_index: int, stream_handle: int) -> bool:
            if profile_index >= self.engine.num_optimization_profiles:
                raise RuntimeError("Error in set optimization profile async.")
            self.active_optimization_profile = profile_index
            self._shapes.clear()
            return True

        def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
            tensor = self.engine.inputs[name]
            profile = self.engine.profiles[self.active_optimization_profile]
            bounds = profile["shapes"].get(name, [list(tensor.shape)] * 3)
            if len(shape) != len(tensor.shape) or any(
                not least <= size <= most
                for least, size, most in zip(bounds[0], shape, bounds[2], strict=True)
            ):
                return self._fail(f"{name} {shape} is not within {bounds}")
            self._shapes[name] = tuple(shape)
            return True

        def set_tensor_address(self, name: str, memory: int) -> bool:
            if name not in self.engine.tensors or memory == 0:
                return self._fail(f"no address for {name}")
            self._addresses[name] = memory
            return True

        def infer_shapes(self) -> list[str]:
            missing = [n for n in self.engine.inputs if n not in self._shapes]
            return missing + [n for n in self.engine.values if n not in self._addresses]

        def get_tensor_shape(self, name: str) -> tuple[int, ...]:
            if name in self.engine.inputs:
                return self._shapes[name]
            return self._output_shapes()[name]

        def execute_async_v3(self, stream_handle: int) -> bool:
            engine = self.engine
            missing = self.infer_shapes() + [n for n in engine.names if n not in self._addresses]
            if missing:
                return self._fail(f"not set: {missing}")
            if not self._lent[0]:
                return self._fail("no device memory was given")
            state = self._key()
            if cuda.recording is not None and state != self._settled:
                return self._fail("operation not permitted when stream is capturing")
            self._settled = state
            shapes = {**self._shapes, **self._output_shapes()}
            memory = {
                name: self._memory(name, shapes[name])
                for name in engine.names
                if name not in engine.values
            }
            for output in engine.outputs:
                for name in engine.inputs:
                    if name in engine.values or not memory[name].size or not memory[output].size:
                        continue
                    shared = np.shares_memory(memory[output], memory[name])
                    wanted = engine.aliases.get(output) == name and release >= (10, 15)
                    if shared != wanted:
                        return self._fail(f"{output} and {name} share memory: {shared}")
            host = {name: self._host(name) for name in engine.values}
            scratch = cuda.device_bytes(*self._lent)

            def work() -> None:
                scratch.fill(0xAB)
                feeds = {
                    name: host[name] if name in host else _read(memory[name], tensor, shapes[name])
                    for name, tensor in engine.inputs.items()
                }
                found = engine._run(feeds)
                for name, value in found.items():
                    if trt.spoiled.get(engine.path.stem) == name:
                        value = value * 2 + 1
                    stored = _narrow(value, engine.outputs[name], old)
                    assert stored.nbytes == memory[name].nbytes, name
                    memory[name][:] = np.ascontiguousarray(stored).reshape(-1).view(np.uint8)

            cuda.put(work)
            return True

        def _key(self) -> Any:
            values = tuple(tuple(self._host(name)) for name in self.engine.values)
            return tuple(sorted(self._shapes.items())), values, self.active_optimization_profile

        def _host(self, name: str) -> np.ndarray:
            address = self._addresses[name]
            assert not cuda.is_device(address), f"{name} must be in the host's memory"
            tensor = self.engine.inputs[name]
            kind = np.int32 if old else _KINDS[tensor.kind][1]
            size = int(np.prod(self._shapes.get(name, tensor.shape), dtype=int))
            raw = _view(address, size * np.dtype(kind).itemsize)
            profile = self.engine.profiles[self.active_optimization_profile]["values"][name]
            value = raw.view(kind).astype(np.int64)
            assert (value >= profile[0]).all() and (value <= profile[2]).all(), name
            return value

        def _memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
            tensor = self.engine.tensors[name]
            kind = np.dtype(_KINDS[tensor.kind][1])
            item = 4 if old and kind == np.int64 else kind.itemsize
            return cuda.device_bytes(self._addresses[name], int(np.prod(shape, dtype=int)) * item)

        def _output_shapes(self) -> dict[str, tuple[int, ...]]:
            """By running on zeros, which real shape inference need not do."""
            key = self._key()
            if key not in self._found:
                feeds = {
                    name: self._host(name)
                    if name in self.engine.values
                    else np.zeros(self._shapes[name], _KINDS[tensor.kind][1])
                    for name, tensor in self.engine.inputs.items()
                }
                self._found[key] = {n: v.shape for n, v in self.engine._run(feeds).items()}
            return self._found[key]

        def _fail(self, message: str) -> bool:
            self.engine.logger.log(ILogger.ERROR, message)
            return False

    class Runtime:
        def __init__(self, logger: Any) -> None:
            assert logger.constructed
            self._logger = logger

        def deserialize_cuda_engine(self, serialized_engine: Any) -> ICudaEngine | None:
            raw = bytes(serialized_engine)
            if hashlib.sha256(raw[32:]).digest() != raw[:32]:
                self._logger.log(ILogger.ERROR, "Serialization assertion failed")
                return None
            content = json.loads(raw[32:])
            if content["version"] != version:
                self._logger.log(ILogger.ERROR, "the engine is of another version")
                return None
            if cuda.used() + len(raw) > cuda.total:
                self._logger.log(ILogger.ERROR, "Cuda Runtime (out of memory)")
                return None
            return ICudaEngine(content, self._logger)

    trt.Builder, trt.OnnxParser, trt.Runtime = Builder, OnnxParser, Runtime
    # What a program meets without constructing it, for the comparison with the bindings.
    trt.met = (
        INetworkDefinition,
        IBuilderConfig,
        IOptimizationProfile,
        ICudaEngine,
        IExecutionContext,
        ParserError,
        ITimingCache,
        ITensor,
        ILayer,
    )
    return trt


def _read(memory: np.ndarray, tensor: Any, shape: tuple[int, ...]) -> np.ndarray:
    kind = np.dtype(_KINDS[tensor.kind][1])
    narrowed = kind == np.int64 and tensor.dtype.name == "INT32"
    return memory.view(np.int32 if narrowed else kind).reshape(shape).astype(kind)


def _narrow(value: np.ndarray, tensor: Any, old: bool) -> np.ndarray:
    return value.astype(np.int32) if old and value.dtype == np.int64 else value


def _read_names(graph: onnx.GraphProto) -> set[str]:
    """What nodes read, those of loops included."""
    names: set[str] = set()
    for node in graph.node:
        names.update(node.input)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                names |= _read_names(attribute.g)
    return names | {output.name for output in graph.output}


def _shape_inputs(graph: onnx.GraphProto) -> set[str]:
    """Inputs of fixed size whose values become shapes."""
    known: dict[str, set[str]] = {
        info.name: {info.name}
        for info in graph.input
        if info.type.tensor_type.elem_type == TensorProto.INT64
        and all(d.HasField("dim_value") for d in info.type.tensor_type.shape.dim)
    }
    found: set[str] = set()

    def walk(nodes: Sequence[onnx.NodeProto]) -> None:
        for node in nodes:
            for place in _TAKE_SHAPE.get(node.op_type, ()):
                if place < len(node.input):
                    found.update(known.get(node.input[place], ()))
            if node.op_type in _PASS_ON:
                origins = set().union(*(known.get(name, set()) for name in node.input))
                known.update({name: origins for name in node.output if origins})
            for attribute in node.attribute:
                if attribute.type == onnx.AttributeProto.GRAPH:
                    walk(attribute.g.node)

    walk(graph.node)
    return found


def _profile_problem(network: Any, profiles: list[Any]) -> str:
    if not profiles:
        return "a network with dynamic inputs needs a profile"
    graph = onnx.load(network.path, load_external_data=False).graph
    caches = {node.input[0] for node in graph.node if node.op_type == "TensorScatter"}
    for tensor in network.inputs:
        if tensor.name in caches and tensor.shape[2] < 0:
            return f"KVCacheUpdate: {tensor.name} must have a fixed capacity"
        for profile in profiles:
            if -1 in tensor.shape and tensor.name not in profile.shapes:
                return f"no profile for {tensor.name}"
            for bound in profile.shapes.get(tensor.name, []):
                if any(
                    have not in (-1, size) for have, size in zip(tensor.shape, bound, strict=True)
                ):
                    return f"the profile of {tensor.name} contradicts its shape"
            if tensor.is_shape_tensor and tensor.name not in profile.values:
                return f"no values for {tensor.name}"
    return ""


# ------------------------------------------------------------------------------------ installing


class Simulation:
    """What `install` put in place.

    Attributes:
        tensorrt, cuda: the modules.
    """

    def __init__(self, tensorrt: Any, cuda: Cuda) -> None:
        self.tensorrt, self.cuda = tensorrt, cuda


def install(
    monkeypatch: pytest.MonkeyPatch,
    version: str = "10.3.0",
    *,
    gpu: str = "NVIDIA H200",
    capability: tuple[int, int] = (9, 0),
    memory: int = 2 << 30,
    multiprocessors: int = 132,
    old_cuda_python: bool = False,
) -> Simulation:
    """Let `import tensorrt` and cuda-python find the simulated ones for the time of a test."""
    from trio_deploy.runtimes.tensorrt import device as room

    cuda = Cuda(name=gpu, capability=capability, total=memory, multiprocessors=multiprocessors)
    tensorrt = make(version, cuda)
    monkeypatch.setitem(sys.modules, "tensorrt", tensorrt)
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.__path__, bindings.__path__ = [], []
    monkeypatch.setitem(sys.modules, "cuda", package)
    if old_cuda_python:
        monkeypatch.setitem(sys.modules, "cuda.cudart", cuda)
    else:
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setattr(room, "load_driver", Driver)
    return Simulation(tensorrt, cuda)
