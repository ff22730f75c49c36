"""Rooms import lower rooms only, nothing imports in circles, heavy packages keep their places."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trio_deploy"
ROOT = PACKAGE.parent
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# The face imports every room, lazily; `python -m trio_deploy` is the command line.
OUTSIDE = {"trio_deploy", "trio_deploy.__main__"}

#: From the ground up: a room imports lower ones.
ROOMS = (
    "errors",
    "files",
    "schedule",
    "config",
    "quant",
    "families",
    "checkpoint",
    "bundle",
    "graphs",
    "selection",
    "runtimes",
    "export",
    "reference",
    "pipeline",
    "cost",
    "verify",
    "bench",
    "evaluation",
    "report",
    "serve",
    "triton",  # import paths of Triton repositories written before 0.2
    "cli",
)
#: They meet in the stage contract, so that each can be replaced without the others.
APART = ({"graphs", "selection"}, {"reference"}, {"runtimes", "pipeline"})

#: Where a package may be imported, as prefixes of module names; "lazily": within functions alone.
ALLOWED = {
    "torch transformers safetensors torchvision": ("reference", "verify", "bench.contenders"),
    "onnx onnx_ir onnxscript": (
        "graphs",
        "selection.stage",
        "export",
        "runtimes.tensorrt.build",
        "runtimes.tensorrt.bindings",
        "runtimes.tensorrt.dry_run",
        # They count the memory of activations, which graphs alone tell.
        "runtimes.tensorrt.memory",
        "cost.device_memory",
    ),
    "starlette uvicorn httptools": ("serve.openai",),
    "llguidance": ("pipeline.grammar",),
    "onnxruntime": ("runtimes.onnxruntime",),
    # The last is a program for an environment with OpenVINO GenAI, which has no trio_deploy.
    "openvino openvino_genai": (
        "runtimes.openvino",
        "runtimes.openvino_passes",
        "bench.genai_child",
    ),
    "tensorrt tensorrt_rtx_bindings": ("runtimes.tensorrt.bindings",),
    "cuda": ("runtimes.tensorrt.device",),
}
LAZY = {"llguidance", "onnxruntime", "openvino", "tensorrt", "cuda"}


def room(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def imports(module: str) -> Iterator[tuple[str, bool]]:
    """Yield (dotted name, whether at module level) of every import, wherever it stands."""
    path = MODULES[module]
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]

    def visit(node: ast.AST, top: bool) -> Iterator[tuple[str, bool]]:
        if isinstance(node, ast.Import):
            yield from ((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package.rsplit(".", node.level - 1)[0] if node.level else ""
            source = ".".join(filter(None, [base, node.module]))
            yield from ((f"{source}.{alias.name}", top) for alias in node.names)
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            yield from visit(child, inner)

    yield from visit(ast.parse(path.read_text(encoding="utf-8")), True)


def module_of(name: str) -> str:
    """Return the module of the package that an imported name is, or is a part of."""
    while name not in MODULES:
        name = name.rpartition(".")[0]
    return name


GRAPH: Mapping[str, set[str]] = {
    module: {
        found
        for name, _ in imports(module)
        if name.split(".")[0] == "trio_deploy"
        and (found := module_of(name)) not in {module, "trio_deploy"}
    }
    for module in MODULES
    if module not in OUTSIDE
}


def circles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """Return the strongly connected components of more than one node (Tarjan's algorithm)."""
    number: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(node: str) -> None:
        number[node] = low[node] = len(number)
        stack.append(node)
        for other in sorted(graph.get(node, ())):
            if other not in number:
                visit(other)
            if other in stack:
                low[node] = min(low[node], low[other])
        if low[node] == number[node]:
            component = stack[stack.index(node) :]
            del stack[stack.index(node) :]
            if len(component) > 1:
                found.append(sorted(component))

    for node in sorted(graph):
        if node not in number:
            visit(node)
    return found


def test_circles_are_found() -> None:
    assert circles({"a": {"b"}, "b": {"c"}, "c": {"b"}, "d": {"a"}}) == [["b", "c"]]
    assert circles({"a": {"b"}, "b": set()}) == []


def test_every_room_has_a_floor() -> None:
    rooms = {room(module) for module in MODULES if module not in OUTSIDE}
    assert rooms == set(ROOMS), "give each room a floor in tests/test_imports.py"


@pytest.mark.parametrize("module", GRAPH)
def test_imports_point_one_way(module: str) -> None:
    here = room(module)
    apart = next((group for group in APART if here in group), set())
    for other in GRAPH[module]:
        there = room(other)
        assert ROOMS.index(there) <= ROOMS.index(here), f"{module} imports {other}, a higher room"
        for group in APART:
            if apart and group is not apart:
                assert there not in group, f"{module} imports {other}"


def test_no_files_import_each_other_in_circles() -> None:
    assert circles(GRAPH) == []


def test_no_rooms_import_each_other_in_circles() -> None:
    rooms: dict[str, set[str]] = {}
    for module, others in GRAPH.items():
        rooms.setdefault(room(module), set()).update({room(other) for other in others})
    assert circles({name: others - {name} for name, others in rooms.items()}) == []


@pytest.mark.parametrize("module", GRAPH)
def test_heavy_packages_stay_where_they_belong(module: str) -> None:
    for packages, places in ALLOWED.items():
        for name, top in imports(module):
            if (package := name.split(".")[0]) in packages.split():
                prefixes = [f"trio_deploy.{place}" for place in places]
                inside = any(module == p or module.startswith(f"{p}.") for p in prefixes)
                assert inside, f"{module} imports {package}"
                assert not (top and package in LAZY), f"{package} is imported within functions"


def loaded_by(program: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after a program."""
    code = f"import sys\n{program}\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_help_and_every_command_start_without_torch() -> None:
    """Importing the rooms, `check` of recorded answers included, loads no torch and no engine."""
    rooms = "cli.main cost.plan export.job verify.check bench.measure pipeline.pipeline".split()
    loaded = loaded_by("\n".join(f"import trio_deploy.{name}" for name in rooms))
    assert not loaded & {"torch", "transformers", "onnxruntime", "openvino", "tensorrt", "cuda"}


def test_the_command_line_starts_without_numpy() -> None:
    assert "numpy" not in loaded_by("import trio_deploy.cli.main")


def test_tests_import_no_tests() -> None:
    """What several tests need lies in tests/support."""
    for path in sorted((ROOT / "tests").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("tests"):
                assert (node.module or "").split(".")[1:2] == ["support"], f"{path}: {node.module}"
