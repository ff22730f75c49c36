"""Roles of the inputs and outputs of graphs, by the names of the contract in docs/architecture.md.

Exports look roles up here once, and so does the reader of schema-1 manifests, which had none; from
there on the manifest says them.
"""

from __future__ import annotations

import re

from trio_deploy.bundle.manifest import Kind, Role, TensorInfo

_ROLES: dict[str, Role] = {
    "image_features": "features",
    "input_ids": "ids",
    "token_embeddings": "token_embeddings",
    "source_index": "source",
    "inputs_embeds": "tokens",
    "hidden_states": "tokens",
    "hidden_states_out": "tokens",
    "position_ids": "positions",
    "position_ids_out": "positions",
    "feature_index": "feature_index",
    "feature_index_out": "feature_index",
    "lengths": "lengths",
    "lengths_out": "lengths",
    "past_lengths": "past_lengths",
    "visual_mask": "visual",
    "visual_mask_out": "visual",
    "keep": "count",
    "width": "width",
    "seed": "seed",
    "keep_index": "index",
    "saliency": "score",
    "converged": "converged",
    "logits": "logits",
}
_DEEPSTACK = re.compile(r"deepstack\.\d+")
_CACHE = re.compile(r"(?:past|present)\.(\d+)\.(key|value)")


def tensor_info(
    kind: Kind, name: str, dtype: str, shape: tuple[int | str, ...], *, is_input: bool
) -> TensorInfo:
    """Describe an input or output of a stage.

    A name that the contract does not know is an input of the vision tower, or a value per token:
    what the tower returns per image row, and a selection or segment reads per token.
    """
    if match := _CACHE.fullmatch(name):
        part = "key" if match[2] == "key" else "value"
        return TensorInfo(name, dtype, shape, "cache", int(match[1]), part)  # type: ignore[arg-type]
    if kind == "decode" and name == "lengths":  # of the past: the new token is counted apart
        return TensorInfo(name, dtype, shape, "past_lengths")
    if _DEEPSTACK.fullmatch(name):
        return TensorInfo(name, dtype, shape, "deepstack")
    default: Role = "image" if kind == "vision" and is_input else "per_token"
    return TensorInfo(name, dtype, shape, _ROLES.get(name, default))
