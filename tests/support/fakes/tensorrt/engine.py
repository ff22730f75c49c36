"""Engines, which compute with ONNX Runtime on the graph they were built from."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

from tests.support.fakes.tensorrt.build import ILogger
from tests.support.fakes.tensorrt.cuda import ALIGNMENT, view
from tests.support.fakes.tensorrt.graphs import in_place_outputs
from tests.support.fakes.tensorrt.versions import KINDS, Simulated

#: Bytes of scratch memory that every engine asks for.
SCRATCH = 4096


class Runtime:
    _simulated: Simulated

    def __init__(self, logger: Any) -> None:
        assert logger.constructed
        self._logger = logger

    def deserialize_cuda_engine(self, serialized_engine: Any) -> Any:
        raw = bytes(serialized_engine)
        if hashlib.sha256(raw[32:]).digest() != raw[:32]:
            self._logger.log(ILogger.ERROR, "Serialization assertion failed")
            return None
        content = json.loads(raw[32:])
        if content["version"] != self._simulated.version:
            self._logger.log(ILogger.ERROR, "the engine is of another version")
            return None
        if self._simulated.cuda.used() + len(raw) > self._simulated.cuda.total:
            self._logger.log(ILogger.ERROR, "Cuda Runtime (out of memory)")
            return None
        return self._simulated.new("ICudaEngine", content, self._logger)


class ICudaEngine:
    _simulated: Simulated
    device_memory_size = SCRATCH
    device_memory_size_v2 = SCRATCH

    def __init__(self, content: dict[str, Any], logger: Any) -> None:
        new = self._simulated.new
        self.logger = logger
        self.path = Path(content["graph"])
        graph = onnx.load(self.path, load_external_data=False).graph
        self.session: Any = None
        self.values, self.profiles = content["values"], content["profiles"]
        self.shared_profiles, self.contexts = content["shared_profiles"], 0
        self.inputs = {
            info.name: new("ITensor", info, set())
            for info in graph.input
            if info.name in content["inputs"]
        }
        for name, shape in content["inputs"].items():
            self.inputs[name].shape = tuple(shape)
        self.outputs = {info.name: new("ITensor", info, set()) for info in graph.output}
        self.tensors = {**self.inputs, **self.outputs}
        self.names = list(self.tensors)
        self.num_io_tensors = len(self.names)
        self.num_optimization_profiles = len(self.profiles)
        self.aliases = in_place_outputs(graph)

    def get_tensor_name(self, index: int) -> str:
        return self.names[index]

    def get_tensor_mode(self, name: str) -> Any:
        modes = self._simulated.module.TensorIOMode
        return modes.INPUT if name in self.inputs else modes.OUTPUT

    def get_tensor_dtype(self, name: str) -> Any:
        return self.tensors[name].dtype

    def get_tensor_shape(self, name: str) -> Any:
        return self.tensors[name].shape

    def get_tensor_location(self, name: str) -> Any:
        locations = self._simulated.module.TensorLocation
        return locations.HOST if name in self.values else locations.DEVICE

    def get_aliased_input_tensor(self, name: str) -> str | None:
        return self.aliases.get(name)

    def create_execution_context_without_device_memory(self) -> Any:
        return self._context()

    def create_runtime_config(self) -> Any:
        return self._simulated.new("IRuntimeConfig")

    def create_execution_context(self, strategy: Any) -> Any:
        if self._simulated.rtx:
            context = self._context()
            context._config = strategy
            strategy = strategy.allocation
            assert context._config.cache is not None
        strategies = self._simulated.module.ExecutionContextAllocationStrategy
        assert strategy == strategies.USER_MANAGED
        return context if self._simulated.rtx else self._context()

    def _context(self) -> Any:
        self.contexts += 1
        assert self.shared_profiles or self.contexts <= self.num_optimization_profiles
        return self._simulated.new("IExecutionContext", self)

    def _run(self, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        if self.session is None:
            options = onnxruntime.SessionOptions()
            options.intra_op_num_threads, options.log_severity_level = 1, 4
            self.session = onnxruntime.InferenceSession(
                str(self.path), options, providers=["CPUExecutionProvider"]
            )
        return dict(zip(self.outputs, self.session.run(list(self.outputs), feeds), strict=True))


class IRuntimeCache:
    """Kernels of the GPU at hand, by the shapes that they are for."""

    _simulated: Simulated

    def __init__(self) -> None:
        self.kernels: list[str] = []

    def serialize(self) -> bytes:
        return json.dumps([self._simulated.cuda.gpu, self.kernels]).encode()

    def deserialize(self, blob: bytes) -> bool:
        try:
            name, kernels = json.loads(blob)
        except ValueError:
            return False
        if name != self._simulated.cuda.gpu:
            return False
        self.kernels = kernels
        return True


class IRuntimeConfig:
    _simulated: Simulated

    def __init__(self) -> None:
        self.allocation: Any = None
        self.cache: Any = None

    def set_execution_context_allocation_strategy(self, strategy: Any) -> None:
        self.allocation = strategy

    def create_runtime_cache(self) -> Any:
        return self._simulated.new("IRuntimeCache")

    def set_runtime_cache(self, cache: Any) -> bool:
        self.cache = cache
        return True

    def _compile(self, kernel: str) -> None:
        """Compile what a run needs, unless the cache has it."""
        if kernel not in self.cache.kernels:
            self.cache.kernels.append(kernel)
            self._simulated.module.compiled.append(kernel)


class IExecutionContext:
    _simulated: Simulated
    _config: Any = None

    def is_stream_capturable(self, stream: int) -> bool:
        return bool(self._simulated.module.recordable)

    def __init__(self, engine: ICudaEngine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._addresses: dict[str, int] = {}
        self._output_shapes_found: dict[Any, dict[str, tuple[int, ...]]] = {}
        self._last_state: Any = None  # the shapes of the last run that was not recorded
        self._scratch: tuple[int, int] = (0, 0)

    def set_device_memory(self, memory: int, size: int) -> None:
        self._set_scratch(memory, size)

    @property
    def device_memory(self) -> int:
        return self._scratch[0]

    @device_memory.setter
    def device_memory(self, memory: int) -> None:
        self._set_scratch(memory, SCRATCH)

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
            not least <= size <= largest
            for least, size, largest in zip(bounds[0], shape, bounds[2], strict=True)
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
        engine, cuda = self.engine, self._simulated.cuda
        missing = self.infer_shapes() + [n for n in engine.names if n not in self._addresses]
        if missing:
            return self._fail(f"not set: {missing}")
        if not self._scratch[0]:
            return self._fail("no device memory was given")
        state = self._state()
        if cuda.recording is not None and state != self._last_state:
            return self._fail("operation not permitted when stream is capturing")
        if self._config is not None:
            self._config._compile(f"{engine.path.stem} {state}")
        self._last_state = state
        shapes = {**self._shapes, **self._output_shapes()}
        memory = {
            name: self._device_memory(name, shapes[name])
            for name in engine.names
            if name not in engine.values
        }
        problem = self._overlap(memory)
        if problem:
            return self._fail(problem)
        host = {name: self._host_value(name) for name in engine.values}
        scratch = cuda.device_bytes(*self._scratch)

        def work() -> None:
            scratch.fill(0xAB)
            feeds = {
                name: host[name] if name in host else self._read(name, memory[name], shapes[name])
                for name in engine.inputs
            }
            for name, value in engine._run(feeds).items():
                if self._simulated.module.spoiled.get(engine.path.stem) == name:
                    value = value * 2 + 1
                self._write(name, memory[name], value)

        cuda.put(work)
        return True

    def _set_scratch(self, memory: int, size: int) -> None:
        assert memory % ALIGNMENT == 0
        assert size >= SCRATCH
        self._scratch = (memory, size)

    def _state(self) -> Any:
        """What shapes of outputs depend on."""
        values = tuple(tuple(self._host_value(name)) for name in self.engine.values)
        return tuple(sorted(self._shapes.items())), values, self.active_optimization_profile

    def _overlap(self, memory: dict[str, np.ndarray]) -> str:
        """Why outputs may not lie where they do; "" if they may.

        An output that updates an input in place must have its memory, every other none of an input.
        """
        engine = self.engine
        in_place = self._simulated.release >= (10, 15)
        for output in engine.outputs:
            for name in engine.inputs:
                if name in engine.values or not memory[name].size or not memory[output].size:
                    continue
                shared = np.shares_memory(memory[output], memory[name])
                if shared != (in_place and engine.aliases.get(output) == name):
                    return f"{output} and {name} share memory: {shared}"
        return ""

    def _host_value(self, name: str) -> np.ndarray:
        """Value of a shape tensor, which is read from the host's memory."""
        address = self._addresses[name]
        assert not self._simulated.cuda.is_device(address), f"{name} must be in the host's memory"
        tensor = self.engine.inputs[name]
        dtype = self._simulated.item_type(tensor.kind)
        size = int(np.prod(self._shapes.get(name, tensor.shape), dtype=int))
        value = view(address, size * dtype.itemsize).view(dtype).astype(np.int64)
        bounds = self.engine.profiles[self.active_optimization_profile]["values"][name]
        assert (value >= bounds[0]).all() and (value <= bounds[2]).all(), name
        return value

    def _device_memory(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        dtype = self._simulated.item_type(self.engine.tensors[name].kind)
        nbytes = int(np.prod(shape, dtype=int)) * dtype.itemsize
        return self._simulated.cuda.device_bytes(self._addresses[name], nbytes)

    def _read(self, name: str, memory: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
        kind = self.engine.inputs[name].kind
        return memory.view(self._simulated.item_type(kind)).reshape(shape).astype(KINDS[kind][1])

    def _write(self, name: str, memory: np.ndarray, value: np.ndarray) -> None:
        if self._simulated.old and value.dtype == np.int64:
            value = value.astype(np.int32)
        assert value.nbytes == memory.nbytes, name
        memory[:] = np.ascontiguousarray(value).reshape(-1).view(np.uint8)

    def _output_shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes of outputs: by running on zeros, which real shape inference need not do."""
        state = self._state()
        if state not in self._output_shapes_found:
            feeds = {
                name: self._host_value(name)
                if name in self.engine.values
                else np.zeros(self._shapes[name], KINDS[tensor.kind][1])
                for name, tensor in self.engine.inputs.items()
            }
            outputs = self.engine._run(feeds)
            self._output_shapes_found[state] = {n: v.shape for n, v in outputs.items()}
        return self._output_shapes_found[state]

    def _fail(self, message: str) -> bool:
        self.engine.logger.log(ILogger.ERROR, message)
        return False
