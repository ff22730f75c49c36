"""TRIO's saliency without its suppression: the visual tokens with the greatest gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import View
from trio_deploy.selection.arrays import greatest, keeps_greatest
from trio_deploy.selection.choice import Choice
from trio_deploy.selection.trio import saliency_flops

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site


def graph(op: Any, site: Site) -> Choice:
    """Keep the greatest gradients."""
    scores = site.saliency(op)
    kept = site.budget_of_greatest(op, scores.ranking)
    return Choice(kept, scores.value, finite=scores.ranking)


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Keep the greatest gradients, near-copies or not."""
    scores = view.arrays["gradient"]
    return greatest(scores, view.visual, view.keep), scores


rule = keeps_greatest


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """The gradient; nothing is compared."""
    return saliency_flops(sizes.tokens, text, sizes.probes), 0
