"""Change one operator, number or statement of a module at a time and see whether a test fails.

    pip install cosmic-ray
    python scripts/mutation_test.py trio_deploy/schedule/budget.py tests/schedule
    python scripts/mutation_test.py trio_deploy/selection/*.py tests/selection --sample 200

Mutants are Cosmic Ray's. Each is written into a copy of the package, and the tests run in a child
of this process, which has loaded the libraries already. A mutant that no test notices is printed as
a diff, unless tests/mutants_without_effect.yaml lists it with the reason why it changes nothing.
Exit status 1: a survivor is not listed.
"""

from __future__ import annotations

import argparse
import ast
import compileall
import contextlib
import difflib
import gc
import json
import os
import py_compile
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import import_module
from itertools import zip_longest
from pathlib import Path

import yaml
from tqdm import tqdm

ROOT = Path(__file__).parent.parent
WITHOUT_EFFECT = ROOT / "tests" / "mutants_without_effect.yaml"
COPIED = (
    "trio_deploy",
    "export",
    "engines",
    "tests",
    "scripts",
    "examples",
    "docs",
    "pyproject.toml",
)
NOT_COPIED = shutil.ignore_patterns("__pycache__")
TIMEOUT = 4  # times the CPU time that the tests take without a mutation, at least MIN_TIMEOUT
MIN_TIMEOUT = 10.0  # seconds
MAX_WAIT_S = 1800  # for a test that waits for what does not come


@dataclass(frozen=True)
class Mutant:
    """One changed line of a module.

    Attributes:
        module: path from the repository's root.
        code: the module's mutated text.
        line: its number; before, after: its text.
    """

    module: str
    code: str
    line: int
    before: str
    after: str

    @property
    def key(self) -> tuple[str, str, str]:
        """What identifies the mutant while lines move."""
        return self.module, self.before.strip(), self.after.strip()


def mutants(modules: Sequence[Path], sample: int | None, seed: int) -> list[Mutant]:
    """All mutants of modules, or as many as are to be drawn, but those that cannot matter.

    These are the ones of annotations, which nothing evaluates; of `is` and `==`, which differ for
    equal objects that are not the same (of booleans, small numbers, types and names there are
    none); of `frozen=True`, which guards against code that is not there; and of `TYPE_CHECKING`.
    """
    from cosmic_ray.mutating import mutate_code
    from cosmic_ray.plugins import get_operator

    places = [place for module in modules for place in mutable(module)]
    if sample is not None:
        random.Random(seed).shuffle(places)
    found: dict[tuple[Path, str], Mutant] = {}
    for module, name, number in places:
        if len(found) == sample:
            break
        source = module.read_text(encoding="utf-8")
        code = mutate_code(source, get_operator(name)(), number)
        # The same program in other words, as 1e30 + 1, is none.
        if code is None or (module, code) in found or same_program(source, code):
            continue
        line, before, after = first_difference(source, code)
        if "@dataclass(frozen=True" in before and "@dataclass(frozen=False" in after:
            continue
        if before.strip() == "if TYPE_CHECKING:":
            continue
        path = str(module.relative_to(ROOT))
        found[module, code] = Mutant(path, code, line, before, after)
    return list(found.values())


def same_program(one: str, other: str) -> bool:
    """Whether two texts are parsed to the same."""
    return ast.dump(ast.parse(one)) == ast.dump(ast.parse(other))


def mutable(module: Path) -> Iterator[tuple[Path, str, int]]:
    """The module, the name of an operator of Cosmic Ray and the number of each place for it."""
    from cosmic_ray.ast import ast_nodes, get_ast
    from cosmic_ray.plugins import get_operator, operator_names

    source = module.read_text(encoding="utf-8")
    idle = annotated(source)
    nodes = list(ast_nodes(get_ast(source)))
    for name in operator_names():
        kind = get_operator(name)
        if kind.arguments() or name.endswith(("_Is", "_IsNot", "_Is_Eq", "_IsNot_NotEq")):
            continue
        operator = kind()
        places = [place for node in nodes for place in operator.mutation_positions(node)]
        for number, (start, _) in enumerate(places):
            if not any(first <= start < last for first, last in idle):
                yield module, name, number


def first_difference(source: str, code: str) -> tuple[int, str, str]:
    """Number of the first line in which two texts differ, and that line of each.

    Where the one text begins with the other, it is the line after the shorter one, of which that
    one has none ("").
    """
    lines = zip_longest(source.splitlines(), code.splitlines())
    for number, (before, after) in enumerate(lines, 1):
        if before != after:
            return number, before or "", after or ""
    raise ValueError("the texts have the same lines")


def annotated(source: str) -> list[tuple[tuple[int, int], tuple[int, int]]]:
    """(line, column) of the begin and the end of each annotation."""
    found = []
    for node in ast.walk(ast.parse(source)):
        for name in ("annotation", "returns"):
            inner = getattr(node, name, None)
            if isinstance(inner, ast.expr):
                assert inner.end_lineno is not None and inner.end_col_offset is not None
                end = (inner.end_lineno, inner.end_col_offset)
                found.append(((inner.lineno, inner.col_offset), end))
    return found


def noticed(copy: Path, tests: Sequence[str], seconds: float) -> bool:
    """Whether a test fails in the copy; one that takes more CPU time has failed, too."""
    child = os.fork()
    if child == 0:
        os.setsid()
        signal.setitimer(signal.ITIMER_PROF, seconds)
        signal.alarm(MAX_WAIT_S)
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, 1)
        os.dup2(null, 2)
        os._exit(run_tests(copy, tests))
    _, status = os.waitpid(child, 0)
    # What the tests have started, and not ended, is of the child's session.
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    return status != 0


def load_libraries(copy: Path, tests: Sequence[str]) -> None:
    """Import once, for all children, the other packages that the tests import at their head."""
    code = "import json, sys, pytest; pytest.main(sys.argv[1:]); print(json.dumps([*sys.modules]))"
    command = [sys.executable, "-c", code, "--collect-only", "-q", "-p", "no:xdist", *tests]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(copy), *sys.path])}
    done = subprocess.run(command, cwd=copy, env=environment, stdout=subprocess.PIPE, check=True)
    for name in json.loads(done.stdout.splitlines()[-1]):
        if name.partition(".")[0] not in ("__main__", "trio_deploy", "tests"):
            with contextlib.suppress(Exception):  # a few come into being with another
                import_module(name)
    gc.freeze()


def run_tests(copy: Path, tests: Sequence[str]) -> int:
    """Run tests in the copy and return pytest's exit status; for a process of its own."""
    import hypothesis
    import pytest

    # As in tests/conftest.py, but a failure is not made simpler: that takes most of its time.
    hypothesis.settings.register_profile(
        "mutants",
        derandomize=True,
        deadline=None,
        database=None,
        phases=[hypothesis.Phase.explicit, hypothesis.Phase.generate],
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    sys.dont_write_bytecode = True
    os.chdir(copy)
    sys.path.insert(0, str(copy))
    os.environ["PYTHONPATH"] = str(copy)  # of what the tests start
    quiet = ["-q", "-x", "--assert=plain", "-p", "no:cacheprovider", "-p", "no:xdist"]
    return int(pytest.main([*quiet, "--hypothesis-profile=mutants", *tests]))


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", 1)[0])
    parser.add_argument("modules", nargs="+", type=Path, help="modules to change, then their tests")
    parser.add_argument("--sample", type=int, help="number of mutants to draw (default: all)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draw (default: 0)")
    args = parser.parse_args()
    paths = [path.resolve() for path in args.modules]
    modules = [path for path in paths if path.is_relative_to(ROOT / "trio_deploy")]
    tests = [str(path.relative_to(ROOT)) for path in paths if path not in modules]
    if not modules or not tests:
        parser.error("name at least one module of trio_deploy and one test")
    found = mutants(modules, args.sample, args.seed)
    listed = yaml.safe_load(WITHOUT_EFFECT.read_text(encoding="utf-8")) or []
    known = {(one["module"], one["before"], one["after"]) for one in listed}
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder)
        for name in COPIED:
            from_, to = ROOT / name, copy / name
            if from_.is_dir():
                shutil.copytree(from_, to, ignore=NOT_COPIED)
            else:
                shutil.copy(from_, to)
        survivors = surviving(copy, found, tests)
    unlisted = [mutant for mutant in survivors if mutant.key not in known]
    print(
        f"{len(found)} mutants: {len(found) - len(survivors)} noticed, "
        f"{len(survivors) - len(unlisted)} without effect as listed, {len(unlisted)} not noticed"
    )
    return 1 if unlisted else 0


def surviving(copy: Path, found: Sequence[Mutant], tests: Sequence[str]) -> list[Mutant]:
    """The mutants that no test notices, each printed when it is found."""
    # By hash, since a mutant may be as long and as old as what was there before.
    mode = py_compile.PycInvalidationMode.CHECKED_HASH
    compileall.compile_dir(copy, quiet=1, invalidation_mode=mode)
    load_libraries(copy, tests)
    begin = resource.getrusage(resource.RUSAGE_CHILDREN)
    if noticed(copy, tests, MAX_WAIT_S):
        raise SystemExit("the tests fail without a mutation: mend that first")
    end = resource.getrusage(resource.RUSAGE_CHILDREN)
    used = end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime
    seconds = max(MIN_TIMEOUT, TIMEOUT * used)
    survivors = []
    for mutant in tqdm(found, unit="mutant", desc="mutants"):
        file = copy / mutant.module
        source = file.read_text(encoding="utf-8")
        file.write_text(mutant.code, encoding="utf-8")
        if not noticed(copy, tests, seconds):
            survivors.append(mutant)
            lines = source.splitlines(), mutant.code.splitlines()
            diff = difflib.unified_diff(*lines, mutant.module, "mutant", n=1, lineterm="")
            tqdm.write("\n".join(diff), file=sys.stdout)
            sys.stdout.flush()
        file.write_text(source, encoding="utf-8")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
