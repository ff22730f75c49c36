"""SVG by hand: elements, line styles and legends that every chart shares."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape
from importlib import resources

GLYPH = 6.7  # pixels, maximum mean width of a character of the charts' type
RADIUS = 4.6  # pixels, of a mark
COLOURS = 14  # charts.css has as many, for light and for dark
DASHES = ("", "7 3", "2.5 2.5", "8 3 2 3", "12 4")
_KEY = 34  # pixels, width of a line's sample in a legend
_SWATCH = 12  # pixels, side of a coloured square in a legend
_ROW = 20  # pixels, from one line of a legend to the next


def element(tag: str, content: str = "", /, **attributes: object) -> str:
    """An element; `content` is markup, attributes are escaped, None leaves one out.

    `class_` stands for class, other underscores for hyphens.
    """
    written = "".join(
        f' {name.rstrip("_").replace("_", "-")}="{escape(_text(value))}"'
        for name, value in attributes.items()
        if value is not None
    )
    return f"<{tag}{written}>{content}</{tag}>" if content else f"<{tag}{written}/>"


def _text(value: object) -> str:
    return f"{round(value, 1):g}" if isinstance(value, float) else str(value)


def text(x: float, y: float, said: str, **attributes: object) -> str:
    """Text whose baseline begins at (x, y); escaped."""
    return element("text", escape(said, quote=False), x=x, y=y, **attributes)


def stylesheet() -> str:
    """The colours and classes of all charts, for light and dark."""
    return resources.files(__package__).joinpath("charts.css").read_text(encoding="utf-8")


@dataclass(frozen=True)
class Drawing:
    """A finished chart.

    Attributes:
        width, height: of its coordinates, in pixels.
        label: what it shows, for readers without eyes on it.
        body: the elements.
    """

    width: int
    height: int
    label: str
    body: str

    def inline(self, class_: str = "") -> str:
        """The chart inside a page that has `stylesheet`."""
        return element(
            "svg",
            self.body,
            class_=f"chart {class_}".strip(),
            viewBox=f"0 0 {self.width} {self.height}",
            role="img",
            aria_label=self.label,
        )

    def file(self, scale: float = 1.5) -> str:
        """The chart as a file of its own, on paper of its own, `scale` times as wide by itself."""
        return (
            element(
                "svg",
                f"<title>{escape(self.label)}</title><style>{stylesheet()}</style>"
                + element("rect", class_="paper", width=self.width, height=self.height)
                + self.body,
                xmlns="http://www.w3.org/2000/svg",
                class_="chart",
                viewBox=f"0 0 {self.width} {self.height}",
                width=round(scale * self.width),
                height=round(scale * self.height),
                role="img",
            )
            + "\n"
        )


@dataclass(frozen=True)
class LineStyle:
    """Colour, dashes and mark of a line; no two of seventy are equal.

    Attributes:
        colour: number of a colour class of charts.css.
        dash: the stroke's dash pattern; empty: solid.
        mark: path of the mark, around the origin.
    """

    colour: int
    dash: str
    mark: str


def line_style(number: int) -> LineStyle:
    """The style of the line of this number."""
    return LineStyle(number % COLOURS, DASHES[number % len(DASHES)], _MARKS[number % len(_MARKS)])


def line(path: str, style: LineStyle) -> str:
    """A line of a chart, in the colour of the group around it."""
    return element("path", class_="line", d=path, stroke_dasharray=style.dash or None)


def mark(x: float, y: float, style: LineStyle, title: str = "") -> str:
    """A point's mark, in the colour of the group around it."""
    said = f"<title>{escape(title)}</title>" if title else ""
    place = f"translate({round(x, 1):g} {round(y, 1):g})"
    return element("path", said, class_="mark", transform=place, d=style.mark)


def path(points: Iterable[tuple[float, float]]) -> str:
    """A path through (x, y)."""
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)


def line_legend(names: Sequence[str], left: float, top: float, width: float) -> tuple[str, float]:
    """Samples of lines with their names, in rows; and the height that they take."""

    def sample(number: int) -> str:
        style = line_style(number)
        return element(
            "g",
            line("M-16,0H16", style) + mark(0, 0, style),
            class_=f"c{style.colour}" + (" first" if number == 0 else ""),
            transform="translate(17 -4)",
        )

    return _legend([(sample(n), name) for n, name in enumerate(names)], _KEY, left, top, width)


def swatch_legend(
    parts: Sequence[tuple[str, str]], left: float, top: float, width: float
) -> tuple[str, float]:
    """Squares in the colours of classes, as (class, name), in rows; and the height they take."""
    squares = [
        (element("rect", class_=f"part {class_}", y=-10, width=_SWATCH, height=_SWATCH), name)
        for class_, name in parts
    ]
    return _legend(squares, _SWATCH, left, top, width)


def _legend(
    entries: Sequence[tuple[str, str]], key: float, left: float, top: float, width: float
) -> tuple[str, float]:
    """Columns of equal width, as many as fit."""
    longest = max((len(name) for _, name in entries), default=0)
    cell = key + 6 + GLYPH * longest + 10
    columns = max(1, min(len(entries), int((width + 10) // cell)))
    drawn = []
    for number, (sample, name) in enumerate(entries):
        x = left + (number % columns) * width / columns
        y = top + 14 + number // columns * _ROW
        drawn.append(
            element("g", sample + text(key + 6, 0, name), transform=f"translate({x:.1f} {y:.1f})")
        )
    return "".join(drawn), _ROW * math.ceil(len(entries) / columns) if entries else 0.0


def _polygon(corners: int, turn: float = 0.0, inner: float | None = None) -> str:
    """Corners on a circle, the first at the top; with `inner` a star."""
    count = corners if inner is None else 2 * corners
    points = []
    for i in range(count):
        radius = RADIUS * (1.15 if inner is None else 1.45 * (1 if i % 2 == 0 else inner))
        angle = 2 * math.pi * (i / count + turn)
        points.append((radius * math.sin(angle), -radius * math.cos(angle)))
    return path(points) + "Z"


_MARKS = (
    "M-4.4,0a4.4,4.4 0 1 0 8.8,0a4.4,4.4 0 1 0 -8.8,0Z",
    _polygon(4, 1 / 8),
    _polygon(3),
    _polygon(4),
    _polygon(3, 1 / 2),
    _polygon(4, inner=0.35),
    _polygon(5),
    _polygon(5, inner=0.5),
    _polygon(3, 1 / 4),
    _polygon(4, 1 / 8, 0.35),
    _polygon(6),
    _polygon(3, 3 / 4),
    _polygon(3, inner=0.35),
)
