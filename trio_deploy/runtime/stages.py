"""The graphs of a bundle, run in order: vision, embed, then segments of layers and selections."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np

from trio_deploy.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.runtime.engine import Array, Engine, Runtime
from trio_deploy.runtime.kv import CacheShape, SegmentCache
from trio_deploy.runtime.prompt import Batch

_TILES_AT_ONCE = 8  # of the vision tower, which bounds its memory


@dataclass
class Clock:
    """Seconds a stage."""

    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Add the time spent inside to stage `name`."""
        start = time.perf_counter()
        yield
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start


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
    """

    def __init__(self, bundle: Bundle, runtime: Runtime) -> None:
        """Open every graph.

        Raises:
            TrioError: a graph does not load or is not of this bundle's kind.
        """
        bundle.require_weights()
        self._shares_cache = runtime.shares_cache(bundle.manifest.dialect)
        self.engines: dict[str, Engine] = {}
        for name in bundle.stages:
            selects = name.startswith("select_")
            self.engines[name] = runtime.open(
                bundle.graph(name), exact=selects, probing=selects or name == "embed"
            )
        self.segments = [name for name in self.engines if name.startswith("prefill_")]
        self.separate = "decode" in self.engines
        self.sides = 1 if self._shares_cache else 2
        self.layers = {name: _layers(self.engines[name]) for name in self.segments}
        text = bundle.config.text
        dtype = self.engines["embed"].outputs["inputs_embeds"].dtype
        self.hidden_size, self.vocab_size, self.dtype = text.hidden_size, text.vocab_size, dtype
        self.cache_shape = CacheShape(text.num_kv_heads, text.head_dim, dtype)
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

    def see(self, images: Sequence[np.ndarray]) -> np.ndarray:
        """image_features [R,d] of images [T,3,h,w] each, in order; the same array is seen once."""
        once = list({id(tiles): tiles for tiles in images}.values())
        features: dict[int, np.ndarray] = {}
        for start, stop in _groups([len(tiles) for tiles in once], _TILES_AT_ONCE):
            group = once[start:stop]
            engine = self.engines["vision"]
            pixels = np.concatenate(group).astype(engine.inputs["pixel_values"].dtype, copy=False)
            found = engine.run({"pixel_values": pixels})["image_features"]
            rows = np.cumsum([len(tiles) for tiles in group])[:-1] * (len(found) // len(pixels))
            features |= dict(zip(map(id, group), np.split(found, rows), strict=True))
        nothing = np.zeros((0, self.hidden_size), self.dtype)
        return np.concatenate([nothing, *(features[id(tiles)] for tiles in images)])

    def prefill(
        self,
        batch: Batch,
        images: Sequence[np.ndarray],
        keeps: Sequence[np.ndarray],
        new_tokens: np.ndarray,
        clock: Clock,
    ) -> Prefilled:
        """Run a batch up to its first logits.

        Args:
            images: pixel values of all images of the batch in order.
            keeps: for each pruning point, int64 [B], visual tokens to keep.
            new_tokens: int64 [B], how many tokens a row may generate; sizes the KV cache.

        Raises:
            TrioError: a selection did not converge.
        """
        with clock.stage("vision"):
            features = self.see(images)
        with clock.stage("embed"):
            embed = {
                "input_ids": batch.input_ids,
                "image_features": features,
                "source_index": batch.source_index,
            }
            hidden = self.engines["embed"].run(embed)["inputs_embeds"]
        del features, embed
        positions, lengths, visual = batch.position_ids, batch.lengths, batch.visual_mask
        origins = [np.arange(length) for length in lengths]
        result = Prefilled(np.empty(0), {}, [])
        for name, engine in self.engines.items():
            if name.startswith("select_"):
                keep = keeps[len(result.kept)]
                if (keep < visual.sum(axis=1)).any():
                    with clock.stage(name):
                        out = _select(engine, name, hidden, positions, lengths, visual, keep)
                    hidden, positions = out["hidden_states_out"], out["position_ids_out"]
                    lengths, visual = out["lengths_out"], out["visual_mask_out"]
                    index = out["keep_index"]
                    origins = [old[index[b, : lengths[b]]] for b, old in enumerate(origins)]
                result.kept.append(origins)
            elif name in self.segments:
                with clock.stage(name):
                    cache = self.cache(name, lengths, int((lengths + new_tokens).max()))
                    outputs = self._segment(name, cache, hidden, positions, lengths)
                result.caches[name] = cache
                hidden = outputs[self.sink(name)]
        result.logits = hidden
        return result

    def cache(self, name: str, lengths: np.ndarray, capacity: int) -> SegmentCache:
        """A segment's cache for rows of int64 [B] `lengths`, with room for `capacity` tokens."""
        holder = self.engines["decode"] if self.separate else self.engines[name]
        return SegmentCache.allocate(
            self.layers[name], lengths, capacity, self.cache_shape, holder.empty, self.sides
        )

    def _segment(
        self,
        name: str,
        cache: SegmentCache,
        hidden: np.ndarray,
        positions: np.ndarray,
        lengths: np.ndarray,
    ) -> dict[str, np.ndarray]:
        engine = self.engines[name]
        feeds: dict[str, Array] = {
            self.source(name): hidden,
            "position_ids": positions,
            "lengths": lengths,
        }
        into: Mapping[str, Array] = {}
        if "past_lengths" in engine.inputs:
            feeds["past_lengths"] = np.zeros_like(lengths)
            if self._shares_cache:
                feeds |= cache.past()
                into = cache.present()
            else:
                shape = self.cache_shape
                none = np.zeros((len(lengths), shape.heads, 0, shape.head_dim), shape.dtype)
                feeds |= {key: none for key in engine.inputs if key.startswith("past.")}
        outputs = engine.run(feeds, into)
        if not into:
            cache.fill(outputs)
        return outputs


def _select(
    engine: Engine,
    name: str,
    hidden: np.ndarray,
    positions: np.ndarray,
    lengths: np.ndarray,
    visual: np.ndarray,
    keep: np.ndarray,
) -> dict[str, np.ndarray]:
    seen = visual.sum(axis=1)
    width = int((lengths - seen + np.minimum(keep, seen)).max())
    feeds = {
        "hidden_states": hidden,
        "position_ids": positions,
        "lengths": lengths,
        "visual_mask": visual,
        "keep": keep,
        "width": np.array([width], np.int64),
    }
    out = engine.run(feeds)
    if not out["converged"].all():
        rows = ", ".join(str(row) for row in np.flatnonzero(~out["converged"]))
        raise TrioError(
            f"{name} found no set of tokens for row {rows}, most likely since the hidden states "
            "overflowed in 16-bit floats: export with --dtype float32, or ask with a budget of 1"
        )
    return out


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
