"""What preference optimisation did: to the policy's own answers, to plain text, and which pairs it is still against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kilter.report.answers import visible
from kilter.report.figures import Figure, Style, figure, number
from kilter.report.files import Row, RunFiles, listing, section, text_of
from kilter.report.training import stage_label

MOST_PAIRS = 5
FORGETTING = 0.1
"""Nats a token by which plain text may become less likely; above, the page says what to do."""


@dataclass(frozen=True, slots=True)
class Moved:
    """A figure of the model that training began with and of the policy."""

    name: str
    style: Style
    before: Figure | None
    after: Figure | None


@dataclass(frozen=True, slots=True)
class Bin:
    """Pairs whose weight lies in a tenth of [0, 1]; `share` is of the fullest bin."""

    label: str
    count: int
    share: float


@dataclass(frozen=True, slots=True)
class Pair:
    """One of the pairs that the trained policy is most against."""

    weight: float
    prompt: str
    chosen: str
    rejected: str


@dataclass(frozen=True, slots=True)
class Preferences:
    """One stage. What is None or empty was not measured."""

    stage: str
    label: str
    kl: Figure | None
    moved: tuple[Moved, ...]
    forgot: bool
    displaced: tuple[float, float] | None
    """Mean change of the chosen and of the rejected responses' log-prob at the last step, nats."""
    weights: tuple[Bin, ...]
    pairs: tuple[Pair, ...]


def preference_stages(run: RunFiles) -> list[Preferences]:
    """All stages that say something of the kind, in the order of their folders."""
    folders = sorted({*run.metrics, *run.heaviest})
    found = [_stage(run, folder) for folder in folders]
    return [one for one in found if one.kl or one.weights or one.pairs or one.displaced]


def _stage(run: RunFiles, folder: str) -> Preferences:
    said = section(section(run.summary, "stages"), folder.partition("-")[2])
    rise = figure(said.get("plain_text/rise"))
    return Preferences(
        folder,
        stage_label(folder),
        figure(said.get("fresh/kl")),
        tuple(one for one in _moved(said) if one.before or one.after),
        rise is not None and rise.mean > FORGETTING,
        _displaced(run.metrics.get(folder, [])),
        _bins(listing(said, "pair_weights/histogram")),
        tuple(_pair(row) for row in run.heaviest.get(folder, [])[:MOST_PAIRS]),
    )


def _moved(said: Row) -> list[Moved]:
    names: tuple[tuple[str, str, Style], ...] = (
        ("fresh/length", "length of an answer, tokens", "count"),
        ("fresh/entropy", "entropy, nats a token", "nats"),
        ("plain_text/loss", "loss on plain text, nats a token", "nats"),
    )
    return [
        Moved(label, style, figure(said.get(f"{key}_before")), figure(said.get(key))) for key, label, style in names
    ]


def _displaced(rows: Sequence[Row]) -> tuple[float, float] | None:
    for row in reversed(rows):
        chosen, rejected = number(row.get("displacement/chosen")), number(row.get("displacement/rejected"))
        if chosen is not None and rejected is not None:
            return chosen, rejected
    return None


def _bins(given: Sequence[object]) -> tuple[Bin, ...]:
    read = [number(value) for value in given]
    counts = [int(value) for value in read if value is not None and value >= 0]
    most = max(counts, default=0)
    if len(counts) != len(given) or not most:
        return ()
    width = 1 / len(counts)
    return tuple(
        Bin(f"{at * width:.1f} to {(at + 1) * width:.1f}", count, count / most) for at, count in enumerate(counts)
    )


def _pair(row: Row) -> Pair:
    texts = (visible(text_of(row.get(key))) for key in ("prompt", "chosen", "rejected"))
    return Pair(number(row.get("weight")) or 0.0, *texts)
