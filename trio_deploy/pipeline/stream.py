"""An answer as it is generated: text in pieces, then the whole."""

from __future__ import annotations

from collections.abc import Generator, Iterator

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.request import Generation


class TextStream(Iterator[str]):
    """Pieces of an answer's text; their sum is `generation.text`.

    The model runs while the stream is iterated, and raises there what `Pipeline.generate` raises.
    A stream that is closed early, by `close`, the end of its `with` block or the last reference to
    it, releases its KV caches at once.

    >>> with pipeline.stream(request) as stream:
    ...     for piece in stream:
    ...         print(piece, end="", flush=True)
    >>> stream.generation.keep_counts
    """

    def __init__(self, pieces: Generator[str, None, Generation]) -> None:
        """Use `Pipeline.stream`."""
        self._pieces = pieces
        self._generation: Generation | None = None

    def __next__(self) -> str:
        try:
            return next(self._pieces)
        except StopIteration as end:
            self._generation = end.value or self._generation
            raise StopIteration from None

    def close(self) -> None:
        """End the answer here; nothing if it has ended."""
        self._pieces.close()

    def __enter__(self) -> TextStream:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    @property
    def generation(self) -> Generation:
        """The whole answer, once the stream has been iterated to its end.

        Raises:
            TrioError: it has not, or failed.
        """
        if self._generation is None:
            raise TrioError("the answer is not complete: iterate its stream to the end first")
        return self._generation
