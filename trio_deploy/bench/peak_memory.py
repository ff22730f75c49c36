"""Peak memory of one case, in a process of its own that opens it and answers twice.

python -m trio_deploy.bench.peak_memory '{"case": …, "workload": …}'
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from trio_deploy.bench.case import Case
from trio_deploy.bench.contenders.contenders import Contenders
from trio_deploy.bench.workload import Workload
from trio_deploy.errors import TrioError

_NEW_TOKENS = 4  # enough to open what decoding needs
_RUNS = 2


def peak_memory(case: Case, workload: Workload) -> float | None:
    """Peak resident MiB of a fresh process that opens a case and answers twice.

    Raises:
        TrioError: the process failed.
    """
    arguments = json.dumps({"case": case.to_json(), "workload": workload.to_json()})
    command = [sys.executable, "-m", "trio_deploy.bench.peak_memory", arguments]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        last = (out.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrioError(f"measuring the memory of {case.name} failed: {last}")
    figure = out.stdout.split()[-1]
    return None if figure == "None" else float(figure)


def peak_mib() -> float | None:
    """Peak resident MiB of this process; None where the system does not tell.

    On Linux not getrusage's figure: a child's starts at the size of its parent when it was forked.
    """
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) / 1024
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 1024


def main() -> None:
    raw = json.loads(sys.argv[1])
    work = Workload.from_json(raw["workload"])
    work = replace(work, new_tokens=min(work.new_tokens, _NEW_TOKENS))
    with Contenders() as contenders:
        answer = contenders.open(Case.from_json(raw["case"]), work)
        runs = [answer(seed) for seed in range(_RUNS)]
    print(runs[-1].peak_mib or peak_mib())


if __name__ == "__main__":
    main()
