"""Scenes: the same for a seed, true to their objects, and of every kind."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest

from trio_deploy.evaluation import scenes

FAMILIES = ("busy", "smooth")


@pytest.fixture(scope="module")
def some() -> list[scenes.Scene]:
    return [scenes.generate(seed, family) for seed in range(40) for family in FAMILIES]


def test_seed_decides_everything() -> None:
    one, again, other = scenes.generate(7), scenes.generate(7), scenes.generate(8)
    assert np.array_equal(one.image, again.image)
    assert one.objects == again.objects and one.questions == again.questions
    assert not np.array_equal(one.image, other.image)
    assert not np.array_equal(one.image, scenes.generate(7, "smooth").image)


def test_seed_ranges_are_disjoint() -> None:
    ranges = sorted(
        (scenes.TRAIN_SEEDS, scenes.TUNING_SEEDS, scenes.TEST_SEEDS), key=lambda r: r.start
    )
    assert all(a.stop <= b.start for a, b in pairwise(ranges))


def test_every_kind_is_asked(some: list[scenes.Scene]) -> None:
    kinds = Counter(q.kind for s in some for q in s.questions)
    assert set(kinds) == set(scenes.KINDS) and len(scenes.KINDS) >= 7
    assert min(kinds.values()) >= 40
    assert all(len(s.questions) == 16 for s in some)


def test_picture_and_contents(some: list[scenes.Scene]) -> None:
    for s in some:
        assert s.image.size == (192, 192) and s.image.mode == "RGB"
        assert len({(o.colour, o.name) for o in s.shapes}) == len(s.shapes) >= 4
        assert 2 <= len(s.plate.digits) <= 4
        assert (15 <= len(s.distractors) <= 20) == (s.family == "busy")
        spots = [(o.x, o.y) for o in s.objects + s.distractors]
        assert all(4 <= x < 188 and 4 <= y < 188 for x, y in spots)
        assert len(set(spots)) == len(spots)


def _name(s: scenes.Scene, words: str) -> scenes.Thing:
    """The only shape that this description fits."""
    *colour, name = words.split()
    found = [o for o in s.shapes if o.name == name and colour in ([], [o.colour])]
    assert len(found) == 1, words
    return found[0]


def _answer(s: scenes.Scene, kind: str, text: str) -> str:
    """The answer, worked out from the text and the objects alone."""
    text = text.removesuffix("?")
    if kind == "plate":
        return " ".join(s.plate.digits)
    if kind == "color":
        return _name(s, text.removeprefix("what color is the ")).colour
    if kind == "shape":
        colour = text.removeprefix("what shape is ")
        (found,) = (o for o in s.shapes if o.colour == colour)
        return found.name
    if kind == "exists":
        colour, name = text.split()[-2:]
        return "yes" if any(o.colour == colour and o.name == name for o in s.shapes) else "no"
    if kind == "count":
        plural = text.split()[2]
        return str(sum(scenes.PLURALS[o.name] == plural for o in s.shapes))
    if kind == "digit":
        return _name(s, text.removeprefix("what digit is on the ")).digits
    if kind == "where":
        thing = _name(s, text.removeprefix("where is the "))
        return f"{'top' if thing.y < 96 else 'bottom'} {'left' if thing.x < 96 else 'right'}"
    relation = " left of the " if kind == "left" else " above the "
    one, other = (_name(s, t) for t in text.removeprefix("is the ").split(relation))
    return "yes" if (one.x < other.x if kind == "left" else one.y < other.y) else "no"


def test_answers_follow_from_the_objects(some: list[scenes.Scene]) -> None:
    for s in some:
        for q in s.questions:
            assert q.answer == _answer(s, q.kind, q.text), (s.seed, s.family, q)


def test_things_are_where_the_scene_says(some: list[scenes.Scene]) -> None:
    """Just beside its centre, where no digit is drawn, a shape has its colour."""
    for s in some:
        pixels = np.asarray(s.image).astype(int)
        for o in s.shapes:
            seen = pixels[o.y + 6, o.x - 4 : o.x + 4].mean(0)
            assert np.abs(seen - scenes.COLOURS[o.colour]).max() <= 14, (s.seed, s.family, o)
