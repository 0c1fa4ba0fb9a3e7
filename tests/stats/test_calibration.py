"""Calibration of gaps: arithmetic, scikit-learn's scores, and simulations whose truth is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import brier_score_loss

from kilter.stats import clustered_mean, clustered_share, mean_interval, proportion
from kilter.stats.calibration import calibration, calibration_error, temperature


def draw(
    generator: np.random.Generator, clusters: int, size: int, *, true: float, shared: float = 0.0
) -> tuple[np.ndarray, np.ndarray, list[int]]:
    """Gaps, verdicts that sigma(gap / true) gives, and clusters whose verdicts hang together."""
    gaps = generator.normal(0, 2, (clusters, 1)) * shared + generator.normal(0, 2, (clusters, size)) * (1 - shared)
    same = generator.random((clusters, 1)) < shared
    draws = np.where(same, generator.random((clusters, 1)), generator.random((clusters, size)))
    outcomes = (draws < expit(gaps / true)).astype(float)
    return gaps.ravel(), outcomes.ravel(), [at for at in range(clusters) for _ in range(size)]


def test_by_hand() -> None:
    """Gaps of log 3 are sure by 3/4. Turning a pair round changes nothing."""
    log3 = math.log(3)
    found = calibration([log3, log3, -log3, log3], [1, 1, 1, 0], ["a", "b", "c", "d"], bins=1)
    assert found.accuracy.mean == 0.5
    assert found.ece == pytest.approx(0.25)
    assert found.brier.mean == pytest.approx((2 / 16 + 2 * 9 / 16) / 4)
    assert found.points[0].confidence == pytest.approx(0.75) and found.points[0].right.mean == 0.5
    assert calibration_error([log3, log3, -log3, log3], [1, 1, 1, 0], bins=1) == pytest.approx(0.25)
    assert calibration([0.0, 0.0], [1, 1], "ab").accuracy.mean == 0.5


def test_bins_hold_equal_numbers() -> None:
    """Two bins: those of gaps log 3 (1/2 right: off by 1/4), and of log 9 (all right: off by 1/10)."""
    gaps, outcomes = [math.log(3), math.log(9)] * 4, [1, 1, 0, 1, 1, 1, 0, 1]
    assert calibration_error(gaps, outcomes, bins=2) == pytest.approx((0.25 + 0.1) / 2)
    found = calibration(gaps, outcomes, range(8), bins=2)
    assert [point.right.n for point in found.points] == [4, 4]


def test_nothing_depends_on_which_is_first() -> None:
    gaps, outcomes, clusters = draw(np.random.default_rng(0), 100, 2, true=1.5)
    turned = np.random.default_rng(1).random(len(gaps)) < 0.5
    one = calibration(gaps, outcomes, clusters)
    other = calibration(np.where(turned, -gaps, gaps), np.where(turned, 1 - outcomes, outcomes), clusters)
    assert one.brier.mean == pytest.approx(other.brier.mean) and one.ece == pytest.approx(other.ece)
    assert one.temperature is not None and other.temperature is not None
    assert one.temperature == pytest.approx(other.temperature)


def test_scikit_learn_says_the_same() -> None:
    gaps, outcomes, clusters = draw(np.random.default_rng(2), 400, 1, true=3.0)
    found = calibration(gaps, outcomes, clusters)
    assert found.brier.mean == pytest.approx(brier_score_loss(outcomes, expit(gaps)))
    fitted = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-12, max_iter=1000).fit(gaps[:, None], outcomes)
    assert found.temperature is not None
    assert found.temperature.mean == pytest.approx(1 / fitted.coef_[0, 0], rel=1e-4)


def test_ties_are_half_of_both() -> None:
    """A tie has the likelihood of half a win and half a loss: two copies of each pair, tied, are one of each."""
    gaps, outcomes, clusters = draw(np.random.default_rng(3), 200, 1, true=1.0)
    extra = np.array([0.3, -1.0, 2.0])
    tied = temperature([*gaps, *extra, *extra], [*outcomes, *[0.5] * 6], [*clusters, *range(200, 206)])
    halves = temperature([*gaps, *extra, *extra], [*outcomes, *[1.0] * 3, *[0.0] * 3], [*clusters, *range(200, 206)])
    assert tied is not None and halves is not None and tied.mean == pytest.approx(halves.mean)


@pytest.mark.parametrize("true", [0.5, 2.0])
def test_the_temperature_is_in_its_interval_as_often_as_said(true: float) -> None:
    """Of 300 sets of 60 prompts with 4 pairs whose verdicts hang together; by single pairs it would be too narrow."""
    generator = np.random.default_rng(4)
    inside = alone = 0
    for _ in range(300):
        gaps, outcomes, clusters = draw(generator, 60, 4, true=true, shared=0.7)
        held, free = temperature(gaps, outcomes, clusters), temperature(gaps, outcomes, range(len(gaps)))
        assert held is not None and free is not None
        inside += not held.excludes(true)
        alone += not free.excludes(true)
    assert 0.91 <= inside / 300 <= 0.985
    assert alone / 300 < 0.89


def test_no_temperature_where_there_is_none() -> None:
    assert temperature([1.0, 2.0, -1.0], [1, 1, 0], "abc") is None  # all right: no T is too small
    assert temperature([1.0, 2.0, -1.0], [0, 0, 1], "abc") is None  # all wrong
    assert temperature([0.0, 0.0], [1, 0], "ab") is None
    assert temperature([1.0, 1.0, 1.0], [0, 0, 1], "abc") is None  # the opposite
    one = temperature([1.0, 1.0, 1.0], [1, 1, 0], "aaa")
    assert one is not None and one.mean == pytest.approx(1 / math.log(2)) and one.high == math.inf


def test_large_gaps_are_fitted() -> None:
    """From 0.001 to 1000."""
    generator = np.random.default_rng(5)
    gaps = generator.choice([-1, 1], 3000) * 10 ** generator.uniform(-3, 3, 3000)
    outcomes = (generator.random(3000) < expit(gaps / 50)).astype(float)
    found = temperature(gaps, outcomes, range(3000))
    assert found is not None and not found.excludes(50) and found.high / found.low < 1.5


def test_the_expected_error_is_that_of_a_calibrated_reward() -> None:
    """Of 40 calibrated rewards with 200 pairs each the error is on average what is told beside it."""
    generator = np.random.default_rng(6)
    found = [calibration(*draw(generator, 200, 1, true=1.0), seed=at) for at in range(40)]
    errors = mean_interval([one.ece for one in found])
    expected = mean_interval([one.ece_expected for one in found])
    assert not errors.excludes(expected.mean) and expected.mean > 0.04
    off = calibration(*draw(generator, 200, 1, true=4.0))
    assert off.ece > 2 * off.ece_expected and off.temperature is not None and off.temperature.low > 1.5


def test_clustered_intervals() -> None:
    """One value a cluster: Student's, nearly Wilson's. Copies of values add nothing."""
    values = [1.0, 2.0, 4.0, 8.0]
    assert clustered_mean(values, "abcd") == pytest.approx(mean_interval(values))
    copied = clustered_mean([one for one in values for _ in range(5)], [name for name in "abcd" for _ in range(5)])
    assert copied[:3] == pytest.approx(mean_interval(values)[:3]) and copied.n == 20
    flags = [1.0] * 150 + [0.0] * 50
    assert clustered_share(flags, range(200))[:3] == pytest.approx(proportion(150, 200)[:3], abs=2e-3)
    many = clustered_share([one for one in flags for _ in range(9)], [at for at in range(200) for _ in range(9)])
    assert many[:3] == pytest.approx(clustered_share(flags, range(200))[:3], abs=1e-3)
    alike = clustered_share([1.0] * 40, [at // 4 for at in range(40)])
    assert alike.high == 1.0 and 0.6 < alike.low < 0.75  # as 10 of 10, and Student's for Wilson's normal
    assert clustered_share([1.0, 0.0], "aa")[1:3] == (0.0, 1.0)
    with pytest.raises(ValueError, match="do not belong"):
        clustered_mean([1.0], "ab")


def test_clustered_shares_hold_what_they_say() -> None:
    """Of 400 sets of 50 clusters of 6 verdicts, each cluster with a chance of its own, mean 0.85."""
    generator = np.random.default_rng(7)
    inside = 0
    for _ in range(400):
        chance = generator.beta(1.7, 0.3, (50, 1))
        values = (generator.random((50, 6)) < chance).astype(float).ravel()
        inside += not clustered_share(values, [at // 6 for at in range(300)]).excludes(0.85)
    assert 0.92 <= inside / 400 <= 0.98


@pytest.mark.parametrize(
    ("gaps", "outcomes", "clusters", "match"),
    [
        ([], [], [], "no pairs"),
        ([1.0], [1.0, 0.0], [1], "no pairs"),
        ([np.nan], [1.0], [1], "gap 0 is not finite"),
        ([1.0], [0.7], [1], "outcome 0.7"),
    ],
)
def test_refused(gaps: list[float], outcomes: list[float], clusters: list[int], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        calibration(gaps, outcomes, clusters)
