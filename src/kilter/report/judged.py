"""What the labels and the reward model are worth: agreement of those who judged, and the reward model's audit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from markupsafe import Markup

from kilter.data.agree import BESIDE
from kilter.report.answers import visible
from kilter.report.figures import Figure, figure, number, write_figure
from kilter.report.files import Row as FileRow
from kilter.report.files import RunFiles, listing, section, text_of
from kilter.report.plots import NARROW, WIDE, Bin, Row, draw_reliability, draw_rows
from kilter.report.training import stage_label

MOST_KINDS = 24


class Picture(NamedTuple):
    """Rows of dots as a wide page shows them, and as a narrow one does."""

    wide: Markup
    narrow: Markup


@dataclass(frozen=True, slots=True)
class Agreed:
    """The agreement of one stage's annotators. `published`: what people reached elsewhere, by measure."""

    stage: str
    items: int | None
    published: tuple[tuple[str, str], ...]
    picture: Picture
    by_kind: Markup | None


@dataclass(frozen=True, slots=True)
class Audited:
    """The audit of one stage's reward model."""

    stage: str
    failed: tuple[str, ...]
    passed: bool
    figures: tuple[tuple[str, str], ...]
    reliability: Markup | None
    detectors: Picture | None
    not_measured: tuple[str, ...]
    by_kind: Picture | None
    page: str


def agreements(run: RunFiles) -> list[Agreed]:
    """Of every stage that asked annotators twice."""
    found = []
    for folder, told in run.agreements.items():
        rows = [
            Row(name, value, beside=BESIDE[name].between if name in BESIDE else None)
            for name, value in _figures(section(told, "measures"))
        ]
        if not rows:
            continue
        label, items = stage_label(folder), number(told.get("items"))
        kinds = _kinds(section(told, "by_kind"), f"Krippendorff's alpha by kind, {label}", "alpha", (0.0, 1.0))
        found.append(
            Agreed(
                folder,
                None if items is None else int(items),
                tuple((name, BESIDE[name].text) for name in BESIDE if any(row.name == name for row in rows)),
                _drawn(rows, _words(f"Agreement, {label}", rows), "agreement", (0.0, 1.0)),
                kinds.narrow if kinds else None,
            )
        )
    return found


def audits(run: RunFiles) -> list[Audited]:
    """Of every stage whose model carries one."""
    return [_audit(folder, told) for folder, told in run.audits.items()]


def _audit(folder: str, told: FileRow) -> Audited:
    label = stage_label(folder)
    found = section(told, "calibration")
    bins = reliability_bins(listing(found, "reliability"))
    rows, missing = detector_rows(listing(told, "detectors"))
    shares = (("accuracy on held-out comparisons", "accuracy"), ("Brier's score", "brier"))
    figures = [(name, write_figure(figure(found.get(key)))) for name, key in shares]
    error, expected = number(found.get("ece")), number(found.get("ece_expected"))
    if error is not None and expected is not None:
        figures.append(("calibration error", f"{error:.3f}; {expected:.3f} if it were calibrated"))
    figures.append(("temperature that fits", write_figure(figure(found.get("temperature")))))
    return Audited(
        folder,
        tuple(visible(text_of(name)) for name in listing(told, "failed")),
        told.get("passed") is True,
        tuple(figures),
        draw_reliability(bins, reliability_words(bins)) if bins else None,
        _drawn(rows, effects_words(rows), EFFECTS, (0.0,)) if rows else None,
        tuple(missing),
        _kinds(section(told, "by_kind"), f"Accuracy by kind, {label}", "accuracy", (0.5, 1.0)),
        f"stages/{folder}/result/audit.html",
    )


EFFECTS = "effect, standard deviations among answers to one prompt"


def detector_rows(given: Sequence[Any]) -> tuple[list[Row], list[str]]:
    """The audit's detectors as rows, what is let pass beside each; and the names of those not measured."""
    rows, missing = [], []
    for one in given:
        if not isinstance(one, Mapping):
            continue
        name, value, limit = visible(text_of(one.get("name"))), figure(one.get("effect")), number(one.get("threshold"))
        if value is None or limit is None:
            missing.append(name)
            continue
        low = -limit if one.get("direction") == "both" else None
        rows.append(Row(name, value, "bad" if one.get("verdict") == "failed" else "good", (low, limit)))
    return rows, missing


def effects_words(rows: Sequence[Row]) -> str:
    """The detectors' picture in words."""
    return _words("Effects", rows)


def reliability_bins(given: Sequence[Any]) -> list[Bin]:
    """Of audit.json's reliability what can be drawn."""
    return [
        Bin(confidence, right)
        for point in given
        if isinstance(point, Mapping)
        and (confidence := number(point.get("confidence"))) is not None
        and 0.5 <= confidence <= 1
        and (right := figure(point.get("right"))) is not None
    ]


def reliability_words(bins: Sequence[Bin]) -> str:
    """The diagram in words."""
    return "Reliability: " + "; ".join(f"{one.confidence:.2f} sure, right {write_figure(one.right)}" for one in bins)


def _kinds(given: FileRow, title: str, unit: str, include: Sequence[float]) -> Picture | None:
    rows = [Row(name or "not named", value) for name, value in _figures(given)][:MOST_KINDS]
    return _drawn(rows, _words(title, rows), unit, include) if rows else None


def _drawn(rows: Sequence[Row], title: str, unit: str, include: Sequence[float]) -> Picture:
    return Picture(*(draw_rows(rows, title, unit=unit, include=include, width=width) for width in (WIDE, NARROW)))


def _figures(given: FileRow) -> list[tuple[str, Figure]]:
    return [(visible(name), value) for name, raw in given.items() if (value := figure(raw)) is not None]


def _words(title: str, rows: Sequence[Row]) -> str:
    return f"{visible(title)}: " + "; ".join(f"{row.name} {write_figure(row.value)}" for row in rows)
