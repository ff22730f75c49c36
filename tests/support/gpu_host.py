"""A GPU with TensorRT, where there is one."""

from __future__ import annotations

from trio_deploy.runtimes.tensorrt.bindings import TensorRT, load
from trio_deploy.runtimes.tensorrt.device import Device
from trio_deploy.runtimes.tensorrt.gpu import this_gpu


class Host:
    """A GPU and the TensorRT for it."""

    def __init__(self) -> None:
        self.tensorrt: TensorRT = load()
        self.device = Device()
        self.gpu = this_gpu(self.device)
        in_place = self.tensorrt.updates_in_place
        self.dialect = "onnx" if in_place else "primitive"
        self.layouts = ("separate",) if in_place else ("shared", "separate")

    def kind(self, layout: str) -> tuple[str, str, str]:
        return self.tensorrt.version, self.dialect, layout
