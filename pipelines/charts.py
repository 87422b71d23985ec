"""Charts of the report's page, as HTML with inline SVG: lines, histogram, stacked bar, time line.

Shapes are drawn in a plane of 1000 by 1000 that stretches with the page; texts stay outside of it, so that they are as large on a
phone as on a screen. Classes and colours are in `report_page`. What comes from users is escaped here.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

PLANE = 1000
MAX_MARKS = 300
DURATIONS = (1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 43200, 86400)


class Series(NamedTuple):
    """A line: its name, points (x, y) with rising x, and its class (`c1` to `c8`, `rest`)."""

    name: str
    points: Sequence[tuple[float, float]]
    style: str = "c1"


class Bar(NamedTuple):
    """From one x to another on a lane: its class and what it says when pointed at."""

    left: float
    right: float
    style: str
    title: str
    label: str = ""


class Mark(NamedTuple):
    """Something at one x of a lane: a sign, its class, and what it says when pointed at."""

    x: float
    sign: str
    style: str
    title: str


class Lane(NamedTuple):
    """A row of the time line."""

    name: str
    bars: Sequence[Bar]
    marks: Sequence[Mark] = ()


def text(value: object) -> str:
    """Anything as HTML text or as the value of a quoted attribute."""
    return html.escape(str(value))


def number(value: float) -> str:
    """A number as an axis has room for: 950, 1,200, 12k, 3.4M."""
    for limit, unit in ((1e9, "G"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= limit:
            return f"{value / (1e3 if unit == 'k' else limit):.3g}{unit}"
    return f"{value:,.0f}" if abs(value) >= 10 or value == int(value) else f"{value:.2g}"


def duration(seconds: float) -> str:
    """Seconds as an axis has room for: 40s, 5m, 1m30, 2h, 3d."""
    whole = round(seconds)
    for size, unit, part, below in ((86400, "d", 3600, "h"), (3600, "h", 60, "m"), (60, "m", 1, "")):
        if whole >= size:
            rest = whole % size // part
            return f"{whole // size}{unit}{f'{rest}{below}' if rest else ''}"
    return f"{whole}s"


def lines(
    series: Sequence[Series],
    right: float,
    top: float | None = None,
    label: Callable[[float], str] = number,
    title: str = "",
) -> str:
    """Lines over seconds from 0 to `right`, and y from 0 to `top` or the largest there is."""
    drawn = [one for one in series if len(one.points) >= 2]
    if not drawn or right <= 0:
        return '<p class="none">Too short to plot.</p>'
    highest = max(y for one in drawn for _, y in one.points)
    ticks = _ticks(highest if top is None else top)
    top = top or ticks[-1] or 1.0
    grid = "".join(f"M0 {PLANE - y / top * PLANE:.0f}H{PLANE}" for y in ticks)
    shapes = [f'<path class="grid" d="{grid}"/>']
    for one in reversed(drawn):  # the first lies above the others
        points = " ".join(
            f"{min(x / right, 1) * PLANE:.1f},{PLANE - min(y / top, 1) * PLANE:.1f}" for x, y in one.points
        )
        shapes.append(f'<polyline class="line {one.style}" points="{points}"/>')
    labels = "".join(f'<span style="bottom:{y / top:.2%}">{text(label(y))}</span>' for y in ticks)
    names: dict[str, str] = {}  # lines of one style and name have one entry
    for one in drawn:
        names.setdefault(one.name, one.style)
    keys = "".join(f'<span><i class="{style}"></i>{text(name)}</span>' for name, style in names.items())
    legend = f'<div class="legend">{keys}</div>' if len(names) > 1 else ""
    return (
        f'{legend}<div class="plot" role="img" aria-label="{text(title)}"><div class="y">{labels}</div>'
        f'<svg viewBox="0 0 {PLANE} {PLANE}" preserveAspectRatio="none">{"".join(shapes)}</svg></div>'
        f'<div class="x">{_times(right)}</div>'
    )


def histogram(counts: Sequence[int], style: str = "c1") -> str:
    """Bars of a histogram whose bucket i holds 2**(i-1) to 2**i - 1, and bucket 0 holds 0."""
    filled = [bucket for bucket, count in enumerate(counts) if count]
    if not filled:
        return '<p class="none">Nothing to count.</p>'
    total, most = sum(counts), max(counts)
    rows = []
    for bucket in range(filled[0], filled[-1] + 1):
        first, last = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
        name = f"{first:,}" if first == last else f"{first:,} to {last:,}"
        if bucket == len(counts) - 1:
            name = f"{first:,} and more"
        share = counts[bucket] / total
        bar = f'<b class="{style}" style="width:{counts[bucket] / most:.2%}"></b>' if counts[bucket] else ""
        rows.append(
            f'<tr><th scope="row">{name}</th><td class="bar">{bar}</td>'
            f'<td class="n">{large(counts[bucket])}</td><td class="n dim">{percent(share)}</td></tr>'
        )
    return f'<table class="histogram">{"".join(rows)}</table>'


def large(count: int) -> str:
    """A count in full, unless it is very large."""
    return f"{count:,}" if count < 10_000_000 else number(count)


def percent(share: float) -> str:
    """A share of 1 in percent, with a digit where it is small."""
    return f"{share:.0%}" if share >= 0.1 or share == 0 else f"{share:.1%}" if share >= 0.001 else "<0.1%"


def stack(parts: Sequence[tuple[str, float, str]], label: Callable[[float], str]) -> str:
    """One bar of several parts: name, value, class."""
    total = sum(value for _, value, _ in parts) or 1.0
    bar = "".join(f'<b class="{style}" style="width:{value / total:.2%}"></b>' for _, value, style in parts)
    keys = "".join(
        f'<span><i class="{style}"></i>{text(name)} {text(label(value))}</span>' for name, value, style in parts
    )
    return f'<div class="stack">{bar}</div><div class="legend">{keys}</div>'


def timeline(lanes: Sequence[Lane], right: float) -> str:
    """Rows of bars and marks over seconds from 0 to `right`."""
    if right <= 0:
        return '<p class="none">Too short to plot.</p>'

    def at(x: float) -> str:
        return f"{min(max(x / right, 0), 1):.3%}"

    left_marks = MAX_MARKS
    rows = []
    for lane in lanes:
        bars = "".join(
            f'<b class="{bar.style}" style="left:{at(bar.left)};width:{at(bar.right - bar.left)}" title="{text(bar.title)}">'
            f"{text(bar.label)}</b>"
            for bar in lane.bars
        )
        shown = lane.marks[:left_marks]
        left_marks -= len(shown)
        marks = "".join(
            f'<i class="{mark.style}" style="left:{at(mark.x)}" title="{text(mark.title)}">{text(mark.sign)}</i>'
            for mark in shown
        )
        rows.append(
            f'<div class="lane"><span class="name">{text(lane.name)}</span><div class="track">{bars}{marks}</div></div>'
        )
    axis = f'<div class="lane axis"><span class="name"></span><div class="x">{_times(right)}</div></div>'
    return f'<div class="timeline">{"".join(rows)}{axis}</div>'


def _ticks(highest: float) -> list[float]:
    """Round numbers from 0 to the first that is not below `highest`; three to six of them."""
    if highest <= 0:
        return [0.0, 1.0]
    raw = highest / 4
    size = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * size for factor in (1, 2, 2.5, 5, 10) if factor * size >= raw * 0.999)
    return [round(step * count, 10) for count in range(math.ceil(highest / step - 1e-9) + 1)]


def _times(right: float) -> str:
    """Labels below an axis of seconds."""
    step = next((size for size in DURATIONS if size >= right / 6), 86400 * math.ceil(right / 6 / 86400))
    if step > right:
        marks = [0.0, right]
    else:
        marks = [float(step * count) for count in range(int(right / step + 1e-9) + 1)]
    spans = []
    for place, mark in enumerate(marks):
        style = ' class="odd"' if place % 2 else ""
        spans.append(f'<span{style} style="left:{mark / right:.2%}">{duration(mark)}</span>')
    return "".join(spans)
