"""What the graphs, the runtime and the arithmetic need to know about a model: plain data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VisionConfig:
    """A CLIP vision tower.

    Attributes:
        feature_layers: indices into the tower's hidden states (0 = embeddings after the pre-norm,
            i = output of layer i), never negative; several are concatenated along the features.
        drop_cls: whether the class token's row is dropped (`default` strategy) or kept (`full`).
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    image_size: int
    patch_size: int
    layer_norm_eps: float
    hidden_act: str
    feature_layers: tuple[int, ...]
    drop_cls: bool

    @property
    def side(self) -> int:
        """Patches along one side of a tile."""
        return self.image_size // self.patch_size

    @property
    def rows_per_tile(self) -> int:
        """Feature rows p that one tile yields."""
        return self.side * self.side + (0 if self.drop_cls else 1)


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `scaling` is `default`, `linear` or `llama3`."""

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192


@dataclass(frozen=True)
class TextConfig:
    """A Llama-shaped language model (Llama, Vicuna, Mistral)."""

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    attention_bias: bool = False
    mlp_bias: bool = False
    tie_word_embeddings: bool = False


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model of the LLaVA kind.

    Attributes:
        family: module in `families/` that knows its weights and image layout.
        grid_pinpoints: (height, width) canvases of any-resolution tiling; empty where the family
            has one tile an image.
    """

    family: str
    vision: VisionConfig
    text: TextConfig
    projector_act: str
    projector_bias: bool
    image_token_id: int
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
