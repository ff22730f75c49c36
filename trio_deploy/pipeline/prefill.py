"""The graphs of a bundle, run in order: vision, embed, then segments of layers and selections."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.bundle.manifest import Role, StageInfo
from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout, PatchTowerConfig
from trio_deploy.families.registry import request_limits
from trio_deploy.files import format_bytes
from trio_deploy.pipeline.cache import Allocate, CacheShape, SegmentCache
from trio_deploy.pipeline.features import FeatureCache, KeyedLayout, Outputs
from trio_deploy.pipeline.memory import memory_for
from trio_deploy.pipeline.pieces import Piece, Turn, at_once
from trio_deploy.pipeline.prompt import Batch
from trio_deploy.pipeline.token_table import TokenTable
from trio_deploy.runtimes.arrays import concatenate, on_host, to_host
from trio_deploy.runtimes.base import Array, Blocks, Engine, HostMoment, Moment, Runtime
from trio_deploy.schedule.methods import METHODS
from trio_deploy.schedule.view import all_equal

_MOST_SCORES = 4 * 2**30  # bytes; what pictures need at the recipes' bounds is below


@dataclass
class Clock:
    """Seconds that stages take."""

    _spans: list[tuple[str, Moment, Moment]] = field(default_factory=list)

    @contextmanager
    def stage(self, name: str, moment: Callable[[], Moment] = HostMoment.now) -> Iterator[None]:
        """Add the time spent inside to stage `name`, which is named where memory runs out.

        `moment` is as in `Runtime.moment`.
        """
        start = moment()
        with memory_for(name):
            yield
        self._spans.append((name, start, moment()))

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds per stage, in the order in which they first ran."""
        seconds: dict[str, float] = {}
        for name, start, stop in self._spans:
            seconds[name] = seconds.get(name, 0.0) + stop.since(start)
        return seconds


@dataclass
class Prefilled:
    """Result of a prefill.

    Attributes:
        logits: float32 [B,V], of each row's next token.
        caches: by name of the segment.
        kept: for each pruning point and row, which tokens (text and visual) of the row's original
            prompt were kept.
        warnings: for each row, faults that did not end the prefill, a sentence each.
    """

    logits: np.ndarray
    caches: dict[str, SegmentCache]
    kept: list[list[np.ndarray]]
    warnings: list[list[str]]


@dataclass(frozen=True)
class Encoded:
    """What the vision tower makes of a batch's images, one after another.

    Attributes:
        features: [R,d].
        deepstack: [R,d] each, features that are added behind a decoder layer, by name.
        scores: f32 [R] each, scores per feature row, by name.
    """

    features: Array
    deepstack: dict[str, Array]
    scores: dict[str, np.ndarray]


class Stages:
    """Opened engines of a bundle, and its prefill.

    Attributes:
        engines: by name of the stage, in the order in which they run.
        info: descriptions of all stages, by name.
        segments: names of the stages with decoder layers, in order.
        vision, embed: descriptions of the stages that a bundle has once.
        table: the table of embeddings that tokens are looked up in; None: graphs hold it.
        decode: description of the stage that decodes; None where the segments themselves do.
        buffer_sets: sets of buffers per cache: 1 where a step writes in place, else 2.
        layers: numbers of each segment's layers.
        cache_shape: what the caches of all layers have in common.
        axes: positions per token: 1, or 3 (time, row and column).
        concurrent: whether several threads may run the stages at once.
        max_rows: most rows per batch; None: any number.
        features: what the tower made of pictures before; None: nothing is kept.
    """

    def __init__(self, bundle: Bundle, runtime: Runtime, *, holds_scores: bool = False) -> None:
        """Open every graph.

        Args:
            holds_scores: whether the runtime computes all scores of an attention at once, and the
                graphs, made for another one, have no loop over blocks of queries.

        Raises:
            TrioError: a graph does not load or is not of this bundle's kind.
        """
        bundle.require_weights()
        self._shares_cache = runtime.shares_cache(bundle.manifest.dialect)
        self.sequence, self._moment = runtime.sequence, runtime.moment
        self.concurrent, self.max_rows = runtime.concurrent, runtime.max_rows
        self.features: FeatureCache | None = None
        self.engines: dict[str, Engine] = {}
        self.info = bundle.stages
        for name, stage in self.info.items():
            selects = stage.kind == "select"
            with memory_for(f"loading {name}"):
                self.engines[name] = runtime.open(
                    bundle.graph(name),
                    bundle.places(name),
                    keep_precision=selects,
                    shares_weights=selects or stage.kind == "embed",
                )
        self.vision, self.embed = bundle.only("vision"), bundle.only("embed")
        self.table = TokenTable.of(bundle)
        tower = bundle.config.vision
        # Tiles of one size are small.
        of_any_size = holds_scores and isinstance(tower, PatchTowerConfig)
        self._heads_held = tower.num_heads if of_any_size else 0
        self._rows_at_once = request_limits(bundle.config).rows_at_once
        self.segments = [stage.name for stage in bundle.of_kind("prefill")]
        self.decode = next(iter(bundle.of_kind("decode")), None)
        self.buffer_sets = 1 if self._shares_cache else 2
        self.layers = {name: list(self.info[name].layers) for name in self.segments}
        text = bundle.config.text
        dtype = self.engines[self.embed.name].outputs[self.embed.output_name("tokens")].dtype
        self.axes = 1 if text.rope.axes is None else 3
        self.hidden_size, self.vocab_size, self.dtype = text.hidden_size, text.vocab_size, dtype
        self._work_per_key = 2 * text.num_heads * text.head_dim
        self._work_per_query = text.hidden_size * (
            2 * (text.num_heads + text.num_kv_heads) * text.head_dim + 3 * text.intermediate_size
        )
        if [i for name in self.segments for i in self.layers[name]] != list(range(text.num_layers)):
            raise TrioError(
                "the bundle's segments do not cover the model's layers one by one: export it again"
            )
        # The engine's own: OpenVINO may hold a cache in fewer bits than hidden states.
        first = self.info[self.segments[0]]
        cache = first.outputs_of("cache")[0]
        kept = self.engines[first.name].outputs[cache.name].dtype
        self.cache_shape = CacheShape(text.num_kv_heads, int(cache.shape[3]), kept)

    def output_name(self, segment: str) -> str:
        """Output that is not a cache: hidden states, or logits of the last segment."""
        stage = self.info[segment]
        role: Role = "logits" if stage.outputs_of("logits") else "tokens"
        return stage.output_name(role)

    def encode_images(self, images: Sequence[Layout]) -> Encoded:
        """Run the vision tower once per distinct image; those of equal grids share runs.

        Args:
            images: in order; the cache of features knows some by their files.
        """
        feature_name = self.vision.output_name("features")
        deepstack = [tensor.name for tensor in self.vision.outputs_of("deepstack")]
        scores = [tensor.name for tensor in self.vision.outputs_of("per_token")]
        keyed = [image for image in images if isinstance(image, KeyedLayout)]
        plain = {id(image): image for image in images if not isinstance(image, KeyedLayout)}
        cache = self.features or FeatureCache(0)  # it may have been turned off meanwhile
        known = cache.encode(keyed, self._run_tower)
        fresh = dict(zip(plain, self._run_tower(list(plain.values())), strict=True))
        found = [
            known[each.key] if isinstance(each, KeyedLayout) else fresh[id(each)] for each in images
        ]

        def joined(name: str) -> Array:
            if not images:
                return np.zeros((0, self.hidden_size), self.dtype)
            return concatenate([outputs[name] for outputs in found])

        return Encoded(
            joined(feature_name),
            {name: joined(name) for name in deepstack},
            {
                name: np.concatenate(
                    [np.zeros(0, np.float32), *(outputs[name] for outputs in found)]
                )
                for name in scores
            },
        )

    def _run_tower(self, images: Sequence[Layout]) -> list[Outputs]:
        """The tower's outputs for each of distinct images, in order; scores are on the host."""
        scores = [tensor.name for tensor in self.vision.outputs_of("per_token")]
        alike: dict[tuple[tuple[int, int, int], ...], list[Layout]] = {}
        for image in images:
            alike.setdefault(image.grids, []).append(image)
        found: dict[int, Outputs] = {}
        for same in alike.values():
            for start, stop in self._runs(same):
                group, at = same[start:stop], 0
                self._check_scores(group)
                out = self.engines[self.vision.name].run(self._vision_feeds(group), host=scores)
                for image in group:
                    end = at + image.feature_rows
                    found[id(image)] = {name: values[at:end] for name, values in out.items()}
                    at = end
        return [found[id(image)] for image in images]

    def _check_scores(self, group: Sequence[Layout]) -> None:
        """Raise TrioError where the scores of a run of the tower would take too much memory."""
        if not self._heads_held:
            return
        (name,) = (t.name for t in self.vision.inputs_of("image") if t.shape[0] == "T")
        tiles, patches = (
            sum(len(image.feeds[name]) for image in group),
            group[0].feeds[name].shape[1],
        )
        if (held := 4 * self._heads_held * tiles * patches**2) > _MOST_SCORES:
            raise TrioError(
                f"a picture of {patches} patches takes {format_bytes(held)} for the scores of the "
                "vision tower's attention, since the bundle's graphs are made for another runtime: "
                "export it for this one (--target), or pass smaller pictures"
            )

    def _runs(self, images: Sequence[Layout]) -> Iterator[tuple[int, int]]:
        """Ranges of images of equal grids that share a run of the tower, which bounds its memory.

        An engine that is built for fewer tiles takes those.
        """
        (name,) = (t.name for t in self.vision.inputs_of("image") if t.shape[0] == "T")
        most = self.engines[self.vision.name].inputs[name].most
        sizes = [(image.feature_rows, len(image.feeds[name])) for image in images]
        return _groups(sizes, (self._rows_at_once, math.inf if most is None else most[0]))

    def _vision_feeds(self, group: Sequence[Layout]) -> dict[str, Array]:
        """The tower's inputs for images of equal grids: what has no axis T is the same for all."""
        feeds: dict[str, Array] = {}
        taken = self.engines[self.vision.name].inputs
        for tensor in self.vision.inputs:
            if (name := tensor.name) not in taken:
                continue
            if tensor.shape[0] == "T":
                values = np.concatenate([image.feeds[name] for image in group])
            else:
                values = group[0].feeds[name]
            feeds[name] = np.ascontiguousarray(values, taken[name].dtype)
        return feeds

    def prefill(
        self,
        batch: Batch,
        images: Sequence[Layout],
        keeps: Sequence[np.ndarray],
        new_tokens: np.ndarray,
        clock: Clock,
        seeds: np.ndarray | None = None,
        turn: Turn = at_once,
    ) -> Prefilled:
        """Run a batch up to its first logits.

        Args:
            images: layouts of all images of the batch in order.
            keeps: for each pruning point, int64 [B], visual tokens to keep.
            new_tokens: int64 [B], most tokens that each row generates; sizes the KV cache.
            seeds: int64 [B], of `random` selections; None: 0 for all.
            turn: called before each stage, and between the pieces of a segment.

        Raises:
            TrioError: a selection did not converge, or the request exceeds what an engine was built
                for.
        """
        visual = batch.visual_mask.sum(axis=1)
        for name, lengths in self.lengths(batch.lengths, visual, keeps).items():
            self.capacity(name, int((lengths + new_tokens).max()))  # before anything is computed
        turn(Piece("vision", sum(image.feature_rows for image in images)))
        with clock.stage("vision", self._moment):
            encoded = self.encode_images(images)
        turn(Piece("embed", batch.input_ids.size))
        with clock.stage("embed", self._moment):
            ids, source = batch.input_ids, batch.source_index
            values: dict[Role, Array] = {"features": encoded.features, "source": source}
            if self.table is None:
                values["ids"] = ids
            else:
                values["token_embeddings"] = self.table.rows_for_text(ids, source)
            embed = self.feeds(self.embed, values)
            out = self.engines[self.embed.name].run(embed, host=())
            hidden = out.pop(self.embed.output_name("tokens"))
        deepstack, scores, rows = encoded.deepstack, encoded.scores, encoded.features.shape[0]
        del embed, values, encoded
        tokens = _Tokens(
            hidden,
            batch.position_ids,
            batch.visual_mask,
            batch.lengths,
            visual,
            np.zeros(len(batch.lengths), np.int64) if seeds is None else seeds,
            {name: _per_token(batch, values) for name, values in scores.items()},
            _feature_index(batch, rows),
        )
        del hidden
        selections: list[_Selection | None] = []
        caches: dict[str, SegmentCache] = {}
        for name, stage in self.info.items():
            if stage.kind == "select":
                keep, selection = keeps[len(selections)], None
                if (keep < tokens.visual_counts).any():
                    turn(Piece(stage.label, int(tokens.lengths.sum())))
                    with clock.stage(stage.label, self._moment):
                        selection, tokens = self._select(stage, tokens, keep)
                selections.append(selection)
            elif stage.kind == "prefill":
                with clock.stage(stage.label, self._moment):
                    longest = int((tokens.lengths + new_tokens).max())
                    caches[name] = self.cache(name, tokens.lengths, longest)
                segment = _Segment(stage, caches[name], tokens, deepstack)
                tokens.hidden = self._segment(segment, clock, turn)
        logits = to_host(tokens.hidden)  # waits for the device, for the first time
        kept = _kept(selections, batch.lengths)
        return Prefilled(logits, caches, kept, _faults(selections, kept, batch))

    def capacity(self, name: str, tokens: int) -> int:
        """Capacity of a segment's cache for rows of `tokens` tokens.

        An engine that updates the cache in place takes one capacity only.

        Raises:
            TrioError: that is too small.
        """
        layers = self.layers[name]
        stage = self._decode_stage(name)
        cache = next(t.name for t in stage.inputs_of("cache") if t.layer == layers[0])
        fixed = self.engines[stage.name].inputs[cache].shape[2]
        if not isinstance(fixed, int):
            return tokens
        if tokens > fixed:
            raise TrioError(
                f"the request needs {tokens} tokens per row in the KV cache of layers {layers[0]} "
                f"to {layers[-1]}, and decode was built for {fixed}: ask for a lower budget, less "
                "text or fewer new tokens, or raise max_budget, max_text_tokens or max_new_tokens "
                "in a copy of the target's file (with max_budget 1.0 nothing need be pruned) and "
                "run `trio build` again with it as --target"
            )
        return fixed

    def lengths(
        self, length: np.ndarray, visual: np.ndarray, keeps: Sequence[np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Tokens of each prompt that each segment computes, int64 [B] by name of the segment.

        Args:
            length, visual: all tokens and visual tokens of each prompt, [B] each.
            keeps: for each pruning point, visual tokens to keep, [B] each.
        """
        visual_counts, remaining, lengths = visual, iter(keeps), {}
        for name, stage in self.info.items():
            if stage.kind == "select":
                visual_counts = np.minimum(next(remaining), visual_counts)
            elif stage.kind == "prefill":
                lengths[name] = length - visual + visual_counts
        return lengths

    def cache(self, name: str, lengths: np.ndarray, tokens: int) -> SegmentCache:
        """Allocate a segment's cache: int64 [B] `lengths` now, room for `tokens` per row."""
        cache = SegmentCache.allocate(
            self.layers[name],
            lengths,
            self.capacity(name, tokens),
            self.cache_shape,
            self._allocator(self.engines[self._decode_stage(name).name]),
            self.buffer_sets,
        )
        cache.clears = not self._writes_behind(name)
        return cache

    @staticmethod
    def _allocator(engine: Engine) -> Allocate:
        """The engine's own, in one block where its memory can be divided."""
        if isinstance(engine, Blocks):
            return engine.empties
        return lambda shapes, dtype: [engine.empty(shape, dtype) for shape in shapes]

    def feeds(
        self,
        stage: StageInfo,
        values: Mapping[Role, Array],
        named: Mapping[str, Array] | None = None,
    ) -> dict[str, Array]:
        """The inputs of a stage by name, without caches.

        Args:
            values: by role.
            named: inputs with the roles `per_token` and `deepstack`, by name.
        """
        taken = self.engines[stage.name].inputs  # an engine may lack an input that nothing reads
        return {
            tensor.name: (named or {})[tensor.name]
            if tensor.role in ("per_token", "deepstack")
            else values[tensor.role]
            for tensor in stage.inputs
            if tensor.name in taken and tensor.role != "cache"
        }

    def _writes_behind(self, name: str) -> bool:
        """Whether a segment's graph writes keys and values into the cache, behind a row's others.

        It reads those of the row's tokens alone then.
        """
        return self._shares_cache and bool(self.info[name].inputs_of("cache"))

    def _decode_stage(self, name: str) -> StageInfo:
        """The stage whose decode steps read a segment's cache."""
        return self.decode or self.info[name]

    def _segment(self, segment: _Segment, clock: Clock, turn: Turn) -> Array:
        """Run a segment and fill its cache; returns hidden states, or logits of the last one.

        A graph that writes its keys and values behind those of a row's earlier tokens takes the
        tokens of a row in pieces of any lengths. Padding is not computed then, and stays 0.
        """
        stage, tokens = segment.stage, segment.tokens
        layers, lengths = len(stage.layers), [int(length) for length in tokens.lengths]
        apart = (
            self._writes_behind(stage.name) and segment.cache.sliceable and on_host(tokens.hidden)
        )

        def left(row: int, start: int) -> Piece:
            rows = ((start, lengths[row]), *((0, length) for length in lengths[row + 1 :]))
            per_query, per_key = layers * self._work_per_query, layers * self._work_per_key
            return Piece.of_queries(stage.label, rows, per_query, per_key)

        queries = turn(left(0, 0) if apart else Piece(stage.label, sum(lengths)))
        if queries is None:
            with clock.stage(stage.label, self._moment):
                return self._run_segment(segment)
        last = bool(stage.outputs_of("logits"))
        whole = (len(lengths), self.vocab_size) if last else tokens.hidden.shape
        out: np.ndarray = np.zeros(whole, np.float32 if last else tokens.hidden.dtype)
        for row, length in enumerate(lengths):
            start = 0
            while start < length:
                stop = length if queries is None else min(start + queries, length)
                with clock.stage(stage.label, self._moment):
                    y = self._run_segment(segment.part(row, start, stop), start)
                    out[row : row + 1, ... if last else slice(start, stop)] = y
                start = stop
                # Otherwise nothing is left, or the last turn was for all that is.
                if queries is not None and (start < length or row + 1 < len(lengths)):
                    queries = turn(left(row, start) if start < length else left(row + 1, 0))
        return out

    def _run_segment(self, segment: _Segment, past: int = 0) -> Array:
        """Run a segment's graph on tokens that stand behind `past` others of their row."""
        stage, tokens, cache = segment.stage, segment.tokens, segment.cache
        feeds = self.feeds(
            stage,
            {
                "tokens": tokens.hidden,
                "positions": tokens.positions,
                "lengths": tokens.lengths,
                "past_lengths": np.full_like(tokens.lengths, past),
                "feature_index": tokens.feature_index,
            },
            {**tokens.per_token, **segment.deepstack},
        )
        into: Mapping[str, Array] = {}
        if inputs := stage.inputs_of("cache"):
            if self._shares_cache:
                feeds |= cache.past(stage)
                into = cache.present(stage)
            else:
                shape = self.cache_shape
                none = np.zeros((len(tokens.lengths), shape.heads, 0, shape.head_dim), shape.dtype)
                feeds |= {tensor.name: none for tensor in inputs}
        outputs = self.engines[stage.name].run(feeds, into, host=())
        if not into:
            cache.fill(stage, outputs)
        return outputs[self.output_name(stage.name)]

    def _select(
        self, stage: StageInfo, tokens: _Tokens, keep: np.ndarray
    ) -> tuple[_Selection, _Tokens]:
        """Prune at one point; returns what was selected, and the tokens that remain."""
        visual_counts = np.minimum(keep, tokens.visual_counts)
        lengths = tokens.lengths - tokens.visual_counts + visual_counts
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
                "feature_index": tokens.feature_index,
            },
            tokens.per_token,
        )
        out = self.engines[stage.name].run(feeds, host=())
        roles: tuple[Role, ...] = ("index", "converged", "score")
        index, converged, scores = (out[stage.output_name(role)] for role in roles)
        selection = _Selection(stage, index, lengths, converged, scores, visual_counts)
        if on_host(selection.converged):
            selection.require_converged()
        per_token = tokens.per_token
        if per_token:
            kept = np.maximum(to_host(selection.index), 0)
            per_token = {
                name: np.take_along_axis(values, kept, axis=1) for name, values in per_token.items()
            }
        followed = [tensor.name for tensor in stage.outputs_of("feature_index")]
        return selection, replace(
            tokens,
            feature_index=out[followed[0]] if followed else tokens.feature_index,
            hidden=out[stage.output_name("tokens")],
            positions=out[stage.output_name("positions")],
            visual=out[stage.output_name("visual")],
            lengths=lengths,
            visual_counts=visual_counts,
            per_token=per_token,
        )


@dataclass
class _Tokens:
    """Tokens of a batch between two stages; lengths and counts are always on the host.

    Attributes:
        hidden: [B,S,d]; after the last segment logits [B,V].
        positions: int64 [B,S] or [B,3,S].
        visual: bool [B,S].
        lengths: int64 [B], valid tokens.
        visual_counts: int64 [B], visual tokens.
        seeds: int64 [B], of `random` selections.
        per_token: f32 [B,S] each, per-token encoder scores, by the vision graph's output name.
        feature_index: int64 [B,S], each token's row of the batch's features, -1: none. A selection
            behind which no layer adds features leaves it as it is.
    """

    hidden: Array
    positions: Array
    visual: Array
    lengths: np.ndarray
    visual_counts: np.ndarray
    seeds: np.ndarray
    per_token: dict[str, np.ndarray]
    feature_index: Array


@dataclass(frozen=True)
class _Segment:
    """A segment's graph and what it runs on.

    Attributes:
        deepstack: [R,d] each, features that are added behind a decoder layer, by name.
    """

    stage: StageInfo
    cache: SegmentCache
    tokens: _Tokens
    deepstack: Mapping[str, Array]

    def part(self, row: int, start: int, stop: int) -> _Segment:
        """The same for some tokens of one row."""

        def cut(array: Array) -> Array:  # [B,S] or [B,3,S]
            return np.ascontiguousarray(array[row : row + 1, ..., start:stop])

        tokens = self.tokens
        part = replace(
            tokens,
            hidden=tokens.hidden[row : row + 1, start:stop],
            positions=cut(to_host(tokens.positions)),
            lengths=np.array([stop - start], np.int64),
            per_token={name: cut(values) for name, values in tokens.per_token.items()},
            feature_index=cut(to_host(tokens.feature_index)),
        )
        return replace(self, cache=self.cache.only_row(row), tokens=part)


@dataclass(frozen=True)
class _Selection:
    """Result of a select stage.

    Attributes:
        index: int64 [B,W], of which `lengths` entries per row are valid.
        converged: bool [B].
        scores: f32 [B,S], by which the method chose.
        visual_counts: int64 [B], visual tokens that stay.
    """

    stage: StageInfo
    index: Array
    lengths: np.ndarray
    converged: Array
    scores: Array
    visual_counts: np.ndarray

    def require_converged(self) -> None:
        """Raise TrioError if a row did not converge."""
        converged = to_host(self.converged)
        if converged.all():
            return
        rows = ", ".join(str(row) for row in np.flatnonzero(~converged))
        raise TrioError(
            f"{self.stage.name} found no set of tokens for row {rows}, most likely because the "
            "hidden states overflowed in 16-bit floats: export with --dtype float32, or ask with a "
            "budget of 1"
        )


def _per_token(batch: Batch, rows: np.ndarray) -> np.ndarray:
    """Per-token encoder scores, f32 [B,S], from scores [R] per feature row.

    0 for text, and for image_newline, which shows no part of the image.
    """
    row = batch.source_index - batch.source_index.shape[1]
    scores = np.append(rows, np.float32(0))[np.maximum(row, 0)]
    return np.where(batch.visual_mask, scores, np.float32(0))


def _feature_index(batch: Batch, rows: int) -> np.ndarray:
    """Each token's row of the batch's features, int64 [B,S]; -1 for text and newlines."""
    row = batch.source_index - batch.source_index.shape[1]
    return np.where(batch.visual_mask & (row < rows), row, -1)


def _kept(selections: Sequence[_Selection | None], lengths: np.ndarray) -> list[list[np.ndarray]]:
    """`Prefilled.kept`; None stands for a pruning point where no row prunes.

    Raises:
        TrioError: a selection did not converge.
    """
    origins, kept = [np.arange(length) for length in lengths], []
    for selection in selections:
        if selection is not None:
            selection.require_converged()
            index = to_host(selection.index)
            origins = [old[index[b, : selection.lengths[b]]] for b, old in enumerate(origins)]
        kept.append(origins)
    return kept


def _faults(
    selections: Sequence[_Selection | None], kept: Sequence[Sequence[np.ndarray]], batch: Batch
) -> list[list[str]]:
    """Per row, the selections whose scores tell no visual token from another.

    What such a selection keeps depends on neither picture nor question. Scores of methods that
    choose token after token are no ranking, and are not judged.
    """
    faults: list[list[str]] = [[] for _ in batch.lengths]
    before = [np.arange(length) for length in batch.lengths]
    for selection, after in zip(selections, kept, strict=True):
        method = selection and selection.stage.method
        if selection is not None and method and not METHODS[method].sequential:
            scores = to_host(selection.scores)
            for row, tokens in enumerate(before):
                visual = scores[row, : len(tokens)][batch.visual_mask[row, tokens]]
                count = int(selection.visual_counts[row])
                if 0 < count < len(visual) and all_equal(visual):
                    faults[row].append(
                        f"{selection.stage.label} gave all {len(visual)} visual tokens the same "
                        f"score, so the {count} that it kept depend on neither picture nor "
                        "question: run `trio check` on the bundle, or ask with a budget of 1"
                    )
        before = list(after)
    return faults


def _groups(
    sizes: Sequence[tuple[int, ...]], limits: tuple[float, ...]
) -> Iterator[tuple[int, int]]:
    """Ranges of items whose sizes of each kind sum to at most its limit, or single larger items."""
    start, totals = 0, [0] * len(limits)
    for stop, size in enumerate(sizes):
        sums = [total + more for total, more in zip(totals, size, strict=True)]
        if stop > start and any(map(operator.gt, sums, limits)):
            yield start, stop
            start, sums = stop, list(size)
        totals = sums
    if start < len(sizes):
        yield start, len(sizes)
