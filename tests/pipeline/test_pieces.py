"""A prefill in pieces gives what the whole gives, to the last bit; pieces are as long as asked."""

from __future__ import annotations

import math

import numpy as np
import pytest

from tests.support.batching import opened
from tests.support.bundles import Bundles
from tests.support.pieces import equal, of, ran
from tests.support.questions import COLOR, ask
from trio_deploy import Bundle, Pipeline, Request
from trio_deploy.evaluation import scenes
from trio_deploy.pipeline.pieces import LEAST_QUERIES, Pace, Piece


def question(number: int, pictures: int = 1, budget: float | None = None) -> Request:
    images = [scenes.generate(number + each).image for each in range(pictures)]
    return Request(ask(COLOR, pictures), images, max_new_tokens=3, budget=budget)


@pytest.mark.parametrize("queries", [2, 7, 50, 128])
@pytest.mark.parametrize("budget", [None, 1.0])
def test_pieces_of_a_prompt_give_what_the_whole_gives_to_the_last_bit(
    bundles: Bundles, queries: int, budget: float | None
) -> None:
    pipeline = opened(bundles)
    asked = [question(0, 2, budget)]
    expected, stages = ran(pipeline, asked)
    got, pieces = ran(pipeline, asked, of(queries))
    assert len(pieces) > len(stages)
    assert equal(got, expected)
    assert got.kept[-1][0].tolist() == expected.kept[-1][0].tolist()


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_pieces_of_quantised_segments_are_equal_to_the_last_bit(
    bundles: Bundles, scheme: str
) -> None:
    bundle = Bundle.load(bundles.path("tiny", quantize=scheme))
    pipeline = Pipeline.open(bundle, runtime="onnxruntime", threads=1)
    expected, _ = ran(pipeline, [question(3)])
    got, _ = ran(pipeline, [question(3)], of(32))
    assert equal(got, expected)


def test_pieces_of_several_rows_give_each_row_what_it_gets_alone(bundles: Bundles) -> None:
    pipeline = opened(bundles)
    asked = [question(0), Request("what is red ?", max_new_tokens=3), question(5, 2)]
    got, _ = ran(pipeline, asked, of(40))
    for row, request in enumerate(asked):
        alone, _ = ran(pipeline, [request])
        assert np.array_equal(got.logits[row], alone.logits[0])
        for name, cache in got.caches.items():
            own = alone.caches[name]
            assert cache.lengths[row] == own.lengths[0]
            for slot, keys in cache.buffers[0].items():
                length = own.lengths[0]
                assert np.array_equal(keys[row, :, :length], own.buffers[0][slot][0, :, :length])


def test_a_turn_for_all_that_is_left_is_the_last_of_its_stage(bundles: Bundles) -> None:
    """Its seconds are noted as those of all rows that are left."""
    pipeline = opened(bundles)
    asked = [question(0), question(1), question(5, 2)]
    expected, stages = ran(pipeline, asked)
    turns = {stage.label: iter((20, None)) for stage in pipeline.bundle.of_kind("prefill")}

    def once(piece: Piece) -> int | None:
        return next(turns[piece.stage]) if piece.stage in turns else None

    got, pieces = ran(pipeline, asked, once)
    assert len(pieces) == len(stages) + len(turns)
    assert equal(got, expected)


def test_graphs_that_write_no_past_run_stage_by_stage(bundles: Bundles) -> None:
    pipeline = opened(bundles, "primitive", "onnxruntime")
    expected, stages = ran(pipeline, [question(1)])
    got, pieces = ran(pipeline, [question(1)], of(16))
    assert [each.stage for each in pieces] == [each.stage for each in stages]
    assert all(each.queries is None for each in pieces)
    assert equal(got, expected)


def test_every_stage_that_runs_waits_for_its_turn(bundles: Bundles) -> None:
    pipeline = opened(bundles)
    _, pieces = ran(pipeline, [question(1)])
    kinds = [each.stage for each in pieces]
    assert kinds == [stage.label for stage in pipeline.bundle.stages.values()]


LONG = Piece.of_queries("prefill_0", ((0, 1000),), 100.0, 1.0)


def test_work_grows_with_the_keys_that_a_query_attends_to() -> None:
    assert LONG.work == 1000 * (100 + 1000)
    assert LONG.first(None) == LONG.work and LONG.first(1000) == LONG.work
    later = Piece.of_queries("prefill_0", ((900, 1000), (0, 10)), 100.0, 1.0)
    assert later.first(50) == 50 * (100 + 950)
    assert later.work == 100 * (100 + 1000) + 10 * (100 + 10)
    assert (LONG.queries, later.queries, Piece("vision", 9).queries) == (1000, 100, None)


def test_a_piece_takes_the_seconds_that_it_is_given() -> None:
    pace = Pace()
    assert pace.least_seconds(LONG) == 0 and pace.queries(LONG, 5.0) == LEAST_QUERIES
    pace.record(LONG, None, 11.0)  # 1e-5 s per unit of work
    assert pace.queries(LONG, 11.01) is None and pace.queries(LONG, math.inf) is None
    half = pace.queries(LONG, 5.6)
    assert half is not None and 500 <= half < 516
    third = pace.queries(LONG, 3.7)
    assert third is not None and 334 <= third < 350
    assert pace.queries(LONG, 0.001) == pace.queries(LONG, 0.0) == LEAST_QUERIES
    assert pace.least_seconds(LONG) == pytest.approx(128 * (100 + 128) * 1e-5)


def test_no_piece_leaves_a_short_one_behind() -> None:
    pace = Pace()
    for length in range(2, 700, 3):
        left = Piece.of_queries("prefill_0", ((0, length),), 100.0, 0.0)
        pace.record(left, None, 1.0)
        for seconds in (0.0, 0.1, 0.3, 0.6, 0.9):
            queries = pace.queries(left, seconds)
            rest = 0 if queries is None else length - queries
            assert rest == 0 or (rest >= LEAST_QUERIES and queries % 16 == 0), (length, seconds)


def test_the_pace_follows_what_pieces_take() -> None:
    pace, tower = Pace(), Piece("vision", 100)
    assert pace.queries(tower, 0.1) is None  # it runs as a whole
    pace.record(tower, None, 2.0)
    assert pace.least_seconds(tower) == pytest.approx(2.0)
    pace.record(tower, None, 1.0)
    assert pace.least_seconds(tower) == pytest.approx(1.5)
    assert pace.least_seconds(Piece("vision", 50)) == pytest.approx(0.75)
