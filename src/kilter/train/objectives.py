"""Objectives: a trunk and a batch go in, sums by name come out. The loop divides each by the whole step's units once.

An objective is a callable with `roles` (who trains) and maybe two hooks: `prepare(trunk, batches)` computes, without
gradient and before the first forward, what is a function of the whole step; `finish(means)` works out figures that are
no means themselves (a variance explained, a perplexity) from those that are.

Preference losses, all of them, have theirs in `preferences`, reward models in `rewards`, policy gradients in `policy`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kilter.errors import CheckError
from kilter.losses import dft, nll
from kilter.tree import Batch


class LossOutput(NamedTuple):
    """Sums of one micro-batch."""

    terms: dict[str, tuple[Tensor, str]]
    """Name -> (sum, its unit): {"pair": (s, "pairs"), "nll": (s, "tokens")}; weights are in the sums. The loss."""
    metrics: dict[str, tuple[Tensor, Tensor | float]]
    """Name -> (sum, weight), detached; they stay on the device until the step ends."""


class Objective(Protocol):
    """What the loop minimises."""

    def __call__(self, trunk: nn.Module, batch: Batch, /) -> LossOutput: ...


def prepared(objective: Objective, trunk: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
    """The step's batches after the objective's `prepare`, where it has one."""
    prepare = getattr(objective, "prepare", None)
    if prepare is None:
        return batches
    with torch.no_grad():
        changed: Sequence[Batch] = prepare(trunk, batches)
    return changed


def finished(objective: Objective, means: dict[str, float]) -> dict[str, float]:
    """A step's mean figures after the objective's `finish`, where it has one."""
    finish = getattr(objective, "finish", None)
    return means if finish is None else dict(finish(means))


def summed(values: Tensor) -> Tensor:
    """A sum in float64, without gradient."""
    return values.detach().double().sum()


def mean_of(values: Tensor) -> tuple[Tensor, float]:
    """Sum and count of a figure that is a mean."""
    return summed(values), float(values.numel())


def extra(batch: Batch, name: str, needed_by: str) -> Tensor:
    """What the source filled in under `name`. Raises CheckError when it did not."""
    if name in batch.extras:
        return batch.extras[name]
    if not len(batch.tree.last):
        return batch.tree.leaf.new_zeros(0, dtype=torch.float32)
    raise CheckError(
        f"batch: extras hold {', '.join(sorted(batch.extras)) or 'nothing'}, but {needed_by} needs {name!r}; "
        "the source of the batches has to fill it"
    )


# Supervised fine-tuning ----------------------------------------------------------------------------------------------


TOKEN_LOSSES: dict[str, Callable[[Tensor], Tensor]] = {"nll": nll, "dft": dft}


@dataclass(frozen=True)
class Sft:
    """Mean negative log-likelihood of the scored tokens, or its rescaled form."""

    loss: Literal["nll", "dft"] = "nll"
    role: str = "policy"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        logprobs = trunk(batch.tree, {self.role: "logprobs"})[self.role]
        losses = TOKEN_LOSSES[self.loss](logprobs)
        return LossOutput({self.loss: (losses.sum(), "tokens")}, {"surprisal": mean_of(-logprobs)})

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        means = dict(means)
        return means | {"perplexity": math.exp(min(means.pop("surprisal"), 700.0))}


def sft(*, loss: Literal["nll", "dft"] = "nll", role: str = "policy") -> Sft:
    """Cross-entropy of demonstrations (`losses.nll`) or its rescaled form (`losses.dft`), per token."""
    return Sft(loss, role)


def side_by_side(name: str, better: Tensor, worse: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Figures of the better and the worse response of each pair: float[P] each; exact equality is half right."""
    count = weight.sum()
    right = (better > worse).double() + 0.5 * (better == worse).double()
    return {
        f"{name}/chosen": (summed(better * weight), count),
        f"{name}/rejected": (summed(worse * weight), count),
        f"{name}/margin": (summed((better - worse) * weight), count),
        f"{name}/accuracy": (summed(right * weight), count),
    }
