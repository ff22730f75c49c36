"""A part of the GPU check on a simulated TensorRT, in a process of its own.

What goes wrong there is said by the environment: SIMULATED is JSON with the TensorRT `version`, or
that of TensorRT-RTX (`rtx`), `spoiled` (graph → output that its engine gets wrong), `dies` /
`raises` (stages in whose build the process is killed, or the bindings raise), and `dies_at_once` /
`hangs` (parts whose process is killed before it has done anything, or does nothing until it is
killed).
"""

from __future__ import annotations

import json
import os
import signal
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import pytest

# not this folder, in which `triton` is ours
sys.path[0] = str(Path(__file__).parents[2])

from scripts.gpu import parts  # noqa: E402
from tests.support.fakes.tensorrt.install import install  # noqa: E402

parts.COPIED = 1 << 20  # numpy copies what a GPU would
wanted = json.loads(os.environ["SIMULATED"])
if sys.argv[1] in wanted.get("dies_at_once", []):
    os.kill(os.getpid(), signal.SIGSEGV)
while sys.argv[1] in wanted.get("hangs", []):
    signal.pause()
if wanted.get("version"):
    simulation = install(pytest.MonkeyPatch(), wanted["version"], gpu="Simulated GPU")
    simulation.tensorrt.__spec__ = ModuleSpec("tensorrt", None)  # torch looks for it
    simulation.tensorrt.spoiled.update(wanted.get("spoiled", {}))
    build = simulation.tensorrt.Builder.build_serialized_network

    def build_or_not(self: Any, network: Any, config: Any) -> Any:
        if network.path.stem in wanted.get("dies", []):
            os.kill(os.getpid(), 11)
        if network.path.stem in wanted.get("raises", []):
            raise RuntimeError("the bindings say no")
        return build(self, network, config)

    simulation.tensorrt.Builder.build_serialized_network = build_or_not
if wanted.get("rtx"):  # in place of TensorRT
    install(pytest.MonkeyPatch(), wanted["rtx"], gpu="Simulated GPU", capability=(8, 9))
if wanted.get("no_torch"):
    from trio_deploy.bench.contenders import torch_model

    torch_model.has_torch = lambda: False
sys.exit(parts.main())
