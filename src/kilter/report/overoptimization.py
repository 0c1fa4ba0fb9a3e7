"""The page of a study of overoptimisation: gold and proxy against distance, the fits, the peaks; one offline file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import cycle
from statistics import fmean
from typing import Any

import numpy as np
from markupsafe import Markup

from kilter.errors import visible
from kilter.report.audit import STYLE
from kilter.report.page import offline_page
from kilter.report.panels import drawing, frame, line, markdown_table, table, words
from kilter.report.svg import Axis, axis_over, el
from kilter.stats.overoptimization import Fit

NAMES = {"best_of_n": "best of n", "rl": "reinforcement learning"}
COLOURS = ("#c2410c", "#7c3aed", "#1b6ca8", "#15803d", "#be185d", "#4b5563")
PANEL, LEFT, COLUMNS = (330.0, 215.0), 44.0, 2
REWARDS = {"gold": "gold", "paid": "proxy"}


def overoptimization_page(told: Mapping[str, Any]) -> str:
    """The page, of what `overoptimization.json` holds."""
    text = (
        f"Gold: {_text(told['study']['gold'])}. Rewards are less those of the policy at the start, on the same "
        "prompts; d is the square root of the KL from it, nats an answer. Intervals are 95%, from bootstrap samples of "
        "seeds and prompts."
    )
    parts = [part for title, lines, rows in tables(told) for part in _section(title, lines, rows)]
    first = [el("h1", "Reward model overoptimisation"), el("p", text), draw_overoptimization(told)]
    return offline_page("Reward model overoptimisation", STYLE, [*first, *parts])


Rows = Sequence[Sequence[str]]


def tables(told: Mapping[str, Any]) -> list[tuple[str, str, Rows]]:
    """(title, what it says, rows with their head first) of every table that is not empty."""
    found = [
        (
            "The proxies",
            "The share of pairs of the start's answers to a held-out prompt that a proxy orders as gold does.",
            _accuracy(told),
        ),
        (
            "Where gold peaks, and what is lost beyond",
            "Where gold is highest among what was measured; from there to the last point, how gold and proxy move.",
            _peaks(told),
        ),
        (
            "Forms of the curve",
            "Least squares through the points of all seeds. The smaller AICc (and BIC), the better; in bold the best "
            "form of a curve. Extrapolation: fitted where d is small, the root mean square error beyond, and that of a "
            "guess that gold stays what it last was.",
            _fits(told),
        ),
        (
            "Does the peak come later with more data?",
            "The difference of the peaks, in d, and the share of bootstrap samples in which it is later: of the points "
            "that were measured as highest, and of the form that is best over all curves of a method.",
            _later(told),
        ),
        ("Gold at equal distance", "How much more gold the first has than the second at the same d.", _equal(told)),
        ("Work", "Seconds by kind of stage, over all calls.", _seconds(told)),
    ]
    return [one for one in found if len(one[2]) > 1]


def markdown(told: Mapping[str, Any]) -> str:
    """The tables for a page of documentation."""
    parts = []
    for title, text, rows in tables(told):
        parts.append(f"## {title}\n\n{text}\n\n{markdown_table(rows)}")
    return "\n\n".join(parts) + "\n"


def _accuracy(told: Mapping[str, Any]) -> Rows:
    rows = [[one["variant"], _proxy(told, one), figure(one["share"], 3)] for one in told["accuracy"]]
    return [["variant", "proxy", "right: mean [lowest, highest] seed"], *rows]


def _peaks(told: Mapping[str, Any]) -> Rows:
    rows = []
    for curve in told["curves"]:
        moves = [figure(curve[name], 2, sign=True) for name in ("gold_beyond", "paid_beyond")]
        top = [figure(curve[name]) for name in ("measured_peak", "gold_peak")]
        rows.append([*_which(told, curve), *top, f"{curve['reach']:.2f}", *moves])
    return [["variant", "method", "proxy", "d of the peak", "gold there", "last d", "gold since", "proxy since"], *rows]


def _fits(told: Mapping[str, Any]) -> Rows:
    rows = []
    for curve in told["curves"]:
        for name, one in curve["forms"].items():
            formula = told["forms"][name]["formula"]
            numbers = ["" if name == "line" and key == "b" else figure(one[key]) for key in ("a", "b", "peak")]
            exponent = figure(one["c"]) if name == "power" else ""
            scores = ["none" if one[key] is None else f"{one[key]:.1f}".replace("-", "−") for key in ("aicc", "bic")]
            beyond = one["extrapolation"]
            shown = "" if beyond is None else f"{beyond['error']:.3f}; {beyond['naive']:.3f} if it stays"
            said = f"**{formula}**" if name == curve["best"] else formula
            rows.append([*_which(told, curve), said, *numbers, exponent, *scores, shown])
    return [["variant", "method", "proxy", "R =", "a", "b", "peak d", "c", "AICc", "BIC", "extrapolation"], *rows]


def _later(told: Mapping[str, Any]) -> Rows:
    rows = [
        [
            NAMES[one["method"]],
            *([one["capacity"]] if len(told["study"]["capacities"]) > 1 else []),
            f"{one['large']:,} over {one['small']:,}",
            told["forms"][one["by"]]["formula"] if one["by"] in told["forms"] else one["by"],
            figure(one["difference"], 2, sign=True),
            f"{one['share']:.0%}",
        ]
        for one in told["later"]
    ]
    capacity = ["capacity"] if len(told["study"]["capacities"]) > 1 else []
    return [["method", *capacity, "prompts compared", "peak", "later by", "of samples"], *rows]


def _equal(told: Mapping[str, Any]) -> Rows:
    rows = []
    for one in told["equal_kl"]:
        first, than = ((row["variant"], NAMES[row["method"]]) for row in (one, one["than"]))
        shown = [_text(name) for name in (first if first[0] != than[0] else (first[1], than[1]))]
        pair = f"{shown[0]} over {than[0]}, {shown[1]}" if first[0] != than[0] else f"{shown[0]} over {shown[1]}"
        rows.append([pair, _proxy(told, one), f"{one['d']:g}", figure(one["difference"], 3, sign=True)])
    return [["which", "proxy", "d", "more gold"], *rows]


def _seconds(told: Mapping[str, Any]) -> Rows:
    spent = told["seconds"]
    whole = ("all", sum(spent.values()))
    return [["stage", "seconds"], *([name, f"{value:,.0f}"] for name, value in (*spent.items(), whole))]


def name_of(told: Mapping[str, Any], curve: Mapping[str, Any]) -> str:
    """A curve in words."""
    variant, method, proxy = _which(told, curve)
    return f"{method}, {proxy} prompts compared" + ("" if variant == "plain" else f", {variant}")


def _which(told: Mapping[str, Any], curve: Mapping[str, Any]) -> list[str]:
    return [curve["variant"], NAMES[curve["method"]], _proxy(told, curve)]


def _proxy(told: Mapping[str, Any], one: Mapping[str, Any]) -> str:
    """A proxy's name: how many prompts, and its capacity where there are several."""
    beside = f", {_text(one['capacity'])}" if len(told["study"]["capacities"]) > 1 else ""
    return f"{one['size']:,}{beside}"


def _text(value: Any) -> str:
    return visible(str(value))


def figure(value: Mapping[str, Any], digits: int = 2, *, sign: bool = False) -> str:
    """`mean [low, high]`; what is not finite is said to be none, an end that is not known a question mark."""
    form = f"{'+' if sign else ''}.{digits}f"
    mean, low, high = (
        unknown if value[key] is None else format(round(value[key], digits) + 0.0, form)  # no zero below zero
        for key, unknown in (("mean", "none"), ("low", "?"), ("high", "?"))
    )
    return f"{mean} [{low}, {high}]".replace("-", "−")


def _section(title: str, text: str, rows: Rows) -> list[Markup]:
    return [el("h2", title), el("p", text), table(rows)]


# The figure ----------------------------------------------------------------------------------------------------------


def draw_overoptimization(told: Mapping[str, Any]) -> Markup:
    """A column for each method and variant: gold above, with the best form's curve and its peak, proxy below."""
    shown: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
    for curve in sorted(told["curves"], key=lambda one: (one["variant"] != "plain", one["method"])):
        shown.setdefault((curve["variant"], curve["method"]), []).append(curve)
    width, height = PANEL
    whole = (min(len(shown), COLUMNS) * width, -(-len(shown) // COLUMNS) * 2 * height + 52)
    shapes: list[Markup] = []
    rewards = {name: [row[name]["mean"] for one in told["curves"] for row in one["points"]] for name in REWARDS}
    for place, ((variant, method), curves) in enumerate(shown.items()):
        left, top = place % COLUMNS * width, place // COLUMNS * 2 * height
        title = NAMES[method] if variant == "plain" else f"{NAMES[method]}, {_text(variant)}"
        reached = [row["d"] for one in curves for row in one["points"]]
        across = axis_over([0.0, *reached], left + LEFT, left + width - 10)
        for row, (name, said) in enumerate(REWARDS.items()):
            up = axis_over([0.0, *rewards[name]], top + (row + 1) * height - 30, top + row * height + 26)
            shapes += frame(across, up, f"{title}: {said}")
            for colour, curve in zip(cycle(COLOURS), curves, strict=False):
                shapes += _dots(curve, name, across, up, colour)
                shapes += _fitted(curve, across, up, colour) if name == "gold" else _means(curve, across, up, colour)
    x = LEFT
    for colour, name in zip(cycle(COLOURS), dict.fromkeys(_proxy(told, one) for one in told["curves"]), strict=False):
        said = f"{name} prompts compared"
        shapes.append(el("circle", cx=x, cy=whole[1] - 34, r=4.0, fill=colour))
        shapes.append(words(said, x + 8, whole[1] - 30, "start", colour))
        x += 40 + 7 * len(said)
    below = "across: root of the KL from the start; up: reward above the start's; dots: seeds; ring: the fitted peak"
    shapes.append(words(below, LEFT, whole[1] - 10, "start", "#374151"))
    return drawing("Gold and proxy reward against distance", shapes, *whole)


def _dots(curve: Mapping[str, Any], name: str, across: Axis, up: Axis, colour: str) -> list[Markup]:
    places = [(across(row["d"]), up(row[name]["mean"])) for row in curve["points"]]
    return [el("circle", cx=x, cy=y, r=2.8, fill=colour, fill_opacity=0.55) for x, y in places]


def _fitted(curve: Mapping[str, Any], across: Axis, up: Axis, colour: str) -> list[Markup]:
    """The best form up to the last d; a ring at its peak where that was reached."""
    told = curve["forms"][curve["best"]]
    a, b, c = (told[key]["mean"] for key in ("a", "b", "c"))
    fit = Fit(form=curve["best"], a=a, b=b, c=c, rss=told["rss"], n=len(curve["points"]))
    d = np.linspace(0.0, curve["reach"], 120)
    inside = [(across(x), up(y)) for x, y in zip(d, fit(d).tolist(), strict=True) if up.low <= y <= up.high]
    shapes = [line(inside, colour, 2.2)]
    if fit.peak <= curve["reach"]:
        x, y = across(fit.peak), up(fit.value)
        shapes.append(el("circle", cx=x, cy=y, r=5.0, fill="#ffffff", stroke=colour, stroke_width=2.0))
    return shapes


def _means(curve: Mapping[str, Any], across: Axis, up: Axis, colour: str) -> list[Markup]:
    """A line through the means over seeds."""
    by_place: dict[int, list[Mapping[str, Any]]] = {}
    for row in curve["points"]:
        by_place.setdefault(row["at"], []).append(row)
    means = [
        (fmean(one["d"] for one in rows), fmean(one["paid"]["mean"] for one in rows)) for rows in by_place.values()
    ]
    return [line([(across(x), up(y)) for x, y in [(0.0, 0.0), *means]], colour, 1.6)]
