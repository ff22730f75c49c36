"""What a release says of itself: one version, its changes, how it is cited."""

from __future__ import annotations

import re
from pathlib import Path

import yaml

import trio_deploy

ROOT = Path(__file__).parent.parent
CHANGES = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
HEADING = re.compile(r"^## \[(.+?)\](?: - (\S.*))?$", re.MULTILINE)
KINDS = {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_newest_version_of_the_changelog_is_that_of_the_package() -> None:
    versions = [found for found in HEADING.findall(CHANGES) if found[0] != "Unreleased"]
    assert versions[0][0] == trio_deploy.__version__
    numbers = [tuple(map(int, version.split("."))) for version, _ in versions]
    assert numbers == sorted(numbers, reverse=True)
    assert all(re.fullmatch(r"\d{4}-\d\d-\d\d|not released", date) for _, date in versions)
    assert "not released" not in [date for _, date in versions[1:]]


def test_changes_are_of_the_kinds_that_keep_a_changelog_has() -> None:
    assert set(re.findall(r"^### (.+)$", CHANGES, re.MULTILINE)) <= KINDS


def test_no_other_file_has_the_version() -> None:
    files = [ROOT / name for name in ("pyproject.toml", "CITATION.cff", "mkdocs.yml", "Makefile")]
    files += [path for path in (ROOT / "deploy").rglob("*") if path.is_file()]
    version = re.compile(rf"(?<![\d.]){re.escape(trio_deploy.__version__)}(?![\d.])")
    assert not [path for path in files if version.search(path.read_text(encoding="utf-8"))]


def test_the_citation_has_what_its_format_requires() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["cff-version"] == "1.2.0" and citation["message"]
    paper = citation["preferred-citation"]
    for work in (citation, paper):
        assert work["title"] and work["type"]
        for author in work["authors"]:
            assert {"name"} == set(author) or {"given-names", "family-names"} == set(author)
    assert paper["url"].endswith("2602.04657")
    licence = (ROOT / "LICENSE").read_text(encoding="utf-8")
    assert citation["license"] == "Apache-2.0" and "Apache License" in licence
