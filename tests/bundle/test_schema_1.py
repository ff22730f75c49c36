"""Reading graphs without the onnx package: damaged files are named."""

import pytest

from trio_deploy import TrioError
from trio_deploy.bundle.schema_1 import external_tensors


@pytest.mark.parametrize(
    "content",
    [
        b"\x3a\x7f",  # a graph that ends beyond the file
        b"\x3f",  # a wire type that protobuf does not have
        b"\x3a" + b"\xff" * 4096 + b"\x01",  # a number of 4 KiB
        b"\x38\x01",  # a number where the graph belongs
    ],
)
def test_a_damaged_graph_is_named(tmp_path, content):
    file = tmp_path / "embed.onnx"
    file.write_bytes(content)
    with pytest.raises(TrioError, match=r"embed\.onnx is damaged"):
        external_tensors(file)
