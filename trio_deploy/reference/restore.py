"""transformers' model put together from the weights of a bundle: no checkpoint is needed.

A bundle's own weights are what its graphs compute with, converted to another type, quantised or
neither, so they are what the reference must use. Of a quantised matrix those are the values that
its codes stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
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
from trio_deploy.families.names import EMBEDDINGS, HEAD, canonical_name
from trio_deploy.families.registry import get_family
from trio_deploy.quant.narrow_floats import MOST_E4M3, input_scale
from trio_deploy.quant.quantization_config import without_quantization_config
from trio_deploy.quant.schemes import BESIDE_CODES, coded_part, split_name, values_of
from trio_deploy.quant.stored_weight import FLOATS, Part
from trio_deploy.reference.adapters import model_class

#: Label of the codes that selections have of their own.
COPIES = "int8"


def restore_model(bundle: Bundle, dtype: torch.dtype = torch.float32) -> Any:
    """The bundle's model as transformers' own class, weights widened or narrowed to `dtype`.

    Raises:
        TrioError: the bundle has no weights yet, or transformers does not know the model.
    """
    bundle.require_weights()
    raw = without_quantization_config(bundle.manifest.model.config)
    family = get_family(bundle.config.family)
    architecture = model_class(family.name)
    config = architecture.config_class.from_dict(raw)
    codes = _codes(bundle)
    with torch.device("meta"):
        expected = architecture(config).state_dict()
    names = {name: canonical_name(family, name) for name in expected}
    columns = {names[name]: shape[-1] for name, shape in _shapes(expected).items()}
    places = bundle.manifest.tensors
    tensors = {
        name: _mapped(bundle.path, place)
        for name, place in places.items()
        if not _belongs_to_codes(name)
    }
    for name, widths in codes.items():
        own = next((label for label in widths if label != COPIES), COPIES)
        tensors[name] = _dequantised(bundle, widths[own], columns[name])
    state = _state(names, expected, tensors)
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


def selection_weights(
    bundle: Bundle, model: Any, rounds_inputs: bool = True
) -> Callable[[int], AbstractContextManager[None]]:
    """What `Oracle` takes: puts the values that selections compute with into a restored model.

    Where graphs round what matrices are multiplied by, so does the model from here on, but for
    selections and unless `rounds_inputs` is false.
    """
    family = get_family(bundle.config.family)
    selecting: set[int] = _round_inputs(bundle, model) if rounds_inputs else set()
    copies = _copies(bundle)

    @contextmanager
    def use(layer: int) -> Iterator[None]:
        own: list[tuple[Any, Tensor]] = []
        for name, parameter in model.named_parameters():
            canonical = canonical_name(family, name)
            head = canonical in (HEAD, EMBEDDINGS)  # copies of a table are a tied head's
            used = head or canonical.startswith(f"language_model.layers.{layer}.")
            if used and canonical in copies:
                values = copies[canonical](parameter.shape[1])
                own.append((parameter, parameter.data))
                parameter.data = values.to(parameter.dtype)
        selecting.add(layer)
        try:
            yield
        finally:
            selecting.discard(layer)
            for parameter, values in own:
                parameter.data = values

    return use


def _copies(bundle: Bundle) -> dict[str, Callable[[int], Tensor]]:
    """Matrices of which selections have other values than segments, by canonical name.

    Each is read by a function, which is given the number of its columns.
    """
    codes, said = _codes(bundle), bundle.manifest.quantization
    if said is None or said.selections != "float":
        return {
            name: partial(_dequantised, bundle, widths[COPIES])
            for name, widths in codes.items()
            if len(widths) > 1
        }

    def read(place: TensorPlace, _: int) -> Tensor:
        return _mapped(bundle.path, place)

    floats = {
        name: bundle.manifest.tensors[name] for name in codes.keys() & bundle.manifest.tensors
    }
    return {name: partial(read, place) for name, place in floats.items()}


def _round_inputs(bundle: Bundle, model: Any) -> set[int]:
    """Make a model round to E4M3 what its matrices in it are multiplied by.

    Returns:
        a set of layers, in which it does not.
    """
    selecting: set[int] = set()
    said, family = bundle.manifest.quantization, get_family(bundle.config.family)
    if said is None or said.calibration is None:
        return selecting
    kind = FLOATS[bundle.manifest.dtype]
    for name, module in model.named_modules():
        most = said.calibration.greatest.get(canonical_name(family, f"{name}.weight"))
        if most is None or not isinstance(module, torch.nn.Linear):
            continue
        layer = int(name.split("layers.")[1].partition(".")[0])
        scale = float(np.array(input_scale(most), kind))

        def rounded(_: Any, given: Any, layer: int = layer, scale: float = scale) -> Any:
            if layer in selecting:
                return None
            inside = (given[0] / scale).clamp(-MOST_E4M3, MOST_E4M3)
            return (inside.to(torch.float8_e4m3fn).to(inside.dtype) * scale,)

        module.register_forward_pre_hook(rounded)
    return selecting


def _codes(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Quantised weights: canonical name → label → name of the part with the codes."""
    found: dict[str, dict[str, str]] = {}
    for name in bundle.manifest.tensors:
        if (split := split_name(name)) is not None:
            found.setdefault(split[0], {})[split[1]] = name
    return found


def _belongs_to_codes(name: str) -> bool:
    weight, _, end = name.rpartition(".")
    return split_name(weight if f".{end}" in BESIDE_CODES else name) is not None


def _shapes(state: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items() if value.dim()}


def _dequantised(bundle: Bundle, name: str, columns: int) -> Tensor:
    """The values of a quantised matrix by the name of its codes, float32 [N, K]."""
    split, places = split_name(name), bundle.manifest.tensors
    assert split is not None

    def array(part: str) -> np.ndarray | None:
        if part not in places:
            return None
        place = places[part]
        raw = np.fromfile(bundle.path / place.file, np.uint8, place.nbytes, offset=place.offset)
        if place.dtype in FLOATS:
            return raw.view(FLOATS[place.dtype]).reshape(place.shape)
        return raw.reshape(coded_part(Part(part, place.shape, place.dtype))[1])

    found = {"codes": array(name)} | {end[1:]: array(name + end) for end in BESIDE_CODES}
    arrays = {key: value for key, value in found.items() if value is not None}
    return torch.from_numpy(values_of(arrays, split[1], columns))


def _mapped(bundle: Path, place: TensorPlace) -> Tensor:
    """Map the bytes of a part in its file; the one part of a float weight is the weight."""
    data = np.memmap(bundle / place.file, np.uint8, "c", place.offset, (place.nbytes,))
    array = data.view(DTYPES[SAFETENSORS[place.dtype]]).reshape(place.shape)
    if array.dtype == ml_dtypes.bfloat16:
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16)
    return torch.from_numpy(array)
