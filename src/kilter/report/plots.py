"""Two pictures of measured shares and effects: rows of dots with their intervals, and a reliability diagram."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup

from kilter.report.figures import Figure, write_figure
from kilter.report.svg import Axis, axis_over, el, path, text_width

ROW, NAMES, SIDE = 22.0, 132.0, 290.0
WIDE, NARROW = 640.0, 350.0
FONT = 12.5


@dataclass(frozen=True, slots=True)
class Row:
    """A figure of the picture; `beside` is shaded behind it, an end that is None reaches to the picture's."""

    name: str
    value: Figure
    state: Literal["open", "good", "bad"] = "open"
    beside: tuple[float | None, float | None] | None = None


def draw_rows(
    rows: Sequence[Row], title: str, *, unit: str, include: Sequence[float] = (0.0,), width: float = WIDE
) -> Markup:
    """One line a figure: its name, a dot, its 95% interval, and what is shaded beside.

    Args:
        title: the picture in words.
        unit: under the axis.
        include: values that the axis reaches in any case.
        width: px, that of its place on the page: text keeps its size.
    """
    ends = [end for row in rows for end in row.value.span]
    marks = [end for row in rows for end in row.beside or () if end is not None]
    top, bottom = 6.0, 6.0 + ROW * len(rows)
    x = axis_over([*ends, *marks, *include], NAMES, width - 12.0)
    parts = [el("title", title)]
    for place, row in enumerate(rows):
        if row.beside is not None:
            low, high = (
                default if end is None else end for end, default in zip(row.beside, (x.low, x.high), strict=True)
            )
            wide = max(x(high) - x(low), 2.0)
            parts.append(el("rect", class_="beside", x=x(low), y=top + ROW * place, width=wide, height=ROW))
    for value, text in x.labelled_ticks(6 if width == WIDE else 4):
        kind = "grid zero" if value == 0 else "grid"
        parts.append(el("line", class_=kind, x1=x(value), x2=x(value), y1=top, y2=bottom))
        parts.append(el("text", text, class_="tick", x=x(value), y=bottom + 17, text_anchor="middle"))
    parts.append(el("text", unit, x=(NAMES + width) / 2, y=bottom + 36, text_anchor="middle"))
    for place, row in enumerate(rows):
        y = top + ROW * (place + 0.5)
        low, high = row.value.span
        told = f"{row.name}: {write_figure(row.value)}"
        parts.append(el("text", _short(row.name), class_="tick", x=NAMES - 8, y=y + 4, text_anchor="end"))
        parts.append(
            el(
                "g",
                el("title", told),
                el("path", class_="whisker", d=path([(x(low), y), (x(high), y)])),
                el("circle", class_="spot", cx=x(row.value.mean), cy=y, r=4.0),
                class_=f"row {row.state}",
            )
        )
    return el("svg", *parts, class_="rows", viewBox=f"0 0 {width:g} {bottom + 42:g}", role="img")


def _short(name: str) -> str:
    """As much of a name as there is room for."""
    room, shown = NAMES - 10, name[:40]
    while shown and text_width(shown, FONT) > room:
        shown = shown[:-1]
    return shown if shown == name else f"{shown[:-1]}…"


@dataclass(frozen=True, slots=True)
class Bin:
    """Comparisons of about one confidence: how often the preferred answer is the better one."""

    confidence: float
    right: Figure


def draw_reliability(bins: Sequence[Bin], title: str) -> Markup:
    """How often the answer that a reward model prefers is the better, by how sure it is; on the line it is as sure as
    it is right."""
    left, top = 46.0, 10.0
    x, y = Axis(0.5, 1.0, left, left + SIDE), Axis(0.0, 1.0, top + SIDE, top)
    parts = [el("title", title)]
    for value, text in x.labelled_ticks(5):
        parts.append(el("line", class_="grid", x1=x(value), x2=x(value), y1=top, y2=top + SIDE))
        parts.append(el("text", text, class_="tick", x=x(value), y=top + SIDE + 17, text_anchor="middle"))
    for value, text in y.labelled_ticks(5):
        parts.append(el("line", class_="grid", x1=left, x2=left + SIDE, y1=y(value), y2=y(value)))
        parts.append(el("text", text, class_="tick", x=left - 7, y=y(value) + 4, text_anchor="end"))
    parts.append(el("path", class_="ideal", d=path([(x(0.5), y(0.5)), (x(1.0), y(1.0))])))
    parts.append(el("text", "how sure it is", x=left + SIDE / 2, y=top + SIDE + 36, text_anchor="middle"))
    parts.append(el("text", "how often it is right", x=left + 7, y=top + 16))
    for one in bins:
        at, (low, high) = x(one.confidence), one.right.span
        parts.append(
            el(
                "g",
                el("title", f"{one.confidence:.2f} sure: right {write_figure(one.right)}"),
                el("path", class_="whisker", d=path([(at, y(low)), (at, y(high))])),
                el("circle", class_="spot", cx=at, cy=y(one.right.mean), r=4.0),
                class_="row open",
            )
        )
    return el("svg", *parts, class_="reliability", viewBox=f"0 0 {left + SIDE + 14:g} {top + SIDE + 42:g}", role="img")


STYLE = """
svg .row { --own: #2463a8; } svg .row.bad { --own: #a3121d; } svg .row.good { --own: #0b6b3a; }
svg .whisker { stroke: var(--own); stroke-width: 2; } svg .spot { fill: var(--own); }
svg .grid { stroke: #e2e6ea; } svg .grid.zero { stroke: #5a6675; } svg .beside { fill: #0b6b3a; opacity: 0.1; }
svg .ideal { stroke: #9aa5b1; stroke-dasharray: 4 4; fill: none; }
svg.rows { width: 640px; } svg.reliability { width: 350px; }
"""
"""Of a page that has no style of its own for them; the report of a run has."""
