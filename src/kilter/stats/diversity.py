"""How different the answers of a model are: distinct n-grams, their expectation-adjusted share, self-BLEU.

All compare sets of texts of equal number only: each depends on how many texts it is given. Texts are compared in lower
case, a word or a punctuation mark being one token. A text with fewer than n tokens counts as one n-gram, so that a
model which falls silent has diversity near 0 and not an undefined one.
"""

from __future__ import annotations

import math
import re
from bisect import bisect_left
from collections import Counter
from collections.abc import Sequence

TOKEN = re.compile(r"\w+|[^\w\s]")
BERT_VOCABULARY = 30_522
"""Vocabulary size with which expectation-adjusted distinct is usually reported."""

Gram = tuple[str, ...]


def tokens(text: str) -> list[str]:
    """Words and punctuation marks in lower case; an empty text is one token of its own."""
    return TOKEN.findall(text.lower()) or [""]


def distinct_n(texts: Sequence[str], n: int = 2) -> float:
    """Distinct n-grams divided by all n-grams of the texts. Li et al. 2016, arXiv 1510.03055, section 4.

    Returns:
        In (0, 1]; 1 when no n-gram comes twice. Of "a b" and "a b" with n = 1: 0.5. It falls with the texts' length.
    """
    grams = _grams(texts, n)
    return len(grams) / grams.total()


def ead(texts: Sequence[str], n: int = 1, vocabulary: int = BERT_VOCABULARY) -> float:
    """Expectation-adjusted distinct: distinct n-grams divided by how many C random draws from V would give.

        EAD = D / (V (1 - ((V - 1) / V)^C))

    D distinct and C all n-grams, V the vocabulary size. Liu et al. 2022, arXiv 2202.13587. Unlike `distinct_n` it does
    not fall with the texts' length alone. It may exceed 1 when the draws are more even than random ones.

    Args:
        vocabulary: V > 1; keep it the same for all that is compared.
    """
    grams = _grams(texts, n)
    expected = -vocabulary * math.expm1(grams.total() * math.log1p(-1 / vocabulary))
    return len(grams) / expected


def self_bleu(texts: Sequence[str], max_n: int = 4) -> float:
    """Mean BLEU of each text against all others: 1 when all are alike, near 0 when they share nothing.

        BLEU = min(1, exp(1 - r / c)) * prod_n p_n^(1 / m),   n = 1..m

    p_n is the share of the text's n-grams that another text has (each counted at most as often as in the text with
    most), c its length, r the length nearest to it among the others (of two, the shorter). Zhu et al. 2018, arXiv
    1802.01886; BLEU: Papineni et al. 2002. Departures: m is the smaller of `max_n` and c, so that two equal short texts
    give 1; a p_n of 0 counts as 0.1 / (number of n-grams), the first smoothing of Chen and Cherry 2014.

    Returns:
        In [0, 1]; 0 for one text, which has nothing to resemble.
    """
    if not texts:
        raise ValueError("self-BLEU needs at least one text")
    words = [tokens(text) for text in texts]
    if len(words) == 1:
        return 0.0
    lengths = sorted(map(len, words))
    logs = [0.0] * len(words)
    for n in range(1, max_n + 1):
        counts = [_count(text, n) if len(text) >= n else Counter[Gram]() for text in words]
        best = _two_highest(counts)
        for place, own in enumerate(counts):
            if not own:
                continue
            matched = sum(min(count, _highest_elsewhere(best[gram], count)) for gram, count in own.items())
            logs[place] += math.log((matched or 0.1) / own.total()) / min(max_n, len(words[place]))
    scores = [
        math.exp(min(0.0, 1 - _nearest_other(lengths, len(text)) / len(text)) + logs[place])
        for place, text in enumerate(words)
    ]
    return sum(scores) / len(scores)


def _count(text: Sequence[str], n: int) -> Counter[Gram]:
    return Counter(tuple(text[place : place + n]) for place in range(max(1, len(text) - n + 1)))


def _grams(texts: Sequence[str], n: int) -> Counter[Gram]:
    if not texts or n < 1:
        raise ValueError(f"{len(texts)} texts have no {n}-grams")
    counts: Counter[Gram] = Counter()
    for text in texts:
        counts.update(_count(tokens(text), n))
    return counts


def _two_highest(counts: Sequence[Counter[Gram]]) -> dict[Gram, tuple[int, int]]:
    """n-gram -> its highest and second highest count in one text: enough to leave any text out."""
    best: dict[Gram, tuple[int, int]] = {}
    for own in counts:
        for gram, count in own.items():
            first, second = best.get(gram, (0, 0))
            best[gram] = (count, first) if count > first else (first, max(second, count))
    return best


def _highest_elsewhere(highest: tuple[int, int], own: int) -> int:
    """The highest count among the other texts. If ours is the highest, it is the second (equal to it at a draw)."""
    return highest[1] if own == highest[0] else highest[0]


def _nearest_other(lengths: Sequence[int], own: int) -> int:
    """The length nearest to `own` in the sorted `lengths`, one entry of `own` itself left out."""
    place = bisect_left(lengths, own)
    near = [lengths[at] for at in (place - 1, place + 1) if 0 <= at < len(lengths)]
    return min(near, key=lambda length: (abs(length - own), length))
