"""Compare one stage with the reference, within a tolerance.

Every stage is fed the reference's own inputs, so that errors do not add up and a wrong stage is
identified. Padding is not compared. A selection is compared in three steps: its scores with the
reference's; its kept tokens with the reference's; and, since scores closer than the error between
them may change places, its kept tokens with those that the method's rule picks by the selection's
own scores, which must always agree.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from trio_deploy.bundle.manifest import kind_of_label
from trio_deploy.reference.trace import Stage, Tensors
from trio_deploy.schedule.methods import ENCODER_SCORES, METHODS, WINDOW, load
from trio_deploy.schedule.view import Selected, all_equal

Run = Callable[[str, Tensors], Mapping[str, NDArray]]
"""Function that runs a graph by its name and ignores feeds that are not its inputs."""


@dataclass(frozen=True)
class Tolerance:
    """Tolerated differences.

    Attributes:
        relative: max|difference| / max|reference| of any output but hidden states.
            Scores are proportional to e^(z - z_label), so an absolute error in the probes' logits
            z becomes a relative one: they may differ by this times the largest logit, if that is
            above 1. So it bounds little where logits are large; `proportions` bounds the rest.
        proportions: maximum of ‖scores·c - reference‖ / ‖reference‖ over a row's visual tokens,
            with the factor c that makes it least, for methods that score by the gradient. An error
            of a logit is a factor of a probe's whole gradient, so rounding changes it little, and
            wrong weights much.
        per_token: the same of hidden states, each token over its own values.
        overlap: minimum share of the kept visual tokens that are the reference's.
        excluded: maximum share of the visual tokens whose rank lies within the error, of rows of
            up to `CROWDED` (`most_excluded`); None if the kept tokens are compared by `overlap`
            alone.
        tokens: whether greedy tokens must be the reference's.
        norm: maximum of ‖difference‖ / ‖reference‖ of a token's hidden state, logits, or keys or
            values of all heads, as the root of the mean square over tokens, beside the maxima
            above; None: no bound.
    """

    relative: float
    proportions: float
    per_token: float
    overlap: float
    excluded: float | None
    tokens: bool
    norm: float | None = None


TOLERANCES = {
    "float32": Tolerance(
        relative=1e-5, proportions=1e-3, per_token=3e-5, overlap=1.0, excluded=0.01, tokens=True
    ),
    "float16": Tolerance(
        relative=1e-2, proportions=1e-2, per_token=1e-2, overlap=0.98, excluded=None, tokens=False
    ),
    # Eight bits of mantissa instead of eleven. Proportions of sound scores differ by at most 0.7 %
    # on the shipped model and 2.1 % on SmolLM2-135M, with all values rounded to bfloat16 or only
    # those of products with weights. With half of one weight overwritten they differ by 16 % or
    # more on SmolLM2-135M; on the shipped model by 20 % or more where the weight is of attention or
    # the head. Of an MLP, they differ at its first TRIO point by 2 to 5 %: at least 99 % of the
    # kept tokens are the reference's, and no tolerance tells. At its second one they differ by at
    # least 6 % in one of two rows, where 71 to 96 % are the reference's; in the other by as little
    # as 1 %, where 94 % or more are.
    "bfloat16": Tolerance(
        relative=8e-2, proportions=6e-2, per_token=8e-2, overlap=0.9, excluded=None, tokens=False
    ),
}

CROWDED = 256
"""Visual tokens of a row from which on scores lie closer together than `excluded` was set for."""


@dataclass(frozen=True)
class Rounding:
    """What rounding the activations of segments to 8 bit may change.

    Attributes:
        products: `Tolerance.relative` and `per_token`.
        norm: `Tolerance.norm`.
    """

    products: float
    norm: float


ROUNDINGS = {
    # The greatest difference with the tiny model's trained weights is 0.016, with random ones up to
    # 0.04; of a wrong matrix it is about 1. Norms of trained weights differ by up to 0.016, of
    # random ones by 0.021; with a tenth of the matrix overwritten that moves least, of trained ones
    # by 0.025 or more.
    "int8": Rounding(products=1e-1, norm=2.3e-2),
    # The reference rounds, too, but where two sound runs differ by 1e-6 a few activations become
    # other codes, and that grows with every product: in the tiny model norms differ by 0.003 in
    # float32 and by 0.030 over eight layers in float16, where a tenth of a gate's matrix that is
    # overwritten moves them by 0.03 to 0.07. So these bars see a wrong matrix and no more. Without
    # that rounding, which is compared as well on ONNX Runtime, sound ones differ by up to 9e-7 in
    # float32, and by 0.02 with a tenth of the matrix shuffled.
    "fp8": Rounding(products=3e-1, norm=5e-2),
}
"""By what activations are rounded to."""

SEGMENTS = ("prefill", "decode")
"""Kinds of the stages that run layers."""

PRODUCTS_OVERLAP = 0.98
"""`Tolerance.overlap` where only a selection's products with weights are in 16 bits."""


@dataclass(frozen=True)
class ParityRow:
    """One line of the table.

    Attributes:
        stage: name of the graph, or of another thing compared.
        max_abs, max_rel: differences of `worst`, the output with the largest relative one.
        overlap: share of the reference's kept visual tokens that were kept.
        excluded: share of visual tokens whose rank lies within the error.
        tokens_equal: whether greedy tokens are the reference's.
        problem: what is beyond tolerance; "" if nothing is.
    """

    stage: str
    max_abs: float = 0.0
    max_rel: float = 0.0
    worst: str = ""
    overlap: float | None = None
    excluded: float | None = None
    tokens_equal: bool | None = None
    problem: str = ""

    @property
    def passed(self) -> bool:
        """Whether the line is within tolerance."""
        return not self.problem


def compare_stages(
    stages: Mapping[str, Stage],
    run: Run,
    tolerance: Tolerance,
    *,
    threshold: float,
    separate_decode: bool,
    selections: Mapping[str, str],
    segments: Tolerance | None = None,
) -> list[ParityRow]:
    """Feed every stage the reference's inputs and compare its outputs.

    Args:
        stages: stage → the reference's tensors of a batch.
        run: function that runs a graph of the bundle.
        threshold: cosine similarity of the greedy suppression.
        separate_decode: whether decode.onnx decodes, rather than the prefill graphs.
        selections: label of a select stage → its method.
        segments: tolerance of the stages that run layers, where it is another one.
    """
    rows: dict[str, ParityRow] = {}
    for name, stage in _with_decode(stages, separate_decode).items():
        if kind_of_label(name) == "vision":  # one run per picture where they have any size
            name = "vision"
        got = run(name.removesuffix(" (decode)"), feeds_of(stage))
        if name in selections:
            method = selections[name]
            row = compare_selection(name, stage, got, tolerance, threshold, method)
        else:
            layers = segments is not None and kind_of_label(name) in SEGMENTS
            row = compare_outputs(name, stage, got, segments if layers and segments else tolerance)
        rows[name] = max(rows.get(name, row), row, key=lambda row: (not row.passed, row.max_rel))
    return list(rows.values())


def feeds_of(stage: Stage) -> Tensors:
    """A stage's inputs; a prefill starts from an empty past, [B, G, 0, D]."""
    feeds = dict(stage.inputs)
    if feeds.get("past_lengths") is not None and not feeds["past_lengths"].any():
        for name, present in stage.outputs.items():
            if name.startswith("present."):
                feeds[name.replace("present", "past", 1)] = present[:, :, :0]
    return feeds


def _with_decode(stages: Mapping[str, Stage], separate: bool) -> dict[str, Stage]:
    """The first decoding step under the name of the graph that runs it."""
    steps = {name: stage for name, stage in stages.items() if kind_of_label(name) == "decode"}
    plain = {name: stage for name, stage in stages.items() if name not in steps}
    if not steps:
        return plain
    if not separate:
        renamed = {
            name.replace("decode", "prefill") + " (decode)": step for name, step in steps.items()
        }
        return plain | renamed
    whole = Stage()
    for step in steps.values():
        for mine, its in ((whole.inputs, step.inputs), (whole.outputs, step.outputs)):
            mine |= {key: value for key, value in its.items() if key.startswith(("past.", "pres"))}
        for key in step.outputs:
            if key.startswith("present."):
                whole.inputs[past_lengths_of(key)] = step.inputs["past_lengths"]
    last = list(steps.values())[-1]
    whole.outputs["logits"] = last.outputs["logits"]
    whole.inputs["input_ids"] = last.inputs["input_ids"]
    for key, source in (("position_ids", "position_ids"), ("lengths", "past_lengths")):
        given = [step.inputs[source] for step in steps.values()]
        columns = [value.reshape(len(value), -1)[:, :1] for value in given]
        whole.inputs[key] = np.concatenate(columns, axis=1)
    return plain | {"decode": whole}


def compare_outputs(
    name: str, stage: Stage, got: Mapping[str, NDArray], tolerance: Tolerance
) -> ParityRow:
    """Compare all outputs of a stage that does not select."""
    worst = ParityRow(name)
    problems = []
    for key, expected in stage.outputs.items():
        if expected.size == 0 and np.size(got.get(key, ())) == 0:
            continue
        if key not in got or got[key].shape != expected.shape:
            have = "is missing" if key not in got else f"has the shape {list(got[key].shape)}"
            problems.append(f"{key} {have}, expected {list(expected.shape)}")
            continue
        valid = valid_places(key, stage, expected.shape)
        mine, theirs, most = got[key][valid], expected[valid], tolerance.relative
        if key == "prior_local":
            problems += _scan_problems(got[key], len(stage.inputs["pixel_values"]))
            mine, theirs = (each - np.floor(each) for each in (mine, theirs))
            most = 2 * most + _SCAN_SPACING  # a share of the greatest, of which both have errors
        if key in _OF_TOKENS:
            tokens, most = valid.all(axis=-1), tolerance.per_token
            max_abs, max_rel = difference_by_token(got[key][tokens], expected[tokens])
        else:
            max_abs, max_rel = difference(mine, theirs)
        if not max_rel <= worst.max_rel:
            worst = ParityRow(name, max_abs, max_rel, key)
        if not max_rel <= most:
            problems.append(f"{key} differs by {max_rel:.1e}")
        if tolerance.norm is not None:
            far = difference_of_norms(
                by_token(key, got[key], valid), by_token(key, expected, valid)
            )
            if not far <= tolerance.norm:
                problems.append(f"{key} differs by {far:.1e} of a token's norm")
    return ParityRow(name, worst.max_abs, worst.max_rel, worst.worst, problem=_summary(problems))


_OF_TOKENS = ("hidden_states", "hidden_states_out", "inputs_embeds")
"""Outputs [B,S,d] with one row per token."""

_SCAN_SPACING = float(np.spacing(np.float32(WINDOW**2)))
"""Distance of neighbouring values of `prior_local`, to which its attention is rounded."""


def _scan_problems(local: NDArray, tiles: int) -> list[str]:
    """Contradictions between ranks and attention in `prior_local` [T·p] of `tiles` tiles.

    Its integers are ranks within windows, which near-equal attentions exchange: so they are not
    compared with the reference's, but with the attention that is their own fraction.
    """
    scores = local.reshape(tiles, -1).astype(np.float64)
    side = math.isqrt(scores.shape[1])
    patches = scores[:, scores.shape[1] - side * side :]  # a class token is in front
    y, x = np.divmod(np.arange(side * side), side)
    window = y // WINDOW * side + x // WINDOW
    counts = np.bincount(window)
    ranks = np.concatenate([np.arange(count) for count in counts])
    for tile in patches:
        whole, share = np.floor(tile), tile - np.floor(tile)
        order = np.lexsort((-whole, window))
        if not np.array_equal(whole[order], WINDOW**2 - ranks):
            return ["prior_local does not number the patches of each window"]
        falls = np.diff(share[order])[ranks[1:] > 0]
        if (falls > 2 * _SCAN_SPACING).any():
            return ["prior_local does not rank the patches of each window by their attention"]
    return []


def compare_selection(
    name: str,
    stage: Stage,
    got: Mapping[str, NDArray],
    tolerance: Tolerance,
    threshold: float,
    method: str = "trio",
) -> ParityRow:
    """Compare scores and kept tokens of a selection, and check its outputs for consistency."""
    missing = [key for key in stage.outputs if key not in got]
    if missing:
        return ParityRow(name, problem=f"output {missing[0]} is missing")
    problems = []
    if not np.all(got["converged"]):
        problems.append("converged: the suppression did not converge")
    rows = [
        _compare_row(b, stage, got, tolerance, threshold, method)
        for b in range(len(stage.inputs["visual_mask"]))
    ]
    problems += [problem for row in rows for problem in row.problems]
    merged = tolerance if METHODS[method].merges else None
    problems += _inconsistencies(stage, got, merged)
    max_abs = max((row.max_abs for row in rows), default=0.0)
    max_rel = max((row.max_rel for row in rows), default=0.0)
    if not max((row.beyond for row in rows), default=0.0) <= tolerance.relative:
        problems.insert(0, f"saliency differs by {max_rel:.1e}")
    proportions = max((row.proportions for row in rows), default=0.0)
    if not proportions <= tolerance.proportions:
        problems.append(
            f"saliency differs by {proportions:.1e} beside a factor common to all tokens"
        )
    kept, visual = sum(row.kept for row in rows), sum(row.visual for row in rows)
    overlap = sum(row.agreeing for row in rows) / kept if kept else 1.0
    excluded = sum(row.doubtful for row in rows) / visual if visual else 0.0
    if tolerance.excluded is None:
        if overlap < tolerance.overlap:
            problems.append(f"keep_index: only {overlap:.1%} of the kept tokens agree")
    elif excluded > most_excluded(tolerance.excluded, max(row.visual for row in rows)):
        problems.append(f"saliency: the rank of {excluded:.1%} of the tokens lies within the error")
    return ParityRow(
        name, max_abs, max_rel, "saliency", overlap, excluded, problem=_summary(problems)
    )


def most_excluded(share: float, visual: int) -> float:
    """`Tolerance.excluded` of rows of so many visual tokens.

    The scores of n tokens lie about 1/n apart, so the share of them that an error reaches grows
    with n.
    """
    return share * max(1.0, visual / CROWDED)


@dataclass(frozen=True)
class _SelectedRow:
    """Comparison of one row of a selection.

    Attributes:
        problems: what is beyond tolerance.
        kept: number of visual tokens that the reference keeps.
        agreeing: number of these that are kept; indistinguishable tokens count as equal.
        visual: number of visual tokens.
        max_abs, max_rel: differences of the scores.
        beyond: max_rel over the difference that an error in the probes' logits explains.
        proportions: difference of the scores beside a common factor, as of `Tolerance`.
        doubtful: number of visual tokens whose rank lies within the error.
    """

    problems: list[str]
    kept: int
    agreeing: int
    visual: int
    max_abs: float = 0.0
    max_rel: float = 0.0
    beyond: float = 0.0
    proportions: float = 0.0
    doubtful: int = 0


def _compare_row(
    b: int,
    stage: Stage,
    got: Mapping[str, NDArray],
    tolerance: Tolerance,
    threshold: float,
    method: str,
) -> _SelectedRow:
    """Compare row `b` of a selection.

    If each choice depends on those before (`Method.sequential`), the scores of a row with other
    choices cannot be compared: the method's rule decides, or the tokens must be the same.
    """
    inputs, expected = stage.inputs, stage.outputs
    visual = inputs["visual_mask"][b].astype(bool)
    scores, reference = (side["saliency"][b].astype(np.float64) for side in (got, expected))
    exact = tolerance.excluded is not None
    problems = []
    if all_equal(scores[visual]) and not all_equal(reference[visual]):
        problems.append(f"saliency: row {b} has the same score at all visual tokens")
    if scores[~visual].any():
        problems.append(f"saliency: row {b} has scores at tokens that are not visual")
    own = _visual_places(got["keep_index"][b][: int(expected["lengths_out"][b])], visual)
    theirs = _visual_places(expected["keep_index"][b], visual)
    alike = _indistinguishable_tokens(inputs, b)
    mine, meant = Counter(alike[own].tolist()), Counter(alike[theirs].tolist())
    encoder = {name: inputs[name][b] for name in ENCODER_SCORES if name in inputs}
    length = int(inputs["lengths"][b])
    selected = Selected(own, scores, inputs["hidden_states"][b], visual, threshold, length, encoder)
    follows = load(method).rule(selected)
    row = _SelectedRow(problems, len(theirs), (mine & meant).total(), int(visual.sum()))
    if mine == meant or not METHODS[method].sequential:
        max_abs, max_rel = difference(scores[visual], reference[visual])
        doubt = tied(scores[visual], reference[visual])
        doubt &= np.bincount(alike)[alike[visual]] == 1
        row = replace(
            row,
            max_abs=max_abs,
            max_rel=max_rel,
            beyond=max_rel / max(1.0, float(inputs["probe_logits"][b])),
            doubtful=int(doubt.sum()),
        )
        if "gradient" in METHODS[method].needs:
            proportions = difference_of_proportions(scores[visual], reference[visual])
            row = replace(row, proportions=proportions)
        if exact and mine != meant and not doubt.any():
            problems.append(
                f"keep_index: row {b} keeps other tokens, but no scores are within the error"
            )
    elif follows is None and exact:
        problems.append(f"keep_index: row {b} keeps other tokens")
    if follows is False:
        problems.append(f"keep_index: row {b} does not keep what the rule picks by its saliency")
    return row


def difference(got: NDArray, expected: NDArray) -> tuple[float, float]:
    """max|difference|, and that over max|expected|; infinite if something is not finite."""
    if expected.size == 0:
        return 0.0, 0.0
    delta = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max()
    if not np.isfinite(delta):
        return float("inf"), float("inf")
    scale = np.abs(expected.astype(np.float64)).max()
    return float(delta), float(delta / scale if scale else (0.0 if delta == 0 else np.inf))


def difference_by_token(got: NDArray, expected: NDArray) -> tuple[float, float]:
    """`difference` of hidden states [N,d], the relative one token by token.

    A few tokens of a trained language model have hidden states a thousand times as large as all
    others; over the greatest of all, the others could be anything. A token's difference is taken
    over its own greatest value, or over that of the median token if that is greater.
    """
    if expected.size == 0:
        return 0.0, 0.0
    delta = np.abs(got.astype(np.float64) - expected.astype(np.float64)).max(axis=1)
    if not np.isfinite(delta).all():
        return float("inf"), float("inf")
    scale = np.abs(expected.astype(np.float64)).max(axis=1)
    scale = np.maximum(scale, np.median(scale))
    relative = np.divide(delta, scale, out=np.where(delta > 0, np.inf, 0.0), where=scale > 0)
    return float(delta.max()), float(relative.max())


def by_token(key: str, output: NDArray, valid: NDArray[np.bool_]) -> NDArray:
    """Values of an output [tokens, values] with a row per token that is not padding."""
    if key.startswith("present."):  # [B, G, C, D]: all heads of a token are one row
        output, valid = (np.moveaxis(each, 1, 2) for each in (output, valid))
        output, valid = (each.reshape(*each.shape[:2], -1) for each in (output, valid))
    return output[valid[..., 0]]


def difference_of_norms(got: NDArray, expected: NDArray) -> float:
    """Root mean square over rows [N, values] of ‖difference‖ / ‖reference‖; infinite if not finite.

    As in `difference_by_token`, a row of less than the median norm counts as one of that.
    """
    if expected.size == 0:
        return 0.0
    wide = expected.astype(np.float64)
    delta = np.linalg.norm(got.astype(np.float64) - wide, axis=1)
    if not np.isfinite(delta).all():
        return float("inf")
    scale = np.linalg.norm(wide, axis=1)
    scale = np.maximum(scale, np.median(scale))
    far = np.divide(delta, scale, out=np.where(delta > 0, np.inf, 0.0), where=scale > 0)
    return float(np.sqrt(np.mean(far**2)))


def difference_of_proportions(scores: NDArray, reference: NDArray) -> float:
    """‖scores·c - reference‖ / ‖reference‖ with the factor c that makes it least: 0…1.

    Infinite if something is not finite; 0 where the reference is.
    """
    if not (np.isfinite(scores).all() and np.isfinite(reference).all()):
        return float("inf")
    norms = [float(np.linalg.norm(side)) for side in (scores, reference)]
    if norms[1] == 0:
        return 0.0
    if norms[0] == 0:
        return 1.0
    mine, theirs = scores / norms[0], reference / norms[1]
    return float(np.linalg.norm(mine * (mine @ theirs) - theirs))


def past_lengths_of(output: str) -> str:
    """Key of the past lengths [B] of one output of decode.onnx, which tell its padding.

    No input of the graph: that has the lengths of all segments in one tensor.
    """
    return f"past_lengths of {output}"


def valid_places(key: str, stage: Stage, shape: Sequence[int]) -> NDArray[np.bool_]:
    """Entries of an output that are not padding, bool of its shape."""
    lengths = stage.inputs.get("lengths")
    if key.startswith("present."):
        axis = 2
        new, past = stage.inputs["lengths"], stage.inputs.get("past_lengths")
        lengths = new + past if past is not None else stage.inputs[past_lengths_of(key)] + 1
    elif key in _OF_TOKENS:
        axis = 1
    else:
        return np.ones(shape, bool)
    if lengths is None:
        return np.ones(shape, bool)
    inside = np.arange(shape[axis]) < lengths[:, None]
    places = [1] * len(shape)
    places[0], places[axis] = shape[0], shape[axis]
    return np.broadcast_to(inside.reshape(places), shape)


def tied(scores: NDArray, reference: NDArray) -> NDArray[np.bool_]:
    """Whether the rank of each token lies within the error, bool [N].

    A token's error is the difference between its two scores; two tokens may change places if their
    distance is at most the sum of their errors. A factor common to all scores changes no rank and
    is divided out first.
    """
    some = scores > 0
    factor = np.median(reference[some] / scores[some]) if some.any() else 1.0
    error = np.abs(scores * factor - reference)
    low, high = reference - error, reference + error
    order = np.argsort(low, kind="stable")
    doubt = np.zeros(len(order), bool)
    top = None
    for token in order:
        if top is not None and low[token] <= high[top] and error[token] + error[top] > 0:
            doubt[token] = doubt[top] = True
        if top is None or high[token] > high[top]:
            top = token
    return doubt


def _indistinguishable_tokens(inputs: Mapping[str, NDArray], row: int) -> NDArray[np.int64]:
    """For each token of a row the first token that a method cannot distinguish from it, [S].

    Which of them is kept may depend on the last bit of a sum.
    """
    positions = inputs["position_ids"][row]
    parts = [inputs["hidden_states"][row], positions.reshape(-1, positions.shape[-1]).T.copy()]
    parts += [inputs[name][row][:, None] for name in ENCODER_SCORES if name in inputs]
    first: dict[bytes, int] = {}
    keys = (b"".join(part[token].tobytes() for part in parts) for token in range(len(parts[0])))
    return np.array([first.setdefault(key, token) for token, key in enumerate(keys)], np.int64)


def _visual_places(index: NDArray, visual: NDArray) -> NDArray[np.int64]:
    """Entries of `index` that are visual tokens, ascending."""
    index = index[index >= 0]
    return np.unique(index[visual[index]]).astype(np.int64)


def _inconsistencies(
    stage: Stage, got: Mapping[str, NDArray], merged: Tolerance | None = None
) -> list[str]:
    """Contradictions between a selection's outputs.

    Args:
        merged: tolerance of the hidden states if they are means of tokens; None if they must equal
            those of the kept tokens.
    """
    inputs, expected = stage.inputs, stage.outputs
    problems = []
    for key in ("keep_index", "hidden_states_out", "position_ids_out", "visual_mask_out"):
        if got[key].shape != expected[key].shape:
            return [f"{key} has the shape {list(got[key].shape)}"]
    if not np.array_equal(got["lengths_out"], expected["lengths_out"]):
        problems.append("lengths_out is wrong")
    index = got["keep_index"]
    real = np.arange(index.shape[1]) < expected["lengths_out"][:, None]
    if (index[~real] != -1).any() or (index[real] < 0).any():
        return [*problems, "keep_index is not padded with -1"]
    at = np.where(real, index, 0)
    take = np.take_along_axis
    if (np.diff(at, axis=1)[real[:, 1:]] <= 0).any():
        problems.append("keep_index is not in ascending order")
    moved = np.where(real[..., None], take(inputs["hidden_states"], at[..., None], axis=1), 0)
    if merged is not None:
        far = difference(got["hidden_states_out"], expected["hidden_states_out"])[1]
        if not far <= merged.relative:
            problems.append(f"hidden_states_out differs by {far:.1e}")
    elif not np.array_equal(got["hidden_states_out"], moved.astype(got["hidden_states_out"].dtype)):
        problems.append("hidden_states_out is not what keep_index says")
    if not np.array_equal(got["visual_mask_out"], take(inputs["visual_mask"], at, axis=1) & real):
        problems.append("visual_mask_out is not what keep_index says")
    renumbered = np.where(real, np.arange(index.shape[1]), 0)
    old = inputs["position_ids"]
    if old.ndim == 3:  # three per token
        original = np.where(real[:, None], take(old, np.repeat(at[:, None], 3, axis=1), axis=2), 0)
    else:
        original = np.where(real, take(old, at, axis=1), 0)
    # The reference's positions tell which of the two rules the bundle uses.
    rule = renumbered if np.array_equal(expected["position_ids_out"], renumbered) else original
    if not np.array_equal(got["position_ids_out"], rule):
        problems.append("position_ids_out is wrong")
    if "feature_index" in inputs:
        own = np.where(real, take(inputs["feature_index"], at, axis=1), -1)
        if not np.array_equal(got["feature_index_out"], own):
            problems.append("feature_index_out is not what keep_index says")
    return problems


def _summary(problems: Sequence[str]) -> str:
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    return f"{problems[0]}{more}" if problems else ""
