"""Models of annotators beside plain re-derivations, brute force and simulations with known truth."""

from __future__ import annotations

import math

import numpy as np
import pytest

from kilter.stats import annotators
from kilter.stats.agreement import Ratings
from kilter.stats.annotators import Crowd, Verdicts, crowd, dawid_skene, polya_gamma

GOOD = ((0.8, 0.1, 0.1), (0.15, 0.7, 0.15), (0.05, 0.15, 0.8))


def rated(
    confusions: list[tuple[tuple[float, ...], ...]], *, items: int, seed: int = 0, share: float = 1.0
) -> tuple[Ratings, np.ndarray]:
    """Ratings of items by raters of known confusion matrices, each of a share of the items; the truth."""
    rng = np.random.default_rng(seed)
    truth = rng.choice(3, size=items, p=(0.5, 0.3, 0.2))
    rows = [
        (item, rater, int(rng.choice(3, p=table[truth[item]])))
        for item in range(items)
        for rater, table in enumerate(confusions)
        if rng.random() < share
    ]
    ratings = Ratings.of(rows, categories=(0, 1, 2))
    return ratings, truth[list(ratings.items)]


def by_hand(
    ratings: Ratings, steps: int, smoothing: float
) -> tuple[list[list[float]], dict[tuple[int, int, int], float]]:
    """Dawid and Skene's EM in products of probabilities, without numpy."""
    rows = list(zip(ratings.item.tolist(), ratings.rater.tolist(), ratings.value.tolist(), strict=True))
    kinds, items, raters = range(len(ratings.categories)), range(len(ratings.items)), range(len(ratings.raters))
    t = [[0.0 for _ in kinds] for _ in items]
    for i, _, v in rows:
        t[i][v] += 1
    t = [[x / sum(row) for x in row] for row in t]
    pi: dict[tuple[int, int, int], float] = {}
    for _ in range(steps):
        p = [smoothing + sum(row[k] for row in t) for k in kinds]
        p = [x / sum(p) for x in p]
        for a in raters:
            for k in kinds:
                seen = [smoothing + sum(t[i][k] for i, b, w in rows if (b, w) == (a, v)) for v in kinds]
                for v in kinds:
                    pi[a, k, v] = seen[v] / sum(seen)
        t = []
        for i in items:
            joint = [p[k] * math.prod(pi[a, k, v] for j, a, v in rows if j == i) for k in kinds]
            t.append([x / sum(joint) for x in joint])
    return t, pi


@pytest.mark.parametrize("smoothing", [0.1, 1.0])
def test_dawid_skene_by_hand(smoothing: float) -> None:
    ratings, _ = rated([GOOD, GOOD, ((0.4, 0.3, 0.3),) * 3], items=30, share=0.8)
    for steps in (1, 7):
        found = dawid_skene(ratings, smoothing=smoothing, steps=steps, tolerance=0.0)
        posterior, confusion = by_hand(ratings, steps, smoothing)
        assert len(found.objective) == steps and found.posterior == pytest.approx(np.array(posterior), abs=1e-10)
        for place, chance in confusion.items():
            assert found.confusion[place] == pytest.approx(chance, abs=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_dawid_skene_climbs(smoothing: float) -> None:
    ratings, _ = rated([GOOD] * 3 + [((0.4, 0.3, 0.3),) * 3], items=80, share=0.7)
    climbed = dawid_skene(ratings, smoothing=smoothing, tolerance=0.0, steps=300).objective
    assert min(np.diff(climbed)) > -1e-9 and climbed[-1] - climbed[0] > 1
    plain = dawid_skene(ratings, smoothing=0.0, steps=20, tolerance=0.0)
    assert plain.objective[-1] == plain.likelihood


def test_dawid_skene_finds_the_confusions() -> None:
    """3,000 items, each cell within 0.04."""
    other = ((0.6, 0.3, 0.1), (0.1, 0.9, 0.0), (0.3, 0.0, 0.7))
    ratings, truth = rated([GOOD, GOOD, other, other], items=3000)
    found = dawid_skene(ratings)
    assert np.abs(found.confusion - np.array([GOOD, GOOD, other, other])).max() < 0.04
    assert found.prior == pytest.approx([0.5, 0.3, 0.2], abs=0.03)
    assert (found.posterior.argmax(1) == truth).mean() > 0.9


def test_dawid_skene_sees_through_spammers_and_adversaries() -> None:
    """Three good, four who always say the first, two who turn the categories round: the majority is mostly wrong."""
    spam, turned = ((1.0, 0.0, 0.0),) * 3, ((0.1, 0.8, 0.1), (0.1, 0.1, 0.8), (0.8, 0.1, 0.1))
    ratings, truth = rated([GOOD] * 3 + [spam] * 4 + [turned] * 2, items=600)
    found = dawid_skene(ratings)
    mine, majority = found.posterior.argmax(1) == truth, ratings.counts().argmax(1) == truth
    assert mine.mean() > 0.9 and majority.mean() < 0.6
    assert found.confusion[7, 0, 1] > 0.7 and found.confusion[3, :, 0].min() > 0.98


def drawn(
    seed: int,
    *,
    people: int = 40,
    items: int = 400,
    each: int = 4,
    effects: np.ndarray | None = None,
    mean: tuple[float, float, float] = (1.5, 0.3, 0.2),
    spread: tuple[float, float, float] = (0.7, 0.4, 0.3),
) -> tuple[Verdicts, np.ndarray, np.ndarray]:
    """Verdicts of annotators drawn from a crowd, or of given ones; their effects in the order of names; d."""
    rng = np.random.default_rng(seed)
    if effects is None:
        effects = np.array(mean) + np.array(spread) * rng.normal(size=(people, 3))
    d, z = rng.normal(size=items), 0.7 * rng.normal(size=items)
    rows = []
    for item in range(items):
        for who in rng.choice(len(effects), each, replace=False).tolist():
            side = int(rng.choice([-1, 1]))
            liked = effects[who] @ (d[item], z[item], side)
            rows.append((item, who, float(rng.random() < 1 / (1 + np.exp(-liked))), side))
    verdicts = Verdicts.of(rows, dict(enumerate(z.tolist())))
    return verdicts, effects[list(verdicts.annotators)], d


def test_polya_gamma_has_its_moments() -> None:
    """Mean tanh(c / 2) / (2 c), variance (sinh c - c) / (4 c^3 cosh^2(c / 2)): Polson, Scott and Windle 2013."""
    for tilt in (0.0, 0.5, -3.0, 12.0):
        draws = polya_gamma(np.full(200_000, tilt), np.random.default_rng(0))
        c = max(abs(tilt), 1e-2)
        assert draws.min() > 0 and draws.mean() == pytest.approx(math.tanh(c / 2) / (2 * c), rel=0.01)
        assert draws.var() == pytest.approx((math.sinh(c) - c) / (4 * c**3 * math.cosh(c / 2) ** 2), rel=0.03)


def test_the_posterior_by_brute_force(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three annotators, eight items: 100,000 crowds drawn from the prior, weighed by their likelihood over a grid of
    d, the other way up where the verdicts' mean skill is below 0. (Under priors with lighter tails than the usual.)"""
    count, about, error = 6.0, 0.6, 1.5
    for name, value in (("PRIOR_COUNT", count), ("PRIOR_SPREAD", about), ("PRIOR_ERROR", error)):
        monkeypatch.setattr(annotators, name, value)
    held, *_ = drawn(3, items=8, each=3, effects=np.array([[2.0, 0.5, 0.0], [1.5, 0.0, 0.5], [-1.0, 0.0, 0.0]]))
    rng = np.random.default_rng(0)
    size = 100_000
    mean = error * rng.normal(size=(size, 1, 3))
    spread = np.sqrt(count * about**2 / rng.chisquare(count, size=(size, 1, 3)))
    effects = mean + spread * rng.normal(size=(size, 3, 3))
    turn = np.where(effects[:, :, 0].sum(1) < 0, -1.0, 1.0)
    effects[:, :, 0] *= turn[:, None]
    mean[:, 0, 0] *= turn
    grid = np.linspace(-4.0, 4.0, 33)
    prior = np.exp(-(grid**2) / 2) / np.exp(-(grid**2) / 2).sum()
    logs, above, middle = np.zeros(size), [], []
    for item in range(8):
        joint = np.tile(np.log(prior), (size, 1))
        for n in np.flatnonzero(held.item == item):
            skill, length, side = effects[:, held.annotator[n]].T
            logit = skill[:, None] * grid + (length * held.length[item] + side * held.side[n])[:, None]
            joint -= np.logaddexp(0.0, np.where(held.outcome[n] == 1, -logit, logit))
        each = np.exp(joint)
        total = np.maximum(each.sum(1), 1e-300)  # of crowds so strange that their likelihood is no number
        logs += np.log(total)
        each /= total[:, None]
        above.append((each * (grid > 0)).sum(1) + each[:, 16] / 2)
        middle.append(each @ grid)
    weight = np.exp(logs - logs.max())
    weight /= weight.sum()
    assert 1 / (weight**2).sum() > 500  # crowds that count
    found = crowd(held, np.random.default_rng(1), draws=20_000, burn=500)
    expected = np.einsum("s,saf->af", weight, effects)
    assert found.effects.mean(0) == pytest.approx(expected, abs=0.15)
    deviation = np.sqrt(np.einsum("s,saf->af", weight, (effects - expected) ** 2))
    assert found.effects.std(0) == pytest.approx(deviation, rel=0.15)
    assert found.means.mean(0) == pytest.approx(weight @ mean[:, 0], abs=0.1)
    assert found.better["liking"] == pytest.approx([weight @ one for one in above], abs=0.03)
    assert found.quality == pytest.approx([weight @ one for one in middle], abs=0.06)


def test_intervals_cover() -> None:
    """24 crowds of 40 annotators with 40 verdicts each: the 95% intervals hold 94% of the skills, 96% of
    the likings for length, 97% of those for a side, and 94% of the crowds' means."""
    inside, means = [], []
    for seed in range(24):
        held, effects, _ = drawn(seed)
        found = crowd(held, np.random.default_rng(seed), draws=1000)
        low, high = np.quantile(found.effects, [0.025, 0.975], axis=0)
        inside.append(((low < effects) & (effects < high)).mean(0))
        of_mean = [found.mean_interval(name) for name in ("skill", "length", "side")]
        means.append([not one.excludes(true) for one, true in zip(of_mean, (1.5, 0.3, 0.2), strict=True)])
    covered = np.mean(inside, axis=0)
    assert ((covered > 0.92) & (covered < 0.98)).all(), covered
    assert 0.9 <= np.mean(means) <= 0.99, np.mean(means, axis=0)


def test_an_adversary_and_a_spammer() -> None:
    true = np.array([[1.5, 0.0, 0.0]] * 10 + [[-1.5, 0.0, 0.0], [0.0, 0.0, 0.0], [0.0, 0.0, 2.0], [0.5, 2.0, 0.0]])
    held, effects, d = drawn(0, effects=true, items=700)
    found = crowd(held, np.random.default_rng(0))
    worst = [list(held.annotators).index(name) for name in (10, 11, 12, 13)]
    assert found.effects[:, worst, 0].mean(0) == pytest.approx([-1.5, 0.0, 0.0, 0.5], abs=0.4)
    assert found.interval(10, "skill").high < 0 and not found.interval(11, "skill").excludes(0.0)
    assert found.interval(12, "side").low > 1 and found.interval(13, "length").low > 1
    assert found.interval(10, "skill").n == (held.annotator == worst[0]).sum()
    assert np.abs(found.effects.mean(0) - effects).mean() < 0.25
    order = [int(name) for name in held.items]
    assert np.corrcoef(found.quality, d[order])[0, 1] > 0.7
    right = (found.better["liking"] > 0.5) == (d[order] > 0)
    sums = np.bincount(held.item, held.outcome - 0.5)
    assert right.mean() > np.where(sums == 0, 0.5, (sums > 0) == (d[order] > 0)).mean()
    worth = found.reliability()
    assert worth[worst[0]] < -0.3 and abs(worth[worst[1]]) < 0.15 and abs(worth[worst[2]]) < 0.15
    assert np.delete(worth, worst).min() > 0.25


def made(effects: list[tuple[float, float, float]], *, lengths: bool = False, sides: bool = False) -> Crowd:
    """A crowd of which everything is known."""
    rows = [(item, who, 1.0, int(sides)) for item in range(99) for who in range(len(effects))]
    held = Verdicts.of(rows, {item: (item - 49) / 20 if lengths else 0.0 for item in range(99)})
    draws = np.tile(np.array(effects), (50, 1, 1))
    nothing = np.zeros(99)
    return Crowd(held, draws, draws.mean(1), draws.std(1), nothing, {}, np.ones(len(effects), dtype=bool))


def test_reliability_by_hand() -> None:
    """Beside an integral over a fine grid; one who goes by side alone is worth nothing."""
    d = np.linspace(-8, 8, 100_001)
    density = np.exp(-(d**2) / 2) / np.exp(-(d**2) / 2).sum()
    integral = [float((density * np.abs(np.tanh(skill * d / 2))).sum()) for skill in (1, 3)]
    assert integral[0] == pytest.approx(0.350, abs=5e-4)
    found = made([(1.0, 0.0, 0.0), (-1.0, 0.0, 0.0), (3.0, 0.0, 0.0), (0.0, 0.0, 5.0)]).reliability()
    assert found == pytest.approx([integral[0], -integral[0], integral[1], 0.0], abs=0.004)
    sided = made([(2.0, 0.0, 0.0), (2.0, 0.0, 3.0)], sides=True).reliability()
    likes = (density * np.sign(d) * (np.tanh(d + 1.5) + np.tanh(d - 1.5)) / 2).sum()
    assert (
        sided == pytest.approx([(density * np.abs(np.tanh(d))).sum(), likes], abs=0.004) and sided[1] < sided[0] / 1.5
    )


def test_what_all_like_is_quality_or_not_as_you_say() -> None:
    """Two who see only length, beside one who sees only what is left: verdicts cannot tell which of them is right."""
    found = made([(0.2, 3.0, 0.0), (0.2, 3.0, 0.0), (3.0, 0.0, 0.0)], lengths=True)
    quality, liking = found.reliability("quality"), found.reliability("liking")
    assert quality[0] > 0.5 and quality[2] < quality[0] and liking[0] < 0.1 and liking[2] > 0.6
    with pytest.raises(ValueError, match="shared 'taste'; choose one of quality, liking"):
        found.reliability("taste")  # type: ignore[arg-type]
    held, *_ = drawn(0, mean=(1.0, 2.0, 0.0), spread=(0.1, 0.1, 0.1), items=200)
    told = crowd(held, np.random.default_rng(0), draws=300)
    longer = held.length > 0.7
    assert told.better["quality"][longer].mean() > 0.95 and told.better["liking"][longer].mean() < 0.6


def test_the_same_verdicts_the_other_way_up() -> None:
    """Nothing of an annotator depends on which response of an item is called the first."""
    held, *_ = drawn(5, items=300, people=8)
    rng = np.random.default_rng(0)
    turn = rng.choice([-1.0, 1.0], size=300)
    other = Verdicts(
        held.item,
        held.annotator,
        np.where(turn[held.item] > 0, held.outcome, 1 - held.outcome),
        held.side * turn[held.item],
        held.length * turn,
        held.items,
        held.annotators,
    )
    one, two = (crowd(verdicts, np.random.default_rng(0), draws=4000) for verdicts in (held, other))
    assert one.effects.mean(0) == pytest.approx(two.effects.mean(0), abs=0.08)
    assert one.better["quality"] == pytest.approx(
        np.where(turn > 0, two.better["quality"], 1 - two.better["quality"]), abs=0.05
    )


def test_a_tie_is_half_of_each() -> None:
    """Ties say that d is small: an item that all call a tie has neither better."""
    rows = [(item, who, (1.0, 0.0, 0.5)[item % 3], 0) for item in range(60) for who in range(4)]
    found = crowd(Verdicts.of(rows), np.random.default_rng(0))
    assert found.better["quality"][2::3] == pytest.approx(0.5, abs=0.03)
    assert found.better["quality"][0::3].min() > 0.97 and found.better["quality"][1::3].max() < 0.03
    assert np.isfinite(found.effects).all()  # all agree on everything; the priors hold skills


def test_who_has_no_others() -> None:
    """His skill is the crowd's whatever he says, and as unsure as that of one who was never seen."""
    held, *_ = drawn(0, people=8, items=150)
    shared = list(zip(held.item, held.annotator, held.outcome, held.side, strict=True))
    rows = [(int(i), int(a), float(y), int(s)) for i, a, y, s in shared]
    rows += [(1000 + item, "alone", 1.0, (1, -1)[item % 2]) for item in range(20)]
    found = crowd(Verdicts.of(rows), np.random.default_rng(0), draws=6000)
    place = found.verdicts.annotators.index("alone")
    assert not found.with_others[place] and found.with_others.sum() == 8
    lone, mean = found.interval("alone", "skill"), found.mean_interval("skill")
    assert lone.mean == pytest.approx(mean.mean, abs=0.2) and lone.high - lone.low > mean.high - mean.low


def test_refusals() -> None:
    with pytest.raises(ValueError, match=r"no two annotators judged the same item \(2 items, 2 annotators\)"):
        crowd(Verdicts.of([(0, "a", 1.0, 0), (1, "b", 1.0, 0)]), np.random.default_rng(0))
    with pytest.raises(ValueError, match="none was given"):
        Verdicts.of([])
    with pytest.raises(ValueError, match=r"verdict 1: outcome is 2; give 1"):
        Verdicts.of([(0, "a", 1.0, 0), (0, "b", 2, 0)])
    with pytest.raises(ValueError, match=r"verdict 0: side is 3; give 1"):
        Verdicts.of([(0, "a", 1.0, 3)])
    with pytest.raises(ValueError, match=r"smoothing is -1; it must be 0 or more"):
        dawid_skene(rated([GOOD, GOOD], items=3)[0], smoothing=-1)
