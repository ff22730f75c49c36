"""Documents name what exists: files of the repository, names of the package, sections of pages."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
DOCUMENTS = sorted(
    [
        *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "SECURITY.md", "CHANGELOG.md")),
        *(ROOT / f"{folder}/README.md" for folder in ("export", "engines", "examples")),
        *(ROOT / "docs").glob("*.md"),
        ROOT / "trio_deploy" / "data" / "tiny" / "README.md",
    ]
)
#: Folders that a path may begin with: those of the package are written without `trio_deploy/`.
FOLDERS = {path.name for path in ROOT.iterdir() if path.is_dir()}
ROOMS = {path.name for path in (ROOT / "trio_deploy").iterdir() if path.is_dir()}
#: Not in the repository: what commands of the documents write, and folders of a wheel.
MADE = ("out", "weights", "answers", "bundles", "engines/<", ".venv", "docs/measurements/gpu-")
MADE += ("trio_deploy/recipes", "trio_deploy/targets")

CODE = re.compile(r"`([^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")
COMMAND = re.compile(r"(?<![\w./-])(?:docs|examples|scripts|tests)/[\w./-]+\.\w+")
PATH = re.compile(r"\.?[\w.*-]+(?:/[\w.*<>-]+)*/?")
DOTTED = re.compile(r"\btrio_deploy(?:\.\w+)+")
IMPORT = re.compile(r"\bfrom (trio_deploy[\w.]*) import (\w+(?:, \w+)*)")
ROOM = re.compile(r"^\*\*`(\w+)/`: .*?(?=\n\n)", re.MULTILINE | re.DOTALL)
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)

documents = pytest.mark.parametrize(
    "document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix()
)


def names_a_file(text: str) -> bool:
    """Whether code in a document looks like a path of the repository."""
    if not PATH.fullmatch(text) or text.startswith(MADE):
        return False
    first, slash, _ = text.partition("/")
    if slash:
        return first in FOLDERS | ROOMS or text.endswith((".py", ".sh"))
    return text.endswith((".py", ".sh"))


def candidates(text: str, document: Path) -> list[Path]:
    """Places that a path in a document may mean."""
    folders = [ROOT, ROOT / "trio_deploy", document.parent]
    if "/" not in text:  # a file of a folder that the text around it names
        folders += [path for path in (ROOT / "trio_deploy").rglob("*") if path.is_dir()]
        folders += [ROOT / "tests", ROOT / "scripts", ROOT / "scripts" / "gpu"]
    return [found for folder in folders for found in folder.glob(text.rstrip("/"))]


def heading_anchors(document: Path) -> set[str]:
    """Anchors of a page's headings, as GitHub makes them."""
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    headings = re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    plain = (re.sub(r"[^\w\- ]", "", heading.lower()) for heading in headings)
    return {heading.replace(" ", "-") for heading in plain}


@documents
def test_files_that_a_document_names_exist(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    named = {*filter(names_a_file, CODE.findall(text)), *COMMAND.findall(text)}
    named = {name for name in named if not name.startswith(MADE)}
    assert not [name for name in sorted(named) if not candidates(name, document)]


@documents
def test_names_of_the_package_import(document: Path) -> None:
    text = document.read_text(encoding="utf-8")
    imported = [
        f"{module}.{name}" for module, names in IMPORT.findall(text) for name in names.split(", ")
    ]
    for name in sorted({*DOTTED.findall(text), *imported}):
        module, parts = "trio_deploy", name.split(".")[1:]
        value: object = importlib.import_module(module)
        for part in parts:
            module = f"{module}.{part}"
            try:
                value = importlib.import_module(module)
            except ModuleNotFoundError as error:
                assert error.name == module, f"{name} needs {error.name}"
                assert hasattr(value, part), f"{document.name} names {name}"
                value = getattr(value, part)


@documents
def test_links_lead_somewhere(document: Path) -> None:
    for link in LINK.findall(FENCE.sub("", document.read_text(encoding="utf-8"))):
        if "://" in link:
            continue
        path, _, anchor = link.partition("#")
        target = document.parent / path if path else document
        assert target.exists(), f"{document.name} links to {link}"
        if anchor:
            assert anchor in heading_anchors(target), f"{document.name} links to {link}"


def test_architecture_describes_every_folder_and_files_that_it_has() -> None:
    """`name.py` in the paragraph of a folder is a file of that folder."""
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    rooms = {match[1]: match[0] for match in ROOM.finditer(text)}
    packages = {path.parent.name for path in (ROOT / "trio_deploy").glob("*/__init__.py")}
    assert set(rooms) == packages - {"triton"}  # import paths of old Triton repositories
    for room, paragraph in rooms.items():
        for name in filter(re.compile(r"\w+\.py").fullmatch, CODE.findall(paragraph)):
            assert list((ROOT / "trio_deploy" / room).rglob(name)), f"{room} has no {name}"


def test_a_wrong_name_is_found(tmp_path: Path) -> None:
    document = tmp_path / "page.md"
    text = (
        "See `trio_deploy/runtime/trt.py`, `runtimes/ort.py`, `old_module.py`, `export/*.yaml`.\n"
    )
    document.write_text(text + "[below](#a-section-of-its-own)\n\n## A section of its own\n")
    named = [name for name in CODE.findall(text) if names_a_file(name)]
    assert [name for name in named if not candidates(name, document)] == named[:3]
    test_links_lead_somewhere(document)
    document.write_text("[gone](#a-section)\n")
    with pytest.raises(AssertionError, match="links to #a-section"):
        test_links_lead_somewhere(document)
