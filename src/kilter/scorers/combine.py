"""How the numbers of several heads make one reward: mean, worst case, mean less variance, vote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from kilter.errors import ConfigError
from kilter.stats.intervals import Floats

How = Literal["mean", "min", "mean_minus_variance", "vote"]


@dataclass(frozen=True, slots=True)
class Combination:
    """A function of what K heads say of a response.

        mean:                 sum_k w_k r_k / sum_k w_k
        min:                  min_k r_k                             the worst case
        mean_minus_variance:  mean_k r_k - c var_k r_k              (K - 1 in the denominator of the variance)
        vote:                 sum_k w_k sigmoid(r_k - u_k) / sum_k w_k

    The first three are the objectives of Coste et al. 2023, arXiv 2310.02743, section 3. `vote` is the chance, under
    Bradley-Terry, that a head's people prefer the response to a usual one, whose reward is u_k: no group is louder for
    having larger numbers. Comparisons leave each head's level free: `centering` in training fixes it, without which
    minimum and variance would tell levels and not doubts.
    """

    how: How = "mean"
    variance_coef: float = 1.0
    weights: tuple[float, ...] = ()
    """One for each head; empty: equal."""
    usual: tuple[float, ...] = ()
    """u_k; empty: 0."""

    @classmethod
    def of(cls, said: Mapping[str, Any], labels: Sequence[str], usual: Sequence[float]) -> Combination:
        """From what a recipe says: `how`, `variance_coef`, and `weights` by label.

        Raises:
            ConfigError: an unknown way, or a weight for a head that there is not.
        """
        how, named = said.get("how", "mean"), said.get("weights", {})
        if how not in get_args(How):
            raise ConfigError(f"combine.how is {how!r}; choose one of {', '.join(get_args(How))}")
        if unknown := sorted(set(named) - set(labels)):
            raise ConfigError(f"combine.weights names {unknown[0]!r}; the reward model has {', '.join(labels)}")
        weights = tuple(float(named.get(label, 1.0)) for label in labels) if named else ()
        if named and not sum(weights):
            raise ConfigError("combine.weights are all 0; give one head a weight above 0")
        return cls(how, float(said.get("variance_coef", 1.0)), weights, tuple(usual))

    def __call__(self, values: Floats) -> Floats:
        """float[K, n] -> float[n]."""
        if not values.size or (len(values) == 1 and self.how != "vote"):
            alone: Floats = values[0]
            return alone
        if self.how == "min":
            worst: Floats = values.min(0)
            return worst
        if self.how == "mean_minus_variance":
            careful: Floats = values.mean(0) - self.variance_coef * values.var(0, ddof=1)
            return careful
        if self.how == "vote":
            usual = np.array(self.usual or (0.0,) * len(values))[:, None]
            values = 1 / (1 + np.exp(-np.clip(values - usual, -500, 500)))
        found: Floats = np.average(values, axis=0, weights=self.weights or None)
        return found
