"""What `trio run` says about an answer once it is there."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from trio_deploy.errors import TrioError
from trio_deploy.pipeline.draw import draw_generation
from trio_deploy.pipeline.request import Generation

EMPTY = "(the model gave an empty answer)"

_MIB = 2**20
_WORDS = 8  # that a remark names, so that it stays one line


def unknown_remark(words: Sequence[str], vocabulary: int) -> str:
    """One line on the words of a question that a vocabulary of so many tokens lacks."""
    named = ", ".join(map(repr, words[:_WORDS]))
    more = f" and {len(words) - _WORDS} more" if len(words) > _WORDS else ""
    return (
        f"the model's vocabulary of {vocabulary} tokens lacks {named}{more}: the model cannot tell "
        "unknown words apart; ask in other words"
    )


def generation_text(generation: Generation) -> str:
    """Tokens a layer range, time to first token, tokens a second, KV cache; one line each."""
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
    return "\n".join(lines)


def generation_json(generation: Generation) -> dict[str, Any]:
    """The answer and its figures; times in seconds, places counted in the prompt."""
    return {
        "text": generation.text,
        "token_ids": [int(token) for token in generation.token_ids],
        "finish_reason": generation.finish_reason,
        "prompt_tokens": generation.prompt_tokens,
        "visual_tokens": generation.visual_tokens,
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
    }


def check_picture_path(path: Path) -> None:
    """Finds what would keep a picture from being written, before an answer is computed for it.

    Raises:
        TrioError: no folder to write to, or an ending that stands for no picture format.
    """
    if not path.parent.is_dir():
        raise TrioError(f"--show cannot write {path}: there is no folder {path.parent}")
    if path.is_dir() or not os.access(path if path.exists() else path.parent, os.W_OK):
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
    if not generation.images:
        raise TrioError("--show draws what was kept of an image: pass one with --image")
    sheet = draw_generation(generation)
    try:
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise TrioError(f"cannot write the picture to {path}: {error}") from error
