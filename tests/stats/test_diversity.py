"""Diversity figures against slow, plain versions of their definitions."""

from __future__ import annotations

import math
import random
import time
from collections import Counter

import pytest

from kilter.stats.diversity import distinct_n, ead, self_bleu, tokens


def slow_self_bleu(texts: list[str], max_n: int = 4) -> float:
    """As defined: every text against all others, no shortcut."""
    words = [text.lower().split() for text in texts]
    total = 0.0
    for place, text in enumerate(words):
        others = words[:place] + words[place + 1 :]
        orders = min(max_n, len(text))
        logs = 0.0
        for n in range(1, orders + 1):
            grams = [tuple(text[i : i + n]) for i in range(len(text) - n + 1)]
            matched = 0
            for gram, count in Counter(grams).items():
                most = max(sum(tuple(o[i : i + n]) == gram for i in range(len(o) - n + 1)) for o in others)
                matched += min(count, most)
            logs += math.log((matched if matched else 0.1) / len(grams)) / orders
        nearest = min((len(other) for other in others), key=lambda length: (abs(length - len(text)), length))
        penalty = 1.0 if len(text) > nearest else math.exp(1 - nearest / len(text))
        total += penalty * math.exp(logs)
    return total / len(words)


def sentences(seed: int, count: int, words: int, longest: int = 12) -> list[str]:
    rng = random.Random(seed)
    return [" ".join(f"w{rng.randrange(words)}" for _ in range(rng.randint(1, longest))) for _ in range(count)]


@pytest.mark.parametrize("seed", range(8))
def test_self_bleu_is_the_plain_definition(seed: int) -> None:
    texts = sentences(seed, count=12, words=3 + 5 * seed)
    assert self_bleu(texts) == pytest.approx(slow_self_bleu(texts), rel=1e-12)
    assert self_bleu(texts, max_n=2) == pytest.approx(slow_self_bleu(texts, 2), rel=1e-12)


def test_self_bleu_at_its_ends() -> None:
    assert self_bleu(["the same words again and again"] * 5) == pytest.approx(1.0)
    assert self_bleu(["yes", "yes"]) == pytest.approx(1.0)
    assert self_bleu(["", ""]) == pytest.approx(1.0)
    assert self_bleu(["a b c d e f", "g h i j k l"]) < 0.05
    assert self_bleu(["alone"]) == 0.0
    with pytest.raises(ValueError, match="at least one"):
        self_bleu([])


def test_self_bleu_by_hand() -> None:
    # "a b c" against "a b d": p1 = 2/3, p2 = 1/2, p3 = 0.1 / 1, no penalty; both texts alike.
    assert self_bleu(["a b c", "a b d"]) == pytest.approx((2 / 3 * 1 / 2 * 0.1) ** (1 / 3))
    # "a b" against "a b c d": both orders match, penalty exp(1 - 4/2); the other way p1 = 2/4, p2 = 1/3, p3, p4 = 0.
    long = (2 / 4 * 1 / 3 * 0.1 / 2 * 0.1 / 1) ** (1 / 4)
    assert self_bleu(["a b", "a b c d"]) == pytest.approx((math.exp(-1) + long) / 2)


def test_self_bleu_is_fast() -> None:
    texts = sentences(0, count=1000, words=500, longest=60)
    started = time.perf_counter()
    self_bleu(texts)
    assert time.perf_counter() - started < 5


def test_distinct_n_by_hand() -> None:
    assert distinct_n(["a b", "a b"], 1) == 0.5
    assert distinct_n(["a b c", "a b d"], 2) == 3 / 4
    assert distinct_n(["a b c", "A, b."], 1) == 5 / 7
    assert distinct_n(["no", "no", "yes"], 2) == 2 / 3  # a text shorter than n is one n-gram
    assert distinct_n([""] * 50, 2) == 1 / 50


def test_ead_by_hand() -> None:
    # V = 2, C = 3: the expected number of distinct ones is 2 (1 - (1/2)^3) = 1.75.
    assert ead(["a b a"], vocabulary=2) == pytest.approx(2 / 1.75)
    assert ead(["a b a", "c"], 1, 10) == pytest.approx(3 / (10 * (1 - 0.9**4)))


def test_ead_does_not_fall_with_length_alone() -> None:
    rng = random.Random(0)
    short, long = ([" ".join(f"w{rng.randrange(200)}" for _ in range(size))] for size in (50, 2000))
    assert distinct_n(short, 1) > 5 * distinct_n(long, 1)
    assert ead(short, vocabulary=200) == pytest.approx(1, abs=0.15)
    assert ead(long, vocabulary=200) == pytest.approx(1, abs=0.05)


def test_nothing_to_measure_is_refused() -> None:
    for figure in (distinct_n, ead):
        with pytest.raises(ValueError, match="no"):
            figure([])


def test_tokens() -> None:
    assert tokens("Don't STOP, 42!") == ["don", "'", "t", "stop", ",", "42", "!"]
    assert tokens(" ") == [""]
