"""Hook of mkdocs (mkdocs.yml): the site's pages are the repository's documents, at their paths.

mkdocs takes pages from one folder, but documents link to files of the whole repository. So the site
has every document where the repository has it, and each file that one of them links to.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("*.md", "docs/**/*.md", "export/*.md", "engines/*.md", "examples/*.md")
PAGES += ("trio_deploy/data/tiny/*.md",)
LINK = re.compile(r"\]\(([^)\s#]+)[^)\s]*\)")


def on_files(files: Files, config: Any) -> Files:
    """All documents, and the files that they link to, beside those of the theme."""
    pages = {path for pattern in PAGES for path in ROOT.glob(pattern)}
    linked = {target for page in pages for target in _linked_files(page)}
    theme = [file for file in files if not (file.src_dir or "").startswith(str(ROOT / "docs"))]
    own = [
        File(
            path.relative_to(ROOT).as_posix(),
            str(ROOT),
            config.site_dir,
            config.use_directory_urls,
        )
        for path in sorted(pages | linked)
    ]
    return Files([*theme, *own])


def _linked_files(page: Path) -> set[Path]:
    """Files of the repository that a page links to; mkdocs reports links that lead nowhere."""
    links = LINK.findall(page.read_text(encoding="utf-8"))
    targets = {(page.parent / link).resolve() for link in links if "://" not in link}
    return {target for target in targets if target.is_file() and target.is_relative_to(ROOT)}
