"""What the models of ratings share: the graph that must hang together, Newton's iteration, the sandwich by clusters."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from scipy.sparse import coo_array, csr_array
from scipy.sparse.csgraph import connected_components
from scipy.special import stdtrit

from kilter.stats.intervals import Floats, Integers, Interval

TOLERANCE = 1e-10
"""Newton ends when no parameter moves by more."""
STEPS = 100
LARGEST = 30.0
"""Nats beyond which a parameter has run away: nobody has seen odds of 10^13."""
UNSAID = (
    "no rating: strength, style and ties cannot be told apart here (a property of style, or a tie, goes with every "
    "verdict, or two properties say the same); leave style out, use ties 'half', or collect more comparisons"
)
SPARSE_BELOW = 128
"""How many times more dearly a sparse product multiplies two numbers than a dense one."""
BLOCK = 1 << 20
"""Numbers of a dense table at once."""


class Scores(NamedTuple):
    """The derivatives of what each of N observations says, by parameter: those of the different kinds, and which."""

    kinds: csr_array
    """float[K, P]."""
    kind: Integers
    """int[N]."""


class Model(Protocol):
    """A likelihood over cells: counts of equal choices. The first `size` of the `number` parameters are strengths."""

    size: int
    number: int
    weight: Floats
    """float[cells], how often each was seen."""
    cell: Integers
    """int[E], the cell of each choice."""
    row: Integers
    """int[E], the observation that it belongs to: those are what clusters hold together."""

    def likelihood(self, at: Floats, weight: Floats) -> float: ...

    def derivatives(self, at: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """The gradient and the information, in which the mean strength is held at 0 (`centred`)."""
        ...

    def scores(self, at: Floats) -> Scores: ...

    def wins(self, weight: Floats) -> tuple[Integers, Integers]:
        """Winners and losers of what has weight: the edges of the graph."""
        ...


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


def connected(model: Model, weight: Floats) -> bool:
    """Whether everybody can be reached from everybody over wins: the estimate is finite if and only if so."""
    return bool(connected_components(_graph(model, weight), directed=True, connection="strong")[0] == 1)


def refuse_disconnected(model: Model, names: Sequence[Hashable]) -> None:
    """The estimate is finite if and only if everybody can be reached from everybody over wins (Ford 1957, p. 29).

    Raises:
        ValueError: who cannot, by name.
    """
    edges = _graph(model, model.weight)
    kinds: tuple[tuple[Literal["weak", "strong"], str], ...] = (
        ("weak", "was never compared with the others"),
        ("strong", "either never lost to the others, or never won against them"),
    )
    for connection, what in kinds:
        number, group = connected_components(edges, directed=True, connection=connection)
        if number > 1:
            smallest = np.bincount(group).argmin()
            members = [str(names[place]) for place in np.flatnonzero(group == smallest).tolist()]
            some = ", ".join(members[:5]) + (f" and {len(members) - 5} more" if len(members) > 5 else "")
            raise ValueError(
                f"no rating: {some} {what}, so the comparisons cannot say how far apart they are; collect comparisons "
                "between them, or rate the groups by themselves"
            )


def _graph(model: Model, weight: Floats) -> csr_array:
    winners, losers = model.wins(weight)
    return coo_array((np.ones(len(winners)), (winners, losers)), shape=(model.size, model.size)).tocsr()


def maximum(model: Model, weight: Floats, start: Floats | None = None) -> tuple[Floats, Floats]:
    """Newton with halved steps; the parameters and the information there, with the mean strength held at 0."""
    at = np.zeros(model.number) if start is None else start
    likelihood, moved = model.likelihood(at, weight), np.inf
    for _ in range(STEPS):
        gradient, information = model.derivatives(at, weight)
        try:
            step = np.linalg.solve(information, gradient)
        except np.linalg.LinAlgError as err:
            raise ValueError(UNSAID) from err
        scale, least = 1.0, likelihood - 1e-9 * abs(likelihood)
        while (likelihood := model.likelihood(at + scale * step, weight)) < least and scale > 1e-6:
            scale /= 2
        at, moved = at + scale * step, float(np.abs(scale * step).max())
        if moved < TOLERANCE:
            break
    if moved > 1e-6 or np.abs(at).max() > LARGEST:
        raise ValueError(UNSAID)
    return at, model.derivatives(at, weight)[1]


def held(clusters: Mapping[str, Integers]) -> dict[str, Integers]:
    """The kinds of clusters of which there are two or more: of a single one nothing can be said."""
    return {name: cluster for name, cluster in clusters.items() if cluster.max() > 0}


def sandwich(scores: Scores, information: Floats, clusters: Sequence[Integers]) -> tuple[Floats, int]:
    """H^-1 M H^-1, and the degrees of freedom: the fewest clusters less one.

    M is the sum over clusters of the outer product of their scores times C / (C - 1); of two kinds of clusters the sum
    of both less that of their intersection (Cameron, Gelbach and Miller 2011, J. Bus. Econ. Stat. 29, eq. 2.11).
    Without clusters every observation is its own.

    Args:
        clusters: of each kind, int[N].
    """
    bread = np.linalg.inv(information)
    if not clusters:
        number = len(scores.kind)
        return bread @ _alone(scores, np.ones(number, bool)) @ bread * number / max(number - 1, 1), number - 1
    found = [_meat(scores, cluster) for cluster in clusters]
    meat = sum((meat for meat, _ in found), np.zeros_like(bread))
    for other in clusters[1:]:
        meat -= _meat(scores, crossed(clusters[0], other))[0]
    covariance = bread @ meat @ bread
    if len(clusters) > 1:  # the difference need not be positive: Cameron, Gelbach and Miller 2011, section 2.3
        values, vectors = np.linalg.eigh((covariance + covariance.T) / 2)
        covariance = (vectors * values.clip(min=0)) @ vectors.T
    return covariance, min(freedom for _, freedom in found)


def crossed(first: Integers, second: Integers) -> Integers:
    """Each place's number among the different pairs (first, second)."""
    key = first * (int(second.max()) + 1) + second
    bits = len(key).bit_length()
    if int(key.max()).bit_length() + bits < 63:  # numbers sort several times faster than their places
        packed = np.sort(key << bits | np.arange(len(key)))
        place, ordered = packed & ((1 << bits) - 1), packed >> bits
    else:
        place = np.argsort(key)
        ordered = key[place]
    found = np.empty_like(key)
    found[place] = np.concatenate([[0], np.cumsum(ordered[1:] != ordered[:-1])])
    return found


def sums(scores: Scores, cluster: Integers) -> csr_array:
    """float[C, P], the clusters' scores."""
    shape = (int(cluster.max()) + 1, scores.kinds.shape[0])
    counts = coo_array((np.ones(len(cluster)), (cluster, scores.kind)), shape=shape).tocsr()
    found: csr_array = counts @ scores.kinds
    return found


def corrected(number: int) -> float:
    """C / (C - 1), for C clusters."""
    return number / max(number - 1, 1)


def _meat(scores: Scores, cluster: Integers) -> tuple[Floats, int]:
    """The sum over clusters of the outer product of their scores, times C / (C - 1), and the clusters less one."""
    sizes = np.bincount(cluster)
    alone = sizes[cluster] == 1
    if 2 * alone.sum() < len(alone):
        found = _squared(sums(scores, cluster))
    else:
        found = _alone(scores, alone)
        if not alone.all():
            together = (np.cumsum(sizes > 1) - 1)[cluster[~alone]]
            found += _squared(sums(Scores(scores.kinds, scores.kind[~alone]), together))
    return found * corrected(len(sizes)), len(sizes) - 1


def _squared(table: csr_array) -> Floats:
    """table^T table: by dense blocks of rows where most places are taken."""
    rows, columns = table.shape
    found: Floats = np.zeros((columns, columns))
    if SPARSE_BELOW * float((np.diff(table.indptr).astype(np.float64) ** 2).sum()) < rows * columns**2:
        found += (table.T @ table).toarray()
        return found
    block = max(1, BLOCK // columns)
    for start in range(0, rows, block):
        dense = table[start : start + block].toarray()
        found += dense.T @ dense
    return found


def _alone(scores: Scores, picked: NDArray[np.bool_]) -> Floats:
    """The sum over the picked observations of the outer product of their scores."""
    counts = np.bincount(scores.kind[picked], minlength=scores.kinds.shape[0]).astype(np.float64)
    found: Floats = (scores.kinds.T @ scores.kinds.multiply(counts[:, None]).tocsr()).toarray()
    return found
