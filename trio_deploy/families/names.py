"""Canonical tensor names and shapes, and how the names in a checkpoint map to them."""

from __future__ import annotations

from collections.abc import Iterable

from trio_deploy.errors import TrioError
from trio_deploy.families.base import Family, ModelConfig
from trio_deploy.families.registry import get_family


def canonical_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor that the graphs use, by canonical name, with its shape (checkpoint layout).

    Linear weights are [out, in]. Layers of the vision tower above the last one whose features
    are read are left out, and so is `lm_head.weight` where the embeddings serve as the head.
    """
    return {
        **_vision_tensors(config),
        **_projector_tensors(config),
        **({"image_newline": (config.text.hidden_size,)} if config.newline else {}),
        **_text_tensors(config),
    }


def map_checkpoint_names(config: ModelConfig, names: Iterable[str]) -> dict[str, str]:
    """Canonical name → name in the checkpoint, for all of `canonical_tensors`.

    Tensors that the graphs have no use for (position buffers, unused layers) are ignored.

    Args:
        config: of the checkpoint.
        names: of all its tensors, in any of the three layouts.

    Raises:
        TrioError: a tensor is missing or there twice, or the weights hold unmerged adapters.
    """
    family = _family(config)
    wanted = canonical_tensors(config)
    found: dict[str, str] = {}
    for name in names:
        if ".lora_" in name or ".base_layer." in name:
            raise TrioError(
                f"The checkpoint holds an unmerged LoRA adapter (tensor {name!r}); merge it "
                "first, e.g. with PEFT's merge_and_unload(), and save the result."
            )
        canonical = canonical_name(family, name)
        if canonical not in wanted:
            continue
        if canonical in found:
            raise TrioError(
                f"The checkpoint has {canonical!r} twice: as {found[canonical]!r} and {name!r}."
            )
        found[canonical] = name
    missing = [name for name in wanted if name not in found]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise TrioError(
            f"The checkpoint lacks tensor {missing[0]!r}{more}; config.json and the weights do "
            "not belong together, or the download is incomplete."
        )
    return {name: found[name] for name in wanted}


def canonical_name(family: Family, name: str) -> str:
    """What a checkpoint's tensor is called here, whichever layout it comes in."""
    for prefix, replacement in family.prefixes:
        if name.startswith(prefix):
            name = replacement + name[len(prefix) :]
    return name


def _family(config: ModelConfig) -> Family:
    return get_family(config.family)


def _linear(name: str, out: int, into: int, bias: bool) -> dict[str, tuple[int, ...]]:
    weight: dict[str, tuple[int, ...]] = {f"{name}.weight": (out, into)}
    return {**weight, f"{name}.bias": (out,)} if bias else weight


def _layer_norm(name: str, size: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}.weight": (size,), f"{name}.bias": (size,)}


def _vision_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    vision = config.vision
    d, m, patch = vision.hidden_size, vision.intermediate_size, vision.patch_size
    tensors: dict[str, tuple[int, ...]] = {
        "vision_tower.embeddings.class_embedding": (d,),
        "vision_tower.embeddings.patch_embedding.weight": (d, 3, patch, patch),
        "vision_tower.embeddings.position_embedding.weight": (vision.side**2 + 1, d),
        **_layer_norm("vision_tower.pre_layrnorm", d),
    }
    for i in range(max(vision.feature_layers)):
        layer = f"vision_tower.encoder.layers.{i}"
        tensors |= _layer_norm(f"{layer}.layer_norm1", d)
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            tensors |= _linear(f"{layer}.self_attn.{part}", d, d, bias=True)
        tensors |= _layer_norm(f"{layer}.layer_norm2", d)
        tensors |= _linear(f"{layer}.mlp.fc1", m, d, bias=True)
        tensors |= _linear(f"{layer}.mlp.fc2", d, m, bias=True)
    return tensors


def _projector_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    features = config.vision.hidden_size * len(config.vision.feature_layers)
    d, bias = config.text.hidden_size, config.projector_bias
    return {
        **_linear("multi_modal_projector.linear_1", d, features, bias),
        **_linear("multi_modal_projector.linear_2", d, d, bias),
    }


def _text_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    text = config.text
    d, m = text.hidden_size, text.intermediate_size
    queries, keys = text.num_heads * text.head_dim, text.num_kv_heads * text.head_dim
    tensors: dict[str, tuple[int, ...]] = {
        "language_model.embed_tokens.weight": (text.vocab_size, d)
    }
    for i in range(text.num_layers):
        layer = f"language_model.layers.{i}"
        tensors[f"{layer}.input_layernorm.weight"] = (d,)
        tensors |= _linear(f"{layer}.self_attn.q_proj", queries, d, text.qkv_bias)
        tensors |= _linear(f"{layer}.self_attn.k_proj", keys, d, text.qkv_bias)
        tensors |= _linear(f"{layer}.self_attn.v_proj", keys, d, text.qkv_bias)
        tensors |= _linear(f"{layer}.self_attn.o_proj", d, queries, text.o_bias)
        tensors[f"{layer}.post_attention_layernorm.weight"] = (d,)
        tensors |= _linear(f"{layer}.mlp.gate_proj", m, d, text.mlp_bias)
        tensors |= _linear(f"{layer}.mlp.up_proj", m, d, text.mlp_bias)
        tensors |= _linear(f"{layer}.mlp.down_proj", d, m, text.mlp_bias)
    tensors["language_model.norm.weight"] = (d,)
    if not text.tie_word_embeddings:
        tensors["lm_head.weight"] = (text.vocab_size, d)
    return tensors
