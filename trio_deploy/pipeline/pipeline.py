"""`Pipeline`: an opened bundle that answers requests."""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from typing import Any

import numpy as np

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.export.cache import find_bundle
from trio_deploy.pipeline.batch import DecodeBatch
from trio_deploy.pipeline.features import CacheCounts, FeatureCache
from trio_deploy.pipeline.memory import memory_for
from trio_deploy.pipeline.pieces import Pace, Turn, at_once
from trio_deploy.pipeline.prefill import Clock, Prefilled, Stages
from trio_deploy.pipeline.prepare import RequestPreparer
from trio_deploy.pipeline.prompt import PromptEncoder, collate
from trio_deploy.pipeline.ran_as import RanAs
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.pipeline.sequence import SequenceState
from trio_deploy.pipeline.stream import TextStream
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.registry import complete_options, open_runtime, runtime_spec
from trio_deploy.schedule.methods import SEEDS


class Pipeline:
    """Answers questions about images from an exported bundle.

    >>> pipeline = Pipeline.open("bundle")
    >>> answer = pipeline.generate(Request("What is this?", "cat.png", budget=0.222))
    >>> answer.text, answer.keep_counts

    A follow-up question is a new prefill: which visual tokens are kept depends on the question.

    Attributes:
        bundle: what was opened.
        precision: float type that the segments' results are rounded to, and in which selections
            multiply with weights; the rest of a selection is computed in the bundle's type.
        ran_as: runtime, target, float types and device, read back from the opened engines.
        pace: how long pieces of prefills take here, as batchers learn it.
    """

    def __init__(
        self,
        bundle: Bundle,
        stages: Stages,
        preparer: RequestPreparer,
        precision: str,
        ran_as: RanAs,
    ) -> None:
        """Use `open`."""
        self.bundle = bundle
        self.precision = precision
        self.ran_as = ran_as
        self.pace = Pace()
        self._stages = stages
        self._preparer = preparer

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        options: RuntimeOptions | None = None,
        **keywords: Any,
    ) -> Pipeline:
        """Load a bundle.

        Args:
            bundle: a bundle or its folder; a recipe's name or file, a checkpoint's folder or a hub
                id is exported once into the cache, for the target or runtime of the options, which
                needs the extra [export].
            options: how to run it.
            keywords: fields of `RuntimeOptions`, which replace those of `options`.

        Raises:
            TrioError: the bundle is damaged or incomplete, or the runtime is not installed.
        """
        with memory_for("loading the bundle"):
            return cls._open(bundle, options, keywords)

    @classmethod
    def _open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        options: RuntimeOptions | None,
        keywords: Mapping[str, Any],
    ) -> Pipeline:
        options = replace(options or RuntimeOptions(), **keywords)
        loaded = (
            bundle
            if isinstance(bundle, Bundle)
            else Bundle.load(find_bundle(bundle, options, to_run=True))
        )
        loaded.require_weights()
        options = complete_options(loaded, options)
        dialect, made_for = loaded.manifest.dialect, runtime_spec(loaded.manifest.runtime)
        block = runtime_spec(str(options.runtime)).query_block(dialect)
        stages = Stages(
            loaded,
            open_runtime(options, loaded),
            holds_scores=block is not None and made_for.query_block(dialect) is None,
        )
        # Hidden states and cache of a 16-bit bundle are rounded whatever the products are done in.
        dtype = loaded.manifest.dtype
        precision = dtype if dtype != "float32" else options.precision or dtype
        ran_as = RanAs.of(loaded, options, stages.engines)
        return cls(loaded, stages, RequestPreparer(loaded), precision, ran_as)

    def generate(self, request: Request) -> Generation:
        """Answer one request.

        Raises:
            TrioError: an unreadable image, images that do not match the prompt, a prompt longer
                than the model's context, a budget that the bundle cannot reach.
        """
        return self.generate_batch([request])[0]

    def generate_batch(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer several requests at once, of any lengths, with any number of images each.

        Every request has its own budget, sampling, end and stop strings, and gets the answer it
        would get alone (within the arithmetic's rounding). An image that several requests pass as
        the same object is prepared, and encoded by the vision tower, once.

        Raises:
            TrioError: as `generate`, naming the request if there are several.
        """
        if not requests:
            return []
        clock = Clock()
        sequences = self._prepare_batch(requests, clock)
        for _ in self._decode(sequences, clock):
            pass
        return [_to_generation(sequence, clock) for sequence in sequences]

    def stream(self, request: Request) -> TextStream:
        """Answer one request piece by piece; what `generate` raises comes out of the iteration."""
        return TextStream(self._pieces(request))

    def _pieces(self, request: Request) -> Generator[str, None, Generation]:
        clock = Clock()
        sequences = self._prepare_batch([request], clock)
        with closing(self._decode(sequences, clock)) as steps:
            for (piece,) in steps:
                if piece:
                    yield piece
        return _to_generation(sequences[0], clock)

    def _prepare_batch(self, requests: Sequence[Request], clock: Clock) -> list[SequenceState]:
        with clock.stage("preprocess"):
            return self._preparer.prepare_batch(requests)

    def _decode(
        self, sequences: Sequence[SequenceState], clock: Clock
    ) -> Generator[list[str], None, None]:
        """Prefill and decode until all sequences have finished; yields the text of each step.

        The caches are released when it ends or is closed.
        """
        prefilled = self.prefill(sequences, clock)
        batch = self.decode_batch()
        try:
            with clock.stage("decode"):
                yield [
                    sequence.advance(logits)
                    for sequence, logits in zip(sequences, prefilled.logits, strict=True)
                ]
                batch.join(sequences, prefilled)
                del prefilled  # its caches are the batch's now
                while batch.sequences:
                    yield [sequence.advance(logits) for sequence, logits in batch.step()]
                    batch.release()
        finally:
            batch.reset()

    def prepare(
        self, request: Request, before_image: Callable[[], object] | None = None
    ) -> SequenceState:
        """Open a request's images and tokenise its prompt; can be called from any thread.

        Args:
            before_image: called before each image; an exception from it ends the preparation.

        Raises:
            TrioError: as `generate`.
        """
        return self._preparer.prepare(request, before_image)

    def prefill(
        self, sequences: Sequence[SequenceState], clock: Clock, turn: Turn = at_once
    ) -> Prefilled:
        """Run prepared sequences up to their first logits, and record what each one kept.

        Args:
            turn: called before each stage, and between the pieces of long ones.

        Raises:
            TrioError: a selection did not converge.
        """
        with clock.stage("preprocess"):
            batch = collate(
                [each.prompt for each in sequences], [each.processed for each in sequences]
            )
        prefilled = self._stages.prefill(
            batch,
            [image for each in sequences for image in each.processed],
            [
                np.array(counts, np.int64)
                for counts in zip(*(each.keep_counts for each in sequences), strict=True)
            ],
            np.array([each.max_tokens for each in sequences], np.int64),
            clock,
            np.array([(each.request.seed or 0) % SEEDS for each in sequences], np.int64),
            turn,
        )
        for row, sequence in enumerate(sequences):
            sequence.kept = [kept[row] for kept in prefilled.kept]
            sequence.warnings += prefilled.warnings[row]
            sequence.layer_ranges = [
                (cache.layers[0], cache.layers[-1] + 1, int(cache.lengths[row]))
                for cache in prefilled.caches.values()
            ]
        return prefilled

    def decode_batch(self, max_rows: int | None = None) -> DecodeBatch:
        """An empty batch for sequences of this pipeline, at most `max_rows` at a time."""
        manifest = self.bundle.manifest
        pad_token = manifest.generation.pad_token_id or 0
        return DecodeBatch(self._stages, manifest.positions, pad_token, max_rows)

    def cache_features(self, limit: int) -> None:
        """Keep what the vision tower makes of pictures, for other questions about them.

        Only pictures that come as the bytes of a file are kept, and found again by all of them.

        Args:
            limit: bytes of what is kept, beside everything else; 0 keeps nothing.
        """
        cache = FeatureCache(limit) if limit else None
        self._stages.features = self._preparer.features = cache

    @property
    def feature_counts(self) -> CacheCounts:
        """How often pictures were found in the cache of features, and its bytes."""
        cache = self._stages.features
        return CacheCounts() if cache is None else cache.counts

    def engine(self, stage: str) -> Engine:
        """The opened graph of a stage, to be fed directly."""
        return self._stages.engines[stage]

    @property
    def concurrent(self) -> bool:
        """Whether several threads may prefill at once, and while a batch is decoded."""
        return self._stages.concurrent

    @property
    def max_rows(self) -> int | None:
        """Most requests per batch; None: any number."""
        return self._stages.max_rows

    @property
    def encoder(self) -> PromptEncoder:
        """Text to tokens and back."""
        return self._preparer.encoder

    def tokenize(self, text: str) -> list[int]:
        """Token ids of an answer's text, as `Request.forced` takes them."""
        return self._preparer.encoder.answer(text)


def _to_generation(sequence: SequenceState, clock: Clock) -> Generation:
    sequence.timings = clock.seconds
    return sequence.to_generation()
