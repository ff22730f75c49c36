"""The command: a bundle is found or made, measured, and the figures are shown and written."""

from __future__ import annotations

import contextlib
import json
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from trio_deploy.bench import chart
from trio_deploy.bench.runner import Options, measure, sweep
from trio_deploy.bench.synthetic import model_of, write_checkpoint
from trio_deploy.bench.table import to_markdown
from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.export.job import export_model
from trio_deploy.files import write_atomically


def bench(
    bundle: Path | None,
    options: Options,
    *,
    size: str | None = None,
    schedule: str | None = None,
    dtype: str | None = None,
    dialect: str | None = None,
    cache: Path | None = None,
    images: Sequence[int] | None = None,
    out: Path | None = None,
    command: str = "trio bench",
    progress: bool = True,
) -> dict[str, Any]:
    """Measure a bundle, or random weights of a size; write the figures where `out` says.

    Args:
        bundle: folder of a bundle; None where `size` is given.
        size: `d=1024,layers=16,vocab=32000`, or a recipe whose sizes are taken.
        schedule, dtype, dialect: of the bundle that is exported for a size.
        cache: where checkpoints and bundles of sizes stay; None deletes them afterwards.
        images: numbers of pictures to sweep over; None measures `options.images` alone.
        out: `NAME.json`, `NAME.md` and, with matplotlib, `NAME.png` are written for out NAME.
        command: what the written files name as their origin.

    Raises:
        TrioError: neither or both of bundle and size; what `export` and `measure` raise.
    """
    if (bundle is None) == (size is None):
        raise TrioError("pass either a bundle's folder, or --size for random weights")
    if out is not None and not out.absolute().parent.is_dir():
        raise TrioError(f"--out cannot write {out}: there is no folder {out.parent}")
    with contextlib.ExitStack() as stack:
        if size is not None:
            folder = cache or Path(stack.enter_context(tempfile.TemporaryDirectory()))
            loaded, checkpoint = make_bundle(
                size, folder, options, schedule=schedule, dtype=dtype, dialect=dialect,
                progress=progress,
            )  # fmt: skip
            options = replace(options, checkpoint=options.checkpoint or str(checkpoint))
        else:
            assert bundle is not None
            made = {"schedule": schedule, "dtype": dtype, "dialect": dialect, "cache": cache}
            if given := [f"--{name}" for name, value in made.items() if value]:
                raise TrioError(
                    f"{' and '.join(given)} belong{'s' * (len(given) == 1)} to --size: a bundle "
                    "has its own"
                )
            loaded = Bundle.load(bundle)
        if images is None:
            result = measure(loaded, options, progress=progress)
        else:
            result = sweep(loaded, options, images, progress=progress)
    result = {"command": command, **result}
    if out is not None:
        write(result, out)
    return result


def make_bundle(
    size: str,
    cache: Path,
    options: Options,
    *,
    schedule: str | None = None,
    dtype: str | None = None,
    dialect: str | None = None,
    progress: bool = True,
) -> tuple[Bundle, Path]:
    """A bundle with random weights for what the options measure with, and its checkpoint's folder.

    The schedule is the one given, else that of the first budget.

    Raises:
        TrioError: as `model_of`, `write_checkpoint` and `export`.
    """
    name, config, preprocessing = model_of(size)
    dtype = dtype or "float32"
    checkpoint = write_checkpoint(
        cache / (name if dtype == "float32" else f"{name}-{dtype}"),
        config,
        preprocessing,
        dtype=dtype,
        progress=progress,
    )
    target = options.target or {"openvino": "cpu-openvino"}.get(options.runtime or "", "cpu")
    loaded = export_model(
        checkpoint,
        cache / f"{checkpoint.name}-{dialect or Path(target).stem}",
        schedule=schedule,
        budget=None if schedule else next(filter(None, options.budgets), None),
        dtype=dtype,
        dialect=dialect,
        target=target,
        link_weights=True,
        force=True,
        progress=False,
    )
    return loaded, checkpoint


def shown_command(arguments: Sequence[str]) -> str:
    """The command line without this machine's folders: of an absolute path its last part."""

    def plain(argument: str) -> str:
        option, equals, value = argument.rpartition("=")
        return f"{option}{equals}{Path(value).name if Path(value).is_absolute() else value}"

    return shlex.join(["trio", *map(plain, arguments)])


def write(result: dict[str, Any], out: Path) -> list[Path]:
    """Figures, tables and, with matplotlib, the chart: `out` with .json, .md and .png behind it.

    Raises:
        TrioError: they cannot be written.
    """
    files = [out.with_name(f"{out.name}.{ending}") for ending in ("json", "md", "png")]
    drawn = chart.available()
    try:
        write_atomically(files[0], (json.dumps(result, indent=1) + "\n").encode())
        if drawn:
            unfinished = files[2].with_name(f".{files[2].name}")
            chart.draw(result, unfinished)
            unfinished.replace(files[2])
        text = to_markdown(result, result["command"], files[2].name if drawn else None)
        write_atomically(files[1], text.encode())
    except OSError as error:
        raise TrioError(f"cannot write the figures to {out}.* ({error.strerror})") from error
    return files if drawn else files[:2]
