"""What a device keeps of the memory that requests give back: enough, and no more than its bound."""

from __future__ import annotations

import gc
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.fakes.tensorrt.cuda import Cuda
from tests.support.fakes.tensorrt.install import install
from trio_deploy import TrioError
from trio_deploy.runtimes.tensorrt import device as room
from trio_deploy.runtimes.tensorrt.allocator import SLACK
from trio_deploy.runtimes.tensorrt.device import Device, DeviceArray

MIB = 1 << 20


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Device:
    install(monkeypatch)
    return Device()


def cuda_of(device: Device) -> Cuda:
    cuda: Any = device._cuda
    assert isinstance(cuda, Cuda)
    return cuda


def request(device: Device, text: int, visual: int, new: int) -> None:
    """Buffers of a request of a 7B model's proportions in 1/32 of its size, two caches by turns."""
    width = 256
    hidden, caches = device.empty((text + visual, width), np.uint8), []
    for layers, kept in zip((1, 9, 5, 17), (1, 0.16, 0.094, 0.038), strict=True):
        tokens = text + int(kept * visual)
        caches += [
            device.empties([(tokens + new, width)] * (2 * layers), np.uint8) for _ in range(2)
        ]
        presents = device.empties([(tokens, width)] * (2 * layers), np.uint8)
        hidden = device.empty((tokens, width), np.uint8)
        assert len(presents) == 2 * layers and hidden.nbytes


def lengths(count: int) -> Iterator[tuple[int, int, int]]:
    chosen = random.Random(0)
    for _ in range(count):
        visual = chosen.choice((576, 1176, 1776, 2340, 2928))
        yield chosen.randint(10, 500), visual, chosen.choice((16, 64, 128, 256))


def test_hundreds_of_requests_of_all_lengths_stay_within_the_bound(device: Device) -> None:
    cuda = cuda_of(device)
    request(device, 500, 2928, 256)
    largest = cuda.used()
    device.release()
    device.cache_limit = int(SLACK * largest)
    taken = []
    for each in lengths(400):
        request(device, *each)
        taken.append(cuda.used())
        assert device.cached_bytes == cuda.used(), "nothing is in use"
    assert max(taken) <= device.cache_limit


def test_requests_of_one_length_ask_for_nothing_new(device: Device) -> None:
    cuda = cuda_of(device)
    device.cache_limit = 64 * MIB
    for each in lengths(20):
        request(device, *each)
    request(device, 300, 2928, 64)
    before = set(cuda.allocations)
    for _ in range(5):
        request(device, 300, 2928, 64)
    assert set(cuda.allocations) == before


def test_one_request_beyond_the_bound_is_kept_for_its_like(device: Device) -> None:
    cuda = cuda_of(device)
    device.cache_limit = MIB
    request(device, 500, 2928, 256)
    largest = cuda.used()
    for each in lengths(10):
        request(device, *each)
        assert largest / 2 < cuda.used() <= SLACK * largest


def test_a_device_that_was_full_is_not_filled_again_by_spare_blocks(device: Device) -> None:
    device.cache_limit = MIB
    request(device, 500, 2928, 256)
    device.release()
    request(device, 10, 576, 16)
    small = cuda_of(device).used()
    for _ in range(5):
        request(device, 10, 576, 16)
        assert cuda_of(device).used() <= SLACK * small
    assert small < 16 * MIB


def test_a_spare_block_that_is_much_too_large_is_left_alone(device: Device) -> None:
    large = device.empty((20 * MIB,), np.uint8).address
    assert device.empty((17 * MIB,), np.uint8).address == large
    assert device.empty((10 * MIB,), np.uint8).address != large


def test_the_smallest_block_that_will_do_is_taken(device: Device) -> None:
    arrays = [device.empty((size * MIB,), np.uint8) for size in (24, 20, 22)]
    addresses = {array.shape[0] // MIB: array.address for array in arrays}
    del arrays
    assert device.empty((20 * MIB - 5,), np.uint8).address == addresses[20]
    assert device.empty((21 * MIB,), np.uint8).address == addresses[22]


def test_what_was_not_asked_for_the_longest_goes_first(device: Device) -> None:
    device.cache_limit = 64 * MIB
    old, used = (device.empty((size * MIB,), np.uint8) for size in (30, 20))
    place = used.address
    del old
    del used
    again = device.empty((20 * MIB,), np.uint8)
    assert again.address == place
    del again
    other = device.empty((40 * MIB,), np.uint8)
    assert cuda_of(device).used() == 60 * MIB, "the 30 MiB went"
    assert other.nbytes == 40 * MIB


def test_arrays_of_one_block_keep_it_together(device: Device) -> None:
    first, second = device.empties([(3, 5), (7,)], np.float16)
    assert first.address % 256 == second.address % 256 == 0
    assert second.address - first.address == 256
    place = first.address
    del first
    assert device.empty((512,), np.uint8).address != place, "it went while a part is in use"


def test_nothing_is_freed_while_a_stream_is_recorded(device: Device) -> None:
    cuda, arrays = cuda_of(device), [device.empty((4 * MIB,), np.uint8) for _ in range(4)]
    device.cache_limit = 0
    device._blocks._peak = 0  # as if nothing had ever been needed

    def work() -> None:
        arrays.clear()
        assert cuda.used() == 16 * MIB

    device.record(work)
    device.empty((4 * MIB,), np.uint8)
    gc.collect()
    assert cuda.used() <= 4 * MIB


# ------------------------------------------------------------------- memory shared with the system


@pytest.fixture
def jetson(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Device:
    """A GPU that takes the system's memory; the kernel has 300 MiB for whoever asks."""
    simulation = install(monkeypatch)
    properties = simulation.cuda.cudaGetDeviceProperties

    def integrated(number: int) -> Any:
        status, found = properties(number)
        found.integrated = 1
        return status, found

    monkeypatch.setattr(simulation.cuda, "cudaGetDeviceProperties", integrated)
    meminfo = tmp_path / "meminfo"
    meminfo.write_text(f"MemTotal: 7000000 kB\nMemFree: 1 kB\nMemAvailable: {300 << 10} kB\n")
    monkeypatch.setattr(room, "_MEMINFO", meminfo)
    simulation.cuda.total = 100 * MIB  # what CUDA counts, without the page cache
    return Device()


def test_a_shared_memory_is_not_taken_to_the_last(jetson: Device) -> None:
    assert jetson.empty((40 * MIB,), np.uint8).nbytes, "the page cache would give it up"
    with pytest.raises(TrioError, match="out of memory: 50 MiB are needed for a tensor"):
        jetson.empty((50 * MIB,), np.uint8)


def test_what_is_kept_goes_before_the_systems_memory_does(jetson: Device) -> None:
    kept = jetson.empty((10 * MIB,), np.uint8)
    del kept
    with pytest.raises(TrioError, match="out of memory"):
        jetson.empty((50 * MIB,), np.uint8)
    assert not cuda_of(jetson).used()


# ----------------------------------------------------------------------------------- uploads


def test_what_was_uploaded_may_be_changed_at_once(device: Device) -> None:
    """CUDA may read it when the stream comes to it; here it does."""
    values = np.arange(1000, dtype=np.float32)
    there = device.upload(values)
    values[:] = -1
    del values
    gc.collect()
    np.testing.assert_array_equal(device.download(there), np.arange(1000, dtype=np.float32))


def test_uploads_larger_than_the_ring_arrive_whole(device: Device) -> None:
    values = np.random.default_rng(0).integers(0, 255, 21 * MIB + 3, np.uint8)
    small = [np.full(number, number, np.int64) for number in range(1, 40)]
    there, arrays = device.upload(values), [device.upload(each) for each in small]
    np.testing.assert_array_equal(device.download(there), values)
    for array, each in zip(arrays, small, strict=True):
        np.testing.assert_array_equal(device.download(array), each)


def test_an_upload_waits_for_its_place_in_the_ring_and_for_no_more(
    device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    cuda, waited = cuda_of(device), []
    wait = cuda.cudaEventSynchronize
    monkeypatch.setattr(cuda, "cudaEventSynchronize", lambda e: waited.append(e) or wait(e))
    kept: list[DeviceArray] = [device.upload(np.zeros(MIB, np.uint8)) for _ in range(8)]
    assert not waited
    kept.append(device.upload(np.zeros(MIB, np.uint8)))
    assert len(waited) == 1
