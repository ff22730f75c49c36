"""Inputs for comparing engines: values that reach every path through their graphs.

Independent random hidden states have cosines near zero: no token suppresses another, and the loops
of a selection end at once. Here visual tokens come in groups of near-copies, and rows differ in the
number they keep (`ROWS`).

B rows, S tokens, W width after pruning, d hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.runtimes.base import TensorSpec
from trio_deploy.runtimes.tensorrt.first_run import example_feeds
from trio_deploy.runtimes.tensorrt.profiles import Profile
from trio_deploy.schedule.methods import SEEDS

ROWS = ("fill", "cut", "padded", "whole")
"""Kinds of rows of a selection: `fill` keeps more than survive the suppression, so that suppressed
tokens fill it up; `cut` keeps fewer, so that it ends early; `padded` is a padded `fill`; `whole`
keeps all visual tokens, since it may keep more than it has."""
_MIN_TOKENS = 8  # tokens; in shorter rows all kinds are the same
_CHAIN = 6  # tokens of a chain, in which each suppresses only the next
_STEP = 1.4  # ratio of norms from one token of a group to the next; the gradient falls with it
_JITTER = 0.01  # radians between tokens at one place of a chain
_TIES = 32  # number of different values of an encoder's score


@dataclass(frozen=True)
class Row:
    """One row of a selection's inputs.

    Attributes:
        length: number of valid tokens.
        visual: bool [S], which tokens are visual.
        keep: number of visual tokens to keep.
        groups: number of groups of near-copies among the visual tokens.
    """

    length: int
    visual: NDArray[np.bool_]
    keep: int
    groups: int

    @property
    def kept(self) -> int:
        """Number of tokens after the pruning point."""
        count = int(self.visual.sum())
        return self.length - count + min(self.keep, count)


def cases(
    stage: StageInfo,
    inputs: Mapping[str, TensorSpec],
    profile: Profile,
    corner: str,
    threshold: float,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Inputs of a stage at a profile's corner, each with a remark ("" for the first).

    A selection gets several sets of inputs if a batch has no room for all of `ROWS`.

    Args:
        inputs: inputs of the graph in ONNX Runtime.
        threshold: cosine similarity of the greedy suppression.
    """
    feeds = example_feeds(stage, inputs, profile, corner)
    random = np.random.default_rng(1)
    if stage.kind == "select":
        yield from _selections(feeds, profile, threshold, random)
        return
    decodes = any(feeds[tensor.name].any() for tensor in stage.inputs_of("past_lengths"))
    counted = "past_lengths" if decodes else "lengths"
    roles = {tensor.name: tensor.role for tensor in stage.inputs}
    for name, array in feeds.items():
        if roles[name] == "cache":  # zeros would hide a wrong attention over them
            feeds[name] = random.standard_normal(array.shape).astype(array.dtype)
        elif roles[name] == "source" and len(feeds[stage.input_name("features")]):
            rows = len(feeds[stage.input_name("features")]) + 1  # the last is the newline
            array[:, 1::2] = array.shape[1] + np.arange(array.shape[1] // 2) % rows
        elif roles[name] == "feature_index":  # every third token has no features
            deep = next(f for n, f in feeds.items() if roles[n] == "deepstack")
            own = np.arange(array.size).reshape(array.shape)
            array[:] = np.where(own % 3, own % len(deep), -1) if len(deep) else -1
        elif roles[name] == counted:  # every second row is shorter
            array[1::2] = np.maximum(array[1::2] * 3 // 4, np.minimum(array[1::2], 1))
    yield "", feeds


def _selections(
    feeds: Mapping[str, np.ndarray],
    profile: Profile,
    threshold: float,
    random: np.random.Generator,
) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    batch, tokens = feeds["visual_mask"].shape
    kinds = list(ROWS) if tokens >= _MIN_TOKENS else list(ROWS[:1])
    width = int(feeds["width"][0])
    bounds = profile.values.get("width")
    least = bounds.min[0] if bounds else 1
    for number, start in enumerate(range(0, len(kinds), batch)):
        chosen = [kinds[(start + b) % len(kinds)] for b in range(batch)]
        rows = [plan(kind, tokens, width) for kind in chosen]
        made = dict(feeds)
        made["lengths"] = np.array([row.length for row in rows], feeds["lengths"].dtype)
        made["keep"] = np.array([row.keep for row in rows], feeds["keep"].dtype)
        made["visual_mask"] = np.stack([row.visual for row in rows])
        made["width"] = np.array([max(least, *(row.kept for row in rows))], feeds["width"].dtype)
        hidden, places = zip(
            *(_hidden(row, feeds["hidden_states"].shape[2], threshold, random) for row in rows),
            strict=True,
        )
        made["hidden_states"] = np.stack(hidden).astype(feeds["hidden_states"].dtype)
        positions = np.stack(places)
        if feeds["position_ids"].ndim == 3:  # time, row and column
            positions = np.stack([positions, positions // 7, positions % 7], axis=1)
        made["position_ids"] = positions.astype(feeds["position_ids"].dtype)
        if "feature_index" in feeds:
            own = np.arange(batch * tokens).reshape(batch, tokens)
            made["feature_index"] = np.where(made["visual_mask"], own, -1)
        if "seed" in feeds:
            made["seed"] = random.integers(0, SEEDS, batch).astype(feeds["seed"].dtype)
        patches = made["visual_mask"] & (random.random((batch, tokens)) > 0.05)  # and newlines
        for name in ("prior", "prior_local"):
            if name in feeds:
                made[name] = (patches * _scores(name, (batch, tokens), random)).astype(np.float32)
        yield ", ".join(dict.fromkeys(chosen)) if batch < len(kinds) and number else "", made


def plan(kind: str, tokens: int, width: int) -> Row:
    """A row of a kind of `ROWS` with S tokens, of which at most W remain."""
    text = max(1, min(width // 4, 32))
    length = tokens
    if kind == "padded":
        length = max(text + 1, tokens * 3 // 4)
    elif kind == "whole":
        length = min(tokens, width)
    text = min(text, length)
    count = length - text
    visual = np.zeros(tokens, np.bool_)
    first = min(text - 1, text // 2)  # some text before the picture, the rest after it
    visual[first : first + count] = True
    room = max(0, width - text)
    if kind == "whole":
        return Row(length, visual, count + 5, max(1, count // 3))
    # About two tokens per group survive the suppression.
    if kind == "cut":
        keep = max(0, min(room, count // 3))
        groups = keep
    else:
        keep = max(0, min(room, count * 4 // 5))
        groups = keep // 3
    return Row(length, visual, keep, max(1, min(groups, count)))


def _hidden(
    row: Row, size: int, threshold: float, random: np.random.Generator
) -> tuple[NDArray, NDArray]:
    """Hidden states [S,d] and positions [S] of a row; padding is as large as the rest."""
    tokens = len(row.visual)
    hidden = 0.1 * random.standard_normal((tokens, size))
    positions = np.arange(tokens)
    places = random.permutation(np.flatnonzero(row.visual))
    groups = np.array_split(places, row.groups) if len(places) else []
    for number, members in enumerate(groups):
        rows = _near_copies(number % 4, len(members), size, threshold, random)
        hidden[members] = rows * _STEP ** (np.arange(len(members)) % _CHAIN)[:, None]
        if number % 4 == 3:  # the same token twice: all scores of a pair are equal
            for one, other in zip(members[::2], members[1::2], strict=False):
                hidden[other], positions[other] = hidden[one], positions[one]
    return hidden, positions


def _near_copies(
    kind: int, count: int, size: int, threshold: float, random: np.random.Generator
) -> NDArray:
    """Similar rows [count,d] whose cosines differ from the threshold by at least 0.02.

    Kinds: 0 and 3, all are near-copies; 1, a chain, in which each is a near-copy of the next only;
    2, all but the last, whose cosine is just below the threshold, are near-copies of the first, and
    a third of them of one another.
    """
    axes = np.linalg.qr(random.standard_normal((size, 4)))[0].T
    threshold = min(threshold, 0.97)
    near = np.arccos(threshold + random.uniform(0.02, 0.08, count) * (1 - threshold) / 0.2)
    far = np.arccos(threshold - 0.02)
    if kind == 1:
        angles = np.resize(np.cumsum(near[:_CHAIN]), count) + random.uniform(0, _JITTER, count)
        rows = np.outer(np.cos(angles), axes[0]) + np.outer(np.sin(angles), axes[1])
    else:
        angles = near / 2 if kind != 2 else near  # two at half the angle are still near-copies
        angles[0] = 0.0
        if kind == 2 and count > 2:
            angles[-1] = far
        turn = np.resize(np.arange(1, len(axes)), count)
        rows = np.outer(np.cos(angles), axes[0]) + np.sin(angles)[:, None] * axes[turn]
    return 0.1 * np.sqrt(size) * rows


def _scores(name: str, shape: tuple[int, int], random: np.random.Generator) -> NDArray:
    """An encoder's scores with ties; the integers of `prior_local` are ranks within a window."""
    fraction = random.integers(1, _TIES + 1, shape) / _TIES
    return fraction if name == "prior" else random.integers(1, 37, shape) + 0.9 * fraction
