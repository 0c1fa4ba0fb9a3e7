"""What the panels of a drawn figure are made of: a frame with ticks, lines and words, each with its own colours."""

from __future__ import annotations

from collections.abc import Sequence

from markupsafe import Markup

from kilter.report.svg import Axis, Point, el, path

FIGURES = tuple("0123456789+−")
"""What a cell with a figure begins with."""


def frame(across: Axis, up: Axis, title: str) -> list[Markup]:
    """A panel's title, its ticks, and a line at every level."""
    shapes = [words(title, across.start, up.end - 10, "start", "#1c2430", bold=True)]
    for tick, said in up.labelled_ticks(5):
        level = [(across.start, up(tick)), (across.end, up(tick))]
        shapes.append(line(level, "#9aa5b1" if tick == 0 else "#e5e7eb", 1))
        shapes.append(words(said, across.start - 6, up(tick) + 4, "end", "#6b7280"))
    for tick, said in across.labelled_ticks(5):
        shapes.append(words(said, across(tick), up.start + 16, "middle", "#6b7280"))
    return shapes


def line(points: Sequence[Point], colour: str, width: float) -> Markup:
    """A polyline."""
    return el("path", d=path(points), fill="none", stroke=colour, stroke_width=width)


def words(text: str, x: float, y: float, anchor: str, colour: str, *, bold: bool = False) -> Markup:
    """A text at a point."""
    return el("text", text, x=x, y=y, text_anchor=anchor, fill=colour, font_weight="bold" if bold else None)


def drawing(title: str, shapes: Sequence[Markup], width: float, height: float) -> Markup:
    """A figure that is a file of its own too, on white."""
    namespace, font = "http://www.w3.org/2000/svg", "system-ui, sans-serif"
    parts = [el("title", title), el("rect", width=width, height=height, fill="#ffffff"), *shapes]
    box = f"0 0 {width:g} {height:g}"
    return el("svg", *parts, viewBox=box, xmlns=namespace, role="img", font_family=font, font_size=12.0)


def table(rows: Sequence[Sequence[str]]) -> Markup:
    """Rows with their head first; a plain cell within `**` is bold, and figures are not broken into lines."""
    head, *body = rows
    cells = [
        el("tr", *(el("td", *_bold(cell), class_="n" if cell[:1] in FIGURES else None) for cell in row)) for row in body
    ]
    return el("table", el("thead", el("tr", *(el("th", name, scope="col") for name in head))), el("tbody", *cells))


def _bold(cell: str) -> list[str]:
    return [cell] if isinstance(cell, Markup) or not cell.startswith("**") else [el("b", cell.strip("*"))]


def markdown_table(rows: Sequence[Sequence[str]]) -> str:
    """The same for a page of documentation."""
    head, *body = rows
    escaped = ([cell.replace("|", "\\|") for cell in row] for row in (head, ["---"] * len(head), *body))
    return "\n".join(f"| {' | '.join(row)} |" for row in escaped)
