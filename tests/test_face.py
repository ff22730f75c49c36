"""The package's face: public names, imported when they are first used."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from importlib import import_module
from pathlib import Path

import pytest

import trio_deploy

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "openvino", "torch", "PIL", "tokenizers")


def python(program: str) -> str:
    return subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True
    ).stdout


def test_importing_the_package_loads_nothing_else():
    loaded = python("import sys, trio_deploy; dir(trio_deploy); print(*sys.modules)").split()
    assert not {name for name in loaded if name.split(".")[0] in HEAVY}
    assert [name for name in loaded if name.startswith("trio_deploy")] == ["trio_deploy"]


@pytest.mark.parametrize("name", trio_deploy.__all__)
def test_public_names_resolve_and_are_listed(name):
    assert getattr(trio_deploy, name).__name__ == name
    assert name in dir(trio_deploy)


@pytest.mark.parametrize("name", trio_deploy.__all__)
def test_no_module_of_the_package_takes_a_public_name(name):
    root = Path(trio_deploy.__file__).parent
    assert not (root / name).exists() and not (root / f"{name}.py").exists()


def test_public_names_are_what_their_modules_define():
    scenes = import_module("trio_deploy.evaluation.scenes")  # sets `trio_deploy.evaluation`
    assert trio_deploy.evaluation.scenes is scenes
    assert callable(trio_deploy.evaluate)


def test_type_checkers_find_names_where_they_are_imported_from():
    tree = ast.parse(Path(trio_deploy.__file__).read_text(encoding="utf-8"))
    known = {
        alias.name: node.module
        for block in tree.body
        if isinstance(block, ast.If)
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert known == trio_deploy._MODULES and sorted(known) == sorted(trio_deploy.__all__)


def test_all_names_can_be_imported_at_once():
    names = python("from trio_deploy import *; print(*dir())").split()
    assert set(trio_deploy.__all__) <= set(names)


def test_an_unknown_name_is_refused():
    with pytest.raises(AttributeError, match="'trio_deploy' has no attribute 'Engine'"):
        _ = trio_deploy.Engine


def test_the_guide_lists_every_public_name():
    _, _, names = GUIDE.partition("## Public names")
    listed = re.findall(r"^\| `(\w+)` \| (.+) \|$", names, re.MULTILINE)
    assert [name for name, _ in listed] == trio_deploy.__all__
    assert len({what for _, what in listed}) == len(listed)


def test_the_reference_has_every_public_name():
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    named = re.findall(r"^::: trio_deploy\.(\w+)$", page, re.MULTILINE)
    assert named == trio_deploy.__all__


def test_the_guides_program_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    (program,) = re.findall(r"^```python\n(.*?)^```$", GUIDE, re.MULTILINE | re.DOTALL)
    exec(compile(program, "docs/python.md", "exec"), {})
    out = capsys.readouterr().out
    assert "Estimate(value=" in out
    assert "white [" in out and out.count("['square', 'square']") == 2
