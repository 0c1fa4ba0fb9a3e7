"""Intervals against scipy, statistics written out here, and coverage in simulation."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats as scipy_stats

from kilter.stats import (
    Interval,
    bootstrap,
    cluster_bootstrap,
    mean_interval,
    pair_accuracy,
    paired_difference,
    proportion,
    win_rate,
    wins,
)

VALUES = [0.3, -1.2, 4.4, 2.0, 2.0, 0.0, 7.5]


@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95, 0.999])
def test_mean_interval_is_scipys(confidence: float) -> None:
    got = mean_interval(VALUES, confidence=confidence)
    n, mean, error = len(VALUES), np.mean(VALUES), scipy_stats.sem(VALUES)
    assert np.allclose(got[1:3], scipy_stats.t.interval(confidence, n - 1, mean, error), rtol=1e-12)
    normal = mean_interval(VALUES, confidence=confidence, method="normal")
    assert np.allclose(normal[1:3], scipy_stats.norm.interval(confidence, mean, error), rtol=1e-12)
    assert got.mean == normal.mean == pytest.approx(15 / 7) and got.n == 7


def test_mean_interval_by_hand() -> None:
    got = mean_interval([1, 2, 3])
    half = 4.302652729911275 / math.sqrt(3)  # t quantile of a printed table, 2 degrees of freedom
    assert got == pytest.approx((2.0, 2 - half, 2 + half, 3))


def test_one_value_has_no_interval() -> None:
    got = mean_interval([2.5])
    assert got == (2.5, -math.inf, math.inf, 1)
    assert got.to_dict() == {"mean": 2.5, "low": None, "high": None, "n": 1}
    assert Interval(0.5, 0.25, 0.75, 4).to_dict() == {"mean": 0.5, "low": 0.25, "high": 0.75, "n": 4}


@pytest.mark.parametrize("values", [[], [1.0, math.nan], [math.inf], [[1.0]]])
def test_values_that_are_none_are_refused(values: list[float]) -> None:
    with pytest.raises(ValueError, match=r"at least one value|not finite"):
        mean_interval(values)


@pytest.mark.parametrize(("successes", "n"), [(0, 10), (10, 10), (1, 3), (37, 100), (1, 1), (2000, 2001)])
def test_wilson_is_scipys(successes: int, n: int) -> None:
    got = proportion(successes, n)
    expected = scipy_stats.binomtest(successes, n).proportion_ci(0.95, method="wilson")
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-12, abs=1e-15)
    assert got.low <= got.mean == successes / n <= got.high


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (-1, 5), (6, 5)])
def test_what_is_no_proportion(successes: int, n: int) -> None:
    with pytest.raises(ValueError, match="no proportion"):
        proportion(successes, n)


def test_excludes() -> None:
    assert Interval(0.6, 0.5, 0.7, 9).excludes(0.49) and not Interval(0.6, 0.5, 0.7, 9).excludes(0.5)


def test_paired_difference_is_scipys_paired_t() -> None:
    other = [1.0, -2.0, 4.0, 1.0, 2.5, -1.0, 5.0]
    got = paired_difference(VALUES, other)
    expected = scipy_stats.ttest_rel(VALUES, other).confidence_interval(0.95)
    assert (got.low, got.high) == pytest.approx((expected.low, expected.high), rel=1e-12)
    assert got.mean == pytest.approx(np.mean(VALUES) - np.mean(other))
    with pytest.raises(ValueError, match="not pairs"):
        paired_difference([1], [1, 2])


def test_pairing_narrows_what_varies_with_the_prompt() -> None:
    rng = np.random.default_rng(0)
    prompts, noise = rng.normal(size=200) * 10, rng.normal(size=200)
    got = paired_difference(prompts + 1 + noise, prompts)
    assert got.low > 0.5 and got.high < 1.5


def test_bootstrap_agrees_with_theory_and_repeats() -> None:
    values = np.random.default_rng(1).normal(3, 2, size=400)
    got = bootstrap(values, lambda drawn: float(drawn.mean()), np.random.default_rng(2))
    assert np.allclose(got[1:3], mean_interval(values)[1:3], atol=0.03)
    assert got == bootstrap(values, lambda drawn: float(drawn.mean()), np.random.default_rng(2))
    median = bootstrap(values, lambda drawn: float(np.median(drawn)), np.random.default_rng(2))
    assert median.low < 3 < median.high and median.mean == np.median(values)


def test_cluster_bootstrap_counts_clusters_not_values() -> None:
    rng = np.random.default_rng(3)
    centres = rng.normal(size=40)
    values, clusters = np.repeat(centres, 25), np.repeat(np.arange(40), 25)
    clustered = cluster_bootstrap(values, list(clusters), np.random.default_rng(4), resamples=2000)
    assert np.allclose(clustered[1:3], mean_interval(centres)[1:3], atol=0.05)
    naive = mean_interval(values)
    assert clustered.high - clustered.low > 4 * (naive.high - naive.low)
    assert clustered.mean == pytest.approx(values.mean()) and clustered.n == 1000


def test_clusters_of_one_are_the_plain_bootstrap() -> None:
    values = np.random.default_rng(5).normal(size=300)
    got = cluster_bootstrap(values, list(range(300)), np.random.default_rng(6), resamples=4000)
    assert np.allclose(got[1:3], mean_interval(values)[1:3], atol=0.02)


def test_uneven_clusters_weigh_as_in_the_plain_mean() -> None:
    got = cluster_bootstrap([0.0] * 9 + [1.0], ["a"] * 9 + ["b"], np.random.default_rng(0))
    assert got.mean == 0.1 and got.low == 0 and got.high == 1
    middle = cluster_bootstrap([0.0] * 9 + [1.0], ["a"] * 9 + ["b"], np.random.default_rng(0), confidence=0.4)
    assert (middle.low, middle.high) == pytest.approx((0.1, 0.1))  # half of the draws hold both clusters
    assert cluster_bootstrap([1.0, 2.0], ["a", "a"], np.random.default_rng(0)).high == math.inf
    with pytest.raises(ValueError, match="belong together"):
        cluster_bootstrap([1.0, 2.0], ["a"], np.random.default_rng(0))


def test_coverage() -> None:
    rng = np.random.default_rng(7)
    hits = [mean_interval(rng.normal(size=5)) for _ in range(2000)]
    covered = sum(got.low <= 0 <= got.high for got in hits) / len(hits)
    assert 0.93 < covered < 0.97  # 0.95, four standard errors either way
    shares = [proportion(int(rng.binomial(20, 0.1)), 20) for _ in range(2000)]
    assert 0.93 < sum(got.low <= 0.1 <= got.high for got in shares) / len(shares) < 0.99


def test_win_rate_counts_ties_half() -> None:
    assert wins([1, 2, 3], [2, 2, 1]) == [0, 0.5, 1]
    got = win_rate([1, 2, 3, 4], [2, 2, 1, 1])
    assert got.mean == 0.625 and got.n == 4
    assert got == proportion(2.5, 4)
    with pytest.raises(ValueError, match="not pairs"):
        win_rate([1], [1, 2])


def test_pair_accuracy_leaves_ties_out() -> None:
    got = pair_accuracy([1.0, 0.0, 2.0, 5.0], [0.0, 1.0, 2.0, 9.0], ties=[False, False, False, True])
    assert got is not None and got.mean == 0.5 and got.n == 3
    assert pair_accuracy([1.0], [0.0], ties=[True]) is None
    assert pair_accuracy([1.0, 3.0], [0.0, 1.0]) == proportion(2, 2)
