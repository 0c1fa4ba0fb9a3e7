"""Ratings of whole clusters drawn again, beside the sandwich."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from kilter.stats import redrawn as module
from kilter.stats.likelihood import Scale
from kilter.stats.rankings import Rankings, rate_rankings
from kilter.stats.ratings import Comparisons, rate
from kilter.stats.redrawn import redrawn


def judged(seed: int, *, votes: int = 4000, models: int = 5, people: int = 100, prompts: int = 100):
    """Votes of annotators, on prompts, that each see strengths in a way of their own."""
    rng = np.random.default_rng(seed)
    who, asked = rng.integers(people, size=votes), rng.integers(prompts, size=votes)
    own = np.linspace(-0.5, 0.5, models) + 0.6 * rng.normal(size=(people, models))[who]
    own = own + 0.6 * rng.normal(size=(prompts, models))[asked]
    shown = rng.permuted(np.tile(np.arange(models), (votes, 1)), axis=1)[:, :3]
    ranks = (-np.take_along_axis(own, shown, 1) - rng.gumbel(size=shown.shape)).argsort(1).argsort(1)
    return shown, ranks, who.tolist(), asked.tolist()


@pytest.mark.parametrize("kinds", [(), ("annotator",), ("annotator", "prompt")])
@pytest.mark.parametrize("whole", [False, True])
def test_it_is_as_wide_as_the_sandwich(whole: bool, kinds: tuple[str, ...]) -> None:
    """To the noise of 400 draws, 4% of a width each way. Of two kinds of clusters its variance is the sum of those by
    annotator, by prompt and by both at once."""
    shown, ranks, who, asked = judged(0)
    columns = {"annotator": who, "prompt": asked, "both": list(zip(who, asked, strict=True))}

    def made(*names: str) -> tuple[Comparisons | Rankings, Scale]:
        clusters = {name: columns[name] for name in names}
        if whole:
            rankings = [(a.tolist(), r.tolist()) for a, r in zip(shown, ranks, strict=True)]
            data: Comparisons | Rankings = Rankings.of(rankings, clusters=clusters)
            return data, rate_rankings(data)
        rows = [(int(a[0]), int(a[1]), float(r[0] < r[1])) for a, r in zip(shown, ranks, strict=True)]
        data = Comparisons.of(rows, clusters=clusters)
        return data, rate(data)

    data, scale = made(*kinds)
    if len(kinds) == 2:
        summed = sum(made(name)[1].covariance for name in columns)
        scale = replace(scale, covariance=summed)
    found = redrawn(data, np.random.default_rng(1), draws=400)
    assert found.unrated == 0 and found.draws.shape == (400, 5) and found.strength == pytest.approx(scale.strength)
    ratios = []
    for one, other in ((0, 1), (1, 2), (2, 3), (3, 4), (4, 0)):
        mine, theirs = (held.interval(one, against=other) for held in (found, scale))
        assert mine.mean == pytest.approx(theirs.mean) and abs(mine.low + mine.high - 2 * mine.mean) < 0.06
        ratios.append((mine.high - mine.low) / (theirs.high - theirs.low))
    assert 0.93 < np.mean(ratios) < 1.07, ratios
    assert found.number == (100 if kinds else 4000)


def test_draws_of_clusters_are_wider_than_draws_of_votes() -> None:
    shown, ranks, who, _ = judged(2)
    rows = [(int(a[0]), int(a[1]), float(r[0] < r[1])) for a, r in zip(shown, ranks, strict=True)]
    widths = []
    for clusters in ({}, {"annotator": who}):
        draws = redrawn(Comparisons.of(rows, clusters=clusters), np.random.default_rng(0), draws=200)
        found = draws.interval(4, against=0)
        widths.append(found.high - found.low)
    assert widths[1] > 1.3 * widths[0]


def test_a_draw_is_a_fit_of_the_drawn_votes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights by hand: as if the rows stood in the data so often."""
    rows = [("a", "b", 1.0), ("b", "c", 1.0), ("c", "a", 1.0), ("b", "a", 0.5)]
    weights = np.array([2.0, 1.0, 3.0, 1.0])
    monkeypatch.setattr(module, "_weights", lambda *_: weights)
    again = [row for row, weight in zip(rows, weights, strict=True) for _ in range(int(weight))]
    for ties in ("half", "davidson"):
        found = redrawn(Comparisons.of(rows), np.random.default_rng(0), draws=1, ties=ties)
        assert found.draws[0] == pytest.approx(rate(Comparisons.of(again), ties=ties).strength, abs=1e-9)


def test_draws_that_cannot_be_rated_are_counted() -> None:
    """b has one win in ten votes: a draw without it has no rating, (9/10)^10 = 35% of all."""
    rows = [("a", "b", 1.0)] * 9 + [("b", "a", 1.0)]
    found = redrawn(Comparisons.of(rows), np.random.default_rng(0), draws=500)
    assert abs(found.unrated / 500 - 0.9**10) < 0.06 and len(found.draws) == 500 - found.unrated
    with pytest.raises(ValueError, match="never lost to the others"):
        redrawn(Comparisons.of(rows[:9]), np.random.default_rng(0))
    ring = Comparisons.of([(place, (place + 1) % 12, 1.0) for place in range(12)])  # whole in 1 of 18,000 draws
    with pytest.raises(ValueError, match="none of 3 draws"):
        redrawn(ring, np.random.default_rng(0), draws=3)
