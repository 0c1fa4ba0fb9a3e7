"""A scorer must prefer better to worse on held-out pairs, surely, or it pays nobody."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from kilter.errors import CheckError
from kilter.records import Message, PreferencePair, Sample, Score
from kilter.scorers import check_scorer


class Fixed:
    """Right on the first `right` of the pairs, level on the next `level`, unscored on the next `unscored`."""

    name = "fixed"

    def __init__(self, right: int, level: int = 0, unscored: int = 0, sign: float = 1.0) -> None:
        self.right, self.level, self.unscored, self.sign = right, level, unscored, sign

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [Score(self._value(sample)) for sample in samples]

    def _value(self, sample: Sample) -> float | None:
        at = int(sample.messages[0].content)
        if self.right + self.level <= at < self.right + self.level + self.unscored:
            return None
        if self.right <= at < self.right + self.level:
            return 0.0
        return self.sign * (1.0 if (sample.text == "better") == (at < self.right) else -1.0)


def pairs(num_pairs: int) -> list[PreferencePair]:
    return [
        PreferencePair(prompt=(Message("user", str(at)),), chosen="better", rejected="worse") for at in range(num_pairs)
    ]


def test_a_good_scorer_passes_with_its_interval() -> None:
    found = check_scorer(Fixed(70), pairs(100))
    assert found.passed and found.sure and found.accuracy.mean == 0.7 and found.accuracy.n == 100
    assert found.accuracy.low == pytest.approx(0.6042, abs=1e-4)  # Wilson's for 70 of 100
    assert found.unscored == 0 and found.scorer == "fixed"


def test_a_scorer_above_chance_by_chance_perhaps_passes_and_is_not_sure() -> None:
    found = check_scorer(Fixed(59), pairs(100))
    assert found.passed and not found.sure
    assert str(found).startswith("scorer fixed: prefers the better answer on 59.0% of 100 held-out pairs (95% interval")


@pytest.mark.parametrize("right", [50, 30])
def test_a_scorer_no_better_than_chance_is_refused_by_name(right: int) -> None:
    with pytest.raises(CheckError, match=rf"scorer fixed: prefers the better answer on {right}\.0% of 100"):
        check_scorer(Fixed(right), pairs(100))
    assert not check_scorer(Fixed(right), pairs(100), refuse=False).passed


def test_a_negated_scorer_is_told_so() -> None:
    with pytest.raises(CheckError, match="is its sign turned round"):
        check_scorer(Fixed(70, sign=-1.0), pairs(100))


def test_level_scores_are_half_right_and_unscored_pairs_are_counted_apart() -> None:
    found = check_scorer(Fixed(60, level=20, unscored=20), pairs(100))
    assert found.accuracy.mean == pytest.approx(70 / 80) and found.accuracy.n == 80 and found.unscored == 20
    assert not check_scorer(Fixed(0, level=50), pairs(50), refuse=False).passed


def test_ties_teach_nothing_and_no_pair_is_refused() -> None:
    tied = PreferencePair(prompt=(Message("user", "0"),), chosen="better", rejected="worse", tie=True)
    assert check_scorer(Fixed(70), [*pairs(100), tied]).accuracy.n == 100
    with pytest.raises(CheckError, match="none of 0 held-out pairs"):
        check_scorer(Fixed(70), [tied])
    with pytest.raises(CheckError, match="none of 9 held-out pairs"):
        check_scorer(Fixed(0, unscored=9), pairs(9))
