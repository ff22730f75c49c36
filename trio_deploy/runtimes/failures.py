"""What a runtime raised, as an error of ours; each has words of its own for a lack of memory."""

from __future__ import annotations

import re

from trio_deploy.errors import OutOfMemory, TrioError

# Of the C++ library, ONNX Runtime's arenas, OpenVINO's memory and code buffers, CUDA.
_NO_MEMORY = re.compile(
    r"bad[_ ]alloc|can't alloc|(failed|unable) to allocate|(cannot|could not) allocate"
    r"|out[ _]of[ _]memory|not enough memory",
    re.IGNORECASE,
)


def failure(what: str, error: BaseException) -> TrioError:
    """The error to raise in place of a runtime's own; `what` failed, such as "OpenVINO failed"."""
    text = str(error).strip()
    message = f"{what}: {text}" if text else what
    if isinstance(error, MemoryError) or _NO_MEMORY.search(text):
        return OutOfMemory(message)
    return TrioError(message)
