"""Peak memory of one case: a process that opens it, answers twice, and says what it took at most.

python -m trio_deploy.bench.child '{"case": …, "workload": …}'
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

from trio_deploy.bench.cases import Case, Opened
from trio_deploy.bench.timing import peak_mib
from trio_deploy.bench.workload import Workload
from trio_deploy.errors import TrioError

_NEW_TOKENS = 4  # enough to open what decoding needs
_RUNS = 2


def peak_memory(case: Case, workload: Workload) -> float | None:
    """MiB at most resident in a fresh process that loads a case and answers twice.

    Raises:
        TrioError: the process failed.
    """
    arguments = json.dumps({"case": case.to_json(), "workload": workload.to_json()})
    command = [sys.executable, "-m", "trio_deploy.bench.child", arguments]
    out = subprocess.run(command, capture_output=True, text=True)
    if out.returncode:
        last = (out.stderr.strip().splitlines() or ["no message"])[-1]
        raise TrioError(f"measuring the memory of {case.name} failed: {last}")
    figure = out.stdout.split()[-1]
    return None if figure == "None" else float(figure)


def main() -> None:
    raw = json.loads(sys.argv[1])
    work = Workload.from_json(raw["workload"])
    work = replace(work, new_tokens=min(work.new_tokens, _NEW_TOKENS))
    with Opened() as opened:
        answer = opened.open(Case.from_json(raw["case"]), work)
        runs = [answer(seed) for seed in range(_RUNS)]
    print(runs[-1].peak_mib or peak_mib())


if __name__ == "__main__":
    main()
