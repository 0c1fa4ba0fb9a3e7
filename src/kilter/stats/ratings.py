"""Ratings from comparisons: who is how strong, how surely, and what the data cannot say.

Bradley-Terry with ties as half a win, or with Davidson's third outcome, and with differences of style beside strength.
All are exponential families in one number for each comparison, y = 1 (left), 1/2 (tie), 0 (right), and whether it was a
tie; so one Newton iteration over counts of equal comparisons fits them, and one sandwich gives their errors.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Literal, get_args

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components
from scipy.special import stdtrit

from kilter.stats.intervals import Floats, Integers, Interval, numbered

Ties = Literal["half", "davidson"]
TOLERANCE = 1e-10
"""Newton ends when no parameter moves by more."""
STEPS = 100
LARGEST = 30.0
"""Nats beyond which a parameter has run away: nobody has seen odds of 10^13."""
UNSAID = (
    "no rating: strength, style and ties cannot be told apart here (a property of style, or a tie, goes with every "
    "verdict, or two properties say the same); leave style out, use ties 'half', or collect more comparisons"
)
ELO_PER_NAT = 400.0 / np.log(10.0)
"""Points of Elo's scale in a nat of odds."""
DENSE_UP_TO = 1 << 23
"""Clusters times parameters up to which the clusters' scores are summed in a dense table."""


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


@dataclass(frozen=True, slots=True)
class Scale:
    """Strengths with their errors; `strength` in nats of odds, its mean 0."""

    names: tuple[Hashable, ...]
    strength: Floats
    """float[M]: theta, P(i beats j) = sigma(theta_i - theta_j) where there is no tie."""
    covariance: Floats
    """float[P, P] of strengths, then style, then the tie: the sandwich."""
    style: Mapping[str, float]
    """By name, what one unit of a property is worth, in nats."""
    tie: float | None
    """log nu of Davidson's model."""
    freedom: int
    """Of Student's t: the clusters less one, the fewest of the kinds."""
    clusters: tuple[str, ...] = ()
    """The kinds of clusters that the covariance holds together: those of which there are two or more."""

    def interval(self, name: Hashable, *, against: Hashable | None = None, confidence: float = 0.95) -> Interval:
        """Of a strength, or of the difference of two."""
        pick = np.zeros(len(self.covariance))
        pick[self.names.index(name)] = 1.0
        if against is not None:
            pick[self.names.index(against)] -= 1.0
        mean = float(pick[: len(self.names)] @ self.strength)
        if self.freedom < 1:
            return Interval(mean, -np.inf, np.inf, 1)
        half = float(stdtrit(self.freedom, (1 + confidence) / 2) * np.sqrt(pick @ self.covariance @ pick))
        return Interval(mean, mean - half, mean + half, self.freedom + 1)

    def order(self) -> list[Hashable]:
        """The names, strongest first."""
        return [self.names[place] for place in np.argsort(-self.strength, kind="stable")]

    def apart(self, *, confidence: float = 0.95) -> list[bool]:
        """For each two that stand next to each other in `order`, whether they can be told apart."""
        order = self.order()
        return [
            self.interval(one, against=other, confidence=confidence).excludes(0.0) for one, other in pairwise(order)
        ]


def rate(comparisons: Comparisons, *, ties: Ties = "half") -> Scale:
    """Strengths by maximum likelihood, with errors that hold when comparisons of one annotator or prompt hang together.

        P(left) = e^d / (e^d + e^-d + nu),  P(tie) = nu / (e^d + e^-d + nu),   2 d = theta_left - theta_right + beta . z

    Davidson 1970 (JASA 65), eq. 2.3; without ties, or with each as half a win of both (nu = 0), Bradley and Terry 1952,
    Biometrika 39. z: differences of style (Li et al. 2024, "Does style matter?"; a logistic regression).

    The covariance is H^-1 M H^-1, M the sum over clusters of the outer product of their scores times C / (C - 1); of
    two kinds of clusters the sum of both less that of their intersection (Cameron, Gelbach and Miller 2011, J. Bus.
    Econ. Stat. 29, eq. 2.11). Without clusters every comparison is its own.

    Args:
        ties: "half" or "davidson".
    Raises:
        ValueError: some always won or always lost against all others, or the comparisons fall apart into groups: their
            strengths have no finite value, and they are named. Or style or ties explain every verdict.
    """
    if ties not in get_args(Ties):
        raise ValueError(f"ties {ties!r}; choose one of {', '.join(get_args(Ties))}")
    _refuse_disconnected(comparisons)
    if ties == "davidson" and not (comparisons.outcome == 0.5).any():
        raise ValueError("Davidson's model needs ties and there is none; use ties 'half'")
    model = _Model(comparisons, davidson=ties == "davidson")
    at, information = model.fit()
    return model.scale(at, information)


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


def _refuse_disconnected(comparisons: Comparisons) -> None:
    """The estimate is finite if and only if everybody can be reached from everybody over wins (Ford 1957, p. 29)."""
    size = len(comparisons.names)
    won, lost = comparisons.outcome > 0, comparisons.outcome < 1  # a tie is half of both
    winners = np.concatenate([comparisons.left[won], comparisons.right[lost]])
    losers = np.concatenate([comparisons.right[won], comparisons.left[lost]])
    edges = coo_array((np.ones(len(winners)), (winners, losers)), shape=(size, size)).tocsr()
    kinds: tuple[tuple[Literal["weak", "strong"], str], ...] = (
        ("weak", "was never compared with the others"),
        ("strong", "either never lost to the others, or never won against them"),
    )
    for connection, what in kinds:
        number, group = connected_components(edges, directed=True, connection=connection)
        if number > 1:
            smallest = np.bincount(group).argmin()
            members = [str(comparisons.names[place]) for place in np.flatnonzero(group == smallest)]
            some = ", ".join(members[:5]) + (f" and {len(members) - 5} more" if len(members) > 5 else "")
            raise ValueError(
                f"no rating: {some} {what}, so the comparisons cannot say how far apart they are; collect comparisons "
                "between them, or rate the groups by themselves"
            )


class _Model:
    """The likelihood over counts of equal comparisons. Parameters: strengths, style, log nu (Davidson)."""

    def __init__(self, comparisons: Comparisons, *, davidson: bool) -> None:
        self.all = comparisons
        self.size = len(comparisons.names)
        self.davidson = davidson
        z = np.column_stack(list(comparisons.style.values())) if comparisons.style else None
        if z is None:
            key = (comparisons.left * self.size + comparisons.right) * 3 + np.rint(2 * comparisons.outcome).astype(int)
            counts = np.bincount(key, minlength=3 * self.size**2)
            cells = np.flatnonzero(counts)
            self.left, self.right = cells // 3 // self.size, cells // 3 % self.size
            self.outcome, self.weight = cells % 3 / 2.0, counts[cells].astype(np.float64)
            self.cell = np.searchsorted(cells, key)  # of each comparison
            self.z = np.zeros((len(cells), 0))
        else:
            self.left, self.right, self.outcome, self.z = comparisons.left, comparisons.right, comparisons.outcome, z
            self.weight = np.ones(len(z))
            self.cell = np.arange(len(z))
        self.tied = (self.outcome == 0.5).astype(np.float64)
        self.number = self.size + self.z.shape[1] + davidson

    def moments(self, at: Floats) -> tuple[Floats, Floats, Floats, Floats, float]:
        """Of each cell: expected y, its variance, P(tie), cov(y, tie); and the log-likelihood."""
        strength, beta = at[: self.size], at[self.size : self.size + self.z.shape[1]]
        half = (strength[self.left] - strength[self.right] + self.z @ beta) / 2
        logs = [half, -half] + ([np.full(len(half), at[-1])] if self.davidson else [])
        total = np.logaddexp.reduce(logs, axis=0)
        left = np.exp(half - total)
        tie = np.exp(logs[2] - total) if self.davidson else np.zeros(len(half))
        expected = left + tie / 2
        said = (2 * self.outcome - 1) * half + (self.tied * at[-1] if self.davidson else 0.0) - total
        return (
            expected,
            left + tie / 4 - expected**2,
            tie,
            tie / 2 - expected * tie,
            float(self.weight @ said),
        )

    def scores(self, at: Floats) -> tuple[Floats, Floats]:
        """Of one comparison in each cell: y less its expectation, and the tie less its probability."""
        expected, _, tie, *_ = self.moments(at)
        return self.outcome - expected, self.tied - tie

    def fit(self) -> tuple[Floats, Floats]:
        """Newton with halved steps; the parameters and the information there, with the mean strength held at 0."""
        at = np.zeros(self.number)
        moved = np.inf
        for _ in range(STEPS):
            expected, variance, tie, both, likelihood = self.moments(at)
            gradient = self._spread(self.weight * (self.outcome - expected), self.weight * (self.tied - tie))
            information = self._information(variance, tie, both)
            try:
                step = np.linalg.solve(information, gradient)
            except np.linalg.LinAlgError as err:
                raise ValueError(UNSAID) from err
            scale = 1.0
            while self.moments(at + scale * step)[-1] < likelihood - 1e-9 * abs(likelihood) and scale > 1e-6:
                scale /= 2
            at, moved = at + scale * step, float(np.abs(scale * step).max())
            if moved < TOLERANCE:
                break
        if moved > 1e-6 or np.abs(at).max() > LARGEST:
            raise ValueError(UNSAID)
        return at, self._information(*self.moments(at)[1:4])

    def _spread(self, of_left: Floats, of_tie: Floats) -> Floats:
        """Sums over cells in the places of the parameters."""
        strength = np.bincount(self.left, of_left, self.size) - np.bincount(self.right, of_left, self.size)
        return np.concatenate([strength, of_left @ self.z, [of_tie.sum()] if self.davidson else []])

    def _information(self, variance: Floats, tie: Floats, both: Floats) -> Floats:
        found = self._second(self.weight * variance, self.weight * both, self.weight * tie * (1 - tie))
        found[: self.size, : self.size] += 1.0 / self.size  # the mean strength is not in the data: it is 0
        return found

    def _second(self, left: Floats, cross: Floats, tie: Floats) -> Floats:
        """Sums over cells of an outer product in the places of the parameters, from its three kinds of factors."""
        found = np.zeros((self.number, self.number))
        m = self.size
        between = np.bincount(self.left * m + self.right, left, m * m).reshape(m, m)
        between = between + between.T
        found[:m, :m] = np.diag(between.sum(1)) - between
        for column in range(self.z.shape[1]):
            found[m + column] = self._spread(left * self.z[:, column], cross * self.z[:, column])
        if self.davidson:
            found[-1] = self._spread(cross, tie)
        found[:m, m:] = found[m:, :m].T
        return found

    def scale(self, at: Floats, information: Floats) -> Scale:
        """The parameters with their sandwich."""
        of_left, of_tie = self.scores(at)
        held = {name: cluster for name, cluster in self.all.clusters.items() if cluster.max() > 0}
        clusters = list(held.values())
        if not clusters:
            number = int(self.weight.sum())
            meat = self._second(self.weight * of_left**2, self.weight * of_left * of_tie, self.weight * of_tie**2)
            meat, freedom = meat * number / max(number - 1, 1), number - 1
        else:
            meat, freedom = self._meat(clusters[0], of_left, of_tie)
        for other in clusters[1:]:
            more, fewer = self._meat(other, of_left, of_tie)
            common = _numbered_pairs(clusters[0], other)
            meat, freedom = meat + more - self._meat(common, of_left, of_tie)[0], min(freedom, fewer)
        bread = np.linalg.inv(information)
        covariance = bread @ meat @ bread
        if len(clusters) > 1:  # the difference need not be positive: Cameron, Gelbach and Miller 2011, section 2.3
            values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
            covariance = (vectors * values.clip(min=0)) @ vectors.T
        m, styles = self.size, self.z.shape[1]
        return Scale(
            self.all.names,
            at[:m],
            covariance,
            dict(zip(self.all.style, at[m : m + styles].tolist(), strict=True)),
            float(at[-1]) if self.davidson else None,
            freedom,
            tuple(held),
        )

    def _meat(self, cluster: Integers, of_left: Floats, of_tie: Floats) -> tuple[Floats, int]:
        """The sum over clusters of the outer product of their summed scores, and the clusters less one."""
        number, m = int(cluster.max()) + 1, self.size
        left, tie = of_left[self.cell], of_tie[self.cell]
        columns = [self.left[self.cell], self.right[self.cell]]
        values = [left, -left]
        for column in range(self.z.shape[1]):
            columns.append(np.full(len(cluster), m + column))
            values.append(left * self.z[self.cell, column])
        if self.davidson:
            columns.append(np.full(len(cluster), self.number - 1))
            values.append(tie)
        if number * self.number <= DENSE_UP_TO:
            sums = np.zeros(number * self.number)
            for column, value in zip(columns, values, strict=True):
                sums += np.bincount(cluster * self.number + column, value, number * self.number)
            dense = sums.reshape(number, self.number)
            found = dense.T @ dense
        else:  # many small clusters
            rows = np.tile(cluster, len(columns))
            shape = (number, self.number)
            sparse = coo_array((np.concatenate(values), (rows, np.concatenate(columns))), shape=shape).tocsr()
            found = (sparse.T @ sparse).toarray()
        return found * number / max(number - 1, 1), number - 1


def _numbered_pairs(first: Integers, second: Integers) -> Integers:
    found: Integers = np.unique(first * (int(second.max()) + 1) + second, return_inverse=True)[1]
    return found
