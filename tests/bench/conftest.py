"""A bundle with random weights, small enough to be measured in a moment."""

from __future__ import annotations

import pytest

from trio_deploy import Bundle, RuntimeOptions
from trio_deploy.bench.synthetic import RandomModel, make_bundle

SIZE = "d=32,layers=6,vocab=300,mlp=48,heads=2,image=56,vision_d=16,vision_layers=2,context=256"
SCHEDULE = "1:8,3:4"


@pytest.fixture(scope="session")
def random_bundle(tmp_path_factory) -> Bundle:
    """Six layers, 16 visual tokens a picture, pruned to 8 and 4."""
    cache = tmp_path_factory.mktemp("bench")
    bundle, _ = make_bundle(RandomModel(SIZE, SCHEDULE), cache, RuntimeOptions(), progress=False)
    return bundle
