"""Fields of the config.pbtxt of each kind of model in a repository, for `pbtxt.format_message`.

`max_batch_size` is 0 everywhere: a stage's rows are a batch already, and Triton's own batching
would need a second batch axis on [B] tensors and equal lengths, which rows do not have.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trio_deploy.bundle.manifest import StageInfo, TensorInfo
from trio_deploy.serve.triton_server.pbtxt import Enum
from trio_deploy.serve.triton_server.request import INPUTS, OUTPUTS

Fields = dict[str, Any]

_TYPES = {
    "bool": "TYPE_BOOL",
    "int32": "TYPE_INT32",
    "int64": "TYPE_INT64",
    "float16": "TYPE_FP16",
    "float32": "TYPE_FP32",
    "float64": "TYPE_FP64",
    "bfloat16": "TYPE_BF16",
    "string": "TYPE_STRING",
}


@dataclass(frozen=True)
class EngineTraits:
    """What Triton has to be told of a TensorRT engine.

    Attributes:
        profiles: number of optimisation profiles.
        sizes: shape tensors: inputs whose values are sizes of others.
        narrow: whether its int64 tensors became int32.
    """

    profiles: int
    sizes: frozenset[str]
    narrow: bool


def vlm_config(settings: Mapping[str, str], device: str, instances: int) -> Fields:
    """Configure the model that answers requests."""
    return {
        "backend": "python",
        "max_batch_size": 0,
        "input": [
            _tensor(name, kind, (size,), optional=True) for name, (kind, size) in INPUTS.items()
        ],
        "output": [_tensor(name, kind, (size,)) for name, (kind, size) in OUTPUTS.items()],
        "model_transaction_policy": {"decoupled": True},
        "instance_group": [_instances(instances, device)],
        "parameters": _parameters(settings),
    }


def graph_config(stage: StageInfo, device: str) -> Fields:
    """Configure a stage that ONNX Runtime serves."""
    return {
        "backend": "onnxruntime",
        **_stage_interface(stage),
        "instance_group": [_instances(1, device)],
        "model_warmup": _warm_up(stage),
    }


def engine_config(stage: StageInfo, traits: EngineTraits, device: str) -> Fields:
    """Configure a stage that TensorRT serves."""
    profiles = [str(profile) for profile in range(traits.profiles)]
    return {
        "platform": "tensorrt_plan",
        **_stage_interface(stage, traits.narrow, traits.sizes),
        "instance_group": [{**_instances(1, device), "profile": profiles}],
    }


def ensemble_config(steps: Sequence[tuple[str, StageInfo]], narrow: bool) -> Fields:
    """Configure an ensemble of two stages, the first of which feeds the second.

    Args:
        steps: name of the model and stage of both.
        narrow: whether int64 tensors of the stages are int32.
    """
    (_, first), (_, second) = steps
    between = {tensor.name for tensor in first.outputs}
    inputs = (*first.inputs, *(t for t in second.inputs if t.name not in between))
    used = {tensor.name for tensor in second.inputs}
    outputs = (*(t for t in first.outputs if t.name not in used), *second.outputs)
    return {
        "platform": "ensemble",
        "max_batch_size": 0,
        "input": [_stage_tensor(tensor, narrow=narrow) for tensor in inputs],
        "output": [_stage_tensor(tensor, narrow=narrow) for tensor in outputs],
        "ensemble_scheduling": {
            "step": [
                {
                    "model_name": model,
                    "model_version": -1,
                    "input_map": [{"key": t.name, "value": t.name} for t in stage.inputs],
                    "output_map": [{"key": t.name, "value": t.name} for t in stage.outputs],
                }
                for model, stage in steps
            ]
        },
    }


def _instances(count: int, device: str) -> Fields:
    """A group of instances; runtimes use the first visible GPU, wherever Triton places them."""
    if device == "gpu":
        return {"count": count, "kind": Enum("KIND_GPU"), "gpus": [0]}
    return {"count": count, "kind": Enum("KIND_CPU")}


def _stage_interface(stage: StageInfo, narrow: bool = False, sizes: Collection[str] = ()) -> Fields:
    """Inputs and outputs of a stage, as in its graph."""
    return {
        "max_batch_size": 0,
        "input": [
            _stage_tensor(tensor, narrow=narrow, size=tensor.name in sizes)
            for tensor in stage.inputs
        ],
        "output": [_stage_tensor(tensor, narrow=narrow) for tensor in stage.outputs],
    }


def _stage_tensor(tensor: TensorInfo, narrow: bool = False, size: bool = False) -> Fields:
    dtype = "int32" if narrow and tensor.dtype == "int64" else tensor.dtype
    return _tensor(tensor.name, dtype, tensor.shape, size=size)


def _tensor(
    name: str,
    dtype: str,
    shape: Sequence[int | str],
    optional: bool | None = None,
    size: bool = False,
) -> Fields:
    return {
        "name": name,
        "data_type": Enum(_TYPES[dtype]),
        "dims": [size if isinstance(size, int) else -1 for size in shape],
        "is_shape_tensor": True if size else None,
        "optional": optional,
    }


def _warm_up(stage: StageInfo) -> list[Fields] | None:
    """One blank tile for vision; no input of the other stages suits every model."""
    if stage.kind != "vision":
        return None
    blank = [
        {
            "key": tensor.name,
            "value": {
                "data_type": Enum(_TYPES[tensor.dtype]),
                "dims": [size if isinstance(size, int) else 1 for size in tensor.shape],
                "zero_data": True,
            },
        }
        for tensor in stage.inputs
    ]
    return [{"name": "one tile", "batch_size": 1, "inputs": blank}]


def _parameters(values: Mapping[str, str]) -> list[Fields]:
    return [{"key": name, "value": {"string_value": value}} for name, value in values.items()]
