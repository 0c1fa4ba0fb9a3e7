"""Effects in the reward's own standard deviation, with intervals that hold prompts together.

An effect is a ratio: what an edit moves the reward by, over how far rewards of responses to one prompt lie apart. Both
are sums over prompts, so its error is that of the sums' influences (the delta method by clusters): the spread's own
error counts.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy.special import stdtr, stdtrit

from kilter.stats.intervals import Floats, Integers, Interval


class Spread(NamedTuple):
    """How far the rewards of responses to one prompt lie apart: s^2 = sum_c squares_c / sum_c freedom_c."""

    squares: Floats
    """float[C], of each prompt sum (r - its mean)^2."""
    freedom: Floats
    """float[C], its responses less one."""

    @property
    def value(self) -> float:
        """s."""
        return float(np.sqrt(self.squares.sum() / self.freedom.sum()))

    @property
    def influence(self) -> Floats:
        """float[C]: what each prompt moves s by."""
        s = self.value
        found: Floats = (self.squares - s * s * self.freedom) / (2 * s * self.freedom.sum())
        return found


class Effect(NamedTuple):
    """An estimate with its standard error."""

    value: float
    error: float
    prompts: int
    """Of which it was measured."""

    @property
    def interval(self) -> Interval:
        """95%, Student's t with one degree of freedom less than prompts."""
        if self.prompts < 2:
            return Interval(self.value, -np.inf, np.inf, self.prompts)
        half = float(stdtrit(self.prompts - 1, 0.975)) * self.error
        return Interval(self.value, self.value - half, self.value + half, self.prompts)

    def beyond(self, threshold: float, *, both: bool) -> float:
        """p of an effect of `threshold` at most: above it, or (`both`) away from 0 on either side."""
        if self.prompts < 2:
            return 1.0
        distance = (abs(self.value) if both else self.value) - threshold
        if self.error == 0:
            return 0.0 if distance > 0 else 1.0
        p = float(stdtr(self.prompts - 1, -distance / self.error))
        return min(1.0, 2 * p) if both else p


def spread_of(rewards: Sequence[Floats]) -> Spread:
    """From the rewards of the responses to each of C prompts."""
    squares = np.array([float(((one - one.mean()) ** 2).sum()) if len(one) else 0.0 for one in rewards])
    return Spread(squares, np.array([max(0.0, len(one) - 1.0) for one in rewards]))


def slope(changes: Floats, sizes: Floats, prompt: Integers, spread: Spread) -> Effect:
    """Change of the reward for an edit of size 1, in standard deviations.

        effect = sum x d / (s sum x^2)

    Args:
        changes: float[N], d, what each edit moved the reward by. sizes: float[N], x; 1 of an edit without a size.
        prompt: int[N] in 0..C-1, the prompt of each.
    """
    raw = float(sizes @ changes) / float(sizes @ sizes)
    parts = np.bincount(prompt, sizes * (changes - raw * sizes), len(spread.squares)) / float(sizes @ sizes)
    return in_spreads(raw, parts, len(np.unique(prompt)), spread)


def in_spreads(raw: float, influence: Floats, prompts: int, spread: Spread) -> Effect:
    """raw / s, from the influence of each prompt on `raw`, float[C]."""
    s = spread.value
    value = raw / s
    parts = (influence - value * spread.influence) / s
    return Effect(value, float(np.sqrt(prompts / max(prompts - 1, 1) * (parts @ parts))), prompts)


def within(rewards: Sequence[Floats], columns: Sequence[Floats], spread: Spread) -> list[Effect]:
    """Least squares of rewards on columns, both less their mean over each prompt; one effect for each column.

    Args:
        rewards: of each of C prompts float[k]. columns: of each of C prompts float[k, P].
    Raises:
        ValueError: a column does not differ within prompts, or two say the same.
    """
    y = np.concatenate([one - one.mean() for one in rewards])
    x = np.concatenate([one - one.mean(0) for one in columns])
    prompt = np.repeat(np.arange(len(rewards)), [len(one) for one in rewards])
    gram = x.T @ x
    if np.linalg.matrix_rank(x) < x.shape[1]:
        raise ValueError("responses to one prompt do not differ in what the reward is regressed on")
    inverse = np.linalg.inv(gram)
    found = inverse @ (x.T @ y)
    scores = (x * (y - x @ found)[:, None]) @ inverse
    parts = np.stack([np.bincount(prompt, column, len(rewards)) for column in scores.T])
    return [in_spreads(float(value), part, len(rewards), spread) for value, part in zip(found, parts, strict=True)]


def ratio(above: Floats, below: Floats) -> Effect:
    """log2 of a ratio of means over the same prompts.

    log2(mean a / mean b),   influence of a prompt: (a_c / mean a - b_c / mean b) / (n log 2)
    """
    n = len(above)
    parts = (above / above.mean() - below / below.mean()) / (n * np.log(2))
    value = float(np.log2(above.mean() / below.mean()))
    return Effect(value, float(np.sqrt(n / max(n - 1, 1) * (parts @ parts))), n)


def holm(values: Sequence[float]) -> list[float]:
    """p-values so that, below a level, one of them is wrong with that probability at most (Holm 1979).

    Of 0.01, 0.04, 0.03: 0.03, 0.06, 0.06.
    """
    order = np.argsort(values, kind="stable")
    found, largest = [1.0] * len(values), 0.0
    for place, at in enumerate(order.tolist()):
        largest = max(largest, min(1.0, (len(values) - place) * values[at]))
        found[at] = largest
    return found
