"""Drawing by hand: SVG elements that are escaped by construction, axes with round ticks, labels that do not overlap.

Why not a plotting library: its script inlined is 4.5 MB a report, needs inline styles (no strict content policy), draws
nothing on paper before it has run, and cannot carry the slider. These figures are a few kilobytes, there at once.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from markupsafe import Markup, escape

Point = tuple[float, float]


def el(name: str, *children: str, **attributes: str | float | None) -> Markup:
    """An element. Children that are plain strings are escaped; `class_` and `data_x` become `class` and `data-x`."""
    written = []
    for key, value in attributes.items():
        if value is None:
            continue
        shown = f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)
        written.append(f' {key.rstrip("_").replace("_", "-")}="{escape(shown)}"')
    inner = Markup("").join(children)
    return Markup(f"<{name}{''.join(written)}>{inner}</{name}>")


def path(points: Sequence[Point], *, closed: bool = False) -> str:
    """The `d` of a polyline."""
    body = "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f"M{body}{'Z' if closed else ''}" if points else ""


def along(points: Sequence[Point], gap: float = 7.0) -> list[Point]:
    """Points every `gap` px along a polyline, for labels to keep off."""
    found = list(points[:1])
    for (x0, y0), (x1, y1) in pairwise(points):
        count = min(max(1, int((abs(x1 - x0) + abs(y1 - y0)) / gap)), 500)
        found += [(x0 + (x1 - x0) * k / count, y0 + (y1 - y0) * k / count) for k in range(1, count + 1)]
    return found


@dataclass(frozen=True, slots=True)
class Axis:
    """A linear map from values [low, high] to pixels [start, end]; `end` may lie before `start` (up is less)."""

    low: float
    high: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        return self.start + (value - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self, count: int = 6) -> list[float]:
        """Round values inside [low, high], about `count` of them: steps of 1, 2, 2.5 or 5 times a power of ten."""
        step = tick_step((self.high - self.low) / max(count, 1))
        first = math.ceil(self.low / step - 1e-9)
        last = math.floor(self.high / step + 1e-9)
        return [round(k * step, 12) + 0.0 for k in range(first, last + 1)]

    def labelled_ticks(self, count: int = 6) -> list[tuple[float, str]]:
        """The ticks with their texts."""
        step = tick_step((self.high - self.low) / max(count, 1))
        return [(tick, tick_text(tick, step)) for tick in self.ticks(count)]


def tick_step(rough: float) -> float:
    """The round step at or above `rough`: 1, 2, 2.5 or 5 times a power of ten."""
    if not rough > 0 or not math.isfinite(rough):
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(factor * power for factor in (1.0, 2.0, 2.5, 5.0, 10.0) if factor * power >= rough * (1 - 1e-9))


def axis_over(values: Iterable[float], start: float, end: float, *, pad: float = 0.06, least: float = 1e-3) -> Axis:
    """An axis over all `values` with `pad` of their range on both sides, never narrower than `least`."""
    known = list(values)
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    room = max((high - low) * pad, (least - (high - low)) / 2, 1e-9)
    return Axis(low - room, high + room, start, end)


def tick_text(value: float, step: float) -> str:
    """A tick with as many decimals as its step needs, and a true minus sign."""
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step * 10**decimals, 6) % 1:
        decimals += 1
    text = f"{value:,.{decimals}f}"
    return text.replace("-", "−")


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle on the page: left, top, right, bottom."""

    left: float
    top: float
    right: float
    bottom: float

    def overlap(self, other: Box) -> float:
        """Shared area, px²."""
        wide = min(self.right, other.right) - max(self.left, other.left)
        tall = min(self.bottom, other.bottom) - max(self.top, other.top)
        return wide * tall if wide > 0 and tall > 0 else 0.0

    def holds(self, point: Point) -> bool:
        return self.left <= point[0] <= self.right and self.top <= point[1] <= self.bottom


@dataclass(frozen=True, slots=True)
class Label:
    """A placed text: where it starts, how it is anchored, and the box it takes."""

    text: str
    x: float
    y: float
    anchor: str
    box: Box


_WIDTHS = dict.fromkeys(" .,:;il|'()[]-jfrt", 0.44) | dict.fromkeys("mwMW", 1.08)
"""Of characters much narrower or wider than most, in units of the font's size."""


def text_width(text: str, size: float) -> float:
    """The width of `text` at `size` px in a wide font, DejaVu Sans Bold: a reader's own font is hardly wider."""
    return sum(_WIDTHS.get(char, 0.84 if char.isupper() else 0.69) for char in text) * size


def place_labels(
    wanted: Sequence[tuple[Point, str]],
    *,
    inside: Box,
    avoid: Sequence[Point] = (),
    taken: Sequence[Box] = (),
    size: float = 13,
) -> list[Label]:
    """A place for each text near its point, greedily: the first of a ring of places with the least overlap.

    `avoid` are points of lines (covering one costs little), `taken` are boxes of other texts (covering one costs much).
    """
    boxes = list(taken)
    placed = []
    for (x, y), text in wanted:
        width, height = text_width(text, size), size * 1.2
        best: tuple[float, Label] | None = None
        for label in _candidates(x, y, text, width, height, inside):
            box = label.box
            outside = (box.right - box.left) * (box.bottom - box.top) - box.overlap(inside)
            cost = 40 * sum(box.overlap(other) for other in boxes) + 60 * outside
            cost += math.hypot(max(box.left - x, 0, x - box.right), max(box.top - y, 0, y - box.bottom))
            if best is not None and cost >= best[0]:
                continue
            cost += 25 * sum(box.holds(point) for point in avoid)
            if best is None or cost < best[0] - 1e-9:
                best = (cost, label)
        assert best is not None
        boxes.append(best[1].box)
        placed.append(best[1])
    return placed


def _candidates(x: float, y: float, text: str, width: float, height: float, inside: Box) -> Iterable[Label]:
    """Right, left, above and below, in growing distance."""
    for away in (9.0, 18.0, 30.0, 46.0, 66.0, 90.0):
        for dx, dy in ((1, 0), (1, -0.7), (1, 0.7), (0, -1), (0, 1), (-1, -0.7), (-1, 0.7), (-1, 0)):
            cx, cy = x + dx * away, y + dy * away
            left = cx if dx > 0 else cx - width if dx < 0 else cx - width / 2
            left = min(max(left, inside.left), max(inside.left, inside.right - width))
            box = Box(left, cy - height / 2, left + width, cy + height / 2)
            yield Label(text, left, cy + height * 0.29, "start", box)
