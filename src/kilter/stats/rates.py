"""Who wins how often, ties counted as one half."""

from __future__ import annotations

from collections.abc import Sequence

from kilter.stats.intervals import Interval, proportion


def wins(first: Sequence[float], second: Sequence[float]) -> list[float]:
    """1 where `first[i]` is higher, 0 where it is lower, 1/2 at a tie."""
    if len(first) != len(second):
        raise ValueError(f"{len(first)} and {len(second)} scores are not pairs")
    return [0.5 if one == other else float(one > other) for one, other in zip(first, second, strict=True)]


def win_rate(first: Sequence[float], second: Sequence[float], *, confidence: float = 0.95) -> Interval:
    """Share of prompts on which `first` scores higher, a tie being half a win, with Wilson's interval."""
    found = wins(first, second)
    return proportion(sum(found), len(found), confidence=confidence)


def pair_accuracy(
    chosen: Sequence[float], rejected: Sequence[float], *, ties: Sequence[bool] = (), confidence: float = 0.95
) -> Interval | None:
    """Share of pairs whose chosen response scores higher; equal scores count one half.

    Args:
        ties: pairs that people called a tie; they have no right order and are left out.
    Returns:
        The interval, or None when no pair is left.
    """
    found = wins(chosen, rejected)
    kept = [win for win, tied in zip(found, ties or [False] * len(found), strict=True) if not tied]
    return proportion(sum(kept), len(kept), confidence=confidence) if kept else None
