"""`quantization_config` as it is on the hub, and what is refused by name."""

from __future__ import annotations

from typing import Any

import pytest

from trio_deploy.errors import TrioError
from trio_deploy.quant.quantization_config import QuantizationConfig, read_quantization_config

#: As of ybelkada/llava-1.5-7b-hf-awq, whose file also has the misspelt key.
LLAVA_AWQ = {
    "quantizaion_config": {"modules_to_not_convert": ["vision_tower", "multi_modal_projector"]},
    "quantization_config": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": ["vision_tower", "multi_modal_projector"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
}
#: As of Qwen/Qwen2-VL-7B-Instruct-AWQ.
QWEN_AWQ = {
    "quantization_config": {
        "bits": 4,
        "group_size": 128,
        "modules_to_not_convert": ["visual"],
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    }
}
#: As of Qwen/Qwen2-VL-7B-Instruct-GPTQ-Int4.
QWEN_GPTQ = {
    "quantization_config": {
        "batch_size": 1,
        "bits": 4,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.1,
        "dataset": None,
        "desc_act": False,
        "exllama_config": {"version": 1},
        "group_size": 128,
        "modules_in_block_to_quantize": None,
        "quant_method": "gptq",
        "sym": True,
        "true_sequential": True,
        "use_cuda_fp16": False,
        "use_exllama": True,
    }
}


def compressed(**changed: Any) -> dict[str, Any]:
    """As llm-compressor writes W4A16, with keys replaced."""
    weights = {
        "actorder": None,
        "block_structure": None,
        "dynamic": False,
        "group_size": 128,
        "num_bits": 4,
        "observer": "minmax",
        "observer_kwargs": {},
        "strategy": "group",
        "symmetric": True,
        "type": "int",
    }
    group = {
        "format": "pack-quantized",
        "input_activations": None,
        "output_activations": None,
        "targets": ["Linear"],
        "weights": weights,
    }
    said = {
        "config_groups": {"group_0": group},
        "format": "pack-quantized",
        "global_compression_ratio": None,
        "ignore": ["re:.*lm_head", "re:.*vision_tower.*", "re:.*multi_modal_projector.*"],
        "kv_cache_scheme": None,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
        "sparsity_config": {},
        "transform_config": {},
        "version": "0.14.0",
    }
    group |= {key: changed.pop(key) for key in list(changed) if key in ("input_activations",)}
    if "group_format" in changed:
        group["format"] = changed.pop("group_format")
    weights |= {key: changed.pop(key) for key in list(changed) if key in weights}
    return {"quantization_config": said | changed}


def changed(config: dict[str, Any], **values: Any) -> dict[str, Any]:
    return {"quantization_config": config["quantization_config"] | values}


FOUR, EIGHT = frozenset({4}), frozenset({8})


@pytest.mark.parametrize(
    "raw,wanted",
    [
        (LLAVA_AWQ, ("awq", FOUR, False)),
        (QWEN_AWQ, ("awq", FOUR, False)),
        (changed(QWEN_AWQ, zero_point=False, version="GEMM"), ("awq", FOUR, True)),
        (QWEN_GPTQ, ("gptq", FOUR, True)),
        (changed(QWEN_GPTQ, checkpoint_format="gptq_v2"), ("gptq_v2", FOUR, True)),
        (changed(QWEN_GPTQ, bits=8, sym=False, desc_act=True), ("gptq", EIGHT, False)),
        (changed(QWEN_GPTQ, dynamic={"+:.*down": {"bits": 8}}), ("gptq", FOUR | EIGHT, True)),
        (compressed(), ("compressed-tensors", FOUR, True)),
        (
            compressed(num_bits=8, strategy="channel", group_size=None, unheard_of=[1]),
            ("compressed-tensors", EIGHT, True),
        ),
        (compressed(symmetric=False), ("compressed-tensors", FOUR, False)),
        ({"text_config": compressed()}, ("compressed-tensors", FOUR, True)),
    ],
)
def test_configs_of_the_hub_are_read(raw, wanted) -> None:
    read = read_quantization_config(raw)
    assert read is not None and (read.form, read.bits, read.symmetric) == wanted


@pytest.mark.parametrize("raw", [{}, {"quantization_config": None}, {"quantization_config": {}}])
def test_a_float_checkpoint_has_none(raw) -> None:
    assert read_quantization_config(raw) is None
    assert read_quantization_config({**raw, "quantizaion_config": {"bits": 4}}) is None


def method(name: str, **values: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": name, **values}}


@pytest.mark.parametrize(
    "raw,form",
    [
        (method("bitsandbytes", load_in_4bit=True, bnb_4bit_quant_type="nf4"), "bitsandbytes"),
        ({"quantization_config": {"load_in_8bit": True}}, "bitsandbytes"),
        (method("fp8", weight_block_size=[128, 128]), "fp8"),
        (method("exl2", bits=4.0), "exl2"),
        (method("hqq"), "hqq"),
        (method("torchao"), "torchao"),
        ({"quantization_config": {"bits": 4}}, "no quant_method"),
        (changed(QWEN_AWQ, version="gemv"), "AWQ gemv"),
        (changed(QWEN_AWQ, version="gemv_fast"), "AWQ gemv_fast"),
        (changed(QWEN_AWQ, version="marlin"), "AWQ marlin"),
        (changed(QWEN_AWQ, backend="llm-awq"), "AWQ as llm-awq packs it"),
        (changed(QWEN_AWQ, bits=3), "AWQ of 3 bit"),
        (changed(QWEN_GPTQ, bits=3), "GPTQ of 3 bit"),
        (changed(QWEN_GPTQ, checkpoint_format="marlin"), "GPTQ marlin"),
        (changed(QWEN_GPTQ, is_marlin_format=True), "GPTQ marlin"),
        (changed(QWEN_GPTQ, pack_dtype="int64"), "GPTQ in words of int64"),
        (compressed(format="int-quantized", group_format=None), "int8 weights and activations"),
        (compressed(group_format="float-quantized"), r"float-quantized \(FP8\)"),
        (compressed(group_format="nvfp4-pack-quantized"), "NVFP4"),
        (compressed(input_activations={"num_bits": 8}), "quantised activations"),
        (compressed(num_bits=2), "compressed-tensors of 2 bit"),
        (compressed(type="float"), "type float"),
        (compressed(strategy="block"), "by block"),
        (compressed(sparsity_config={"format": "sparse-24-bitmask"}), "sparse-24-bitmask"),
        (compressed(transform_config={"config_groups": {"R1": {}}}), "transforms"),
        (compressed(config_groups={}), "without config_groups"),
    ],
)
def test_other_forms_are_refused_by_name_with_the_way_out(raw, form) -> None:
    with pytest.raises(TrioError, match=rf"cannot be read \(.*{form}.*\): use the fp32, fp16 or"):
        read_quantization_config(raw)


@pytest.mark.parametrize(
    "raw,says",
    [
        ({"quantization_config": 3}, "must be an object, not 3"),
        (changed(QWEN_GPTQ, bits="4"), "bits cannot be '4'"),
        (changed(QWEN_GPTQ, bits=True), "bits cannot be True"),
        (changed(QWEN_GPTQ, dynamic=[]), "dynamic cannot be"),
        (changed(QWEN_AWQ, modules_to_not_convert="visual"), "modules_to_not_convert cannot be"),
        (changed(QWEN_AWQ, modules_to_not_convert=["a"] * 10_001), "more than 10000"),
        (changed(QWEN_AWQ, quant_method=4), "quant_method cannot be 4"),
        (compressed(config_groups={"g": 3}), "g says nothing of weights"),
        (compressed(config_groups={"g": {"weights": None}}), "g says nothing of weights"),
        (compressed(config_groups=[1]), "config_groups cannot be"),
        (compressed(transform_config=[1]), "transform_config cannot be"),
    ],
)
def test_values_that_make_no_sense_are_refused(raw, says) -> None:
    with pytest.raises(TrioError, match=says):
        read_quantization_config(raw)


def leaves_out(*entries: str) -> QuantizationConfig:
    return QuantizationConfig("awq", FOUR, False, entries)


def test_modules_are_left_out_by_name_and_by_pattern() -> None:
    tower = "model.visual.blocks.0.attn.qkv"
    layer = "model.layers.11.self_attn.q_proj"
    assert leaves_out("visual").leaves_out(tower)
    assert leaves_out("lm_head").leaves_out("lm_head")
    assert leaves_out("model.layers.11").leaves_out(layer)
    assert leaves_out("re:.*visual.*").leaves_out(tower)
    assert leaves_out(r"re:model\.layers\.(0|11)\..*").leaves_out(layer)
    assert not leaves_out("visual", "re:.*lm_head", "model.layers.1", "q").leaves_out(layer)
    assert not leaves_out("re:layers").leaves_out(layer)  # matched from the start, as there


def test_patterns_that_take_long_or_are_none_match_nothing() -> None:
    module = "a" * 200
    for pattern in ("re:(a+)+$b", "re:a*a*a*a*a*a*b", "re:[", "re:" + "a" * 300):
        assert not leaves_out(pattern).leaves_out(module)
