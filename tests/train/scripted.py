"""A trunk that answers with given numbers, and batches to go with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from kilter.train.objectives import LossOutput, prepared
from kilter.tree import Batch, Group, Response, TokenTree, make_batch


class Scripted(nn.Module):
    """A trunk that answers with given numbers, which are its parameters."""

    def __init__(self, **answers: Sequence[float]) -> None:
        super().__init__()
        self.answers = nn.ParameterDict({k: torch.tensor(v, dtype=torch.float64) for k, v in answers.items()})

    def forward(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
        return {role: self.answers[role] for role in ask}


def batch_of(lengths: Sequence[Sequence[int]], ranks: Sequence[Sequence[float]], **columns: Sequence[float]) -> Batch:
    """One batch: the lengths and ranks of each group's responses; `columns` are float[N] extras."""
    groups = [
        Group(
            (1,),
            tuple(Response((5,) * n, per_response={"rank": r, "margin": 2 * r}) for n, r in zip(ls, rs, strict=True)),
        )
        for ls, rs in zip(lengths, ranks, strict=True)
    ]
    batch = make_batch([[group] for group in groups])
    extras = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    reference = extras.pop("ref_logprobs", None)
    return Batch(batch.tree, batch.units, reference, batch.extras | extras)


def figures(out: LossOutput) -> dict[str, float]:
    assert not any(value.requires_grad for value, _ in out.metrics.values())
    return {name: float(value) / float(weight) for name, (value, weight) in out.metrics.items()}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def gradient(trunk: nn.Module, objective: Any, batches: Sequence[Batch]) -> Tensor:
    """One vector of all gradients, made as `train_step` makes it."""
    batches = prepared(objective, trunk, batches)
    units = {unit: sum(batch.units[unit] for batch in batches) for unit in batches[0].units}
    trunk.zero_grad()
    for batch in batches:
        sum(total / units[unit] for total, unit in objective(trunk, batch).terms.values()).backward()
    return torch.cat([p.grad.flatten() for p in trunk.parameters() if p.grad is not None])
