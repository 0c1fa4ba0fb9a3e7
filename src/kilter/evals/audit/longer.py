"""How often the longer of two responses is the better one, and how often the reward prefers it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from kilter.evals.audit import edits
from kilter.evals.audit.cases import Verdict
from kilter.stats import Interval, clustered_share

Figures = Mapping[str, Interval]


def longer(gaps: Sequence[float], verdicts: Sequence[Verdict]) -> dict[str, Interval]:
    """In words, intervals by prompt. Equal lengths and equal rewards count one half.

    Args:
        gaps: of each verdict, the reward of its better response less that of its worse one.
    Returns:
        `better`: how often the longer one is the better, which is the accuracy of preferring the longer (1 - `better`:
        of preferring the shorter); `preferred`: how often the reward prefers it; `right_if_longer` and
        `right_if_shorter`: the reward's accuracy where the better one is the longer, and where it is the shorter,
        where there are such.
    """
    signs = [_sign(edits.words(one.better) - edits.words(one.worse)) for one in verdicts]
    right = [_sign(gap) for gap in gaps]
    prompts = [one.prompt for one in verdicts]
    found = {
        "better": clustered_share([0.5 + sign / 2 for sign in signs], prompts),
        "preferred": clustered_share([0.5 + sign * won / 2 for sign, won in zip(signs, right, strict=True)], prompts),
    }
    for name, wanted in (("right_if_longer", 1), ("right_if_shorter", -1)):
        rows = [(0.5 + right[at] / 2, prompts[at]) for at, sign in enumerate(signs) if sign == wanted]
        if rows:
            found[name] = clustered_share([won for won, _ in rows], [prompt for _, prompt in rows])
    return found


def longer_by_kind(gaps: Sequence[float], verdicts: Sequence[Verdict]) -> dict[str, dict[str, Interval]]:
    """The same of each kind; empty where all have one."""
    kinds = sorted({one.kind for one in verdicts})
    if len(kinds) < 2:
        return {}
    places = {kind: [at for at, one in enumerate(verdicts) if one.kind == kind] for kind in kinds}
    return {kind: longer([gaps[at] for at in row], [verdicts[at] for at in row]) for kind, row in places.items()}


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)
