"""The graphs of a bundle, run in order: vision, embed, then segments of layers and selections."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import Role, StageInfo
from trio_deploy.errors import TrioError
from trio_deploy.families.base import TILES_AT_ONCE, Layout
from trio_deploy.pipeline.cache import Allocate, CacheShape, SegmentCache
from trio_deploy.pipeline.prompt import Batch
from trio_deploy.runtimes.arrays import concatenate, on_host, to_host
from trio_deploy.runtimes.base import Array, Blocks, Engine, HostMoment, Moment, Runtime


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
        info: descriptions of all stages, by name.
        vision, embed: of the stages that a bundle has once.
        decode: of the stage that decodes; None where the segments themselves do.
        buffer_sets: sets of buffers per cache: 1 where a step writes in place, else 2.
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
        self.info = bundle.stages
        for name, stage in self.info.items():
            selects = stage.kind == "select"
            self.engines[name] = runtime.open(
                bundle.graph(name),
                bundle.places(name),
                keep_precision=selects,
                shares_weights=selects or stage.kind == "embed",
            )
        self.vision, self.embed = bundle.only("vision"), bundle.only("embed")
        self.segments = [stage.name for stage in bundle.of_kind("prefill")]
        self.decode = next(iter(bundle.of_kind("decode")), None)
        self.buffer_sets = 1 if self._shares_cache else 2
        self.layers = {name: list(self.info[name].layers) for name in self.segments}
        text = bundle.config.text
        dtype = self.engines[self.embed.name].outputs[self.embed.output_name("tokens")].dtype
        self.hidden_size, self.vocab_size, self.dtype = text.hidden_size, text.vocab_size, dtype
        if [i for name in self.segments for i in self.layers[name]] != list(range(text.num_layers)):
            raise TrioError(
                "the bundle's segments do not cover the model's layers one by one: export it again"
            )
        # The engine's own: OpenVINO may hold a cache in fewer bits than hidden states.
        first = self.info[self.segments[0]]
        kept = self.engines[first.name].outputs[first.output_name("cache")].dtype
        self.cache_shape = CacheShape(text.num_kv_heads, text.head_dim, kept)

    def output_name(self, segment: str) -> str:
        """The output that is not a cache: logits, or the hidden states for the next stage."""
        stage = self.info[segment]
        role: Role = "logits" if stage.outputs_of("logits") else "tokens"
        return stage.output_name(role)

    def encode_images(self, images: Sequence[Layout]) -> tuple[Array, dict[str, np.ndarray]]:
        """Run the vision tower once per distinct image.

        Args:
            images: in order.

        Returns:
            Image features [R,d] in the same order, and the graph's outputs per image row, f32 [R]
            each, by name.
        """
        once = list({id(image): image for image in images}.values())
        engine = self.engines[self.vision.name]
        first = self.vision.input_name("image")
        feature_name = self.vision.output_name("features")
        scores = [tensor.name for tensor in self.vision.outputs_of("per_token")]
        found: dict[int, dict[str, Array]] = {}
        for start, stop in _groups([len(image.feeds[first]) for image in once], TILES_AT_ONCE):
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
        features = concatenate([found[id(image)][feature_name] for image in images])
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
            features, scores = self.encode_images(images)
        with clock.stage("embed", self._moment):
            embed = self.feeds(
                self.embed,
                {"ids": batch.input_ids, "features": features, "source": batch.source_index},
            )
            out = self.engines[self.embed.name].run(embed, host=())
            hidden = out.pop(self.embed.output_name("tokens"))
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
        for name, stage in self.info.items():
            if stage.kind == "select":
                keep, picked = keeps[len(chosen)], None
                if (keep < tokens.seen).any():
                    with clock.stage(stage.label, self._moment):
                        picked, tokens = self._select(stage, tokens, keep)
                chosen.append(picked)
            elif stage.kind == "prefill":
                with clock.stage(stage.label, self._moment):
                    longest = int((tokens.lengths + new_tokens).max())
                    caches[name] = self.cache(name, tokens.lengths, longest)
                    tokens.hidden = self._segment(stage, caches[name], tokens)
        logits = to_host(tokens.hidden)  # here a device is waited for, and not before
        return Prefilled(logits, caches, _origins(chosen, batch.lengths))

    def capacity(self, name: str, tokens: int) -> int:
        """Tokens a row that a segment's cache has room for when `tokens` are asked for.

        An engine that updates in place takes one capacity only.

        Raises:
            TrioError: it is too small.
        """
        layers = self.layers[name]
        holder = self._holder(name)
        cache = next(t.name for t in holder.inputs_of("cache") if t.layer == layers[0])
        fixed = self.engines[holder.name].inputs[cache].shape[2]
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
        for name, stage in self.info.items():
            if stage.kind == "select":
                seen = np.minimum(next(remaining), seen)
            elif stage.kind == "prefill":
                found[name] = length - visual + seen
        return found

    def cache(self, name: str, lengths: np.ndarray, tokens: int) -> SegmentCache:
        """A segment's cache for rows of int64 [B] `lengths`, with room for `tokens` a row."""
        return SegmentCache.allocate(
            self.layers[name],
            lengths,
            self.capacity(name, tokens),
            self.cache_shape,
            self._allocator(self.engines[self._holder(name).name]),
            self.buffer_sets,
        )

    @staticmethod
    def _allocator(engine: Engine) -> Allocate:
        """In one block where the engine's memory can be cut."""
        if isinstance(engine, Blocks):
            return engine.empties
        return lambda shapes, dtype: [engine.empty(shape, dtype) for shape in shapes]

    def feeds(
        self,
        stage: StageInfo,
        values: Mapping[Role, Array],
        per_token: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """The inputs of a stage by name, without caches.

        Args:
            values: by role.
            per_token: inputs with the role `per_token`, by name.
        """
        taken = self.engines[stage.name].inputs  # an engine may lack an input that nothing reads
        return {
            tensor.name: (per_token or {})[tensor.name]
            if tensor.role == "per_token"
            else values[tensor.role]
            for tensor in stage.inputs
            if tensor.name in taken and tensor.role != "cache"
        }

    def _holder(self, name: str) -> StageInfo:
        """The stage whose steps read a segment's cache."""
        return self.decode or self.info[name]

    def _segment(self, stage: StageInfo, cache: SegmentCache, tokens: _Tokens) -> Array:
        """Run a segment and fill its cache; returns hidden states, or logits of the last one."""
        feeds = self.feeds(
            stage,
            {
                "tokens": tokens.hidden,
                "positions": tokens.positions,
                "lengths": tokens.lengths,
                "past_lengths": np.zeros_like(tokens.lengths),
            },
            tokens.per_token,
        )
        into: Mapping[str, Array] = {}
        if past := stage.inputs_of("cache"):
            if self._shares_cache:
                feeds |= cache.past(stage)
                into = cache.present(stage)
            else:
                shape = self.cache_shape
                none = np.zeros((len(tokens.lengths), shape.heads, 0, shape.head_dim), shape.dtype)
                feeds |= {tensor.name: none for tensor in past}
        outputs = self.engines[stage.name].run(feeds, into, host=())
        if not into:
            cache.fill(stage, outputs)
        return outputs[self.output_name(stage.name)]

    def _select(
        self, stage: StageInfo, tokens: _Tokens, keep: np.ndarray
    ) -> tuple[_Chosen, _Tokens]:
        """Prune before a segment; returns what was kept, and the tokens that remain."""
        seen = np.minimum(keep, tokens.seen)
        lengths = tokens.lengths - tokens.seen + seen
        feeds = self.feeds(
            stage,
            {
                "tokens": tokens.hidden,
                "positions": tokens.positions,
                "lengths": tokens.lengths,
                "visual": tokens.visual,
                "count": keep,
                "width": np.array([lengths.max()], np.int64),
                "seed": tokens.seeds,
            },
            tokens.per_token,
        )
        out = self.engines[stage.name].run(feeds, host=())
        index, converged = (stage.output_name(role) for role in ("index", "converged"))
        chosen = _Chosen(stage.name, out[index], lengths, out[converged])
        if on_host(chosen.converged):
            chosen.check()
        per_token = tokens.per_token
        if per_token:
            kept = np.maximum(to_host(chosen.index), 0)
            per_token = {
                name: np.take_along_axis(values, kept, axis=1) for name, values in per_token.items()
            }
        return chosen, replace(
            tokens,
            hidden=out[stage.output_name("tokens")],
            positions=out[stage.output_name("positions")],
            visual=out[stage.output_name("visual")],
            lengths=lengths,
            seen=seen,
            per_token=per_token,
        )


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
        per_token: f32 [B,S] each, per-token encoder scores, by the vision graph's output name.
    """

    hidden: Array
    positions: Array
    visual: Array
    lengths: np.ndarray
    seen: np.ndarray
    seeds: np.ndarray
    per_token: dict[str, np.ndarray]


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
