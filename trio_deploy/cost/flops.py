"""Where visual tokens are pruned, how many are kept, and what that costs.

Notation (docs/architecture.md): L layers, N visual tokens at the start, hidden size d, MLP size m,
H query heads and G key/value heads of size D, vocabulary V, P probe positions.  A *pruning point*
(l, k) means: before decoder layer l runs (0-based), keep k visual tokens.

Operations are counted as multiply-adds, one each, as the paper's formula does; a product of dense
matrices counts in full, the masked half of causal attention included.  Norms, activations, softmax
and RoPE are left out.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from trio_deploy.families.base import ModelConfig, TextConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.schedule.methods import PIVOTS
from trio_deploy.schedule.schedule import PruningPoint, Schedule

SUPPRESSION_BLOCK = 256
"""M, the ranks that suppression works through at a time."""


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


def vision_flops(config: ModelConfig, tiles: int) -> int:
    """Multiply-adds of the vision tower up to the feature layer and of the projector, per image."""
    vision, width = config.vision, config.text.hidden_size
    rows = request_limits(config).tile_rows
    features = vision.hidden_size * len(vision.feature_layers)
    return tiles * (vision.tile_flops() + rows * (features * width + width * width))


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
        kv_bytes=text.kv_bytes([n + text_tokens for n in per_layer], item_bytes),
    )
