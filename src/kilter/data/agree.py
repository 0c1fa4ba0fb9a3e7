"""What `kilter data agreement` says of a file of judgements: coefficients, who and what pulls them down."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations, islice
from typing import Any, NamedTuple

import numpy as np

from kilter.data.judgements import BETTER_FIRST, BETTER_SECOND, TIE, Verdict, Verdicts
from kilter.errors import DataError
from kilter.stats import agreement
from kilter.stats.agreement import Coefficient, Ratings
from kilter.stats.intervals import Interval

Measure = Callable[[Ratings], Coefficient]
MEASURES: dict[str, Measure] = {
    "raw": agreement.raw,
    "leave-one-out": agreement.leave_one_out,
    "alpha, nominal": agreement.alpha,
    "alpha, interval": lambda ratings: agreement.alpha(ratings, level="interval"),
    "AC1": agreement.ac1,
    "Fleiss' kappa": agreement.fleiss,
}


class Published(NamedTuple):
    """What other people reached, in words and between which values."""

    text: str
    between: tuple[float, float]


BESIDE = {
    "raw": Published("InstructGPT's labellers 0.73 to 0.77", (0.73, 0.77)),
    "leave-one-out": Published("AlpacaEval's people 0.66", (0.66, 0.66)),
    "alpha, nominal": Published("LLMFAO's crowd 0.29; textbooks ask for 0.6 to 0.8", (0.6, 0.8)),
}
"""Published figures of people: Ouyang et al. 2022 (arXiv 2203.02155, section 3.4), Dubois et al. 2023 (arXiv
2305.14387, section 4), LLMFAO."""
TEXTBOOK = 0.6
COMMON = 20
"""Items that two annotators need in common for a kappa of the two to be shown."""
PAIRS = 10


@dataclass(frozen=True, slots=True)
class Agreement:
    """What a file of judgements says of those who judged."""

    judgements: int
    items: int
    annotators: int
    repeated: int
    identical: int
    measures: dict[str, Interval]
    """By name; a measure that has no value here is left out."""
    by_kind: dict[str, Interval]
    """Krippendorff's alpha, nominal, of each kind of prompt."""
    by_time: dict[str, Interval]
    """The same of the earlier and the later half of the judgements; empty where they carry no times."""
    pairs: dict[tuple[str, str], tuple[Interval, int]]
    """Cohen's kappa of the annotators with the most items in common, and how many."""
    pull: dict[str, float]
    """By annotator, alpha with him less alpha without: the lowest first."""
    items_pull: dict[str, float]
    """By item, likewise."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON; of items the 20 lowest."""
        return {
            "judgements": self.judgements,
            "items": self.items,
            "annotators": self.annotators,
            "repeated": self.repeated,
            "identical": self.identical,
            **{
                name: {key: interval.to_dict() for key, interval in found.items()}
                for name, found in (("measures", self.measures), ("by_kind", self.by_kind), ("by_time", self.by_time))
            },
            "pairs": [
                {"annotators": list(names), "kappa": kappa.to_dict(), "items": common}
                for names, (kappa, common) in self.pairs.items()
            ],
            "pull": self.pull,
            "items_pull": dict(islice(self.items_pull.items(), 20)),
        }


def agreement_of(verdicts: Verdicts, *, seed: int = 0, resamples: int = 1000) -> Agreement:
    """Every measure with its interval over items.

    Args:
        seed: of the draws.
    Raises:
        DataError: no two annotators judged one item, or all said the same.
    """
    if not verdicts.kept:
        raise DataError("no two different responses were compared; agreement needs verdicts")
    tied = any(verdict.value == TIE for verdict in verdicts.kept)
    ratings = _ratings(verdicts.kept, tied)
    if np.bincount(ratings.item).max() < 2:
        raise DataError(
            f"{len(ratings.items)} items were judged by one annotator each; agreement needs items that two or more "
            "judged"
        )

    def known(asked: Iterable[tuple[str, Measure, Ratings]]) -> dict[str, Interval]:
        found = {}
        for name, measure, of in asked:
            generator = np.random.default_rng(seed)
            with suppress(ValueError):  # it has no value for these
                found[name] = measure(of).interval(generator, resamples=resamples)
        return found

    def each(groups: dict[str, list[Verdict]]) -> dict[str, Interval]:
        return known((name, agreement.alpha, _ratings(kept, tied)) for name, kept in groups.items())

    whole = agreement.alpha(ratings)
    pull = agreement.pull_of_raters(ratings, agreement.alpha)
    items = dict(zip(map(str, ratings.items), whole.pull().tolist(), strict=True))
    return Agreement(
        judgements=len({verdict.record for verdict in verdicts.kept}),
        items=len(ratings.items),
        annotators=len(ratings.raters),
        repeated=verdicts.repeated,
        identical=verdicts.identical,
        measures=known((name, measure, ratings) for name, measure in MEASURES.items()),
        by_kind=each(_by_kind(verdicts.kept)),
        by_time=each(_by_time(verdicts.kept)),
        pairs=_pairs(ratings, np.random.default_rng(seed), resamples),
        pull=_lowest({str(name): value for name, value in pull.items()}),
        items_pull=_lowest(items),
    )


def _ratings(kept: Sequence[Verdict], tied: bool) -> Ratings:
    """`tied`: somewhere in the file is a tie; else a tie was nothing one could say, which AC1 has to know."""
    rows = [(verdict.item, verdict.annotator, verdict.value) for verdict in kept]
    categories = (BETTER_FIRST, TIE, BETTER_SECOND) if tied else (BETTER_FIRST, BETTER_SECOND)
    return Ratings.of(rows, categories=categories)


def _lowest(values: dict[str, float]) -> dict[str, float]:
    known = {name: value for name, value in values.items() if math.isfinite(value)}
    return dict(sorted(known.items(), key=lambda entry: entry[1]))


def _by_kind(kept: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    kinds: dict[str, list[Verdict]] = {}
    for verdict in kept:
        kinds.setdefault(verdict.kind, []).append(verdict)
    return kinds if len(kinds) > 1 else {}


def _by_time(kept: Sequence[Verdict]) -> dict[str, list[Verdict]]:
    """The earlier and the later half; times are numbers, or else texts that sort as ISO times do."""
    if not all(verdict.at for verdict in kept):
        return {}
    try:
        ordered = sorted(kept, key=lambda verdict: float(verdict.at))
    except ValueError:
        ordered = sorted(kept, key=lambda verdict: verdict.at)
    half = len(ordered) // 2
    return {f"until {ordered[half - 1].at}": ordered[:half], f"from {ordered[half].at}": ordered[half:]} if half else {}


def _pairs(
    ratings: Ratings, generator: np.random.Generator, resamples: int
) -> dict[tuple[str, str], tuple[Interval, int]]:
    together: Counter[tuple[Hashable, Hashable]] = Counter()
    order = np.argsort(ratings.item, kind="stable")
    for raters in np.split(ratings.rater[order], np.flatnonzero(np.diff(ratings.item[order])) + 1):
        together.update(
            (ratings.raters[one], ratings.raters[other]) for one, other in combinations(sorted(raters.tolist()), 2)
        )
    found: dict[tuple[str, str], tuple[Interval, int]] = {}
    for (one, other), common in together.most_common(PAIRS):
        if common >= COMMON:
            try:
                kappa = agreement.cohen(ratings, one, other).interval(generator, resamples=resamples)
            except ValueError:  # both always said the same one thing
                continue
            found[str(one), str(other)] = kappa, common
    return found
