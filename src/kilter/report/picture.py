"""The picture: proxy reward (dashed) and true reward (solid) against sqrt(KL) from SFT, for every method.

The reward model's scale is arbitrary, so it has an axis of its own on the right. The two axes are tied at one point, by
a rule the caption states: SFT stands at the same height on both, and the proxy's scale is the largest that fits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from kilter.report.curve import Curve, CurvePoint, close_up_reach
from kilter.report.figures import Figure, model_label, write_figure, write_number
from kilter.report.svg import Axis, Box, Point, along, axis_over, el, path, place_labels, text_width

COLOURS = {
    "best_of_n": "bon",
    "dpo": "dpo",
    "ppo": "ppo",
    "ppo_without_kl": "free",
    "sft": "sft",
    "base": "base",
    "demonstrations": "folk",
}
_SPARE = ("x1", "x2", "x3")
_SHAPES = {"best_of_n": "square", "dpo": "diamond", "ppo": "circle", "ppo_without_kl": "triangle"}

Pick = Callable[[CurvePoint], Figure | None]


@dataclass(frozen=True, slots=True)
class Frame:
    """Where the plot lies in its drawing, px. The page places the slider by the same numbers."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    font: int

    @property
    def plot(self) -> Box:
        return Box(self.left, self.top, self.width - self.right, self.height - self.bottom)


FULL = Frame(1080, 470, 60, 60, 20, 54, 13)
MAIN = Frame(650, 450, 56, 52, 20, 54, 13)
CLOSE = Frame(406, 450, 52, 50, 20, 54, 13)
NARROW = Frame(440, 440, 54, 54, 22, 54, 14)


@dataclass(frozen=True, slots=True)
class Lines:
    """Horizontal lines of the true reward: label and height."""

    items: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Scales:
    """The three axes of a picture; `true` or `proxy` is None where nothing of it was measured."""

    x: Axis
    true: Axis | None
    proxy: Axis | None


def colour_of(name: str, all_names: Sequence[str] = ()) -> str:
    """The colour class of a model: fixed for known ones, the spare ones in order of appearance for others."""
    if name in COLOURS:
        return COLOURS[name]
    others = [other for other in all_names if other not in COLOURS]
    return _SPARE[others.index(name) % len(_SPARE)] if name in others else _SPARE[0]


def _true(point: CurvePoint) -> Figure | None:
    return point.true


def _proxy(point: CurvePoint) -> Figure | None:
    return point.proxy


def make_scales(curves: Sequence[Curve], lines: Lines, frame: Frame) -> Scales:
    """Axes that hold all bands; the proxy's is tied to the true one at SFT (the lowest-KL point of the curves)."""
    points = [point for curve in curves for point in curve.points]
    x = Axis(0.0, max([point.x for point in points] + [0.5]) * 1.03, frame.left, frame.width - frame.right)
    bottom, top = frame.height - frame.bottom, frame.top
    trues = [value for point in points if point.true for value in point.true.span]
    trues += [height for _, height in lines.items]
    proxies = [value for point in points if point.proxy for value in point.proxy.span]
    true = axis_over(trues, bottom, top, least=0.2) if any(point.true for point in points) else None
    if not proxies:
        return Scales(x, true, None)
    start = min((point for point in points if point.true and point.proxy), key=lambda point: point.x, default=None)
    if true is None or start is None or start.true is None or start.proxy is None:
        return Scales(x, true, axis_over(proxies, bottom, top, least=0.2))
    return Scales(x, true, tied_axis(true, start.true.mean, start.proxy.mean, proxies))


def tied_axis(true: Axis, true_start: float, proxy_start: float, proxies: Sequence[float]) -> Axis:
    """The proxy's axis: `proxy_start` at the height of `true_start`, and the largest scale that shows all `proxies`.

    With f the share of the height below SFT, a range r of the whole axis must hold
    `r (1 - f) >= max - start` and `r f >= start - min`.
    """
    below = min(max((true_start - true.low) / (true.high - true.low), 0.02), 0.98)
    above_need, below_need = max(proxies) - proxy_start, proxy_start - min(proxies)
    reach = 1.04 * max(above_need / (1 - below), below_need / below, 0.2)
    return Axis(proxy_start - below * reach, proxy_start + (1 - below) * reach, true.start, true.end)


def draw_pictures(curves: Sequence[Curve], lines: Lines, title: str) -> dict[str, list[Markup]]:
    """The drawings by width of the page: the whole way, then a close-up of the start where one method went far further.

    With a close-up, the whole way names the furthest method only: the others are told apart where there is room.
    """
    reach = close_up_reach(curves)
    names = [curve.method for curve in curves]
    if reach is None:
        return {
            "wide": [draw_picture(curves, lines, FULL, title, names=names)],
            "narrow": [draw_picture(curves, lines, NARROW, title, names=names)],
        }
    furthest = max(curves, key=lambda curve: curve.end.x).method
    near = [curve.until(reach) for curve in curves]
    close_title = "Close-up of the same curves near SFT"
    return {
        "wide": [
            draw_picture(curves, lines, MAIN, title, names=names, labelled=[furthest]),
            draw_picture(near, lines, CLOSE, close_title, names=names, close_up=True),
        ],
        "narrow": [
            draw_picture(curves, lines, NARROW, title, names=names, labelled=[furthest]),
            draw_picture(near, lines, NARROW, close_title, names=names, close_up=True),
        ],
    }


def draw_picture(
    curves: Sequence[Curve],
    lines: Lines,
    frame: Frame,
    title: str,
    *,
    names: Sequence[str],
    labelled: Sequence[str] | None = None,
    close_up: bool = False,
) -> Markup:
    """One drawing. `title` is its text for those who cannot see it; `labelled` names the methods to label, else all."""
    scales = make_scales(curves, Lines() if close_up else lines, frame)
    if scales.true is not None:
        lines = Lines(tuple(item for item in lines.items if scales.true.low <= item[1] <= scales.true.high))
    parts = [el("title", title), *_axes(scales, frame)]
    line_marks, line_boxes = _lines(scales, lines, frame, curves)
    parts += line_marks
    for curve in curves:
        parts.append(_draw_curve(curve, colour_of(curve.method, names), scales))
    chosen = names if labelled is None else labelled
    parts += _name_labels(curves, names, scales, frame, line_boxes, chosen, peak_note=not close_up)
    parts.append(el("line", class_="cursor", x1=0, x2=0, y1=frame.top, y2=frame.height - frame.bottom))
    return el(
        "svg", *parts, class_="picture", viewBox=f"0 0 {frame.width} {frame.height}", role="img",
        data_low=str(scales.x.low), data_high=str(scales.x.high), data_left=str(frame.left),
        data_right=str(frame.width - frame.right), data_width=str(frame.width),
    )  # fmt: skip


def _axes(scales: Scales, frame: Frame) -> list[Markup]:
    plot, parts = frame.plot, []
    across, up = (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2
    count = max(4, frame.width // 140)
    for tick, text in scales.x.labelled_ticks(count):
        x = scales.x(tick)
        parts.append(el("text", text, class_="tick", x=x, y=plot.bottom + 18, text_anchor="middle"))
        parts.append(el("line", class_="axis", x1=x, x2=x, y1=plot.bottom, y2=plot.bottom + 4))
    parts.append(el("line", class_="axis", x1=plot.left, x2=plot.right, y1=plot.bottom, y2=plot.bottom))
    name = "distance from SFT: √KL, KL in nats per answer" if frame.width > 600 else "√KL from SFT"
    parts.append(el("text", name, class_="name", x=across, y=plot.bottom + 42, text_anchor="middle"))
    if scales.true is not None:
        parts += _upright(scales.true, plot, plot.left - 8, "end", grid=True)
        parts.append(_side_name("true reward (solid)", 14, up, -90))
    if scales.proxy is not None:
        parts += _upright(scales.proxy, plot, plot.right + 8, "start", grid=scales.true is None)
        parts.append(_side_name("proxy reward (dashed), its own units", frame.width - 10, up, 90))
    return parts


def _upright(axis: Axis, plot: Box, x: float, anchor: str, *, grid: bool) -> list[Markup]:
    """The ticks of an axis that stands, and with `grid` the lines across the plot."""
    parts = []
    for tick, text in axis.labelled_ticks(6):
        y = axis(tick)
        if grid:
            kind = "grid zero" if tick == 0 else "grid"
            parts.append(el("line", class_=kind, x1=plot.left, x2=plot.right, y1=y, y2=y))
        parts.append(el("text", text, class_="tick", x=x, y=y + 4, text_anchor=anchor))
    return parts


def _side_name(text: str, x: float, y: float, turn: int) -> Markup:
    return el("text", text, class_="name", x=x, y=y, text_anchor="middle", transform=f"rotate({turn} {x} {y:.0f})")


def _lines(scales: Scales, lines: Lines, frame: Frame, curves: Sequence[Curve]) -> tuple[list[Markup], list[Box]]:
    """The demonstrators' lines, each named at the end where fewer curves pass."""
    if scales.true is None:
        return [], []
    plot = frame.plot
    parts: list[Markup] = []
    boxes: list[Box] = []
    marks: list[Point] = []
    for curve in curves:
        marks += along([(scales.x(p.x), scales.true(p.true.mean)) for p in curve.points if p.true])
        if scales.proxy is not None:
            marks += along([(scales.x(p.x), scales.proxy(p.proxy.mean)) for p in curve.points if p.proxy])
    for text, height in lines.items:
        y = scales.true(height)
        parts.append(el("line", class_="people", x1=plot.left, x2=plot.right, y1=y, y2=y))
        width = text_width(text, frame.font)
        best: tuple[float, float, Box] | None = None
        for place in range(13):
            left = plot.right - width - 4 - place / 12 * (plot.right - plot.left - width - 12)
            for base in (y - 5, y + frame.font + 1):
                box = Box(left, base - frame.font, left + width, base + 3)
                cost = sum(box.holds(mark) for mark in marks) + 5 * sum(box.overlap(other) > 0 for other in boxes)
                if best is None or cost < best[0]:
                    best = (cost, base, box)
        assert best is not None
        boxes.append(best[2])
        parts.append(el("text", text, class_="people", x=best[2].left, y=best[1]))
    return parts, boxes


def _segments(points: Sequence[CurvePoint], pick: Pick) -> list[list[CurvePoint]]:
    """Runs of neighbouring points where the figure was measured: a line never crosses what was not."""
    runs: list[list[CurvePoint]] = [[]]
    for point in points:
        if pick(point) is None:
            runs.append([])
        else:
            runs[-1].append(point)
    return [run for run in runs if run]


def _draw_curve(curve: Curve, colour: str, scales: Scales) -> Markup:
    parts: list[Markup] = []
    for pick, axis, kind in ((_proxy, scales.proxy, "proxy"), (_true, scales.true, "true")):
        if axis is None:
            continue
        for run in _segments(curve.points, pick):
            known = [(scales.x(point.x), value) for point in run if (value := pick(point)) is not None]
            if (kind == "true" or curve.seeds > 1) and len(run) > 1:
                upper = [(x, axis(value.span[1])) for x, value in known]
                lower = [(x, axis(value.span[0])) for x, value in reversed(known)]
                parts.append(el("path", class_=f"band {kind}", d=path(upper + lower, closed=True)))
            parts.append(el("path", class_=f"line {kind}", d=path([(x, axis(value.mean)) for x, value in known])))
        for point in curve.points[:-1] if curve.cut else curve.points:
            value = pick(point)
            if value is not None:
                parts.append(_mark(curve, point, value, kind, (scales.x(point.x), axis(value.mean))))
    peak = curve.peak
    if peak is not None and peak.true is not None and scales.true is not None and not (curve.cut and peak is curve.end):
        parts.append(el("circle", class_="peak", cx=scales.x(peak.x), cy=scales.true(peak.true.mean), r=8))
    return el("g", *parts, class_=f"curve {colour}", data_method=curve.method)


def _mark(curve: Curve, point: CurvePoint, value: Figure, kind: str, at: Point) -> Markup:
    told = f"{model_label(curve.method)}, step {point.step:g}: {kind} reward {write_figure(value)}, "
    title = el("title", told + f"KL {write_number(point.kl.mean)}")
    x, y = at
    if kind == "proxy":
        return el("circle", title, class_="dot proxy", cx=x, cy=y, r=2.2)
    shape = _SHAPES.get(curve.method, "circle")
    if shape == "square":
        return el("rect", title, class_="dot", x=x - 3.4, y=y - 3.4, width=6.8, height=6.8)
    corners = {
        "diamond": [(x, y - 5), (x + 5, y), (x, y + 5), (x - 5, y)],
        "triangle": [(x, y - 5), (x + 4.8, y + 3.8), (x - 4.8, y + 3.8)],
    }.get(shape)
    if corners:
        return el("path", title, class_="dot", d=path(corners, closed=True))
    return el("circle", title, class_="dot", cx=x, cy=y, r=3.8)


def _name_labels(
    curves: Sequence[Curve],
    names: Sequence[str],
    scales: Scales,
    frame: Frame,
    taken: Sequence[Box],
    chosen: Sequence[str],
    *,
    peak_note: bool,
) -> list[Markup]:
    """Each method's name at the end of its lines, and the peak of the method that went furthest."""
    # One method is named on both its lines; several are named once, and their dashed lines have the same colours.
    both_words = len(chosen) == 1
    avoid: list[Point] = []
    wanted: list[tuple[Point, str]] = []
    colours: list[str] = []
    for pick, axis, word in ((_true, scales.true, "true"), (_proxy, scales.proxy, "proxy")):
        if axis is None:
            continue
        for curve in curves:
            known = [(scales.x(p.x), axis(value.mean)) for p in curve.points if (value := pick(p)) is not None]
            if not known:
                continue
            avoid += along(known)
            if curve.method not in chosen or (word == "proxy" and not both_words and scales.true is not None):
                continue
            wanted.append((known[-1], model_label(curve.method) + (f", {word}" if both_words else "")))
            colours.append(colour_of(curve.method, names))
    furthest = max(curves, key=lambda curve: curve.end.x, default=None)
    peak = furthest.peak if furthest else None
    if peak_note and furthest and peak and peak.true and scales.true is not None:
        note = f"true peak {write_number(peak.true.mean)} at √KL {write_number(peak.x)}"
        wanted.append(((scales.x(peak.x), scales.true(peak.true.mean)), note))
        colours.append(colour_of(furthest.method, names) + " note")
    plot = frame.plot
    inside = Box(plot.left + 4, plot.top, plot.right - 4, plot.bottom - 4)
    labels = place_labels(wanted, inside=inside, avoid=avoid, taken=taken, size=frame.font)
    return [
        el("text", label.text, class_=f"label {colour}", x=label.x, y=label.y)
        for label, colour in zip(labels, colours, strict=True)
    ]
