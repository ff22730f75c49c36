"""Whether a model fits a device as TensorRT engines, and what would make it fit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache

import onnx

from trio_deploy.bundle.manifest import StageInfo
from trio_deploy.config.target import Limits, Target, list_targets
from trio_deploy.errors import TrioError
from trio_deploy.export.graphs import planned_graphs
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.registry import check_positions
from trio_deploy.files import format_bytes
from trio_deploy.graphs.options import GraphOptions
from trio_deploy.runtimes.registry import load_target, runtime_spec
from trio_deploy.runtimes.tensorrt.memory import Fit, Memory, memory
from trio_deploy.runtimes.tensorrt.target import require_engines, target_dialects
from trio_deploy.schedule.schedule import Schedule

_SMALL_TEXT, _SMALL_ANSWER = 256, 128  # tokens of a question and of a short answer


def fit(
    config: ModelConfig,
    schedule: Schedule,
    target: Target,
    budgets: Mapping[float, Schedule] | None = None,
) -> Fit:
    """Memory of both decode layouts on a target, and advice if its own does not fit.

    Args:
        budgets: the recipe's schedules at the same pruning points, which requests may ask for.

    Raises:
        TrioError: the target has no engines, or its limits do not suit the model.
    """
    require_engines(target)
    model = _Model(config, schedule, budgets)
    layouts = (model.memory(target), model.memory(_other_layout(target)))
    result = Fit(target, layouts)
    if result.fits is False:
        return replace(result, advice=tuple(_advice(model, result)))
    return result


@lru_cache(maxsize=4)
def _graphs(
    config: ModelConfig, schedule: Schedule, options: GraphOptions
) -> tuple[tuple[StageInfo, ...], dict[str, onnx.ModelProto]]:
    """The stages of a model and their graphs, which one plan needs several times."""
    made = planned_graphs(config, schedule.points, options)
    graphs = {stage.name: onnx.load_model_from_string(content) for stage, content in made}
    return tuple(stage for stage, _ in made), graphs


def planned(
    config: ModelConfig,
    schedule: Schedule,
    target: Target,
    budgets: Mapping[float, Schedule] | None,
) -> Memory:
    """Memory of a model on a target, with the target's decode layout and weights.

    Raises:
        TrioError: the target's limits do not suit the model.
    """
    if target.quantize:  # as an export does
        target = replace(target, weights="constants")
    options = GraphOptions(
        dialect=target.dialect,
        dtype=target.dtype,  # type: ignore[arg-type]  # of a checked target
        weights=target.weights,  # type: ignore[arg-type]
        positions=check_positions(config, None),  # type: ignore[arg-type]
        separate_decode=target.decode_layout == "separate",
        quantize=target.quantize,
        selections=target.selections or "int8",  # type: ignore[arg-type]  # of a checked target
        embeddings=target.embeddings,  # type: ignore[arg-type]  # of a checked target
    )
    stages, graphs = _graphs(config, schedule, options)
    return memory(stages, graphs, config, schedule, target, budgets)


@dataclass(frozen=True)
class _Model:
    """A model pruned by a schedule."""

    config: ModelConfig
    schedule: Schedule
    budgets: Mapping[float, Schedule] | None

    def memory(self, target: Target) -> Memory:
        """Memory of the model on a target."""
        return planned(self.config, self.schedule, target, self.budgets)


def _other_layout(target: Target) -> Target:
    if target.decode_layout == "separate":
        return replace(target, decode_layout="shared", dialect="primitive", weights="constants")
    dialect = target_dialects(target)[0]
    return replace(target, decode_layout="separate", dialect=dialect)


def _advice(model: _Model, result: Fit) -> Iterator[str]:
    """Changes that would make it fit, the smallest first."""
    target, usable = result.target, result.usable
    assert usable is not None
    if result.fits_if_fused:
        yield (
            "it fits if TensorRT runs every Attention node as one kernel, and not if it splits "
            "one, which it may if no such kernel takes the type, head size or mask"
        )
    best, layout = target, ""
    if result.layouts[1].total < result.layouts[0].total:
        best = _other_layout(target)
        layout = f"`decode_layout: {best.decode_layout}` and `dialect: {best.dialect}`"
        if result.layouts[1].total <= usable:
            yield f"it fits with {layout}, in a copy of the target's file (--target FILE)"
            return
    if (
        target.weights == "constants"
        and target.quantize is None
        and "onnx" in target_dialects(target)
    ):
        changed = replace(target, decode_layout="separate", dialect="onnx", weights="inputs")
        if model.memory(changed).total <= usable:
            yield (
                "it fits with `weights: inputs`, `dialect: onnx` and `decode_layout: separate`, in "
                "a copy of the target's file (--target FILE)"
            )
            return
    if target.embeddings == "device":
        needed = model.memory(replace(target, embeddings="host"))
        if needed.total <= usable:
            saved = format_bytes(result.layouts[0].all_weights - needed.all_weights)
            yield f"it fits with --embeddings host, which leaves out the table's {saved}"
            return
    weights = min(each.all_weights for each in result.layouts)
    if weights < usable:
        for changes in _smaller(target.limits):
            if (
                model.memory(replace(best, limits=replace(target.limits, **changes))).total
                <= usable
            ):
                written = ", ".join(f"{key} {value}" for key, value in changes.items())
                also = f" and {layout}" if layout else ""
                yield (
                    f"it fits with the limits {written}{also}, in a copy of the target's file "
                    "(--target FILE)"
                )
                return
    if target.selections == "float":
        needed = model.memory(replace(target, selections="int8"))
        if needed.total <= usable:
            yield (
                f"it fits with --selections int8, whose weights take "
                f"{format_bytes(needed.all_weights)}"
            )
            return
    schemes = runtime_spec(target.runtime).readable_schemes(target)
    for scheme in schemes if target.quantize is None else ():
        needed = model.memory(replace(target, quantize=scheme))
        if needed.total <= usable:
            yield (
                f"it fits with --quantize {scheme}, whose weights take "
                f"{format_bytes(needed.all_weights)}"
            )
            return
    if weights < usable:
        request = min(each.total for each in result.layouts) - weights
        yield (
            f"the weights, {format_bytes(weights)}, and a request at these limits, "
            f"{format_bytes(request)}, exceed {format_bytes(usable)} together"
        )
    else:
        nor = ", nor do quantised weights" if target.quantize is None and schemes else ""
        yield (
            f"no budget or limit makes it fit{nor}: the weights alone take "
            f"{format_bytes(weights)}, and {target.name} has {format_bytes(usable)}"
        )
    room = usable - (min(each.total for each in result.layouts) - weights)
    if room > 0:
        yield f"requests at these limits leave {format_bytes(room)} for weights"
    other = _smallest_target(model, target, weights)
    if other is not None:
        yield f"the smallest target that fits it is {other}"


def _smaller(limits: Limits) -> Iterator[dict[str, int]]:
    """Limits lowered one after the other."""
    changes: dict[str, int] = {}
    for name, least in (
        ("max_batch", 1),
        ("max_images", 1),
        ("max_new_tokens", _SMALL_ANSWER),
        ("max_text_tokens", _SMALL_TEXT),
    ):
        if getattr(limits, name) > least:
            changes[name] = least
            yield dict(changes)


def _smallest_target(model: _Model, asked: Target, weights: int) -> str | None:
    """The shipped target with the least memory that fits the model; None if there is none.

    It has the runtime and the float type of the target that was asked about.
    """
    known = [load_target(name) for name in list_targets()]
    sized = [
        (t.usable_gib, t) for t in known if t.runtime == asked.runtime and t.usable_gib is not None
    ]
    for usable, target in sorted(sized, key=lambda pair: pair[0]):
        if usable * 2**30 < weights:
            continue
        try:
            same = replace(
                target,
                dtype=asked.dtype,
                quantize=asked.quantize,
                selections=asked.selections,
                embeddings=asked.embeddings,
            )
            needed = model.memory(same).total
        except TrioError:  # its limits do not suit the model
            continue
        if needed <= usable * 2**30:
            return target.name
    return None
