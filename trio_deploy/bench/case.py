"""One line of a measurement: what is measured (`Case`), and the cost of one answer (`Run`)."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from trio_deploy.bundle.manifest import kind_of_label
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.pipeline.ran_as import RanAs

BASELINES = ("transformers", "oracle", "genai", "llama.cpp")

#: The groups of tables and charts by the kind of stage, in the order they run.
_GROUP_OF_KIND = {
    "preprocess": "preprocess",
    "vision": "vision",
    "embed": "embed",
    "prefill": "layers",
    "select": "selection",
}
GROUPS = tuple(_GROUP_OF_KIND.values())
OTHER = "other"


@dataclass(frozen=True)
class Case:
    """One line of the table.

    Attributes:
        name: key in the results, unique.
        kind: `trio`, or one of `BASELINES`.
        bundle: folder of the bundle.
        budget: share of visual tokens; None: the bundle's schedule, 1: no pruning.
        options: how the bundle is run.
        checkpoint: folder of the checkpoint, for OpenVINO GenAI; what is made of it lies beside it.
        python: interpreter that has OpenVINO GenAI, or llama.cpp.
        pruning_ratio: per cent of the visual tokens that GenAI's own pruner is told to drop.
        halves: whether that pruner chooses in each half of a picture's tokens, as it does unless
            told otherwise, or among all of them.
        weights: type of llama.cpp's weights.
        server: a llama-server to ask; None: the build in `python`.
    """

    name: str
    kind: str
    bundle: str
    budget: float | None = None
    options: RuntimeOptions = field(default_factory=RuntimeOptions)
    checkpoint: str | None = None
    python: str | None = None
    pruning_ratio: int | None = None
    halves: bool = True
    weights: str | None = None
    server: str | None = None

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Case:
        return cls(**{**raw, "options": RuntimeOptions(**raw["options"])})


@dataclass(frozen=True)
class Run:
    """The cost of one answer.

    Attributes:
        stages: seconds per stage, by its label, up to the first token, in order.
        first_token_s: seconds from the call to the first token; at least the sum of the stages.
        tokens_per_s: tokens per second after the first one; 0 if there is none.
        prompt_tokens, visual_tokens: before pruning; 0 if the baseline does not report them.
        keep: visual tokens kept at each pruning point.
        layer_ranges: (first, stop, tokens) per range of layers.
        kv_bytes: bytes of keys and values at the end of the prefill.
        precision: float type that the layers were computed in.
        ran_as: runtime, target, types and device, read back where the software tells.
        remark: what else is to be said of the case.
        peak_mib: MiB, peak memory of the contender's own process, if it has one.
    """

    stages: dict[str, float]
    first_token_s: float
    tokens_per_s: float
    prompt_tokens: int = 0
    visual_tokens: int = 0
    keep: tuple[int, ...] = ()
    layer_ranges: tuple[tuple[int, int, int], ...] = ()
    kv_bytes: int | None = None
    precision: str = ""
    ran_as: RanAs | None = None
    remark: str = ""
    peak_mib: float | None = None

    @property
    def groups(self) -> dict[str, float]:
        """Seconds per group of `GROUPS`, then `OTHER`: time that belongs to no stage."""
        result = dict.fromkeys(GROUPS, 0.0)
        for stage, seconds in self.stages.items():
            result[_GROUP_OF_KIND[kind_of_label(stage)]] += seconds
        result[OTHER] = max(0.0, self.first_token_s - sum(self.stages.values()))
        return result

    @property
    def prefill_s(self) -> float:
        """Seconds of the language model up to its first logits: embedding, layers, selections."""
        groups = self.groups
        return groups["embed"] + groups["layers"] + groups["selection"]


@contextlib.contextmanager
def timed(
    stages: dict[str, float], name: str, now: Callable[[], float] = time.perf_counter
) -> Iterator[None]:
    """Add the seconds spent inside to a stage."""
    start = now()
    yield
    stages[name] = stages.get(name, 0.0) + now() - start
