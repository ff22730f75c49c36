"""`Pipeline`: a bundle, ready to answer questions about pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.families.base import Layout
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.pipeline.batch import Running
from trio_deploy.pipeline.prefill import Clock, Prefilled, Stages
from trio_deploy.pipeline.prompt import Prompt, PromptEncoder, collate
from trio_deploy.pipeline.request import Generation, Request
from trio_deploy.pipeline.sampling import Forced, Sampler, Sampling, StopScanner, TokenStream
from trio_deploy.pipeline.sequence import Row
from trio_deploy.pipeline.stream import TextStream
from trio_deploy.runtimes.base import Engine
from trio_deploy.runtimes.registry import complete_options, open_runtime
from trio_deploy.schedule.methods import SEEDS
from trio_deploy.schedule.schedule import Schedule

_Opened = dict[int, tuple[Image.Image, Layout]]
"""Pictures of a batch by their source's identity: requests about one share it."""


class Pipeline:
    """Answers questions about pictures from an exported bundle.

    >>> pipeline = Pipeline.open("bundle")
    >>> answer = pipeline.generate(Request("What is this?", "cat.png", budget=0.222))
    >>> answer.text, answer.keep_counts

    A follow-up question is a new prefill: which tokens a picture keeps depends on the question.

    Attributes:
        precision: the float type that segments' results are rounded to, and what selections
            multiply with weights; the rest of them keeps the bundle's.
    """

    def __init__(
        self,
        bundle: Bundle,
        stages: Stages,
        encoder: PromptEncoder,
        preprocessor: Preprocessor,
        precision: str,
    ) -> None:
        """Use `open`."""
        self.bundle = bundle
        self.precision = precision
        self._stages = stages
        self._encoder = encoder
        self._preprocessor = preprocessor
        self._text = bundle.config.text
        generation = bundle.manifest.generation
        self._ends = frozenset(generation.eos_token_ids)
        self._pad = generation.pad_token_id or 0

    @classmethod
    def open(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        options: RuntimeOptions | None = None,
        **keywords: Any,
    ) -> Pipeline:
        """Load a bundle.

        Args:
            options: how to run it.
            keywords: fields of `RuntimeOptions`, which replace those of `options`.

        Raises:
            TrioError: the bundle is damaged or incomplete, or the runtime is not installed.
        """
        options = replace(options or RuntimeOptions(), **keywords)
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(Path(bundle))
        loaded.require_weights()
        options = complete_options(loaded, options)
        dtype = loaded.manifest.dtype
        stages = Stages(loaded, open_runtime(options, loaded))
        tokens = {key: token for key, token in loaded.tokens.items() if isinstance(token, str)}
        try:
            tokenizer = Tokenizer.from_file(str(loaded.tokenizer_path))
        except Exception as error:  # tokenizers raises a bare Exception
            raise TrioError(f"tokenizer.json of the bundle does not load: {error}") from error
        encoder = PromptEncoder(
            tokenizer, loaded.config.image_token_id, tokens, loaded.chat_template
        )
        preprocessor = Preprocessor.from_json(loaded.preprocessor, loaded.config)
        # Hidden states and cache of a 16-bit bundle are rounded whatever the products are done in.
        chosen = dtype if dtype != "float32" else options.precision or dtype
        return cls(loaded, stages, encoder, preprocessor, chosen)

    def engine(self, stage: str) -> Engine:
        """The opened graph of a stage, for those who feed it themselves."""
        return self._stages.engines[stage]

    def encode(self, request: Request) -> tuple[Prompt, list[Layout]]:
        """What the graphs will see of a request: its tokens and its pictures.

        Raises:
            TrioError: as `generate`.
        """
        row = self.prepare(request)
        return row.prompt, row.processed

    def tokens(self, text: str) -> list[int]:
        """Token ids of an answer's text, as `Request.forced` takes them."""
        return self._encoder.answer(text)

    def unknown_words(self, text: str) -> list[str]:
        """What of a text the model's vocabulary lacks: the model sees that something is there."""
        return self._encoder.unknown(text)

    @property
    def vocabulary(self) -> int:
        """Tokens of the tokenizer."""
        return self._encoder.vocabulary

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
        rows = self._prepare_batch(requests, clock)
        for _ in self._steps(rows, clock):
            pass
        for row in rows:
            row.timings = clock.seconds
        return [row.report() for row in rows]

    def stream(self, request: Request) -> TextStream:
        """Answer one request piece by piece; what `generate` raises comes out of the iteration."""
        return TextStream(self._pieces(request))

    def _pieces(self, request: Request) -> Generator[str, None, Generation]:
        clock = Clock()
        (row,) = rows = self._prepare_batch([request], clock)
        with closing(self._steps(rows, clock)) as steps:
            for (piece,) in steps:
                if piece:
                    yield piece
        row.timings = clock.seconds
        return row.report()

    def _prepare_batch(self, requests: Sequence[Request], clock: Clock) -> list[Row]:
        opened: _Opened = {}
        start = time.perf_counter()
        with clock.stage("preprocess"):
            return [
                self._numbered(request, number, opened, start)
                for number, request in _numbers(requests)
            ]

    def _steps(self, rows: Sequence[Row], clock: Clock) -> Generator[list[str], None, None]:
        """Prefill and decode until every row has finished; the text each step adds to its rows.

        Leaves no cache behind when it ends or is closed.
        """
        prefilled = self.prefill(rows, clock)
        running = self.running()
        try:
            with clock.stage("decode"):
                yield [row.take(of) for row, of in zip(rows, prefilled.logits, strict=True)]
                running.join(rows, prefilled)
                del prefilled  # the batch has its caches now
                while running.rows:
                    yield [row.take(logits) for row, logits in running.step()]
                    running.release()
        finally:
            running.reset()

    def prepare(self, request: Request, before_image: Callable[[], object] | None = None) -> Row:
        """Open a request's pictures and tokenise its prompt; may be called from any thread.

        Args:
            before_image: called before each picture; what it raises ends the preparing.

        Raises:
            TrioError: as `generate`.
        """
        return self._row(request, {}, time.perf_counter(), before_image)

    def prefill(self, rows: Sequence[Row], clock: Clock) -> Prefilled:
        """Run prepared rows up to their first logits, filling in what they kept.

        Raises:
            TrioError: a selection did not converge.
        """
        with clock.stage("preprocess"):
            batch = collate(
                [row.prompt for row in rows],
                [row.processed for row in rows],
            )
        prefilled = self._stages.prefill(
            batch,
            [image for row in rows for image in row.processed],
            [np.array(keeps, np.int64) for keeps in zip(*(row.keeps for row in rows), strict=True)],
            np.array([row.limit for row in rows], np.int64),
            clock,
            np.array([(row.request.seed or 0) % SEEDS for row in rows], np.int64),
        )
        for number, row in enumerate(rows):
            row.kept = [kept[number] for kept in prefilled.kept]
            row.layer_ranges = [
                (cache.layers[0], cache.layers[-1] + 1, int(cache.lengths[number]))
                for cache in prefilled.caches.values()
            ]
        return prefilled

    @property
    def concurrent(self) -> bool:
        """Whether several threads may prefill at once, and beside a running batch's steps."""
        return self._stages.concurrent

    @property
    def max_rows(self) -> int | None:
        """Requests that a batch may have, None where any number will do."""
        return self._stages.max_rows

    def running(self, most: int | None = None) -> Running:
        """An empty batch for rows of this pipeline, of which there will be `most` at once."""
        return Running(self._stages, self.bundle.manifest.positions, self._pad, most)

    def _numbered(self, request: Request, number: str, opened: _Opened, start: float) -> Row:
        try:
            return self._row(request, opened, start)
        except TrioError as error:
            raise TrioError(f"{number}{error}") from error

    def _row(
        self,
        request: Request,
        opened: _Opened,
        start: float,
        before_image: Callable[[], object] | None = None,
    ) -> Row:
        if request.max_new_tokens < 1:
            raise TrioError(f"max_new_tokens must be 1 or more, got {request.max_new_tokens}")
        sources = request.image_list
        text = self._encoder.text(request.prompt, len(sources), raw=request.raw)
        for source in sources:
            if before_image is not None:
                before_image()
            if id(source) not in opened:
                image = self._preprocessor.open_image(source)
                opened[id(source)] = image, self._preprocessor(image)
        images = [opened[id(source)][0] for source in sources]
        processed = [opened[id(source)][1] for source in sources]
        rendered = self._encoder.has_template and not request.raw
        prompt = self._encoder.encode(text, [image.text for image in processed], rendered=rendered)
        context = self._text.max_positions
        if prompt.length + len(request.forced) > context and prompt.length < context:
            raise TrioError(
                f"{len(request.forced)} forced tokens after a prompt of {prompt.length} exceed the "
                f"model's context of {context}: force fewer"
            )
        if prompt.length >= context:
            raise TrioError(
                f"the prompt has {prompt.length} tokens ({prompt.visual_tokens} of them visual), "
                f"but the model's context is {context}: shorten the text or pass fewer images"
            )
        schedule = self._schedule(request)
        return Row(
            request=request,
            images=images,
            processed=processed,
            prompt=prompt,
            limit=len(request.forced) or min(request.max_new_tokens, context - prompt.length),
            schedule=schedule,
            keeps=schedule.resolve(prompt.visual_tokens),
            sampler=(
                Forced(request.forced)
                if request.forced
                else Sampler(Sampling(request.temperature, request.top_p, request.seed))
            ),
            stream=TokenStream(self._encoder.decode),
            scanner=StopScanner(request.stop_strings),
            ends=self._ends,
            start=start,
        )

    def _schedule(self, request: Request) -> Schedule:
        schedule, budget = self.bundle.schedule, request.budget
        if request.keep:
            if budget is not None or len(request.keep) != len(schedule.points):
                raise TrioError(
                    "a request may say what to keep at each of the "
                    f"{len(schedule.points)} pruning points of the bundle, or a budget"
                )
            schedule = schedule.with_keeps(request.keep)
            schedule.validate(self._text.num_layers)
            return schedule
        if budget is None:
            return schedule
        if not schedule.layers:
            if budget == 1.0:
                return schedule
            raise TrioError(
                "this bundle was exported without pruning points, so it has no other budget than "
                "1.0: export it with --budget"
            )
        return self.bundle.schedule_at(budget)


def _numbers(requests: Sequence[Request]) -> list[tuple[str, Request]]:
    """Requests with the prefix that names them in an error."""
    if len(requests) == 1:
        return [("", requests[0])]
    return [(f"request {number}: ", request) for number, request in enumerate(requests)]
