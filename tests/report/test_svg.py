"""What all charts are drawn with."""

from __future__ import annotations

import re

from trio_deploy.report.svg import COLOURS, element, line_legend, line_style, stylesheet, text


def test_every_line_of_a_chart_has_a_style_of_its_own():
    styles = [line_style(number) for number in range(100)]
    assert len(set(styles)) == 100
    assert len({one.colour for one in styles[:COLOURS]}) == COLOURS >= 12
    assert len({one.mark for one in styles[:12]}) == 12 and len({s.dash for s in styles}) > 3
    css = stylesheet()
    for theme in css.split("@media (prefers-color-scheme: dark)")[:2]:
        colours = re.findall(r"--line-\d+: (#\w{6});", theme)[:COLOURS]
        assert len(set(colours)) == COLOURS
    assert all(f".c{number} {{ --c: var(--line-{number}); }}" in css for number in range(COLOURS))


def test_what_is_written_is_escaped():
    assert text(1, 2.04, "<b> & c") == '<text x="1" y="2">&lt;b&gt; &amp; c</text>'
    assert element("g", class_='a"b', d=None) == '<g class="a&quot;b"/>'


def test_a_legend_has_as_many_columns_as_fit():
    names = [f"method {number}" for number in range(6)]
    _, wide = line_legend(names, 0, 0, 660)
    _, narrow = line_legend(names, 0, 0, 130)
    assert (wide, narrow) == (20, 120)
    assert line_legend([], 0, 0, 100) == ("", 0.0)
