"""Ratings from rankings beside choix, beside ratings from comparisons, and their intervals beside simulations."""

from __future__ import annotations

import choix
import numpy as np
import pytest
from scipy.optimize import minimize

from kilter.stats.likelihood import Scale
from kilter.stats.rankings import Rankings, rate_rankings
from kilter.stats.ratings import Comparisons, rate

Row = tuple[list[str], list[float]]


def ranked(seed: int, *, rankings: int = 200, models: int = 6, k: int = 4, spread: float = 0.0, people: int = 40):
    """Rankings by Gumbel noise (Plackett and Luce's model) on strengths as each annotator sees them."""
    rng = np.random.default_rng(seed)
    own = np.linspace(-1.0, 1.0, models) + spread * rng.normal(size=(people, models))
    who = rng.integers(people, size=rankings)
    shown = rng.permuted(np.tile(np.arange(models), (rankings, 1)), axis=1)[:, :k]
    noisy = own[who[:, None], shown] + rng.gumbel(size=shown.shape)
    ranks = (-noisy).argsort(1).argsort(1)
    return [([f"m{m}" for m in row], r.tolist()) for row, r in zip(shown, ranks, strict=True)], who.tolist()


def strengths(scale: Scale, count: int) -> np.ndarray:
    return np.array([scale.strength[scale.names.index(f"m{place}")] for place in range(count)])


def orders(rows: list[Row]) -> list[list[int]]:
    return [[int(who[at][1:]) for at in np.argsort(ranks)] for who, ranks in rows]


@pytest.mark.parametrize("seed", range(3))
def test_it_is_choix(seed: int) -> None:
    """Rankings of three to six at once."""
    rows = [row for k in (3, 4, 6) for row in ranked(seed + 10 * k, rankings=60, k=k)[0]]
    ours = strengths(rate_rankings(Rankings.of(rows)), 6)
    assert ours == pytest.approx(choix.ilsr_rankings(6, orders(rows), alpha=0, tol=1e-12, max_iter=1000), abs=1e-6)
    theirs = choix.opt_rankings(6, orders(rows), alpha=1e-12, method="Newton-CG", tol=1e-12)
    assert ours == pytest.approx(theirs - theirs.mean(), abs=1e-6)


@pytest.mark.parametrize("clustered", [False, True])
def test_of_two_it_is_bradley_terry(clustered: bool) -> None:
    rows, who = ranked(0, rankings=300, k=2)
    prompts = np.random.default_rng(1).integers(30, size=300).tolist()
    clusters = {"annotator": who, "prompt": prompts} if clustered else {}
    ours = rate_rankings(Rankings.of(rows, clusters=clusters))
    theirs = rate(Comparisons.of([(*names, float(r[0] < r[1])) for names, r in rows], clusters=clusters))
    assert ours.names == theirs.names and ours.freedom == theirs.freedom and ours.clusters == theirs.clusters
    assert ours.strength == pytest.approx(theirs.strength, abs=1e-10)
    assert ours.covariance == pytest.approx(theirs.covariance, abs=1e-10)


def test_a_tie_of_two_is_a_win_of_each() -> None:
    """Breslow: a, b tied from {a, b} is a chosen and b chosen. As rows of comparisons: one win of each."""
    table = [(["a", "b"], [0, 0])] * 3 + [(["a", "b"], [0, 1])] * 4 + [(["b", "c"], [1, 1])] + [(["c", "a"], [0, 1])]
    pairs = [("a", "b", 1.0), ("a", "b", 0.0)] * 3 + [("a", "b", 1.0)] * 4 + [("b", "c", 1.0), ("b", "c", 0.0)]
    theirs = rate(Comparisons.of([*pairs, ("c", "a", 1.0)]))
    assert rate_rankings(Rankings.of(table)).strength == pytest.approx(theirs.strength, abs=1e-10)


def test_ties_and_repeated_names_are_the_maximum_of_their_likelihood() -> None:
    """Written out as loops, with ranks that tie, gaps between ranks, and a model twice in one ranking."""
    rng = np.random.default_rng(0)
    rows = [
        (
            [f"m{m}" for m in rng.permutation(5)[: rng.integers(3, 5)]] + ["m0"] * int(rng.integers(2)),
            [],
        )
        for _ in range(80)
    ]
    rows = [(who, (10 * rng.integers(3, size=len(who))).tolist()) for who, _ in rows]

    def loss(at: np.ndarray) -> float:
        total = float(at.sum() ** 2)
        for who, ranks in rows:
            strength = np.array([at[int(name[1:])] for name in who])
            for one, rank in zip(strength, ranks, strict=True):
                total -= one - np.log(np.exp(strength[np.array(ranks) >= rank]).sum())
        return total

    theirs = minimize(loss, np.zeros(5), method="BFGS", options={"gtol": 1e-7}).x
    scale = rate_rankings(Rankings.of(rows))
    assert strengths(scale, 5) == pytest.approx(theirs, abs=1e-5)
    # The sandwich from scores by differences, and information by differences of their sum.
    order = [scale.names.index(f"m{place}") for place in range(5)]
    step = 1e-5

    def said(at: np.ndarray, row: tuple[list[str], list[int]]) -> float:
        strength = np.array([at[int(name[1:])] for name in row[0]])
        above = [
            one - np.log(np.exp(strength[np.array(row[1]) >= r]).sum()) for one, r in zip(strength, row[1], strict=True)
        ]
        return float(sum(above))

    def score(at: np.ndarray, row: tuple[list[str], list[int]]) -> np.ndarray:
        return np.array([(said(at + step * e, row) - said(at - step * e, row)) / (2 * step) for e in np.eye(5)])

    at = strengths(scale, 5)
    each = np.array([score(at, row) for row in rows])
    total = [sum(score(at + s * e, row) for row in rows) for e in np.eye(5) for s in (1e-4, -1e-4)]
    information = -np.array([(total[2 * i] - total[2 * i + 1]) / 2e-4 for i in range(5)])
    bread = np.linalg.inv(information + 0.2)
    expected = bread @ each.T @ each @ bread * 80 / 79
    assert scale.covariance[np.ix_(order, order)] == pytest.approx(expected, rel=1e-3, abs=1e-5)


def test_clustered_intervals_cover() -> None:
    """400 simulations of 40 annotators who differ: the 95% interval of a difference holds it; those that take every
    ranking for itself hold it less often. Over 2,000: 95.1%."""
    rows, _ = ranked(10**6, rankings=100_000, spread=1.0, people=20_000)
    scale = rate_rankings(Rankings.of(rows))
    truth = scale.strength[scale.names.index("m5")] - scale.strength[scale.names.index("m0")]
    clustered = plain = 0
    for seed in range(400):
        rows, who = ranked(seed, rankings=200, spread=1.0)
        clustered += (
            not rate_rankings(Rankings.of(rows, clusters={"a": who})).interval("m5", against="m0").excludes(truth)
        )
        plain += not rate_rankings(Rankings.of(rows)).interval("m5", against="m0").excludes(truth)
    assert 0.92 <= clustered / 400 <= 0.98, clustered / 400
    assert plain / 400 < 0.92, plain / 400


def test_what_cannot_be_said_is_refused() -> None:
    rows = [(["a", "b", "c"], [1, 0, 2]), (["a", "b"], [0, 1]), (["d", "e"], [0, 0])]
    with pytest.raises(ValueError, match="d, e was never compared with the others"):
        rate_rankings(Rankings.of(rows))
    with pytest.raises(ValueError, match="c either never lost to the others, or never won"):
        rate_rankings(Rankings.of(rows[:2]))
    with pytest.raises(ValueError, match="none was given"):
        Rankings.of([])
    with pytest.raises(ValueError, match="ranking 1: 2 ranks for 3 names"):
        Rankings.of([(["a", "b"], [0, 1]), (["a", "b", "c"], [0, 1])])
    with pytest.raises(ValueError, match=r"ranking 0: \['a', 'a'\] compares nobody"):
        Rankings.of([(["a", "a"], [0, 1])])
    with pytest.raises(ValueError, match="'annotator' has 1 values for 2 rankings"):
        Rankings.of([(["a", "b"], [0, 1])] * 2, clusters={"annotator": [1]})
