"""Agreement beside scikit-learn, statsmodels and evalica, worked examples of the papers, and real judgements."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Callable
from pathlib import Path

import evalica
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score
from statsmodels.stats.inter_rater import aggregate_raters, fleiss_kappa

from kilter.stats import agreement
from kilter.stats.agreement import Coefficient, Ratings

MEASURES: dict[str, Callable[[Ratings], Coefficient]] = {
    "raw": agreement.raw,
    "cohen": lambda ratings: agreement.cohen(ratings, 0, 1),
    "fleiss": agreement.fleiss,
    "ac1": agreement.ac1,
    "nominal": agreement.alpha,
    "ordinal": lambda ratings: agreement.alpha(ratings, level="ordinal"),
    "interval": lambda ratings: agreement.alpha(ratings, level="interval"),
    "leave_one_out": agreement.leave_one_out,
}


def drawn(
    seed: int = 0, *, items: int = 40, raters: int = 4, categories: int = 4, given: float = 1.0
) -> tuple[np.ndarray, Ratings]:
    """A table [items, raters] with agreement and holes (NaN), and its ratings."""
    rng = np.random.default_rng(seed)
    truth = rng.integers(categories, size=items)
    noise = rng.integers(categories, size=(items, raters))
    table = np.where(rng.random((items, raters)) < 0.6, truth[:, None], noise).astype(float)
    table[rng.random((items, raters)) >= given] = np.nan
    rows = [(i, r, int(table[i, r])) for i, r in np.argwhere(np.isfinite(table)).tolist()]
    return table, Ratings.of(rows, categories=range(categories))


@pytest.mark.parametrize("weights", ["plain", "linear", "quadratic"])
@pytest.mark.parametrize("seed", range(3))
def test_cohen_is_scikit_learn(seed: int, weights: agreement.Weights) -> None:
    table, ratings = drawn(seed, given=0.8)
    for first, second in ((0, 1), (2, 3)):
        both = np.isfinite(table[:, [first, second]]).all(1)
        theirs = cohen_kappa_score(
            table[both, first], table[both, second], weights=None if weights == "plain" else weights, labels=range(4)
        )
        ours = agreement.cohen(ratings, first, second, weights=weights).value()
        assert ours == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("seed", range(3))
def test_fleiss_is_statsmodels(seed: int) -> None:
    table, ratings = drawn(seed, raters=5)
    theirs = fleiss_kappa(aggregate_raters(table.astype(int), 4)[0])
    assert agreement.fleiss(ratings).value() == pytest.approx(theirs, abs=1e-12)


@pytest.mark.parametrize("level", ["nominal", "ordinal", "interval"])
@pytest.mark.parametrize("given", [1.0, 0.5])
@pytest.mark.parametrize("seed", range(3))
def test_alpha_is_evalica(seed: int, given: float, level: agreement.Level) -> None:
    table, ratings = drawn(seed, given=given)
    theirs = evalica.alpha(pd.DataFrame(table.T), distance=level)
    assert agreement.alpha(ratings, level=level).value() == pytest.approx(theirs.alpha, abs=1e-12)


def test_alpha_reads_the_numbers_of_its_categories() -> None:
    rows = [(0, "a", 1.0), (0, "b", 2.0), (1, "a", 2.0), (1, "b", 10.0), (2, "a", 10.0), (2, "b", 10.0)]
    table = pd.DataFrame([[1.0, 2.0, 10.0], [2.0, 10.0, 10.0]])
    for level in ("ordinal", "interval"):
        theirs = evalica.alpha(table, distance=level).alpha
        assert agreement.alpha(Ratings.of(rows), level=level).value() == pytest.approx(theirs, abs=1e-12)
    with pytest.raises(ValueError, match="needs categories that are numbers, not 'no'"):
        agreement.alpha(Ratings.of([(0, "a", "no"), (0, "b", "yes")]), level="interval")


def test_worked_examples() -> None:
    """Krippendorff 2011, section C: four observers, twelve units, 0.743, 0.815 and 0.849. Gwet 2008: two raters who
    say yes to nearly all, 118 and 5 of 125 alike: kappa near 0, AC1 0.94."""
    observers = [
        [1, 2, 3, 3, 2, 1, 4, 1, 2, None, None, None],
        [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, None, 3],
        [None, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, None],
        [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, None],
    ]
    rows = [
        (unit, name, value) for name, row in enumerate(observers) for unit, value in enumerate(row) if value is not None
    ]
    ratings = Ratings.of(rows)
    found = [agreement.alpha(ratings, level=level).value() for level in ("nominal", "ordinal", "interval")]
    assert [round(value, 3) for value in found] == [0.743, 0.815, 0.849]
    pairs = [("yes", "yes")] * 118 + [("yes", "no")] * 5 + [("no", "yes")] * 2
    both = Ratings.of([(place, who, said) for place, pair in enumerate(pairs) for who, said in enumerate(pair)])
    assert agreement.cohen(both, 0, 1).value() == pytest.approx(-0.0234, abs=1e-3)
    assert agreement.ac1(both).value() == pytest.approx(0.9407, abs=1e-3)
    raw = Ratings.of([(0, r, v) for r, v in enumerate("aab")] + [(1, r, "a") for r in range(3)])
    assert agreement.raw(raw).value() == pytest.approx(2 / 3)


def test_leave_one_out_by_hand() -> None:
    """(a, a, a, b): each a is the majority of (a, a, b), b is not: 3 of 4. (a, b): 0. (a, a, b, b): each is against two
    of the other and one of its own: 0. (a, b, c): others tie, neither is it. A lone rating is not judged."""
    rows = [(0, r, v) for r, v in enumerate("aaab")]
    assert agreement.leave_one_out(Ratings.of(rows)).value() == 3 / 4
    rows += [(1, r, v) for r, v in enumerate("ab")] + [(2, r, v) for r, v in enumerate("aabb")] + [(3, 0, "a")]
    assert agreement.leave_one_out(Ratings.of(rows)).value() == 3 / 10
    tied = Ratings.of([(0, r, v) for r, v in enumerate("aab")])  # against (a, b) each a is one of two majorities
    assert agreement.leave_one_out(tied).value() == pytest.approx((0.5 + 0.5 + 0) / 3)


@pytest.mark.parametrize("name", MEASURES)
def test_sums_of_a_draw_are_the_draw(name: str) -> None:
    """What the bootstrap computes from reweighted sums is the coefficient of ratings with those items repeated."""
    table, ratings = drawn(3)
    measure = MEASURES[name]
    coefficient = measure(ratings)
    times = np.random.default_rng(0).multinomial(len(table), np.full(len(table), 1 / len(table)))
    rows, new = [], 0
    for item, count in enumerate(times):
        for _ in range(count):
            rows += [(new, rater, int(table[item, rater])) for rater in range(4)]
            new += 1
    again = measure(Ratings.of(rows, categories=range(4))).value()
    kept = times @ coefficient.parts[: len(times)]
    assert float(coefficient.of(kept)) == pytest.approx(again, abs=1e-12)


@pytest.mark.parametrize("name", MEASURES)
def test_interval_covers(name: str) -> None:
    """95% intervals over 150 items hold the value of twenty thousand in 92 to 98% of 500 draws."""
    measure = MEASURES[name]
    truth = measure(drawn(999, items=20_000)[1]).value()
    inside = 0
    for seed in range(500):
        generator = np.random.default_rng(seed)
        inside += not measure(drawn(seed, items=150)[1]).interval(generator, resamples=200).excludes(truth)
    assert 0.92 <= inside / 500 <= 0.98, inside


def test_interval_is_the_generators() -> None:
    _, ratings = drawn()
    first, again, other = (agreement.alpha(ratings).interval(np.random.default_rng(seed)) for seed in (0, 0, 1))
    assert first == again != other and first.low < first.mean < first.high and first.n == 40


def test_draws_at_once_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    _, ratings = drawn()
    whole = agreement.alpha(ratings).interval(np.random.default_rng(0), resamples=50)
    monkeypatch.setattr(agreement, "DRAWS_AT_ONCE", 400)
    assert agreement.alpha(ratings).interval(np.random.default_rng(0), resamples=50) == whole


def test_who_and_what_pulls_down() -> None:
    """One rater who answers at random, one item on which nobody agrees."""
    rng = np.random.default_rng(0)
    rows = [(item, rater, item % 3) for item in range(30) for rater in "abc"]
    rows += [(item, "d", int(rng.integers(3))) for item in range(30)]
    rows += [("split", rater, value) for rater, value in zip("abc", range(3), strict=True)]
    ratings = Ratings.of(rows)
    raters = agreement.pull_of_raters(ratings, agreement.alpha)
    assert min(raters, key=raters.__getitem__) == "d" and raters["d"] < -0.2 < 0 < raters["a"]
    by_item = agreement.alpha(ratings).pull()
    everyone = [place for place, name in enumerate(ratings.items) if name == "split"]
    without = Ratings.of([row for row in rows if row[0] != "split"])
    whole = agreement.alpha(ratings).value()
    assert by_item[everyone[0]] == pytest.approx(whole - agreement.alpha(without).value())
    assert by_item[everyone[0]] < 0 < by_item.max()


def test_refusals() -> None:
    with pytest.raises(ValueError, match="none was given"):
        Ratings.of([])
    with pytest.raises(ValueError, match="rater 'b' rated item 1 twice"):
        Ratings.of([(1, "b", 0), (2, "b", 0), (1, "b", 1)])
    with pytest.raises(ValueError, match="category 7 is not one of 0, 1"):
        Ratings.of([(1, "b", 7)], categories=[0, 1])
    apart = Ratings.of([(0, "a", 1), (1, "b", 0), (1, "c", 1)])
    with pytest.raises(ValueError, match="'a' and 'b' rated no item in common"):
        agreement.cohen(apart, "a", "b")
    with pytest.raises(ValueError, match="here they have 1 to 2: use alpha or ac1"):
        agreement.fleiss(apart)
    with pytest.raises(ValueError, match="level 'ratio'; choose one of nominal"):
        agreement.alpha(apart, level="ratio")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="weights 'cubic'; choose one of plain"):
        agreement.cohen(apart, "b", "c", weights="cubic")  # type: ignore[arg-type]
    same = Ratings.of([(item, rater, "yes") for item in range(3) for rater in "ab"])
    for measure in (agreement.alpha, agreement.fleiss, lambda r: agreement.cohen(r, "a", "b")):
        assert np.isnan(measure(same).value())
        with pytest.raises(ValueError, match="all ratings are of one category"):
            measure(same).interval(np.random.default_rng(0))
    assert agreement.raw(same).value() == agreement.ac1(same).value() == 1.0


def test_annotators_of_xstest(shared_data: Path) -> None:
    """The two annotators of each model's completions; the figures are those that scikit-learn gives."""
    with gzip.open(shared_data / "xstest" / "completions_annotated.jsonl.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    found = {}
    for model in sorted({row["model"] for row in rows}):
        mine = [row for row in rows if row["model"] == model]
        ratings = Ratings.of([(row["id"], who, row[f"annotation_{who}"]) for row in mine for who in (1, 2)])
        found[model] = round(agreement.cohen(ratings, 1, 2).value(), 3)
    assert found == {
        "gpt4": 0.941,
        "llama2new": 0.884,
        "llama2orig": 0.957,
        "mistralguard": 0.879,
        "mistralinstruct": 0.925,
    }


def test_crowd_of_llmfao(shared_data: Path) -> None:
    with (shared_data / "llmfao" / "crowd-comparisons.csv").open(encoding="utf-8") as lines:
        rows = list(csv.DictReader(lines))
    values = {"left": 0, "tie": 1, "right": 2}
    ratings = Ratings.of([(row["id"], row["worker"], values[row["winner"]]) for row in rows])
    assert round(agreement.alpha(ratings).value(), 3) == 0.291
    assert round(agreement.alpha(ratings, level="interval").value(), 3) == 0.288
