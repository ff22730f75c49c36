"""Operations and KV cache of a schedule, by counting.

Notation (docs/architecture.md): L layers, N visual tokens at the start, hidden size d, MLP size m,
H query heads and G key/value heads of size D, vocabulary V, P probe positions.  A *pruning point*
(l, k) means: before decoder layer l runs (0-based), keep k visual tokens.

Operations are counted as multiply-adds, one each, as the paper's formula does; a product of dense
matrices counts in full, the masked half of causal attention included.  Norms, activations, softmax
and RoPE are not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from trio_deploy.families.base import ModelConfig, PatchTowerConfig, TextConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.schedule.methods import PointSizes, load
from trio_deploy.schedule.schedule import Schedule

SUPPRESSION_BLOCK = 256
"""M, ranks per block of the suppression."""

_TOWER_VALUES = 7
"""Values per patch that a tower holds at its peak, in sums of hidden size and intermediate size
(half as much again where the MLP has a gate): 5 to 7.3 as measured on CPUs."""


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


def lm_head_flops(text: TextConfig) -> int:
    """Multiply-adds of the one row of logits that a prefill ends in."""
    return text.hidden_size * text.vocab_size


def vision_flops(config: ModelConfig, tiles: int, rows: int | None = None) -> int:
    """Multiply-adds of the vision tower and its connector, per image.

    Args:
        tiles: entries along the tower's axis T.
        rows: feature rows per tile, where tiles have any size; None: as many as they can have.
    """
    vision, width = config.vision, config.text.hidden_size
    most = request_limits(config).tile_rows
    if isinstance(vision, PatchTowerConfig):
        return tiles * vision.flops((most if rows is None else rows) * vision.merge**2, width)
    features = vision.hidden_size * len(vision.feature_layers)
    return tiles * (vision.tile_flops() + most * (features * width + width * width))


def vision_bytes(
    config: ModelConfig,
    tiles: int,
    rows: int | None = None,
    *,
    item_bytes: int,
    query_block: int | None = None,
) -> int:
    """Bytes that a run of the vision tower takes beside its weights, on a CPU: an estimate.

    Most are the values between two products of a layer: `_TOWER_VALUES`, as measured
    (docs/measurements/tower-memory.md). A runtime that holds scores has those of a block of queries
    twice, before and behind the softmax.

    Args:
        tiles, rows: as of `vision_flops`.
        item_bytes: bytes per value.
        query_block: as of `GraphOptions`.
    """
    vision = config.vision
    inner = vision.intermediate_size
    if isinstance(vision, PatchTowerConfig):
        inner = inner * 3 // 2 if vision.mlp == "gated" else inner
        most = request_limits(config).tile_rows
        patches = (most if rows is None else rows) * vision.merge**2
    else:
        patches = vision.side**2 + 1  # the class token
    values = _TOWER_VALUES * tiles * patches * (vision.hidden_size + inner)
    scores = 2 * vision.num_heads * min(query_block or 0, patches) * patches
    return values * item_bytes + scores * 4  # float32


def _widths(text: TextConfig) -> tuple[int, int, int]:
    """(d, H·D, G·D)."""
    return (
        text.hidden_size,
        text.num_heads * text.head_dim,
        text.num_kv_heads * text.head_dim,
    )


@dataclass(frozen=True)
class Cost:
    """Cost of one prefill: multiply-adds, and bytes at the end of it.

    Attributes:
        ranges: (start, stop, visual tokens, all tokens) of each layer range.
        average: visual tokens per layer, averaged over the layers.
        paper: the paper's formula, over visual tokens alone and without selection.
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
    def prefill(self) -> int:
        """The whole prefill of the language model: layers, selection and logits."""
        return self.layers + self.selection + self.lm_head

    def prefill_json(self) -> dict[str, int]:
        """Multiply-adds of the prefill, which is the sum of the others."""
        return {
            "prefill": self.prefill,
            "layers": self.layers,
            "saliency": self.saliency,
            "suppression_at_most": self.similarity,
            "lm_head": self.lm_head,
        }


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
        probes: P, probe positions per pruning point.
        block: M, ranks per block of the suppression.
    """
    per_layer = schedule.visual_per_layer(visual, text.num_layers)
    counts = (visual, *schedule.resolve(visual))
    saliency = similarity = 0
    for point, (before, after) in zip(schedule.points, pairwise(counts), strict=True):
        if after < before:
            sizes = PointSizes(point.layer, before, after, text_tokens, probes, block)
            scores, comparisons = load(point.method).flops(text, sizes)
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
