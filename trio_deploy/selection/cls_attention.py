"""The visual tokens that the vision encoder's class token attends to most.

FasterVLM, arXiv 2412.01818; the dominant tokens of VisionZip, arXiv 2412.04467. The attention is
that of the layer whose output the image features are, averaged over heads. Its score is 0 where no
patch is, so image_newline is kept last. All images and tiles of a row share its budget.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from trio_deploy.families.base import TextConfig
from trio_deploy.schedule.methods import PointSizes
from trio_deploy.schedule.view import View
from trio_deploy.selection.arrays import greatest, keeps_greatest
from trio_deploy.selection.choice import Choice

if TYPE_CHECKING:
    from trio_deploy.selection.site import Site


def graph(op: Any, site: Site) -> Choice:
    """Keep the greatest attention weights; the encoder has computed them."""
    return site.by_score(op, site.encoder_score("prior"))


def reference(view: View) -> tuple[NDArray[np.int64], NDArray[np.floating]]:
    """Keep the greatest attention weights."""
    scores = view.arrays["prior"].astype(np.float64) * view.visual
    return greatest(scores, view.visual, view.keep), scores


rule = keeps_greatest


def flops(text: TextConfig, sizes: PointSizes) -> tuple[int, int]:
    """Next to nothing: the encoder has computed the scores."""
    return 0, 0
