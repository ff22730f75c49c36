"""Schedules: points, their text and JSON forms, and what is refused."""

from __future__ import annotations

import pytest

from trio_deploy import Schedule, TrioError
from trio_deploy.schedule.schedule import PruningPoint

PAPER_11 = Schedule.parse("1:92,10:54,15:22")
PAPER_22 = Schedule.parse("1:218,10:128,15:54")
NOTHING = Schedule()


@pytest.mark.parametrize(
    ("schedule", "visual", "average"),
    [
        (PAPER_22, 576, 128),
        (PAPER_11, 576, 64),
        (Schedule.parse("1:460,10:270,15:110"), 2880, 320),
        (Schedule.parse("0:96,16:32"), 576, 64),
    ],
)
def test_published_schedules_have_their_published_average(schedule, visual, average):
    assert schedule.average(visual, 32) == average


def test_resolve_rounds_half_up_keeps_at_least_one_and_never_increases():
    assert Schedule.parse("1:0.5").resolve(5) == (3,)
    assert Schedule.parse("1:0.01,2:0.001").resolve(10) == (1, 1)
    assert Schedule((PruningPoint(1, 0.5), PruningPoint(2, 0.5))).resolve(7) == (4, 4)
    assert Schedule.parse("1:92,10:54").resolve(60) == (60, 54)
    assert Schedule.parse("1:0.5,2:0.2").resolve(0) == (0, 0)
    assert Schedule.parse("1:0").resolve(9) == (0,)


def test_segments_cover_the_layers():
    assert PAPER_11.segments(32) == [(0, 1), (1, 10), (10, 15), (15, 32)]
    assert Schedule.parse("0:96,16:32").segments(32) == [(0, 0), (0, 16), (16, 32)]
    assert NOTHING.segments(4) == [(0, 4)]


def test_json_and_text_round_trip():
    schedule = Schedule.parse("1:0.16, 10:9.4%,15:0.038")
    assert schedule.points[1].keep == pytest.approx(0.094)
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert Schedule.from_json([{"layer": 1, "keep": 5}]) == Schedule.parse("1:5")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "empty"),
        ("1", "layer:keep"),
        ("a:3", "layer:keep"),
        ("1:x", "layer:keep"),
    ],
)
def test_unreadable_text_is_refused(text, words):
    with pytest.raises(TrioError, match=words):
        Schedule.parse(text)


@pytest.mark.parametrize(
    "raw",
    [
        {"layer": 1},
        [3],
        [{"layer": 1}],
        [{"layer": 1.5, "keep": 3}],
        [{"layer": 1, "keep": "3"}],
        [{"layer": 1, "keep": True}],
        [{"layer": 1, "keep": 3, "kep": 1}],
    ],
)
def test_unreadable_json_is_refused(raw):
    with pytest.raises(TrioError):
        Schedule.from_json(raw)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("1:700", "only 576"),
        ("1:1.5", "at most 1"),
        ("1:0.0", "above 0"),
        ("1:-3", "keeps -3"),
        ("1:-1", "keeps -1"),
        ("10:54,1:22", "must increase"),
        ("1:54,1:22", "must increase"),
        ("32:5", "layers 0 to 31"),
        ("-1:5", "layers 0 to 31"),
        ("1:54,10:92", "not increase"),
        ("1:0.1,10:0.2", "not increase"),
        ("33:5", "layers 0 to 31"),
        ("1:-0.5", "above 0"),
        ("1:0.5,10:54", "mixes"),
        ("1:54,10:0.5", "mixes"),
    ],
)
def test_impossible_schedules_are_refused(text, words):
    with pytest.raises(TrioError, match=words):
        Schedule.parse(text).validate(32, visual=576)


def test_as_many_keeps_as_points_are_taken():
    assert PAPER_11.with_keeps((3, 2, 1)) == Schedule.parse("1:3,10:2,15:1")
    for keeps in ((3, 2), (3, 2, 1, 1)):
        with pytest.raises(ValueError, match="zip"):
            PAPER_11.with_keeps(keeps)


def test_schedules_and_points_serve_as_keys():
    assert {PAPER_11: "paper"}[Schedule.parse("1:92,10:54,15:22")] == "paper"
    assert {PruningPoint(1, 92): "first"}[PAPER_11.points[0]] == "first"


def test_unknown_method_is_refused():
    with pytest.raises(TrioError, match="unknown pruning method 'trio:x'"):
        Schedule.parse("1:0.5:trio:x").validate(32)
    with pytest.raises(TrioError, match="unknown pruning method 'best'"):
        Schedule((PruningPoint(1, 0.5, "best"),)).validate(32)


@pytest.mark.parametrize("text", ["0:0", "31:576", "1:1.0", "0:0.5:vscan", "0:9:cls-attention"])
def test_the_first_and_last_layer_and_every_keep_within_bounds_are_taken(text):
    Schedule.parse(text).validate(32, visual=576)


@pytest.mark.parametrize("text", ["1:1.0, 2:0.5", "1:1", "1:92, 10:54", "1:0.16", "0:0.5:vscan"])
def test_a_schedule_prints_as_it_is_read(text):
    assert str(Schedule.parse(text)) == text


def test_a_point_may_name_its_method():
    schedule = Schedule.parse("0:96:divprune, 16:32")
    assert schedule.methods == ("divprune", "trio")
    assert Schedule.parse(str(schedule)) == schedule
    assert Schedule.from_json(schedule.to_json()) == schedule
    assert Schedule.parse("1:92,10:54:fastv", "dart").methods == ("dart", "fastv")
    assert PAPER_11.with_method("random").methods == ("random",) * 3
    assert PAPER_11.with_method("random").resolve(576) == PAPER_11.resolve(576)


def test_a_ratio_of_less_than_half_a_token_is_said_to_be_rounded_up():
    schedule = Schedule.parse("0:0.1:divprune,8:0.004")
    assert schedule.resolve(16) == (2, 1)
    assert schedule.rounded_up(16) == (
        "the budget keeps less than one of 16 visual tokens (0.064 before layer 8): one is kept, "
        "which is more than was asked for"
    )
    assert schedule.rounded_up(125) is None, "half a token is rounded as any number"
    assert schedule.rounded_up(0) is None and Schedule.parse("1:1").rounded_up(9) is None
