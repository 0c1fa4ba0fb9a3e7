"""The check before a scorer may pay anyone: on held-out pairs it must prefer the better answer to the worse."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from kilter.errors import CheckError
from kilter.records import PreferencePair, Sample, Scorer, prompt_id
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


def check_scorer(
    scorer: Scorer,
    pairs: Sequence[PreferencePair],
    *,
    refuse: bool = True,
    truths: Mapping[str, Mapping[str, Any]] | None = None,
) -> ScorerCheck:
    """How often `scorer` puts the chosen answer above the rejected one; ties among the pairs are left out.

    Args:
        pairs: held out: not what a reward model was trained on.
        truths: of prompts by their `prompt_id`: pairs carry none, and a verifier leaves what has none unscored.
        refuse: raise unless it is right on more than half of them; otherwise only report.
    Raises:
        CheckError: refused, by the scorer's name; or no pair could be scored.
    """
    pairs = [pair for pair in pairs if not pair.tie]
    known = [(truths or {}).get(prompt_id(pair.prompt), {}) for pair in pairs]
    samples = [
        Sample(pair.prompt, text, truth=truth)
        for pair, truth in zip(pairs, known, strict=True)
        for text in (pair.chosen, pair.rejected)
    ]
    scores = scorer.score(samples)
    values = [score.value for score in scores]
    wins = [
        0.5 if chosen == rejected else float(chosen > rejected)
        for chosen, rejected in zip(values[::2], values[1::2], strict=True)
        if chosen is not None and rejected is not None
    ]
    if not wins:
        reasons = [score.reason for score in scores if score.value is None and score.reason]
        why = f" ({reasons[0]})" if reasons else ""
        raise CheckError(
            f"scorer {scorer.name}: none of {len(pairs)} held-out pairs could be scored, so nothing shows that it "
            f"prefers better answers{why}; give it pairs it can read"
        )
    accuracy = proportion(sum(wins), len(wins))
    found = ScorerCheck(scorer.name, accuracy, unscored=len(pairs) - len(wins))
    if refuse and not found.passed:
        remedy = (
            "is its sign turned round?"
            if accuracy.high < 0.5
            else "train it on more or cleaner pairs, or mend its rules"
        )
        raise CheckError(f"{found}, which is no better than chance; {remedy}")
    return found
