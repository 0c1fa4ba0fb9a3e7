"""What `kilter data annotators` says: who judges how well, who likes length or a side, and what each verdict counts."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from kilter.data.judgements import BETTER_FIRST, TIE, every_verdict
from kilter.errors import DataError
from kilter.records import Judgement, Record
from kilter.stats.annotators import Shared, Verdicts, crowd
from kilter.stats.intervals import Interval

WORK, DRAWS = 40_000_000, (600, 2000)
"""Verdicts times draws from the posterior that are worth waiting for, and the fewest and most draws."""


@dataclass(frozen=True, slots=True)
class Annotated:
    """One annotator. All effects in nats of odds."""

    name: str
    judgements: int
    skill: Interval
    """Of a verdict, for one standard deviation of quality between two responses. 0: a coin; below: an adversary."""
    length: Interval | None
    """For twice the words; None where no two responses differ in length."""
    side: Interval | None
    """For being shown first; None where the file does not say what was."""
    weight: float
    """What his judgements count, before it is normalised."""
    with_others: bool
    """Whether anybody else judged what he judged; else his skill is no more than the crowd's."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "name": self.name,
            "judgements": self.judgements,
            "skill": self.skill.to_dict(),
            "length": self.length.to_dict() if self.length else None,
            "side": self.side.to_dict() if self.side else None,
            "weight": self.weight,
            "with_others": self.with_others,
        }


@dataclass(frozen=True, slots=True)
class Annotators:
    """All annotators, the least skilled first; those whom nobody else can vouch for last."""

    annotators: list[Annotated]
    judgements: int
    items: int
    """Two responses to one prompt."""
    items_of_several: int
    """Judged by two annotators or more: what skills are told from."""
    skill: Interval
    """The crowd's mean."""
    length: Interval | None
    side: Interval | None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "judgements": self.judgements,
            "items": self.items,
            "items_of_several": self.items_of_several,
            "skill": self.skill.to_dict(),
            "length": self.length.to_dict() if self.length else None,
            "side": self.side.to_dict() if self.side else None,
            "annotators": [annotator.to_dict() for annotator in self.annotators],
        }


def annotators_of(records: Sequence[Record], *, shared: Shared = "quality", seed: int = 0) -> Annotators:
    """The model of `kilter.stats.annotators.crowd` on every two responses of every judgement.

    A weight is what the annotator's verdict is worth on two responses of which nothing else is known:

        max(0, 2 P(right) - 1)      (`Crowd.reliability`)

    and not how the others judged these. The right likelihood of his verdict is sigmoid(skill margin),
    whose gradient at small margins is his skill times that of an unweighted verdict, so this is its first order; the
    others' verdicts on an item enter the loss by themselves. In simulations of a linear reward (40 crowds of 40
    annotators, 3 in 10 of them coins and 1 in 10 adversaries) its cosine to the true one was 0.957 unweighted, 0.981
    with 2 P(right | all verdicts on the item) - 1 and 0.983 with these at 3,000 verdicts, three on an item; 0.943,
    0.977 and 0.982 at 2,500, five on an item; and in a crowd without either, where there is little to weigh, 0.990,
    0.985 and 0.990: the verdicts that the others outvoted are worth something.

    Args:
        shared: what a liking for length that all share is: quality, or a liking that a verdict is the worse for.
        seed: of the draws from the posterior.
    Raises:
        DataError: a record that is no judgement or does not say who judged, or no two annotators judged one item.
    """
    rows = []
    lengths: dict[Hashable, float] = {}
    seen: set[tuple[str, str]] = set()
    for verdict, (first, second) in every_verdict(records):
        if first == second or (verdict.item, verdict.annotator) in seen:
            continue
        seen.add((verdict.item, verdict.annotator))
        record = records[verdict.record]
        assert isinstance(record, Judgement)
        outcome = 0.5 if verdict.value == TIE else float(verdict.value == BETTER_FIRST)
        rows.append((verdict.item, verdict.annotator, outcome, _side(record, first, second)))
        lengths[verdict.item] = math.log2((1 + len(first.split())) / (1 + len(second.split())))
    if not rows:
        raise DataError("no two different responses were compared; a model of annotators needs verdicts")
    try:
        draws = min(max(WORK // len(rows), DRAWS[0]), DRAWS[1])
        found = crowd(Verdicts.of(rows, lengths), np.random.default_rng(seed), draws=draws)
    except ValueError as err:
        raise DataError(str(err)) from err
    told_apart = {"skill": True, "length": any(lengths.values()), "side": any(row[3] for row in rows)}
    judged = Counter(record.annotator for record in records if isinstance(record, Judgement))
    worth = np.maximum(found.reliability(shared), 0.0)
    names = found.verdicts.annotators
    annotators = [
        Annotated(
            str(name),
            judged[str(name)],
            found.interval(name, "skill"),
            found.interval(name, "length") if told_apart["length"] else None,
            found.interval(name, "side") if told_apart["side"] else None,
            float(worth[place]),
            bool(found.with_others[place]),
        )
        for place, name in enumerate(names)
    ]
    several = Counter(row[0] for row in rows)
    return Annotators(
        sorted(annotators, key=lambda annotator: (not annotator.with_others, annotator.skill.mean)),
        sum(judged.values()),
        len(several),
        sum(count > 1 for count in several.values()),
        found.mean_interval("skill"),
        found.mean_interval("length") if told_apart["length"] else None,
        found.mean_interval("side") if told_apart["side"] else None,
    )


def weighted(records: Sequence[Record], told: Annotators) -> list[Judgement]:
    """The judgements with their annotators' weights in place of those they had, of mean 1.

    Raises:
        DataError: no annotator's verdicts are worth anything.
    """
    worth = {annotator.name: annotator.weight for annotator in told.annotators}
    judgements = [record for record in records if isinstance(record, Judgement)]
    # Who only compared a text with itself has no weight, and nothing to learn from.
    weights = [worth.get(record.annotator, 0.0) for record in judgements]
    mean = sum(weights) / len(weights)
    if mean <= 0:
        raise DataError(
            "no annotator is better than a coin here, so every weight would be 0; collect better judgements"
        )
    return [replace(record, weight=weight / mean) for record, weight in zip(judgements, weights, strict=True)]


def _side(record: Judgement, first: str, second: str) -> int:
    """1 where `first` was shown before `second`, -1 after, 0 where the record does not say, or holds a text twice."""
    places = range(len(record.responses))
    if sorted(record.shown) != list(places) or record.responses.count(first) + record.responses.count(second) > 2:
        return 0
    order = [record.responses[place] for place in record.shown]
    return 1 if order.index(first) < order.index(second) else -1
