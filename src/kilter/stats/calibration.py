"""How far a reward's gaps can be taken for odds: accuracy, Brier's score, calibration error, and the temperature.

A pair of responses to one prompt has a gap g = r(first) - r(second), an outcome y (1: the first is better, 0: the
second, 1/2: neither), and belongs to a cluster: what is said of one prompt hangs together. Under Bradley-Terry the
chance that the first is better is sigma(g). Nothing here depends on which of the two is the first.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.special import expit, stdtrit

from kilter.stats.intervals import Floats, Integers, Interval, clustered_mean, clustered_share, numbered

BINS = 10
DRAWS = 200
"""Of outcomes under perfect calibration, for what the calibration error would be then."""
STEPS, TOLERANCE = 100, 1e-12


@dataclass(frozen=True, slots=True)
class Point:
    """One bin of the reliability diagram."""

    confidence: float
    """Mean of sigma(|g|): how sure the reward is of the response that it prefers, 1/2 to 1."""
    right: Interval
    """How often that one is the better."""

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"confidence": self.confidence, "right": self.right.to_dict()}


@dataclass(frozen=True, slots=True)
class Calibration:
    """Of all pairs."""

    accuracy: Interval
    brier: Interval
    ece: float
    ece_expected: float
    """What `ece` would be on average if every sigma(g) were true: with few pairs in a bin it is far from 0."""
    points: tuple[Point, ...]
    temperature: Interval | None
    """T at which sigma(g / T) fits the outcomes best; above 1 the reward is over-confident. None: see `temperature`."""
    pairs: int
    clusters: int

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "accuracy": self.accuracy.to_dict(),
            "brier": self.brier.to_dict(),
            "ece": self.ece,
            "ece_expected": self.ece_expected,
            "reliability": [point.to_dict() for point in self.points],
            "temperature": None if self.temperature is None else self.temperature.to_dict(),
            "pairs": self.pairs,
            "clusters": self.clusters,
        }


def calibration(
    gaps: Sequence[float] | Floats,
    outcomes: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    *,
    bins: int = BINS,
    seed: int = 0,
) -> Calibration:
    """Everything here of the same pairs.

    Args:
        gaps: float[N]. outcomes: float[N] of 1, 1/2, 0. clusters: N names, for example of prompts.
        bins: of equal numbers of pairs.
        seed: of the outcomes drawn under perfect calibration.
    Raises:
        ValueError: no pairs, not as many of each, a gap that is not finite, another outcome.
    """
    g, y, cluster = _checked(gaps, outcomes, clusters)
    confidence, right = _preferred(g, y)
    drawn = np.random.default_rng(seed).random((DRAWS, len(g))) < confidence
    # A tie is neither, however sure the reward is: it stays what it is in the draws.
    expected = [_ece(confidence, np.where(y == 0.5, 0.5, one), bins) for one in drawn.astype(np.float64)]
    return Calibration(
        clustered_share(right, cluster),
        clustered_mean((expit(g) - y) ** 2, cluster),
        _ece(confidence, right, bins),
        float(np.mean(expected)),
        tuple(
            Point(float(confidence[part].mean()), clustered_share(right[part], cluster[part]))
            for part in _parts(confidence, bins)
        ),
        temperature(g, y, clusters),
        len(g),
        int(cluster.max()) + 1,
    )


def calibration_error(gaps: Sequence[float] | Floats, outcomes: Sequence[float] | Floats, *, bins: int = BINS) -> float:
    """Expected calibration error over bins of equal numbers of pairs.

        ECE = sum_b n_b / n |mean_b right - mean_b sigma(|g|)|

    Naeini et al. 2015 (AAAI), with equal mass in place of equal width: Nguyen and O'Connor 2015, arXiv 1508.05154. It
    is of the response that the reward prefers; where it prefers none (g = 0), right is 1/2. Four pairs of gap log 3
    (sigma 3/4), of which two are right: 0.25.
    """
    g, y, _ = _checked(gaps, outcomes, range(len(gaps)))
    return _ece(*_preferred(g, y), bins)


def temperature(
    gaps: Sequence[float] | Floats,
    outcomes: Sequence[float] | Floats,
    clusters: Sequence[Hashable],
    *,
    confidence: float = 0.95,
) -> Interval | None:
    """The T that makes sigma(g / T) likeliest, by Newton's method on b = 1 / T.

        l(b) = sum y log sigma(b g) + (1 - y) log sigma(-b g)
        var b = C / (C - 1) sum_c (sum_{i in c} s_i)^2 / H^2,   s = g (y - sigma(b g)),  H = sum g^2 sigma (1 - sigma)

    Guo et al. 2017, arXiv 1706.04599, section 4.2, of two classes; the sandwich by clusters of Liang and Zeger 1986,
    Student's t with C - 1 degrees of freedom. The interval of b is turned over: where it reaches 0, T has no upper end.

    Returns:
        None where there is none: no verdict goes against the gaps (then no T is too small), the gaps say nothing, or
        they say the opposite (b <= 0).
    """
    g, y, cluster = _checked(gaps, outcomes, clusters)
    against = np.where(g > 0, 1 - y, y)[g != 0]
    if not against.any() or not (1 - against).any():
        return None
    unit = float(np.sqrt((g * g).mean()))
    x = g / unit
    b = 0.0
    for _ in range(STEPS):
        chance = expit(b * x)
        # From 0 the curvature only falls on the way to the maximum: no step is too far, and none has to be halved.
        step = float(x @ (y - chance)) / float(x * x @ (chance * (1 - chance)))
        b += step
        if abs(step) < TOLERANCE * max(1.0, abs(b)):
            break
    if b <= 0:
        return None
    chance = expit(b * x)
    number = int(cluster.max()) + 1
    mean = unit / b
    if number < 2:
        return Interval(mean, 0.0, np.inf, len(g))
    sums = np.bincount(cluster, x * (y - chance))
    error = np.sqrt(number / (number - 1) * float(sums @ sums)) / float(x * x @ (chance * (1 - chance)))
    half = float(stdtrit(number - 1, (1 + confidence) / 2) * error)
    return Interval(mean, unit / (b + half), unit / (b - half) if b > half else np.inf, len(g))


def _checked(
    gaps: Sequence[float] | Floats, outcomes: Sequence[float] | Floats, clusters: Sequence[Hashable]
) -> tuple[Floats, Floats, Integers]:
    g, y = np.asarray(gaps, dtype=np.float64), np.asarray(outcomes, dtype=np.float64)
    if g.ndim != 1 or not len(g) or g.shape != y.shape or len(clusters) != len(g):
        raise ValueError(
            f"{len(gaps)} gaps, {len(outcomes)} outcomes and {len(clusters)} clusters are no pairs; give one of each"
        )
    if not np.isfinite(g).all():
        raise ValueError(f"gap {int(np.argmin(np.isfinite(g)))} is not finite; leave unscored pairs out")
    if not np.isin(y, (0.0, 0.5, 1.0)).all():
        raise ValueError(f"outcome {y[~np.isin(y, (0.0, 0.5, 1.0))][0]} is none; it is 1, 1/2 or 0")
    return g, y, numbered(clusters)[0]


def _preferred(g: Floats, y: Floats) -> tuple[Floats, Floats]:
    """How sure the reward is of the response that it prefers, and whether that is the better."""
    right = np.where(g == 0, 0.5, np.where(g > 0, y, 1 - y))
    return expit(np.abs(g)).astype(np.float64, copy=False), right.astype(np.float64, copy=False)


def _parts(confidence: Floats, bins: int) -> list[Integers]:
    """Places of the pairs in each bin, the least sure first."""
    order = np.argsort(confidence, kind="stable")
    return [part for part in np.array_split(order, min(bins, len(order))) if len(part)]


def _ece(confidence: Floats, right: Floats, bins: int) -> float:
    gaps = [abs(float((right[part] - confidence[part]).sum())) for part in _parts(confidence, bins)]
    return sum(gaps) / len(confidence)
