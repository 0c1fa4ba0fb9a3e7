"""Ratings from comparisons: who is how strong, how surely, and what the data cannot say.

Bradley-Terry with ties as half a win, or with Davidson's third outcome, and with differences of style beside strength.
All are exponential families in one number for each comparison, y = 1 (left), 1/2 (tie), 0 (right), and whether it was a
tie; so one Newton iteration over counts of equal comparisons fits them, and one sandwich gives their errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, get_args

import numpy as np
from scipy.sparse import csr_array

from kilter.stats.intervals import Floats, Integers, numbered
from kilter.stats.likelihood import Scale, Scores, held, maximum, refuse_disconnected, sandwich

Ties = Literal["half", "davidson"]
ELO_PER_NAT = 400.0 / np.log(10.0)
"""Points of Elo's scale in a nat of odds."""


@dataclass(frozen=True, slots=True)
class Comparisons:
    """N comparisons: `left[n]` against `right[n]`, places in `names`; `outcome` 1: left won, 0: right, 1/2: tie."""

    left: Integers
    right: Integers
    outcome: Floats
    names: tuple[Hashable, ...]
    clusters: Mapping[str, Integers] = field(default_factory=dict)
    """By what comparisons hang together (annotator, prompt): int[N], the cluster of each."""
    style: Mapping[str, Floats] = field(default_factory=dict)
    """By name, float[N]: a property of the left response less that of the right (log length, lists, headers)."""

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[Hashable, Hashable, float]],
        *,
        clusters: Mapping[str, Sequence[Hashable]] | None = None,
        style: Mapping[str, Sequence[float]] | None = None,
    ) -> Comparisons:
        """From rows of (left, right, outcome).

        Raises:
            ValueError: no row, an outcome other than 0, 1/2 and 1, one against itself, or columns of another length.
        """
        held = list(rows)
        if not held:
            raise ValueError("ratings need comparisons; none was given")
        for place, (left, right, outcome) in enumerate(held):
            if outcome not in (0.0, 0.5, 1.0):
                raise ValueError(f"comparison {place}: outcome is {outcome}; give 1 (left), 0.5 (tie) or 0 (right)")
            if left == right:
                raise ValueError(f"comparison {place}: {left!r} is compared with itself; leave it out")
        columns = {**(clusters or {}), **(style or {})}
        for name, column in columns.items():
            if len(column) != len(held):
                raise ValueError(f"{name!r} has {len(column)} values for {len(held)} comparisons; give one for each")
        sides, names = numbered(name for row in held for name in row[:2])
        return cls(
            sides[0::2],
            sides[1::2],
            np.array([row[2] for row in held], dtype=np.float64),
            names,
            {name: numbered(column)[0] for name, column in (clusters or {}).items()},
            {name: np.asarray(column, dtype=np.float64) for name, column in (style or {}).items()},
        )


def rate(comparisons: Comparisons, *, ties: Ties = "half") -> Scale:
    """Strengths by maximum likelihood, with errors that hold when comparisons of one annotator or prompt hang together.

        P(left) = e^d / (e^d + e^-d + nu),  P(tie) = nu / (e^d + e^-d + nu),   2 d = theta_left - theta_right + beta . z

    Davidson 1970 (JASA 65), eq. 2.3; without ties, or with each as half a win of both (nu = 0), Bradley and Terry 1952,
    Biometrika 39. z: differences of style (Li et al. 2024, "Does style matter?"; a logistic regression).

    The covariance is that of `likelihood.sandwich`; without clusters every comparison is its own.

    Args:
        ties: "half" or "davidson".
    Raises:
        ValueError: some always won or always lost against all others, or the comparisons fall apart into groups: their
            strengths have no finite value, and they are named. Or style or ties explain every verdict.
    """
    model = model_of(comparisons, ties=ties)
    at, information = maximum(model, model.weight)
    clusters = held(comparisons.clusters)
    covariance, freedom = sandwich(model.scores(at), information, list(clusters.values()))
    m, styles = model.size, len(comparisons.style)
    return Scale(
        comparisons.names,
        at[:m],
        covariance,
        dict(zip(comparisons.style, at[m : m + styles].tolist(), strict=True)),
        float(at[-1]) if model.davidson else None,
        freedom,
        tuple(clusters),
    )


def model_of(comparisons: Comparisons, *, ties: Ties) -> BradleyTerry:
    """The likelihood of these comparisons.

    Raises:
        ValueError: it has no maximum.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties {ties!r}; choose one of {', '.join(get_args(Ties))}")
    model = BradleyTerry(comparisons, davidson=ties == "davidson")
    refuse_disconnected(model, comparisons.names)
    if ties == "davidson" and not (comparisons.outcome == 0.5).any():
        raise ValueError("Davidson's model needs ties and there is none; use ties 'half'")
    return model


def elo(comparisons: Comparisons, order: Integers | None = None, *, k: float = 32.0) -> Floats:
    """Elo's ratings after all comparisons, float[M], mean 0, 400 points for odds of ten: `r += k (y - expected)`.

    Elo 1978, "The Rating of Chessplayers". They depend on the order: what a rating has to do with strength is what
    stays the same when it is changed.

    Args:
        order: int[N], in which the comparisons are played; None: as they stand.
    """
    points = [0.0] * len(comparisons.names)
    places = range(len(comparisons.outcome)) if order is None else order.tolist()
    lefts, rights, outcomes = (column.tolist() for column in (comparisons.left, comparisons.right, comparisons.outcome))
    for place in places:
        left, right = lefts[place], rights[place]
        expected = 1.0 / (1.0 + 10.0 ** ((points[right] - points[left]) / 400.0))
        moved = k * (outcomes[place] - expected)
        points[left] += moved
        points[right] -= moved
    return np.array(points)


class Moments(NamedTuple):
    """Of one comparison in each cell, float[cells]: expectation and variance of y, P(tie), cov(y, tie), log P."""

    expected: Floats
    variance: Floats
    tie: Floats
    both: Floats
    said: Floats


class BradleyTerry:
    """The likelihood over counts of equal comparisons (`likelihood.Model`). Parameters: strengths, style, log nu."""

    def __init__(self, comparisons: Comparisons, *, davidson: bool) -> None:
        self.size = len(comparisons.names)
        self.davidson = davidson
        z = np.column_stack(list(comparisons.style.values())) if comparisons.style else None
        if z is None:
            key = (comparisons.left * self.size + comparisons.right) * 3 + np.rint(2 * comparisons.outcome).astype(int)
            counts = np.bincount(key, minlength=3 * self.size**2)
            cells = np.flatnonzero(counts)
            self.left, self.right = cells // 3 // self.size, cells // 3 % self.size
            self.outcome, self.weight = cells % 3 / 2.0, counts[cells].astype(np.float64)
            places = np.zeros(len(counts), dtype=np.int64)
            places[cells] = np.arange(len(cells))
            self.cell = places[key]
            self.z = np.zeros((len(cells), 0))
        else:
            self.left, self.right, self.outcome, self.z = comparisons.left, comparisons.right, comparisons.outcome, z
            self.weight = np.ones(len(z))
            self.cell = np.arange(len(z))
        self.row = np.arange(len(self.cell))
        self.tied = (self.outcome == 0.5).astype(np.float64)
        self.number = self.size + self.z.shape[1] + davidson

    def moments(self, at: Floats) -> Moments:
        """Of one comparison in each cell."""
        strength, beta = at[: self.size], at[self.size : self.size + self.z.shape[1]]
        half = (strength[self.left] - strength[self.right] + self.z @ beta) / 2
        logs = [half, -half] + ([np.full(len(half), at[-1])] if self.davidson else [])
        total = np.logaddexp.reduce(logs, axis=0)
        left = np.exp(half - total)
        tie = np.exp(logs[2] - total) if self.davidson else np.zeros(len(half))
        expected = left + tie / 2
        said = (2 * self.outcome - 1) * half + (self.tied * at[-1] if self.davidson else 0.0) - total
        return Moments(expected, left + tie / 4 - expected**2, tie, tie / 2 - expected * tie, said)

    def likelihood(self, at: Floats, weight: Floats) -> float:
        """In nats."""
        return float(weight @ self.moments(at).said)

    def derivatives(self, at: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """The gradient and the information, with the mean strength, which is not in the data, held at 0."""
        expected, variance, tie, both, _ = self.moments(at)
        gradient = self._spread(weight * (self.outcome - expected), weight * (self.tied - tie))
        information = np.zeros((self.number, self.number))
        m, left, cross = self.size, weight * variance, weight * both
        between = np.bincount(self.left * m + self.right, left, m * m).reshape(m, m)
        between = between + between.T
        information[:m, :m] = np.diag(between.sum(1)) - between + 1.0 / m
        for column in range(self.z.shape[1]):
            information[m + column] = self._spread(left * self.z[:, column], cross * self.z[:, column])
        if self.davidson:
            information[-1] = self._spread(cross, weight * tie * (1 - tie))
        information[:m, m:] = information[m:, :m].T
        return gradient, information

    def scores(self, at: Floats) -> Scores:
        """Of each cell: y less its expectation in the places of strengths and style, the tie less its probability."""
        expected, _, tie, *_ = self.moments(at)
        return Scores(self.design(self.outcome - expected, self.tied - tie), self.cell)

    def design(self, of_left: Floats, of_tie: Floats) -> csr_array:
        """float[cells, P]: for each cell its two numbers in the places of the parameters that they move."""
        columns = [self.left, self.right, *(np.full(len(self.z), self.size + at) for at in range(self.z.shape[1]))]
        values = [of_left, -of_left, *(of_left[:, None] * self.z).T]
        if self.davidson:
            columns.append(np.full(len(of_tie), self.number - 1))
            values.append(of_tie)
        starts = np.arange(0, len(columns) * len(of_left) + 1, len(columns))
        entries = (np.column_stack(values).ravel(), np.column_stack(columns).ravel(), starts)
        return csr_array(entries, shape=(len(of_left), self.number))

    def wins(self, weight: Floats) -> tuple[Integers, Integers]:
        """Winners and losers; a tie is half of both."""
        won, lost = (self.outcome > 0) & (weight > 0), (self.outcome < 1) & (weight > 0)
        return (
            np.concatenate([self.left[won], self.right[lost]]),
            np.concatenate([self.right[won], self.left[lost]]),
        )

    def _spread(self, of_left: Floats, of_tie: Floats) -> Floats:
        """Sums over cells in the places of the parameters."""
        strength = np.bincount(self.left, of_left, self.size) - np.bincount(self.right, of_left, self.size)
        return np.concatenate([strength, of_left @ self.z, [of_tie.sum()] if self.davidson else []])
