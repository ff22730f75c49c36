"""TensorRT and CUDA simulated on a CPU, to test what runs around them. No proof of TensorRT itself.

What is true of the real ones and enforced here, beyond what `cuda.py` says:

* Scratch memory is overwritten by every run.
* While a stream is recorded a context's first run with a new shape is an error.
* Shapes must lie within the profile; every tensor needs an address, empty ones too; outputs that
  are inputs in place must have their address, all others must not overlap an input; inputs whose
  values make shapes are read from the host when shapes are inferred.
* An input that no node reads is none of the engine's.
* Each version has the names that its bindings have (`tests/runtimes/tensorrt/tensorrt_api.json`)
  and the types: before TensorRT 10 int64 is int32.

Engines compute with ONNX Runtime on the graph that they were "built" from.
"""

from __future__ import annotations

import sys
import types
from typing import Any

import pytest

from tests.support.fakes.tensorrt.build import (
    Builder,
    IBuilderConfig,
    ILogger,
    IOptimizationProfile,
    IProgressMonitor,
    ITimingCache,
)
from tests.support.fakes.tensorrt.cuda import Cuda, Driver
from tests.support.fakes.tensorrt.engine import (
    ICudaEngine,
    IExecutionContext,
    IRuntimeCache,
    IRuntimeConfig,
    Runtime,
)
from tests.support.fakes.tensorrt.network import (
    ILayer,
    INetworkDefinition,
    ITensor,
    OnnxParser,
    ParserError,
)
from tests.support.fakes.tensorrt.versions import Simulated, add_enumerations
from trio_deploy.runtimes.tensorrt import compiling, device
from trio_deploy.runtimes.tensorrt.bindings import MODULES, Log, Progress, load

#: Classes that a program constructs.
_CONSTRUCTED = (ILogger, Builder, OnnxParser, Runtime)
#: Classes whose objects a program gets without constructing them.
_MET = (
    INetworkDefinition,
    IBuilderConfig,
    IOptimizationProfile,
    ICudaEngine,
    IExecutionContext,
    ParserError,
    ITimingCache,
    ITensor,
    ILayer,
)
#: What TensorRT-RTX has beside them.
_RTX = (IRuntimeCache, IRuntimeConfig)


class Simulation:
    """What `install` put in place.

    Attributes:
        tensorrt, cuda: the modules.
    """

    def __init__(self, tensorrt: Any, cuda: Cuda) -> None:
        self.tensorrt, self.cuda = tensorrt, cuda


def make(version: str, cuda: Cuda) -> types.ModuleType:
    """Make a module `tensorrt` of a version, or `tensorrt_rtx_bindings` of 1.7.

    Beside TensorRT's names it has:
        spoiled: graph name → output that its engine gets wrong.
        needs: graph name → bytes of scratch memory without which no tactic takes one of its nodes.
        says: (severity, message) that every build logs before anything else.
        last: network and configuration of the last build.
        compiled: kernels that TensorRT-RTX compiled on the device.
        recordable: whether TensorRT-RTX lets its contexts be recorded.
    """
    trt: Any = types.ModuleType("tensorrt")
    trt.__version__ = version
    trt.spoiled, trt.needs, trt.says = {}, {}, []
    trt.compiled, trt.recordable = [], True
    simulated = Simulated(version, trt, cuda)
    add_enumerations(trt, simulated.release, simulated.rtx)
    constructed = _CONSTRUCTED if simulated.old else (*_CONSTRUCTED, IProgressMonitor)
    met = (*_MET, *_RTX) if simulated.rtx else _MET
    simulated.classes = {kind.__name__: simulated.bind(kind) for kind in (*constructed, *met)}
    for name, kind in simulated.classes.items():
        setattr(trt, name, kind)
    return trt


def _compile_here(
    _: compiling.ChildCompiler, job: compiling.Job, log: Log, progress: Progress
) -> compiling.Compiled:
    """Compile in the process that has the simulation, which a child would not have."""
    return compiling.compile_here(load(job.flavour), job, log, progress)


def install(
    monkeypatch: pytest.MonkeyPatch,
    version: str = "10.3.0",
    *,
    gpu: str = "NVIDIA H200",
    capability: tuple[int, int] = (9, 0),
    memory: int = 2 << 30,
    multiprocessors: int = 132,
    old_cuda_python: bool = False,
) -> Simulation:
    """Let imports of TensorRT and cuda-python find the simulated ones for the time of a test.

    Args:
        version: of TensorRT; 1.7 is TensorRT-RTX.
    """
    cuda = Cuda(name=gpu, capability=capability, total=memory, multiprocessors=multiprocessors)
    tensorrt = make(version, cuda)
    flavour = "rtx" if version.startswith("1.") else "tensorrt"
    monkeypatch.setitem(sys.modules, MODULES[flavour], tensorrt)
    package, bindings = types.ModuleType("cuda"), types.ModuleType("cuda.bindings")
    package.__path__, bindings.__path__ = [], []
    monkeypatch.setitem(sys.modules, "cuda", package)
    if old_cuda_python:
        monkeypatch.setitem(sys.modules, "cuda.cudart", cuda)
    else:
        monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
        monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", cuda)
    monkeypatch.setattr(device, "load_driver", Driver)
    monkeypatch.setattr(compiling.ChildCompiler, "compile", _compile_here)
    return Simulation(tensorrt, cuda)
