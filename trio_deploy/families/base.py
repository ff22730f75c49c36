"""A model family: its configurations, the layout of an image, and what its file fills in."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
from PIL import Image

TILES_AT_ONCE = 8
"""Tiles per run of the vision tower, which bounds its memory."""

PATCHES_AT_ONCE = 8192
"""Patches of pictures of any size per run of the vision tower, unless one picture has more: small
pictures of one size share runs."""

VISUAL_TOKEN = "\ufffc"
"""Stands for the model's image token in `Layout.text`."""


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

    def counts(self, tiles: int, visual_tokens: int) -> ImageCounts:
        """What an image of so many tiles brings."""
        values = 3 * self.image_size**2  # float32
        return ImageCounts(4 * tiles * values, tiles * self.side**2, visual_tokens)

    def describe(self) -> str:
        """The tower in a few words, for reports."""
        return f"{self.num_layers} layers, {self.image_size} pixels per tile"

    @property
    def layers_read(self) -> tuple[str, int]:
        """Canonical name of the layers, and how many of them the features need."""
        return "vision_tower.encoder.layers", max(self.feature_layers)

    def tile_flops(self) -> int:
        """Multiply-adds of the tower per tile, up to the last layer whose features are read."""
        d, m = self.hidden_size, self.intermediate_size
        patches = self.side * self.side
        n = patches + 1  # the class token
        layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
        embedding = patches * 3 * self.patch_size**2 * d
        return embedding + max(self.feature_layers) * layer


@dataclass(frozen=True)
class PatchTowerConfig:
    """A Qwen vision tower: frames of any size, cut into patches, merged in squares at the end.

    A frame has L patches, in the order of the squares of merge x merge patches that become one
    visual token, row by row; a patch is (channel, time, row, column) flattened.

    Attributes:
        patch_size: pixels along a side of a patch.
        temporal_patch_size: pictures in a row that one frame holds; a picture is repeated.
        merge: patches along a side of the square that becomes one visual token.
        norm: kind of the layers' norms and of the merger's.
        mlp: names and form of the layers' MLP, and names of the mergers' parts: `fc` (Qwen2-VL:
            fc1, fc2; merger ln_q, mlp.0, mlp.2), `gated` (Qwen2.5-VL: gate_proj, up_proj,
            down_proj; the same merger), `linear_fc` (Qwen3-VL: linear_fc1, linear_fc2; merger norm,
            linear_fc1, linear_fc2).
        hidden_act: activation of the layers' MLP; the mergers' is `gelu`.
        patch_bias: whether the projection of the patches has a bias.
        window: visual tokens along a side of the windows that layers attend within, or None: all
            attend to the whole frame.
        full_layers: with windows, the layers that attend to the whole frame.
        position_side: entries along a side of the square table of learned positions, or None.
        deepstack_layers: layers whose output is merged on its own, for decoder layers 0, 1, …
        norm_eps: of the norms and of the mergers'.
    """

    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    patch_size: int
    norm: Literal["layer", "rms"]
    mlp: Literal["fc", "gated", "linear_fc"]
    hidden_act: str
    temporal_patch_size: int = 2
    merge: int = 2
    in_channels: int = 3
    patch_bias: bool = False
    window: int | None = None
    full_layers: tuple[int, ...] = ()
    position_side: int | None = None
    deepstack_layers: tuple[int, ...] = ()
    norm_eps: float = 1e-6

    @property
    def layers_read(self) -> tuple[str, int]:
        """Canonical name of the layers, and how many of them the features need."""
        return "visual.blocks", self.num_layers

    @property
    def patch_values(self) -> int:
        """Numbers c that one patch consists of."""
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def factor(self) -> int:
        """Pixels along a side of one visual token."""
        return self.patch_size * self.merge

    @property
    def window_slots(self) -> int:
        """Patches K that a window has room for; 0 without windows."""
        return 0 if self.window is None else (self.window * self.merge) ** 2

    def is_windowed(self, layer: int) -> bool:
        """Whether a layer attends within windows."""
        return self.window is not None and layer not in self.full_layers

    def describe(self) -> str:
        """The tower in a few words, for reports."""
        return f"{self.num_layers} layers, patches of {self.patch_size} pixels"

    def flops(self, patches: int, width: int) -> int:
        """Multiply-adds per frame of L patches, mergers to `width` features included.

        A layer takes 4·L·h² + 2·L·n·h + 2 or 3 L·h·m, n patches being attended to by each: L, or
        the K slots of a window; its windows are counted as full.
        """
        h, m = self.hidden_size, self.intermediate_size
        dense = 4 * h * h + (3 if self.mlp == "gated" else 2) * h * m
        total = patches * self.patch_values * h
        for layer in range(self.num_layers):
            seen = self.window_slots if self.is_windowed(layer) else patches
            total += patches * (dense + 2 * seen * h)
        square = self.merge**2
        merger = patches // square * (square * h) * (square * h + width)
        return total + merger * (1 + len(self.deepstack_layers))


@dataclass(frozen=True)
class RopeConfig:
    """Rotary position embedding; `scaling` is `default`, `linear` or `llama3`.

    Attributes:
        axes: for each of the D/2 frequencies the row of three, 0 time, 1 row, 2 column, that its
            position is taken from; None where a token has one position.
    """

    theta: float
    scaling: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_positions: int = 8192
    axes: tuple[int, ...] | None = None


@dataclass(frozen=True)
class TextConfig:
    """A Llama-shaped language model (Llama, Vicuna, Mistral, Qwen2, Qwen3).

    Attributes:
        qkv_bias, o_bias, mlp_bias: whether the projections to queries, keys and values, the one
            out of the attention, and those of the MLP have biases.
        qk_norm: whether each head of queries and keys is normalised before it is rotated.
        tie_word_embeddings: whether the embeddings serve as the output head. config.json says
            so first; where a checkpoint is at hand, its tensors decide (checkpoint/fit.py).
    """

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
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_word_embeddings: bool = False

    def kv_bytes(self, lengths: Sequence[int], item_bytes: int) -> int:
        """Bytes of keys and values when layer i holds lengths[i] tokens: 2·G·D·bytes·Σ lengths."""
        return 2 * self.num_kv_heads * self.head_dim * item_bytes * sum(lengths)


@dataclass(frozen=True)
class ModelConfig:
    """A vision-language model: tower, connector and language model.

    Attributes:
        family: name in `families.registry.FAMILIES`.
        grid_pinpoints: (height, width) canvases of any-resolution tiling; empty where the family
            has one tile per image.
        newline: whether the checkpoint has an `image_newline` embedding.
        pixels: least and most pixels that a picture is resized to; None where that does not depend
            on its own size. They come from the preprocessing settings (`families.preprocessing`).
    """

    family: str
    vision: VisionConfig | PatchTowerConfig
    text: TextConfig
    projector_act: str
    projector_bias: bool
    image_token_id: int
    grid_pinpoints: tuple[tuple[int, int], ...] = ()
    newline: bool = False
    pixels: tuple[int, int] | None = None

    @property
    def clip(self) -> VisionConfig:
        """The tower of a family that has a CLIP tower."""
        assert isinstance(self.vision, VisionConfig)
        return self.vision

    @property
    def patch_tower(self) -> PatchTowerConfig:
        """The tower of a family that has a tower of patches."""
        assert isinstance(self.vision, PatchTowerConfig)
        return self.vision

    @property
    def deepstack(self) -> int:
        """J: the outputs of decoder layers 0…J-1 get features of their own added."""
        vision = self.vision
        return len(vision.deepstack_layers) if isinstance(vision, PatchTowerConfig) else 0

    def with_tied_head(self, tied: bool) -> ModelConfig:
        """The same model, whose embeddings serve as the output head or do not."""
        return replace(self, text=replace(self.text, tie_word_embeddings=tied))


OUTSIDE_GRAPHS = frozenset({"max_positions", "image_token_id", "grid_pinpoints", "pixels"})
"""Fields of the configurations that no graph depends on: prompts and images are made with them."""


@dataclass(frozen=True)
class Layout:
    """One image as the vision tower and the prompt take it.

    Attributes:
        feeds: the tower's inputs by name, ready to run; `pixel_values` is float32 [T, 3, h, w],
            one entry per tile, or [1, L, c], the patches of a picture of any size.
        feature_rows: rows of features that the tower and the connector yield for these feeds.
        text: what replaces the image's placeholder in the prompt, `VISUAL_TOKEN` written once per
            visual token.
        rows: int64 [n], feature row of each visual token, in order; -1 is the newline embedding.
        boxes: float64 [n, 4], x0, y0, x1, y1 in pixels of the image; nan for tokens without a
            place (newline, class token).
        size: (height, width) of the image, upright.
        grids: frames, rows and columns of each run of visual tokens, where pictures have any size:
            those of equal grids may share a run of the tower.
    """

    feeds: dict[str, np.ndarray]
    feature_rows: int
    text: str
    rows: np.ndarray
    boxes: np.ndarray
    size: tuple[int, int]
    grids: tuple[tuple[int, int, int], ...] = ()


def grids_of(images: Sequence[Layout], config: ModelConfig) -> list[tuple[int, int, int]] | None:
    """The grids of a prompt's images, in order; None where tokens have a single position."""
    if config.text.rope.axes is None:
        return None
    return [grid for image in images for grid in image.grids]


@dataclass(frozen=True)
class ImageCounts:
    """What one image brings, which its size alone tells.

    Attributes:
        input_bytes: of the tower's inputs, as `Layout.feeds` has them.
        patches: of all its tiles.
        visual_tokens: tokens in the prompt.
    """

    input_bytes: int
    patches: int
    visual_tokens: int


@dataclass(frozen=True)
class Limits:
    """The most that one image of a request can bring.

    Attributes:
        tiles: entries along the tower's axis T per image.
        tile_rows: feature rows per tile.
        tile_values: numbers per tile that the tower takes.
        visual_tokens: tokens in the prompt per image.
        picture: (width, height) of an image that brings all of these.
        rows_at_once: feature rows per run of the tower, at most, unless one image brings more.
        axes: least, typical and greatest size of each axis of the tower's inputs but T, by its
            name, where pictures have any size.
    """

    tiles: int
    tile_rows: int
    tile_values: int
    visual_tokens: int
    picture: tuple[int, int]
    rows_at_once: int
    axes: Mapping[str, tuple[int, int, int]] = field(default_factory=dict)

    @property
    def tiles_at_once(self) -> int:
        """Tiles of the greatest size per run of the tower."""
        return max(1, self.rows_at_once // self.tile_rows)


@dataclass(frozen=True)
class TowerSizes:
    """Sizes of a vision tower.

    Attributes:
        image, patch: pixels along a side of the largest picture, and of a patch.
    """

    width: int
    layers: int
    mlp: int
    heads: int
    image: int
    patch: int


def _itself(config: ModelConfig) -> ModelConfig:
    return config


def _nothing(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    return {}


@dataclass(frozen=True)
class HubLayout:
    """How checkpoints of a family lie on the hub, by which one with random weights is written.

    Attributes:
        tokens: special tokens of pictures, by the key of config.json that holds their id; the
            token that stands for a picture comes first.
        picture: what a chat template writes for a picture, and raw prompts begin with.
        prefixes: (canonical prefix, prefix on the hub); the first that fits a name counts.
        config: config.json without `tokens` for sizes of the tower and, in transformers' words, of
            the language model. Raises TrioError on sizes that the family cannot have.
        files: preprocessor_config.json and processor_config.json of a model that has none.
        whole: the same model as if every layer of its checkpoints were read.
        unread: names and shapes of further tensors, which no graph reads.
    """

    tokens: Mapping[str, str]
    picture: str
    prefixes: tuple[tuple[str, str], ...]
    config: Callable[[TowerSizes, Mapping[str, Any]], dict[str, Any]]
    files: Callable[[ModelConfig], dict[str, dict[str, Any]]]
    whole: Callable[[ModelConfig], ModelConfig] = _itself
    unread: Callable[[ModelConfig], dict[str, tuple[int, ...]]] = _nothing

    def name(self, canonical: str) -> str:
        """A tensor's name on the hub."""
        for ours, theirs in self.prefixes:
            if canonical.startswith(ours):
                return theirs + canonical[len(ours) :]
        return canonical


@dataclass(frozen=True)
class Family:
    """A model family: all that differs between one and another.

    Attributes:
        name: `model_type` in config.json, and the family's name in `ModelConfig.family`.
        architecture: transformers' class of its checkpoints.
        prefixes: (prefix in a checkpoint, canonical prefix), applied one after another to each
            tensor name; between them they undo the layouts that checkpoints come in.
        settings: preprocessor_config.json to the keys that are read, transformers' defaults filled
            in, and to what `arrange` takes. Raises TrioError on what does not fit the model.
        read: config.json to sizes and options. Raises TrioError on what is not supported.
        arrange: tiles and token order of an upright RGB image.
        counts: what an upright image of (height, width) pixels brings. Raises TrioError where
            `arrange` refuses such a size.
        request_limits: the most that one image brings, for profiles, plans, admission, benchmarks.
        reference: name of the adapter in reference/adapters.py that the oracle runs it with.
        tiny: a config.json with small sizes, for tests with random weights.
        hub: how its checkpoints lie on the hub.
        positions: position ids after pruning that the model can take, the default first.
    """

    name: str
    architecture: str
    prefixes: tuple[tuple[str, str], ...]
    settings: Callable[[Mapping[str, Any], ModelConfig], tuple[dict[str, Any], Any]]
    read: Callable[[Mapping[str, Any]], ModelConfig]
    arrange: Callable[[Image.Image, Any, ModelConfig], Layout]
    counts: Callable[[tuple[int, int], ModelConfig], ImageCounts]
    request_limits: Callable[[ModelConfig], Limits]
    reference: str
    tiny: Callable[[], dict[str, Any]]
    hub: HubLayout
    positions: tuple[str, ...] = ("renumber", "original")
