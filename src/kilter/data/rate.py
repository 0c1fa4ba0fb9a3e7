"""What `kilter data rate` says: how strong the models are whose responses were compared, and how surely."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import combinations
from typing import Any

import numpy as np

from kilter.errors import DataError
from kilter.records import Judgement, Record, prompt_id
from kilter.stats.intervals import Interval
from kilter.stats.ratings import ELO_PER_NAT, Comparisons, Scale, Ties, elo, rate

STYLE: dict[str, Callable[[str], float]] = {
    "log length": lambda text: math.log(1 + len(text)),
    "lists": lambda text: float(len(re.findall(r"^[ \t]*(?:[-*+]|\d+[.)])[ \t]", text, re.MULTILINE))),
    "headers": lambda text: float(len(re.findall(r"^#{1,6}\s", text, re.MULTILINE))),
}
"""What a response looks like, beside what it says."""
SHUFFLES = 20


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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "comparisons": self.comparisons,
            "strength": self.strength.to_dict(),
            "apart_from_next": self.apart,
            "elo": {"in_order": self.elo, "low": self.elo_low, "high": self.elo_high},
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

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "models": [model.to_dict() for model in self.models],
            "comparisons": self.comparisons,
            "ties": self.ties,
            "style": self.style,
            "log_nu": self.tie,
            "clusters": list(self.clusters),
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
    for place, record in enumerate(records):
        if not isinstance(record, Judgement) or not record.models:
            raise DataError(f"record {place + 1} does not say which model wrote each response; ratings need 'models'")
        prompt = prompt_id(record.prompt)
        looks = [{name: STYLE[name](text) for name in columns} for text in record.responses]
        for one, other in combinations(range(len(record.responses)), 2):
            if record.models[one] == record.models[other] or record.responses[one] == record.responses[other]:
                continue
            better = record.ranks[one] - record.ranks[other]
            rows.append((record.models[one], record.models[other], 0.5 if better == 0 else float(better < 0)))
            who.append(record.annotator)
            prompts.append(prompt)
            for name, column in columns.items():
                column.append(looks[one][name] - looks[other][name])
    if not rows:
        raise DataError("no two responses of different models were compared; ratings need comparisons of models")
    scaled = {name: np.array(column) / np.std(column) for name, column in columns.items() if np.std(column) > 0}
    return Comparisons.of(
        rows,
        clusters={"annotator": who, "prompt": prompts},
        style={name: column.tolist() for name, column in scaled.items()},
    )


def rating_of(comparisons: Comparisons, *, ties: Ties = "half", seed: int = 0) -> Rating:
    """Strengths with intervals clustered by annotator and prompt, Elo's ratings beside.

    Args:
        seed: of the shuffles for Elo.
    Raises:
        DataError: the comparisons cannot say how far apart some models are; they are named.
    """
    try:
        scale = rate(comparisons, ties=ties)
    except ValueError as err:
        raise DataError(str(err)) from err
    generator = np.random.default_rng(seed)
    played = elo(comparisons)
    size = len(comparisons.outcome)
    shuffled = np.array([elo(comparisons, generator.permutation(size)) for _ in range(SHUFFLES)])
    counts = np.bincount(comparisons.left, minlength=len(scale.names))
    counts += np.bincount(comparisons.right, minlength=len(scale.names))
    apart = [*scale.apart(), False]
    models = []
    for name, told in zip(scale.order(), apart, strict=True):
        place = scale.names.index(name)
        low, high = shuffled[:, place].min(), shuffled[:, place].max()
        points = _points(scale, name)
        models.append(Rated(str(name), int(counts[place]), points, told, float(played[place]), float(low), float(high)))
    return Rating(
        models,
        size,
        int((comparisons.outcome == 0.5).sum()),
        {name: ELO_PER_NAT * worth for name, worth in scale.style.items()},
        scale.tie,
        scale.clusters,
    )


def _points(scale: Scale, name: Any) -> Interval:
    found = scale.interval(name)
    mean, low, high = (float(ELO_PER_NAT * value) for value in found[:3])
    return Interval(mean, low, high, found.n)
