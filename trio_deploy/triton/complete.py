"""`trio_vlm_complete`, for Triton's python backend: one whole answer for a plain inference request.

It holds no model. Each request goes on to `trio_vlm`, in whose batch it is answered.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import triton_python_backend_utils as pb_utils

from trio_deploy.triton.request import INPUTS

_OUTPUTS = ["text", "token_ids", "finish_reason", "timings"]


class TritonPythonModel:
    """What Triton loads; its interface is Triton's."""

    def initialize(self, args: Mapping[str, str]) -> None:
        """Note which model to ask."""
        parameters = json.loads(args["model_config"]).get("parameters", {})
        self._model = parameters.get("model", {"string_value": "trio_vlm"})["string_value"]

    def execute(self, requests: Sequence[Any]) -> list[Any]:
        """Ask, and wait for the answers."""
        with ThreadPoolExecutor(len(requests)) as pool:
            return list(pool.map(self._forward, requests))

    def _forward(self, request: Any) -> Any:
        inputs = [pb_utils.get_input_tensor_by_name(request, name) for name in INPUTS]
        parameters = json.loads(request.parameters() or "{}")
        asked = pb_utils.InferenceRequest(
            model_name=self._model,
            requested_output_names=_OUTPUTS,
            inputs=[tensor for tensor in inputs if tensor is not None],
            request_id=request.request_id(),
            timeout=request.timeout(),
            parameters={**parameters, "stream": False},
        )
        for response in asked.exec(decoupled=True):
            if response.has_error():
                return pb_utils.InferenceResponse(error=response.error())
            if response.output_tensors():
                return pb_utils.InferenceResponse(response.output_tensors())
        return pb_utils.InferenceResponse(
            error=pb_utils.TritonError(
                f"{self._model} sent no answer", pb_utils.TritonError.INTERNAL
            )
        )
