"""Check on a GPU that TensorRT's engines build, are correct, and meet the bounds on speed.

Run by scripts/gpu_check.sh. In order: the tests marked gpu; the tiny model in both decode layouts,
each engine against ONNX Runtime and the oracle; where TensorRT-RTX is installed, its engines, with
weights as inputs and as constants; a smaller model in every scheme of quantised weights that the
GPU takes, sizes and parity; a 7B LLaVA-NeXT with random weights: its engines, its times with and
without pruning, torch's on the same GPU (transformers unpruned, and the oracle, which prunes by
autograd), and its engines against ONNX Runtime.

Every part runs in a process of its own (scripts/gpu/parts.py), so that a failure or crash stops no
other, and after every part the results are written to gpu-<name>.json and .md. A second run
continues where the first one ended: parts that passed are not repeated, existing engines are not
rebuilt, and results about another export or other engines are dropped. Report and exit status
include results of earlier runs on this machine: 0 if all checks pass, 1 if one fails, 3 if
--minutes ran out before the end.

The bounds on speed hold for 7B in float16, batch 1, 2880 visual tokens, 11.1 % of them on average.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from scripts.gpu.parts import host_env, made  # noqa: E402
from scripts.gpu.report import slug, to_markdown  # noqa: E402

PARTS = ("tests", "tiny", "rtx", "quantised", "build", "times", "torch", "parity")
_TINY = [
    f"tiny {dtype} {way}" for dtype in ("float32", "float16") for way in ("shared", "separate")
]
#: All parts, in the order of the report.
_ORDER = (
    *("host", "torch host", "tests", *_TINY, "rtx", "quantised", "export"),
    *PARTS[PARTS.index("build") :],
)
CHILD = ["-X", "faulthandler", "-m", "scripts.gpu.parts"]
#: Parts that continue after a step that ended their process.
_STEPWISE = ("build", "parity")
_NEED_TENSORRT = ("tests", "tiny", "quantised", "build", "times", "parity")
#: Parts whose results are about the large model's engines.
_OF_ENGINES = ("build", "times", "parity")
_UNFINISHED = 3
_NOT_ASKED = "not asked for"


class Check:
    """Check of one machine.

    Attributes:
        state: part → its results, kept between runs.
        about: machine and options that the results are about.
        skipped: part → why it does not run.
        unfinished: parts for which time ran out.
    """

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.work = args.work.resolve()
        self.work.mkdir(parents=True, exist_ok=True)
        self.deadline = time.monotonic() + 60 * args.minutes if args.minutes else None
        self.store = self.work / "results.json"
        source = self.store if self.store.is_file() or not args.resume else args.resume
        known = json.loads(source.read_text()) if source.is_file() else {}
        self.state: dict[str, Any] = known.get("parts", {})
        self.about: dict[str, Any] = known.get("about", {})
        self.skipped: dict[str, str] = {}
        self.unfinished: list[str] = []
        self.torch_python = _torch_python(args.torch_python)

    # ------------------------------------------------------------------------------ what to do

    def plan(self) -> list[str]:
        """Look up the two Pythons, and print which parts run here and why others do not."""
        wanted = set(self.args.only or PARTS) - set(self.args.skip)
        self.run("host", again=True)
        looked = ["host"]
        if "torch" in wanted or ("tiny" in wanted and "torch" not in self.args.skip):
            self.run("torch host", again=True, python=self.torch_python)
            looked.append("torch host")
        elif self._problem("host") or not self.passed("torch host"):
            self.state.pop("torch host", None)  # of a Python that is not used now
        self._forget_another_machine(looked)
        host = self.found()
        missing = self._problem("host") or host.get("no_tensorrt", "")
        torch = self._problem("torch host")
        layouts = ("separate",) if self.found().get("dialect") == "onnx" else ("shared", "separate")
        parts: list[str] = []
        for part in PARTS:
            reason = ""
            if part not in wanted:
                reason = _NOT_ASKED
            elif missing and part in _NEED_TENSORRT:
                reason = f"TensorRT does not run: {missing}"
            elif part == "rtx" and "rtx" not in host:
                # An extra, which most hosts do without.
                asked = part in (self.args.only or ())
                reason = host.get("no_rtx", missing) if asked else _NOT_ASKED
            elif part == "torch" and torch:
                reason = torch
            if reason:
                self.skipped[part] = reason
            elif part == "tiny":
                parts += [name for name in _TINY if name.split()[-1] in layouts]
            else:
                parts.append(part)
        measured = [part for part in parts if part in PARTS[PARTS.index("build") :]]
        if measured:
            parts.insert(parts.index(measured[0]), "export")
        for part in parts:
            print(f"will run {part}" + (" (passed before)" if self._keeps(part) else ""))
        for part, reason in self.skipped.items():
            print(f"SKIPPED {part}: {reason}")
        print(
            f"disk of {self.work}: {shutil.disk_usage(self.work).free >> 30} GiB free", flush=True
        )
        return parts

    def _problem(self, part: str) -> str:
        checks = self.state.get(part, {}).get("checks", {})
        return next((check["text"] for check in checks.values() if not check["passed"]), "")

    def _forget_another_machine(self, looked: list[str]) -> None:
        """Drop results of another GPU or other options, except those of this run."""
        host = self.found()
        about = {key: host.get(key) for key in ("gpu", "tensorrt", "memory_gib")}
        about |= {key: getattr(self.args, key) for key in ("size", "tiny", "budget", "runs")}
        # An unknown value, as without TensorRT, does not distinguish machines.
        known = {key: value for key, value in self.about.items() if value is not None}
        about = {**known, **{key: value for key, value in about.items() if value is not None}}
        if any(about[key] != value for key, value in known.items()):
            print(f"earlier results are not used: they are of {self.about}", flush=True)
            self.state = {n: p for n, p in self.state.items() if n in looked}
        self.about = about

    def _made(self) -> str:
        """Checksum of the large model's present export and engines; "" if there is none."""
        paths = self.state.get("export", {}).get("figures", {}).get("paths")
        return made(Path(paths["bundle"])) if paths else ""

    def _forget_other_engines(self, parts: tuple[str, ...]) -> None:
        """Drop results about an earlier export, or about engines that were rebuilt."""
        now = self._made()
        for part in parts:
            if part in self.state and not (now and self.state[part].get("of") == now):
                print(f"earlier {part} is not used: it is of other engines", flush=True)
                del self.state[part]

    def passed(self, part: str) -> bool:
        """Whether a part is complete and all of its checks passed."""
        known = self.state.get(part, {})
        checks = known.get("checks", {}).values()
        good = known.get("done") and all(check["passed"] for check in checks)
        return bool(good)

    # ------------------------------------------------------------------------------ running it

    def _keeps(self, part: str) -> bool:
        """Whether a part need not run; export, build and tiny check their own files instead."""
        checks_itself = part in ("export", "build", *_TINY)
        return self.passed(part) and not checks_itself and not self.args.again

    def run(self, part: str, *, again: bool = False, python: str = sys.executable) -> None:
        """Run a part in its process, unless it passed before; store its results."""
        if self._keeps(part) and not again:
            print(f"kept {part}: passed before", flush=True)
            return
        if self._over() and part not in ("host", "torch host"):
            self.unfinished.append(part)  # earlier results are kept
            return
        before = self.state.get(part, {})
        result = self.work / f"{slug(part)}.json"
        settings = self.work / "settings.json"
        kept: dict[str, Any] = {}
        if not self.args.again and (part == "parity" or (part in _TINY and self.passed(part))):
            good = {n: c for n, c in before.get("checks", {}).items() if c["passed"]}
            kept = {**before, "checks": good}
        result.write_text(json.dumps({**kept, "crashed": [], "done": False, "now": ""}))
        facts = {**self.found(), **self.state.get("export", {}).get("figures", {})}
        asked = "torch" not in self.args.skip and not self._problem("torch host")
        settings.write_text(
            json.dumps(
                {
                    "work": str(self.work),
                    "size": self.args.size,
                    "tiny": self.args.tiny,
                    "budget": self.args.budget,
                    "runs": self.args.runs,
                    "torch_python": self.torch_python if asked else "",
                    "host": facts,
                }
            )
        )
        start = time.monotonic()
        while True:
            ended = self._child(part, python, settings, result)
            found = json.loads(result.read_text())
            if ended is None:
                self.unfinished.append(part)
                break
            if found.get("done"):
                break
            blamed = found.get("now") or part
            log = f"see {self.work / f'{slug(part)}.log'}"
            print(f"FAIL {blamed}: its process ended ({ended}); {log}", flush=True)
            text = f"its process ended with {ended}; {log}"
            found.setdefault("checks", {})[blamed] = {"passed": False, "text": text}
            if part not in _STEPWISE or blamed in found["crashed"] or blamed == part:
                found["done"] = True
                break
            found["crashed"].append(blamed)
            found["now"] = ""
            result.write_text(json.dumps(found))
        found["seconds"] = round(time.monotonic() - start, 1)
        found["at"] = time.strftime("%Y-%m-%d %H:%M:%S")
        if part == "export" and ended is None:
            return  # the next run checks whether the export was replaced
        if kept and part in _TINY and found["done"] and _same(found, kept):
            print(f"kept {part}: passed before, with the same engines", flush=True)
            return
        self.state[part] = found
        if part == "export":
            self._forget_other_engines(_OF_ENGINES)
        elif part in _OF_ENGINES:
            found["of"] = self._made()
            self._forget_other_engines(_OF_ENGINES)
        print(f"     {part}: {found['seconds']:.0f} s", flush=True)

    def _over(self) -> bool:
        return self.deadline is not None and time.monotonic() >= self.deadline

    def _child(self, part: str, python: str, settings: Path, result: Path) -> str | None:
        """Run a process; return how it ended, or None if time ran out first."""
        left = None if self.deadline is None else self.deadline - time.monotonic()
        if left is not None and left <= 0:
            return None
        command = [python, *CHILD, part, "--settings", str(settings), "--result", str(result)]
        env = host_env() if part in ("torch", "torch host") else dict(os.environ)
        env["PYTHONPATH"] = os.pathsep.join(filter(None, (str(ROOT), env.get("PYTHONPATH"))))
        shown = 0
        with (self.work / f"{slug(part)}.log").open("ab") as log:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=env,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                start = time.monotonic()
                while child.poll() is None:
                    shown = self._show(result, shown)
                    if left is not None and time.monotonic() - start > left:
                        return None
                    time.sleep(0.1)
                self._show(result, shown)
            finally:
                if child.poll() is None:
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
        if child.returncode < 0:
            return signal.Signals(-child.returncode).name
        return f"status {child.returncode}"

    def _show(self, result: Path, shown: int) -> int:
        """Print the checks of a running part that were not printed yet."""
        try:
            checks = list(json.loads(result.read_text()).get("checks", {}).items())
        except (OSError, json.JSONDecodeError):
            return shown
        for name, check in checks[shown:]:
            print(f"{'ok  ' if check['passed'] else 'FAIL'} {name}: {check['text']}", flush=True)
        return len(checks)

    # ------------------------------------------------------------------------------ the report

    def found(self) -> dict[str, Any]:
        """The report's JSON, of the results so far."""
        found: dict[str, Any] = dict(self.state.get("host", {}).get("figures", {}))
        torch = self.state.get("torch host", {}).get("figures", {})
        found.setdefault("gpu", torch.get("gpu", "unknown GPU"))
        found["checks"] = {}
        large: dict[str, Any] = {}
        built: dict[str, Any] = {}
        unfinished = set(self.unfinished)
        for part in _ORDER:
            known = self.state.get(part, {})
            if known and not known.get("done"):
                unfinished.add(part)
            found["checks"] |= known.get("checks", {})
            large |= known.get("figures", {}).get("large", {})
            built |= known.get("figures", {}).get("built", {})
        for part, reason in self.skipped.items():
            if reason != _NOT_ASKED:
                found["checks"][part] = {"passed": False, "text": f"not run: {reason}"}
        for part in sorted(unfinished, key=_ORDER.index):
            text = "not finished in time: run it again to continue"
            found["checks"][f"{part}, all of it"] = {"passed": False, "text": text}
        return {**found, "large": large, "built": built}

    def write(self) -> Path:
        """Write the results as JSON and Markdown, and for the next run; return the JSON's path."""
        found = {**self.found(), "about": self.about, "parts": self.state}
        text = json.dumps(found, indent=1) + "\n"
        self.args.out.mkdir(parents=True, exist_ok=True)
        path = self.args.out / f"gpu-{slug(found['gpu'])}.json"
        for file, content in (
            (self.store, text),
            (path, text),
            (path.with_suffix(".md"), to_markdown(found)),
        ):
            beside = file.with_name(f".{file.name}.part")
            beside.write_text(content)
            beside.replace(file)
        return path


def _same(found: dict[str, Any], kept: dict[str, Any]) -> bool:
    """Whether a part's results are those of the earlier run."""
    return all(found.get(key) == kept.get(key) for key in ("of", "checks"))


def _torch_python(named: str | None) -> str:
    """The named Python, else the first with torch of this one and the host's."""
    candidates = [named] if named else [sys.executable, os.environ.get("TRIO_HOST_PYTHON")]
    existing = [python for python in candidates if python]
    looks = "from importlib.util import find_spec as f; raise SystemExit(not f('torch'))"
    for python in existing:
        command = [python, "-c", looks]
        env = host_env() if python != sys.executable else dict(os.environ)
        if shutil.which(python) and subprocess.run(command, env=env).returncode == 0:
            return python
    return existing[-1]


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "gpu", help="for bundles")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "measurements")
    parser.add_argument("--size", default="llava-next-7b", help="recipe or sizes, as trio bench's")
    parser.add_argument("--tiny", default="tiny", help="recipe or checkpoint of the small model")
    parser.add_argument("--budget", type=float, default=0.111)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--only", action="append", choices=PARTS, help="these parts alone")
    parser.add_argument("--skip", action="append", default=[], choices=PARTS)
    parser.add_argument("--again", action="store_true", help="repeat parts that passed before")
    parser.add_argument("--minutes", type=float, help="time limit; a second run continues")
    parser.add_argument("--resume", type=Path, help="gpu-*.json of an earlier run elsewhere")
    parser.add_argument("--plan", action="store_true", help="print which parts would run, and stop")
    parser.add_argument("--torch-python", help="the Python that has torch")
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run all parts; return the exit status described above."""
    args = parse(arguments)
    check = Check(args)
    parts = check.plan()
    if check.found()["gpu"] == "unknown GPU":
        print(f"gpu_check: {check._problem('host')}", file=sys.stderr)
        return 1
    if args.plan:
        return 0
    check.write()
    for part in parts:
        measures = part in ("build", "times", "torch", "parity")
        if measures and "export" in check.unfinished:
            check.unfinished.append(part)
            continue
        if measures and not check.passed("export"):
            text = "not run: there is no bundle to measure"
            check.state[part] = {"checks": {part: {"passed": False, "text": text}}, "done": True}
            continue
        # The export itself checks which files exist, and whether they are for this TensorRT.
        python = check.torch_python if part == "torch" else sys.executable
        check.run(part, again=part == "export", python=python)
        check.write()
    path = check.write()
    print(f"written: {path}")
    if check.unfinished:
        print(f"not finished: {', '.join(check.unfinished)}: run the same command again")
        return _UNFINISHED
    return 0 if all(entry["passed"] for entry in check.found()["checks"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
