"""All dialects by name."""

from __future__ import annotations

from trio_deploy.graphs.dialects.base import Dialect
from trio_deploy.graphs.dialects.onnx import OnnxDialect
from trio_deploy.graphs.dialects.ort import OrtDialect
from trio_deploy.graphs.dialects.primitive import PrimitiveDialect

DIALECTS: dict[str, type[Dialect]] = {
    dialect.name: dialect for dialect in (OrtDialect, OnnxDialect, PrimitiveDialect)
}
