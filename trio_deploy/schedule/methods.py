"""Selection methods by name, and the numbers that their graphs and the oracle must share.

docs/architecture.md defines the methods, `graphs/rivals.py` and `reference/rivals.py` state them.
"""

from __future__ import annotations

METHODS = (
    "trio",  # gradient of the layer-local loss, near-copies suppressed
    "topk-gradient",  # the same gradient, nothing suppressed
    "fastv",  # attention of the last token
    "dart",  # pivots, and what is least like them
    "divprune",  # the most diverse, farthest from what is kept already
    "random",
    "cls-attention",  # attention of the encoder's class token
    "vscan",  # the same in two layers, in one of them window by window; the rest is merged
)
"""Selection methods that a pruning point may name."""

ENCODER_SCORES = {"cls-attention": ("prior",), "vscan": ("prior", "prior_local")}
"""What a method goes by that the vision graph puts out and the select graph takes."""

QUESTION_BLIND = ("divprune", "random", "cls-attention", "vscan")
"""Methods that choose without the question, as long as it comes after the picture."""

MERGING = ("vscan",)
"""Methods that average what they drop into what they keep."""

PIVOTS = 4
"""Visual pivots of `dart`, and text pivots: the defaults of the authors and of NVIDIA."""

FAR = 2.0
"""The largest cosine distance; what is compared with nothing has it."""

TIE = 1e-5
"""Distances that `divprune` takes for equal, so that no tie is decided by rounding."""

STEP = 2.0**-16
"""`dart` rounds distances to multiples of this, for the same reason."""

WINDOW = 6
"""Patches along a side of the windows of `vscan`."""

# The permutation behind `random`: adding a key and cubing modulo a prime p, where 3 does not divide
# p - 1, round after round, as in the cipher MiMC (Albrecht et al., 2016). p² stays below 2²⁴, where
# fp32 is exact: OpenVINO divides integers in fp32, and TensorRT before 10 has 32 bits for them.
RANDOM_PRIME = 4091
RANDOM_ROUNDS = 8

SEEDS = RANDOM_PRIME**2
"""Seeds of `random` are taken modulo this."""


def random_constant(layer: int, turn: int) -> int:
    """What a round of `random` adds to the key; every layer has a permutation of its own."""
    return (7919 * (turn + 1) + 104729 * (layer + 1) * (turn + 1) ** 2) % RANDOM_PRIME


def shallow_layer(num_layers: int) -> int:
    """The encoder layer of `vscan`'s local scan, 0-based: number 6 of CLIP-L's 24, as published."""
    return num_layers // 4
