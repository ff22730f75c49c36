"""Names and types of each TensorRT version, as its bindings have them (`tensorrt_api.json`)."""

from __future__ import annotations

import enum
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import numpy as np
from onnx import TensorProto

from tests.support.fakes.tensorrt.cuda import Cuda

#: ONNX type → its name in `DataType`, numpy's type.
KINDS = {
    TensorProto.FLOAT: ("FLOAT", np.float32),
    TensorProto.FLOAT16: ("HALF", np.float16),
    TensorProto.INT64: ("INT64", np.int64),
    TensorProto.INT32: ("INT32", np.int32),
    TensorProto.BOOL: ("BOOL", np.bool_),
}

#: Members that not every version has: (class, name) → first version with it, first without.
MEMBERS = {
    ("IBuilderConfig", "progress_monitor"): ((10, 0), None),
    ("ICudaEngine", "create_execution_context"): ((10, 0), None),
    ("ICudaEngine", "create_execution_context_without_device_memory"): (None, (10, 0)),
    ("ICudaEngine", "device_memory_size"): (None, (11, 0)),
    ("ICudaEngine", "device_memory_size_v2"): ((10, 3), None),
    ("ICudaEngine", "get_aliased_input_tensor"): ((10, 15), None),
    ("IExecutionContext", "set_device_memory"): ((10, 3), None),
    ("ILayer", "set_output_type"): (None, (11, 0)),
    ("ParserError", "node_name"): ((10, 0), None),
    ("ParserError", "node_operator"): ((10, 0), None),
}
#: Members that TensorRT-RTX alone has.
RTX_MEMBERS = {
    ("IBuilderConfig", "num_compute_capabilities"),
    ("IBuilderConfig", "set_compute_capability"),
    ("ICudaEngine", "create_runtime_config"),
    ("IExecutionContext", "is_stream_capturable"),
}
#: The release of TensorRT whose names TensorRT-RTX 1.7 has, but for its own.
RTX_RELEASE = (11, 4)


@dataclass
class Simulated:
    """One simulated version; every class of it has this as `_simulated`.

    Attributes:
        version: as the module calls itself, "10.3.0"; TensorRT-RTX counts from 1.
        module: the module `tensorrt`.
        cuda: the device.
        classes: name → class, also of those that the module does not contain.
    """

    version: str
    module: Any
    cuda: Cuda
    classes: dict[str, Any] = field(default_factory=dict)

    @property
    def rtx(self) -> bool:
        """Whether it is TensorRT-RTX."""
        return self.version.startswith("1.")

    @property
    def release(self) -> tuple[int, ...]:
        """Major and minor version of TensorRT."""
        if self.rtx:
            return RTX_RELEASE
        return tuple(int(part) for part in self.version.split(".")[:2])

    @property
    def old(self) -> bool:
        """Whether it is older than TensorRT 10, which brought int64 and strong typing."""
        return self.release < (10, 0)

    def new(self, kind: str, *arguments: Any) -> Any:
        """Construct one of this version's classes."""
        return self.classes[kind](*arguments)

    def bind(self, kind: type) -> type:
        """Copy a class with the members that this version has.

        A copy, since tests replace methods and look at a class's own names.
        """
        members = {
            name: member
            for name, member in vars(kind).items()
            if name not in ("__dict__", "__weakref__") and self._has(kind.__name__, name)
        }
        return type(kind.__name__, (), {**members, "_simulated": self})

    def _has(self, kind: str, name: str) -> bool:
        if (kind, name) in RTX_MEMBERS:
            return self.rtx
        first, end = MEMBERS.get((kind, name), (None, None))
        return (first is None or self.release >= first) and (end is None or self.release < end)

    def item_type(self, kind: int) -> np.dtype[Any]:
        """Type in memory of an ONNX type: before TensorRT 10 int64 is int32."""
        dtype = np.dtype(KINDS[kind][1])
        return np.dtype(np.int32) if self.old and dtype == np.int64 else dtype


def add_enumerations(module: ModuleType, release: tuple[int, ...], rtx: bool) -> None:
    """Add a version's enumerations to the module."""
    old, new = release < (10, 0), release >= (11, 0)
    members = {
        "DataType": "FLOAT HALF INT8 INT32 BOOL UINT8" + ("" if old else " INT64 BF16"),
        "TensorIOMode": "NONE INPUT OUTPUT",
        "TensorLocation": "DEVICE HOST",
        "MemoryPoolType": "WORKSPACE DLA_MANAGED_SRAM TACTIC_DRAM",
        "TacticSource": ("" if new else "CUBLAS CUBLAS_LT CUDNN ")
        + "EDGE_MASK_CONVOLUTIONS JIT_CONVOLUTIONS",
        "LayerType": "CONSTANT SHAPE CAST MATRIX_MULTIPLY ELEMENTWISE RECURRENCE TRIP_LIMIT",
        "NetworkDefinitionCreationFlag": ("" if new else "EXPLICIT_BATCH ")
        + ("" if old else "STRONGLY_TYPED"),
        "BuilderFlag": "DEBUG TF32" + ("" if new else " FP16 OBEY_PRECISION_CONSTRAINTS"),
    }
    if rtx:
        members["BuilderFlag"] = "DEBUG TF32 REQUIRE_USER_ALLOCATION"
        members["ComputeCapability"] = "NONE CURRENT SM75 SM80 SM86 SM89 SM120 SM121"
        members["ProfilingVerbosity"] = "LAYER_NAMES_ONLY NONE DETAILED"
        members["CudaGraphStrategy"] = "DISABLED WHOLE_GRAPH_CAPTURE"
        members["DynamicShapesKernelSpecializationStrategy"] = "LAZY EAGER NONE"
    if old:
        members["PreviewFeature"] = "PROFILE_SHARING_0806" if release >= (8, 6) else "OTHER"
    else:
        members["ExecutionContextAllocationStrategy"] = "STATIC ON_PROFILE_CHANGE USER_MANAGED"
    for name, names in members.items():
        setattr(module, name, enum.IntEnum(name, names.split(), start=0))
