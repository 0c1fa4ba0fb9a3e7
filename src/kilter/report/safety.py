"""The safety pair as points in a plane: attack success across, over-refusal up, intervals as crosses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from markupsafe import Markup

from kilter.report.figures import Figure, figure, model_label, ordered, write_figure
from kilter.report.files import Row
from kilter.report.picture import Frame, colour_of
from kilter.report.svg import Axis, Box, Point, along, el, path, place_labels, tick_step

WIDE = Frame(680, 440, 62, 20, 20, 54, 13)
NARROW = Frame(420, 400, 60, 14, 16, 54, 14)


@dataclass(frozen=True, slots=True)
class SafetyPoint:
    """A model with both halves of the pair measured, shares in [0, 1]."""

    model: str
    attack: Figure
    refusal: Figure


def safety_points(models: Mapping[str, Row]) -> tuple[list[SafetyPoint], list[str]]:
    """The models with both figures, and the labels of those that lack one: a point needs both."""
    points, missing = [], []
    for name in ordered(models):
        attack, refusal = share(models[name].get("attack_success")), share(models[name].get("over_refusal"))
        if attack is None or refusal is None:
            missing.append(model_label(name))
        else:
            points.append(SafetyPoint(name, attack, refusal))
    return points, missing


def share(value: object) -> Figure | None:
    """A figure that is a share, its interval cut to [0, 1]; another number is no share and cannot be drawn as one."""
    read = figure(value)
    if read is None or not 0 <= read.mean <= 1:
        return None
    low, high = read.span
    return replace(read, low=max(low, 0.0), high=min(high, 1.0)) if read.has_interval else read


def draw_safety(points: Sequence[SafetyPoint], frame: Frame, title: str) -> Markup:
    """The plane with both axes from 0; the good corner is bottom left."""
    plot = frame.plot
    x = Axis(0.0, _reach([point.attack for point in points]), plot.left, plot.right)
    y = Axis(0.0, _reach([point.refusal for point in points]), plot.bottom, plot.top)
    parts = [el("title", title)]
    wide, top = x(x.high * 0.25) - plot.left, y(y.high * 0.25)
    parts.append(el("rect", class_="corner", x=plot.left, y=top, width=wide, height=plot.bottom - top))
    for tick, text in _percents(x):
        parts.append(el("line", class_="grid", x1=x(tick), x2=x(tick), y1=plot.top, y2=plot.bottom))
        parts.append(el("text", text, class_="tick", x=x(tick), y=plot.bottom + 18, text_anchor="middle"))
    for tick, text in _percents(y):
        parts.append(el("line", class_="grid", x1=plot.left, x2=plot.right, y1=y(tick), y2=y(tick)))
        parts.append(el("text", text, class_="tick", x=plot.left - 8, y=y(tick) + 4, text_anchor="end"))
    long = frame.width > 600
    across, up = (plot.left + plot.right) / 2, (plot.top + plot.bottom) / 2
    name = "attack success: harmful requests complied with" if long else "attack success"
    parts.append(el("text", name, class_="name", x=across, y=plot.bottom + 42, text_anchor="middle"))
    name, turn = "over-refusal: harmless look-alikes refused" if long else "over-refusal", f"rotate(-90 14 {up:.0f})"
    parts.append(el("text", name, class_="name", x=14, y=up, text_anchor="middle", transform=turn))
    names = [point.model for point in points]
    for point in points:
        parts.append(_cross(point, x, y, colour_of(point.model, names)))
    parts += _labels(points, x, y, frame)
    return el("svg", *parts, class_="plane", viewBox=f"0 0 {frame.width} {frame.height}", role="img")


def _percents(axis: Axis) -> list[tuple[float, str]]:
    decimals = 0 if tick_step(axis.high / 5) >= 0.01 else 1
    return [(tick, f"{100 * tick:.{decimals}f}%") for tick in axis.ticks(5)]


def _reach(figures: Sequence[Figure]) -> float:
    """The axis ends at the highest interval and never below 10%, so that a tiny difference does not look large."""
    return min(max([value.span[1] for value in figures] + [0.1 / 1.06]) * 1.06, 1.0)


def _cross(point: SafetyPoint, x: Axis, y: Axis, colour: str) -> Markup:
    at = (x(point.attack.mean), y(point.refusal.mean))
    (left, right), (low, high) = point.attack.span, point.refusal.span
    told = f"{model_label(point.model)}: attack success {write_figure(point.attack, 'rate')}"
    told += f", over-refusal {write_figure(point.refusal, 'rate')}"
    return el(
        "g",
        el("title", told),
        el("path", class_="whisker", d=path([(x(left), at[1]), (x(right), at[1])])),
        el("path", class_="whisker", d=path([(at[0], y(low)), (at[0], y(high))])),
        el("circle", class_="spot", cx=at[0], cy=at[1], r=5.5),
        class_=f"curve {colour}",
    )


def _labels(points: Sequence[SafetyPoint], x: Axis, y: Axis, frame: Frame) -> list[Markup]:
    wanted = [((x(p.attack.mean), y(p.refusal.mean)), model_label(p.model)) for p in points]
    avoid: list[Point] = []
    for point in points:  # whiskers, as points along them
        (left, right), (low, high) = point.attack.span, point.refusal.span
        at = (x(point.attack.mean), y(point.refusal.mean))
        avoid += along([(x(left), at[1]), (x(right), at[1])])
        avoid += along([(at[0], y(low)), (at[0], y(high))])
    plot = frame.plot
    inside = Box(plot.left + 3, plot.top, plot.right - 3, plot.bottom - 3)
    names = [point.model for point in points]
    labels = place_labels(wanted, inside=inside, avoid=avoid, size=frame.font)
    return [
        el("text", label.text, class_=f"label {colour_of(name, names)}", x=label.x, y=label.y)
        for label, name in zip(labels, names, strict=True)
    ]
