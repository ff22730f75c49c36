"""Where visual tokens are pruned, how many are kept, and what that costs.

Notation (docs/architecture.md): L layers, N visual tokens at the start, hidden size d, MLP size m,
H query heads and G key/value heads of size D, vocabulary V, P probe positions.  A *pruning point*
(l, k) means: before decoder layer l runs (0-based), keep k visual tokens.

Operations are counted as multiply-adds, one each, as the paper's formula does; a product of dense
matrices counts in full, the masked half of causal attention included.  Norms, activations, softmax
and RoPE are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from trio_deploy.families.model_config import ModelConfig, TextConfig
from trio_deploy.schedule.methods import PIVOTS
from trio_deploy.schedule.schedule import PruningPoint, Schedule

SUPPRESSION_BLOCK = 256
"""M, the ranks that suppression works through at a time."""


_Shapes = list[tuple[float, list[float]]]
"""Budgets, rising, and what the points keep at each, in proportion to each other."""


# --- What it costs -------------------------------------------------------------------------------


def paper_layer_flops(n: int, d: int, m: int) -> int:
    """The paper's formula for one layer over n tokens: 4nd² + 2n²d + 2ndm.

    It takes H·D = G·D = d and counts two of the three matrices of a gated MLP.
    """
    return 4 * n * d * d + 2 * n * n * d + 2 * n * d * m


def layer_flops(n: int, text: TextConfig) -> int:
    """Multiply-adds of one layer over n tokens, grouped heads and all three MLP matrices counted.

    q and o: 2·n·d·HD; k and v: 2·n·d·GD; scores and their product with V: 2·n²·HD; MLP: 3·n·d·m.
    """
    d, q, kv = _widths(text)
    return n * d * (2 * q + 2 * kv) + 2 * n * n * q + 3 * n * d * text.intermediate_size


def saliency_flops(n: int, text: TextConfig, probes: int) -> int:
    """Multiply-adds of `graphs/saliency.py` over n tokens with P probe rows.

    Over all rows: keys, and their gradient back through W_k, 2·n·d·GD; q·kᵀ and dSᵀ·q, 2·P·n·HD;
    A·n, U·nᵀ and Aᵀ·U, 3·H·P·n·d.  For the probe rows: queries, P·d·HD; W_v, W_o, the MLP and
    lm_head, there and back, 2·P·(2·HD·d + 3dm + dV).
    """
    d, q, kv = _widths(text)
    all_rows = n * (2 * d * kv + 2 * probes * q + 3 * text.num_heads * probes * d)
    there = 2 * q * d + 3 * d * text.intermediate_size + d * text.vocab_size
    return all_rows + probes * (d * q + 2 * there)


def similarity_flops(visual: int, keep: int, block: int, d: int) -> int:
    """Multiply-adds of suppression at worst: N·(k + M) cosine similarities in blocks of M ranks."""
    return visual * min(visual, keep + block) * d


def method_flops(
    point: PruningPoint,
    before: int,
    after: int,
    text_tokens: int,
    text: TextConfig,
    probes: int,
    block: int,
) -> tuple[int, int]:
    """Multiply-adds of a pruning point of `before` visual tokens: of its scores, of comparisons.

    n tokens in all.  `fastv`: keys of all rows and one query, n·d·GD + d·HD + n·HD.  `dart`: keys,
    unless before layer 0, and the cosines of eight pivots, 8·n·d.  `divprune`: all cosines, n²·d.
    `vscan`: cosines of all tokens with those that stay, and their means, 2·n·(text + after)·d.
    `random` and `cls-attention` compute next to nothing here.
    """
    n = before + text_tokens
    d, q, kv = _widths(text)
    if point.method == "trio":
        return saliency_flops(n, text, probes), similarity_flops(before, after, block, d)
    if point.method == "topk-gradient":
        return saliency_flops(n, text, probes), 0
    if point.method == "fastv":
        return n * d * kv + d * q + n * q, 0
    if point.method == "dart":
        return (n * d * kv if point.layer else 0), 2 * PIVOTS * n * d
    if point.method == "divprune":
        return 0, n * n * d
    if point.method == "vscan":
        return 0, 2 * n * (text_tokens + after) * d
    return 0, 0


def lm_head_flops(text: TextConfig) -> int:
    """Multiply-adds of the one row of logits that a prefill ends in."""
    return text.hidden_size * text.vocab_size


def max_tiles(config: ModelConfig) -> int:
    """Tiles that the largest image is cut into: the overview, and the largest canvas's tiles."""
    tile = config.vision.image_size**2
    return 1 + max((h * w // tile for h, w in config.grid_pinpoints), default=0)


def max_visual_tokens(config: ModelConfig) -> int:
    """Visual tokens of the image that has most, one newline a row of a tiled one included."""
    patch = config.vision.patch_size
    tiled = (h // patch * (w // patch + 1) for h, w in config.grid_pinpoints)
    return config.vision.rows_per_tile + max(tiled, default=0)


def vision_flops(config: ModelConfig, tiles: int) -> int:
    """Multiply-adds of the CLIP tower up to the feature layer and of the projector, per picture."""
    vision = config.vision
    d, m = vision.hidden_size, vision.intermediate_size
    patches = vision.side * vision.side
    n = patches + 1  # the class token
    layer = 4 * n * d * d + 2 * n * n * d + 2 * n * d * m
    embedding = patches * 3 * vision.patch_size**2 * d
    width = config.text.hidden_size
    projector = vision.rows_per_tile * (d * len(vision.feature_layers) * width + width * width)
    return tiles * (embedding + max(vision.feature_layers) * layer + projector)


def kv_bytes(lengths: Sequence[int], text: TextConfig, item_bytes: int) -> int:
    """Bytes of keys and values when layer i holds lengths[i] tokens: 2·G·D·bytes·Σ lengths."""
    return 2 * text.num_kv_heads * text.head_dim * item_bytes * sum(lengths)


def _widths(text: TextConfig) -> tuple[int, int, int]:
    """(d, H·D, G·D)."""
    return (
        text.hidden_size,
        text.num_heads * text.head_dim,
        text.num_kv_heads * text.head_dim,
    )


@dataclass(frozen=True)
class Cost:
    """What one prefill costs; multiply-adds, and bytes at the end of it.

    Attributes:
        ranges: (start, stop, visual tokens, all tokens) of each layer range.
        average: visual tokens a layer, averaged over the layers.
        paper: the paper's formula over visual tokens alone, selection free of charge.
        layers: all layers over all tokens, text included.
        saliency: the scores of all pruning points that prune: TRIO's probes, others' attention.
        similarity: their comparisons of tokens: TRIO's suppression, at worst; others' cosines.
        lm_head: the last row's logits.
    """

    ranges: tuple[tuple[int, int, int, int], ...]
    average: float
    paper: int
    layers: int
    saliency: int
    similarity: int
    lm_head: int
    kv_bytes: int

    @property
    def selection(self) -> int:
        return self.saliency + self.similarity

    @property
    def honest(self) -> int:
        """Everything the language model's prefill computes."""
        return self.layers + self.selection + self.lm_head


def account(
    text: TextConfig,
    schedule: Schedule,
    visual: int,
    text_tokens: int,
    *,
    item_bytes: int,
    probes: int,
    block: int = SUPPRESSION_BLOCK,
) -> Cost:
    """Cost of a prefill of `visual` + `text_tokens` tokens under `schedule`.

    Args:
        item_bytes: bytes of one number in the KV cache.
        probes: P, probe positions a pruning point.
        block: M, ranks that suppression works through at a time.
    """
    per_layer = schedule.visual_per_layer(visual, text.num_layers)
    counts = (visual, *schedule.resolve(visual))
    saliency = similarity = 0
    for point, (before, after) in zip(schedule.points, pairwise(counts), strict=True):
        if after < before:
            scores, comparisons = method_flops(
                point, before, after, text_tokens, text, probes, block
            )
            saliency, similarity = saliency + scores, similarity + comparisons
    return Cost(
        ranges=tuple(
            (start, stop, count, count + text_tokens)
            for count, (start, stop) in zip(counts, schedule.segments(text.num_layers), strict=True)
            if stop > start
        ),
        average=sum(per_layer) / text.num_layers,
        paper=sum(
            paper_layer_flops(n, text.hidden_size, text.intermediate_size) for n in per_layer
        ),
        layers=sum(layer_flops(n + text_tokens, text) for n in per_layer),
        saliency=saliency,
        similarity=similarity,
        lm_head=lm_head_flops(text),
        kv_bytes=kv_bytes([n + text_tokens for n in per_layer], text, item_bytes),
    )
