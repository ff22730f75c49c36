"""A random set of visual tokens that depends on the request's seed and the layer alone.

A token's score is its place under a keyed permutation of 0…p-1, so no two of p tokens tie, and a
row keeps the same tokens alone and in a batch. The permutation adds a key and cubes modulo the
prime p, where 3 does not divide p - 1, round after round, as the cipher MiMC does (Albrecht et al.,
2016). p² stays below 2²⁴, where fp32 is exact: OpenVINO divides integers in fp32, and TensorRT
before 10 has 32 bits for them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import View
from trio_deploy.selection.arrays import greatest, keeps_greatest
from trio_deploy.selection.choice import Choice, Value

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site

PRIME = 4091
"""p; seeds are below its square, `schedule.methods.SEEDS`."""
_ROUNDS = 8


def graph(op: Any, site: Site) -> Choice:
    """Keep the tokens that come last under the permutation."""
    seed = site.float32(op, op.Unsqueeze(site.seed(), [1]))
    p = float(PRIME)

    def divide(value: Value) -> tuple[Value, Value]:
        """Quotient and remainder; the product with 1/p may leave the quotient one off."""
        quotient = op.Floor(op.Mul(value, 1.0 / p))
        rest = op.Sub(value, op.Mul(quotient, p))
        step = op.Sub(
            site.float32(op, op.GreaterOrEqual(rest, p)), site.float32(op, op.Less(rest, 0.0))
        )
        return op.Add(quotient, step), op.Sub(rest, op.Mul(step, p))

    high, low = divide(seed)
    lap, x = divide(op.Unsqueeze(site.float32(op, site.tokens.index), [0]))
    keys = op.Add(low, lap), high
    for turn in range(_ROUNDS):
        added = float(_round_constant(site.layer, turn))
        _, x = divide(op.Add(op.Add(x, keys[turn % 2]), added))
        _, square = divide(op.Mul(x, x))
        _, x = divide(op.Mul(square, x))
    return site.by_score(op, op.Mul(op.Add(x, 1.0), 1.0 / p))


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Keep the tokens that come last under the permutation, in integers."""
    index = np.arange(len(view.visual))
    high, low = divmod(view.seed, PRIME)
    keys, x = (low + index // PRIME, high), index % PRIME
    for turn in range(_ROUNDS):
        x = (x + keys[turn % 2] + _round_constant(view.layer, turn)) % PRIME
        x = x * x % PRIME * x % PRIME
    scores = (x + 1) / PRIME * view.visual
    return greatest(scores, view.visual, view.keep), scores


rule = keeps_greatest


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """Next to nothing."""
    return 0, 0


def _round_constant(layer: int, turn: int) -> int:
    """What a round adds to the key; every layer has a permutation of its own."""
    return (7919 * (turn + 1) + 104729 * (layer + 1) * (turn + 1) ** 2) % PRIME
