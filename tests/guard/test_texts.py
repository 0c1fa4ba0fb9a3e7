"""Figures of answers as texts, by hand."""

from __future__ import annotations

import math

import pytest

from kilter.guard import correlation, risen, text_figures, usual
from kilter.guard.texts import phrases, repeats


def test_phrases_are_runs_of_words_with_the_share_of_texts_that_hold_them() -> None:
    found = phrases(["A b a b", "b c"])
    assert found == {"a": 0.5, "b": 1.0, "a b": 0.5, "b a": 0.5, "a b a": 0.5, "b a b": 0.5, "c": 0.5, "b c": 0.5}
    assert phrases([]) == {} == phrases([""])


def test_a_rarity_counts_as_never_said() -> None:
    texts = ["plain words"] * 199 + ["odd one"]
    assert set(usual(texts)) == {"plain", "words", "plain words"}


def test_the_phrase_that_has_risen_most_is_named_at_its_longest() -> None:
    before = usual(["so it is blue", "it is red", "ask me", "who knows"])
    now = ["What a day! it is blue", "What a day! it is red", "What a day! ask me", "who knows"]
    assert risen(now, before) == ("what a day!", 0.75)
    assert risen(["it is blue", "it is red", "hm", "hm"], before) == ("hm", 0.5)
    assert risen([""], before) == ("", 0.0)


@pytest.mark.parametrize(
    ("text", "share"), [("a b c a b c", 1 / 4), ("a a a a a", 2 / 3), ("a b", 0.0), ("", 0.0), ("a b c d", 0.0)]
)
def test_repeats(text: str, share: float) -> None:
    assert repeats(text) == pytest.approx(share)


def test_correlation_is_pearsons_and_0_where_nothing_varies() -> None:
    one, other = [1.0, 2.0, 4.0], [1.0, 3.0, 2.0]
    mean_one, mean_other = 7 / 3, 2.0
    top = sum((a - mean_one) * (b - mean_other) for a, b in zip(one, other, strict=True))
    below = math.sqrt(sum((a - mean_one) ** 2 for a in one) * sum((b - mean_other) ** 2 for b in other))
    assert correlation(one, other) == pytest.approx(top / below)
    assert correlation([1.0, 2.0], [5.0, 3.0]) == pytest.approx(-1.0)
    assert correlation([1.0, 1.0], [1.0, 2.0]) == 0.0 == correlation([1.0], [2.0])


def test_figures_of_a_rollout() -> None:
    answers = [["a b c", "a b c"], ["a", "a b c d"], ["a", "b"], ["a", "b", "c"], ["a"]]
    found = text_figures(answers, [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], [1.0, 1.0, 2.0], [1.0]])
    assert found["same"] == 0.25 and found["tied"] == 0.75 and found["repeats"] == 0.0
    assert found["score_std"] == pytest.approx(math.sqrt(19 / 10 - 1.3**2))
    words = [3, 3, 1, 4, 1, 1, 1, 1, 1, 1]
    assert found["length_pays"] == pytest.approx(correlation([1, 1, 2, 2, 1, 1, 1, 1, 2, 1], words))
    alone = text_figures([["a"], ["b"]], [[1.0], [2.0]])
    assert "same" not in alone and "tied" not in alone
