"""What an annotator's work takes: the one place where simulated judgements get their seconds.

    a screen = start + words read x a word x difficulty + comparisons(k) x a choice + marks x a mark

Reading: adults read non-fiction at 238 words a minute, 0.25 s a word (Brysbaert 2019, J. Mem. Lang. 109); 0.3 leaves
room to go back. Sorting k answers asks log2 k! choices between two, the least that any way of sorting needs on average:
1 of two, 4.6 of four, 18.5 of nine. The seconds of a start, a choice and a mark are assumptions.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Effort:
    """Seconds of each part of the work; by default choices and marks are made within the start."""

    start_seconds: float = 2.0
    """To open a screen and read its prompt, once however many answers it shows."""
    word_seconds: float = 0.3
    """To read a word of an answer, times the item's difficulty."""
    choice_seconds: float = 0.0
    """To decide which of two answers is better."""
    mark_seconds: float = 0.0
    """To give one answer a mark or a thumb."""

    def ranking(self, words: int, difficulty: float, count: int) -> float:
        """Of one screen with `count` answers, `words` long together, put in order. Seconds, to a tenth."""
        return self._screen(words, difficulty, self.choice_seconds * math.log2(math.factorial(count)))

    def marking(self, words: int, difficulty: float, count: int) -> float:
        """Of one screen with `count` answers that each get a mark or a thumb. Seconds, to a tenth."""
        return self._screen(words, difficulty, self.mark_seconds * count)

    def _screen(self, words: int, difficulty: float, deciding: float) -> float:
        return round(self.start_seconds + self.word_seconds * words * difficulty + deciding, 1)
