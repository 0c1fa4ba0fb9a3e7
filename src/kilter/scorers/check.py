"""The check before a scorer may pay anyone: on held-out pairs it must prefer the better answer to the worse."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from kilter.errors import CheckError
from kilter.records import PreferencePair, Sample, Scorer
from kilter.stats import Interval, proportion


@dataclass(frozen=True, slots=True)
class ScorerCheck:
    """What the check found."""

    scorer: str
    accuracy: Interval
    """Share of pairs whose better answer scores higher, with Wilson's 95% interval; equal scores count one half."""
    unscored: int
    """Pairs left out because an answer could not be scored."""

    @property
    def passed(self) -> bool:
        """More often right than wrong."""
        return self.accuracy.mean > 0.5

    @property
    def sure(self) -> bool:
        """So many pairs, or so clear a preference, that chance is ruled out."""
        return self.accuracy.low > 0.5

    def __str__(self) -> str:
        one = self.accuracy
        return (
            f"scorer {self.scorer}: prefers the better answer on {one.mean:.1%} of {one.n} held-out pairs "
            f"(95% interval {one.low:.1%} to {one.high:.1%})"
        )


def check_scorer(scorer: Scorer, pairs: Sequence[PreferencePair], *, refuse: bool = True) -> ScorerCheck:
    """How often `scorer` puts the chosen answer above the rejected one; ties among the pairs are left out.

    Args:
        pairs: held out: not what a reward model was trained on.
        refuse: raise unless it is right on more than half of them; otherwise only report.
    Raises:
        CheckError: refused, by the scorer's name; or no pair could be scored.
    """
    pairs = [pair for pair in pairs if not pair.tie]
    samples = [Sample(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    values = [score.value for score in scorer.score(samples)]
    wins = [
        0.5 if chosen == rejected else float(chosen > rejected)
        for chosen, rejected in zip(values[::2], values[1::2], strict=True)
        if chosen is not None and rejected is not None
    ]
    if not wins:
        raise CheckError(
            f"scorer {scorer.name}: none of {len(pairs)} held-out pairs could be scored, so nothing shows that it "
            "prefers better answers; give it pairs it can read"
        )
    accuracy = proportion(sum(wins), len(wins))
    found = ScorerCheck(scorer.name, accuracy, unscored=len(pairs) - len(wins))
    if refuse and not found.passed:
        remedy = "is its sign turned round?" if accuracy.high < 0.5 else "train it on more or cleaner pairs"
        raise CheckError(f"{found}, which is no better than chance; {remedy}")
    return found
