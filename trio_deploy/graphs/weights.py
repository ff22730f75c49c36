"""The tensors of a checkpoint that graphs use, and how each is stored."""

from __future__ import annotations

from trio_deploy.families.base import ModelConfig
from trio_deploy.graphs.connectors import Newline, make_connector
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.dialects.primitive import PrimitiveDialect
from trio_deploy.graphs.modules import DecoderLayer, Embedding, Head
from trio_deploy.graphs.towers import make_tower
from trio_deploy.graphs.values import FLOAT_TYPES
from trio_deploy.graphs.weight import PartValue
from trio_deploy.quant.stored_weight import StoredWeight


def canonical_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name each tensor that the graphs use, with its shape in the checkpoint."""
    plain = PrimitiveDialect(FLOAT_TYPES["float32"])  # float parts are the same in every dialect
    return {weight.name: weight.shape for weight in stored_weights(config, plain)}


def stored_weights(config: ModelConfig, *dialects: Dialect) -> list[StoredWeight]:
    """List how each tensor that graphs of some dialects use is stored.

    The modules of all stages declare them; weight files of a bundle are laid out in this order.
    Layers of the vision tower above the last one whose features are read are left out, and so is
    `lm_head.weight` if the embeddings serve as the head. A matrix that dialects code differently,
    such as segments and selections, is listed once for each.
    """
    found = [weight for d in dialects for weight in _declared(config, d)]
    return list({weight.parts[0].name: weight for weight in found}.values())


def _declared(config: ModelConfig, d: Dialect) -> list[StoredWeight]:
    text = config.text
    modules = [
        make_tower(d, config),
        make_connector(d, config),
        Newline(d, config),
        Embedding.of_tokens(d, text),
        *(DecoderLayer(d, text, i) for i in range(text.num_layers)),
        Head(d, text),
    ]
    parts = (part for module in modules for part in module.parameters())
    return [part.stored for part in parts if isinstance(part, PartValue)]
