"""Prepare requests: open their images, tokenise their prompts, choose their schedules."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
from PIL import Image

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.checkpoint.tokenizer import MAX_TOKENIZER, load_tokenizer
from trio_deploy.config.sampling import SamplingOptions
from trio_deploy.errors import PromptTooLong, TrioError
from trio_deploy.families.base import Layout, grids_of
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import get_family
from trio_deploy.files import read_text
from trio_deploy.pipeline.features import FeatureCache, KeyedLayout, key_of
from trio_deploy.pipeline.fetch import check_scheme, fetch_pictures, is_address
from trio_deploy.pipeline.grammar import Grammar, GrammarCompiler
from trio_deploy.pipeline.memory import memory_for
from trio_deploy.pipeline.prompt import Prompt, PromptEncoder
from trio_deploy.pipeline.request import ImageSource, Request
from trio_deploy.pipeline.sampling import Detokenizer, Forced, Sampler, StopScanner
from trio_deploy.pipeline.sequence import SequenceState
from trio_deploy.schedule.schedule import Schedule

_T = TypeVar("_T")
_Opened = dict[tuple[int, bool], tuple[Image.Image | None, Layout]]
"""Images of a batch by the identity of their source and `Request.bgr`, so that requests can share
them."""


@dataclass(frozen=True)
class _Checked:
    """A request that was checked as far as it can be without its pictures.

    Attributes:
        text: the whole prompt, one placeholder per image; `rendered`: by a chat template.
        grammar: of the answer's form, at its beginning.
    """

    request: Request
    sampling: SamplingOptions
    schedule: Schedule
    text: str
    rendered: bool
    grammar: Grammar | None


@contextmanager
def _naming(number: int, requests: Sequence[Request]) -> Iterator[None]:
    """Name the request in an error, if there are several."""
    try:
        yield
    except TrioError as error:
        if len(requests) == 1:
            raise
        raise TrioError(f"request {number}: {error}") from error


class RequestPreparer:
    """Prepares requests for one bundle; can be called from any thread.

    Attributes:
        encoder: text to tokens and back.
        features: what the vision tower made of pictures before; None: nothing is kept.
    """

    def __init__(self, bundle: Bundle) -> None:
        """Load tokenizer, chat template and preprocessing settings.

        Raises:
            TrioError: one of them does not load.
        """
        tokens = {key: token for key, token in bundle.tokens.items() if isinstance(token, str)}
        tokenizer = load_tokenizer(bundle.tokenizer_path, "export the bundle again")
        self.encoder = PromptEncoder(
            tokenizer,
            bundle.config.image_token_id,
            tokens,
            bundle.chat_template,
            bundle.config.text.max_positions,
            get_family(bundle.config.family).hub.picture,
        )
        self.features: FeatureCache | None = None
        self._bundle = bundle
        self._preprocessor = Preprocessor.from_json(bundle.preprocessor, bundle.config)
        self._end_tokens = frozenset(bundle.manifest.generation.eos_token_ids)
        self._grammars = GrammarCompiler(
            lambda: read_text(
                bundle.tokenizer_path, "export the bundle again", limit=MAX_TOKENIZER
            ),
            bundle.config.text.vocab_size,
            sorted(self._end_tokens),
        )
        self._sampling = SamplingOptions.from_json(bundle.manifest.generation.sampling)

    def prepare(
        self, request: Request, before_image: Callable[[], object] | None = None
    ) -> SequenceState:
        """Prepare one request.

        Args:
            before_image: called before each image; an exception from it ends the preparation.

        Raises:
            TrioError: as `Pipeline.generate`; a picture is an address.
        """
        started = time.perf_counter()
        checked = self._check(request)
        for source in request.image_list:
            if is_address(source):
                check_scheme(source)
                raise TrioError(
                    f"the picture {source} is an address, which `Pipeline.generate` and `trio run` "
                    "fetch and nothing else does: pass the content of the file"
                )
        return self._prepare(checked, request.image_list, {}, started, before_image)

    def prepare_batch(self, requests: Sequence[Request]) -> list[SequenceState]:
        """Prepare requests that are answered together, each distinct image once.

        Pictures at addresses are fetched after all that can be said without them was checked, of
        every request, and before any is opened.

        Raises:
            TrioError: as `Pipeline.generate`, naming the request if there are several.
        """
        started = time.perf_counter()
        files: dict[str, bytes] = {}
        opened: _Opened = {}

        def each(step: Callable[[int], _T]) -> list[_T]:
            done = []
            for number in range(len(requests)):
                with _naming(number, requests):
                    done.append(step(number))
            return done

        checked = each(lambda number: self._check(requests[number]))
        sources = each(lambda number: fetch_pictures(requests[number], files))
        return each(lambda number: self._prepare(checked[number], sources[number], opened, started))

    def _check(self, request: Request) -> _Checked:
        """Check what can be said without opening, fetching or tokenising anything large."""
        if not isinstance(request, Request):
            raise TrioError(f"a request must be a Request, got {type(request).__name__}")
        sampling = self._sampling_options(request)
        schedule = self._schedule(request)
        text = self.encoder.text(request.prompt, len(request.image_list), raw=request.raw)
        rendered = self.encoder.has_template and not request.raw
        form = request.structure
        grammar = None if form is None else self._grammars.grammar(form)
        checked = _Checked(request, sampling, schedule, text, rendered, grammar)
        self._check_fits(checked, request.image_list)
        return checked

    def _check_fits(self, checked: _Checked, sources: Sequence[ImageSource]) -> None:
        # Of an address nothing is known yet, but any picture brings a token.
        visual = sum(
            1 if is_address(source) else self._preprocessor.least_tokens(source)
            for source in sources
        )
        self.encoder.check_fits(checked.text, visual, rendered=checked.rendered)

    def _prepare(
        self,
        checked: _Checked,
        sources: Sequence[ImageSource],
        opened: _Opened,
        started: float,
        before_image: Callable[[], object] | None = None,
    ) -> SequenceState:
        """Args:
        sources: the request's pictures, with files in place of addresses.
        """
        request, sampling, schedule = checked.request, checked.sampling, checked.schedule
        named = request.image_list
        if any(map(is_address, named)):
            self._check_fits(checked, sources)
        images: list[Image.Image | None] = []
        layouts: list[Layout] = []
        for source, asked in zip(sources, named, strict=True):
            if before_image is not None:
                before_image()
            if (id(source), request.bgr) not in opened:
                name = asked if is_address(asked) else None
                opened[id(source), request.bgr] = self._open(source, request, name)
            image, layout = opened[id(source), request.bgr]
            images.append(image)
            layouts.append(layout)
        config = self._bundle.config
        prompt = self.encoder.encode(
            checked.text,
            [layout.text for layout in layouts],
            rendered=checked.rendered,
            grids=grids_of(layouts, config),
        )
        context = config.text.max_positions
        _check_context(prompt, len(request.forced), context)
        return SequenceState(
            request=request,
            images=[image for image in images if image is not None] if all(images) else [],
            processed=layouts,
            prompt=prompt,
            max_tokens=len(request.forced) or min(request.max_new_tokens, context - prompt.length),
            schedule=schedule,
            keep_counts=schedule.resolve(prompt.visual_tokens),
            sampling=sampling,
            sampler=(
                Forced(request.forced)
                if request.forced
                else Sampler(sampling, prompt.ids, self._end_tokens, checked.grammar)
            ),
            detokenizer=Detokenizer(self.encoder.decode),
            stop_scanner=StopScanner(request.stop_strings),
            end_tokens=frozenset() if request.ignore_eos else self._end_tokens,
            started=started,
            warnings=[
                *self.encoder.warnings(
                    request.prompt, prompt, images=len(sources), raw=request.raw
                ),
                *filter(None, [schedule.rounded_up(prompt.visual_tokens)]),
            ],
        )

    def _open(
        self, source: ImageSource, request: Request, name: str | None
    ) -> tuple[Image.Image | None, Layout]:
        """A picture and its layout; no picture where the cache of features knows the file.

        Args:
            name: what an error calls the picture.
        """
        key = b""
        if self.features is not None and request.cache_images and isinstance(source, bytes):
            key = key_of(source)
            if (known := self.features.find(key)) is not None:
                return None, known
        if request.bgr and isinstance(source, np.ndarray):
            source = source[..., ::-1]
        with memory_for("preprocess"):
            image = self._preprocessor.open_image(source, name)
            layout = self._preprocessor(image)
        return image, KeyedLayout.of(layout, key) if key else layout

    def _sampling_options(self, request: Request) -> SamplingOptions:
        """The request's options over the bundle's, texts of bad words as token ids."""
        request.check(self._bundle.config.text.vocab_size)
        if (request.min_new_tokens or 0) > request.max_new_tokens:
            raise TrioError(
                f"min_new_tokens is {request.min_new_tokens}, but max_new_tokens is "
                f"{request.max_new_tokens}"
            )
        options = request.over(self._sampling if request.bundle_sampling else SamplingOptions())
        if options.bad_words is None:
            return options
        words = [tuple(ids) for ids in options.bad_words_ids or ()]
        for text in options.bad_words:
            # Within an answer a word mostly follows a space, which may make it another token.
            words += (tuple(self.encoder.answer(each)) for each in (text, " " + text.lstrip()))
        distinct = dict.fromkeys(ids for ids in words if ids)  # white space may be no token at all
        return replace(options, bad_words=None, bad_words_ids=tuple(distinct))

    def _schedule(self, request: Request) -> Schedule:
        schedule, budget = self._bundle.schedule, request.budget
        if request.keep:
            if budget is not None or len(request.keep) != len(schedule.points):
                raise TrioError(
                    "a request may say what to keep at each of the "
                    f"{len(schedule.points)} pruning points of the bundle, or a budget"
                )
            schedule = schedule.with_keeps(request.keep)
            schedule.validate(self._bundle.config.text.num_layers)
            return schedule
        if budget is None:
            return schedule
        return self._bundle.schedule_at(budget)


def _check_context(prompt: Prompt, forced: int, context: int) -> None:
    if prompt.length >= context:
        raise PromptTooLong(
            f"the prompt has {prompt.length} tokens ({prompt.visual_tokens} of them visual), "
            f"but the model's context is {context}: shorten the text or pass fewer images"
        )
    if prompt.length + forced > context:
        raise TrioError(
            f"{forced} forced tokens after a prompt of {prompt.length} exceed the model's context "
            f"of {context}: force fewer"
        )
