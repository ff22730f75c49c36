"""What the tests on a GPU need; where there is none they are skipped, and say why."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.support.gpu_host import Host
from trio_deploy import TrioError


@pytest.fixture(scope="session")
def host() -> Host:
    try:
        return Host()
    except TrioError as error:
        pytest.skip(f"needs a GPU with TensorRT: {error}")


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random LLaVA, small, of sizes that suit tensor cores; made without torch."""
    from trio_deploy.bench.synthetic import Size, write_checkpoint

    size = Size.parse("d=256,layers=6,heads=4,vocab=512,image=112,vision_d=64,vision_layers=3")
    folder = tmp_path_factory.mktemp("gpu") / "checkpoint"
    return write_checkpoint(folder, size.config(), progress=False)
