"""Score tests of what strengths do not say, beside statsmodels, and by data with and without it."""

from __future__ import annotations

import numpy as np
import pytest
import statsmodels.api as sm

from kilter.stats.misfit import misfit
from kilter.stats.ratings import Comparisons, Ties, rate


def votes(
    seed: int,
    *,
    number: int = 600,
    models: int = 5,
    people: int = 30,
    spread: float = 0.4,
    cycle: float = 0.0,
    extra: float = 0.0,
    ties: float = 0.0,
) -> tuple[Comparisons, list[str]]:
    """Votes of annotators who differ; m0 over m1 over m2 over m0 by `cycle`; m3 stronger by `extra` in code."""
    rng = np.random.default_rng(seed)
    own = np.linspace(-1.0, 1.0, models) + spread * rng.normal(size=(people, models))
    who, asked = rng.integers(people, size=number), rng.integers(40, size=number)
    left = rng.integers(models, size=number)
    right = (left + rng.integers(1, models, size=number)) % models
    kind = rng.integers(3, size=number)
    better = own[who, left] - own[who, right] + extra * (kind == 1) * ((left == 3) * 1.0 - (right == 3))
    round_ = np.zeros((models, models))
    for one, other in ((0, 1), (1, 2), (2, 0)):
        round_[one, other], round_[other, one] = cycle, -cycle
    better = better + round_[left, right]
    outcome = (rng.random(number) < 1 / (1 + np.exp(-better))).astype(float)
    outcome[rng.random(number) < ties] = 0.5
    rows = [(f"m{a}", f"m{b}", float(o)) for a, b, o in zip(left, right, outcome, strict=True)]
    clusters = {"annotator": who.tolist(), "prompt": asked.tolist()} if spread else {}
    return Comparisons.of(rows, clusters=clusters), [("chat", "code", "maths")[k] for k in kind]


def test_by_hand() -> None:
    """Two models, two contexts: strengths say 60 of 100 everywhere; in x it was 40 of 50, in y 20 of 50. The pair's own
    parameter is the strength: there is nothing to test. V by comparisons: sum of psi^2, psi = r (x_n - 1/2)."""
    rows = [("a", "b", 1.0)] * 40 + [("a", "b", 0.0)] * 10 + [("a", "b", 1.0)] * 20 + [("a", "b", 0.0)] * 30
    found = misfit(Comparisons.of(rows), by={"kind": ["x"] * 50 + ["y"] * 50})
    assert not found.departures["pairs"] and found.p == 1.0
    first = next(d for d in found.departures["kind"] if (d.name, d.context) == ("a", "x"))
    total = 40 * 0.4 - 10 * 0.6
    variance = 100 / 99 * 0.25 * (60 * 0.4**2 + 40 * 0.6**2)
    assert first.z == pytest.approx(total / variance**0.5) and first.comparisons == 50
    assert first.effect == pytest.approx(total / (50 * 0.24 - (50 * 0.24) ** 2 / (100 * 0.24)))
    assert {(d.name, d.context, round(d.z, 6)) for d in found.departures["kind"]} == {
        ("a", "x", round(first.z, 6)),
        ("b", "y", round(first.z, 6)),
        ("b", "x", -round(first.z, 6)),
        ("a", "y", -round(first.z, 6)),
    }
    assert [d.adjusted for d in found.departures["kind"]] == pytest.approx([4 * first.p] * 4)


@pytest.mark.parametrize("clusters", [(), ("annotator",), ("annotator", "prompt")])
@pytest.mark.parametrize("ties", ["half", "davidson"])
def test_it_is_the_formula_with_dense_tables(ties: Ties, clusters: tuple[str, ...]) -> None:
    """psi written out for every comparison and every test."""
    held, kinds = votes(0, number=300, ties=0.2, cycle=0.8)
    style = {"length": np.random.default_rng(5).normal(size=300).tolist()}
    rows = list(zip(held.left.tolist(), held.right.tolist(), held.outcome.tolist(), strict=True))
    data = Comparisons.of(rows, clusters={name: held.clusters[name].tolist() for name in clusters}, style=style)
    found = misfit(data, ties=ties, by={"kind": kinds})
    scale = rate(data, ties=ties)
    design = np.zeros((300, 5))
    design[np.arange(300), data.left] += 1
    design[np.arange(300), data.right] -= 1
    design = np.column_stack([design, style["length"]])
    half = design @ [*scale.strength, scale.style["length"]] / 2
    nu = np.exp(scale.tie) if scale.tie is not None else 0.0
    total = np.exp(half) + np.exp(-half) + nu
    win, tie = np.exp(half) / total, nu / total
    mean, tied = win + tie / 2, (data.outcome == 0.5).astype(float)
    variance, both = win + tie / 4 - mean**2, tie / 2 - mean * tie
    score, information = design * (data.outcome - mean)[:, None], design.T @ (design * variance[:, None])
    if ties == "davidson":
        cross = design.T @ both
        information = np.block([[information, cross[:, None]], [cross[None], np.array([[(tie * (1 - tie)).sum()]])]])
        score = np.column_stack([score, tied - tie])
    bread = np.linalg.pinv(information)
    for name, against, context, count, effect, z, *_ in [*found.departures["pairs"], *found.departures["kind"]]:
        at = data.names.index(name)
        x = (data.left == at) * 1.0 - (data.right == at)
        if against is not None:
            other = data.names.index(against)
            x = x * ((data.left == other) | (data.right == other))
        else:
            x = x * (np.array(kinds) == context)
        shared = design.T @ (x * variance)
        if ties == "davidson":
            shared = np.append(shared, x @ both)
        psi = x * (data.outcome - mean) - score @ bread @ shared

        def by(group: np.ndarray) -> float:
            names, place = np.unique(group, return_inverse=True)
            return float((np.bincount(place, psi) ** 2).sum()) * len(names) / (len(names) - 1)  # noqa: B023

        groups = [data.clusters[kind] for kind in clusters] or [np.arange(300)]
        several = [by(group) for group in groups]
        if len(groups) == 2:
            several.append(sum(several) - by(groups[0] * 1000 + groups[1]))
        left = x @ (variance * x) - shared @ bread @ shared
        several.append(left * ((data.outcome - mean) ** 2).sum() / variance.sum())
        assert z == pytest.approx(psi.sum() / max(several) ** 0.5, rel=1e-6, abs=1e-8)
        assert effect == pytest.approx(psi.sum() / left, rel=1e-6, abs=1e-8) and count == (x != 0).sum()


def test_the_score_test_is_near_that_of_the_fitted_parameter() -> None:
    """Rao's and Wald's tests agree in large samples: the cycle's parameter, fitted by statsmodels."""
    data, _ = votes(1, number=20_000, spread=0.0, cycle=0.05)
    x = np.zeros((20_000, 5))
    x[np.arange(20_000), data.left] += 1
    x[np.arange(20_000), data.right] -= 1
    places = [data.names.index(f"m{place}") for place in (0, 1)]
    added = np.where((data.left == places[0]) & (data.right == places[1]), 1.0, 0.0)
    added -= np.where((data.left == places[1]) & (data.right == places[0]), 1.0, 0.0)
    fit = sm.Logit(data.outcome, np.column_stack([x[:, 1:], added])).fit(disp=False, cov_type="HC0")
    one = next(d for d in misfit(data).departures["pairs"] if {d.name, d.against} == {"m0", "m1"})
    sign = 1 if one.name == "m0" else -1
    assert sign * one.z == pytest.approx(fit.tvalues[-1], abs=0.05)
    assert sign * one.effect == pytest.approx(fit.params[-1], abs=0.01)


@pytest.mark.parametrize("spread", [0.0, 0.4])
def test_false_alarms_are_rare(spread: float) -> None:
    """200 data sets in which strengths say all: in at most 5% a family, or the chi-square, calls anything out."""
    alarms = np.zeros(3)
    for seed in range(200):
        data, kinds = votes(seed, number=300, spread=spread)
        found = misfit(data, by={"kind": kinds})
        alarms += [bool(found.found("pairs")), bool(found.found("kind")), found.p < 0.05]
    assert (alarms <= 16).all(), alarms / 200  # 5% of 200 and two standard errors


def test_a_favourite_that_won_its_few_votes_is_no_departure() -> None:
    """a wins 95% against others and all of 30 against d, which as many do: (0.95)^30 = 21%."""
    rows = [("a", "b", 1.0)] * 95 + [("a", "b", 0.0)] * 5 + [("a", "d", 1.0)] * 30
    rows += [("b", "d", 1.0)] * 50 + [("b", "d", 0.0)] * 50
    found = misfit(Comparisons.of(rows))
    assert not found.found("pairs") and abs(found.departures["pairs"][0].z) < 2


def test_a_planted_cycle_and_a_planted_context_are_found() -> None:
    data, kinds = votes(3, number=6000, cycle=0.7)
    found = misfit(data, by={"kind": kinds, "all": ["same"] * 6000})
    assert {(d.name, d.against) for d in found.found("pairs")} >= {("m0", "m1"), ("m1", "m2"), ("m2", "m0")}
    assert not found.found("kind") and found.p < 1e-6 and "all" not in found.departures
    data, kinds = votes(4, number=6000, extra=1.2)
    found = misfit(data, by={"kind": kinds})
    first = found.found("kind")[0]
    assert (first.name, first.context) == ("m3", "code") and first.z > 3.5 and 0.5 < first.effect < 2.0
    assert not found.found("pairs")


def test_refusals() -> None:
    with pytest.raises(ValueError, match="'kind' has 1 values for 2 comparisons"):
        misfit(Comparisons.of([("a", "b", 1.0), ("b", "a", 1.0)]), by={"kind": ["x"]})
    with pytest.raises(ValueError, match="never lost to the others"):
        misfit(Comparisons.of([("a", "b", 1.0)]))
