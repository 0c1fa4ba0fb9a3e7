"""What `kilter data rate` says: how strong the models are whose responses were compared, and how surely."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kilter.errors import DataError
from kilter.records import Judgement, Record, prompt_id
from kilter.stats.intervals import Interval
from kilter.stats.misfit import Misfit, misfit
from kilter.stats.rankings import Rankings, rate_rankings
from kilter.stats.ratings import ELO_PER_NAT, Comparisons, Ties, elo, rate
from kilter.stats.redrawn import redrawn

STYLE: dict[str, Callable[[str], float]] = {
    "log length": lambda text: math.log(1 + len(text)),
    "lists": lambda text: float(len(re.findall(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]", text, re.MULTILINE))),
    "headers": lambda text: float(len(re.findall(r"^#{1,6}\s", text, re.MULTILINE))),
}
"""What a response looks like, beside what it says."""
SHUFFLES = 20
NOTHING = "no two responses of different models were compared; ratings need comparisons of models"


@dataclass(frozen=True, slots=True)
class Rated:
    """One model."""

    name: str
    comparisons: int
    strength: Interval
    """In points of Elo's scale (400 for odds of ten), mean 0."""
    apart: bool
    """Whether it can be told from the next one; of the last, False."""
    elo: float
    """Elo's rating in the order of the file."""
    elo_low: float
    elo_high: float
    """The same over shuffles of that order."""
    redrawn: Interval | None = None
    """Of the strength, by whole clusters drawn again."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "comparisons": self.comparisons,
            "strength": self.strength.to_dict(),
            "apart_from_next": self.apart,
            "elo": {"in_order": self.elo, "low": self.elo_low, "high": self.elo_high},
            **({"redrawn": self.redrawn.to_dict()} if self.redrawn else {}),
        }


@dataclass(frozen=True, slots=True)
class Rating:
    """All models, the strongest first."""

    models: list[Rated]
    comparisons: int
    ties: int
    style: dict[str, float]
    """What one standard deviation of a property is worth, in points; empty without control of style."""
    tie: float | None
    clusters: tuple[str, ...]
    """What the intervals hold together: that of which there are two or more."""
    rankings: int | None = None
    """How many were taken whole; None: strengths are those of comparisons."""
    unrated: int = 0
    """Draws of whole clusters that had no rating."""
    misfit: Misfit | None = None
    """What the strengths do not say; None of rankings taken whole."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "models": [model.to_dict() for model in self.models],
            "comparisons": self.comparisons,
            "ties": self.ties,
            "style": self.style,
            "log_nu": self.tie,
            "clusters": list(self.clusters),
            "rankings": self.rankings,
            "unrated_draws": self.unrated,
            "misfit": None if self.misfit is None else _told(self.misfit),
        }


def comparisons_of(records: Iterable[Record], *, style: bool = False) -> Comparisons:
    """Every two responses of every judgement, as a comparison of the models that wrote them.

    Two responses of one model, or of one text, say nothing about models and are left out.

    Args:
        style: with the differences of `STYLE` beside, each in its own standard deviations.
    Raises:
        DataError: a record that does not say who wrote what, or nothing to compare.
    """
    rows: list[tuple[str, str, float]] = []
    who, prompts = [], []
    columns: dict[str, list[float]] = {name: [] for name in STYLE} if style else {}
    for record in _with_models(records):
        prompt = prompt_id(record.prompt)
        looks = [{name: STYLE[name](text) for name in columns} for text in record.responses]
        for one, other in _compared(record):
            better = record.ranks[one] - record.ranks[other]
            rows.append((record.models[one], record.models[other], 0.5 if better == 0 else float(better < 0)))
            who.append(record.annotator)
            prompts.append(prompt)
            for name, column in columns.items():
                column.append(looks[one][name] - looks[other][name])
    if not rows:
        raise DataError(NOTHING)
    scaled = {name: np.array(column) / np.std(column) for name, column in columns.items() if np.std(column) > 0}
    return Comparisons.of(
        rows,
        clusters={"annotator": who, "prompt": prompts},
        style={name: column.tolist() for name, column in scaled.items()},
    )


def rankings_of(records: Iterable[Record]) -> Rankings:
    """Every judgement as one ranking of the models that wrote its responses; of two of one text neither is better.

    Judgements in which one model wrote all, or all are of one text, say nothing about models and are left out.

    Raises:
        DataError: a record that does not say who wrote what, or nothing to compare.
    """
    rows, who, prompts = [], [], []
    for record in _with_models(records):
        best: dict[str, int] = {}
        for text, rank in zip(record.responses, record.ranks, strict=True):
            best[text] = min(rank, best.get(text, rank))
        if len(set(record.models)) > 1 and len(best) > 1:
            rows.append((record.models, [float(best[text]) for text in record.responses]))
            who.append(record.annotator)
            prompts.append(prompt_id(record.prompt))
    if not rows:
        raise DataError(NOTHING)
    return Rankings.of(rows, clusters={"annotator": who, "prompt": prompts})


def contexts_of(records: Iterable[Record]) -> dict[str, list[str]]:
    """For each row of `comparisons_of` the prompt's kind and the annotator's group."""
    told: dict[str, list[str]] = {"kind": [], "group": []}
    for record in _with_models(records):
        for _ in _compared(record):
            told["kind"].append(record.kind)
            told["group"].append(record.group)
    return told


def rating_of(
    comparisons: Comparisons,
    *,
    ties: Ties = "half",
    seed: int = 0,
    rankings: Rankings | None = None,
    contexts: Mapping[str, Sequence[str]] | None = None,
    bootstrap: int = 0,
) -> Rating:
    """Strengths with intervals clustered by annotator and prompt, Elo's ratings beside, and what strengths do not say.

    Args:
        seed: of the shuffles for Elo, and of the draws.
        rankings: taken whole for the strengths, in place of the comparisons in them.
        contexts: by name, of each comparison: in which of them models are stronger or weaker is tested.
        bootstrap: draws of whole clusters for further intervals; 0: none.
    Raises:
        DataError: the comparisons cannot say how far apart some models are; they are named.
    """
    generator = np.random.default_rng(seed)
    try:
        scale = rate(comparisons, ties=ties) if rankings is None else rate_rankings(rankings)
        found = misfit(comparisons, ties=ties, by=contexts) if rankings is None else None
        drawn = np.random.default_rng((seed, 1))
        draws = redrawn(rankings or comparisons, drawn, draws=bootstrap, ties=ties) if bootstrap else None
    except ValueError as err:
        raise DataError(str(err)) from err
    played = elo(comparisons)
    size = len(comparisons.outcome)
    shuffled = np.array([elo(comparisons, generator.permutation(size)) for _ in range(SHUFFLES)])
    counts = np.bincount(np.concatenate([comparisons.left, comparisons.right]), minlength=len(comparisons.names))
    apart = [*scale.apart(), False]
    models = []
    for name, told in zip(scale.order(), apart, strict=True):
        place = comparisons.names.index(name)
        low, high = shuffled[:, place].min(), shuffled[:, place].max()
        points = _points(scale.interval(name))
        again = _points(draws.interval(name)) if draws else None
        elos = float(played[place]), float(low), float(high)
        models.append(Rated(str(name), int(counts[place]), points, told, *elos, again))
    return Rating(
        models,
        size,
        int((comparisons.outcome == 0.5).sum()),
        {name: ELO_PER_NAT * worth for name, worth in scale.style.items()},
        scale.tie,
        scale.clusters,
        None if rankings is None else len(rankings.item),
        draws.unrated if draws else 0,
        found,
    )


def _with_models(records: Iterable[Record]) -> Iterator[Judgement]:
    for place, record in enumerate(records):
        if not isinstance(record, Judgement) or not record.models:
            raise DataError(f"record {place + 1} does not say which model wrote each response; ratings need 'models'")
        yield record


def _compared(record: Judgement) -> Iterator[tuple[int, int]]:
    """The places of every two responses of different models and different texts."""
    for one, other in combinations(range(len(record.responses)), 2):
        if record.models[one] != record.models[other] and record.responses[one] != record.responses[other]:
            yield one, other


def _told(found: Misfit) -> dict[str, Any]:
    """For JSON: the departures that were found, and of all pairs the chi-square."""
    return {
        "found": {family: [one._asdict() for one in found.found(family)] for family in found.departures},
        "tests": {family: len(tests) for family, tests in found.departures.items()},
        "pairs": {"chi_square": found.square, "freedom": found.freedom, "p": found.p},
    }


def _points(found: Interval) -> Interval:
    mean, low, high = (float(ELO_PER_NAT * value) for value in found[:3])
    return Interval(mean, low, high, found.n)
