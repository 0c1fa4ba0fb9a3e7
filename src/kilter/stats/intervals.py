"""Intervals: every figure of Kilter stands with one, and with the number of values behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

Floats = NDArray[np.float64]
Integers = NDArray[np.int64]


class Interval(NamedTuple):
    """A figure, where it surely lies, and how many values it was made from.

    `low` and `high` are infinite where nothing is known of the spread: one value has no interval.
    """

    mean: float
    low: float
    high: float
    n: int

    def to_dict(self) -> dict[str, float | int | None]:
        """For JSON: a bound that is not known is null."""
        bounds = {
            name: value if math.isfinite(value) else None for name, value in (("low", self.low), ("high", self.high))
        }
        return {"mean": self.mean, **bounds, "n": self.n}

    def excludes(self, value: float) -> bool:
        """Whether `value` lies outside."""
        return not self.low <= value <= self.high


def mean_interval(
    values: Sequence[float] | Floats, *, confidence: float = 0.95, method: Literal["t", "normal"] = "t"
) -> Interval:
    """The mean with its confidence interval, for independent values.

        mean +- q * s / sqrt(n),   s^2 = sum (x - mean)^2 / (n - 1)

    q is the quantile of Student's t with n - 1 degrees of freedom ("t"; Student 1908), or of the normal distribution.

    Args:
        values: n finite numbers, in any unit.
        confidence: of the two-sided interval, in (0, 1).
    Returns:
        The interval; infinite for n = 1. Of 1, 2, 3: mean 2, from -0.484 to 4.484.
    Raises:
        ValueError: no value, or one that is not finite.
    """
    array = _finite(values)
    mean, n = float(array.mean()), len(array)
    if n == 1:
        return Interval(mean, -math.inf, math.inf, 1)
    half = _quantile(confidence, n - 1 if method == "t" else None) * float(array.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half, n)


def proportion(successes: float, n: int, *, confidence: float = 0.95) -> Interval:
    """A share with Wilson's score interval, which stays in [0, 1] and holds for small n and shares near 0 and 1.

        (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n)

    Wilson 1927, JASA 22. A tie may count as half a success: that makes the interval wider than it has to be, never
    narrower, because values of 0, 1/2 and 1 spread less than 0 and 1 with the same mean.

    Args:
        successes: in [0, n].
    Returns:
        The interval around the observed share. 0 of 10: from 0 to 0.2775.
    """
    if n <= 0 or not 0 <= successes <= n:
        raise ValueError(f"{successes} of {n} is no proportion")
    return _wilson(successes / n, float(n), _quantile(confidence, None))._replace(n=n)


def _wilson(share: float, n: float, z: float) -> Interval:
    centre = share + z * z / (2 * n)
    half = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    # The bounds are 0 and 1 exactly at the ends; rounding must not put the share outside of its own interval.
    low, high = max(0.0, min(share, (centre - half) / scale)), min(1.0, max(share, (centre + half) / scale))
    return Interval(share, low, high, round(n))


def paired_difference(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """The mean of `first[i] - second[i]` with its t interval: two systems on the same prompts.

    Raises:
        ValueError: the two have not the same length.
    """
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} values are not pairs")
    return mean_interval(np.subtract(_finite(first), _finite(second)), confidence=confidence)


def bootstrap(
    values: Sequence[float] | Floats,
    statistic: Callable[[Floats], float],
    generator: np.random.Generator,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """Any statistic with its percentile bootstrap interval (Efron 1979), for independent values.

    Args:
        statistic: float[n] -> number.
        generator: source of the resamples; the same one gives the same interval.
    """
    array = _finite(values)
    draws = [statistic(array[generator.integers(len(array), size=len(array))]) for _ in range(resamples)]
    return Interval(float(statistic(array)), *percentiles(draws, confidence), len(array))


def cluster_bootstrap(
    values: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    generator: np.random.Generator,
    *,
    resamples: int = 1000,
    confidence: float = 0.95,
) -> Interval:
    """The mean with its percentile interval when values come in clusters: several answers to one prompt.

    Whole clusters are drawn with replacement; each draw's mean is its sum divided by its count, so clusters of
    different sizes weigh as in the plain mean. Davison and Hinkley 1997, section 3.8. One cluster: infinite.

    Args:
        clusters: the cluster of each value, for example its prompt's id.
    """
    array = _finite(values)
    if len(clusters) != len(array):
        raise ValueError(f"{len(array)} values and {len(clusters)} cluster names do not belong together")
    index, names = numbered(clusters)
    sums = np.bincount(index, weights=array)
    counts = np.bincount(index).astype(np.float64)
    mean, size = float(array.mean()), len(names)
    if size == 1:
        return Interval(mean, -math.inf, math.inf, len(array))
    drawn = generator.integers(size, size=(resamples, size))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    return Interval(mean, *percentiles(means, confidence), len(array))


def clustered_mean(
    values: Sequence[float] | Floats, clusters: Sequence[Hashable] | Integers, *, confidence: float = 0.95
) -> Interval:
    """The mean with an interval that holds together what is of one cluster.

        mean +- q s,   s^2 = C / (C - 1) sum_c (sum_{i in c} (x_i - mean))^2 / n^2

    The mean is a ratio of sums over clusters, and this its linearised variance (Cochran 1977, section 6.4; Liang and
    Zeger 1986); q is Student's with C - 1 degrees of freedom. With a value in each cluster it is `mean_interval`. One
    cluster: infinite.

    Args:
        values: n finite numbers.
        clusters: of each, for example the id of its prompt.
    """
    array, index = _finite(values), _indexed(values, clusters)
    mean, number = float(array.mean()), int(index.max()) + 1
    if number == 1:
        return Interval(mean, -math.inf, math.inf, len(array))
    half = _quantile(confidence, number - 1) * math.sqrt(_clustered_variance(array, index))
    return Interval(mean, mean - half, mean + half, len(array))


def clustered_share(
    values: Sequence[float] | Floats, clusters: Sequence[Hashable] | Integers, *, confidence: float = 0.95
) -> Interval:
    """A share of values of 1, 1/2 and 0 in clusters: Wilson's interval of as many independent values as they are worth.

        n* = p (1 - p) / s^2,   s^2 as in `clustered_mean`

    Never more than n, and the number of clusters where all values are alike and s says nothing. With a value in each
    cluster it is nearly `proportion`. Korn and Graubard 1998, Survey Methodology 24, use n* with another interval.
    """
    array, index = _finite(values), _indexed(values, clusters)
    share, number = float(array.mean()), int(index.max()) + 1
    if number == 1:
        return Interval(share, 0.0, 1.0, len(array))
    variance = _clustered_variance(array, index)
    worth = min(float(len(array)), share * (1 - share) / variance) if variance > 0 else float(number)
    z = _quantile(confidence, number - 1)
    return _wilson(share, worth, z)._replace(n=len(array))


def _clustered_variance(array: Floats, index: Integers) -> float:
    sums = np.bincount(index, array - array.mean())
    return len(sums) / (len(sums) - 1) * float(sums @ sums) / len(array) ** 2


def _indexed(values: Sequence[float] | Floats, clusters: Sequence[Hashable] | Integers) -> Integers:
    if len(clusters) != len(values):
        raise ValueError(f"{len(values)} values and {len(clusters)} cluster names do not belong together")
    return numbered(clusters.tolist() if isinstance(clusters, np.ndarray) else clusters)[0]


def percentiles(draws: Sequence[float] | Floats, confidence: float) -> tuple[float, float]:
    """The bounds between which this share of the draws lies, as much of the rest below as above."""
    low, high = np.quantile(draws, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)


def numbered(column: Iterable[Hashable]) -> tuple[Integers, tuple[Hashable, ...]]:
    """Each value's place among the different ones, and those, in the order in which they come."""
    places: dict[Hashable, int] = {}
    found = np.array([places.setdefault(value, len(places)) for value in column], dtype=np.int64)
    return found, tuple(places)


def _finite(values: Sequence[float] | Floats) -> Floats:
    array: Floats = np.asarray(values, dtype=np.float64)
    if array.ndim != 1 or not len(array):
        raise ValueError(f"an interval needs a list of at least one value, not shape {array.shape}")
    if not np.isfinite(array).all():
        raise ValueError(f"value {int(np.argmin(np.isfinite(array)))} is not finite; leave unscored samples out")
    return array


def _quantile(confidence: float, freedom: int | None) -> float:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie in (0, 1)")
    level = (1 + confidence) / 2
    return float(ndtri(level) if freedom is None else stdtrit(freedom, level))
