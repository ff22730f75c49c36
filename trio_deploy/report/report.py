"""`trio report`: one self-contained page about a bundle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trio_deploy.bench.measure import BenchOptions
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.config.options import RuntimeOptions
from trio_deploy.errors import TrioError
from trio_deploy.files import write_atomically
from trio_deploy.pipeline.pipeline import Pipeline
from trio_deploy.report import gather
from trio_deploy.report.gather import Asked
from trio_deploy.report.page import render

__all__ = ["Asked", "Wanted", "asked_about", "write_report"]

_QUESTIONS_A_SCENE = 16
_PATIENCE_S = 300.0  # how long answers of a quick accuracy run may take, as far as can be told


@dataclass(frozen=True)
class Wanted:
    """What the page shows, and what is measured for it.

    Attributes:
        bench, evaluation: files of `trio bench` and `trio eval`; None measures a little now.
        asked: questions whose kept tokens are drawn; empty takes generated scenes.
        check, measure: whether to compare with the reference and to measure time now.
        scenes: generated scenes to ask about for a quick accuracy; 0 for none.
        runtime, provider, threads: as `Pipeline.open` takes them.
    """

    bench: Path | None = None
    evaluation: Path | None = None
    asked: Sequence[Asked] = ()
    check: bool = True
    measure: bool = True
    scenes: int = 10  # fewer give no intervals
    runtime: str | None = None
    provider: str | None = None
    threads: int | None = None


def asked_about(images: Sequence[Path], prompts: Sequence[str]) -> list[Asked]:
    """A question for each picture, or one of either for all of the others.

    Raises:
        TrioError: pictures without questions or the other way round, or numbers that do not fit.
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


def write_report(
    bundle: Bundle | Path, out: Path, wanted: Wanted | None = None, *, progress: bool = True
) -> Path:
    """Write the page about a bundle; it is there wholly or not at all.

    Raises:
        TrioError: the bundle or one of the files does not load, a picture cannot be read, or the
            page cannot be written.
    """
    loaded = bundle if isinstance(bundle, Bundle) else Bundle.load(bundle)
    if not out.absolute().parent.is_dir() or out.is_dir():
        raise TrioError(f"--out cannot write {out}: name a file in a folder that is there")
    if out.resolve().is_relative_to(loaded.path.resolve()):
        raise TrioError(f"--out {out} lies in the bundle, whose files it could replace")
    page = render(_gather(loaded, wanted or Wanted(), progress))
    try:
        write_atomically(out, page.encode())
    except OSError as error:
        raise TrioError(f"cannot write the page to {out} ({error.strerror})") from error
    return out


def _gather(bundle: Bundle, wanted: Wanted, progress: bool) -> dict[str, Any]:
    parts = {
        "bundle": gather.exported(bundle),
        "schedule": gather.schedule(bundle),
        "arithmetic": gather.arithmetic(bundle),
    }
    planned = bundle.manifest.weights == "planned"
    if planned:
        reason = "The bundle has no weights yet: complete it with `trio attach-weights`."
        parts |= {part: {"skipped": reason} for part in ("parity", "cost", "accuracy", "answers")}
    else:
        parts |= _run(bundle, wanted, progress)
    # Figures that were measured elsewhere need no weights here.
    if wanted.bench or (wanted.measure and not planned):
        options = BenchOptions(
            new_tokens=8,
            runs=3,
            warm_up=1,
            baselines=(),
            runtime=RuntimeOptions(**_runtime(wanted)),
        )
        parts["cost"] = gather.cost(bundle, wanted.bench, options, progress)
    if wanted.evaluation:
        parts["accuracy"] = gather.accuracy(bundle, wanted.evaluation, 0, {}, progress)
    return parts


def _run(bundle: Bundle, wanted: Wanted, progress: bool) -> dict[str, Any]:
    """Everything that asks the model itself."""
    runtime = _runtime(wanted)
    pipeline = Pipeline.open(bundle, **runtime)
    asked = wanted.asked or gather.default_questions()
    shown = gather.answers(pipeline, asked)
    del pipeline
    skipped = {"skipped": "Left out."}
    parts = {"answers": shown, "cost": skipped, "accuracy": skipped, "parity": skipped}
    if wanted.check:
        parts["parity"] = gather.check(bundle, runtime)
    if wanted.evaluation is None and wanted.scenes:
        # Each question is asked about once a budget and once of the unpruned model.
        expected = shown["seconds"] / len(asked) * wanted.scenes * _QUESTIONS_A_SCENE * 2
        if expected > _PATIENCE_S:
            parts["accuracy"] = {
                "skipped": f"Not measured: {wanted.scenes * _QUESTIONS_A_SCENE} questions would "
                f"take about {expected / 60:.0f} minutes here; run trio eval and pass its results "
                "as --eval."
            }
        else:
            parts["accuracy"] = gather.accuracy(bundle, None, wanted.scenes, runtime, progress)
    return parts


def _runtime(wanted: Wanted) -> dict[str, Any]:
    return {
        "runtime": wanted.runtime,
        "provider": wanted.provider,
        "threads": wanted.threads,
    }
