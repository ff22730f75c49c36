"""Tiny checkpoints whose decoder is quantised, and float ones of the same values."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file, save_file

from tests.support.packed import in_awq, in_compressed_tensors, in_gptq
from trio_deploy.quant.matrix import QuantisedMatrix, dequantised, round_to_nearest

#: A matrix of a decoder layer, in any layout of names.
DECODER = re.compile(r"(?!.*vis(ual|ion)).*layers\.\d+\.(self_attn|mlp)\.\w+_proj\.weight")

FORMS = ("compressed-tensors", "awq", "gptq")
_TOWERS = ["visual", "vision_tower", "multi_modal_projector"]


def quantization_config(form: str, bits: int, block: int) -> dict[str, Any]:
    """`quantization_config` of a form, with a key that nothing knows."""
    if form == "compressed-tensors":
        weights = {"num_bits": bits, "type": "int", "strategy": "group", "group_size": block}
        weights |= {"symmetric": True, "dynamic": False}
        return {
            "quant_method": form,
            "format": "pack-quantized",
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
            "ignore": ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
            "quantization_status": "compressed",
        }
    said: dict[str, Any] = {"bits": bits, "group_size": block, "unheard_of": True}
    if form == "awq":
        left = {"zero_point": True, "version": "gemm", "modules_to_not_convert": _TOWERS}
        return said | left | {"quant_method": "awq"}
    return said | {"quant_method": "gptq", "sym": True, "desc_act": False}


def quantise_checkpoint(
    source: Path,
    out: Path,
    form: str,
    *,
    bits: int = 4,
    block: int = 32,
    which: Callable[[str], object] = DECODER.fullmatch,
) -> tuple[Path, Path]:
    """Quantise the decoder of a float checkpoint with one file of weights.

    AWQ is asymmetric, the others are not. config.json has a misspelt key besides.

    Args:
        out: folder for both results.
        which: whether a tensor of that name is quantised.

    Returns:
        the quantised checkpoint, and a float one of the same values.
    """
    quantised, plain = (Path(shutil.copytree(source, out / name)) for name in (form, "plain"))
    tensors = load_file(source / "model.safetensors")
    packed: dict[str, np.ndarray] = {}
    for name, array in tensors.items():
        if not which(name):
            packed[name] = array
            continue
        matrix = _asymmetric(array, block) if form == "awq" else _halves(array, bits, block)
        arrays = {"compressed-tensors": in_compressed_tensors, "awq": in_awq, "gptq": in_gptq}[
            form
        ](matrix)
        packed |= {f"{name.removesuffix('.weight')}.{part}": a for part, a in arrays.items()}
        tensors[name] = dequantised(matrix).astype(array.dtype)
    save_file(packed, quantised / "model.safetensors", metadata={"format": "pt"})
    save_file(tensors, plain / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((source / "config.json").read_text())
    config["quantizaion_config"] = {"bits": 3}
    config["quantization_config"] = quantization_config(form, bits, block)
    (quantised / "config.json").write_text(json.dumps(config))
    return quantised, plain


def _halves(array: np.ndarray, bits: int, block: int) -> QuantisedMatrix:
    """Rounded to nearest, with scales in float16."""
    return round_to_nearest(array, bits, block, np.float16)


def _asymmetric(array: np.ndarray, block: int) -> QuantisedMatrix:
    """Rounded to 4 bit between the least and the greatest value of a block, which include 0."""
    rows, columns = array.shape
    blocks = array.astype(np.float32).reshape(rows, columns // block, block)
    low, high = np.minimum(blocks.min(2), 0), np.maximum(blocks.max(2), 0)
    scale = np.maximum((high - low) / 15, 1e-5).astype(np.float16).astype(np.float32)
    zero = np.clip(np.rint(-low / scale), 0, 15)
    codes = np.clip(np.rint(blocks / scale[:, :, None]) + zero[:, :, None], 0, 15)
    flat = codes.reshape(rows, columns).astype(np.uint8)
    return QuantisedMatrix(flat, scale, zero.astype(np.uint8), 4, block)
