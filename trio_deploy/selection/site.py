"""What a method's graph is given at a pruning point: inputs, the next layer, operators.

Methods import neither ONNX nor the rooms that write graphs, so that a device without them can
check a bundle: whatever else than plain operators a graph needs, it takes from its `Site`.

B rows, S tokens, N of them visual, d hidden size, H query heads, G key/value heads, D head size,
M block size, W width after pruning.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.graph import Stage
from trio_deploy.graphs.loops import any_of, counted_loop, loop_while
from trio_deploy.graphs.modules import DecoderLayer, RMSNorm
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import positions_at, rotary_angles
from trio_deploy.graphs.values import (
    FLOAT,
    INT64,
    cast,
    constant,
    dim,
    merge_heads,
    reduce,
)
from trio_deploy.selection.choice import Choice, Value
from trio_deploy.selection.ranking import greatest, largest
from trio_deploy.selection.saliency import Saliency, Tokens, saliency
from trio_deploy.selection.suppression import NORM_FLOOR, Suppression


@dataclass(frozen=True)
class Site:
    """A pruning point.

    Attributes:
        stage: the graph, for inputs of the method's own.
        layer: number of the layer that runs next.
        tokens: the input of that layer.
        lengths: int64 [B], valid tokens.
        keep: int64 [B], visual tokens to keep.
        width: int64 [1], W.
        block: M, ranks that are worked through at a time.
    """

    stage: Stage
    d: Dialect
    text: TextConfig
    layer: int
    options: GraphOptions
    tokens: Tokens
    lengths: Value
    keep: Value
    width: Value
    block: int

    # Operators that differ between dialects or need ONNX's types; each takes `op` first.
    any_of = staticmethod(any_of)
    constant = staticmethod(constant)
    dim = staticmethod(dim)
    counted_loop = staticmethod(counted_loop)
    loop_while = staticmethod(loop_while)
    merge_heads = staticmethod(merge_heads)
    reduce = staticmethod(reduce)

    def float32(self, op: Any, value: Value) -> Value:
        """Cast to float32 unless the value has that type."""
        return cast(op, value, FLOAT)

    def int64(self, op: Any, value: Value) -> Value:
        """Cast to int64 unless the value has that type."""
        return cast(op, value, INT64)

    def stored(self, op: Any, value: Value) -> Value:
        """Cast to the graph's float type, which hidden states have."""
        return cast(op, value, self.d.dtype)

    def repeat(
        self, op: Any, times: int, states: Sequence[Value], body: Callable[..., list[Value]]
    ) -> list[Value]:
        """Repeat ``body(op, turn, *states)`` in the body of a loop: returns the last states.

        A counted loop, or one round behind another where the dialect has no cheap loops in loops.
        """
        if self.d.nests_loops:
            return counted_loop(op, times, states, body, "pick")
        for turn in range(times):
            states = body(op, constant(op, np.array(turn), f"turn_{turn}"), *states)
        return list(states)

    # ---- inputs ---------------------------------------------------------------------------------

    def seed(self) -> Value:
        """The request's seed as an input, int64 [B], below `methods.SEEDS`."""
        return self.stage.input("seed", INT64, ["B"])

    def encoder_score(self, name: str) -> Value:
        """A per-token score of the vision encoder as an input, f32 [B,S]; 0 where no patch is."""
        return self.stage.input(name, FLOAT, ["B", "S"])

    def need(self, op: Any) -> tuple[Value, Value]:
        """Tokens to choose per row, f32 [B,1] (0 if it keeps all), and whether it prunes, bool."""
        available = reduce(op, "ReduceSum", op.Cast(self.tokens.visual, to=FLOAT), [1])
        keep = op.Cast(op.Unsqueeze(self.keep, [1]), to=FLOAT)
        prunes = op.Less(keep, available)
        return op.Where(prunes, keep, 0.0), prunes

    # ---- what the model computes ----------------------------------------------------------------

    def next_layer(self, op: Any) -> NextLayer:
        """The attention of the layer that runs next."""
        layer = DecoderLayer(self.d, self.text, self.layer)
        return NextLayer(self, layer, layer.input_layernorm(op, self.tokens.x))

    def final_norm(self, op: Any) -> Value:
        """The hidden states after the norm in front of the head, [B,S,d]."""
        norm = RMSNorm(self.d, "language_model.norm", self.text.hidden_size, self.text.rms_norm_eps)
        return norm(op, self.tokens.x)

    def saliency(self, op: Any) -> Saliency:
        """Gradients of TRIO's layer-local loss at the visual tokens."""
        return saliency(op, self.d, self.text, self.layer, self.options, self.tokens)

    # ---- which tokens stay ----------------------------------------------------------------------

    def greatest(self, op: Any, score: Value, among: Value, count: Value) -> Value:
        """Mark the `count` f32 [B,1] greatest of `score` among the tokens of `among`, bool [B,S].

        Scores f32 [B,S] are not negative; ties go to the earlier token.
        """
        return greatest(op, self.d, score, among, count, self.tokens.index)

    def largest(self, op: Any, score: Value, among: Value, count: int) -> tuple[Value, Value]:
        """Find the `count` greatest of `score` [B,S] ≥ 0 among the tokens of `among`, descending.

        Returns their indices int64 [B,count], and which of them exist, bool [B,count].
        """
        return largest(op, self.d, score, among, count, self.tokens.index)

    def suppress(self, op: Any, score: Value) -> tuple[Value, Value]:
        """Suppress near-copies greedily by falling score f32 [B,S], not negative.

        Returns:
            The visual tokens that stay, bool [B,S], and whether the row converged, bool [B].
        """
        suppression = Suppression(
            self.d, self.tokens, self.keep, self.width, self.options.threshold, self.block
        )
        return suppression.select(op, score)

    def budget_of_greatest(self, op: Any, score: Value) -> Value:
        """The visual tokens with the greatest scores, as many as the row keeps: bool [B,S]."""
        need, prunes = self.need(op)
        picked = self.greatest(op, score, self.tokens.visual, need)
        return op.And(self.tokens.visual, op.Or(picked, op.Not(prunes)))

    def by_score(self, op: Any, score: Value) -> Choice:
        """Choose the greatest of scores f32 [B,S] that are not negative."""
        score = op.Where(self.tokens.visual, score, 0.0)
        return Choice(self.budget_of_greatest(op, score), score, finite=score)

    def by_picks(self, op: Any, picked: Value, prunes: Value, score: Value) -> Choice:
        """Choose `picked` bool [B,S] in rows that prune, else every visual token.

        Scores are reported as 0 in rows that keep everything.
        """
        visual = self.tokens.visual
        score = op.Where(op.And(visual, prunes), score, 0.0)
        return Choice(op.And(visual, op.Or(picked, op.Not(prunes))), score, finite=score)

    def unit_rows(self, op: Any, x: Value, squares: Value) -> Value:
        """Divide rows x f32 [B,S,d] by their norms; squares f32 [B,S,1]."""
        return op.Div(x, op.Max(op.Sqrt(squares), NORM_FLOOR))


@dataclass(frozen=True)
class NextLayer:
    """Queries and keys of the layer that runs next.

    Attributes:
        normal: [B,S,d], the layer's normalised input.
    """

    site: Site
    layer: DecoderLayer
    normal: Value

    def queries(self, op: Any, place: Value) -> Value:
        """Rotated queries at the places int64 [B,P]: [B,H,P,D]."""
        site, text = self.site, self.site.text
        flat = op.Reshape(self.normal, [-1, text.hidden_size])
        rows = op.Gather(flat, op.Add(place, site.tokens.offset), axis=0)  # [B,P,d]
        positions = positions_at(op, site.tokens.positions, place)
        return self.layer.self_attn.queries(op, rows, rotary_angles(op, site.d, text, positions))

    def keys(self, op: Any) -> Value:
        """Rotated keys of all tokens: [B,G,S,D]."""
        angles = rotary_angles(op, self.site.d, self.site.text, self.site.tokens.positions)
        return self.layer.self_attn.keys(op, self.normal, angles)
