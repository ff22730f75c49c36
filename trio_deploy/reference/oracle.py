"""TRIO in PyTorch on transformers' own LLaVA: the reference every graph is checked against.

It is written to be read from top to bottom, not to be fast: transformers' own vision tower,
projector, packing of image rows, decoder layers and KV cache; autograd for the saliency; the
greedy suppression one token after another. Rows of a batch do not touch each other, so a batch is
a loop over rows and nothing here knows about padding.

A pruning point (l, k): before decoder layer l runs, keep k visual tokens. The score of a visual
token v is the norm of d(loss)/d(X[v]), where X is the input of layer l, and the loss asks how sure
layer l alone, followed by the final norm and the head, is of its own predictions at the last few
text tokens. How each method chooses is in its own module (selection/), in numpy over arrays that
the oracle computes.
"""

from __future__ import annotations

import types
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from trio_deploy.errors import TrioError
from trio_deploy.reference.encoder_scores import encoder_scores
from trio_deploy.reference.trace import Stage, Tensors, stack_rows
from trio_deploy.schedule import methods
from trio_deploy.schedule.methods import METHODS, SEEDS
from trio_deploy.schedule.schedule import Schedule
from trio_deploy.schedule.view import View

MODEL_CLASSES = {
    "llava": "LlavaForConditionalGeneration",
    "llava_next": "LlavaNextForConditionalGeneration",
}


@dataclass(frozen=True)
class Row:
    """One prompt.

    Attributes:
        input_ids: [S] int64, with one image token for every visual token.
        pixel_values: [T, 3, h, w] tiles of all images of the prompt; None for text alone.
        image_sizes: (height, width) of each image before preprocessing, in pixels.
        seed: of `random` selections.
    """

    input_ids: NDArray[np.int64]
    pixel_values: NDArray[np.floating] | None = None
    image_sizes: Sequence[tuple[int, int]] = ()
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """A row before it is pruned.

    Attributes:
        layer: number of the layer that runs next.
        hidden: [1, S, d], the input of that layer.
        positions: int64 [1, S].
        visual: bool [S].
        keep: visual tokens to keep, at most their number.
        seed: of the request, below `methods.SEEDS`.
        encoder: the encoder's scores by name, fp32 [S], as far as the method reads them.
    """

    layer: int
    hidden: Tensor
    positions: Tensor
    visual: Tensor
    keep: int
    seed: int = 0
    encoder: Mapping[str, Tensor] = field(default_factory=dict)


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
    """What one row came to.

    Attributes:
        token_ids: generated tokens, an end token included.
        logits: [steps, V] that each of them was chosen from.
        kept: at each pruning point the places kept, counted in the original prompt.
        stages: every stage's tensors, B = 1.
    """

    token_ids: list[int]
    logits: NDArray[np.floating]
    kept: list[NDArray[np.int64]]
    stages: dict[str, Stage]


@dataclass(frozen=True)
class OracleResult:
    """A batch: its rows, and every stage's tensors padded on the right and put together."""

    rows: list[RowResult]
    stages: dict[str, Stage]

    @property
    def token_ids(self) -> list[list[int]]:
        """Generated tokens of each row."""
        return [row.token_ids for row in self.rows]


class Oracle:
    """TRIO around one of transformers' LLaVA models.

    Args:
        model: LlavaForConditionalGeneration or LlavaNextForConditionalGeneration.
        probe: `last` takes the last text tokens as probes, `shifted` those one place before.
        probes: how many of them, P.
        positions: after pruning, `renumber` counts positions from 0 again in every segment of
            layers, `original` keeps the positions tokens had in the prompt.
        threshold: cosine similarity from which a kept token suppresses another.
        storage: type that hidden states have between stages; None leaves them as they are. The
            reference for fp16 graphs computes in fp32 from what these hand to each other.
    """

    def __init__(
        self,
        model: Any,
        *,
        probe: str = "last",
        probes: int = 4,
        positions: str = "renumber",
        threshold: float = 0.8,
        storage: torch.dtype | None = None,
    ) -> None:
        if probe not in ("last", "shifted"):
            raise TrioError(f"probe is {probe!r}; use 'last' or 'shifted'")
        if positions not in ("renumber", "original"):
            raise TrioError(f"positions is {positions!r}; use 'renumber' or 'original'")
        self.model = model.eval()
        self.text = model.model.language_model
        self.head = model.lm_head
        self.probe, self.probes = probe, probes
        self.positions, self.threshold = positions, threshold
        self.probe_logits = 0.0
        self.storage = storage
        if next(model.parameters()).dtype == torch.float64:
            _keep_norms_in_float64(model)

    @classmethod
    def from_checkpoint(
        cls, path: str | Path, dtype: torch.dtype = torch.float32, **options: Any
    ) -> Oracle:
        """Load a checkpoint folder with transformers; `options` as for the class.

        Raises:
            TrioError: the model is none that the oracle knows.
        """
        config = transformers.AutoConfig.from_pretrained(path)
        model = model_class(config.model_type).from_pretrained(
            path, dtype=dtype, attn_implementation="sdpa"
        )
        return cls(model, **options)

    # ---- from pictures and words to the first hidden states -------------------------------------

    def embed(self, row: Row, scores: Collection[str] = ()) -> tuple[Tensor, Stage, Stage]:
        """Input of layer 0, [1, S, d], and the stages `vision` and `embed`.

        `scores`: which of methods.ENCODER_SCORES `vision` puts out, too.
        """
        model, device = self.model.model, self.model.device
        ids = torch.as_tensor(row.input_ids, device=device)[None]
        visual = ids == self.model.config.image_token_id
        # The image token may lie outside the table; what stands there is replaced anyway.
        embeds = self.text.embed_tokens(ids.masked_fill(visual, 0))
        source = torch.arange(ids.shape[1], device=device)[None].clone()
        rows = embeds.new_zeros(0, embeds.shape[-1])
        side = self.model.config.vision_config.image_size
        pixels = np.zeros((0, 3, side, side), np.float32)
        encoder = {name: torch.zeros(0) for name in scores}
        if row.pixel_values is not None:
            pixels = np.asarray(row.pixel_values)
            # The projector's output is what vision.onnx makes: [T, p, d], before tiles are packed.
            tiles: list[Tensor] = []
            hook = model.multi_modal_projector.register_forward_hook(
                lambda _module, _inputs, output: tiles.append(output)
            )
            sizes = torch.tensor([list(size) for size in row.image_sizes])
            packing = {"image_sizes": sizes} if hasattr(model, "pack_image_features") else {}
            pixel_values = torch.as_tensor(pixels, device=device, dtype=embeds.dtype)
            output = model.get_image_features(pixel_values, **packing)
            hook.remove()
            packed = torch.cat(list(getattr(output, "pooler_output", output)))
            if int(visual.sum()) != len(packed):
                raise TrioError(
                    f"the prompt has {int(visual.sum())} image tokens for {len(packed)} image rows"
                )
            embeds[visual] = packed
            rows = self._stored(tiles[0].flatten(0, 1))
            encoder = encoder_scores(model, pixel_values, scores)
            source[visual] = self._packing_order(tiles[0].shape[:2], sizes, ids.shape[1])
        elif visual.any():
            raise TrioError("the prompt has image tokens but no picture")
        embeds = self._stored(embeds)
        vision = Stage({"pixel_values": pixels}, _arrays({"image_features": rows, **encoder}))
        inputs = _arrays({"input_ids": ids, "image_features": rows, "source_index": source})
        inputs["lengths"] = np.array([ids.shape[1]])  # no input of the graph: says what is padding
        return embeds, vision, Stage(inputs, _arrays({"inputs_embeds": embeds}))

    def _stored(self, hidden: Tensor) -> Tensor:
        """Rounded to what is stored between stages."""
        return hidden if self.storage is None else hidden.to(self.storage).to(hidden.dtype)

    def _packing_order(self, tiles: torch.Size, sizes: Tensor, length: int) -> Tensor:
        """Where packing takes each visual token from: S + row, or -1 for a newline.

        Found by letting transformers pack the numbers of the rows instead of the rows.
        """
        model, config = self.model.model, self.model.config
        numbers = torch.arange(tiles.numel(), dtype=torch.float64).reshape(*tiles, 1) + length
        if not hasattr(model, "pack_image_features"):
            return numbers.flatten().long()
        from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

        counts = [
            image_size_to_num_patches(size, config.image_grid_pinpoints, tile)
            for size in sizes
            for tile in [config.vision_config.image_size]
        ]
        order, _ = model.pack_image_features(
            numbers.split(counts),
            sizes,
            config.vision_feature_select_strategy,
            image_newline=numbers.new_full((1,), -1.0),
        )
        return torch.cat(order).flatten().long()

    # ---- decoder layers -------------------------------------------------------------------------

    def run_layers(
        self, layers: Iterable[int], hidden: Tensor, positions: Tensor, cache: DynamicCache | None
    ) -> Tensor:
        """Run decoder layers on [1, S, d].

        No mask is needed: without one, attention is causal for many tokens and sees the whole
        cache for one. A layer's cache is its own, so segments may differ in length.
        """
        rotary = self.text.rotary_emb(hidden, position_ids=positions)
        for index in layers:
            hidden = self.text.layers[index](
                hidden,
                attention_mask=None,
                position_embeddings=rotary,
                position_ids=positions,
                past_key_values=cache,
                use_cache=cache is not None,
            )
        return hidden

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
        view, module = self.view(method, point), methods.load(method)
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
            queries, keys = self.queries_and_keys(point.layer, hidden, point.positions)
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

    def queries_and_keys(
        self, layer: int, hidden: Tensor, positions: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Queries [H, S, D] and keys [G, S, D] of a layer over [1, S, d], rotated."""
        module = self.text.layers[layer]
        normal, size = module.input_layernorm(hidden), module.self_attn.head_dim
        query = module.self_attn.q_proj(normal).unflatten(-1, (-1, size)).transpose(1, 2)
        key = module.self_attn.k_proj(normal).unflatten(-1, (-1, size)).transpose(1, 2)
        cos, sin = self.text.rotary_emb(hidden, position_ids=positions)
        query, key = apply_rotary_pos_emb(query, key, cos, sin)
        return query[0], key[0]

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
        self, row: Row, schedule: Schedule, max_new_tokens: int, end_tokens: Collection[int]
    ) -> RowResult:
        """Greedy generation for one row, with the tensors of every stage.

        Stages: `vision`, `embed`, `prefill_0`, `select_1`, `prefill_1`, ..., and the first step of
        decoding as `decode_0`, `decode_1`, ... (the same segments, one new token).
        """
        needed = methods.encoder_scores(schedule.methods)
        hidden, vision, embed = self.embed(row, needed)
        source = embed.inputs["source_index"][0]
        encoder = {name: _per_token(vision.outputs[name], source) for name in needed}
        stages = {"vision": vision, "embed": embed}
        segments = [range(*bounds) for bounds in schedule.segments(len(self.text.layers))]
        visual = torch.as_tensor(row.input_ids) == self.model.config.image_token_id
        visual = visual.to(hidden.device)
        counts = schedule.resolve(int(visual.sum()))
        positions = torch.arange(hidden.shape[1], device=hidden.device)[None]
        places = positions[0]
        cache = DynamicCache()
        kept: list[NDArray[np.int64]] = []
        for i, layers in enumerate(segments):
            if i > 0:
                keep = min(counts[i - 1], int(visual.sum()))
                method = schedule.methods[i - 1]
                seed = row.seed % SEEDS
                point = Point(layers.start, hidden, positions, visual, keep, seed, encoder)
                pruned = self.select(method, point)
                index = pruned.index
                before = _sequence(hidden, positions, visual) | {
                    "keep": np.array([keep]),
                    "width": np.array([len(index)]),
                    "seed": np.array([seed]),
                    **_arrays({name: value[None] for name, value in encoder.items()}),
                    # No input of the graph: how far a logit's error reaches into the scores.
                    "probe_logits": np.array([self.probe_logits]),
                }
                hidden = self._stored(pruned.hidden)
                visual, places, positions = visual[index], places[index], positions[:, index]
                encoder = {name: value[index] for name, value in encoder.items()}
                if self.positions == "renumber":
                    positions = torch.arange(len(index), device=hidden.device)[None]
                after = _sequence(hidden, positions, visual)
                stages[f"select_{i}"] = Stage(
                    before,
                    {"keep_index": _array(index[None])}
                    | {f"{name}_out": value for name, value in after.items()}
                    | {
                        "saliency": pruned.scores[None].astype(np.float32),
                        "converged": np.array([True]),
                    },
                )
                kept.append(_array(places))
            if len(layers):
                hidden, stages[f"prefill_{i}"] = self._segment(i, layers, hidden, positions, cache)
        # Under `renumber` every segment goes on counting from its own length.
        own = self.positions == "renumber"
        following = [
            cache.get_seq_length(layers.start) if own and len(layers) else len(row.input_ids)
            for layers in segments
        ]
        logits = [self.logits(hidden[:, -1:])]
        tokens = [int(logits[-1].argmax())]
        if max_new_tokens == 0:
            tokens = []
        while 0 < len(tokens) < max_new_tokens and tokens[-1] not in end_tokens:
            ids = torch.tensor([[tokens[-1]]], device=hidden.device)
            hidden = self.text.embed_tokens(ids)
            for i, layers in enumerate(segments):
                if len(layers):
                    at = torch.tensor([[following[i] + len(tokens) - 1]], device=hidden.device)
                    if len(tokens) == 1:
                        hidden, stage = self._segment(i, layers, hidden, at, cache)
                        stage.inputs["input_ids"] = _array(ids)
                        stages[f"decode_{i}"] = stage
                    else:
                        hidden = self.run_layers(layers, hidden, at, cache)
            logits.append(self.logits(hidden[:, -1:]))
            tokens.append(int(logits[-1].argmax()))
        return RowResult(tokens, _array(torch.cat(logits)), kept, stages)

    def _segment(
        self, index: int, layers: range, hidden: Tensor, positions: Tensor, cache: DynamicCache
    ) -> tuple[Tensor, Stage]:
        """Run one segment and note what its graph would see; a past has room for what is new."""
        first = index == 0
        past = cache.get_seq_length(layers.start)
        new = hidden.shape[1]
        inputs: Tensors = {
            "inputs_embeds" if first else "hidden_states": _array(hidden),
            "position_ids": _array(positions),
            "lengths": np.array([new]),
            "past_lengths": np.array([past]),
        }
        kind = "key", "value"
        if past:
            for i in layers:
                for name, tensor in zip(kind, _cached(cache, i), strict=True):
                    room = np.zeros_like(tensor[:, :, :1]).repeat(new, axis=2)
                    inputs[f"past.{i}.{name}"] = np.concatenate([tensor, room], axis=2)
        hidden = self.run_layers(layers, hidden, positions, cache)
        if layers.stop < len(self.text.layers):
            hidden = self._stored(hidden)
        outputs: Tensors = {}
        if layers.stop == len(self.text.layers):
            outputs["logits"] = _array(self.logits(hidden[:, -1:]))
        else:
            # A graph cannot have an input and an output of one name.
            outputs["hidden_states" if first else "hidden_states_out"] = _array(hidden)
        for i in layers:
            for name, tensor in zip(kind, _cached(cache, i), strict=True):
                outputs[f"present.{i}.{name}"] = tensor
        return hidden, Stage(inputs, outputs)


def proxy_loss(logits: Tensor) -> Tensor:
    """Mean cross entropy of [P, V] against its own argmax, in fp64.

    Written as log(1 + sum over the others of e^(z_j - z_label)). The usual form's gradient for the
    label is p - 1, which cancels as p goes to 1: at 1 - p = 1e-6 it is 5 % wrong in fp32 and it is
    noise once p rounds to 1. This one's is minus the sum of the others' gradients.
    """
    best, label = logits.double().max(dim=-1, keepdim=True)
    others = (logits.double() - best).scatter(-1, label, -torch.inf)
    return others.exp().sum(-1).log1p().mean()


def model_class(model_type: str) -> Any:
    """transformers' class for `model_type` of a config.json.

    Raises:
        TrioError: none that the oracle knows.
    """
    if model_type not in MODEL_CLASSES:
        raise TrioError(
            f"the reference knows no model of type {model_type!r}, only "
            + " and ".join(sorted(MODEL_CLASSES))
        )
    return getattr(transformers, MODEL_CLASSES[model_type])


def _keep_norms_in_float64(model: Any) -> None:
    """transformers' RMSNorm always computes in fp32; in an fp64 model it would be the noisiest."""

    def forward(norm: Any, hidden: Tensor) -> Tensor:
        variance = hidden.pow(2).mean(-1, keepdim=True)
        return norm.weight * (hidden * torch.rsqrt(variance + norm.variance_epsilon))

    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = types.MethodType(forward, module)


def _cached(cache: DynamicCache, layer: int) -> tuple[NDArray, NDArray]:
    entry: Any = cache.layers[layer]
    return _array(entry.keys), _array(entry.values)


def _per_token(rows: NDArray, source: NDArray) -> Tensor:
    """The encoder's scores [R] where the tokens come from, [S]; 0 for text and image_newline."""
    picture = source >= len(source)
    scores = np.zeros(len(source), np.float32)
    scores[picture] = rows[source[picture] - len(source)]
    return torch.from_numpy(scores)


def _sequence(hidden: Tensor, positions: Tensor, visual: Tensor) -> Tensors:
    named = {"hidden_states": hidden, "position_ids": positions, "visual_mask": visual[None]}
    return _arrays(named) | {"lengths": np.array([hidden.shape[1]])}


def _array(tensor: Tensor) -> NDArray:
    if tensor.dtype == torch.bfloat16:  # numpy has none
        tensor = tensor.float()
    return tensor.detach().cpu().numpy().copy()


def _arrays(tensors: dict[str, Tensor]) -> Tensors:
    return {name: _array(tensor) for name, tensor in tensors.items()}
