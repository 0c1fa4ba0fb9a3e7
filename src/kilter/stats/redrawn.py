"""Ratings made again from whole clusters drawn with replacement: intervals that lean on no formula for the errors."""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from dataclasses import dataclass

import numpy as np

from kilter.stats import rankings, ratings
from kilter.stats.intervals import Floats, Integers, Interval, percentiles
from kilter.stats.likelihood import Model, connected, held, maximum
from kilter.stats.rankings import Rankings
from kilter.stats.ratings import Comparisons, Ties


@dataclass(frozen=True, slots=True)
class Redrawn:
    """Strengths in nats, mean 0: of the data, and of the draws."""

    names: tuple[Hashable, ...]
    strength: Floats
    """float[M]."""
    draws: Floats
    """float[D, M], of the draws that could be rated."""
    unrated: int
    """Draws in which somebody always won or lost, or was not compared: they have no rating, and are in no interval."""
    number: int
    """Clusters of the kind of which there are fewest."""

    def interval(self, name: Hashable, *, against: Hashable | None = None, confidence: float = 0.95) -> Interval:
        """Of a strength, or of the difference of two: the quantiles of the draws (Efron 1979)."""
        place = self.names.index(name)
        mean, values = self.strength[place], self.draws[:, place]
        if against is not None:
            other = self.names.index(against)
            mean, values = mean - self.strength[other], values - self.draws[:, other]
        return Interval(float(mean), *percentiles(values, confidence), self.number)


def redrawn(
    data: Comparisons | Rankings, generator: np.random.Generator, *, draws: int = 1000, ties: Ties = "half"
) -> Redrawn:
    """Ratings of `draws` samples of whole clusters, each fitted from the strengths of all.

    A draw weighs a cluster by how often it is drawn: w ~ multinomial(C, 1/C). Of two kinds of clusters the weight of an
    observation is the product of both (the pigeonhole bootstrap, Owen 2007, Ann. Appl. Stat. 1): annotators and prompts
    are drawn by themselves, because to draw pairs of them, or one kind alone, would leave out what the other has in
    common. It is never too narrow, but where `rate` has V1 + V2 - V12 for its variance, this has V1 + V2 + V12, the
    noise of single votes three times: up to sqrt 3 too wide where annotators and prompts hardly differ.
    Without clusters every observation is its own.

    Args:
        ties: as in `ratings.rate`; of rankings they are in the ranks.
    Raises:
        ValueError: what `rate` refuses; or no draw could be rated.
    """
    model: Model = ratings.model_of(data, ties=ties) if isinstance(data, Comparisons) else rankings.model_of(data)
    best = maximum(model, model.weight)[0]
    clusters = held(data.clusters)
    observations = int(model.row.max()) + 1
    found, unrated = [], 0
    for _ in range(draws):
        drawn = _weights(clusters, observations, generator)[model.row]
        weight = np.bincount(model.cell, drawn, len(model.weight)).astype(np.float64)
        try:
            if not connected(model, weight):
                raise ValueError("as `rate` would say")
            found.append(maximum(model, weight, best)[0][: model.size])
        except ValueError:
            unrated += 1
    if not found:
        raise ValueError(
            f"none of {draws} draws of whole clusters could be rated: in each somebody always won or always lost; "
            "collect more comparisons, or leave the draws out"
        )
    number = min((int(cluster.max()) + 1 for cluster in clusters.values()), default=observations)
    return Redrawn(data.names, best[: model.size], np.array(found), unrated, number)


def _weights(clusters: Mapping[str, Integers], observations: int, generator: np.random.Generator) -> Floats:
    """float[N]: how often each observation is drawn."""
    weights = np.ones(observations)
    for cluster in clusters.values() or (np.arange(observations),):
        number = int(cluster.max()) + 1
        weights = weights * np.bincount(generator.integers(number, size=number), minlength=number)[cluster]
    return weights
