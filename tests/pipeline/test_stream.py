"""A stream gives the answer in pieces, and releases its caches however it ends."""

from __future__ import annotations

import gc

import pytest

from tests.support.bundles import Bundles
from tests.support.pictures import make_picture
from trio_deploy import Bundle, Pipeline, Request, TextStream, TrioError
from trio_deploy.pipeline.cache import SegmentCache

REQUEST = Request("what color is the circle?", make_picture(), max_new_tokens=40)


@pytest.fixture(scope="module")
def pipeline(bundles: Bundles) -> Pipeline:
    bundle = Bundle.load(bundles.path("tiny"))
    return Pipeline.open(bundle.with_end_tokens([]), threads=1)


def caches() -> int:
    """KV caches that exist, found without a collection of cycles."""
    return sum(isinstance(item, SegmentCache) for item in gc.get_objects())


def begun(pipeline: Pipeline) -> TextStream:
    stream = pipeline.stream(REQUEST)
    next(stream)
    next(stream)
    assert caches() > 0
    return stream


@pytest.fixture(autouse=True)
def no_collection():
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def test_nothing_runs_before_the_stream_is_iterated(pipeline):
    stream = pipeline.stream(Request("what ?", "no-such-file.png"))
    with pytest.raises(TrioError, match="no-such-file"):
        next(stream)
    with pytest.raises(TrioError, match="not complete"):
        _ = stream.generation


def test_at_its_end_there_is_the_answer_and_no_cache(pipeline):
    stream = pipeline.stream(REQUEST)
    with pytest.raises(TrioError, match="not complete: iterate its stream to the end first"):
        _ = stream.generation
    assert "".join(stream) == stream.generation.text
    assert list(stream) == [] and stream.generation.finish_reason == "length"
    stream.close()
    assert stream.generation.kv_bytes > 0 and caches() == 0


def test_closing_it_early_releases_the_caches(pipeline):
    stream = begun(pipeline)
    stream.close()
    assert caches() == 0
    assert list(stream) == []
    with pytest.raises(TrioError, match="not complete"):
        _ = stream.generation


def test_leaving_its_block_early_releases_the_caches(pipeline):
    with begun(pipeline) as stream:
        pass
    assert caches() == 0 and list(stream) == []


def test_dropping_it_releases_the_caches(pipeline):
    stream = begun(pipeline)
    del stream
    assert caches() == 0


def test_an_error_while_it_runs_comes_out_and_releases_the_caches(pipeline, monkeypatch):
    stream = begun(pipeline)

    def fail(*args, **kwargs):
        raise TrioError("the device is lost")

    monkeypatch.setattr("trio_deploy.pipeline.decode.Decoder.step", fail)
    try:
        list(stream)
    except TrioError as error:
        assert str(error) == "the device is lost"
        del error
    assert caches() == 0


def test_streams_and_answers_can_be_interleaved(pipeline):
    whole = pipeline.generate(REQUEST)
    one, two = pipeline.stream(REQUEST), pipeline.stream(REQUEST)
    pieces = [next(one), next(two), *one]
    between = pipeline.generate(REQUEST)
    list(two)
    assert "".join(pieces[:1] + pieces[2:]) == whole.text == between.text == two.generation.text
