"""transformers' model put together from the weights of a bundle: no checkpoint is needed.

A bundle's own weights are what its graphs compute with, converted to another type or not, so they
are what the reference must use.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import torch
import transformers
from torch import Tensor

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import TensorPlace
from trio_deploy.bundle.weights import SAFETENSORS
from trio_deploy.checkpoint.safetensors import DTYPES
from trio_deploy.errors import TrioError
from trio_deploy.families.names import canonical_name
from trio_deploy.families.registry import get_family
from trio_deploy.reference.adapters import model_class


def restore_model(bundle: Bundle, dtype: torch.dtype = torch.float32) -> Any:
    """The bundle's model as transformers' own class, weights widened or narrowed to `dtype`.

    Raises:
        TrioError: the bundle has no weights yet, or transformers does not know the model.
    """
    bundle.require_weights()
    raw = bundle.manifest.model.config
    family = get_family(bundle.config.family)
    architecture = model_class(family.name)
    places = bundle.manifest.tensors
    tensors = {name: _mapped(bundle.path, place) for name, place in places.items()}
    config = architecture.config_class.from_dict(raw)
    with torch.device("meta"):
        expected = architecture(config).state_dict()
    state = _state({name: canonical_name(family, name) for name in expected}, expected, tensors)
    silent = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        return architecture.from_pretrained(
            None, config=config, state_dict=state, dtype=dtype, attn_implementation="sdpa"
        ).eval()
    finally:
        if silent:
            transformers.utils.logging.enable_progress_bar()


def _state(
    names: Mapping[str, str], expected: Mapping[str, Tensor], tensors: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """The state dict that the installed transformers expects.

    What no graph reads is zero: the vision layers above the one whose features are taken.

    Args:
        names: canonical name of each name in `expected`.
    """
    state, unread = {}, 0
    for name, parameter in expected.items():
        canonical = names[name]
        if canonical == "lm_head.weight" and canonical not in tensors:
            canonical = "language_model.embed_tokens.weight"  # tied
        if canonical in tensors:
            state[name] = tensors[canonical]
        elif canonical.startswith("vision_tower."):
            state[name], unread = torch.zeros(parameter.shape), unread + 1
        else:
            raise TrioError(f"the bundle's weights lack {canonical}: export it again")
    used = len(expected) - unread - (0 if "lm_head.weight" in tensors else 1)
    if used != len(tensors):
        raise TrioError(
            "this version of transformers names the model's tensors in a way that the reference "
            "does not know: install another one (5.x is tested)"
        )
    return state


def _mapped(bundle: Path, place: TensorPlace) -> Tensor:
    """Map the bytes of a part in its file; the one part of a float weight is the weight."""
    data = np.memmap(bundle / place.file, np.uint8, "c", place.offset, (place.nbytes,))
    array = data.view(DTYPES[SAFETENSORS[place.dtype]]).reshape(place.shape)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
