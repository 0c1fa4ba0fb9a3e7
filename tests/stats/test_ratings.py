"""Ratings beside choix, evalica, scikit-learn and statsmodels; their intervals beside simulations."""

from __future__ import annotations

from collections.abc import Mapping

import choix
import evalica
import numpy as np
import pytest
import statsmodels.api as sm
from scipy.optimize import minimize
from sklearn.linear_model import LogisticRegression

from kilter.stats import likelihood, ratings
from kilter.stats.likelihood import Scale
from kilter.stats.ratings import Comparisons, elo, rate

Row = tuple[str, str, float]


def wins(table: Mapping[tuple[str, str], int]) -> list[Row]:
    """Rows of (winner, loser), so often each."""
    return [(winner, loser, 1.0) for (winner, loser), count in table.items() for _ in range(count)]


def drawn(
    seed: int = 0, *, votes: int = 400, models: int = 6, ties: float = 0.0, spread: float = 0.0, people: int = 20
) -> tuple[list[Row], list[int], np.ndarray]:
    """Votes between models of strengths that every annotator sees in his own way (`spread`); who voted; strengths."""
    rng = np.random.default_rng(seed)
    strength = np.linspace(-1.0, 1.0, models)
    own = strength + spread * rng.normal(size=(people, models))
    who = rng.integers(people, size=votes)
    left = rng.integers(models, size=votes)
    right = (left + rng.integers(1, models, size=votes)) % models
    half = (own[who, left] - own[who, right]) / 2
    weights = np.stack([np.exp(half), np.full(votes, ties), np.exp(-half)], axis=1)
    share = weights.cumsum(1) / weights.sum(1, keepdims=True)
    outcome = 1.0 - (rng.random(votes)[:, None] > share[:, :2]).sum(1) / 2
    rows = [(f"m{a}", f"m{b}", float(o)) for a, b, o in zip(left, right, outcome, strict=True)]
    return rows, who.tolist(), strength


def strengths(scale: Scale, count: int) -> np.ndarray:
    return np.array([scale.strength[scale.names.index(f"m{place}")] for place in range(count)])


def test_worked_example() -> None:
    """Four players: A beat B twice and D once, B beat A three times and C five (Wikipedia, Bradley-Terry model)."""
    table = {("A", "B"): 2, ("A", "D"): 1, ("B", "A"): 3, ("B", "C"): 5, ("C", "B"): 3, ("C", "D"): 1}
    scale = rate(Comparisons.of(wins(table | {("D", "A"): 4, ("D", "C"): 3})))
    found = dict(zip(scale.names, np.exp(scale.strength).round(3).tolist(), strict=True))
    assert found == {"A": 0.640, "B": 1.043, "C": 0.660, "D": 2.270}
    assert scale.order() == ["D", "B", "C", "A"] and scale.tie is None and abs(scale.strength.mean()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_it_is_choix_and_evalica(seed: int) -> None:
    rows, *_ = drawn(seed)
    ours = strengths(rate(Comparisons.of(rows)), 6)
    won = [(int(a[1:]), int(b[1:])) if o == 1 else (int(b[1:]), int(a[1:])) for a, b, o in rows]
    assert ours == pytest.approx(choix.ilsr_pairwise(6, won, alpha=0, tol=1e-12, max_iter=1000), abs=1e-6)
    for ties in (0.0, 1.5):
        rows, *_ = drawn(seed, ties=ties)
        ours = strengths(rate(Comparisons.of(rows)), 6)
        kinds = {1.0: evalica.Winner.X, 0.0: evalica.Winner.Y, 0.5: evalica.Winner.Draw}
        theirs = evalica.bradley_terry(
            [a for a, *_ in rows], [b for _, b, _ in rows], [kinds[o] for *_, o in rows], tolerance=1e-13, limit=10_000
        )
        logs = np.log([theirs.scores[f"m{place}"] for place in range(6)])
        assert ours == pytest.approx(logs - logs.mean(), abs=1e-6)


def test_davidson_is_the_maximum_of_its_likelihood() -> None:
    rows, _, strength = drawn(votes=3000, ties=1.5)
    scale = rate(Comparisons.of(rows), ties="davidson")
    left, right = (np.array([int(row[side][1:]) for row in rows]) for side in (0, 1))
    outcome = np.array([row[2] for row in rows])

    def loss(at: np.ndarray) -> float:
        half = (at[left] - at[right]) / 2
        weights = np.stack([np.exp(half), np.exp(-half), np.full(len(half), np.exp(at[-1]))])
        said = weights[np.where(outcome == 1, 0, np.where(outcome == 0, 1, 2)), np.arange(len(half))]
        return float(-np.log(said / weights.sum(0)).sum() + at[:-1].sum() ** 2)

    theirs = minimize(loss, np.zeros(7), method="BFGS", options={"gtol": 1e-6}).x
    assert strengths(scale, 6) == pytest.approx(theirs[:-1], abs=1e-4)
    assert scale.tie == pytest.approx(theirs[-1], abs=1e-4) and abs(scale.tie - np.log(1.5)) < 0.15
    assert strengths(scale, 6) == pytest.approx(strength, abs=0.25)


def test_style_is_logistic_regression() -> None:
    """Longer wins here whoever wrote it; with the length beside, the strengths are those without it."""
    rng = np.random.default_rng(0)
    left, right = rng.integers(4, size=(2, 4000))
    keep = left != right
    left, right = left[keep], right[keep]
    length = rng.normal(size=len(left)) + 0.8 * (left - right)
    chance = 1 / (1 + np.exp(-(0.3 * (left - right) + 0.9 * length)))
    outcome = (rng.random(len(left)) < chance).astype(float)
    rows = [(f"m{a}", f"m{b}", o) for a, b, o in zip(left, right, outcome, strict=True)]
    scale = rate(Comparisons.of(rows, style={"length": length.tolist()}))
    design = np.zeros((len(left), 5))
    design[np.arange(len(left)), left] += 1
    design[np.arange(len(left)), right] -= 1
    design[:, 4] = length
    theirs = LogisticRegression(C=np.inf, fit_intercept=False, tol=1e-10, max_iter=1000).fit(design[:, 1:], outcome)
    steps = np.concatenate([[0.0], theirs.coef_[0][:3]])
    assert strengths(scale, 4) == pytest.approx(steps - steps.mean(), abs=1e-4)
    assert scale.style["length"] == pytest.approx(theirs.coef_[0][3], abs=1e-4)
    plain = rate(Comparisons.of(rows))
    assert np.ptp(strengths(plain, 4)) > 2 * np.ptp(strengths(scale, 4))


@pytest.mark.parametrize("sparse_below", [0, 10**6], ids=["sparse", "dense"])
@pytest.mark.parametrize("styled", [False, True])
@pytest.mark.parametrize("clustered", [False, True])
def test_errors_are_statsmodels(
    clustered: bool, styled: bool, sparse_below: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all differences of strengths, and of style; statsmodels without its correction for parameters."""
    monkeypatch.setattr(likelihood, "SPARSE_BELOW", sparse_below)
    monkeypatch.setattr(likelihood, "BLOCK", 14)
    rows, who, _ = drawn(spread=0.7)
    style = {"length": np.random.default_rng(1).normal(size=len(rows)).tolist()} if styled else {}
    scale = rate(Comparisons.of(rows, clusters={"annotator": who} if clustered else {}, style=style))
    design = np.zeros((len(rows), 6))
    for place, (a, b, _) in enumerate(rows):
        design[place, int(a[1:])], design[place, int(b[1:])] = 1.0, -1.0
    design = np.column_stack([design[:, 1:], *style.values()])
    kinds = {"cov_type": "HC0"}
    if clustered:
        kinds = {"cov_type": "cluster", "cov_kwds": {"groups": np.array(who), "use_correction": False}}
    fit = sm.Logit([o for *_, o in rows], design).fit(disp=False, tol=1e-10, **kinds)
    groups = len(set(who)) if clustered else len(rows)
    theirs = fit.cov_params() * groups / (groups - 1)
    for one in range(1, 6):
        at = scale.names.index(f"m{one}"), scale.names.index("m0")
        mine = scale.covariance[np.ix_(at, at)]
        assert mine[0, 0] + mine[1, 1] - 2 * mine[0, 1] == pytest.approx(theirs[one - 1, one - 1], rel=1e-6)
    if styled:
        assert scale.covariance[6, 6] == pytest.approx(theirs[5, 5], rel=1e-6)
    assert scale.freedom == groups - 1


def test_two_kinds_of_clusters_are_both_less_their_intersection() -> None:
    rows, who, _ = drawn(spread=0.7)
    prompts = np.random.default_rng(2).integers(30, size=len(rows)).tolist()
    both = list(zip(who, prompts, strict=True))

    def covariance(**clusters: list[object]) -> np.ndarray:
        return rate(Comparisons.of(rows, clusters=clusters)).covariance

    found = covariance(annotator=who, prompt=prompts)
    expected = covariance(annotator=who) + covariance(prompt=prompts) - covariance(pair=both)
    assert found == pytest.approx(expected, abs=1e-12)
    assert rate(Comparisons.of(rows, clusters={"annotator": who, "prompt": prompts})).freedom == len(set(who)) - 1


@pytest.mark.parametrize(("ties", "model"), [(0.0, "half"), (1.0, "davidson")])
def test_clustered_intervals_cover(ties: float, model: ratings.Ties) -> None:
    """2,000 simulations of 40 annotators who differ: the 95% interval of a difference holds it in 93 to 97%. Intervals
    that take every vote for itself do not."""
    rows, *_ = drawn(10**6, votes=400_000, ties=ties, spread=1.0, people=20_000)
    scale = rate(Comparisons.of(rows), ties=model)
    truth = scale.strength[scale.names.index("m5")] - scale.strength[scale.names.index("m0")]
    clustered = plain = 0
    for seed in range(2000):
        rows, who, _ = drawn(seed, votes=600, ties=ties, spread=1.0, people=40)
        one = rate(Comparisons.of(rows, clusters={"annotator": who}), ties=model)
        clustered += not one.interval("m5", against="m0").excludes(truth)
        if seed < 500:
            plain += not rate(Comparisons.of(rows), ties=model).interval("m5", against="m0").excludes(truth)
    assert 0.93 <= clustered / 2000 <= 0.97, clustered / 2000
    assert plain / 500 < 0.93, plain / 500


def test_who_cannot_be_told_apart() -> None:
    rows = wins({("a", "b"): 60, ("b", "a"): 40, ("b", "c"): 51, ("c", "b"): 49, ("a", "c"): 62, ("c", "a"): 38})
    scale = rate(Comparisons.of(rows))
    assert scale.order()[0] == "a" and scale.apart() == [True, False]
    assert scale.interval("a").mean == scale.strength[scale.names.index("a")]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ({("a", "b"): 2, ("b", "a"): 1, ("c", "d"): 1, ("d", "c"): 1, ("a", "e"): 1, ("e", "a"): 1}, "c, d was never"),
        ({("a", "b"): 2, ("b", "a"): 1, ("c", "a"): 3}, "c either never lost to the others"),
        ({("a", "b"): 1}, "never lost to the others, or never won"),
    ],
)
def test_what_cannot_be_said_is_refused(table: dict[tuple[str, str], int], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        rate(Comparisons.of(wins(table)))


def test_elo_by_hand_and_by_order() -> None:
    """400 points for odds of ten. One win of equals moves both by half of k; who won last stands better."""
    once = Comparisons.of([("a", "b", 1.0)])
    assert elo(once).tolist() == [16.0, -16.0] and elo(once, k=8.0).tolist() == [4.0, -4.0]
    both = Comparisons.of([("a", "b", 1.0), ("b", "a", 1.0)])
    expected = 16.0 - 32.0 / (1.0 + 10.0 ** (-32.0 / 400.0))
    assert elo(both)[0] == pytest.approx(expected) and expected < 0
    assert elo(both, np.array([1, 0])) == pytest.approx(-elo(both))
    assert elo(Comparisons.of([("a", "b", 0.5)])).tolist() == [0.0, 0.0]
    rows, _, strength = drawn(votes=4000)
    held = Comparisons.of(rows)
    points = elo(held, k=4.0)[[held.names.index(f"m{place}") for place in range(6)]]
    assert points / ratings.ELO_PER_NAT == pytest.approx(strength, abs=0.3) and abs(points.sum()) < 1e-9


def test_a_tie_connects() -> None:
    scale = rate(Comparisons.of([("a", "b", 0.5), ("b", "c", 1.0), ("c", "b", 0.5)]))
    assert scale.order()[-1] == "c" and np.isfinite(scale.strength).all()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="none was given"):
        Comparisons.of([])
    with pytest.raises(ValueError, match=r"comparison 1: outcome is 2; give 1"):
        Comparisons.of([("a", "b", 1), ("a", "b", 2)])
    with pytest.raises(ValueError, match="'a' is compared with itself"):
        Comparisons.of([("a", "a", 1)])
    with pytest.raises(ValueError, match="'annotator' has 1 values for 2 comparisons"):
        Comparisons.of([("a", "b", 1), ("b", "a", 1)], clusters={"annotator": [1]})
    rows = [("a", "b", 1.0), ("b", "a", 1.0)]
    with pytest.raises(ValueError, match="ties 'third'; choose one of half, davidson"):
        rate(Comparisons.of(rows), ties="third")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="needs ties and there is none"):
        rate(Comparisons.of(rows), ties="davidson")
