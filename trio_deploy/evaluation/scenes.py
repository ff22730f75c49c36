"""Pictures to ask about: coloured shapes, digits and a number plate on noisy ground.

A scene is a 192 x 192 picture of 4 x 4 cells, with what is in it and questions whose answers
follow from that. The "busy" family has textured ground and 15 to 20 distractors: small things that
all look different and that nobody asks about, so that whoever keeps 11 % of the visual tokens has
to heed the question. The "smooth" family has fewer objects on plain ground and no distractors.
Everything is a function of the seed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from PIL import Image, ImageDraw

Colour = tuple[int, int, int]
T = TypeVar("T")

SIZE = 192
CELL = 48
PATCH = 12  # digits are drawn into one patch of the tiny VLM each

# Disjoint seeds: nothing that is tuned or tested on was trained on.
TRAIN_SEEDS = range(0, 1_000_000)
TUNING_SEEDS = range(1_000_000, 1_100_000)
TEST_SEEDS = range(2_000_000, 2_100_000)
FIRST_SCENE = 10_000
"""First scene of a split to ask about: model card, README and tests ask about earlier ones."""

COLOURS = {
    "red": (214, 32, 38),
    "green": (28, 150, 52),
    "blue": (36, 70, 214),
    "yellow": (246, 222, 40),
    "purple": (138, 40, 160),
    "orange": (246, 132, 24),
    "white": (248, 248, 248),
    "black": (14, 14, 16),
}
SHAPES = ("circle", "square", "triangle", "star", "heart", "cross")
PLURALS = {s: s + ("es" if s == "cross" else "s") for s in SHAPES}
DISTRACTORS = (
    "ring",
    "ex",
    "zigzag",
    "arrow",
    "bars",
    "dots",
    "frame",
    "chevron",
    "ladder",
    "hourglass",
    "arch",
    "hash",
)
DISTRACTOR_COLOURS = {
    "brown": (120, 72, 36),
    "pink": (244, 150, 184),
    "teal": (20, 136, 136),
    "olive": (128, 128, 28),
    "navy": (24, 32, 100),
    "lime": (170, 230, 70),
    "sky": (130, 200, 246),
    "maroon": (110, 16, 40),
    "tan": (220, 186, 140),
    "mint": (160, 240, 200),
}
TEXTURES = ("plain", "stripes", "checks", "waves", "speckles")
KINDS = ("color", "shape", "exists", "count", "digit", "plate", "where", "left", "above")
RELATIONS = ("left", "above")

# How often a kind is drawn; the plate has a single question a scene.
WEIGHTS = {
    "color": 2.0,
    "shape": 2.0,
    "exists": 2.5,
    "count": 3.0,
    "digit": 2.5,
    "where": 1.5,
    "left": 2.0,
    "above": 2.0,
}

GLYPHS = {
    "0": ".##. #..# #..# #..# .##.",
    "1": "..#. .##. ..#. ..#. .###",
    "2": "###. ...# .##. #... ####",
    "3": "###. ...# .##. ...# ###.",
    "4": "#..# #..# #### ...# ...#",
    "5": "#### #... ###. ...# ###.",
    "6": ".##. #... ###. #..# .##.",
    "7": "#### ...# ..#. .#.. .#..",
    "8": ".##. #..# .##. #..# .##.",
    "9": ".##. #..# .### ...# .##.",
}


def _glyph(digit: str) -> Image.Image:
    """One digit as an 8 x 10 mask."""
    rows = np.array([[c == "#" for c in row] for row in GLYPHS[digit].split()], np.uint8)
    return Image.fromarray(rows.repeat(2, 0).repeat(2, 1) * 255)


_MASKS = {d: _glyph(d) for d in GLYPHS}
_GRID_Y, _GRID_X = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32)


class Question(NamedTuple):
    kind: str
    text: str
    answer: str


@dataclass(frozen=True)
class Thing:
    """Something in the picture, centred at pixel (x, y). A plate's digits start in x's patch."""

    family: Literal["shape", "plate", "distractor"]
    name: str
    colour: str
    digits: str
    x: int
    y: int


@dataclass
class Scene:
    seed: int
    family: str
    image: Image.Image
    objects: list[Thing]  # shapes and the plate: what questions are about
    distractors: list[Thing]
    textures: np.ndarray  # [4,4] index into TEXTURES, one a cell
    questions: list[Question] = field(default_factory=list)

    @property
    def shapes(self) -> list[Thing]:
        return [o for o in self.objects if o.family == "shape"]

    @property
    def plate(self) -> Thing:
        return next(o for o in self.objects if o.family == "plate")


# --- drawing ----------------------------------------------------------------------------------


def _ground(rng: np.random.Generator, busy: bool) -> tuple[np.ndarray, np.ndarray]:
    """Ground [192,192,3] in muted tones, and the texture of each cell [4,4]."""
    angle = rng.uniform(0, 2 * math.pi)
    ramp = (_GRID_X * math.cos(angle) + _GRID_Y * math.sin(angle)) / SIZE
    base = rng.uniform(100, 165, 3).astype(np.float32) * 0.5 + rng.uniform(50, 82)
    textures = np.zeros((4, 4), np.int64)
    relief = ramp * rng.uniform(10, 30)
    if busy:
        seeds = rng.uniform(0, 4, (3, 2))
        kinds = rng.choice(len(TEXTURES), 3, replace=False)
        cells = np.moveaxis(np.mgrid[0:4, 0:4], 0, -1) + 0.5
        region = ((cells[:, :, None] - seeds) ** 2).sum(-1).argmin(-1)
        textures = kinds[region]
        large = region.repeat(CELL, 0).repeat(CELL, 1)
        for r in range(3):
            inside = large == r
            relief[inside] += _texture(rng, TEXTURES[kinds[r]])[inside]
        coarse = rng.normal(0, 10, (24, 24)).astype(np.float32)
        relief += coarse.repeat(8, 0).repeat(8, 1)
        noise = rng.integers(-20, 21, (SIZE, SIZE, 3), dtype=np.int8)
    else:
        noise = rng.integers(-4, 5, (SIZE, SIZE, 3), dtype=np.int8)
    return base + relief[..., None] + noise, textures


def _texture(rng: np.random.Generator, kind: str) -> np.ndarray:
    angle, depth = rng.uniform(0, math.pi), rng.uniform(16, 30)
    u = _GRID_X * math.cos(angle) + _GRID_Y * math.sin(angle)
    v = _GRID_Y * math.cos(angle) - _GRID_X * math.sin(angle)
    step = 2 * math.pi / rng.uniform(6, 14)
    if kind == "stripes":
        return depth * np.sign(np.sin(u * step))
    if kind == "checks":
        return depth * np.sign(np.sin(u * step) * np.sin(v * step))
    if kind == "waves":
        return depth * np.sin(u * step + 2 * np.sin(v * 0.15))
    if kind == "speckles":
        spots = rng.random((SIZE // 3, SIZE // 3)) < 0.12
        return 1.8 * depth * spots.repeat(3, 0).repeat(3, 1).astype(np.float32)
    return np.zeros_like(u)


def _draw_shape(
    draw: ImageDraw.ImageDraw, name: str, x: int, y: int, r: float, fill: Colour
) -> None:
    if name == "circle":
        draw.ellipse((x - r, y - r, x + r, y + r), fill)
    elif name == "square":
        draw.rectangle((x - 0.86 * r, y - 0.86 * r, x + 0.86 * r, y + 0.86 * r), fill)
    elif name == "triangle":
        draw.polygon(
            [(x, y - 1.1 * r), (x - 1.1 * r, y + 0.8 * r), (x + 1.1 * r, y + 0.8 * r)], fill
        )
    elif name == "star":
        points = []
        for i in range(10):
            a, q = math.pi * i / 5 - math.pi / 2, (1.15 if i % 2 == 0 else 0.52) * r
            points.append((x + q * math.cos(a), y + q * math.sin(a)))
        draw.polygon(points, fill)
    elif name == "heart":
        draw.ellipse((x - r, y - 0.9 * r, x + 0.1 * r, y + 0.2 * r), fill)
        draw.ellipse((x - 0.1 * r, y - 0.9 * r, x + r, y + 0.2 * r), fill)
        draw.polygon(
            [(x - 0.96 * r, y - 0.1 * r), (x + 0.96 * r, y - 0.1 * r), (x, y + 1.1 * r)], fill
        )
    else:
        arm = 0.4 * r
        draw.rectangle((x - 1.05 * r, y - arm, x + 1.05 * r, y + arm), fill)
        draw.rectangle((x - arm, y - 1.05 * r, x + arm, y + 1.05 * r), fill)


def _draw_distractor(
    draw: ImageDraw.ImageDraw, name: str, x: int, y: int, r: int, fill: Colour
) -> None:
    left, top, right, low = x - r, y - r, x + r, y + r
    if name == "ring":
        draw.ellipse((left, top, right, low), None, fill, 3)
    elif name == "ex":
        draw.line((left, top, right, low), fill, 3)
        draw.line((left, low, right, top), fill, 3)
    elif name == "zigzag":
        xs = np.linspace(left, right, 5)
        draw.line([(q, top if i % 2 else low) for i, q in enumerate(xs)], fill, 2)
    elif name == "arrow":
        draw.line((left, y, right, y), fill, 3)
        draw.polygon([(right, y), (x, top), (x, low)], fill)
    elif name == "bars":
        for q in range(left, right + 1, 5):
            draw.rectangle((q, top, q + 1, low), fill)
    elif name == "dots":
        for q in (left + 2, right - 2):
            for p in (top + 2, low - 2):
                draw.ellipse((q - 3, p - 3, q + 3, p + 3), fill)
    elif name == "frame":
        draw.rectangle((left, top, right, low), None, fill, 2)
        draw.rectangle((x - 2, y - 2, x + 2, y + 2), fill)
    elif name == "chevron":
        draw.line([(left, top), (x, y), (left, low)], fill, 3)
        draw.line([(x, top), (right, y), (x, low)], fill, 3)
    elif name == "ladder":
        draw.rectangle((left + 2, top, left + 3, low), fill)
        draw.rectangle((right - 3, top, right - 2, low), fill)
        for p in range(top + 2, low, 5):
            draw.rectangle((left + 2, p, right - 2, p + 1), fill)
    elif name == "hourglass":
        draw.polygon([(left, top), (right, top), (left, low), (right, low)], fill)
    elif name == "arch":
        draw.arc((left, top, right, low + r), 180, 360, fill, 4)
    else:
        for q in (x - 4, x + 3):
            draw.rectangle((q, top, q + 1, low), fill)
        for p in (y - 4, y + 3):
            draw.rectangle((left, p, right, p + 1), fill)


def _shade(rng: np.random.Generator, rgb: Colour) -> Colour:
    red, green, blue = np.clip(np.array(rgb) + rng.integers(-12, 13, 3), 0, 255).tolist()
    return red, green, blue


# --- composing --------------------------------------------------------------------------------


def _compose(rng: np.random.Generator, busy: bool) -> tuple[list[Thing], list[Thing]]:
    """Shapes, the plate and the distractors, none overlapping another."""
    free = {(r, c) for r in range(4) for c in range(4)}
    row, col = int(rng.integers(4)), int(rng.integers(3))
    free -= {(row, col), (row, col + 1)}
    number = "".join(str(d) for d in rng.integers(0, 10, int(rng.integers(2, 5))))
    first = 4 * col + 1 + int(rng.integers(0, 7 - len(number)))
    jitter = rng.integers(-1, 2, 2)
    plate = Thing(
        "plate",
        "plate",
        "white",
        number,
        first * PATCH + PATCH // 2 + int(jitter[0]),
        (4 * row + 1 + int(rng.integers(2))) * PATCH + PATCH // 2 + int(jitter[1]),
    )

    # One shape comes several times, so that counting has something to count.
    total = int(rng.integers(5, 9) if busy else rng.integers(4, 7))
    repeated, *others = rng.permutation(SHAPES)
    names = [repeated] * int(rng.integers(1, 5))
    for other in others:
        names += [other] * (1 if rng.random() < 0.8 else 2)
    names = names[:total]
    palette = rng.permutation(list(COLOURS))
    taken: set[tuple[str, str]] = set()
    cells = sorted(free)
    cells = [cells[i] for i in rng.permutation(len(cells))]
    shapes = []
    for i, name in enumerate(names):
        # Mostly a colour of its own (questions need unique ones), at times a repeated one.
        colour = str(palette[i % 8] if rng.random() < 0.7 else rng.choice(palette))
        while (name, colour) in taken:
            colour = str(rng.choice(palette))
        taken.add((name, colour))
        r, c = cells[i]
        spot = rng.integers(0, 2, 2) * PATCH + 18 + rng.integers(-1, 2, 2)
        digits = str(rng.integers(10)) if rng.random() < 0.75 else ""
        x, y = c * CELL + int(spot[0]), r * CELL + int(spot[1])
        shapes.append(Thing("shape", str(name), colour, digits, x, y))

    distractors = []
    if busy:
        slots = [(r, c, s) for r, c in cells[len(names) :] for s in range(4)]
        count = int(rng.integers(15, 21))
        kinds = np.concatenate([rng.permutation(DISTRACTORS) for _ in range(2)])
        for i, s in enumerate(rng.permutation(len(slots))[:count]):
            r, c, q = slots[s]
            jitter = rng.integers(-1, 2, 2)
            x = c * CELL + q % 2 * 24 + 12 + int(jitter[0])
            y = r * CELL + q // 2 * 24 + 12 + int(jitter[1])
            colour = str(rng.choice(list(DISTRACTOR_COLOURS)))
            distractors.append(Thing("distractor", str(kinds[i]), colour, "", x, y))
    return [*shapes, plate], distractors


def generate(seed: int, family: Literal["busy", "smooth"] = "busy", questions: int = 16) -> Scene:
    """The scene of this seed, with `questions` questions about it."""
    busy = family == "busy"
    rng = np.random.default_rng([seed, busy])
    objects, distractors = _compose(rng, busy)
    ground, textures = _ground(rng, busy)
    image = Image.fromarray(np.clip(ground, 0, 255).astype(np.uint8))
    draw = ImageDraw.Draw(image)
    for thing in distractors:
        fill = _shade(rng, DISTRACTOR_COLOURS[thing.colour])
        _draw_distractor(draw, thing.name, thing.x, thing.y, int(rng.integers(7, 10)), fill)
    for thing in objects:
        x, y = thing.x, thing.y
        if thing.family == "plate":
            end = x + PATCH * (len(thing.digits) - 1)
            draw.rectangle((x - 10, y - 9, end + 9, y + 8), (240, 242, 246), (20, 20, 40), 1)
            ink = (10, 10, 30)
        else:
            _draw_shape(
                draw, thing.name, x, y, rng.uniform(13, 16), _shade(rng, COLOURS[thing.colour])
            )
            light = thing.colour in ("white", "yellow", "orange")
            ink = (8, 8, 8) if light else (250, 250, 250)
        for i, digit in enumerate(thing.digits):
            image.paste(ink, (x + PATCH * i - 4, y - 5), _MASKS[digit])
    scene = Scene(seed, family, image, objects, distractors, textures)
    scene.questions = ask(scene, rng, questions)
    return scene


# --- asking -----------------------------------------------------------------------------------


def ask(scene: Scene, rng: np.random.Generator, count: int) -> list[Question]:
    """`count` questions: the plate once, the rest by WEIGHTS, without repetition if possible."""
    kinds = list(WEIGHTS)
    weights = np.array([WEIGHTS[k] for k in kinds])
    asked = {_ask(scene, rng, "plate"): None}
    for kind in rng.choice(kinds, count * 4, p=weights / weights.sum()):
        if len(asked) >= count:
            break
        question = _ask(scene, rng, str(kind))
        if question:
            asked[question] = None
    out = list(asked)
    while len(out) < count:
        out.append(out[int(rng.integers(len(out)))])
    return [out[i] for i in rng.permutation(len(out))[:count]]


def _pick(rng: np.random.Generator, items: Sequence[T]) -> T:
    return items[int(rng.integers(len(items)))]


def _ask(scene: Scene, rng: np.random.Generator, kind: str) -> Question | None:
    """One question of this kind; None if the scene has no unambiguous one."""
    shapes = scene.shapes
    names = [s.name for s in shapes]
    colours = [s.colour for s in shapes]

    def describe(thing: Thing) -> str:
        short = names.count(thing.name) == 1 and rng.random() < 0.5
        return thing.name if short else f"{thing.colour} {thing.name}"

    if kind == "plate":
        return Question(kind, "what is on the plate?", " ".join(scene.plate.digits))
    if kind == "color":
        unique = [s for s in shapes if names.count(s.name) == 1]
        if not unique:
            return None
        thing = _pick(rng, unique)
        return Question(kind, f"what color is the {thing.name}?", thing.colour)
    if kind == "shape":
        unique = [s for s in shapes if colours.count(s.colour) == 1]
        if not unique:
            return None
        thing = _pick(rng, unique)
        return Question(kind, f"what shape is {thing.colour}?", thing.name)
    if kind == "exists":
        pairs = {(s.colour, s.name) for s in shapes}
        if rng.random() < 0.5:
            colour, name = _pick(rng, sorted(pairs))
        elif rng.random() < 0.6:  # both exist, not together
            absent = sorted({(c, n) for c in colours for n in names} - pairs)
            if not absent:
                return None
            colour, name = _pick(rng, absent)
        else:
            absent = sorted({(c, n) for c in COLOURS for n in SHAPES} - pairs)
            colour, name = _pick(rng, absent)
        answer = "yes" if (colour, name) in pairs else "no"
        article = "an" if colour == "orange" else "a"
        return Question(kind, f"is there {article} {colour} {name}?", answer)
    if kind == "count":
        counts = {n: names.count(n) for n in SHAPES}
        number = _pick(rng, sorted(set(counts.values())))
        name = _pick(rng, [n for n in SHAPES if counts[n] == number])
        return Question(kind, f"how many {PLURALS[name]} are there?", str(number))
    if kind == "digit":
        bearing = [s for s in shapes if s.digits]
        if not bearing:
            return None
        thing = _pick(rng, bearing)
        return Question(kind, f"what digit is on the {describe(thing)}?", thing.digits)
    if kind == "where":
        thing = _pick(rng, shapes)
        place = ("top " if thing.y < SIZE // 2 else "bottom ") + (
            "left" if thing.x < SIZE // 2 else "right"
        )
        return Question(kind, f"where is the {describe(thing)}?", place)
    axis = "x" if kind == "left" else "y"
    one, other = (shapes[i] for i in rng.permutation(len(shapes))[:2])
    gap = getattr(one, axis) - getattr(other, axis)
    if abs(gap) < 20:  # the same column, or too close to tell
        return None
    relation = "left of" if kind == "left" else "above"
    text = f"is the {describe(one)} {relation} the {describe(other)}?"
    return Question(kind, text, "yes" if gap < 0 else "no")
