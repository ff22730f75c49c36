"""The graphs of a bundle, run in order: vision, embed, then segments of layers and selections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.families.base import TILES_AT_ONCE, Layout
from trio_deploy.pipeline.cache import CacheShape, Empties, SegmentCache
from trio_deploy.pipeline.prompt import Batch
from trio_deploy.runtimes.arrays import concatenate, on_host, to_host
from trio_deploy.runtimes.base import Array, Blocks, Engine, HostMoment, Moment, Runtime

_FEATURES = "image_features"


@dataclass
class Clock:
    """How long stages take."""

    _spans: list[tuple[str, Moment, Moment]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, moment: Callable[[], Moment] = HostMoment.now) -> Iterator[None]:
        """Add the time spent inside to stage `name`; `moment` as in `Runtime.moment`."""
        start = moment()
        yield
        self._spans.append((name, start, moment()))

    @property
    def seconds(self) -> dict[str, float]:
        """By stage."""
        seconds: dict[str, float] = {}
        for name, start, stop in self._spans:
            seconds[name] = seconds.get(name, 0.0) + stop.since(start)
        return seconds


@dataclass
class Prefilled:
    """What a prefill leaves behind.

    Attributes:
        logits: float32 [B,V], of each row's next token.
        caches: by segment stage.
        kept: for each pruning point and row, the places in the row's original prompt (text and
            visual) that went on.
    """

    logits: np.ndarray
    caches: dict[str, SegmentCache]
    kept: list[list[np.ndarray]]


class Stages:
    """Opened engines of a bundle, and its prefill.

    Attributes:
        segments: names of the stages with decoder layers, in order.
        separate: whether decode.onnx decodes, rather than the segments themselves.
        sides: buffers a cache needs, 1 where a step writes in place.
        layers: numbers of the layers of each segment.
        cache_shape: of the caches.
        concurrent: whether several threads may run the stages at once.
        max_rows: of a batch, None where any number will do.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Open every graph.

        Raises:
            TrioError: a graph does not load or is not of this bundle's kind.
        """
        bundle.require_weights()
        self._shares_cache = runtime.shares_cache(bundle.manifest.dialect)
        self.sequence, self._moment = runtime.sequence, runtime.moment
        self.concurrent, self.max_rows = runtime.concurrent, runtime.max_rows
        self.engines: dict[str, Engine] = {}
        for name in bundle.stages:
            selects = name.startswith("select_")
            self.engines[name] = runtime.open(
                bundle.graph(name),
                bundle.places(name),
                exact=selects,
                probing=selects or name == "embed",
            )
        self.segments = [name for name in self.engines if name.startswith("prefill_")]
        self.separate = "decode" in self.engines
        self.sides = 1 if self._shares_cache else 2
        self.layers = {name: _layers(self.engines[name]) for name in self.segments}
        text = bundle.config.text
        dtype = self.engines["embed"].outputs["inputs_embeds"].dtype
        self.hidden_size, self.vocab_size, self.dtype = text.hidden_size, text.vocab_size, dtype
        # The engine's own: OpenVINO may hold a cache in fewer bits than hidden states.
        first = self.segments[0]
        kept = self.engines[first].outputs[f"present.{self.layers[first][0]}.key"].dtype
        self.cache_shape = CacheShape(text.num_kv_heads, text.head_dim, kept)
        if [i for name in self.segments for i in self.layers[name]] != list(range(text.num_layers)):
            raise TrioError(
                "the bundle's segments do not cover the model's layers one by one: export it again"
            )

    def source(self, segment: str) -> str:
        """The input that takes a segment's tokens: inputs_embeds or hidden_states."""
        names = self.engines[segment].inputs
        return "inputs_embeds" if "inputs_embeds" in names else "hidden_states"

    def sink(self, segment: str) -> str:
        """The output that is not a cache: logits, or the tokens for what comes next."""
        names = self.engines[segment].outputs
        return next(name for name in names if not name.startswith("present."))

    def see(self, images: Sequence[Layout]) -> tuple[Array, dict[str, np.ndarray]]:
        """image_features [R,d] of images, in order; the tower runs once per distinct image.

        And the graph's other outputs f32 [R] by name, which some selections go by.
        """
        once = list({id(image): image for image in images}.values())
        engine = self.engines["vision"]
        scores = [name for name in engine.outputs if name != _FEATURES]
        found: dict[int, dict[str, Array]] = {}
        for start, stop in _groups(
            [len(image.feeds["pixel_values"]) for image in once], TILES_AT_ONCE
        ):
            group, at = once[start:stop], 0
            feeds: dict[str, Array] = {
                name: np.concatenate([image.feeds[name] for image in group]).astype(
                    spec.dtype, copy=False
                )
                for name, spec in engine.inputs.items()
            }
            out = engine.run(feeds, host=scores)
            for image in group:
                end = at + image.feature_rows
                found[id(image)] = {name: values[at:end] for name, values in out.items()}
                at = end
        if not images:
            nothing = {name: np.zeros(0, np.float32) for name in scores}
            return np.zeros((0, self.hidden_size), self.dtype), nothing
        features = concatenate([found[id(image)][_FEATURES] for image in images])
        return features, {
            name: np.concatenate([found[id(image)][name] for image in images]) for name in scores
        }

    def prefill(
        self,
        batch: Batch,
        images: Sequence[Layout],
        keeps: Sequence[np.ndarray],
        new_tokens: np.ndarray,
        clock: Clock,
        seeds: np.ndarray | None = None,
    ) -> Prefilled:
        """Run a batch up to its first logits.

        Args:
            images: layouts of all images of the batch in order.
            keeps: for each pruning point, int64 [B], visual tokens to keep.
            new_tokens: int64 [B], how many tokens a row may generate; sizes the KV cache.
            seeds: int64 [B], of `random` selections; None is 0 for all.

        Raises:
            TrioError: a selection did not converge, or an engine takes less.
        """
        visual = batch.visual_mask.sum(axis=1)
        for name, held in self.lengths(batch.lengths, visual, keeps).items():
            self.capacity(name, int((held + new_tokens).max()))  # before anything is computed
        with clock.stage("vision", self._moment):
            features, scores = self.see(images)
        with clock.stage("embed", self._moment):
            embed = {
                "input_ids": batch.input_ids,
                "image_features": features,
                "source_index": batch.source_index,
            }
            hidden = self.engines["embed"].run(embed, host=())["inputs_embeds"]
        del features, embed
        tokens = _Tokens(
            hidden,
            batch.position_ids,
            batch.visual_mask,
            batch.lengths,
            visual,
            np.zeros(len(batch.lengths), np.int64) if seeds is None else seeds,
            {name: _per_token(batch, rows) for name, rows in scores.items()},
        )
        del hidden
        chosen: list[_Chosen | None] = []
        caches: dict[str, SegmentCache] = {}
        for name, engine in self.engines.items():
            if name.startswith("select_"):
                keep, picked = keeps[len(chosen)], None
                if (keep < tokens.seen).any():
                    with clock.stage(name, self._moment):
                        picked, tokens = _select(engine, name, tokens, keep)
                chosen.append(picked)
            elif name in self.segments:
                with clock.stage(name, self._moment):
                    longest = int((tokens.lengths + new_tokens).max())
                    caches[name] = self.cache(name, tokens.lengths, longest)
                    tokens.hidden = self._segment(name, caches[name], tokens)
        logits = to_host(tokens.hidden)  # here a device is waited for, and not before
        return Prefilled(logits, caches, _origins(chosen, batch.lengths))

    def capacity(self, name: str, tokens: int) -> int:
        """Tokens a row that a segment's cache has room for when `tokens` are asked for.

        An engine that updates in place takes one capacity only.

        Raises:
            TrioError: it is too small.
        """
        layers = self.layers[name]
        fixed = self._holder(name).inputs[f"past.{layers[0]}.key"].shape[2]
        if not isinstance(fixed, int):
            return tokens
        if tokens > fixed:
            raise TrioError(
                f"the request needs {tokens} tokens a row in the KV cache of layers {layers[0]} to "
                f"{layers[-1]}, and decode was built for {fixed}: ask for a lower budget, less "
                "text or fewer new tokens, or raise max_budget, max_text_tokens or max_new_tokens "
                "in a copy of the target's file (with max_budget 1.0 nothing need be pruned) and "
                "run `trio build` again with it as --target"
            )
        return fixed

    def lengths(
        self, length: np.ndarray, visual: np.ndarray, keeps: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Tokens of prompts that each segment holds, int64 [B].

        Args:
            length, visual: tokens of each prompt, and visual ones among them, [B] each.
            keeps: for each pruning point, visual tokens to keep, [B] each.
        """
        seen, remaining, found = visual, iter(keeps), {}
        for name in self.engines:
            if name.startswith("select_"):
                seen = np.minimum(next(remaining), seen)
            elif name in self.segments:
                found[name] = length - visual + seen
        return found

    def cache(self, name: str, lengths: np.ndarray, tokens: int) -> SegmentCache:
        """A segment's cache for rows of int64 [B] `lengths`, with room for `tokens` a row."""
        return SegmentCache.allocate(
            self.layers[name],
            lengths,
            self.capacity(name, tokens),
            self.cache_shape,
            self._empties(self._holder(name)),
            self.sides,
        )

    @staticmethod
    def _empties(engine: Engine) -> Empties:
        """In one block where the engine's memory can be cut."""
        if isinstance(engine, Blocks):
            return engine.empties
        return lambda shapes, dtype: [engine.empty(shape, dtype) for shape in shapes]

    def _holder(self, name: str) -> Engine:
        """The engine whose steps read a segment's cache."""
        return self.engines["decode"] if self.separate else self.engines[name]

    def _segment(self, name: str, cache: SegmentCache, tokens: _Tokens) -> Array:
        """Run a segment and fill its cache; returns what comes next: hidden states or logits."""
        engine = self.engines[name]
        feeds: dict[str, Array] = {
            self.source(name): tokens.hidden,
            "position_ids": tokens.positions,
        }
        if "lengths" in engine.inputs:  # not where nothing reads them
            feeds["lengths"] = tokens.lengths
        into: Mapping[str, Array] = {}
        if "past_lengths" in engine.inputs:
            feeds["past_lengths"] = np.zeros_like(tokens.lengths)
            if self._shares_cache:
                feeds |= cache.past()
                into = cache.present()
            else:
                shape = self.cache_shape
                none = np.zeros((len(tokens.lengths), shape.heads, 0, shape.head_dim), shape.dtype)
                feeds |= {key: none for key in engine.inputs if key.startswith("past.")}
        outputs = engine.run(feeds, into, host=())
        if not into:
            cache.fill(outputs)
        return outputs[self.sink(name)]


@dataclass
class _Tokens:
    """What goes through the layers; lengths and counts are the host's whatever the runtime.

    Attributes:
        hidden: [B,S,d]; after the last segment logits [B,V].
        positions: int64 [B,S].
        visual: bool [B,S].
        lengths: int64 [B], valid tokens.
        seen: int64 [B], visual ones among them.
        seeds: int64 [B], of `random` selections.
        scores: f32 [B,S] each, by the name of the vision graph's output: what the encoder thinks.
    """

    hidden: Array
    positions: Array
    visual: Array
    lengths: np.ndarray
    seen: np.ndarray
    seeds: np.ndarray
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class _Chosen:
    """What a selection kept: keep_index int64 [B,W], the first `lengths` entries of each row."""

    stage: str
    index: Array
    lengths: np.ndarray
    converged: Array

    def check(self) -> None:
        """Raises TrioError if a row was not settled."""
        converged = to_host(self.converged)
        if converged.all():
            return
        rows = ", ".join(str(row) for row in np.flatnonzero(~converged))
        raise TrioError(
            f"{self.stage} found no set of tokens for row {rows}, most likely since the hidden "
            "states overflowed in 16-bit floats: export with --dtype float32, or ask with a budget "
            "of 1"
        )


def _select(
    engine: Engine, name: str, tokens: _Tokens, keep: np.ndarray
) -> tuple[_Chosen, _Tokens]:
    seen = np.minimum(keep, tokens.seen)
    lengths = tokens.lengths - tokens.seen + seen
    feeds: dict[str, Array] = {
        "hidden_states": tokens.hidden,
        "position_ids": tokens.positions,
        "lengths": tokens.lengths,
        "visual_mask": tokens.visual,
        "keep": keep,
        "width": np.array([lengths.max()], np.int64),
    }
    own = {"seed": tokens.seeds, **tokens.scores}
    feeds |= {key: value for key, value in own.items() if key in engine.inputs}
    out = engine.run(feeds, host=())
    chosen = _Chosen(name, out["keep_index"], lengths, out["converged"])
    if on_host(chosen.converged):
        chosen.check()
    scores = tokens.scores
    if scores:
        index = np.maximum(to_host(chosen.index), 0)
        scores = {name: np.take_along_axis(of, index, axis=1) for name, of in scores.items()}
    return chosen, replace(
        tokens,
        hidden=out["hidden_states_out"],
        positions=out["position_ids_out"],
        visual=out["visual_mask_out"],
        lengths=lengths,
        seen=seen,
        scores=scores,
    )


def _per_token(batch: Batch, rows: np.ndarray) -> np.ndarray:
    """The encoder's scores [R] where the tokens of a batch come from, f32 [B,S].

    0 for text, and for image_newline, which shows nothing of a picture.
    """
    row = batch.source_index - batch.source_index.shape[1]
    scores = np.append(rows, np.float32(0))[np.maximum(row, 0)]
    return np.where(batch.visual_mask, scores, np.float32(0))


def _origins(chosen: Sequence[_Chosen | None], lengths: np.ndarray) -> list[list[np.ndarray]]:
    """`Prefilled.kept`; None stands for a pruning point where no row pruned.

    Raises:
        TrioError: a selection did not converge.
    """
    origins, kept = [np.arange(length) for length in lengths], []
    for choice in chosen:
        if choice is not None:
            choice.check()
            index = to_host(choice.index)
            origins = [old[index[b, : choice.lengths[b]]] for b, old in enumerate(origins)]
        kept.append(origins)
    return kept


def _layers(engine: Engine) -> list[int]:
    """Numbers of a segment's layers, from its outputs present.{i}.key."""
    names = [name.split(".") for name in engine.outputs if name.startswith("present.")]
    return [int(parts[1]) for parts in names if parts[2] == "key"]


def _groups(sizes: Sequence[int], limit: int) -> Iterator[tuple[int, int]]:
    """Ranges of items whose sizes sum to at most `limit`, or single larger items."""
    start, total = 0, 0
    for stop, size in enumerate(sizes):
        if stop > start and total + size > limit:
            yield start, stop
            start, total = stop, 0
        total += size
    if start < len(sizes):
        yield start, len(sizes)
