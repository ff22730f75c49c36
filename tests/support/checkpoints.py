"""Tiny random checkpoints of the supported families, in every form they are found in.

transformers itself writes them (`save_pretrained`), so that the tests meet what users have; they
are then re-laid into the older weight layouts and configuration styles:

========  =================================================================  ==================
layout    weights                                                            configuration
========  =================================================================  ==================
`5.x`     as the installed transformers writes them                          `rope_parameters`
`4.52`    `model.language_model.…`, `model.vision_tower.vision_model.…`,     `rope_theta`,
          `lm_head.weight`                                                   `rope_scaling`
`hub`     `language_model.model.…`, `language_model.lm_head.weight`,         as 4.52, and keys
          `vision_tower.vision_model.…`                                      equal to
                                                                             transformers'
                                                                             defaults left out
========  =================================================================  ==================

The random weights are larger than a fresh model's, so that logits differ clearly and greedy
decoding means something.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextProcessor,
    LlavaProcessor,
    MistralConfig,
    PreTrainedTokenizerFast,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import (
    LlavaNextImageProcessorPil,
)

from trio_deploy.checkpoint.folder import image_settings
from trio_deploy.checkpoint.safetensors import DTYPES, TensorEntry
from trio_deploy.families.base import Family
from trio_deploy.families.clip_images import clip_processor_files
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import parse_config
from trio_deploy.reference.adapters import model_class

LAYOUTS = ("5.x", "4.52", "hub")

SPECIAL = ("<unk>", "<s>", "</s>", "<pad>", "<image>")
WORDS = """
USER ASSISTANT : . , ? ! a the is are there what which where how many color colour of in on picture
image shape red green blue yellow black white circle square triangle star digit plate left right
above below yes no one two three four five six seven eight nine zero and or it this that describe
count read see cat dog car tree sky ground big small first second third last between near far you
can do not with for from to at
"""
VOCABULARY = {word: i for i, word in enumerate((*SPECIAL, *WORDS.split()))}

#: Size of the text models' vocabulary: a little more than the tokenizer's, as in real checkpoints.
VOCAB_SIZE = len(VOCABULARY) + 3
BOS, EOS, PAD, IMAGE = 1, 2, 3, 4

IMAGE_SIZE = 32
PATCH_SIZE = 8
#: (height, width) canvases: the shape of the real model's, with tiles of 32 pixels.
PINPOINTS = [[32, 64], [64, 32], [64, 64], [96, 32], [32, 96]]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% if message['content'] is string %}{{ message['content'] }} {% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }} {% endif %}"
    "{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 10000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Word-level tokenizer that puts `<s>` in front, as Llama's does."""
    tokenizer = Tokenizer(models.WordLevel(dict(VOCABULARY), unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", pair="<s> $A $B", special_tokens=[("<s>", BOS)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
    )


def make_llava(
    folder: Path,
    *,
    kv_heads: int = 2,
    mistral: bool = False,
    llama3_rope: bool = False,
    bias: bool = False,
    mlp_bias: bool = False,
    projector_bias: bool = True,
    layout: str = "5.x",
    dtype: str = "float32",
    tie: bool = False,
    shards: int = 1,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    head_dim: int | None = None,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    feature_layer: int | list[int] = -2,
    feature_strategy: str = "default",
    max_positions: int = 512,
    seed: int = 0,
) -> Path:
    """Write a LLaVA-1.5 (one tile an image, 16 visual tokens) checkpoint folder; returns it."""
    config = LlavaConfig(
        vision_config=_vision(image_size, patch_size),
        text_config=_text(
            mistral,
            kv_heads,
            llama3_rope,
            bias,
            mlp_bias,
            tie,
            hidden,
            layers,
            heads,
            head_dim,
            max_positions,
        ),
        image_token_index=IMAGE,
        image_seq_length=(image_size // patch_size) ** 2,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=feature_strategy,
        multimodal_projector_bias=projector_bias,
        tie_word_embeddings=tie,
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
        ),
        tokenizer=make_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy=feature_strategy,
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    return _save(LlavaForConditionalGeneration(config), processor, folder, layout, dtype, shards)


def make_llava_next(
    folder: Path,
    *,
    kv_heads: int = 2,
    mistral: bool = False,
    llama3_rope: bool = False,
    bias: bool = False,
    mlp_bias: bool = False,
    projector_bias: bool = True,
    layout: str = "5.x",
    dtype: str = "float32",
    tie: bool = False,
    shards: int = 1,
    hidden: int = 64,
    layers: int = 4,
    heads: int = 4,
    head_dim: int | None = None,
    image_size: int = IMAGE_SIZE,
    patch_size: int = PATCH_SIZE,
    feature_layer: int | list[int] = -2,
    max_positions: int = 512,
    pinpoints: list[list[int]] | None = None,
    seed: int = 0,
) -> Path:
    """Write a LLaVA-NeXT (any-resolution tiles, up to 88 visual tokens) folder; returns it."""
    grid = pinpoints or [[side * image_size // IMAGE_SIZE for side in pair] for pair in PINPOINTS]
    config = LlavaNextConfig(
        vision_config=_vision(image_size, patch_size),
        text_config=_text(
            mistral,
            kv_heads,
            llama3_rope,
            bias,
            mlp_bias,
            tie,
            hidden,
            layers,
            heads,
            head_dim,
            max_positions,
        ),
        image_token_index=IMAGE,
        image_grid_pinpoints=grid,
        vision_feature_layer=feature_layer,
        multimodal_projector_bias=projector_bias,
        tie_word_embeddings=tie,
    )
    processor = LlavaNextProcessor(
        image_processor=LlavaNextImageProcessorPil(
            size={"shortest_edge": image_size},
            crop_size={"height": image_size, "width": image_size},
            image_grid_pinpoints=grid,
        ),
        tokenizer=make_tokenizer(),
        patch_size=patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
    )
    torch.manual_seed(seed)
    model = LlavaNextForConditionalGeneration(config)
    return _save(model, processor, folder, layout, dtype, shards)


def make_tiny(folder: Path, family: Family) -> Path:
    """Write a random checkpoint of the sizes that a family gives in `tiny`; returns the folder."""
    raw = family.tiny()
    architecture = model_class(family.name)
    torch.manual_seed(0)
    model = architecture(architecture.config_class.from_dict(raw))
    _make_lively(model)
    model.eval().save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    config = parse_config(raw)
    files = {"preprocessor_config.json": {"size": {"shortest_edge": 4096, "longest_edge": 32768}}}
    if config.pixels is None:
        files = clip_processor_files(config)
    for name, content in files.items():
        (folder / name).write_text(json.dumps(content))
    return folder


def relay_weights(tensors: dict[str, Any], layout: str) -> dict[str, Any]:
    """The same tensors under another layout's names (`tensors`: as save_pretrained wrote them)."""
    if layout == "5.x":
        return tensors
    rules = {
        "hub": [
            (r"^vision_tower\.(?!vision_model)", "vision_tower.vision_model."),
        ],
        "4.52": [
            (r"^vision_tower\.(?!vision_model)", "model.vision_tower.vision_model."),
            (r"^language_model\.lm_head", "lm_head"),
            (r"^language_model\.model\.", "model.language_model."),
            (r"^(multi_modal_projector|image_newline)", r"model.\1"),
        ],
    }[layout]

    def rename(name: str) -> str:
        for pattern, replacement in rules:
            name, hits = re.subn(pattern, replacement, name)
            if hits:
                return name
        return name

    return {rename(name): tensor for name, tensor in tensors.items()}


def relay_config(raw: dict[str, Any], layout: str) -> dict[str, Any]:
    """The same configuration in an older style; `hub` also leaves out transformers' defaults."""
    if layout == "5.x":
        return raw
    raw = json.loads(json.dumps(raw))
    text, vision = raw["text_config"], raw["vision_config"]
    rope = text.pop("rope_parameters")
    text["rope_theta"] = rope.pop("rope_theta")
    if rope["rope_type"] != "default":
        text["rope_scaling"] = rope
    raw["torch_dtype"] = raw.pop("dtype")
    if layout == "hub":
        text_defaults = (
            MistralConfig if text["model_type"] == "mistral" else LlamaConfig
        )().to_dict()
        text_defaults |= {
            "rope_theta": 10000.0,
            "head_dim": text["hidden_size"] // text["num_attention_heads"],
        }
        vision_defaults = CLIPVisionConfig().to_dict()
        for part, defaults in ((text, text_defaults), (vision, vision_defaults)):
            for key in [k for k in part if k != "model_type" and k in defaults]:
                if part[key] == defaults[key]:
                    del part[key]
        for key in ("multimodal_projector_bias", "tie_word_embeddings", "image_seq_length"):
            if (
                raw.get(key) in (True, False, 576)
                and raw.get(key)
                == {
                    "multimodal_projector_bias": True,
                    "tie_word_embeddings": False,
                    "image_seq_length": 576,
                }[key]
            ):
                del raw[key]
    return raw


def _vision(image_size: int, patch_size: int) -> CLIPVisionConfig:
    return CLIPVisionConfig(
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=image_size,
        patch_size=patch_size,
        projection_dim=32,
    )


def _text(
    mistral: bool,
    kv_heads: int,
    llama3_rope: bool,
    bias: bool,
    mlp_bias: bool,
    tie: bool,
    hidden: int,
    layers: int,
    heads: int,
    head_dim: int | None,
    max_positions: int,
) -> LlamaConfig | MistralConfig:
    shared: dict[str, Any] = {
        "hidden_size": hidden,
        "intermediate_size": hidden * 2,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim or hidden // heads,
        "vocab_size": VOCAB_SIZE,
        "max_position_embeddings": max_positions,
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "pad_token_id": PAD,
        "initializer_range": 0.2,
        "tie_word_embeddings": tie,
    }
    if mistral:
        if bias or mlp_bias or llama3_rope:
            raise ValueError("Mistral has neither biases nor llama3 rope scaling")
        return MistralConfig(**shared, sliding_window=None)
    if llama3_rope:
        shared["rope_parameters"] = dict(LLAMA3_ROPE)
    return LlamaConfig(**shared, attention_bias=bias, mlp_bias=mlp_bias)


def _save(
    model: torch.nn.Module,
    processor: LlavaProcessor | LlavaNextProcessor,
    folder: Path,
    layout: str,
    dtype: str,
    shards: int,
) -> Path:
    if layout not in LAYOUTS:
        raise ValueError(f"layout {layout!r} is none of {LAYOUTS}")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    _make_lively(model)
    model.eval().to(getattr(torch, dtype)).save_pretrained(folder)
    processor.save_pretrained(folder)

    config_file, weights_file = folder / "config.json", folder / "model.safetensors"
    raw = json.loads(config_file.read_text())
    config_file.write_text(json.dumps(relay_config(raw, layout), indent=2))
    tensors = relay_weights(load_file(weights_file), layout)
    weights_file.unlink()
    write_shards(tensors, folder, shards)
    if layout != "5.x":
        _split_processor(folder)
    return folder


def _make_lively(model: torch.nn.Module) -> None:
    """Weights of a size at which a mistake shows, and the tokenizer's special tokens."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # Norm scales off one and biases off zero, so that a forgotten one shows.
            norms = ("norm.weight", "norm1.weight", "norm2.weight", "ln_q.weight")
            if name.endswith(norms) or "layernorm" in name or "layrnorm" in name:
                if name.endswith("weight"):
                    parameter.normal_(1.0, 0.2)
                else:
                    parameter.normal_(0.0, 0.1)
            elif name.endswith("bias"):
                parameter.normal_(0.0, 0.1)
            elif "vision_tower" in name or "projector" in name or "visual" in name:
                parameter.normal_(0.0, 0.15)
            elif "image_newline" in name:
                parameter.normal_(0.0, 0.5)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = BOS, [EOS], PAD


def write_shards(tensors: dict[str, torch.Tensor], folder: Path, shards: int) -> None:
    """Write weights as one file, or as several with an index."""
    if shards == 1:
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return
    names = sorted(tensors)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(t.numel() * t.element_size() for t in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def _split_processor(folder: Path) -> None:
    """Older checkpoints keep the image processor in a file of its own."""
    file = folder / "processor_config.json"
    raw = json.loads(file.read_text())
    images = raw.pop("image_processor", None)
    if images is not None:
        (folder / "preprocessor_config.json").write_text(json.dumps(images, indent=2))
        file.write_text(json.dumps(raw, indent=2))


def read_tensor(entry: TensorEntry) -> np.ndarray:
    """What lies at an entry, as a writable array of its own type."""
    with entry.file.open("rb") as file:
        file.seek(entry.offset)
        data = np.fromfile(file, dtype=np.uint8, count=entry.nbytes)
    return data.view(DTYPES[entry.dtype]).reshape(entry.shape)


def preprocessor_of(folder: Path) -> Preprocessor:
    """The image preprocessing of a checkpoint folder."""
    config = parse_config(json.loads((folder / "config.json").read_bytes()))
    return Preprocessor(image_settings(folder), config)
