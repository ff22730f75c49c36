"""`TrioPipeline`: a bundle, ready to answer questions about pictures."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image
from tokenizers import Tokenizer

from trio_deploy.bundle import Bundle, Manifest
from trio_deploy.errors import TrioError
from trio_deploy.models.preprocessing import Preprocessor, ProcessedImage
from trio_deploy.recipe import GRAPH_DTYPES, Target, load_target
from trio_deploy.runtime.decode import Decoder
from trio_deploy.runtime.engine import Engine, open_runtime
from trio_deploy.runtime.kv import SegmentCache
from trio_deploy.runtime.prompt import Message, Prompt, PromptEncoder, collate
from trio_deploy.runtime.sampling import Forced, Sampler, Sampling, StopScanner, TokenStream
from trio_deploy.runtime.stages import Clock, Prefilled, Stages
from trio_deploy.schedule import Schedule, solve

ImageSource = Image.Image | str | os.PathLike[str] | bytes
_Opened = dict[int, tuple[Image.Image, ProcessedImage]]
"""Pictures of a batch by their source's identity: requests about one share it."""


@dataclass(frozen=True)
class Request:
    """One question.

    Attributes:
        prompt: the question, or a whole conversation as messages in Hugging Face's format.
        images: one for each image the prompt names; Pillow image, path or file content.
        max_new_tokens: the answer's length at most; the model's context may end it earlier.
        temperature, top_p, seed: see `Sampling`; temperature 0 is greedy.
        stop: strings that end the answer, themselves left out.
        budget: visual tokens a layer on average, as a share of all (1.0 prunes nothing); None
            takes the bundle's own schedule.
        raw: take a prompt string as it is, without the chat template.
        stream: called with each piece of text as it is ready.
        forced: tokens to answer with instead of choosing any; `Generation.logprobs` says how
            likely they were.
    """

    prompt: str | Sequence[Message]
    images: Sequence[ImageSource] = ()
    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: Sequence[str] = ()
    budget: float | None = None
    raw: bool = False
    stream: Callable[[str], None] | None = None
    forced: Sequence[int] = ()


@dataclass(frozen=True)
class Generation:
    """An answer, and what it took.

    Attributes:
        text: the answer, without special tokens and stop string.
        token_ids: the generated tokens, an end token included.
        finish_reason: `stop` (an end token or stop string) or `length`.
        timings: seconds a stage (`preprocess`, `vision`, `embed`, `prefill_i`, `select_i`,
            `decode`), of the whole batch.
        first_token_s: from the call to the first token.
        tokens_per_s: of the tokens after the first; 0 where there is only one.
        prompt_tokens: length of the prompt, visual tokens included, before pruning.
        visual: int64, places of the visual tokens in the prompt.
        kept: for each pruning point, int64 places of the prompt (text and visual) that went on.
        layer_ranges: (first layer, stop layer, tokens of the prompt there) of each segment.
        kv_bytes: keys and values of this row's tokens at the end.
        kv_bytes_allocated: all buffers of the batch.
        images: the pictures, upright RGB, and `processed`: their tokens and where they lie.
        first_logits: float [V], from which the first token was chosen.
        logprobs: of forced tokens, natural logarithms of their probabilities; `greedy`: whether
            each was the likeliest.
    """

    text: str
    token_ids: list[int]
    finish_reason: str
    timings: dict[str, float]
    first_token_s: float
    tokens_per_s: float
    prompt_tokens: int
    visual: np.ndarray
    kept: list[np.ndarray]
    layer_ranges: list[tuple[int, int, int]]
    kv_bytes: int
    kv_bytes_allocated: int
    images: list[Image.Image] = field(default_factory=list, repr=False)
    processed: list[ProcessedImage] = field(default_factory=list, repr=False)
    first_logits: np.ndarray | None = field(default=None, repr=False)
    logprobs: list[float] = field(default_factory=list)
    greedy: list[bool] = field(default_factory=list)

    @property
    def visual_tokens(self) -> int:
        """Visual tokens of the prompt before pruning."""
        return len(self.visual)

    @property
    def keep_counts(self) -> list[int]:
        """Visual tokens that went on at each pruning point."""
        return [len(tokens) for tokens in self.kept_visual]

    @property
    def kept_visual(self) -> list[np.ndarray]:
        """For each pruning point, numbers 0 … visual_tokens−1 of the visual tokens that went on."""
        return [np.flatnonzero(np.isin(self.visual, kept)) for kept in self.kept]

    def kept_of_image(self, image: int) -> list[np.ndarray]:
        """For each pruning point, which of the image's own visual tokens went on."""
        counts = [len(processed.rows) for processed in self.processed]
        start = sum(counts[:image])
        return [
            tokens[(tokens >= start) & (tokens < start + counts[image])] - start
            for tokens in self.kept_visual
        ]


@dataclass
class _Row:
    """A request on its way."""

    request: Request
    images: list[Image.Image]
    processed: list[ProcessedImage]
    prompt: Prompt
    limit: int
    keeps: tuple[int, ...]
    sampler: Sampler | Forced
    stream: TokenStream
    scanner: StopScanner
    ids: list[int] = field(default_factory=list)
    text: str = ""
    finish: str = ""
    first_s: float = 0.0
    last_s: float = 0.0
    first_logits: np.ndarray | None = None

    def say(self, text: str) -> None:
        if text:
            self.text += text
            if self.request.stream is not None:
                self.request.stream(text)


class TrioPipeline:
    """Answers questions about pictures from an exported bundle.

    >>> pipeline = TrioPipeline.from_bundle("bundle")
    >>> answer = pipeline.generate(["cat.png"], "What is this?", budget=0.222)
    >>> answer.text, answer.keep_counts

    A follow-up question is a new prefill: which tokens a picture keeps depends on the question.

    Attributes:
        precision: the float type that segments' results are rounded to (selections keep the
            bundle's).
    """

    def __init__(
        self,
        bundle: Bundle,
        stages: Stages,
        encoder: PromptEncoder,
        preprocessor: Preprocessor,
        precision: str,
    ) -> None:
        """Use `from_bundle`."""
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
    def from_bundle(
        cls,
        bundle: str | os.PathLike[str] | Bundle,
        runtime: str | None = None,
        *,
        target: str | Target | None = None,
        threads: int | None = None,
        low_memory: bool = False,
        provider: str | None = None,
        precision: str | None = None,
    ) -> TrioPipeline:
        """Load a bundle.

        Args:
            runtime: `onnxruntime` or `openvino`; None takes the target's.
            target: a name or file of engines/; None takes the one that the bundle was made for.
            threads: of one operator; None leaves the choice to the runtime.
            low_memory: keep weights in the page cache alone (ONNX Runtime).
            provider: ONNX Runtime's execution provider, `cpu` or `cuda`; None takes the target's.
            precision: `float32` or `bfloat16`, what OpenVINO computes in; None takes the target's.

        Raises:
            TrioError: the bundle is damaged or incomplete, or the runtime is not installed.
        """
        loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(Path(bundle))
        loaded.require_weights()
        name, device, targeted = _target_options(loaded, target, runtime)
        dtype = loaded.manifest.dtype
        if dtype not in GRAPH_DTYPES.get(name, (dtype,)):
            raise TrioError(
                f"{name} cannot run {dtype} graphs: export with --dtype "
                f"{' or '.join(GRAPH_DTYPES[name])}, or with --target cpu-openvino"
            )
        opened = open_runtime(
            name,
            threads=threads,
            low_memory=low_memory,
            provider=provider or device,
            precision=precision or targeted,
        )
        stages = Stages(loaded, opened)
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
        chosen = dtype if dtype != "float32" else precision or targeted or dtype
        return cls(loaded, stages, encoder, preprocessor, chosen)

    def engine(self, stage: str) -> Engine:
        """The opened graph of a stage, for those who feed it themselves."""
        return self._stages.engines[stage]

    def encode(self, request: Request) -> tuple[Prompt, list[ProcessedImage]]:
        """What the graphs will see of a request: its tokens and its pictures.

        Raises:
            TrioError: as `generate`.
        """
        row = self._row(request, {})
        return row.prompt, row.processed

    def generate(
        self,
        images: ImageSource | Sequence[ImageSource] | None = None,
        prompt: str | Sequence[Message] = "",
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: Sequence[str] = (),
        budget: float | None = None,
        raw: bool = False,
        stream: Callable[[str], None] | None = None,
    ) -> Generation:
        """Answer one question; arguments as in `Request`.

        Raises:
            TrioError: an unreadable image, images that do not match the prompt, a prompt longer
                than the model's context, a budget that the bundle cannot reach.
        """
        if images is None:
            images = []
        elif isinstance(images, str | bytes | os.PathLike | Image.Image):
            images = [images]
        request = Request(
            prompt,
            list(images),
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=seed,
            stop=(stop,) if isinstance(stop, str) else stop,
            budget=budget,
            raw=raw,
            stream=stream,
        )
        return self.generate_batch([request])[0]

    def generate_batch(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer several questions at once, of any lengths, with any number of images each.

        Every row has its own budget, sampling, end and stop strings, and gives the answer it
        would give alone (within the arithmetic's rounding). A picture that several requests pass
        as the same object is prepared, and seen by the vision tower, once.

        Raises:
            TrioError: as `generate`, naming the request if there are several.
        """
        if not requests:
            return []
        start = time.perf_counter()
        clock = Clock()
        with clock.stage("preprocess"):
            opened: _Opened = {}
            rows = [
                self._prepare(request, number, opened) for number, request in _numbered(requests)
            ]
            batch = collate(
                [row.prompt for row in rows],
                [[image.rows for image in row.processed] for row in rows],
                [[self._features(image) for image in row.processed] for row in rows],
            )
        state = self._stages.prefill(
            batch,
            [image.pixel_values for row in rows for image in row.processed],
            [np.array(keeps, np.int64) for keeps in zip(*(row.keeps for row in rows), strict=True)],
            np.array([row.limit for row in rows], np.int64),
            clock,
        )
        prompt_kv = {name: cache.lengths.copy() for name, cache in state.caches.items()}
        with clock.stage("decode"):
            self._decode(rows, state, batch.lengths, start)
        return [
            self._report(number, row, state, prompt_kv, clock) for number, row in enumerate(rows)
        ]

    def _prepare(self, request: Request, number: str, opened: _Opened) -> _Row:
        try:
            return self._row(request, opened)
        except TrioError as error:
            raise TrioError(f"{number}{error}") from error

    def _row(self, request: Request, opened: _Opened) -> _Row:
        if request.max_new_tokens < 1:
            raise TrioError(f"max_new_tokens must be 1 or more, got {request.max_new_tokens}")
        text = self._encoder.text(request.prompt, len(request.images), raw=request.raw)
        for source in request.images:
            if id(source) not in opened:
                image = self._preprocessor.open_image(source)
                opened[id(source)] = image, self._preprocessor(image)
        images = [opened[id(source)][0] for source in request.images]
        processed = [opened[id(source)][1] for source in request.images]
        rendered = self._encoder.has_template and not request.raw
        prompt = self._encoder.encode(
            text, [len(image.rows) for image in processed], rendered=rendered
        )
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
        return _Row(
            request=request,
            images=images,
            processed=processed,
            prompt=prompt,
            limit=len(request.forced) or min(request.max_new_tokens, context - prompt.length),
            keeps=self._schedule(request.budget).resolve(prompt.visual_tokens),
            sampler=(
                Forced(request.forced)
                if request.forced
                else Sampler(Sampling(request.temperature, request.top_p, request.seed))
            ),
            stream=TokenStream(self._encoder.decode),
            scanner=StopScanner(request.stop),
        )

    def _schedule(self, budget: float | None) -> Schedule:
        schedule = self.bundle.schedule
        if budget is None:
            return schedule
        if not schedule.layers:
            if budget == 1.0:
                return schedule
            raise TrioError(
                "this bundle was exported without pruning points, so it has no other budget than "
                "1.0: export it with --budget"
            )
        return solve(budget, self._text.num_layers, layers=schedule.layers)

    def _features(self, image: ProcessedImage) -> int:
        return len(image.pixel_values) * self.bundle.config.vision.rows_per_tile

    def _decode(
        self, rows: list[_Row], state: Prefilled, lengths: np.ndarray, start: float
    ) -> None:
        tokens = np.full(len(rows), self._pad, np.int64)
        active = np.ones(len(rows), np.bool_)
        decoder: Decoder | None = None
        logits = state.logits
        while True:
            for number in np.flatnonzero(active):
                row = rows[number]
                tokens[number] = self._take(row, logits[number], start)
                if row.finish:
                    active[number] = False
                    tokens[number] = self._pad
            if not active.any():
                return
            if decoder is None:
                positions = self.bundle.manifest.positions
                decoder = Decoder(self._stages, state.caches, lengths.copy(), positions)
            logits = decoder.step(tokens, active)

    def _take(self, row: _Row, logits: np.ndarray, start: float) -> int:
        """Pick a row's next token and say what it completes."""
        if not row.ids:
            row.first_logits = logits.copy()
        token = row.sampler(logits)
        row.ids.append(token)
        row.last_s = time.perf_counter() - start
        row.first_s = row.first_s or row.last_s
        if token in self._ends:
            row.finish = "stop"
        else:
            row.say(row.scanner.push(row.stream.push(token)))
            if row.scanner.stopped:
                row.finish = "stop"
            elif len(row.ids) >= row.limit:
                row.finish = "length"
        if row.finish:
            row.say(row.scanner.push(row.stream.flush()))
            row.say(row.scanner.flush())
            if row.scanner.stopped:
                row.finish = "stop"
        return token

    def _report(
        self,
        number: int,
        row: _Row,
        state: Prefilled,
        prompt_kv: dict[str, np.ndarray],
        clock: Clock,
    ) -> Generation:
        caches: list[SegmentCache] = list(state.caches.values())
        later, seconds = len(row.ids) - 1, row.last_s - row.first_s
        return Generation(
            text=row.text,
            token_ids=row.ids,
            finish_reason=row.finish,
            timings=dict(clock.seconds),
            first_token_s=row.first_s,
            tokens_per_s=later / seconds if later and seconds > 0 else 0.0,
            prompt_tokens=row.prompt.length,
            visual=np.flatnonzero(row.prompt.visual),
            kept=[rows[number] for rows in state.kept],
            layer_ranges=[
                (cache.layers[0], cache.layers[-1] + 1, int(prompt_kv[name][number]))
                for name, cache in state.caches.items()
            ],
            kv_bytes=sum(cache.used(number) for cache in caches),
            kv_bytes_allocated=sum(cache.allocated for cache in caches),
            images=row.images,
            processed=row.processed,
            first_logits=row.first_logits,
            logprobs=row.sampler.logprobs if isinstance(row.sampler, Forced) else [],
            greedy=row.sampler.greedy if isinstance(row.sampler, Forced) else [],
        )


def _target_options(
    bundle: Bundle, target: str | Target | None, runtime: str | None
) -> tuple[str, str | None, str | None]:
    """Runtime, provider and precision: the caller's, else the target's, else the bundle's.

    Providers are ONNX Runtime's, a precision of its own OpenVINO's; None where the runtime is
    another than the target's.
    """
    # What the manifest says, since a target file of the exporting machine's may not be here.
    chosen: Manifest | Target = bundle.manifest
    if target is not None:
        chosen = target if isinstance(target, Target) else load_target(target)
    name = runtime or chosen.runtime
    provider = chosen.provider if name == chosen.runtime == "onnxruntime" else None
    precision = chosen.precision if name == chosen.runtime == "openvino" else None
    return name, provider, precision


def _numbered(requests: Sequence[Request]) -> list[tuple[str, Request]]:
    """Requests with the prefix that names them in an error."""
    if len(requests) == 1:
        return [("", requests[0])]
    return [(f"request {number}: ", request) for number, request in enumerate(requests)]
