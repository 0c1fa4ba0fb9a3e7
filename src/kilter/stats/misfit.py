"""What strengths alone do not say: pairs of models that go another way, models that are stronger in some context."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import coo_array, csr_array
from scipy.special import gammaincc, ndtr

from kilter.stats.intervals import Floats, Integers, numbered
from kilter.stats.likelihood import Scores, corrected, crossed, held, maximum, sums
from kilter.stats.ratings import Comparisons, Ties, model_of

Label = tuple[Hashable, Hashable, Hashable]


class Departure(NamedTuple):
    """One parameter that the model does not have, and whether it asks for it."""

    name: Hashable
    """Who is better than the strengths say,"""
    against: Hashable
    """against whom; None: against everybody,"""
    context: Hashable
    """and in what context; None: in all."""
    comparisons: int
    effect: float
    """In nats: the parameter's value after one step of Newton's method."""
    z: float
    p: float
    """Two-sided."""
    adjusted: float
    """p by Holm 1979 (Scand. J. Stat. 6) over all tests of the family."""


@dataclass(frozen=True, slots=True)
class Misfit:
    """All departures, by family: "pairs", and the name of each kind of context; the surest first."""

    departures: Mapping[str, Sequence[Departure]]
    square: float
    """Pearson's chi-square of all pairs, with the first-order correction for clusters (Rao and Scott 1981, JASA 76)."""
    freedom: float
    p: float

    def found(self, family: str, *, level: float = 0.05) -> list[Departure]:
        """Those of a family that chance would show in less than `level` of all data sets, all tests together."""
        return [departure for departure in self.departures[family] if departure.adjusted < level]


def misfit(
    comparisons: Comparisons, *, ties: Ties = "half", by: Mapping[str, Sequence[Hashable]] | None = None
) -> Misfit:
    """Score tests of one added parameter each (Rao 1948): of a pair of models, and of a model in a context.

        psi_n = x_n (y_n - E y_n) - C H^-1 s_n,   z = sum psi_n / sqrt(V)

    x: 1 where the added parameter helps the left response, -1 the right; s: the scores of the model's own parameters, H
    their information, C the information that they share with the added one. V is the largest of: the sum over clusters
    of (sum psi)^2 times C / (C - 1), for each kind of clusters, and for two kinds that of both less that of their
    intersection, which alone need not be positive; and what the model itself says of independent votes, times their
    dispersion, without which a favourite that won all of its few votes would be surely too strong. |z| cannot exceed
    sqrt C of the fewest clusters, so with a handful of annotators nothing is ever called out.

    All pairs together have a chi-square: sum of U^2 / w over pairs, U the sum of x (y - E y), w its variance by the
    model were the strengths known, times freedom over its expectation under V. Contexts have none: their U hang
    together within each context, and the covariance of all of them is not known from few clusters.

    Args:
        by: by name, a context for each comparison (the prompt's kind, the annotator's group); of one alone there is
            nothing to test.
    Raises:
        ValueError: what `rate` refuses, or a column of another length.
    """
    for name, column in (by or {}).items():
        if len(column) != len(comparisons.outcome):
            raise ValueError(f"{name!r} has {len(column)} values for {len(comparisons.outcome)} comparisons")
    test = _Test(comparisons, ties)
    low, high = np.minimum(comparisons.left, comparisons.right), np.maximum(comparisons.left, comparisons.right)
    pair = crossed(low, high)
    kept = np.zeros(int(pair.max()) + 1, dtype=np.int64)
    kept[pair] = np.arange(len(pair))
    rows = np.arange(len(pair))
    signs = np.where(comparisons.left == low, 1.0, -1.0)
    found = test.of(coo_array((signs, (rows, pair)), shape=(len(pair), len(kept))).tocsr())
    names = comparisons.names
    labels: list[Label] = [(names[one], names[other], None) for one, other in zip(low[kept], high[kept], strict=True)]
    departures = {"pairs": _sorted(labels, found)}
    for name, column in (by or {}).items():
        place, contexts = numbered(column)
        if len(contexts) < 2:
            continue
        size = len(names)
        columns = np.concatenate([place * size + comparisons.left, place * size + comparisons.right])
        entries = (np.repeat([1.0, -1.0], len(rows)), (np.tile(rows, 2), columns))
        labels = [(name, None, context) for context in contexts for name in names]
        departures[name] = _sorted(labels, test.of(coo_array(entries, shape=(len(rows), len(labels))).tocsr()))
    total = found.known > 0
    square, expected, freedom = (
        float((part[total] / found.known[total]).sum())
        for part in (found.total**2, found.variance, found.by_model / test.dispersion)
    )
    square = square * freedom / expected if expected > 0 else 0.0
    p = float(gammaincc(freedom / 2, square / 2)) if freedom > 0.5 else 1.0
    return Misfit(departures, square, freedom, p)


class _Found(NamedTuple):
    """Of each test, float[Q]."""

    total: Floats
    """The sum of x (y - E y)."""
    variance: Floats
    known: Floats
    """Its variance by the model, were all its parameters known."""
    by_model: Floats
    """The same with its parameters fitted, times the dispersion."""
    effect: Floats
    seen: Floats
    """How many comparisons it is about."""


class _Test:
    """The fitted model, and what every test needs of it."""

    def __init__(self, comparisons: Comparisons, ties: Ties) -> None:
        self.model = model_of(comparisons, ties=ties)
        at, information = maximum(self.model, self.model.weight)
        moments = self.model.moments(at)
        cell = self.model.cell
        self.bread = np.linalg.inv(information)
        self.scores = self.model.scores(at)
        self.residual, self.spread = (self.model.outcome - moments.expected)[cell], moments.variance[cell]
        self.shared = Scores(self.model.design(moments.variance, moments.both), cell)
        self.dispersion = float((self.residual**2).sum() / self.spread.sum())
        clusters = list(held(comparisons.clusters).values())
        self.clusters: list[Integers] = clusters or [np.arange(len(cell))]

    def of(self, x: csr_array) -> _Found:
        """Every column of `x`, [N, Q], as an added parameter."""
        total = x.T @ self.residual
        # C: [Q, P], summed over the cells of each test before the cells' own derivatives are multiplied in.
        cells = coo_array(
            (np.ones(x.shape[0]), (np.arange(x.shape[0]), self.shared.kind)), shape=(x.shape[0], len(self.model.weight))
        ).tocsr()
        shared = ((x.T @ cells) @ self.shared.kinds).toarray()
        fitted = shared @ self.bread
        squared = x.multiply(x).tocsr()
        known = squared.T @ self.spread
        left = known - (shared * fitted).sum(1)
        by_model = left.clip(min=0) * self.dispersion
        held_by = [self._variance(x, fitted, cluster) for cluster in self.clusters]
        several = [*held_by, by_model]
        if len(held_by) > 1:
            both = self._variance(x, fitted, crossed(*self.clusters[:2]))
            several.append(held_by[0] + held_by[1] - both)
        variance = np.max(several, axis=0)
        least = 1e-9 * known.max()  # a test that the strengths leave nothing to, as that of a pair nobody else met
        effect = np.where(left > least, total / np.maximum(left, least), 0.0)
        return _Found(
            total, np.where(left > least, variance, np.inf), known, by_model, effect, np.asarray(squared.sum(0))
        )

    def _variance(self, x: csr_array, fitted: Floats, cluster: Integers) -> Floats:
        """float[Q]: the sum over clusters of (sum psi)^2 times C / (C - 1). The square is expanded, so that no table of
        clusters by tests is ever whole."""
        number = int(cluster.max()) + 1
        ones = coo_array((self.residual, (cluster, np.arange(len(cluster)))), shape=(number, len(cluster))).tocsr()
        own = ones @ x
        scores = sums(self.scores, cluster)
        cross = (own.T @ scores).toarray()
        square = (scores.T @ scores).toarray()
        found = own.multiply(own).sum(0) - 2 * (cross * fitted).sum(1) + ((fitted @ square) * fitted).sum(1)
        return np.asarray(found * corrected(number))


def _sorted(labels: Sequence[Label], found: _Found) -> list[Departure]:
    """The departures, the one that helps named first, the surest first; adjusted by Holm."""
    tested = np.flatnonzero((found.seen > 0) & np.isfinite(found.variance) & (found.variance > 0))
    z = found.total[tested] / np.sqrt(found.variance[tested])
    p = 2 * ndtr(-np.abs(z))
    order = np.argsort(p, kind="stable")
    adjusted = np.maximum.accumulate(p[order] * np.arange(len(p), 0, -1)).clip(max=1.0)
    departures = []
    for place, holm in zip(order.tolist(), adjusted.tolist(), strict=True):
        at = int(tested[place])
        name, against, context = labels[at]
        effect, one = float(found.effect[at]), float(z[place])
        if against is not None and one < 0:
            name, against, effect, one = against, name, -effect, -one
        departures.append(Departure(name, against, context, int(found.seen[at]), effect, one, float(p[place]), holm))
    return departures
