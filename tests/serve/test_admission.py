"""A bound on the bytes of all requests that wait or run."""

from __future__ import annotations

import io

import pytest
from PIL import Image

from trio_deploy import TrioError
from trio_deploy.families import llava, llava_next, qwen3_vl
from trio_deploy.families.base import ModelConfig
from trio_deploy.families.preprocessing import Preprocessor
from trio_deploy.families.registry import FAMILIES, parse_config
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.pipeline.batcher.scheduler import BatcherLimits
from trio_deploy.pipeline.request import Request
from trio_deploy.serve.admission import Admission
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest

CONFIG = parse_config(llava.FAMILY.tiny())
TILES = 4 * 3 * CONFIG.clip.image_size**2
#: Qwen3-VL's bounds on the hub.
HUB = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}}


def admission(limit: int, config: ModelConfig = CONFIG, **batcher: int) -> Admission:
    limits = ServiceLimits(max_queue_bytes=limit, batcher=BatcherLimits(**batcher))
    return Admission(limits, config)


def file(width: int = 50, height: int = 30, kind: str = "PNG") -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (width, height)).save(out, kind)
    return out.getvalue()


PICTURE = file()


def admit(admitted: Admission, *pictures: bytes, prompt: str = "what ?") -> int:
    client = ClientRequest(prompt=prompt.encode(), images=pictures)
    admitted.check_sent(client)
    return admitted.admit(client, Request(prompt, list(pictures)))


def hub_config() -> ModelConfig:
    return Preprocessor(HUB, parse_config(qwen3_vl.FAMILY.tiny())).config


def test_texts_pictures_and_what_they_become_count_until_they_are_released() -> None:
    admitted = admission(10**9)
    sizes = [admit(admitted, PICTURE), admit(admitted)]
    assert sizes == [6 + len(PICTURE) + TILES, 6] and admitted.used == sum(sizes)
    for size in sizes:
        admitted.release(size)
    assert admitted.used == 0


@pytest.mark.parametrize("family", FAMILIES.values(), ids=lambda family: family.name)
def test_a_picture_counts_as_what_the_tower_takes_of_it(family) -> None:
    config = parse_config(family.tiny())
    side = 32 if config.pixels is None else None
    settings = {} if side is None else {"size": side, "crop_size": {"height": side, "width": side}}
    preprocessor = Preprocessor(settings, config)
    for width, height in ((20, 20), (64, 64), (300, 100), (100, 300), (1200, 1100)):
        picture, admitted = file(width, height), admission(10**9, preprocessor.config)
        feeds = preprocessor(picture).feeds
        sent = len(picture) + len("what ?")
        assert admit(admitted, picture) - sent == sum(values.nbytes for values in feeds.values())


def test_thumbnails_fit_where_the_largest_pictures_do_not() -> None:
    """At the hub's bounds the largest picture takes 387 MiB, two thumbnails 3."""
    admitted = admission(ServiceLimits().max_queue_bytes, hub_config())
    admit(admitted, file(64, 64), file(100, 80))
    assert admitted.used < 4 * 2**20
    admit(admitted, file(4096, 4096))
    with pytest.raises(Refused, match="become 65536 patches and 16384 visual tokens, and those"):
        admit(admitted, file(4096, 4096))


def test_a_picture_on_its_side_counts_as_the_larger_of_both_ways() -> None:
    config = parse_config(llava_next.FAMILY.tiny())
    tall, wide = (admit(admission(10**9, config), file(*size)) for size in ((20, 90), (90, 20)))
    assert tall == pytest.approx(wide, abs=20)


def test_the_header_suffices_to_count_a_picture() -> None:
    cut = file(800, 600, "JPEG")[:700]
    with pytest.raises(OSError, match="truncated"):
        Image.open(io.BytesIO(cut)).load()
    assert admit(admission(10**9, hub_config()), cut) > 10**6


def test_what_does_not_fit_beside_others_is_refused_and_not_counted() -> None:
    size = 6 + len(PICTURE) + TILES
    admitted = admission(2 * size)
    admit(admitted, PICTURE)
    admit(admitted, PICTURE)
    with pytest.raises(Refused, match=f"have {2 * size}, but max_queue_bytes is {2 * size}"):
        admit(admitted, PICTURE)
    admitted.release(size)
    assert admit(admitted, PICTURE) == size and admitted.used == 2 * size


def test_what_never_fits_is_the_requests_fault() -> None:
    sent = len(PICTURE) + 6
    for limit, says in (
        (sent - 1, f"needs {sent} bytes, but max_queue_bytes is {sent - 1}"),
        (sent, f"needs {sent + TILES} bytes with its 1 picture, .* max_queue_bytes is {sent}"),
    ):
        admitted = admission(limit)
        with pytest.raises(TrioError, match=says) as caught:
            admit(admitted, PICTURE)
        assert type(caught.value) is TrioError and admitted.used == 0


def test_requests_that_are_answered_together_must_fit_together() -> None:
    size = admit(admission(10**9), PICTURE)
    client = ClientRequest(prompt=b"what ?", images=[PICTURE])
    request = Request("what ?", [PICTURE])
    admitted = admission(3 * size)
    with pytest.raises(TrioError, match="4 times, but .* ask for fewer answers") as caught:
        admitted.admit(client, request, 4)
    assert type(caught.value) is TrioError and admitted.used == 0
    assert admitted.admit(client, request, 3) == size


def test_pictures_of_more_visual_tokens_than_a_prompt_may_have_are_refused() -> None:
    limited = admission(10**9, hub_config(), max_prompt_tokens=1000)
    used = admit(limited, file(640, 480), file(640, 480))
    with pytest.raises(TrioError, match="have 1024 visual tokens, but max_prompt_tokens is 1000"):
        admit(limited, file(1024, 1024))
    assert limited.used == used


def test_a_picture_of_a_shape_that_the_model_does_not_take_is_named() -> None:
    with pytest.raises(TrioError, match="image 1: an image of 2 x 900 pixels is too long"):
        admit(admission(10**9, hub_config()), PICTURE, file(2, 900))
