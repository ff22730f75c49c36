"""`trio run`: answer a prompt about pictures, and say what was kept and how long it took."""

from __future__ import annotations

import argparse
import io
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trio_deploy.cli.options import (
    add_bundle,
    add_runtime_options,
    budget_of,
    bundle_of,
    runtime_options,
)
from trio_deploy.cli.terminal import say
from trio_deploy.config.sampling import SAMPLING_OPTIONS
from trio_deploy.errors import TrioError
from trio_deploy.files import exists, is_file, is_folder, write_atomically

if TYPE_CHECKING:
    from trio_deploy.pipeline.request import Generation

SUMMARY = "Answer a prompt about pictures."

EMPTY = "(the model gave an empty answer)"

_MIB = 2**20
_PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".gif", ".bmp", ".tif", ".tiff")


def add_arguments(command: argparse.ArgumentParser) -> None:
    """Options of the command."""
    add_bundle(command)
    command.add_argument(
        "asked",
        nargs="*",
        metavar="PICTURE … QUESTION",
        help='pictures and the question, as `photo.png "what is this?"`; with --prompt pictures '
        "alone",
    )
    command.add_argument(
        "--image",
        action="append",
        default=[],
        help="path or http(s) address of a picture; may be repeated",
    )
    command.add_argument("--prompt", help="question about the pictures")
    command.add_argument("--budget", help="average share of visual tokens (default: the bundle's)")
    command.add_argument(
        "--show",
        type=Path,
        metavar="PNG",
        help="write a picture of the visual tokens that were kept",
    )
    command.add_argument(
        "--max-new-tokens",
        type=int,
        default=128,
        help="maximum number of generated tokens (default: 128)",
    )
    command.add_argument("--stop", action="append", default=[], help="stop string; may be repeated")
    command.add_argument("--json", action="store_true", help="print one JSON object instead")
    _add_sampling_options(command)
    add_runtime_options(command)


def _add_sampling_options(command: argparse.ArgumentParser) -> None:
    """Options of `SamplingOptions`."""
    group = command.add_argument_group(
        "choice of tokens", "defaults are the bundle's, which trio inspect shows"
    )
    group.add_argument("--temperature", type=float, help="0 takes the most likely token")
    group.add_argument("--top-k", type=int, help="draw from this many most likely tokens; 0: all")
    group.add_argument(
        "--top-p", type=float, help="draw from the most likely tokens of this total probability"
    )
    group.add_argument(
        "--min-p", type=float, help="draw from tokens this fraction as likely as the most likely"
    )
    group.add_argument("--seed", type=int, help="sampling seed (default: random)")
    group.add_argument(
        "--repetition-penalty", type=float, help="divide logits of tokens seen by this; 1: none"
    )
    group.add_argument(
        "--presence-penalty", type=float, help="subtract from logits of tokens in the answer"
    )
    group.add_argument(
        "--frequency-penalty", type=float, help="subtract as often as a token is in the answer"
    )
    group.add_argument(
        "--no-repeat-ngram-size", type=int, help="tokens in a row that do not occur twice; 0: any"
    )
    group.add_argument("--min-new-tokens", type=int, help="no end token before this many tokens")
    group.add_argument(
        "--suppress-tokens",
        type=int,
        action="append",
        metavar="ID",
        help="token that never comes; may be repeated",
    )
    group.add_argument(
        "--bad-words",
        action="append",
        metavar="TEXT",
        help="text that does not come in the answer; may be repeated",
    )


def run(args: argparse.Namespace) -> None:
    """Print the answer as it comes, then its figures; with --show draw what was kept."""
    from trio_deploy.pipeline.pipeline import Pipeline
    from trio_deploy.pipeline.request import Request

    if not is_folder(Path(args.bundle)) and _looks_like_picture(args.bundle):
        raise TrioError(
            f"{args.bundle} is a picture, and in its place belongs a bundle or model: "
            f"`trio run tiny {args.bundle} …`"
        )
    prompt, images = asked_for(args.image, args.asked, args.prompt)
    if args.show is not None:
        if not images:
            raise TrioError("--show draws what was kept of an image: name a picture")
        check_picture_path(args.show)
    options = runtime_options(args)
    sampling: dict[str, Any] = {name: getattr(args, name, None) for name in SAMPLING_OPTIONS}
    request = Request(
        prompt,
        images,
        max_new_tokens=args.max_new_tokens,
        stop=args.stop,
        budget=budget_of(args),
        **sampling,
    )
    # A model may have to be exported before it is asked.
    request.check()
    check_pictures(images)
    bundle = bundle_of(args, options, to_run=True, budgets=[request.budget])
    stream = Pipeline.open(bundle, options).stream(request)
    for piece in stream:
        if not args.json:
            say(piece, end="", flush=True)
    generation = stream.generation
    if args.json:
        say(json.dumps(generation_json(generation), indent=2))
    else:
        said = "" if generation.text.strip() else EMPTY
        say(f"{said}\n\n{generation_text(generation)}")
    for warning in generation.warnings:
        say(f"trio: {warning}", file=sys.stderr)
    if args.show is not None:
        save_kept(generation, args.show)


def asked_for(
    images: Sequence[str], asked: Sequence[str], prompt: str | None
) -> tuple[str, list[str]]:
    """The question and the pictures that a command line names.

    Args:
        images: of --image.
        asked: pictures, and without a `prompt` the question after them.

    Raises:
        TrioError: there is no question, or a picture where the question belongs, or a question
            in several arguments.
    """
    pictures = list(asked)
    if prompt is None:
        if not pictures:
            raise TrioError("there is no question: write it behind the pictures, or pass --prompt")
        words = [each for each in pictures if not _names_picture(each)]
        if len(words) > 1:
            question = " ".join(pictures[pictures.index(words[0]) :])
            raise TrioError(
                f"{words[0]} names no picture; if it begins the question, put the question in "
                f'quotes: "{question:.200}"'
            )
        prompt = pictures.pop()
        if _names_picture(prompt):
            raise TrioError(
                f"there is no question, since {prompt} names a picture: write the question last, "
                "or pass --prompt"
            )
    if not prompt.strip():
        raise TrioError("the question has no text: write something to ask")
    return prompt, [*images, *pictures]


def check_pictures(images: Sequence[str]) -> None:
    """Check that files are pictures, before anything else is done for them.

    Raises:
        TrioError: one is missing, or no picture.
    """
    from trio_deploy.families.pixels import header_size, open_image
    from trio_deploy.pipeline.fetch import check_scheme, is_address

    for image in images:
        if is_address(image):
            check_scheme(image)
        elif header_size(image) is None:
            open_image(image)


def _names_picture(text: str) -> bool:
    return is_file(Path(text)) or _looks_like_picture(text)


def _looks_like_picture(text: str) -> bool:
    return " " not in text and ("://" in text or text.lower().endswith(_PICTURES))


def generation_text(generation: Generation) -> str:
    """Tokens per range of layers, time to first token, tokens per second, KV cache."""
    visual = (generation.visual_tokens, *generation.keep_counts)
    text = generation.prompt_tokens - generation.visual_tokens
    lines = [f"{'layers':<12}{'visual':>8}{'all':>8}"]
    for start, stop, tokens in generation.layer_ranges:
        span = f"{start}" if stop == start + 1 else f"{start}-{stop - 1}"
        lines.append(f"{span:<12}{tokens - text:>8}{tokens:>8}")
    depth = sum(stop - start for start, stop, _ in generation.layer_ranges)
    if visual[0] and depth:
        seen = sum((tokens - text) * (stop - start) for start, stop, tokens in
                   generation.layer_ranges)  # fmt: skip
        lines.append(f"{'average':<12}{seen / depth:>8.1f}  {seen / depth / visual[0]:.1%} kept")
    lines += [
        "",
        f"first token after {generation.first_token_s:.3f} s, "
        f"{len(generation.token_ids)} tokens ({generation.finish_reason})"
        + (f", {generation.tokens_per_s:.1f} tokens/s" if generation.tokens_per_s else ""),
        f"KV cache {generation.kv_bytes / _MIB:.2f} MiB",
    ]
    if (choice := generation.sampling.describe()) != "greedy":
        lines.append(f"tokens chosen by {choice}")
    return "\n".join(lines)


def generation_json(generation: Generation) -> dict[str, Any]:
    """The answer and its figures; times in seconds, positions counted in the prompt."""
    return {
        "text": generation.text,
        "token_ids": [int(token) for token in generation.token_ids],
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "visual_tokens": generation.visual_tokens,
        "sampling": generation.sampling.to_json(),
        "schedule": generation.schedule.to_json(),
        "layer_ranges": [
            {"start": start, "stop": stop, "tokens": tokens}
            for start, stop, tokens in generation.layer_ranges
        ],
        "keep_counts": generation.keep_counts,
        "kept": [kept.tolist() for kept in generation.kept],
        "first_token_s": generation.first_token_s,
        "tokens_per_s": generation.tokens_per_s,
        "timings": generation.timings,
        "kv_bytes": generation.kv_bytes,
        "warnings": list(generation.warnings),
    }


def check_picture_path(path: Path) -> None:
    """Check that a picture can be written, before an answer is computed for it.

    Raises:
        TrioError: no folder to write to, or an ending that stands for no picture format.
    """
    from PIL import Image

    if not is_folder(path.parent):
        raise TrioError(f"--show cannot write {path}: there is no folder {path.parent}")
    if is_folder(path) or not os.access(path if exists(path) else path.parent, os.W_OK):
        raise TrioError(f"--show cannot write {path}: it is a folder, or not yours to write")
    if Image.registered_extensions().get(path.suffix.lower()) not in Image.SAVE:
        raise TrioError(
            f"--show cannot write {path}: {path.suffix or 'a name without an ending'} names no "
            "picture format that can be written; call it .png or .jpg"
        )


def save_kept(generation: Generation, path: Path) -> None:
    """Draw which visual tokens each pruning point kept; several images below one another.

    Raises:
        TrioError: the prompt had no image, or the file cannot be written.
    """
    from PIL import Image

    from trio_deploy.pipeline.draw import draw_generation

    if not generation.images:
        raise TrioError("--show draws what was kept of an image: name a picture")
    sheet, drawn = draw_generation(generation), io.BytesIO()
    try:
        sheet.save(drawn, Image.registered_extensions()[path.suffix.lower()])
    except (OSError, ValueError, KeyError) as error:
        raise TrioError(f"cannot write the picture to {path}: {error}") from error
    write_atomically(path, drawn.getvalue())
