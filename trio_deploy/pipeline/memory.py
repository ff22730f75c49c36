"""Memory that runs out becomes one error, which names the stage and what takes less."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from trio_deploy.bundle.manifest import kind_of_label
from trio_deploy.errors import OutOfMemory

_LESS = {
    "loading": "end other programs, or open the bundle with low memory (--low-memory, with ONNX "
    "Runtime)",
    "preprocess": "pass fewer or smaller pictures, or fewer requests at once",
    "vision": "pass fewer pictures, or fewer requests at once",
    "decode": "ask for fewer new tokens or with a smaller budget, or for fewer rows at once",
}
_OTHERWISE = (
    "ask with a smaller budget or less text, for fewer rows at once, or with low memory "
    "(--low-memory, with ONNX Runtime)"
)
_LONGEST = 300  # characters of a runtime's own words


@contextmanager
def memory_for(stage: str) -> Iterator[None]:
    """Name the stage where memory runs out inside, unless a stage further in has been named.

    Args:
        stage: label of a stage, or `loading …`, `preprocess`, `decode`.

    Raises:
        OutOfMemory: says what takes less.
    """
    try:
        yield
    except (MemoryError, OutOfMemory) as error:
        if isinstance(error, OutOfMemory) and error.stage:
            raise
        less = _LESS.get(kind_of_label(stage.partition(" ")[0]), _OTHERWISE)
        words = " ".join(str(error).split())
        if len(words) > _LONGEST:
            words = f"{words[: _LONGEST // 2]} … {words[-_LONGEST // 2 :]}"
        found = f" ({words})" if words else ""
        raise OutOfMemory(f"out of memory in {stage}: {less}{found}", stage) from error
