"""Fixtures shared by all tests: tiny checkpoints and pictures."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from PIL import Image

from tests.support.bundles import Bundles, made_once, shared_folder
from tests.support.pictures import make_picture

try:
    import hypothesis
except ImportError:  # in the Triton server's environment, whose tests do without
    pass
else:
    # The same examples in every run, and none is too slow: neither chance nor other work on the
    # machine may turn a run red. `pytest --hypothesis-profile=default` searches at random.
    hypothesis.settings.register_profile(
        "trio",
        derandomize=True,
        deadline=None,
        database=None,
        print_blob=True,
        suppress_health_check=[hypothesis.HealthCheck.too_slow],
    )
    hypothesis.settings.load_profile("trio")

# Nothing in a test may reach for the network, and two threads are enough for models this small.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that all workers of this run share."""
    return shared_folder(tmp_path_factory)


@pytest.fixture(autouse=True)
def cache_of_the_run(run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep tests away from the user's own cache of bundles."""
    monkeypatch.setenv("TRIO_CACHE", str(run_folder / "cache"))


@pytest.fixture(scope="session")
def bundles(run_folder: Path) -> Bundles:
    """Bundles by model and options, each exported once for the whole run; do not change them."""
    return Bundles(run_folder)


@pytest.fixture(scope="session")
def llava_checkpoint(run_folder: Path) -> Path:
    """LLaVA-1.5 with grouped queries (4 heads, 2 key/value heads), 16 visual tokens, fp32."""
    from tests.support.checkpoints import make_llava

    return made_once(run_folder / "llava", make_llava)


@pytest.fixture(scope="session")
def llava_next_checkpoint(run_folder: Path) -> Path:
    """LLaVA-NeXT, tiles of 32 pixels, up to 88 visual tokens with newlines, fp32."""
    from tests.support.checkpoints import make_llava_next

    return made_once(run_folder / "llava_next", make_llava_next)


@pytest.fixture(scope="session")
def llava_mistral_checkpoint(run_folder: Path) -> Path:
    """LLaVA-NeXT on Mistral, hub layout and old configuration style, three shards, fp32."""
    from tests.support.checkpoints import make_llava_next

    def make(folder: Path) -> Path:
        return make_llava_next(folder, mistral=True, layout="hub", shards=3)

    return made_once(run_folder / "mistral", make)


@pytest.fixture
def picture() -> Image.Image:
    """A 100 x 60 RGB picture."""
    return make_picture()
