"""A step whose gradient is many times longer than usual, and the rows that made it so."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from kilter.train.objectives import LossOutput, Objective
from kilter.tree import Batch, TokenTree, unroll

WINDOW = 32
"""Steps that the usual norm is the median of."""
FIRST = 8
"""Steps that have to be seen before a norm is called unusual."""
ROWS = 5
"""Rows told of each spike."""


class Row(NamedTuple):
    """One group of the step: a prompt with its responses."""

    name: str
    """Where it came from (`tree.Group.name`)."""
    share: float
    """Its part of the step's squared gradient norm, <g_i, g> / <g, g>: all groups' add up to 1."""
    norm: float
    """Norm of its own gradient g_i, |g_i|."""
    texts: tuple[tuple[list[int], list[int]], ...]
    """Of each response the tokens before the first scored one, and those from there on."""


class Spike(NamedTuple):
    """A step with an unusual gradient."""

    step: int
    """From 1, as metrics count."""
    norm: float
    """Before clipping."""
    usual: float
    """Median norm of the steps before."""
    rows: list[Row]
    """Those with the largest share; none where several processes train, each of which holds a part of the step."""


class Spikes:
    """Watches the gradient's norm and tells of steps where it is more than `factor` times the median of the last ones.

    Clipping keeps such a step's length in check and not its direction, which is that of a few rows. The norm of a spike
    counts among the steps before the next: a level that lasts is told of while it is new.

    Args:
        factor: of the median.
        tell: called with each spike, before its update is applied.
    """

    def __init__(self, factor: float, tell: Callable[[Spike], None]) -> None:
        self.factor, self.tell = factor, tell
        self._norms: list[float] = []

    def usual(self, norm: float) -> float | None:
        """Takes a step's norm in; the usual one when this is a spike."""
        middle = median(self._norms) if len(self._norms) >= FIRST else math.inf
        self._norms = [*self._norms, norm][-WINDOW:]
        return middle if norm > self.factor * middle else None

    def state_dict(self) -> dict[str, Any]:
        return {"norms": list(self._norms)}

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._norms = list(state["norms"])


def rows_behind(
    trunk: nn.Module,
    objective: Objective,
    batches: Sequence[Batch],
    loss: Callable[[LossOutput], Tensor],
    parameters: Sequence[nn.Parameter],
) -> list[Row]:
    """The groups of a step with the largest shares of its gradient, which lies in `parameters`; no gradient is changed.

    A loss depends on the trunk through its answers alone, and each of those belongs to a group. So a backward in which
    the gradients of all other groups' answers are set to 0 gives what this group adds to the whole: these parts add up
    to the gradient, whatever the loss. It costs a forward, and a backward of the micro-batch for each group.

    Args:
        batches: micro-batches, as the objective prepared them.
        loss: from a micro-batch's sums to its part of the step's loss.
    """
    known = [parameter for parameter in parameters if parameter.grad is not None]
    whole = [gradient for parameter in parameters if (gradient := parameter.grad) is not None]
    squared = math.fsum(_dot(gradient, gradient) for gradient in whole)
    rows: list[tuple[float, float, Batch, int]] = []
    for batch in batches:
        heard = _Heard(trunk)
        value = loss(objective(heard, batch))  # type: ignore[arg-type]
        for group in range(_num_groups(batch.tree)):
            heard.group = group
            own = torch.autograd.grad(value, known, retain_graph=True, allow_unused=True)
            pairs = [(one, all_) for one, all_ in zip(own, whole, strict=True) if one is not None]
            share = math.fsum(_dot(one, all_) for one, all_ in pairs) / squared
            rows.append((share, math.sqrt(math.fsum(_dot(one, one) for one, _ in pairs)), batch, group))
    rows.sort(key=lambda row: -row[0])
    return [
        Row(batch.names[group] if batch.names else "", share, norm, _texts(batch.tree, group))
        for share, norm, batch, group in rows[:ROWS]
    ]


class _Heard:
    """A trunk whose answers pass back the gradient of one group alone."""

    def __init__(self, trunk: nn.Module) -> None:
        self.trunk, self.group = trunk, 0

    def __call__(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
        answers: dict[str, Tensor] = self.trunk(tree, ask)
        for role, answer in answers.items():
            if answer.requires_grad:
                of = tree.group if ask[role] == "rewards" else tree.group[tree.leaf]
                answer.register_hook(functools.partial(self._only, of))  # type: ignore[no-untyped-call]
        return answers

    def _only(self, of: Tensor, gradient: Tensor) -> Tensor:
        kept = (of == self.group).view(-1, *[1] * (gradient.dim() - 1))
        return torch.where(kept, gradient, 0.0)


def _dot(one: Tensor, other: Tensor) -> float:
    return float((one.double() * other.double()).sum())


def _num_groups(tree: TokenTree) -> int:
    return int(tree.group.max()) + 1 if len(tree.group) else 0


def _texts(tree: TokenTree, group: int) -> tuple[tuple[list[int], list[int]], ...]:
    alone = unroll(tree)
    found = []
    for response in (tree.group == group).nonzero().flatten().tolist():
        tokens = alone.tokens[response][alone.segment[response] >= 0].tolist()
        scored = alone.source[alone.leaf == response] % alone.tokens.shape[1]
        first = int(scored[0]) + 1 if len(scored) else len(tokens)
        found.append((tokens[:first], tokens[first:]))
    return tuple(found)
