"""`trio report`: one self-contained page about a bundle."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.export.cache import find_bundle
from trio_deploy.files import is_folder, write_atomically
from trio_deploy.report.gather import ReportOptions, gather, require_readable
from trio_deploy.report.page import render


def write_report(
    bundle: Bundle | str | Path,
    out: Path,
    options: ReportOptions | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Write the page about a bundle, completely or not at all.

    Args:
        bundle: as of `Pipeline.open`.

    Raises:
        TrioError: the bundle or one of the files does not load, a picture cannot be read, or the
            page cannot be written.
    """
    if not is_folder(out.absolute().parent) or is_folder(out):
        raise TrioError(f"--out cannot write {out}: name a file in a folder that exists")
    options = options or ReportOptions()
    if isinstance(bundle, Bundle):
        loaded = bundle
    else:
        loaded = Bundle.load(
            find_bundle(
                bundle,
                options.runtime,
                to_run=True,
                before_export=partial(require_readable, options, str(bundle)),
                progress=progress,
            )
        )
    if out.resolve().is_relative_to(loaded.path.resolve()):
        raise TrioError(f"--out {out} lies in the bundle, whose files it could replace")
    page = render(gather(loaded, options, progress=progress))
    write_atomically(out, page.encode())
    return out
