"""A GPU's memory, its one stream and CUDA graphs, over cuda-python.

All work of a pipeline is on one stream, so later work reads what earlier work wrote, and freed
memory can be reused at once. It is cached for the next request, up to a limit (`allocator.py`).
"""

from __future__ import annotations

import ctypes
import importlib
import math
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from trio_deploy.errors import TrioError
from trio_deploy.runtimes.tensorrt.allocator import Pool

_DRIVER = "libcuda.so.1"
_ALIGNED = 256  # bytes, as cudaMalloc aligns
_PINNED = 64 << 20  # bytes of the host's memory that are kept for copies
_STAGED, _PIECE = 8 << 20, 2 << 20  # bytes of the upload buffer, and of one copy
_RESERVED = 256 << 20  # bytes left to the system where the GPU shares its memory
_MEMINFO = Path("/proc/meminfo")
_OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation
_OLD_DRIVER = 35  # cudaErrorInsufficientDriver


def load_driver() -> Any:
    """The driver's library, loaded by ctypes.

    Raises:
        OSError: there is none.
    """
    return ctypes.CDLL(_DRIVER)


def require_driver() -> None:
    """Check that there is a driver and a usable GPU.

    Raises:
        TrioError: no driver, or no GPU that it can use.
    """
    try:
        driver = load_driver()
    except OSError as error:
        raise TrioError(
            f"no NVIDIA driver was found ({error}): TensorRT needs an NVIDIA GPU and its driver; "
            "in a container start it with --gpus all; without a GPU "
            "`trio run --runtime onnxruntime` runs a bundle's graphs and `trio build --dry-run` "
            "checks them"
        ) from error
    status = driver.cuInit(0)
    count = ctypes.c_int(0)
    if status == 0:
        status = driver.cuDeviceGetCount(ctypes.byref(count))
    if status != 0 or count.value == 0:
        raise TrioError(
            f"the NVIDIA driver finds no GPU to use (CUDA error {status}): see nvidia-smi and "
            "CUDA_VISIBLE_DEVICES, or run with --runtime onnxruntime"
        )


def _cuda_runtime() -> Any:
    """cuda-python's runtime module: `cuda.bindings.runtime`, before 12.8 `cuda.cudart`."""
    for name in ("cuda.bindings.runtime", "cuda.cudart"):
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError:
            continue
    raise TrioError("cuda-python is not installed: pip install 'trio-deploy[tensorrt]'")


class DeviceArray:
    """An array in a GPU's memory, or a part of one: `array[a:b, :, :n]`.

    Attributes:
        strides: bytes from one entry to the next, per axis.
        address: address of the first entry.
    """

    def __init__(
        self,
        device: Device,
        shape: tuple[int, ...],
        dtype: np.dtype,
        block: object,
        address: int,
        strides: tuple[int, ...] | None = None,
    ) -> None:
        """Use `Device.empty`; `block` keeps the memory allocated."""
        self.device, self.shape, self.dtype = device, shape, dtype
        self.address = address
        self.strides = _strides(shape, dtype.itemsize) if strides is None else strides
        self._block = block

    @property
    def nbytes(self) -> int:
        """Bytes of the entries."""
        return math.prod(self.shape) * self.dtype.itemsize

    @property
    def contiguous(self) -> bool:
        """Whether the entries are adjacent in memory."""
        return self.strides == _strides(self.shape, self.dtype.itemsize) or not self.nbytes

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: slice | tuple[slice, ...]) -> DeviceArray:
        slices = index if isinstance(index, tuple) else (index,)
        shape, address = list(self.shape), self.address
        for axis, part in enumerate(slices):
            start, stop, step = part.indices(self.shape[axis])
            if step != 1:
                raise IndexError("parts of device memory have no steps")
            shape[axis] = max(stop - start, 0)
            address += start * self.strides[axis]
        return DeviceArray(
            self.device, tuple(shape), self.dtype, self._block, address, self.strides
        )


class _Block:
    """Memory that returns to the pool when this object is deleted."""

    def __init__(self, give_back: Callable[[int, int], None], address: int, size: int) -> None:
        self.address = address
        weakref.finalize(self, give_back, address, size).atexit = False


@dataclass(frozen=True)
class Event:
    """A point in the stream's work."""

    handle: Any
    device: Device

    def since(self, earlier: Event) -> float:
        """Seconds on the device from `earlier` to this event; waits for it."""
        call = self.device.call
        call("cudaEventSynchronize", self.handle)
        return float(call("cudaEventElapsedTime", earlier.handle, self.handle)) / 1e3


class Graph:
    """A recorded CUDA graph, launched as a whole."""

    def __init__(self, device: Device, executable: Any) -> None:
        self._device, self._executable = device, executable
        device.own(self, "cudaGraphExecDestroy", executable)

    def launch(self) -> None:
        """Put the work on the stream."""
        self._device.call("cudaGraphLaunch", self._executable, self._device.stream)


class Device:
    """The first GPU that CUDA lists.

    Attributes:
        name: CUDA's name, such as "NVIDIA H200".
        compute_capability: such as "9.0".
        multiprocessors: number of active multiprocessors.
        driver: newest CUDA version that the driver supports, such as "12.4".
        stream: the one CUDA stream of all work.
    """

    def __init__(self) -> None:
        """Open the GPU.

        Raises:
            TrioError: no driver, no GPU, or cuda-python is not installed.
        """
        require_driver()
        self._cuda = _cuda_runtime()
        self.call("cudaSetDevice", 0)
        properties = self.call("cudaGetDeviceProperties", 0)
        self.name = properties.name.decode().rstrip("\0")
        self.compute_capability = f"{properties.major}.{properties.minor}"
        self.multiprocessors = int(properties.multiProcessorCount)
        version = int(self.call("cudaDriverGetVersion"))
        self.driver = f"{version // 1000}.{version % 1000 // 10}"
        flag = int(self._cuda.cudaStreamNonBlocking)
        self.stream = self.call("cudaStreamCreateWithFlags", flag)
        # A Jetson's GPU uses the system's memory, which must not run out.
        self._integrated = bool(getattr(properties, "integrated", 0))
        self.own(self, "cudaStreamDestroy", self.stream)
        self._blocks = Pool(self.freeing("cudaFree"), self.memory()[1] // 4)
        self._pinned = Pool(self.freeing("cudaFreeHost"), _PINNED)
        self._staging: _Staging | None = None
        # Memory in use keeps the device alive, so all memory is cached by then.
        for pool in (self._blocks, self._pinned):
            weakref.finalize(self, pool.release).atexit = False

    def call(self, name: str, *arguments: Any) -> Any:
        """Call a function of the CUDA runtime; return its results without the status.

        Raises:
            TrioError: the call failed.
        """
        status, *values = getattr(self._cuda, name)(*arguments)
        if int(status) != 0:
            raise TrioError(f"{name} failed: {self._reason(status)}")
        return values[0] if values else None

    def own(self, holder: object, destroy: str, handle: Any) -> None:
        """Call `destroy` on `handle` when `holder` is deleted."""
        weakref.finalize(holder, getattr(self._cuda, destroy), handle).atexit = False

    def freeing(self, free: str) -> Callable[[Sequence[int]], None]:
        """Function that frees memory after the stream's work; it keeps no reference to self."""
        cuda, stream = self._cuda, self.stream

        def action(addresses: Sequence[int]) -> None:
            cuda.cudaStreamSynchronize(stream)
            for address in addresses:
                getattr(cuda, free)(address)

        return action

    @property
    def cache_limit(self) -> int:
        """Maximum bytes in use and cached together; see `allocator.Pool`."""
        return self._blocks.cache_limit

    @cache_limit.setter
    def cache_limit(self, nbytes: int) -> None:
        self._blocks.cache_limit = nbytes

    @property
    def cached_bytes(self) -> int:
        """Bytes of freed memory that are cached for the next request."""
        return self._blocks.cached_bytes

    def memory(self) -> tuple[int, int]:
        """Free and total bytes; cached memory counts as used."""
        status, free, total = self._cuda.cudaMemGetInfo()
        if int(status) != 0:
            raise TrioError(f"cudaMemGetInfo failed: {self._reason(status)}")
        return int(free), int(total)

    # --------------------------------------------------------------------------------- memory

    def empty(self, shape: tuple[int, ...], dtype: Any, use: str = "a tensor") -> DeviceArray:
        """An uninitialised array, aligned to 256 bytes.

        Args:
            use: purpose of the memory, for messages.

        Raises:
            TrioError: there is no room.
        """
        dtype = np.dtype(dtype)
        block = self.block(math.prod(shape) * dtype.itemsize, use)
        return DeviceArray(self, tuple(shape), dtype, block, block.address)

    def empties(
        self, shapes: Sequence[tuple[int, ...]], dtype: Any, use: str = "tensors"
    ) -> list[DeviceArray]:
        """Several uninitialised arrays of one type in one block, freed together; see `empty`."""
        dtype = np.dtype(dtype)
        sizes = [-(-math.prod(shape) * dtype.itemsize // _ALIGNED) * _ALIGNED for shape in shapes]
        block, places = self.block(sum(sizes), use), np.cumsum([0, *sizes]).tolist()
        return [
            DeviceArray(self, tuple(shape), dtype, block, block.address + place)
            for shape, place in zip(shapes, places[:-1], strict=True)
        ]

    def block(self, nbytes: int, use: str) -> _Block:
        """Memory of at least `nbytes` bytes and never 0; see `empty`."""
        size = self._blocks.rounded(nbytes)
        found = self._blocks.reuse(size)
        if found is None:
            found = self._new(size, use), size
            self._blocks.add(size)
        return _Block(self._give_back, *found)

    def release(self) -> None:
        """Free all cached memory."""
        self.synchronize()
        self._blocks.release()

    def _new(self, size: int, use: str) -> int:
        for attempt in range(2):
            if self._leaves_room(size):
                status, address = self._cuda.cudaMalloc(size)
                if int(status) == 0:
                    return int(address)
                self._cuda.cudaGetLastError()  # the next call would return the error again
                if int(status) != _OUT_OF_MEMORY:
                    raise TrioError(f"cudaMalloc failed: {self._reason(status)}")
            if attempt == 0:
                self.release()
        free, total = self.memory()
        raise TrioError(
            f"the GPU is out of memory: {format_mib(size)} are needed for {use}, and "
            f"{format_mib(free)} of {format_mib(total)} are free; ask for fewer tokens, rows or a "
            "lower budget, or end other programs on this GPU"
        )

    def _leaves_room(self, size: int) -> bool:
        """Whether the system keeps some memory, where the GPU uses the system's memory.

        There cudaMalloc fails only when the system is out of memory, and before that the kernel
        kills processes. CUDA does not count memory of the page cache as free; the kernel does.
        """
        if not self._integrated:
            return True
        free = max(self.memory()[0], _available())
        return size <= free - _RESERVED

    def _give_back(self, address: int, size: int) -> None:
        self._blocks.give_back(address, size)

    def _give_back_pinned(self, address: int, size: int) -> None:
        self._pinned.give_back(address, size)

    def pinned(self, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
        """An array in pinned host memory, which a CUDA graph may read and write."""
        dtype = np.dtype(dtype)
        nbytes = math.prod(shape) * dtype.itemsize
        size = self._pinned.rounded(nbytes)
        found = self._pinned.reuse(size)
        if found is None:
            found = int(self.call("cudaMallocHost", size)), size
            self._pinned.add(size)
        buffer = (ctypes.c_byte * max(1, nbytes)).from_address(found[0])
        weakref.finalize(buffer, self._give_back_pinned, *found).atexit = False
        return np.frombuffer(buffer, np.uint8)[:nbytes].view(dtype).reshape(shape)

    # --------------------------------------------------------------------------------- copies

    def upload(self, array: np.ndarray, into: DeviceArray | None = None) -> DeviceArray:
        """Copy to the device, contiguous; the array may be changed or freed afterwards."""
        array = np.ascontiguousarray(array)
        target = self.empty(array.shape, array.dtype) if into is None else into
        if array.nbytes:
            # CUDA may read pageable memory after the call returns, so it reads a staged copy.
            self._staging = self._staging or _Staging(self)
            self._staging.send(self, array.reshape(-1).view(np.uint8), target.address)
        return target

    def download(self, array: DeviceArray, into: np.ndarray | None = None) -> np.ndarray:
        """Copy to the host and wait for the copy."""
        source = array
        if not array.contiguous:
            source = self.empty(array.shape, array.dtype)
            self.copy(source, array)
        target = np.empty(array.shape, array.dtype) if into is None else into
        self._copy(target.ctypes.data, source.address, array.nbytes, "DeviceToHost")
        self.synchronize()
        return target

    def fetch(self, array: DeviceArray, into: np.ndarray) -> None:
        """Copy to `pinned` host memory without waiting."""
        self._copy(into.ctypes.data, array.address, array.nbytes, "DeviceToHost")

    def send(self, array: np.ndarray, address: int) -> None:
        """Copy from `pinned` host memory without waiting."""
        self._copy(address, array.ctypes.data, array.nbytes, "HostToDevice")

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Copy between device arrays, or parts of them, of the same shape and type."""
        if target.shape != source.shape or target.dtype != source.dtype:
            raise ValueError(f"cannot copy {source.shape} to {target.shape}")
        kind = self._cuda.cudaMemcpyKind.cudaMemcpyDeviceToDevice
        if target.contiguous and source.contiguous:  # cudaMemcpy2D limits a line to 2 GiB
            self._copy(target.address, source.address, target.nbytes, "DeviceToDevice")
            return
        plan = _planes(target.shape, target.dtype.itemsize, target.strides, source.strides)
        for (to, start), (to_pitch, from_pitch), width, height in plan:
            self.call(
                "cudaMemcpy2DAsync",
                target.address + to,
                to_pitch,
                source.address + start,
                from_pitch,
                width,
                height,
                kind,
                self.stream,
            )

    def clear(self, array: DeviceArray) -> None:
        """Fill with zero bytes."""
        if not array.nbytes:
            return
        if array.contiguous:
            self.call("cudaMemsetAsync", array.address, 0, array.nbytes, self.stream)
            return
        for (at,), (pitch,), width, height in _planes(
            array.shape, array.dtype.itemsize, array.strides
        ):
            self.call("cudaMemset2DAsync", array.address + at, pitch, 0, width, height, self.stream)

    def _copy(self, target: int, source: int, nbytes: int, kind: str) -> None:
        if nbytes:
            kind = getattr(self._cuda.cudaMemcpyKind, f"cudaMemcpy{kind}")
            self.call("cudaMemcpyAsync", target, source, nbytes, kind, self.stream)

    # --------------------------------------------------------------------------------- stream

    def synchronize(self) -> None:
        """Wait for all work on the stream.

        Raises:
            TrioError: some of the work failed.
        """
        self.call("cudaStreamSynchronize", self.stream)

    def event(self) -> Event:
        """Event at the present end of the stream's work."""
        handle = self.call("cudaEventCreate")
        event = Event(handle, self)
        self.own(event, "cudaEventDestroy", handle)
        self.call("cudaEventRecord", handle, self.stream)
        return event

    def record(self, work: Callable[[], None]) -> Graph:
        """Record the work that a function puts on the stream as a CUDA graph, without running it.

        Raises:
            TrioError: some of the work cannot be recorded.
        """
        mode = self._cuda.cudaStreamCaptureMode.cudaStreamCaptureModeThreadLocal
        pools = (self._blocks, self._pinned)
        for pool in pools:  # a finalizer may run at any time; freeing would invalidate the graph
            pool.recording = True
        try:
            self.call("cudaStreamBeginCapture", self.stream, mode)
            try:
                work()
            except BaseException:
                self._cuda.cudaStreamEndCapture(self.stream)
                self._cuda.cudaGetLastError()
                raise
            graph = self.call("cudaStreamEndCapture", self.stream)
        finally:
            for pool in pools:
                pool.recording = False
        try:
            return Graph(self, self.call("cudaGraphInstantiate", graph, 0))
        finally:
            self.call("cudaGraphDestroy", graph)

    def _reason(self, status: Any) -> str:
        name = self._cuda.cudaGetErrorName(status)[1]
        text = self._cuda.cudaGetErrorString(status)[1]
        reason = f"{bytes(text).decode()} ({bytes(name).decode()})"
        if int(status) == _OLD_DRIVER:
            reason += "; cuda-python must not be newer than the driver's CUDA: for CUDA 12 (JetPack"
            reason += " 6) pip install 'cuda-python<13'"
        return reason


class _Staging:
    """A ring of pinned memory through which uploads pass in pieces.

    The memory of a piece is reused once the stream has passed the event after its copy.
    """

    def __init__(self, device: Device) -> None:
        """Allocate pinned memory, which is freed with the device."""
        self._address = int(device.call("cudaMallocHost", _STAGED))
        weakref.finalize(device, device.freeing("cudaFreeHost"), [self._address]).atexit = False
        self._memory = np.ctypeslib.as_array((ctypes.c_uint8 * _STAGED).from_address(self._address))
        self._next = 0
        self._pending: deque[tuple[int, int, Any]] = deque()  # start, end, event
        self._events: list[Any] = []

    def send(self, device: Device, source: np.ndarray, target: int) -> None:
        """Copy bytes to a device address."""
        for start in range(0, len(source), _PIECE):
            piece = source[start : start + _PIECE]
            place = self._room(device, len(piece))
            self._memory[place : place + len(piece)] = piece
            device.send(self._memory[place : place + len(piece)], target + start)
            if not self._events:
                self._events.append(device.call("cudaEventCreate"))
                device.own(device, "cudaEventDestroy", self._events[-1])
            event = self._events.pop()
            device.call("cudaEventRecord", event, device.stream)
            self._pending.append((place, place + len(piece), event))

    def _room(self, device: Device, size: int) -> int:
        """Offset at which `size` bytes may be written, after earlier copies from there."""
        start = self._next if self._next + size <= _STAGED else 0
        end = start + size
        while self._pending and any(a < end and start < b for a, b, _ in self._pending):
            *_, event = self._pending.popleft()
            device.call("cudaEventSynchronize", event)
            self._events.append(event)
        self._next = -(-end // _ALIGNED) * _ALIGNED
        return start


def _available() -> int:
    """Bytes of system memory available to a process; 0: unknown."""
    try:
        lines = _MEMINFO.read_text().splitlines()
    except OSError:
        return 0
    fields = {name: rest.split() for name, _, rest in (line.partition(":") for line in lines)}
    return int(fields["MemAvailable"][0]) << 10 if "MemAvailable" in fields else 0


def _strides(shape: Sequence[int], itemsize: int) -> tuple[int, ...]:
    strides, step = [], itemsize
    for size in reversed(shape):
        strides.append(step)
        step *= size
    return tuple(reversed(strides))


def _planes(
    shape: Sequence[int], itemsize: int, *strides: tuple[int, ...]
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], int, int]]:
    """Cut arrays of one shape into planes of `height` lines of `width` bytes.

    Yields:
        offset per array, pitch (bytes from line to line) per array, width, height.
    """
    if not math.prod(shape):
        return
    width = itemsize
    axes: list[tuple[int, tuple[int, ...]]] = []  # (size, strides), outermost first
    for axis, size in enumerate(shape):
        if size > 1:
            axes.append((size, tuple(s[axis] for s in strides)))
    while axes and all(step == width for step in axes[-1][1]):
        width *= axes.pop()[0]
    # Merge neighbouring axes without a gap between them.
    merged: list[tuple[int, tuple[int, ...]]] = []
    for size, steps in axes:
        if merged and merged[-1][1] == tuple(size * step for step in steps):
            merged[-1] = (merged[-1][0] * size, steps)
        else:
            merged.append((size, steps))
    height, pitches = merged.pop() if merged else (1, (width,) * len(strides))
    for place in np.ndindex(*(size for size, _ in merged)):
        offsets = tuple(
            sum(number * steps[which] for number, (_, steps) in zip(place, merged, strict=True))
            for which in range(len(strides))
        )
        yield offsets, pitches, width, height


def format_mib(size: int) -> str:
    """Format a number of bytes in MiB, so that what is needed and what is free compare."""
    return f"{size / 2**20:,.0f} MiB"
