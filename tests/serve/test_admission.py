"""A bound on the bytes of all requests that wait or run."""

from __future__ import annotations

import pytest

from trio_deploy import TrioError
from trio_deploy.families.llava import FAMILY
from trio_deploy.families.registry import parse_config, request_limits
from trio_deploy.pipeline.batcher.events import Refused
from trio_deploy.serve.admission import Admission
from trio_deploy.serve.limits import ServiceLimits
from trio_deploy.serve.requests import ClientRequest

CONFIG = parse_config(FAMILY.tiny())
LARGEST = request_limits(CONFIG)
TILES = 4 * LARGEST.tile_values * LARGEST.tiles
PICTURE = ClientRequest(prompt=b"what ?", images=[b"x" * 100])


def admission(limit: int, max_images: int = 8) -> Admission:
    return Admission(ServiceLimits(max_queue_bytes=limit, max_images=max_images), CONFIG)


def test_texts_pictures_and_their_tiles_count_until_they_are_released() -> None:
    admitted = admission(10**9)
    sizes = [admitted.admit(PICTURE), admitted.admit(ClientRequest(prompt=b"what ?"))]
    assert sizes == [6 + 100 + TILES, 6] and admitted.used == sum(sizes)
    for size in sizes:
        admitted.release(size)
    assert admitted.used == 0


def test_what_does_not_fit_beside_others_is_refused_and_not_counted() -> None:
    size = 106 + TILES
    admitted = admission(2 * size)
    admitted.admit(PICTURE)
    admitted.admit(PICTURE)
    with pytest.raises(Refused, match=f"have {2 * size}, but max_queue_bytes is {2 * size}"):
        admitted.admit(PICTURE)
    admitted.release(size)
    assert admitted.admit(PICTURE) == size and admitted.used == 2 * size


def test_what_never_fits_is_the_requests_fault() -> None:
    with pytest.raises(TrioError, match="max_queue_bytes is 100") as caught:
        admission(100).admit(PICTURE)
    assert type(caught.value) is TrioError


def test_tiles_of_pictures_beyond_the_limit_do_not_count() -> None:
    """A check that follows refuses them by their number."""
    many = ClientRequest(images=[b""] * 100)
    assert admission(10**9, max_images=2).admit(many) == 2 * TILES
