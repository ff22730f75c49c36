"""Rooms import in one direction, and torch stays out of everything that runs on a device."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "trio_deploy"
SOURCES = sorted(PACKAGE.rglob("*.py"))

# From the ground up: a room imports lower ones.
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
    "cli",
)
FLOORS = {name: floor for floor, name in enumerate(ROOMS)}
# Of the same floor, but apart from each other: each can be replaced without the others.
SEPARATE = {"reference", "graphs", "runtime"}

ONLY_THE_ORACLE = {"torch", "transformers", "safetensors", "torchvision"}
GRAPH_BUILDING = {"onnx", "onnx_ir", "onnxscript"}
TORCH_BASELINES = tuple(  # what bundles are measured against
    f"bench/contenders/{name}.py" for name in ("hf", "oracle", "torch_model")
)
ENGINES = {
    "onnxruntime": ("runtimes/onnxruntime.py",),
    # The second is a program for an environment with OpenVINO GenAI, which has no trio_deploy.
    "openvino": ("runtimes/openvino.py", "runtimes/openvino_passes.py", "bench/genai_child.py"),
    "tensorrt": ("runtimes/tensorrt/bindings.py",),
    "cuda": ("runtimes/tensorrt/device.py",),
}


def room(path: Path) -> str:
    relative = path.relative_to(PACKAGE)
    return relative.parts[0].removesuffix(".py")


def imports(path: Path) -> list[tuple[str, bool]]:
    """(dotted module, at module level) of every import, those for type checkers alone left out."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ("trio_deploy", *path.relative_to(PACKAGE).parts[:-1])
    found: list[tuple[str, bool]] = []

    def visit(node: ast.AST, top: bool) -> None:
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            return
        if isinstance(node, ast.Import):
            found.extend((alias.name, top) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            module = ".".join((*base, *filter(None, [node.module])))
            found.append((module, top))
            if module == "trio_deploy":
                found.extend((f"trio_deploy.{alias.name}", top) for alias in node.names)
        inner = top and not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        for child in ast.iter_child_nodes(node):
            visit(child, inner)

    visit(tree, True)
    return found


def test_every_room_has_a_floor():
    rooms = {room(path) for path in SOURCES} - {"__init__", "__main__", "data", "triton"}
    assert rooms <= set(FLOORS), "give the new room a floor in tests/test_imports.py"


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: p.relative_to(PACKAGE).as_posix())
def test_imports_point_one_way(path):
    here = room(path)
    for module, top in imports(path):
        head, _, rest = module.partition(".")
        if head == "trio_deploy" and rest:
            there = rest.split(".")[0]
            if here in FLOORS and there in FLOORS and there != here:
                assert FLOORS[there] <= FLOORS[here], f"{here} imports {there}"
                assert not {here, there} <= SEPARATE, f"{here} imports {there}"
        if head in ONLY_THE_ORACLE:
            baseline = not top and path.relative_to(PACKAGE).as_posix() in TORCH_BASELINES
            assert here in ("reference", "verify") or baseline, f"{here} imports {head}"
        if here == "runtime":
            assert head not in GRAPH_BUILDING, f"the runtime imports {head}"
        if head in ENGINES:
            places = [PACKAGE / place for place in ENGINES[head]]
            assert path in places and not top, (
                f"{head} is imported lazily, in {' and '.join(ENGINES[head])} alone"
            )


def test_help_and_every_command_start_without_torch():
    """Importing the rooms, `check` of recorded answers included, loads no torch and no engine."""
    program = (
        "import sys, trio_deploy.cli.main, trio_deploy.cost.plan, trio_deploy.export.job,"
        " trio_deploy.verify.check, trio_deploy.cli.run, trio_deploy.bench.measure,"
        " trio_deploy.pipeline.pipeline\n"
        f"print(sorted({(ONLY_THE_ORACLE | set(ENGINES))!r} & set(sys.modules)))"
    )
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.strip() == "[]", out.stderr


def test_the_command_line_starts_without_numpy():
    program = "import sys, trio_deploy.cli.main; print('numpy' in sys.modules)"
    out = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert out.stdout.strip() == "False", out.stderr
