"""What engines are compared on: selections with work to do, and wrong ones that do not pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.support.engines import KINDS, export_for, make_target
from trio_deploy import Bundle
from trio_deploy.runtimes.onnxruntime import OrtRuntime
from trio_deploy.runtimes.tensorrt.profiles import Bounds, Profile
from trio_deploy.schedule.methods import METHODS
from trio_deploy.selection.nms import cosines_of, greedy_by_cosines
from trio_deploy.verify.compare import TOLERANCES, ParityRow
from trio_deploy.verify.engines import compare_engines
from trio_deploy.verify.inputs import ROWS, cases, plan

BLOCK = 256
THRESHOLD = 0.8
Feeds = Mapping[str, np.ndarray]
Outputs = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory, llava_next_checkpoint: Path) -> Any:
    made: dict[str, Bundle] = {}

    def get(method: str) -> Bundle:
        if method not in made:
            folder = tmp_path_factory.mktemp(method)
            target = make_target(folder, *KINDS[1])
            made[method] = export_for(
                llava_next_checkpoint, folder, target, f"1:0.4:{method},2:0.2:{method}"
            )
        return made[method]

    return get


def selection_profile(bundle: Bundle, batch: int, tokens: int, width: int) -> Profile:
    sizes = {"B": batch, "S": tokens}
    inputs = bundle.stages["select_2"].inputs
    shapes = {
        t.name: Bounds(*[tuple(sizes[d] if isinstance(d, str) else d for d in t.shape)] * 3)
        for t in inputs
    }
    return Profile("default", shapes, {"width": Bounds((width,), (width,), (width,))})


def compared(
    bundle: Bundle, profile: Profile, wrong: Callable[[Feeds, Outputs], Outputs] | None = None
) -> tuple[list[ParityRow], list[tuple[Feeds, Outputs]]]:
    """select_2 against itself, or against what `wrong` makes of its outputs; and what was run."""
    runs: list[tuple[Feeds, Outputs]] = []

    class Other:
        def __init__(self, engine: Any) -> None:
            self._engine, self.inputs, self.outputs = engine, engine.inputs, engine.outputs

        def run(self, feeds: Feeds) -> Outputs:
            outputs = dict(self._engine.run(feeds))
            runs.append((dict(feeds), outputs))
            return wrong(feeds, outputs) if wrong else outputs

    runtime = OrtRuntime(threads=1)
    rows = compare_engines(
        {"select_2": [profile]},
        lambda stage: runtime.open(bundle.graph(stage)),
        lambda stage: Other(runtime.open(bundle.graph(stage))),
        TOLERANCES["float32"],
        threshold=bundle.manifest.threshold,
        stages=bundle.stages,
    )
    return rows, runs


def again(rule: Callable[[np.ndarray, np.ndarray, int], np.ndarray]) -> Any:
    """An engine that keeps what a rule (scores, hidden states, keep) says, consistently."""

    def wrong(feeds: Feeds, outputs: Outputs) -> Outputs:
        made = {name: array.copy() for name, array in outputs.items()}
        for b, length in enumerate(feeds["lengths"]):
            visual = np.flatnonzero(feeds["visual_mask"][b, :length])
            keep = int(feeds["keep"][b])
            if keep >= len(visual):
                continue
            scores, hidden = outputs["saliency"][b][visual], feeds["hidden_states"][b][visual]
            text = np.setdiff1d(np.arange(length), visual)
            index = np.sort(np.concatenate([text, visual[rule(scores, hidden, keep)]]))
            made["keep_index"][b, : len(index)] = index
            made["hidden_states_out"][b, : len(index)] = feeds["hidden_states"][b, index]
            made["visual_mask_out"][b, : len(index)] = feeds["visual_mask"][b, index]
        return made

    return wrong


def survivors(scores: np.ndarray, hidden: np.ndarray, threshold: float = THRESHOLD) -> np.ndarray:
    """Of the suppression alone, in descending order of their scores."""
    cosines = cosines_of(hidden)
    alive: list[int] = []
    for token in np.argsort(-scores, kind="stable"):
        if not (cosines[token, alive] >= threshold).any():
            alive.append(int(token))
    return np.array(alive)


def ranked(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")


def without_suppression(scores: np.ndarray, hidden: np.ndarray, keep: int) -> np.ndarray:
    return ranked(scores)[:keep]


def of_another_threshold(scores: np.ndarray, hidden: np.ndarray, keep: int) -> np.ndarray:
    return greedy_by_cosines(scores, cosines_of(hidden), keep, THRESHOLD + 0.05)


def filled_from_the_worst(scores: np.ndarray, hidden: np.ndarray, keep: int) -> np.ndarray:
    alive = survivors(scores, hidden)[:keep]
    rest = np.setdiff1d(ranked(scores)[::-1], alive, assume_unique=True)
    rest = rest[np.argsort(scores[rest], kind="stable")]
    return np.concatenate([alive, rest[: keep - len(alive)]])


def of_one_block(scores: np.ndarray, hidden: np.ndarray, keep: int) -> np.ndarray:
    """Suppresses within a block of ranks, and not by what earlier blocks kept."""
    order, alive = ranked(scores), []
    for start in range(0, len(order), BLOCK):
        block = order[start : start + BLOCK]
        alive += block[survivors(scores[block], hidden[block])].tolist()
    rest = [token for token in order if token not in set(alive)]
    return np.array((alive + rest)[:keep])


def in_one_round(scores: np.ndarray, hidden: np.ndarray, keep: int) -> np.ndarray:
    """What is suppressed suppresses others all the same, as after one round of the fixed point."""
    order, cosines = ranked(scores), cosines_of(hidden)
    hit = [(cosines[t, order[:i]] >= THRESHOLD).any() for i, t in enumerate(order)]
    alive, rest = order[~np.array(hit)], order[np.array(hit)]
    return np.concatenate([alive, rest])[:keep]


SHAPES = [(4, 1200, 1200), (1, 1200, 900), (4, 72, 40), (1, 300, 60)]


@pytest.mark.parametrize(("batch", "tokens", "width"), SHAPES)
def test_selections_suppress_fill_up_and_end_early(
    bundles: Any, batch: int, tokens: int, width: int
) -> None:
    bundle = bundles("trio")
    rows, runs = compared(bundle, selection_profile(bundle, batch, tokens, width))
    assert all(row.passed for row in rows), rows
    seen = set()
    for feeds, outputs in runs:
        for b, length in enumerate(feeds["lengths"]):
            visual = np.flatnonzero(feeds["visual_mask"][b, :length])
            keep = int(feeds["keep"][b])
            chosen = set(outputs["keep_index"][b].tolist()) & set(visual.tolist())
            if keep >= len(visual):
                assert len(chosen) == len(visual)
                seen.add("whole")
                continue
            alive = survivors(outputs["saliency"][b][visual], feeds["hidden_states"][b][visual])
            assert len(alive) < 0.9 * len(visual), "many are suppressed"
            if len(alive) < keep:
                seen.add("padded" if length < tokens else "fill")
                assert set(visual[alive].tolist()) < chosen
                if width > 800 and length == tokens:
                    assert len(alive) > BLOCK, "what is kept takes more than a block"
            elif len(alive) > keep:
                seen.add("cut")
                assert chosen == set(visual[alive[:keep]].tolist())
            best = set(visual[ranked(outputs["saliency"][b][visual])[:keep]].tolist())
            assert chosen != best, "suppression decides"
    assert seen == set(ROWS)


@pytest.mark.parametrize("batch", [1, 4])
def test_there_are_ties_and_cosines_on_both_sides_of_the_threshold(
    bundles: Any, batch: int
) -> None:
    bundle = bundles("trio")
    profile = selection_profile(bundle, batch, 300, 200)
    inputs = OrtRuntime(threads=1).open(bundle.graph("select_2")).inputs
    for _, feeds in cases(bundle.stages["select_2"], inputs, profile, "max", THRESHOLD):
        for b in range(batch):
            rows = feeds["hidden_states"][b][feeds["visual_mask"][b]]
            if not len(rows):
                continue
            cosines = cosines_of(rows)[np.triu_indices(len(rows), 1)]
            assert (abs(cosines - THRESHOLD) > 0.01).all(), "no engine may be in doubt"
            assert ((cosines > THRESHOLD) & (cosines < THRESHOLD + 0.1)).any()
            assert ((cosines < THRESHOLD) & (cosines > THRESHOLD - 0.1)).any()
            assert len(np.unique(rows, axis=0)) < len(rows)


@pytest.mark.parametrize(
    "rule",
    [
        without_suppression,
        of_another_threshold,
        filled_from_the_worst,
        of_one_block,
        in_one_round,
    ],
)
def test_a_wrong_rule_fails_and_its_tensor_is_named(bundles: Any, rule: Any) -> None:
    bundle = bundles("trio")
    rows, _ = compared(bundle, selection_profile(bundle, 4, 1200, 1200), again(rule))
    assert not any(row.passed for row in rows)
    assert all(row.problem.startswith("keep_index:") for row in rows), rows


@pytest.mark.parametrize("method", METHODS)
def test_every_method_passes_and_is_told_from_one_that_keeps_other_tokens(
    bundles: Any, method: str
) -> None:
    """A method without scores of its own, or with equal ones, would let anything pass."""
    bundle = bundles(method)
    profile = selection_profile(bundle, 4, 200, 120)
    rows, runs = compared(bundle, profile)
    assert all(row.passed for row in rows), rows
    for feeds, outputs in runs:
        scores = outputs["saliency"][0][feeds["visual_mask"][0]]
        assert len(np.unique(scores)) > 10
        if method in ("cls-attention", "vscan"):
            assert len(np.unique(scores)) < len(scores), "ties"

    def first_ones(scores: np.ndarray, hidden: np.ndarray, keep: int) -> np.ndarray:
        return np.arange(keep)

    rows, _ = compared(bundle, profile, again(first_ones))
    assert not any(row.passed for row in rows)


def test_what_a_row_keeps_fits_the_width() -> None:
    for tokens in (2, 3, 8, 9, 50, 3000):
        for width in {1, 2, tokens // 3 + 1, tokens - 1, tokens} - {0}:
            for kind in ROWS:
                row = plan(kind, tokens, width)
                assert row.kept <= width
                assert row.visual[row.length :].sum() == 0
                assert row.length > row.visual.sum(), "some text, whose probes ask"
