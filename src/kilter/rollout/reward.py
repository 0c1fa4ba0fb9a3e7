"""What the policy is paid: the score at an answer's last token, less the price of each step from the reference."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from kilter.ops import kl_k1

KL_GAIN = 0.1
"""How fast the adaptive controller moves: Ziegler et al.'s K_beta. One rollout moves the coefficient by at most 2%."""
KL_ERROR_LIMIT = 0.2
"""Relative errors beyond this count as this."""
BUDGET_LIMIT = 1.5
"""One rollout multiplies or divides the budget's price by at most this."""


def paid_rewards(scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, leaf: Tensor, *, kl_coef: float) -> Tensor:
    """Reward of each token.

        r_n = -kl_coef (log p(n) - log q(n)) + [n is the last of its response] score

    Ziegler et al. 2019, arXiv 1909.08593, eq. 2, spread over the tokens. Rises with the score and falls with the
    log-ratio to the reference q, which is checked at the start of a run.

    Args:
        scores: float[R].
        logprobs, ref_logprobs: float[N], nats, of the sampled tokens under policy and reference.
        leaf: int[N], contiguous, every response with a token.
        kl_coef: price of a nat, in units of the score; 0 and above.
    Returns:
        float[N]. One response, score 1, log-ratios 0.5 and 0.5, kl_coef 0.1: -0.05, 0.95.
    """
    last = torch.bincount(leaf, minlength=len(scores)).cumsum(0) - 1
    return (-kl_coef * kl_k1(logprobs, ref_logprobs)).index_add(0, last, scores)


@dataclass
class RunningNorm:
    """Mean and variance of all scores so far (Chan et al. 1983), in double precision on the host."""

    count: int = 0
    mean: float = 0.0
    squares: float = 0.0
    """Sum of squared deviations from the mean."""

    @property
    def std(self) -> float:
        """Standard deviation, over n - 1; 1 until there are two different scores."""
        if self.count < 2 or self.squares <= 0:
            return 1.0
        return math.sqrt(self.squares / (self.count - 1))

    def update(self, scores: Sequence[float]) -> None:
        """Takes these scores in."""
        if not scores:
            return
        mean = math.fsum(scores) / len(scores)
        squares = math.fsum((score - mean) ** 2 for score in scores)
        count = self.count + len(scores)
        shift = mean - self.mean
        self.squares += squares + shift * shift * self.count * len(scores) / count
        self.mean += shift * len(scores) / count
        self.count = count

    def __call__(self, scores: Sequence[float], *, clip: float = 0.0) -> list[float]:
        """(score - mean) / std, clipped to +-clip (0: no clip)."""
        limit = clip or math.inf
        return [min(max((score - self.mean) / self.std, -limit), limit) for score in scores]

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.count, self.mean, self.squares = int(state["count"]), float(state["mean"]), float(state["squares"])


@dataclass
class KlController:
    """The price of a nat of KL: fixed, or steered so that the KL of an answer stays near a target.

        error   = clip(kl / target - 1, -0.2, 0.2)
        kl_coef = kl_coef (1 + 0.1 error)            once a rollout

    Ziegler et al. 2019, arXiv 1909.08593, section 2.2.
    """

    kl_coef: float
    target: float | None = None
    """Nats an answer; None: fixed."""

    def raise_by(self, factor: float) -> None:
        """The guard's: multiplies the price."""
        self.kl_coef *= factor

    def update(self, kl: float) -> None:
        """`kl`: mean over the answers of a rollout, nats an answer."""
        if self.target is not None:
            error = min(max(kl / self.target - 1, -KL_ERROR_LIMIT), KL_ERROR_LIMIT)
            self.kl_coef *= 1 + KL_GAIN * error

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.kl_coef = float(state["kl_coef"])


@dataclass
class KlBudget:
    """The price of a nat of KL, steered so that a whole run ends within its budget.

    With a share s = t / T of the run's T rollouts learned from, s of the budget may be spent:

        spent   = kl / budget
        kl_coef = max(least, kl_coef clip(spent / s, 1 / 1.5, 1.5))            once a rollout, from t = 1 on

    So the price rises in proportion to how far the spending is ahead of its time, goes on rising until it is held,
    falls where it is behind, and is never below `least`, that of the start or to which the guard raised it. It aims and
    cannot promise. The rule is ours; `KlController` lets a run spend its whole target at once, this leaves some to the
    end. Price 0.1, budget 6, a quarter of the rollouts: a KL of 1.8 gives 0.12; of 1.5 or less 0.1.
    """

    kl_coef: float
    budget: float
    """Nats an answer, at the end."""
    rollouts: int
    """T."""
    learned: int = 0
    """t."""
    least: float = field(init=False)

    def __post_init__(self) -> None:
        self.least = self.kl_coef

    def raise_by(self, factor: float) -> None:
        """The guard's: multiplies the price, which is never below that again."""
        self.kl_coef *= factor
        self.least = self.kl_coef

    def update(self, kl: float) -> None:
        """`kl`: mean over the answers of a rollout, nats an answer, before anything is learned from it."""
        if self.learned:
            ahead = kl / self.budget * self.rollouts / self.learned
            self.kl_coef = max(self.least, self.kl_coef * min(max(ahead, 1 / BUDGET_LIMIT), BUDGET_LIMIT))
        self.learned += 1

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "learned": self.learned, "least": self.least}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self.kl_coef, self.learned = float(state["kl_coef"]), int(state["learned"])
        self.least = float(state["least"])
