"""Functions over numpy arrays and arrays in device memory.

A device array can be sliced without steps, `array[:n]` or `array[a:b, :, :n]`, and its `device`
copies its entries (`tensorrt/device.py`).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from trio_deploy.runtimes.base import Array


def on_host(array: Array) -> bool:
    """Whether an array is a numpy array."""
    return isinstance(array, np.ndarray)


def to_host(array: Array) -> np.ndarray:
    """The entries as a numpy array; waits for the device."""
    return array if on_host(array) else array.device.download(array)


def copy(target: Array, source: Array) -> None:
    """Copy entries between two arrays of one shape, each on the host or a device."""
    if on_host(target):
        target[...] = to_host(source)
    elif on_host(source):
        device = target.device
        block = np.ascontiguousarray(source, target.dtype)
        if target.contiguous:
            device.upload(block, target)
        else:
            device.copy(target, device.upload(block))
    else:
        target.device.copy(target, source)


def duplicate(array: Array) -> Array:
    """A copy in memory of its own, where the array is."""
    if on_host(array):
        return array.copy()
    own = array.device.empty(tuple(array.shape), array.dtype)
    copy(own, array)
    return own


def clear(array: Array) -> None:
    """Set every entry to zero."""
    if on_host(array):
        array[...] = 0
    else:
        array.device.clear(array)


def concatenate(parts: Sequence[Array]) -> Array:
    """Concatenate arrays of one dtype along the first axis."""
    if len(parts) == 1:
        return parts[0]
    if all(on_host(part) for part in parts):
        return np.concatenate(parts)
    first = next(part for part in parts if not on_host(part))
    whole = first.device.empty((sum(map(len, parts)), *first.shape[1:]), first.dtype)
    start = 0
    for part in parts:
        copy(whole[start : start + len(part)], part)
        start += len(part)
    return whole
