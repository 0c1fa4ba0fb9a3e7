"""Ratings from whole rankings: Plackett and Luce's model, with the errors of ratings from comparisons."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from scipy.sparse import coo_array, csr_array

from kilter.stats.intervals import Floats, Integers, numbered
from kilter.stats.likelihood import Scale, Scores, crossed, held, maximum, refuse_disconnected, sandwich


@dataclass(frozen=True, slots=True)
class Rankings:
    """N rankings of up to K, M names."""

    item: Integers
    """int[N, K], places in `names`, the best first; M where a ranking is shorter."""
    first: Integers
    """int[N, K], the column at which those tied with it begin; its own where it is tied with none before it."""
    names: tuple[Hashable, ...]
    clusters: Mapping[str, Integers] = field(default_factory=dict)
    """By what rankings hang together (annotator, prompt): int[N], the cluster of each."""

    @classmethod
    def of(
        cls,
        rows: Iterable[tuple[Sequence[Hashable], Sequence[float]]],
        *,
        clusters: Mapping[str, Sequence[Hashable]] | None = None,
    ) -> Rankings:
        """From rows of (who, ranks): the lowest rank is the best, equal ones are ties. A name may come more than once.

        Raises:
            ValueError: no row, a row without two different names, or columns of another length.
        """
        kept = list(rows)
        if not kept:
            raise ValueError("ratings need rankings; none was given")
        for place, (who, ranks) in enumerate(kept):
            if len(who) != len(ranks):
                raise ValueError(f"ranking {place}: {len(ranks)} ranks for {len(who)} names; give one for each")
            if len(set(who)) < 2:
                raise ValueError(f"ranking {place}: {list(who)!r} compares nobody with anybody else; leave it out")
        for name, column in (clusters or {}).items():
            if len(column) != len(kept):
                raise ValueError(f"{name!r} has {len(column)} values for {len(kept)} rankings; give one for each")
        places, names = numbered(name for who, _ in kept for name in who)
        sizes = np.array([len(who) for who, _ in kept])
        levels = np.array([rank for _, ranks in kept for rank in ranks], dtype=np.float64)
        row = np.repeat(np.arange(len(kept)), sizes)
        order = np.lexsort((levels, row))
        column = np.arange(len(row)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        begins = np.ones(len(row), dtype=bool)
        begins[1:] = (np.diff(levels[order]) != 0) | (np.diff(row) != 0)
        item = np.full((len(kept), int(sizes.max())), len(names))
        item[row, column] = places[order]
        first = np.tile(np.arange(item.shape[1]), (len(kept), 1))
        first[row, column] = column[np.flatnonzero(begins)[np.cumsum(begins) - 1]]
        return cls(item, first, names, {name: numbered(column)[0] for name, column in (clusters or {}).items()})


def rate_rankings(rankings: Rankings) -> Scale:
    """Strengths by maximum likelihood from rankings, with the errors of `ratings.rate`.

        P(ranking) = product over its places j of  e^theta_j / sum over those not placed before j of e^theta

    Luce 1959, "Individual Choice Behavior"; Plackett 1975, Appl. Stat. 24. Of two it is Bradley and Terry's model.
    Tied ones are each chosen from a set in which all of them still stand (Breslow 1974, Biometrics 30): of two a tie is
    a win of each, and so counts twice what it does as half a win of both.

    A ranking taken as k (k - 1) / 2 comparisons says more often than once that the same one is good; here each of its
    k - 1 choices is counted once. Newton over counts of equal choices: who, from which set.

    Raises:
        ValueError: some always stand before, or behind, all others, or were never ranked with them; they are named.
    """
    model = model_of(rankings)
    at, information = maximum(model, model.weight)
    clusters = held(rankings.clusters)
    covariance, freedom = sandwich(model.scores(at), information, list(clusters.values()))
    return Scale(rankings.names, at, covariance, {}, None, freedom, tuple(clusters))


def model_of(rankings: Rankings) -> PlackettLuce:
    """The likelihood of these rankings.

    Raises:
        ValueError: it has no maximum.
    """
    model = PlackettLuce(rankings)
    refuse_disconnected(model, rankings.names)
    return model


class PlackettLuce:
    """The likelihood over counts of equal choices (`likelihood.Model`): its parameters are the strengths."""

    def __init__(self, rankings: Rankings) -> None:
        item, first = rankings.item, rankings.first
        self.size = self.number = len(rankings.names)
        left = (item < self.size).sum(1)[:, None] - first  # how many stand in the set that each is chosen from
        self.row, column = np.nonzero((item < self.size) & (left > 1))
        sets = item[self.row]
        sets[np.arange(item.shape[1]) < first[self.row, column][:, None]] = self.size
        sets.sort(1)
        chosen = item[self.row, column]
        number = sets[:, 0]
        for place in range(1, item.shape[1]):
            number = crossed(number, sets[:, place])
        self.cell = crossed(number, chosen)
        one = np.zeros(int(self.cell.max()) + 1, dtype=np.int64)
        one[self.cell] = np.arange(len(self.cell))  # a choice of each cell
        self.chosen, self.set = chosen[one], number[one]
        self.weight = np.bincount(self.cell).astype(np.float64)
        kept = np.zeros(int(number.max()) + 1, dtype=np.int64)
        kept[number] = np.arange(len(number))
        self.sets = sets[kept]  # int[S, K], with `size` where there is none
        self.rankings = len(item)

    def likelihood(self, at: Floats, weight: Floats) -> float:
        """In nats."""
        return float(weight @ (at[self.chosen] - self._totals(at)[0][self.set]))

    def derivatives(self, at: Floats, weight: Floats) -> tuple[Floats, Floats]:
        """The gradient and the information, with the mean strength, which is not in the data, held at 0."""
        shares = self._shares(at)
        count = np.bincount(self.set, weight, len(self.sets))
        expected = shares.T @ count
        gradient = np.bincount(self.chosen, weight, self.size) - expected
        products = (shares.T @ shares.multiply(count[:, None]).tocsr()).toarray()
        return gradient, np.diag(expected) - products + 1.0 / self.size

    def scores(self, at: Floats) -> Scores:
        """Of each ranking: how often each was chosen less how often it was to be expected."""
        shape = (self.rankings, len(self.weight))
        cells = coo_array((np.ones(len(self.row)), (self.row, self.cell)), shape=shape).tocsr()
        places = (np.arange(len(self.chosen)), self.chosen)
        won = coo_array((np.ones(len(self.chosen)), places), shape=(len(self.chosen), self.size)).tocsr()
        return Scores((cells @ (won - self._shares(at)[self.set])).tocsr(), np.arange(self.rankings))

    def wins(self, weight: Floats) -> tuple[Integers, Integers]:
        """Who was chosen, and who else stood in the set."""
        seen = np.flatnonzero(weight > 0)
        winners, losers = np.repeat(self.chosen[seen], self.sets.shape[1]), self.sets[self.set[seen]].ravel()
        other = losers < self.size
        return winners[other], losers[other]

    def _totals(self, at: Floats) -> tuple[Floats, Floats]:
        """Of each set the log of its sum, and its members' strengths."""
        members = np.append(at, -np.inf)[self.sets]
        return np.logaddexp.reduce(members, axis=1), members

    def _shares(self, at: Floats) -> csr_array:
        """float[S, M], each one's chance in each set."""
        totals, members = self._totals(at)
        starts = np.arange(0, self.sets.size + 1, self.sets.shape[1])
        entries = (np.exp(members - totals[:, None]).ravel(), self.sets.ravel(), starts)
        return csr_array(entries, shape=(len(self.sets), self.size + 1), copy=True)[:, : self.size]
