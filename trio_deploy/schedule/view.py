"""One row at a pruning point in numpy arrays: what references and rules of methods are given.

S tokens, d hidden size, H query heads, G key/value heads, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

_ROUNDING = 1e-6  # relative


@dataclass(frozen=True)
class View:
    """A row before it is pruned, as the oracle computed it.

    Attributes:
        layer: number of the layer that runs next.
        hidden: [S,d], the input of that layer.
        visual: bool [S].
        keep: visual tokens to keep, at most their number.
        threshold: cosine similarity from which a kept token suppresses another.
        seed: of the request, below `methods.SEEDS`.
        arrays: what else the method's row in the table asks for, by name (`methods.ARRAYS`).
    """

    layer: int
    hidden: NDArray[np.floating]
    visual: NDArray[np.bool_]
    keep: int
    threshold: float
    seed: int = 0
    arrays: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)

    @property
    def places(self) -> NDArray[np.int64]:
        """Places of the visual tokens, int64 [N]."""
        return np.flatnonzero(self.visual)


@dataclass(frozen=True)
class Selected:
    """A row as a select graph pruned it.

    Attributes:
        kept: int64, places of the visual tokens kept, ascending.
        scores: fp64 [S], as the graph reports them.
        hidden: [S,d], the graph's input.
        visual: bool [S].
        threshold: cosine similarity from which a kept token suppresses another.
        length: valid tokens, of which padding follows.
        encoder: the encoder's scores [S] that the graph was given, by name.
    """

    kept: NDArray[np.int64]
    scores: NDArray[np.float64]
    hidden: NDArray[np.floating]
    visual: NDArray[np.bool_]
    threshold: float
    length: int
    encoder: Mapping[str, NDArray[np.floating]] = field(default_factory=dict)

    @property
    def places(self) -> NDArray[np.int64]:
        """Places of the visual tokens, int64 [N]."""
        return np.flatnonzero(self.visual)


def all_equal(scores: NDArray[np.floating]) -> bool:
    """Whether scores [N] of two or more tokens rank none of them before another.

    They differ by no more than rounding, which no gradient or attention of a working model does:
    what is then chosen depends on the order of the tokens alone.
    """
    if len(scores) < 2:
        return False
    low, high = float(scores.min()), float(scores.max())
    return high - low <= _ROUNDING * max(abs(low), abs(high))
