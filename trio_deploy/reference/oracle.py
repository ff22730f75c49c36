"""TRIO in PyTorch on transformers' own models: the reference that every graph is checked against.

It is written to be read from top to bottom, not to be fast: transformers' own vision tower,
connector, packing of image rows, decoder layers and KV cache (`adapters`); autograd for the
saliency; the greedy suppression one token after another. The rows of a batch do not depend on each
other, so a batch is a loop over rows and nothing here knows about padding.

A pruning point (l, k): before decoder layer l runs, keep k visual tokens. The score of a visual
token v is the norm of d(loss)/d(X[v]), where X is the input of layer l, and the loss measures how
certain layer l alone, followed by the final norm and the head, is of its own predictions at the
last few text tokens. How each method chooses is in its own module (selection/), in numpy over
arrays that the oracle computes.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache

from trio_deploy.bundle.manifest import stage_label
from trio_deploy.checkpoint.resolve import from_folder
from trio_deploy.config.options import DEFAULT_THRESHOLD
from trio_deploy.errors import TrioError
from trio_deploy.families.registry import parse_config
from trio_deploy.quant.quantization_config import read_quantization_config
from trio_deploy.reference.adapters import Deepstack, adapt, model_class
from trio_deploy.reference.row import Row as Row
from trio_deploy.reference.trace import Stage, Tensors, Trace, stack_rows
from trio_deploy.schedule import methods
from trio_deploy.schedule.methods import METHODS, SEEDS
from trio_deploy.schedule.schedule import Schedule
from trio_deploy.schedule.view import View


@dataclass(frozen=True)
class Point:
    """A row before it is pruned.

    Attributes:
        layer: number of the layer that runs next.
        hidden: [1, S, d], the input of that layer.
        positions: int64 [1, S], or [1, 3, S].
        visual: bool [S].
        keep: visual tokens to keep, at most their number.
        seed: of the request, below `methods.SEEDS`.
        encoder: the encoder's scores by name, fp32 [S], as far as the method reads them.
        deepstack: what the first layers' outputs get added.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    visual: Tensor
    keep: int
    seed: int = 0
    encoder: Mapping[str, Tensor] = field(default_factory=dict)
    deepstack: Deepstack = field(default_factory=Deepstack)


@dataclass(frozen=True)
class Embedded:
    """A prompt before layer 0.

    Attributes:
        hidden: [1, S, d].
        scores: the encoder's scores by name, fp32 [S], 0 where no patch is.
        deepstack: what the first layers' outputs get added.
        stages: `vision` (or one such stage per picture) and `embed`.
    """

    hidden: Tensor
    scores: Mapping[str, Tensor]
    deepstack: Deepstack
    stages: dict[str, Stage]


@dataclass(frozen=True)
class Pruned:
    """A row after it is pruned.

    Attributes:
        index: int64 [W], places kept, ascending.
        scores: fp64 [S], 0 where not visual.
        hidden: [1, W, d].
    """

    index: Tensor
    scores: NDArray[np.float64]
    hidden: Tensor


@dataclass(frozen=True)
class RowResult:
    """Result of one row.

    Attributes:
        token_ids: generated tokens, an end token included.
        logits: [steps, V], what each of them was chosen from.
        kept: at each pruning point the places kept, counted in the original prompt.
        stages: tensors of each stage, B = 1, as far as the trace recorded them.
    """

    token_ids: list[int]
    logits: NDArray[np.floating]
    kept: list[NDArray[np.int64]]
    stages: dict[str, Stage]


@dataclass(frozen=True)
class OracleResult:
    """Results of a batch: its rows, and the tensors of each stage, padded on the right."""

    rows: list[RowResult]
    stages: dict[str, Stage]

    @property
    def token_ids(self) -> list[list[int]]:
        """Generated tokens of each row."""
        return [row.token_ids for row in self.rows]


class Oracle:
    """TRIO around one of transformers' models.

    Args:
        model: of the class that the family names.
        family: name of the model's family; None takes the model's `model_type`.
        probe: `last` takes the last text tokens as probes, `shifted` those one place before.
        probes: how many of them, P.
        positions: after pruning, `renumber` counts positions from 0 again in every segment of
            layers, `original` keeps the positions tokens had in the prompt.
        threshold: cosine similarity from which a kept token suppresses another.
        storage: type that hidden states have between stages; None leaves them as they are. The
            reference for fp16 graphs computes in fp32 from what these hand to each other.
        selection_weights: gives the model the weights that the selection before a layer computes
            with, for as long as its context lasts; None: the layer's own.
    """

    def __init__(
        self,
        model: Any,
        *,
        family: str | None = None,
        probe: str = "last",
        probes: int = 4,
        positions: str = "renumber",
        threshold: float = DEFAULT_THRESHOLD,
        storage: torch.dtype | None = None,
        selection_weights: Callable[[int], AbstractContextManager[object]] | None = None,
    ) -> None:
        if probe not in ("last", "shifted"):
            raise TrioError(f"probe is {probe!r}; use 'last' or 'shifted'")
        if positions not in ("renumber", "original"):
            raise TrioError(f"positions is {positions!r}; use 'renumber' or 'original'")
        self.adapter = adapt(model, family or model.config.model_type)
        if positions == "renumber" and not self.adapter.renumbers:
            raise TrioError("tokens with three positions keep them: use positions='original'")
        self.model, self.text, self.head = model, self.adapter.text, self.adapter.head
        self.probe, self.probes = probe, probes
        self.positions, self.threshold = positions, threshold
        self.probe_logits = 0.0
        self.storage = storage
        self.selection_weights = selection_weights or (lambda layer: nullcontext())
        if next(model.parameters()).dtype == torch.float64:
            _keep_norms_in_float64(model)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Oracle:
        """Load a checkpoint folder with transformers; `options` as of the class.

        Raises:
            TrioError: not a checkpoint of a supported family, or one that is quantised.
        """
        raw = from_folder(Path(path)).raw_config
        if read_quantization_config(raw) is not None:
            raise TrioError(
                f"{path} is quantised, and the reference loads float checkpoints alone: pass the "
                "folder that the bundle was made from"
            )
        family = parse_config(raw).family
        model = model_class(family).from_pretrained(path, dtype=dtype, attn_implementation="sdpa")
        return cls(model, family=family, **options)

    # ---- from pictures and words to the first hidden states -------------------------------------

    def embed(self, row: Row, scores: Collection[str] = ()) -> Embedded:
        """Run the tower and the table of embeddings.

        Args:
            scores: those of methods.ENCODER_SCORES that `vision` puts out as well.

        Raises:
            TrioError: the prompt's image tokens do not fit its images.
        """
        device = self.model.device
        ids = torch.as_tensor(row.input_ids, device=device)[None]
        visual = ids == self.adapter.image_token_id
        # The image token may lie outside the table; what stands there is replaced anyway.
        embeds = self.text.embed_tokens(ids.masked_fill(visual, 0))
        if row.pixel_values is None and visual.any():
            raise TrioError("the prompt has image tokens but no picture")
        found = self.adapter.features(row, scores)
        if int(visual.sum()) != len(found.tokens):
            raise TrioError(
                f"the prompt has {int(visual.sum())} image tokens for {len(found.tokens)} image "
                "rows"
            )
        embeds[visual] = found.tokens
        embeds, rows = self._stored(embeds), self._stored(found.rows)
        order = found.order.to(device)
        source = torch.arange(ids.shape[1], device=device)[None].clone()
        source[visual] = torch.where(order < 0, order, order + ids.shape[1])
        index = torch.full(visual.shape[1:], -1, device=device)
        index[visual[0]] = order
        deep = tuple(self._stored(values) for values in found.deep)
        outputs = {"image_features": rows, **found.scores}
        outputs |= {f"deepstack.{j}": values for j, values in enumerate(deep)}
        one = self.adapter.one_call
        stages = {
            "vision" if one else stage_label("vision", number): Stage(
                call.inputs, _arrays({name: value[call.rows] for name, value in outputs.items()})
            )
            for number, call in enumerate(found.calls)
        }
        inputs = _arrays({"input_ids": ids, "image_features": rows, "source_index": source})
        inputs["lengths"] = np.array([ids.shape[1]])  # no input of the graph: where padding begins
        stages["embed"] = Stage(inputs, _arrays({"inputs_embeds": embeds}))
        per_token = {
            name: _per_token(_array(values), _array(source[0]))
            for name, values in found.scores.items()
        }
        return Embedded(embeds, per_token, Deepstack(deep, index), stages)

    def _stored(self, hidden: Tensor) -> Tensor:
        """Round to the type that is stored between stages."""
        return hidden if self.storage is None else hidden.to(self.storage).to(hidden.dtype)

    # ---- decoder layers -------------------------------------------------------------------------

    def run_layers(
        self,
        layers: Iterable[int],
        hidden: Tensor,
        positions: Tensor,
        cache: DynamicCache | None,
        deepstack: Deepstack | None = None,
    ) -> Tensor:
        """Run decoder layers on [1, S, d]; see `Llava.run_layers`."""
        return self.adapter.run_layers(layers, hidden, positions, cache, deepstack)

    def logits(self, hidden: Tensor) -> Tensor:
        """Final norm and head on [1, n, d], [n, V]."""
        return self.head(self.text.norm(hidden))[0]

    # ---- pruning --------------------------------------------------------------------------------

    def saliency(self, layer: int, hidden: Tensor, positions: Tensor, visual: Tensor) -> Tensor:
        """Score of every token of [1, S, d]: the gradient's norm, 0 where not visual; [S] fp64.

        `probe_logits` is left behind: the largest magnitude of a logit at the probes.
        """
        self.probe_logits = 0.0
        text = (~visual).nonzero().flatten()
        end = len(text) - (1 if self.probe == "shifted" else 0)
        probes = text[max(0, end - self.probes) : max(0, end)]
        scores = torch.zeros(len(visual), dtype=torch.float64, device=hidden.device)
        if not len(probes) or not visual.any():
            return scores
        with torch.enable_grad():
            x = hidden.detach().clone().requires_grad_()
            y = self.run_layers([layer], x, positions, cache=None)
            logits = self.logits(y[:, probes])
            self.probe_logits = float(logits.detach().abs().max())
            loss = proxy_loss(logits)
            # A power of two that brings the loss near 1: gradients of a certain prediction would
            # leave fp32's range on their way back. It is divided out again below.
            exponent = torch.frexp(loss.detach()).exponent.clamp(-1000, 0)
            scale = torch.ldexp(torch.ones_like(loss), -exponent).detach()
            (gradient,) = torch.autograd.grad(loss * scale, x)
        norms = gradient[0].double().norm(dim=-1) / scale
        return torch.where(visual, norms, scores)

    def select(self, method: str, point: Point) -> Pruned:
        """Prune a row as the method's reference says."""
        with self.selection_weights(point.layer):
            view = self.view(method, point)
        module = methods.load(method)
        kept, scores = module.reference(view)
        stays = ~view.visual
        stays[kept] = True
        places = np.flatnonzero(stays)
        index = torch.as_tensor(places, device=point.hidden.device)
        if METHODS[method].merges:
            hidden = torch.as_tensor(module.merge(view, places)).to(point.hidden)[None]
        else:
            hidden = point.hidden[:, index]
        return Pruned(index, scores, hidden)

    def view(self, method: str, point: Point) -> View:
        """What a method's reference reads, computed by the model."""
        needs, hidden = METHODS[method].needs, point.hidden
        arrays = {name: _array(point.encoder[name]) for name in needs if name in point.encoder}
        self.probe_logits = 0.0
        if "gradient" in needs:
            scores = self.saliency(point.layer, hidden, point.positions, point.visual)
            arrays["gradient"] = _array(scores)
        if {"queries", "keys"} & set(needs):
            queries, keys = self.adapter.queries_and_keys(point.layer, hidden, point.positions)
            arrays |= {"queries": _array(queries), "keys": _array(keys)}
        if "final_norm" in needs:
            arrays["final_norm"] = _array(self.text.norm(hidden)[0])
        return View(
            layer=point.layer,
            hidden=_array(hidden[0]),
            visual=_array(point.visual),
            keep=point.keep,
            threshold=self.threshold,
            seed=point.seed,
            arrays=arrays,
        )

    # ---- prompt to answer -----------------------------------------------------------------------

    def generate(
        self,
        rows: Sequence[Row],
        schedule: Schedule,
        *,
        max_new_tokens: int = 1,
        end_tokens: Collection[int] = (),
    ) -> OracleResult:
        """Greedy generation, a row at a time.

        Raises:
            TrioError: an unknown method, or a prompt that does not fit its images.
        """
        schedule.validate(len(self.text.layers))
        results = [self.generate_row(row, schedule, max_new_tokens, end_tokens) for row in rows]
        return OracleResult(results, stack_rows([result.stages for result in results]))

    @torch.no_grad()
    def generate_row(
        self,
        row: Row,
        schedule: Schedule,
        max_new_tokens: int,
        end_tokens: Collection[int],
        trace: Trace | None = None,
    ) -> RowResult:
        """Greedy generation for one row.

        Stages: `vision`, `embed`, `prefill_0`, `select_1`, `prefill_1`, ..., and the first step of
        decoding as `decode_0`, `decode_1`, ... (the same segments, one new token).

        Args:
            trace: what to note on the way; None records the tensors of every stage.
        """
        trace = Trace() if trace is None else trace
        needed = methods.encoder_scores(schedule.methods)
        with trace.stage("vision"):
            start = self.embed(row, needed)
        trace.stages |= start.stages
        segments = [range(*bounds) for bounds in schedule.segments(len(self.text.layers))]
        ids = torch.as_tensor(row.input_ids, device=self.model.device)
        positions = self.adapter.positions(row)
        # Under `renumber` every segment continues from its own length.
        after, own = int(positions.max()) + 1, self.positions == "renumber"
        point = Point(
            layer=0,
            hidden=start.hidden,
            positions=positions,
            visual=ids == self.adapter.image_token_id,
            keep=0,
            seed=row.seed % SEEDS,
            encoder=start.scores,
            deepstack=start.deepstack,
        )
        counts = schedule.resolve(int(point.visual.sum()))
        places, kept = np.arange(len(row.input_ids)), []
        cache = DynamicCache()
        following = []
        for i, layers in enumerate(segments):
            if i > 0:
                keep = min(counts[i - 1], int(point.visual.sum()))
                point = replace(point, layer=layers.start, keep=keep)
                name = stage_label("select", i)
                with trace.stage(name):
                    point, index = self._prune(name, schedule.methods[i - 1], point, trace)
                places = places[index]
                kept.append(places)
            following.append(len(point.visual) if own and len(layers) else after)
            if len(layers):
                name = stage_label("prefill", i)
                with trace.stage(name):
                    point = replace(point, hidden=self._segment(name, layers, point, cache, trace))
        with trace.stage(stage_label("prefill", len(counts))):
            logits = self.logits(point.hidden[:, -1:])
            token = int(logits.argmax())
        if max_new_tokens == 0:
            return RowResult([], _array(logits), kept, trace.stages)
        step = replace(point, positions=point.positions[..., :1], deepstack=point.deepstack.none())
        tokens, rest = self._decode(
            token, step, max_new_tokens, end_tokens, list(zip(segments, following, strict=True)),
            cache, trace,
        )  # fmt: skip
        return RowResult(tokens, _array(torch.cat([logits, *rest])), kept, trace.stages)

    def _prune(
        self, name: str, method: str, point: Point, trace: Trace
    ) -> tuple[Point, NDArray[np.int64]]:
        """The row behind a pruning point, and the places [W] in front of it that it kept."""
        pruned = self.select(method, point)
        index = pruned.index
        if self.positions == "renumber":
            positions = torch.arange(len(index), device=point.hidden.device)[None]
        else:
            positions = point.positions[..., index]
        after = replace(
            point,
            hidden=self._stored(pruned.hidden),
            positions=positions,
            visual=point.visual[index],
            deepstack=point.deepstack.kept(index),
            encoder={name: value[index] for name, value in point.encoder.items()},
        )
        if trace.recording:
            inputs = _sequence(point) | {
                "keep": np.array([point.keep]),
                "width": np.array([len(index)]),
                "seed": np.array([point.seed]),
                **_arrays({name: value[None] for name, value in point.encoder.items()}),
                # No input of the graph: how far a logit's error reaches into the scores.
                "probe_logits": np.array([self.probe_logits]),
            }
            outputs = {f"{key}_out": value for key, value in _sequence(after).items()}
            if point.layer < len(point.deepstack.rows):
                inputs["feature_index"] = _array(point.deepstack.index[None])
                outputs["feature_index_out"] = _array(after.deepstack.index[None])
            outputs |= {
                "keep_index": _array(index[None]),
                "saliency": pruned.scores[None].astype(np.float32),
                "converged": np.array([True]),
            }
            trace.stages[name] = Stage(inputs, outputs)
        return after, _array(index)

    def _decode(
        self,
        token: int,
        step: Point,
        max_new_tokens: int,
        end_tokens: Collection[int],
        segments: Sequence[tuple[range, int]],
        cache: DynamicCache,
        trace: Trace,
    ) -> tuple[list[int], list[Tensor]]:
        """All tokens, and the logits of those after the first.

        Args:
            token: the first, from the prefill.
            step: one token without features of its own.
            segments: layers of each, and the first token's position there.
        """
        tokens, logits = [token], []
        while len(tokens) < max_new_tokens and tokens[-1] not in end_tokens:
            ids = torch.tensor([[tokens[-1]]], device=self.model.device)
            hidden = self.text.embed_tokens(ids)
            for i, (layers, first) in enumerate(segments):
                if not len(layers):
                    continue
                at = torch.full_like(step.positions, first + len(tokens) - 1)
                if len(tokens) == 1 and trace.recording:
                    name = stage_label("decode", i)
                    point = replace(step, hidden=hidden, positions=at)
                    hidden = self._segment(name, layers, point, cache, trace)
                    trace.stages[name].inputs["input_ids"] = _array(ids)
                else:
                    hidden = self.run_layers(layers, hidden, at, cache)
            logits.append(self.logits(hidden[:, -1:]))
            tokens.append(int(logits[-1].argmax()))
        return tokens, logits

    def _segment(
        self,
        name: str,
        layers: range,
        point: Point,
        cache: DynamicCache,
        trace: Trace,
    ) -> Tensor:
        """Run one segment; record what its graph would take and give."""
        last = layers.stop == len(self.text.layers)
        inputs = _segment_inputs(name, layers, point, cache) if trace.recording else {}
        hidden = self.run_layers(layers, point.hidden, point.positions, cache, point.deepstack)
        if not last:
            hidden = self._stored(hidden)
        if trace.recording:
            outputs: Tensors = {}
            if last:
                outputs["logits"] = _array(self.logits(hidden[:, -1:]))
            else:
                # A graph cannot have an input and an output of one name.
                given = "hidden_states_out" if "hidden_states" in inputs else "hidden_states"
                outputs[given] = _array(hidden)
            for i in layers:
                for kind, tensor in _cached(cache, i).items():
                    outputs[f"present.{i}.{kind}"] = tensor
            trace.stages[name] = Stage(inputs, outputs)
        return hidden


def _segment_inputs(name: str, layers: range, point: Point, cache: DynamicCache) -> Tensors:
    """What a segment's graph takes; a past has room for what is new."""
    past, new = cache.get_seq_length(layers.start), point.hidden.shape[1]
    inputs: Tensors = {
        "inputs_embeds" if name.endswith("_0") else "hidden_states": _array(point.hidden),
        "position_ids": _array(point.positions),
        "lengths": np.array([new]),
        "past_lengths": np.array([past]),
    }
    deep = {i: point.deepstack.rows[i] for i in layers if i < len(point.deepstack.rows)}
    if deep:
        inputs |= _arrays({f"deepstack.{i}": rows for i, rows in deep.items()})
        inputs["feature_index"] = _array(point.deepstack.index[None])
    if past:
        for i in layers:
            for kind, tensor in _cached(cache, i).items():
                room = np.zeros_like(tensor[:, :, :1]).repeat(new, axis=2)
                inputs[f"past.{i}.{kind}"] = np.concatenate([tensor, room], axis=2)
    return inputs


def proxy_loss(logits: Tensor) -> Tensor:
    """Mean cross entropy of [P, V] against its own argmax, in fp64.

    Written as log(1 + sum over the others of e^(z_j - z_label)). The usual form's gradient for the
    label is p - 1, which cancels as p goes to 1: at 1 - p = 1e-6 it is 5 % wrong in fp32 and it is
    noise once p rounds to 1. This one's is minus the sum of the others' gradients.
    """
    best, label = logits.double().max(dim=-1, keepdim=True)
    others = (logits.double() - best).scatter(-1, label, -torch.inf)
    return others.exp().sum(-1).log1p().mean()


def _keep_norms_in_float64(model: Any) -> None:
    """transformers' RMSNorm always computes in fp32; in an fp64 model it would be the noisiest."""

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return norm.weight * (hidden * torch.rsqrt(variance + norm.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)


def _cached(cache: DynamicCache, layer: int) -> Tensors:
    entry: Any = cache.layers[layer]
    return {"key": _array(entry.keys), "value": _array(entry.values)}


def _per_token(rows: NDArray, source: NDArray) -> Tensor:
    """The encoder's scores [R] where the tokens come from, [S]; 0 for text and image_newline."""
    picture = source >= len(source)
    scores = np.zeros(len(source), np.float32)
    scores[picture] = rows[source[picture] - len(source)]
    return torch.from_numpy(scores)


def _sequence(point: Point) -> Tensors:
    named = {
        "hidden_states": point.hidden,
        "position_ids": point.positions,
        "visual_mask": point.visual[None],
    }
    return _arrays(named) | {"lengths": np.array([point.hidden.shape[1]])}


def _array(tensor: Tensor) -> NDArray:
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.float()
    return tensor.detach().cpu().numpy().copy()


def _arrays(tensors: dict[str, Tensor]) -> Tensors:
    return {name: _array(tensor) for name, tensor in tensors.items()}
