"""A command in a child process with limits on its memory and processor time.

What hangs or eats memory then fails its own test and no other, and leaves the machine alone:

    done = run_limited("run", bundle, "--image", image, "--question", question)
    assert done.one_error() == "…"

`limited_python` runs Python code instead, which may check many inputs in one child. Both
take other limits as `memory_mib` and `cpu_s`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.support.waiting import WAIT_S

#: MiB of address space of a child, its libraries included (a command with a runtime takes about
#: 0.8 GiB on a tiny model, torch much more), and its processor time. What works stays far below.
MEMORY_MIB = 2048
CPU_S = 20

# Sets the limits, runs code or the command line, and says at the end what the process has taken.
_CHILD = """
import atexit, resource, sys
memory, seconds, report, code = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
def said():
    with open("/proc/self/status") as file:
        peak = next(int(line.split()[1]) for line in file if line.startswith("VmHWM:"))
    used = resource.getrusage(resource.RUSAGE_SELF)
    with open(report, "w") as file:
        print(peak / 1024, used.ru_utime + used.ru_stime, file=file)
atexit.register(said)
resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds + 1))
sys.argv[1:] = sys.argv[5:]
exec(compile(code, "limited", "exec"), {"__name__": "__main__"})
"""
_TRIO = "from trio_deploy.cli.main import main; import sys; sys.exit(main())"


@dataclass(frozen=True)
class Completed:
    """A child that has ended.

    Attributes:
        rc: exit status; negative, the signal that killed it: −SIGXCPU where it took too much time.
        out, err: what it printed.
        peak_mib: the most memory that was resident, MiB; None where it was killed.
        cpu_s: processor time of all its threads, seconds; None where it was killed.
    """

    rc: int
    out: str
    err: str
    peak_mib: float | None
    cpu_s: float | None

    def one_error(self) -> str:
        """Return the message of a command that failed as commands fail: status 1, one line."""
        assert self.rc == 1, (self.rc, self.err[-2000:])
        assert self.err.startswith("trio: "), self.err[-2000:]
        assert self.err.count("\n") == 1, self.err[-2000:]
        assert len(self.err) < 2000, self.err
        return self.err.removeprefix("trio: ").strip()


def run_limited(*args: object, memory_mib: int = MEMORY_MIB, cpu_s: int = CPU_S) -> Completed:
    """Run `trio ARGS` in a child.

    Args:
        memory_mib: MiB of address space; beyond it an allocation fails as on a full machine.
        cpu_s: seconds of processor time, after which the child is killed.
    """
    return _run(_TRIO, args, memory_mib, cpu_s)


def limited_python(
    code: str, *args: object, memory_mib: int = MEMORY_MIB, cpu_s: int = CPU_S
) -> Completed:
    """Run Python code in a child, with `args` as its sys.argv[1:]; limits as of `run_limited`."""
    return _run(code, args, memory_mib, cpu_s)


def _run(code: str, args: tuple[object, ...], memory_mib: int, cpu_s: int) -> Completed:
    read, write = os.pipe()
    limits = (str(memory_mib << 20), str(cpu_s), f"/dev/fd/{write}")
    # Each thread of a library reserves address space of its own; the number of cores decides it.
    threads = dict.fromkeys(("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"), "1")
    inherited = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    paths = [str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]
    environment = inherited | threads | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with os.fdopen(read) as report:
        try:
            done = subprocess.run(
                [sys.executable, "-c", _CHILD, *limits, code, *map(str, args)],
                capture_output=True,
                text=True,
                errors="replace",
                env=environment,
                pass_fds=(write,),
                timeout=WAIT_S + cpu_s,  # sleeps for ever
            )
        finally:
            os.close(write)
        figures = [float(word) for word in report.read().split()] or [None, None]
    return Completed(done.returncode, done.stdout, done.stderr, *figures)
