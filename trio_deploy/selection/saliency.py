"""Saliency of visual tokens for the layer-local proxy loss, in closed form: no autograd.

The loss reads P rows only, so a visual token acts on it through the layer's keys and values alone.
One product gives the keys of all S rows; everything else in the forward pass is computed for P
rows; and the gradient comes back through P x H rows of attention. The values are never projected:
the probes' weighted sums of the input are pushed through W_v instead, with 3 H P multiplications
per feature and token against 2 G D. That is less while G > 3 H P / 2 D, for P = 4 and D = 128
while G > H / 21, so for grouped-query models, too.

P probes, B rows, S tokens, d hidden size, H query heads, G key/value heads, R = H/G, D head size,
V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from trio_deploy.families.base import TextConfig
from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.modules import (
    LIFT,
    DecoderLayer,
    Gates,
    Head,
    InputGradient,
    ProbeAttention,
)
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.graphs.rope import positions_at, rotary_angles
from trio_deploy.graphs.values import (
    FLOAT,
    INT64,
    cast,
    constant,
    dim,
    over_power_of_two,
    reduce,
    shape_of,
)
from trio_deploy.selection.choice import Value

_HIDDEN = -1e30  # additive mask; its exponential is zero in fp32


@dataclass(frozen=True)
class Tokens:
    """Input of a pruning point, and values derived from it.

    Attributes:
        x: [B,S,d] in the graph's float type.
        positions: int64 [B,S] or [B,3,S].
        visual, text: bool [B,S]; both are false for padding.
        squares: f32 [B,S,1], squared norms of the rows of x.
        flat: [B*S,d], the rows of x.
        offset: int64 [B,1], index in `flat` of the first token of each batch row.
        index: int64 [S], 0…S-1.
    """

    x: Value
    positions: Value
    visual: Value
    text: Value
    squares: Value
    flat: Value
    offset: Value
    index: Value

    @classmethod
    def of(cls, op: Any, x: Value, positions: Value, lengths: Value, visual: Value) -> Tokens:
        """Derive from the inputs of a select graph: lengths int64 [B], visual bool [B,S]."""
        batch, length = dim(op, x, 0), dim(op, x, 1)
        index = op.Range(0, op.Squeeze(length, [0]), 1)
        valid = op.Less(op.Unsqueeze(index, [0]), op.Unsqueeze(lengths, [1]))
        offset = op.Mul(op.Range(0, op.Squeeze(batch, [0]), 1), length)
        return cls(
            x=x,
            positions=positions,
            visual=op.And(valid, visual),
            text=op.And(valid, op.Not(visual)),
            squares=reduce(op, "ReduceSumSquare", cast(op, x, FLOAT), [-1]),
            flat=op.Reshape(x, [-1, int(shape_of(x)[-1])]),
            offset=op.Unsqueeze(offset, [1]),
            index=index,
        )


@dataclass(frozen=True)
class Saliency:
    """‖∂loss/∂x[v]‖₂ of each visual token v, f32 [B,S]; 0 for other tokens.

    Attributes:
        value: as defined; tiny gradients may underflow.
        ranking: the same times a power of two per row, so that they do not.
    """

    value: Value
    ranking: Value


@dataclass(frozen=True)
class Probes:
    """Text tokens whose next-token loss is differentiated, P per row.

    A row with less text has fewer: the missing ones point at token 0 and have no weight.

    Attributes:
        place: int64 [B,P], index within the row.
        rows: int64 [B,P], index within `Tokens.flat`.
        weight: f32 [B,P], share in the row's loss; sums to 1.
    """

    place: Value
    rows: Value
    weight: Value

    @classmethod
    def of(cls, op: Any, d: Dialect, options: GraphOptions, tokens: Tokens) -> Probes:
        """Probe p is the text token with p more behind it, or p + 1 if `probe` is `shifted`."""
        text = op.Cast(tokens.text, to=FLOAT)
        behind = op.Sub(reduce(op, "ReduceSum", text, [1]), d.running_sum(op, text))
        shift = 1 if options.probe == "shifted" else 0
        wanted = np.arange(options.probes, dtype=np.float32)[None, :, None] + shift
        hit = op.Equal(op.Unsqueeze(behind, [1]), constant(op, wanted, "probes"))
        hit = op.Cast(op.And(hit, op.Unsqueeze(tokens.text, [1])), to=FLOAT)  # [B,P,S]
        index = op.Cast(tokens.index, to=FLOAT)
        place = reduce(op, "ReduceSum", op.Mul(hit, index), [2], keepdims=False)
        place, present = op.Cast(place, to=INT64), reduce(op, "ReduceSum", hit, [2], keepdims=False)
        weight = op.Div(present, op.Max(reduce(op, "ReduceSum", present, [1]), 1.0))
        return cls(place, op.Add(place, tokens.offset), weight)


@dataclass(frozen=True)
class Activations:
    """What the backward pass needs of the forward pass.

    Attributes:
        attention, gates: of the layer's two parts.
        middle: [B,P,d], the probes' rows between the two parts.
        last: [B,P,d], the probes' rows after the layer.
        logits: f32 [B,P,V].
    """

    attention: ProbeAttention
    gates: Gates
    middle: Value
    last: Value
    logits: Value


class LocalLoss:
    """The proxy loss of one layer: the head is applied to the probes' rows right after it.

    The label of a probe is its most probable token.
    """

    def __init__(self, d: Dialect, text: TextConfig, layer: int) -> None:
        self.d, self.text = d, text
        self.layer, self.head = DecoderLayer(d, text, layer), Head(d, text)

    def forward(self, op: Any, tokens: Tokens, probes: Probes) -> Activations:
        """Run the layer and the head: the keys of all rows, everything else of the probes'."""
        d, text, layer = self.d, self.text, self.layer
        n = layer.input_layernorm(op, tokens.x)
        probed = op.Gather(op.Reshape(n, [-1, text.hidden_size]), probes.rows, axis=0)  # [B,P,d]
        places = positions_at(op, tokens.positions, probes.place)
        angles = (
            rotary_angles(op, d, text, tokens.positions),
            rotary_angles(op, d, text, places),
        )
        hidden = op.Greater(op.Unsqueeze(tokens.index, [0, 1]), op.Unsqueeze(probes.place, [2]))
        mask = op.Unsqueeze(op.Mul(op.Cast(hidden, to=FLOAT), _HIDDEN), [1])  # [B,1,P,S]
        y, attention = layer.self_attn.forward_probes(op, n, probed, angles, mask, tokens.x)
        middle = op.Add(op.Gather(tokens.flat, probes.rows, axis=0), y)
        y, gates = layer.mlp.forward_probes(op, layer.post_attention_layernorm(op, middle))
        last = op.Add(middle, y)
        logits = self.head.lm_head.few_rows(op, self.head.norm(op, last))
        return Activations(attention, gates, middle, last, cast(op, logits, FLOAT))

    def backward(self, op: Any, done: Activations, weight: Value) -> InputGradient:
        """Compute the gradient behind the layer's first norm, in fp32 between the products.

        `weight` is f32 [B,P], the probes' shares in the loss.
        """
        layer, head = self.layer, self.head
        g, scale = over_power_of_two(op, _loss_gradient(op, self.text, done.logits, weight))
        g = head.norm.backward(op, done.last, head.lm_head.backward_few_rows(op, g))
        through = layer.mlp.backward_probes(op, done.gates, g)
        g = op.Add(g, layer.post_attention_layernorm.backward(op, done.middle, through))
        found = layer.self_attn.backward_probes(op, done.attention, g)
        return found._replace(scale=op.Mul(scale, found.scale))


def saliency(
    op: Any, d: Dialect, text: TextConfig, layer: int, options: GraphOptions, tokens: Tokens
) -> Saliency:
    """Compute the saliency at the input of `layer`; registers its weights and the head's."""
    loss, probes = LocalLoss(d, text, layer), Probes.of(op, d, options, tokens)
    gradient = loss.backward(op, loss.forward(op, tokens, probes), probes.weight)
    norm = loss.layer.input_layernorm.backward_norm(op, tokens.squares, gradient.dn, gradient.along)
    ranking = op.Where(tokens.visual, op.Squeeze(norm, [2]), 0.0)
    scale = op.Squeeze(op.Mul(gradient.scale, 1.0 / LIFT), [2])
    return Saliency(op.Mul(ranking, scale), ranking)


def _loss_gradient(op: Any, text: TextConfig, logits: Value, weight: Value) -> Value:
    """Compute (softmax - onehot(argmax)) · weight for logits [B,P,V] and weight [B,P].

    The label's entry is minus the sum of the others: p - 1 would cancel where p is near 1. Of tied
    logits the lowest token is the label, as with ArgMax; OpenVINO's ArgMax sorts (8 ms for four
    rows of 32,000 logits, where these reductions take next to no time).
    """
    vocabulary = op.Range(0.0, float(text.vocab_size), 1.0)
    best = op.Equal(logits, reduce(op, "ReduceMax", logits, [-1]))
    places = op.Where(best, vocabulary, float(text.vocab_size))
    hot = op.Equal(vocabulary, reduce(op, "ReduceMin", places, [-1]))
    others = op.Where(hot, 0.0, op.Softmax(logits, axis=-1))
    gradient = op.Where(hot, op.Neg(reduce(op, "ReduceSum", others, [-1])), others)
    return op.Mul(gradient, op.Unsqueeze(weight, [2]))
