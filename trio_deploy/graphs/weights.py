"""The tensors of a checkpoint that graphs use, and how each is stored."""

from __future__ import annotations

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.connectors import Newline, make_connector
from trio_deploy.graphs.dialects.primitive import PrimitiveDialect
from trio_deploy.graphs.modules import DecoderLayer, Embedding, Head
from trio_deploy.graphs.towers import make_tower
from trio_deploy.graphs.values import FLOAT_TYPES
from trio_deploy.graphs.weight import Weight
from trio_deploy.quant.stored_weight import StoredWeight


def canonical_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name each tensor that the graphs use, with its shape in the checkpoint."""
    return {weight.name: weight.shape for weight in stored_weights(config, "float32")}


def stored_weights(config: ModelConfig, dtype: str) -> list[StoredWeight]:
    """List how each tensor that the graphs use is stored, `dtype` being the graphs' float type.

    The modules of all stages declare them; weight files of a bundle are laid out in this order.
    Layers of the vision tower above the last one whose features are read are left out, and so is
    `lm_head.weight` if the embeddings serve as the head.
    """
    d, text = PrimitiveDialect(FLOAT_TYPES[dtype]), config.text  # the dialects' parts are the same
    modules = [
        make_tower(d, config),
        make_connector(d, config),
        Newline(d, config),
        Embedding.of_tokens(d, text),
        *(DecoderLayer(d, text, i) for i in range(text.num_layers)),
        Head(d, text),
    ]
    weights = (weight for module in modules for weight in module.parameters())
    stored = (weight.stored for weight in weights if isinstance(weight, Weight))
    return list({weight.name: weight for weight in stored}.values())
