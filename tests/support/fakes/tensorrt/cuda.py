"""cuda-python and libcuda, simulated in the host's memory.

* Work is put on a stream and done when the stream is waited for.
* Fresh memory holds NaN, and nothing may reach outside of its allocation.
* What is copied to the device is read when the stream comes to it, from pinned memory.
* While a stream is recorded nothing runs; memory that is not pinned, allocation and waiting are
  errors.
"""

from __future__ import annotations

import ctypes
import enum
import itertools
import time
import types
from collections.abc import Callable
from typing import Any

import numpy as np

ALIGNMENT = 256


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
        gpu: name of the GPU.
        total: bytes of device memory.
        multiprocessors: number that are switched on.
        launches: number of graphs started.
        fetched: bytes of each copy to the host.
        allocations: address → array, device memory.
        pinned: address → array, pinned memory of the host.
        queue: work of the stream that has not run.
        recording: work recorded so far; None: the stream is not recorded.
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
        self.total, self.gpu, self._capability = total, name, capability
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
        """Bytes of device memory that are allocated."""
        return sum(array.nbytes for array in self.allocations.values())

    def cudaMalloc(self, size: int) -> tuple[cudaError_t, int | None]:
        if self.recording is not None:
            return cudaError_t.cudaErrorStreamCaptureUnsupported, None
        if self.used() + size > self.total:
            return cudaError_t.cudaErrorMemoryAllocation, None
        whole = np.full(size + ALIGNMENT, 0xFF, np.uint8)  # NaN in every float type
        skip = -whole.ctypes.data % ALIGNMENT
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
        """Bytes of device memory, which must lie in one allocation."""
        return _inside(self.allocations, address, nbytes, "device memory")

    def is_device(self, address: int) -> bool:
        return any(a <= address < a + array.nbytes for a, array in self.allocations.items())

    # copies

    def cudaMemcpyAsync(
        self, target: int, source: int, nbytes: int, kind: int, stream: int
    ) -> tuple[cudaError_t]:
        if kind == cudaMemcpyKind.cudaMemcpyDeviceToDevice:
            written, read = self.device_bytes(target, nbytes), self.device_bytes(source, nbytes)
            self.put(lambda: np.copyto(written, read))
            return (cudaError_t.cudaSuccess,)
        to_device = kind == cudaMemcpyKind.cudaMemcpyHostToDevice
        host = source if to_device else target
        pinned = any(a <= host < a + array.nbytes for a, array in self.pinned.items())
        assert pinned or not to_device, "pageable memory may be read when it has changed"
        if self.recording is not None and not pinned:
            return (cudaError_t.cudaErrorStreamCaptureUnsupported,)
        device = self.device_bytes(target if to_device else source, nbytes)
        if pinned:
            host_bytes = _inside(self.pinned, host, nbytes, "pinned memory")
        else:
            host_bytes = view(host, nbytes)
        if to_device:
            self.put(lambda: np.copyto(device, host_bytes))
        else:

            def fetch() -> None:
                self.fetched.append(nbytes)
                np.copyto(host_bytes, device)

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
        written = self._lines(target, target_pitch, width, height)
        read = self._lines(source, source_pitch, width, height)
        self.put(lambda: np.copyto(written, read))
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
        """Put work on the stream, or into the graph that is recorded."""
        (self.queue if self.recording is None else self.recording).append(work)

    def flush(self) -> None:
        """Do the stream's work."""
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
        def record_time() -> None:
            self._events[event] = time.perf_counter()

        self.put(record_time)
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

    # device and errors

    def cudaSetDevice(self, number: int) -> tuple[cudaError_t]:
        return (cudaError_t.cudaSuccess,)

    def cudaGetDeviceProperties(self, number: int) -> tuple[cudaError_t, Any]:
        major, minor = self._capability
        properties = types.SimpleNamespace(
            name=self.gpu.encode(),
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
    """Bytes at an address that lie in one of the arrays."""
    for start, array in memory.items():
        if start <= address < start + array.nbytes:
            offset = address - start
            assert offset + nbytes <= array.nbytes, f"{nbytes} bytes reach beyond {what}"
            return array[offset : offset + nbytes]
    raise AssertionError(f"{address:#x} is not {what}")


def view(address: int, nbytes: int) -> np.ndarray:
    """Bytes of the host's memory."""
    return np.frombuffer((ctypes.c_byte * nbytes).from_address(address), np.uint8)
