"""Graphs without their rounding of activations, on ONNX Runtime.

Two runs whose activations differ by 1e-6 round a few of them to other numbers, and with every
product that follows the two differ more. So graphs that round are compared a second time as if they
did not: then nothing but an error is left.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from trio_deploy.bundle.bundle import Bundle
from trio_deploy.errors import TrioError
from trio_deploy.runtimes.onnxruntime import OrtEngine, OrtRuntime

UNROUNDED = ", float activations"
"""Ends the names of stages of the reference in which nothing rounds activations."""

_FOLDER = "session.model_external_initializers_file_folder_path"


class FloatActivations(OrtRuntime):
    """Opens graphs whose pairs of QuantizeLinear and DequantizeLinear are left out."""

    def _graph(self, path: Path, options: Any) -> str | bytes:
        try:
            from trio_deploy.export.unrounded import unrounded
        except ModuleNotFoundError as error:  # devices may have no onnx
            raise TrioError(
                f"graphs without their rounding need {error.name}: pip install "
                "'trio-deploy[export]'"
            ) from None
        options.add_session_config_entry(_FOLDER, str(path.parent.resolve()))
        return unrounded(path)

    def engine(self, bundle: Bundle, stage: str) -> OrtEngine:
        """Open a stage of a bundle."""
        return self.open(bundle.graph(stage), bundle.places(stage))
