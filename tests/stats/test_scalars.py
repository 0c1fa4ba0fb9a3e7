"""Scalars for responses: by arithmetic, beside a plain optimiser, and by simulation with known truth."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import numpy as np
import pytest
from numpy.polynomial.hermite_e import hermegauss
from scipy.integrate import quad
from scipy.optimize import fsolve, minimize
from scipy.special import expit
from scipy.stats import norm

from kilter.stats.scalars import scalars


def tables(seed: int, *, prompts: int = 1000, k: int = 4, votes: int = 3, sigma: float = 1.0):
    """Every two responses of each prompt compared `votes` times; the truth."""
    rng = np.random.default_rng(seed)
    truth = sigma * rng.normal(size=(prompts, k))
    chance = 1 / (1 + np.exp(truth[:, None, :] - truth[:, :, None]))
    won = np.triu(rng.binomial(votes, chance), 1).astype(float)
    lost = np.triu(votes - won.copy(), 1)
    return list(won + lost.transpose(0, 2, 1)), truth


def test_two_responses_by_hand() -> None:
    """One win of a, sigma 1: theta = (t, -t), its gap g ~ N(2t, 2c) with t = 1 - E sigmoid(g), by an integral, and
    1 / c = 1 + 2 E sigmoid'(g) in the direction (1, -1) / sqrt 2; the error of t is sqrt(c / 2)."""
    found = scalars([np.array([[0.0, 1.0], [0.0, 0.0]])], sigma=1.0)

    def expected(what: Callable[[float], float], t: float, c: float) -> float:
        return quad(lambda g: what(g) * norm.pdf(g, 2 * t, (2 * c) ** 0.5), -12, 12)[0]

    def wrong(at: np.ndarray) -> list[float]:
        t, c = at
        steep = expected(lambda g: expit(g) * expit(-g), t, c)
        return [t - 1 + expected(expit, t, c), 1 / c - 1 - 2 * steep]

    t, c = fsolve(wrong, [0.3, 0.7])
    assert found.values[0] == pytest.approx([t, -t], abs=1e-5)
    assert found.errors[0] == pytest.approx([np.sqrt(c / 2)] * 2, abs=1e-4) and found.sigma == 1.0


def test_it_is_the_nearest_normal_distribution() -> None:
    """Of two sizes at once, with one who always won, weights and ties: the bound, maximised by a plain optimiser."""
    held = [np.array([[0, 2, 1], [0, 0, 1.5], [0, 0.5, 0]]), np.array([[0, 3.0], [0.5, 0]])]
    found = scalars(held, sigma=0.8)
    nodes, shares = hermegauss(40)
    for table, values, errors in zip(held, found.values, found.errors, strict=True):
        size = len(table)
        lower = np.tril_indices(size)

        def covariance(at: np.ndarray, size: int = size, lower: tuple[np.ndarray, ...] = lower) -> np.ndarray:
            factor = np.zeros((size, size))
            factor[lower] = at[size:]
            return factor @ factor.T

        def loss(at: np.ndarray, table: np.ndarray = table, size: int = size) -> float:
            mean, spread = at[:size], covariance(at)
            total = (np.trace(spread) + mean @ mean) / 0.8**2 / 2 - np.linalg.slogdet(spread)[1] / 2
            for i, j in itertools.permutations(range(size), 2):
                width = np.sqrt(spread[i, i] + spread[j, j] - 2 * spread[i, j])
                gap = mean[i] - mean[j] + width * nodes
                total += table[i, j] * np.log1p(np.exp(-gap)) @ shares / shares.sum()
            return float(total)

        start = np.concatenate([np.zeros(size), np.eye(size)[lower]])
        best = minimize(loss, start, method="BFGS", options={"gtol": 1e-7}).x
        centre = np.eye(size) - 1 / size
        assert values == pytest.approx(best[:size], abs=1e-4) and abs(values.sum()) < 1e-6
        assert errors == pytest.approx(np.sqrt(np.diag(centre @ covariance(best) @ centre)), abs=1e-4)


@pytest.mark.parametrize(("votes", "sigma"), [(1, 1.0), (3, 0.5), (10, 2.0)])
def test_errors_are_calibrated_and_sigma_is_found(votes: int, sigma: float) -> None:
    """z of the true values less their mean has variance 1 where sigma is the truth, nearly so where it is fitted."""
    held, truth = tables(0, prompts=2000, votes=votes, sigma=sigma)
    centred = truth - truth.mean(1, keepdims=True)
    known, fitted = scalars(held, sigma=sigma), scalars(held)
    for found, least, most in ((known, 0.94, 1.1), (fitted, 0.85, 1.15)):
        z = (centred - np.array(found.values)) / np.array(found.errors)
        assert abs(z.mean()) < 0.03 and least < z.var() < most, z.var()
    assert fitted.sigma == pytest.approx(sigma, rel=0.15)


def test_what_cannot_be_fitted_is_refused() -> None:
    one = np.array([[0.0, 1.0], [0.0, 0.0]])
    with pytest.raises(ValueError, match="no verdict contradicts the others"):
        scalars([one, one.T])
    order = np.triu(np.ones((4, 4)), 1)
    with pytest.raises(ValueError, match="no verdict contradicts the others"):
        scalars([order] * 50)
    with pytest.raises(ValueError, match="no more agreement than coins"):
        scalars([np.ones((3, 3)) - np.eye(3)] * 50)
    with pytest.raises(ValueError, match="none was given"):
        scalars([])
    with pytest.raises(ValueError, match="prompt 1: a table of wins"):
        scalars([one, np.ones((2, 3))])
    with pytest.raises(ValueError, match="sigma is 0"):
        scalars([one], sigma=0.0)
