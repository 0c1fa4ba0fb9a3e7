"""The page of the museum of failures: of each exhibit what pays, what becomes of it, what saw it, and the fix."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from typing import Any

from markupsafe import Markup, escape

from kilter.errors import visible
from kilter.report.audit import STYLE
from kilter.report.overoptimization import figure
from kilter.report.page import offline_page
from kilter.report.panels import drawing, frame, line, markdown_table, table, words
from kilter.report.svg import axis_over, el

TITLE = "A museum of failures"
BROKEN, MENDED = ("#c2410c", "#7c3aed", "#be185d"), "#15803d"
PANEL, LEFT, TITLES = (300.0, 190.0), 44.0, 24.0
COURSES = {"truth": "truth", "paid": "paid"}
BEFORE = "before the first update"
SIGNS, AUDIT = "signs", "audit"
"""Detectors beside the guard's symptoms."""
VERDICTS = {True: "shown", False: "not shown", None: "not measured"}
Exhibits = Mapping[str, Mapping[str, Any]]


def failures_page(told: Mapping[str, Any]) -> str:
    """The page, of what `failures.json` holds."""
    exhibits: Exhibits = told["exhibits"]
    text = (
        "Each exhibit is a recipe whose reward or numbers are wrong in one way, run beside the same recipe with the "
        "fault mended. Whether it shows what it claims is measured: a claim is shown when its whole 95% interval lies "
        "on its side. The guard only warned, and every run went to its end."
    )
    parts = [el("h1", TITLE), el("p", text), table(rows_of(told))]
    for name, one in exhibits.items():
        parts += _exhibit(name, one)
    parts += [el("h2", "Work"), el("p", "Seconds of all stages of a run directory, by the clock."), table(_work(told))]
    return offline_page(TITLE, STYLE, parts)


def rows_of(told: Mapping[str, Any]) -> list[list[str]]:
    """The table of all exhibits, its head first."""
    rows = [["exhibit", "measured", "start", "failing", "mended", "seen by", "seen in the mended", "claims shown"]]
    for name, one in told["exhibits"].items():
        known = one["measured"]["figures"]
        failing = "; ".join(
            (f"{_text(run)} " if len(one["broken"]) > 1 else "") + _known(known, run) for run in one["broken"]
        )
        claims = f"{sum(claim['held'] is True for claim in one['claims'])} of {len(one['claims'])}"
        ends = [_known(known, "start"), failing, _known(known, one["mended"])]
        mended = ", ".join(seen_in(one["mended"], one["alarms"], one["signs"])) or "nothing"
        rows.append([_text(name), _text(one["measured"]["name"]), *ends, _text(seen_by(one)), _text(mended), claims])
    return rows


def seen_by(one: Mapping[str, Any]) -> str:
    """What fired in the runs that fail: signs, audits and symptoms."""
    seen = dict.fromkeys(name for run in one["broken"] for name in seen_in(run, one["alarms"], one["signs"]))
    audits = {AUDIT: None} if any(audit["failed"] for audit in one["audits"]) else {}
    first = {SIGNS: None} if SIGNS in seen else {}
    return ", ".join(first | audits | seen) or "nothing"


def seen_in(run: str, alarms: Mapping[str, Any], signs: Mapping[str, Any]) -> dict[str, None]:
    """What fired in one run, in that order: the check of signs, symptoms."""
    return dict.fromkeys([*[SIGNS] * bool(signs[run]), *(alarm["symptom"] for alarm in alarms[run])])


def markdown(told: Mapping[str, Any]) -> str:
    """The table, and every claim, for a page of documentation."""
    claims = [["exhibit", "claim", "measured", ""]]
    for name, one in told["exhibits"].items():
        claims += [[_text(name), *row] for row in _claims(one)]
    return f"{markdown_table(rows_of(told))}\n\n{markdown_table(claims)}\n\n{markdown_table(_work(told))}\n"


def _known(known: Mapping[str, Any], model: str) -> str:
    return figure(known[model]) if model in known else "not measured"


def _claims(one: Mapping[str, Any]) -> list[list[str]]:
    return [
        [_text(claim["claim"]), "" if claim["figure"] is None else figure(claim["figure"]), VERDICTS[claim["held"]]]
        for claim in one["claims"]
    ]


def _work(told: Mapping[str, Any]) -> list[list[str]]:
    spent = told["seconds"]
    return [
        ["run", "seconds"],
        *([_text(name), f"{value:,.0f}"] for name, value in (*spent.items(), ("all", sum(spent.values())))),
    ]


def _exhibit(name: str, one: Mapping[str, Any]) -> list[Markup]:
    verdict = el("span", "shown" if one["shown"] else "not all shown", class_="passed" if one["shown"] else "failed")
    recipe = el("a", _text(one["recipe"]), href=_text(one["recipe"]))
    models = ["start", *one["broken"], one["mended"]]
    known = one["measured"]["figures"]
    figures = [[_text(one["measured"]["name"]), *map(_text, models)], ["", *(_known(known, model) for model in models)]]
    return [
        el("h2", _text(one["title"]), id=_text(name)),
        el("p", _text(one["about"]), " ", el("b", "The fix: "), _text(one["fix"]), " ", verdict, ". ", recipe),
        drawing(_text(one["title"]), _panels(one, 0.0, 0.0), 2 * PANEL[0], PANEL[1] + TITLES),
        table(figures),
        el("h3", "What it claims"),
        table([["claim", "measured", ""], *_claims(one)]),
        el("h3", "What saw it"),
        *_seen(one),
        el("h3", "What it says"),
        *(_sample(sample) for sample in one["samples"]),
    ]


def _seen(one: Mapping[str, Any]) -> list[Markup]:
    """Every detector that fired, in the mended run too."""
    rows = [["run", "when", "what", ""]]
    for run in (*one["broken"], one["mended"]):
        rows += [[_text(run), BEFORE, "**signs**", _text(verdict)] for verdict in one["signs"][run]]
        for alarm in one["alarms"][run]:
            with_it = "" if alarm["without_probe"] else " (by the probe, which sees the truth)"
            rows.append(
                [
                    _text(run),
                    f"rollout {alarm['rollout']}" if alarm["rollout"] else BEFORE,
                    f"**{_text(alarm['symptom'])}**",
                    _text(alarm["says"]) + with_it,
                ]
            )
    audits = [
        f"The audit of the reward model {_text(audit['reward'])} "
        + (f"failed: {_text(', '.join(audit['failed']))}." if audit["failed"] else "passed.")
        for audit in one["audits"]
    ]
    nothing = [] if any(row[0] in one["broken"] for row in rows[1:]) else ["The guard saw nothing in what fails."]
    return [*(el("p", text) for text in (*audits, *nothing)), *([table(rows)] if rows[1:] else [])]


def _sample(sample: Mapping[str, Any]) -> Markup:
    asked = [el("p", el("small", _text(turn["role"])), " ", _text(turn["content"])) for turn in sample["prompt"]]
    rows: list[list[str]] = [["", "answer", "truth"]]
    for model, answer in sample["answers"].items():
        value = "" if answer["true_reward"] is None else f"{answer['true_reward']:.2f}".replace("-", "−")
        rows.append([_text(model), escape(_text(answer["text"])), value])
    return el("div", *asked, table(rows), class_="answer")


def _text(value: Any) -> str:
    return visible(str(value))


# The figure ----------------------------------------------------------------------------------------------------------


def draw_failures(told: Mapping[str, Any]) -> Markup:
    """Two panels an exhibit, truth and what is paid over rollouts; two exhibits a row."""
    shapes: list[Markup] = []
    width, height = 2 * PANEL[0] + 20, PANEL[1] + TITLES + 34
    for place, one in enumerate(told["exhibits"].values()):
        left, top = place % 2 * width, place // 2 * height
        shapes.append(words(_text(one["title"]), left + LEFT, top + 16, "start", "#1c2430", bold=True))
        shapes += _panels(one, left, top + 18)
    rows = -(-len(told["exhibits"]) // 2)
    return drawing(TITLE, shapes, min(len(told["exhibits"]), 2) * width, rows * height + 4)


def _panels(one: Mapping[str, Any], left: float, top: float) -> list[Markup]:
    """Truth on the left, paid on the right; the mended run green."""
    runs = [*one["broken"], one["mended"]]
    colours = [*BROKEN[: len(one["broken"])], MENDED]
    shapes: list[Markup] = []
    for column, (name, said) in enumerate(COURSES.items()):
        start, end = left + column * PANEL[0] + LEFT, left + (column + 1) * PANEL[0] - 10
        courses = [one["courses"][run][name] for run in runs]
        values = [value for course in courses for value in course if value is not None]
        across = axis_over([0.0, *(float(len(course) - 1) for course in courses)], start, end)
        up = axis_over(values or [0.0, 1.0], top + PANEL[1] - 26, top + 26)
        unit = " (first rollout's deviations)" if name == "paid" else ""
        shapes += frame(across, up, said + unit)
        for course, colour in zip(courses, colours, strict=True):
            points = [(across(float(at)), up(value)) for at, value in enumerate(course) if value is not None]
            shapes.append(line(points, colour, 2.0))
    x = left + LEFT
    for run, colour in zip_longest(runs, colours):
        shapes.append(line([(x, top + PANEL[1] + 12), (x + 16, top + PANEL[1] + 12)], colour, 3.0))
        shapes.append(words(_text(run), x + 21, top + PANEL[1] + 16, "start", colour))
        x += 45 + 7 * len(run)
    return shapes


def lines_of(told: Mapping[str, Any]) -> Sequence[tuple[str, str, str, str]]:
    """For a terminal: exhibit, whether it shows all that it claims, what is measured, what saw it."""
    found = []
    for name, one in told["exhibits"].items():
        known = one["measured"]["figures"]
        ends = (*((run, run) for run in one["broken"]), ("mended", one["mended"]))
        said = ", ".join(
            f"{shown} {known[run]['mean']:.2f}" for shown, run in (("start", "start"), *ends) if run in known
        )
        found.append(
            (
                _text(name),
                "shown" if one["shown"] else "not all shown",
                f"{_text(one['measured']['name'])}: {said}",
                _text(seen_by(one)),
            )
        )
    return found
