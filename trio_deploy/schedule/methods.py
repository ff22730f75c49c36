"""Selection methods by name: one row per method, whose module says how it chooses.

To add a method, write its module (docs/architecture.md, tests/selection/test_new_method.py) and a
row here. The module has

- `graph(op, site) -> Choice`: the graph (selection/site.py, selection/choice.py);
- `reference(view)`: the same for one row in numpy, as the paper states it, from a
  `schedule.view.View`: places of the visual tokens kept, in any order, and scores fp64 [S];
- `rule(selected) -> bool | None`: whether a graph's tokens follow from its scores
  (`schedule.view.Selected`); None if scores alone do not tell;
- `flops(text, sizes) -> (int, int)`: multiply-adds of its scores and of its comparisons of tokens;
- `merge(view, index)` if it merges: hidden states [W,d] after the pruning point.

It imports neither torch nor ONNX.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from importlib import import_module
from typing import Any

ENCODER_SCORES = ("prior", "prior_local")
"""Per-token scores that the vision graph can compute (graphs/stages.py)."""

ARRAYS = ("gradient", "queries", "keys", "final_norm", *ENCODER_SCORES)
"""What the oracle computes for a method that asks for it: the gradient's norms of TRIO's loss, fp64
[S], 0 where not visual; the next layer's rotated queries [H,S,D] and keys [G,S,D]; the hidden
states after the final norm [S,d]; the encoder's scores [S], 0 where no patch is."""

SEEDS = 4091**2
"""Seeds are taken modulo this: the square of the prime in selection/random.py."""

WINDOW = 6
"""Patches along a side of the windows of `prior_local`."""


@dataclass(frozen=True)
class Method:
    """A way to choose visual tokens.

    Attributes:
        module: dotted name of its module, imported on use (`load`).
        needs: what it reads besides hidden states, of `ARRAYS`, `seed` and `threshold`.
        question_blind: chooses without the question, as long as it comes after the picture.
        merges: averages dropped tokens into kept ones.
        sequential: each choice depends on those before, so two runs that chose otherwise have
            scores that cannot be compared.
    """

    module: str
    needs: tuple[str, ...] = ()
    question_blind: bool = False
    merges: bool = False
    sequential: bool = False


@dataclass(frozen=True)
class PointSizes:
    """Sizes of a pruning point, by which its operations are counted.

    Attributes:
        layer: number of the layer that runs next.
        before, after: visual tokens.
        text_tokens: tokens that are not visual.
        probes: P, probe positions of the gradient.
        block: M, ranks that suppression works through at a time.
    """

    layer: int
    before: int
    after: int
    text_tokens: int
    probes: int
    block: int

    @property
    def tokens(self) -> int:
        """All tokens before the pruning point."""
        return self.before + self.text_tokens


METHODS: dict[str, Method] = {
    "trio": Method("trio_deploy.selection.trio", needs=("gradient", "threshold")),
    "topk-gradient": Method("trio_deploy.selection.topk_gradient", needs=("gradient",)),
    "fastv": Method("trio_deploy.selection.fastv", needs=("queries", "keys")),
    "dart": Method("trio_deploy.selection.dart", needs=("keys", "final_norm"), sequential=True),
    "divprune": Method("trio_deploy.selection.divprune", question_blind=True, sequential=True),
    "cdpruner": Method("trio_deploy.selection.cdpruner", sequential=True),
    "random": Method("trio_deploy.selection.random", needs=("seed",), question_blind=True),
    "cls-attention": Method(
        "trio_deploy.selection.cls_attention", needs=("prior",), question_blind=True
    ),
    "vscan": Method(
        "trio_deploy.selection.vscan",
        needs=("prior", "prior_local"),
        question_blind=True,
        merges=True,
    ),
}
"""Selection methods that a pruning point may name."""


def load(name: str) -> Any:
    """Import a method's module."""
    return import_module(METHODS[name].module)


def encoder_scores(methods: Iterable[str]) -> list[str]:
    """The encoder's scores that some of `methods` read, in the order of `ENCODER_SCORES`."""
    needed = {need for method in methods for need in METHODS[method].needs}
    return [name for name in ENCODER_SCORES if name in needed]


def shallow_layer(num_layers: int) -> int:
    """The encoder layer of `prior_local`, 0-based: number 6 of CLIP-L's 24, as VScan has it."""
    return num_layers // 4
