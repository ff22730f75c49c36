"""Example questions on the page: answers with and without pruning, and what was kept."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.draw import kept_panels, pruned_before
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.pipeline.request import Generation, Request

#: Shown if no picture is given: scenes of the test split, (seed, family, questions asked).
SCENES = ((2_000_039, "busy", (1, 7)), (2_000_011, "busy", (4,)), (2_000_007, "smooth", (9,)))
_NEW_TOKENS = 48  # a page has no room for long answers


@dataclass(frozen=True)
class Asked:
    """A question on the page, with its pictures; `truth`: the right answer, if it is known."""

    prompt: str
    images: tuple[Image.Image | Path, ...]
    truth: str | None = None


def default_questions() -> list[Asked]:
    """Questions about generated scenes, two of them about one picture."""
    asked = []
    for seed, family, numbers in SCENES:
        scene = scenes.generate(seed, family)  # type: ignore[arg-type]
        for number in numbers:
            question = scene.questions[number]
            asked.append(Asked(question.text, (scene.image,), question.answer))
    return asked


def asked_about(images: Sequence[Path], prompts: Sequence[str]) -> list[Asked]:
    """A question per picture, or one of either for all of the others.

    Raises:
        TrioError: pictures without questions, questions without pictures, or numbers that do not
            match.
    """
    if not images and not prompts:
        return []
    counts = {len(images), len(prompts)}
    if 0 in counts or (len(counts) > 1 and 1 not in counts):
        raise TrioError(
            f"{len(images)} --image and {len(prompts)} --prompt do not go together: pass one "
            "question for each picture, or one of either"
        )
    count = max(counts)
    return [
        Asked(prompt, (image,))
        for image, prompt in zip(
            list(images) * (count // len(images)),
            list(prompts) * (count // len(prompts)),
            strict=True,
        )
    ]


def answers(pipeline: Pipeline, asked: Sequence[Asked]) -> dict[str, Any]:
    """Answers with and without pruning, and what was kept of the pictures.

    Raises:
        TrioError: a picture that cannot be read, or a prompt that is too long.
    """
    start = time.perf_counter()
    shown = []
    for question in asked:
        pruned, whole = (
            pipeline.generate(
                Request(
                    question.prompt,
                    question.images,
                    max_new_tokens=_NEW_TOKENS,
                    budget=budget,
                    bundle_sampling=False,
                )
            )
            for budget in (None, 1.0)
        )
        shown.append(
            {
                "prompt": question.prompt,
                "answer": pruned.text.strip(),
                "unpruned": whole.text.strip(),
                "truth": question.truth,
                "same": pruned.text.strip() == whole.text.strip(),
                "pictures": _pictures(pruned),
                "first": f"{pruned.first_token_s:.2f} s",
            }
        )
    seconds = time.perf_counter() - start
    return {"examples": shown, "seconds": seconds, "ran": [f"Ran as {pipeline.ran_as}."]}


def _pictures(generation: Generation) -> list[list[dict[str, Any]]]:
    """Panels per picture: all of it, then what each pruning point kept."""
    layers = pruned_before(generation)
    strips = []
    for number, (image, processed) in enumerate(
        zip(generation.images, generation.processed, strict=True)
    ):
        kept, total = generation.kept_of_image(number), len(processed.rows)
        whole, *pruned = kept_panels(image, processed, kept)
        strip = [{"src": data_uri(whole), "caption": "all", "count": f"{total} tokens"}]
        strip += [
            {
                "src": data_uri(panel),
                "caption": f"from layer {layer}",
                "count": f"{len(tokens)} of {total}",
            }
            for panel, tokens, layer in zip(pruned, kept, layers, strict=True)
        ]
        strips.append(strip)
    return strips


def data_uri(image: Image.Image) -> str:
    """A picture as a data URI: a source without file or network."""
    content = io.BytesIO()
    image.save(content, "JPEG", quality=88, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(content.getvalue()).decode()
