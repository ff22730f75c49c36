"""`quantization_config` of config.json: in which form a checkpoint's matrices are quantised.

Which matrices are, in how many bits and in what blocks, is read from the tensors themselves: here
is only what they cannot tell. Keys that have no meaning for that are ignored, as loaders of these
forms do.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from trio_deploy.errors import TrioError
from trio_deploy.files import brief

KEY = "quantization_config"

_BITS = (4, 8)
_PATTERN = "re:"
_MAX_ENTRIES, _MAX_PATTERN = 10_000, 200
_T = TypeVar("_T")

#: Formats of compressed-tensors in words.
_COMPRESSED = {
    "float-quantized": "FP8",
    "naive-quantized": "FP8 or int8",
    "int-quantized": "int8 weights and activations",
    "nvfp4-pack-quantized": "NVFP4",
    "mxfp4-pack-quantized": "MXFP4",
    "marlin-24": "2:4 sparse",
}


@dataclass(frozen=True)
class QuantizationConfig:
    """What config.json says of quantised matrices.

    Attributes:
        form: a key of `forms.FORMS`.
        bits: those that it names.
        symmetric: whether it says that all zero points are in the middle.
        left_out: names of modules that are not quantised, and patterns that begin with `re:`.
    """

    form: str
    bits: frozenset[int]
    symmetric: bool
    left_out: tuple[str, ...] = ()

    def leaves_out(self, module: str) -> bool:
        """Whether a module is named as one that is not quantised.

        A name stands for the modules below it, wherever it is in a path. Patterns that could take
        long to match are not compared.
        """
        return any(
            _matches(entry.removeprefix(_PATTERN), module)
            if entry.startswith(_PATTERN)
            else f".{entry}." in f".{module}."
            for entry in self.left_out
        )


def read_quantization_config(raw: Mapping[str, Any]) -> QuantizationConfig | None:
    """Read the `quantization_config` of a config.json; None: it has none.

    Args:
        raw: the parsed config.json.

    Raises:
        TrioError: a form that cannot be read, or a value that makes no sense.
    """
    text = raw.get("text_config")
    below = text.get(KEY) if isinstance(text, Mapping) else None
    said = raw.get(KEY) or below
    if not said:
        return None
    if not isinstance(said, Mapping):
        raise TrioError(f"config.json: {KEY} must be an object, not {brief(said)}")
    method = _value(said, "quant_method", str, "")
    readers = {"compressed-tensors": _compressed_tensors, "awq": _awq, "gptq": _gptq}
    if method not in readers:
        other = "bitsandbytes" if said.get("load_in_4bit") or said.get("load_in_8bit") else method
        raise _unreadable(brief(other) if other else "no quant_method")
    return readers[method](said)


def require_float(raw: Mapping[str, Any]) -> None:
    """Refuse a config.json of quantised weights where the weights are not at hand.

    Raises:
        TrioError: it says that there are quantised matrices.
    """
    if read_quantization_config(raw) is not None:
        raise TrioError(
            "the checkpoint is quantised, and which of its matrices are is known from its weights: "
            "download all of it and pass the folder"
        )


def without_quantization_config(raw: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json of the same model with float weights."""
    plain = {key: value for key, value in raw.items() if key != KEY}
    if isinstance(text := plain.get("text_config"), Mapping):
        plain["text_config"] = {key: value for key, value in text.items() if key != KEY}
    return plain


def _compressed_tensors(said: Mapping[str, Any]) -> QuantizationConfig:
    groups = _value(said, "config_groups", dict, {})
    if not groups:
        raise _unreadable("compressed-tensors without config_groups")
    top = _value(said, "format", str, "pack-quantized")
    if _value(said, "transform_config", dict, {}).get("config_groups"):
        raise _unreadable("compressed-tensors with transforms at run time")
    sparsity = _value(said, "sparsity_config", dict, {}).get("format", "dense")
    if sparsity not in ("dense", None):
        raise _unreadable(f"compressed-tensors, sparse: {brief(sparsity)}")
    weights = []
    for name, group in groups.items():
        if not isinstance(group, Mapping) or not isinstance(group.get("weights"), Mapping):
            raise TrioError(f"config.json: {KEY}.config_groups.{name} says nothing of weights")
        form = _value(group, "format", str, top)
        if form != "pack-quantized":
            named = f" ({_COMPRESSED[form]})" if form in _COMPRESSED else ""
            raise _unreadable(f"compressed-tensors {form}{named}")
        if group.get("input_activations") or group.get("output_activations"):
            raise _unreadable("compressed-tensors with quantised activations")
        weights.append(group["weights"])
    for each in weights:
        if _value(each, "type", str, "int") != "int":
            raise _unreadable("compressed-tensors with codes of type float")
        if _value(each, "strategy", str, "group") not in ("group", "channel", "tensor"):
            raise _unreadable(f"compressed-tensors by {each['strategy']}")
    bits = [_bits(each, "num_bits", "compressed-tensors") for each in weights]
    symmetric = all(_value(each, "symmetric", bool, True) for each in weights)
    ignored = _names(said, "ignore")
    return QuantizationConfig("compressed-tensors", frozenset(bits), symmetric, ignored)


def _awq(said: Mapping[str, Any]) -> QuantizationConfig:
    version = _value(said, "version", str, _value(said, "format", str, "gemm")).lower()
    if version != "gemm":
        raise _unreadable(f"AWQ {version}")
    if _value(said, "backend", str, "").lower() == "llm-awq":
        raise _unreadable("AWQ as llm-awq packs it")
    bits = _bits(said, "bits" if "bits" in said else "w_bit", "AWQ", (4,))
    symmetric = not _value(said, "zero_point", bool, True)
    return QuantizationConfig("awq", frozenset({bits}), symmetric, _left_out(said))


def _gptq(said: Mapping[str, Any]) -> QuantizationConfig:
    form = _value(said, "checkpoint_format", str, _value(said, "format", str, "gptq")).lower()
    if _value(said, "is_marlin_format", bool, False):
        form = "marlin"
    if form not in ("gptq", "gptq_v2"):
        raise _unreadable(f"GPTQ {form}")
    if _value(said, "pack_dtype", str, "int32") != "int32":
        raise _unreadable(f"GPTQ in words of {said['pack_dtype']}")
    bits = {_bits(said, "bits", "GPTQ")}
    left_out = _left_out(said)
    for pattern, changed in _value(said, "dynamic", dict, {}).items():  # GPTQModel's
        if pattern.startswith("-:"):
            left_out = (*left_out, _PATTERN + pattern[2:])
        elif isinstance(changed, Mapping) and "bits" in changed:
            bits.add(_bits(changed, "bits", "GPTQ"))
    return QuantizationConfig(form, frozenset(bits), _value(said, "sym", bool, True), left_out)


def _left_out(said: Mapping[str, Any]) -> tuple[str, ...]:
    return _names(said, "modules_to_not_convert")


def _names(said: Mapping[str, Any], key: str) -> tuple[str, ...]:
    names: Iterable[Any] = _value(said, key, list, [])
    texts = tuple(name for name in names if isinstance(name, str) and name)
    if len(texts) > _MAX_ENTRIES:
        raise TrioError(f"config.json: {KEY}.{key} has more than {_MAX_ENTRIES} entries")
    return texts


def _bits(said: Mapping[str, Any], key: str, form: str, readable: tuple[int, ...] = _BITS) -> int:
    bits = _value(said, key, int, 0)
    if bits not in readable:
        raise _unreadable(f"{form} of {bits} bit")
    return bits


def _value(said: Mapping[str, Any], key: str, kind: type[_T], default: _T) -> _T:
    """A value of a type; one that is missing or null is the default."""
    found = said.get(key)
    if found is None:
        return default
    if not isinstance(found, kind) or (kind is int and isinstance(found, bool)):
        raise TrioError(f"config.json: {KEY}.{key} cannot be {brief(found)}")
    return found


def _matches(pattern: str, module: str) -> bool:
    quantifiers = sum(map(pattern.count, "*+?{"))
    nested = re.search(r"\)[*+?{]", pattern)
    if len(pattern) > _MAX_PATTERN or quantifiers > 4 or nested:
        return False
    try:
        return re.match(pattern, module) is not None
    except re.error:
        return False


def _unreadable(form: str) -> TrioError:
    return TrioError(
        f"the checkpoint is quantised in a form that cannot be read ({form}): use the fp32, fp16 "
        "or bf16 checkpoint it was made from, or one in compressed-tensors (pack-quantized), AWQ "
        "(gemm) or GPTQ"
    )
