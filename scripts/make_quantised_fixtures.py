"""Write the quantised matrices of tests/fixtures/quantised with the libraries that make them.

Run it in an environment of its own, which the project does not otherwise need:

    pip install torch==2.13.0 llmcompressor==0.14.0.1 auto-round==0.15.1
    python scripts/make_quantised_fixtures.py tests/fixtures/quantised

* `compressed-tensors…`: a tiny LLaVA through llm-compressor's `oneshot` and `save_pretrained`, as
  docs/quantisation.md has it, without data. Of the checkpoint the decoder's quantised tensors and
  config.json are kept.
* `awq`, `gptq`, `gptq8`: the same matrices packed by the layers that auto-round writes checkpoints
  in AutoAWQ's and AutoGPTQ's form with, from scales and zero points that are chosen here. Their
  config.json has a quantization_config as on the hub, and one misspelt key.
* `values.json`: SHA-256 of each matrix as float32 [N, K], in little-endian bytes, as the library
  itself unpacks it.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from auto_round.export.export_to_awq.utils import WQLinear_GEMM, dequantize_gemm
from auto_round_extension.torch.qlinear_torch_zp import QuantLinear
from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from llmcompressor import oneshot
from llmcompressor.modifiers.quantization import QuantizationModifier
from safetensors.torch import load_file, save_file
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

BLOCK = 32
IGNORED = ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"]
CALLS: dict[str, dict[str, Any]] = {
    "compressed-tensors": {"num_bits": 4, "strategy": "group", "group_size": BLOCK},
    "compressed-tensors-asymmetric": {
        "num_bits": 4,
        "strategy": "group",
        "group_size": BLOCK,
        "symmetric": False,
    },
    "compressed-tensors-int8": {"num_bits": 8, "strategy": "channel"},
}


def tiny() -> LlavaForConditionalGeneration:
    """A random LLaVA of one layer."""
    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    text = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
    )
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=4, image_seq_length=16
    )
    return LlavaForConditionalGeneration(config).eval()


def digest(values: torch.Tensor) -> str:
    """SHA-256 of a matrix as float32."""
    return hashlib.sha256(values.detach().numpy().astype("<f4").tobytes()).hexdigest()


def decoder_of(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors of the decoder's matrices."""
    return {
        n: t for n, t in tensors.items() if "layers.0." in n and "_proj." in n and "vis" not in n
    }


def write_compressed(out: Path, name: str, arguments: dict[str, Any]) -> dict[str, str]:
    """Quantise by llm-compressor, and keep the decoder's matrices."""
    weights = QuantizationArgs(**arguments)
    group = QuantizationScheme(targets=["Linear"], weights=weights)
    recipe = QuantizationModifier(config_groups={"group_0": group}, ignore=IGNORED)
    with tempfile.TemporaryDirectory() as folder:
        tiny().save_pretrained(folder)
        model = LlavaForConditionalGeneration.from_pretrained(folder)
        oneshot(model=model, recipe=recipe)
        model.save_pretrained(folder)
        config = json.loads((Path(folder) / "config.json").read_text())
        tensors = decoder_of(load_file(Path(folder) / "model.safetensors"))
    save(out / name, tensors, config)
    found = {}
    for module in {tensor.rpartition(".")[0] for tensor in tensors}:
        parts = {n.rpartition(".")[2]: t for n, t in tensors.items() if n.startswith(f"{module}.")}
        values = PackedQuantizationCompressor.decompress(parts, group)["weight"]
        found[module] = digest(values)
    return found


def write_packed(out: Path, form: str, bits: int = 4) -> dict[str, str]:
    """Pack the decoder's matrices by auto-round's layers."""
    model, tensors, found = tiny(), {}, {}
    for name, weight in decoder_of(model.state_dict()).items():
        module = name.removesuffix(".weight")
        rows, columns = weight.shape
        linear = torch.nn.Linear(columns, rows, bias=False)
        linear.weight.data = weight.clone()
        blocks = weight.reshape(rows, -1, BLOCK)
        top = 2**bits - 1
        if form == "awq":
            low, high = blocks.amin(2).clamp(max=0), blocks.amax(2).clamp(min=0)
            scale = ((high - low) / top).half().float()
            zero = (-low / scale).round().clamp(0, top)
            on_grid = ((blocks / scale[..., None]).round() + zero[..., None]).clamp(0, top)
        else:
            scale = (blocks.abs().amax(2) / (top // 2)).half().float()
            zero = torch.full_like(scale, (top + 1) // 2)
            on_grid = ((blocks / scale[..., None]).round() + zero[..., None]).clamp(0, top)
        values = ((on_grid - zero[..., None]) * scale[..., None]).reshape(rows, columns)
        linear.weight.data = values  # whose codes are `on_grid`, as after calibration
        if form == "awq":
            packed = WQLinear_GEMM.from_linear(
                linear, bits, BLOCK, scales=scale.t().contiguous(), zeros=zero.t().contiguous()
            )
            parts = {n: getattr(packed, n) for n in ("qweight", "qzeros", "scales")}
            # in float16, as AutoAWQ computes: to compare, the same in float32
            own = dequantize_gemm(
                parts["qweight"], parts["qzeros"], parts["scales"].float(), bits, BLOCK
            ).t()
        else:
            packed = QuantLinear(bits, BLOCK, columns, rows, False, g_idx=True)
            packed.pack(linear, scale, zero.to(torch.int32), None)
            parts = {n: getattr(packed, n) for n in ("qweight", "qzeros", "scales", "g_idx")}
            packed.scales = packed.scales.float()
            del packed.g_idx  # the layer's own product takes it for several matrices in one
            own = packed(torch.eye(columns)).t()
        assert torch.equal(own.float(), values), module
        tensors |= {f"{module}.{part}": tensor.contiguous() for part, tensor in parts.items()}
        found[module] = digest(own)
    config = json.loads(model.config.to_json_string(use_diff=False))
    said = {"bits": bits, "group_size": BLOCK}
    left = {"modules_to_not_convert": ["vision_tower", "multi_modal_projector"]}
    if form == "awq":
        config["quantizaion_config"] = left
        said |= left | {"quant_method": "awq", "version": "gemm", "zero_point": True}
    else:
        said |= {"quant_method": "gptq", "sym": True, "desc_act": False, "damp_percent": 0.01}
    save(
        out / (form if bits == 4 else f"{form}{bits}"),
        tensors,
        {**config, "quantization_config": said},
    )
    return found


def save(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any]) -> None:
    """Write a folder of a fixture."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(config, indent=1) + "\n")


def main() -> None:
    """Write all fixtures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    out = parser.parse_args().out
    values = {name: write_compressed(out, name, call) for name, call in CALLS.items()}
    values["awq"] = write_packed(out, "awq")
    values["gptq"] = write_packed(out, "gptq")
    values["gptq8"] = write_packed(out, "gptq", 8)
    ordered = {name: dict(sorted(found.items())) for name, found in values.items()}
    (out / "values.json").write_text(json.dumps(ordered, indent=1) + "\n")
    for name in sorted(values):
        print(f"{name}: {sum(file.stat().st_size for file in (out / name).iterdir())} bytes")


if __name__ == "__main__":
    main()
