"""Random checkpoints of the Qwen families, in the layouts that they come in."""

from __future__ import annotations

import json
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tests.support.bundles import made_once
from tests.support.checkpoints import WORDS, write_shards
from tests.support.qwen_models import ARCHITECTURES, config_json, lively

PROCESSORS = {
    "qwen2_vl": "Qwen2VLProcessor",
    "qwen2_5_vl": "Qwen2_5_VLProcessor",
    "qwen3_vl": "Qwen3VLProcessor",
}
LAYOUTS = ("5.x", "4.52", "hub")

#: What stands for the special tokens of Qwen's vocabulary, by id.
SPECIAL = {
    1: "<|im_start|>",
    2: "<|im_end|>",
    3: "<|endoftext|>",
    288: "<|vision_start|>",
    289: "<|vision_end|>",
    290: "<|image_pad|>",
    291: "<|video_pad|>",
}
TEMPLATE = (
    "{% for message in messages %}"
    "{% if loop.first and message['role'] != 'system' %}"
    "<|im_start|>system\nyou can see<|im_end|>\n{% endif %}"
    "<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}<|im_end|>\n{% else %}"
    "{% for content in message['content'] %}"
    "{% if content['type'] == 'image' or 'image' in content %}"
    "<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif 'text' in content %}{{ content['text'] }}{% endif %}"
    "{% endfor %}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer with Qwen's special tokens and no token in front."""
    words = dict.fromkeys(["<unk>", "system", "user", "assistant", *WORDS.split()])
    free = (number for number in range(288) if number not in SPECIAL)
    vocabulary = {word: number for number, word in zip(free, words, strict=False)}
    vocabulary |= {token: number for number, token in SPECIAL.items()}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL.values()),
        chat_template=TEMPLATE,
    )


def preprocessing(family: str, most_tokens: int = 48, **changes: Any) -> dict[str, Any]:
    """A preprocessor_config.json with pictures of 4 visual tokens to as many as given."""
    factor = 32 if family == "qwen3_vl" else 28
    half = [0.5, 0.5, 0.5]
    settings: dict[str, Any] = {
        "image_processor_type": "Qwen2VLImageProcessor",
        "patch_size": factor // 2,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "size": {"shortest_edge": 4 * factor**2, "longest_edge": most_tokens * factor**2},
    }
    if family == "qwen3_vl":
        settings |= {"image_mean": half, "image_std": half}
    return settings | changes


def make_qwen(
    folder: Path,
    family: str,
    *,
    layout: str = "5.x",
    tie: bool = False,
    shards: int = 1,
    dtype: str = "float32",
    seed: int = 0,
    text: dict[str, Any] | None = None,
    vision: dict[str, Any] | None = None,
    most_tokens: int = 48,
) -> Path:
    """Write a checkpoint; returns its folder.

    Args:
        text, vision: keys of these sections of config.json that replace the small sizes.
        most_tokens: visual tokens of a picture, at most.
        layout: `5.x` as save_pretrained writes it; `4.52` with names as in memory; `hub` with a
            flat config.json (Qwen2-VL and Qwen2.5-VL), old names of keys, and bounds in pixels.
    """
    folder.mkdir(parents=True, exist_ok=True)
    architecture = getattr(transformers, ARCHITECTURES[family])
    raw = config_json(family, text=text, tie_word_embeddings=tie)
    raw["vision_config"] |= vision or {}
    model = lively(architecture(architecture.config_class.from_dict(raw)), seed)
    model.generation_config.eos_token_id, model.generation_config.pad_token_id = [2], 3
    model.to(getattr(torch, dtype)).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    images = preprocessing(family, most_tokens)
    tensors = load_file(folder / "model.safetensors")
    saved = json.loads((folder / "config.json").read_text())
    if layout == "4.52":
        tensors = {_in_memory(name): tensor for name, tensor in tensors.items()}
    if layout == "hub":
        saved = flat(saved)
        size = images.pop("size")
        images |= {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}
        tensors = {_on_the_hub(name, family): tensor for name, tensor in tensors.items()}
    (folder / "config.json").write_text(json.dumps(saved))
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "model.safetensors").unlink()
    write_shards(tensors, folder, shards)
    return folder


def shared_checkpoint(run_folder: Path, family: str) -> Path:
    """`make_qwen` with its defaults, made once for the whole run: not to be changed."""
    return made_once(run_folder / f"checkpoint-{family}", lambda to: make_qwen(to, family))


def flat(raw: dict[str, Any]) -> dict[str, Any]:
    """config.json as the hub's older files have it: text keys at the top (not Qwen3-VL's)."""
    text, vision = dict(raw["text_config"]), dict(raw["vision_config"])
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    rope.pop("rope_type")
    vision.pop("rope_parameters", None)
    vision["model_type"] = raw["model_type"]
    others = {k: v for k, v in raw.items() if k not in ("text_config", "vision_config")}
    if raw["model_type"] == "qwen3_vl":
        text["rope_scaling"] = {**rope, "rope_type": "default"}
        return {**others, "text_config": text, "vision_config": vision}
    text["rope_scaling"] = {**rope, "type": "mrope"}
    vision["in_chans"] = vision.pop("in_channels")
    text.pop("model_type")
    for key in ("layer_types", "sliding_window"):
        text.pop(key, None)
    text["sliding_window"], text["use_sliding_window"] = 64, False
    return {**text, **others, "vision_config": vision}


def _in_memory(name: str) -> str:
    """Names as transformers 4.52 and later has them in memory."""
    if name.startswith(("lm_head", "model.visual.", "model.language_model.")):
        return name
    if name.startswith("visual."):
        return f"model.{name}"
    return name.replace("model.", "model.language_model.", 1)


def _on_the_hub(name: str, family: str) -> str:
    """Names of the hub's older files; Qwen3-VL's have always been those in memory."""
    if family == "qwen3_vl":
        return name
    return name.replace("model.visual.", "visual.").replace("model.language_model.", "model.")


class _WithoutClips:
    """A processor of transformers that takes no clips, for which it would need torchvision."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def make_processor(family: str, **changes: Any) -> Any:
    """transformers' own processor of texts and pictures, with `make_tokenizer` and PIL.

    Args:
        changes: of `preprocessing`.
    """
    name = PROCESSORS[family]
    module = import_module(f"transformers.models.{family}.processing_{family}")
    settings = preprocessing(family, **changes)
    settings.pop("image_processor_type")
    made = type(name, (_WithoutClips, getattr(module, name)), {})
    tokenizer = make_tokenizer()
    images = Qwen2VLImageProcessorPil(**settings)
    return made(images, tokenizer, None, tokenizer.chat_template)
