"""A trunk that answers with given numbers, and batches to go with it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from itertools import count, islice
from typing import Any

import torch
from torch import Tensor, nn

from kilter.train.objectives import LossOutput, prepared
from kilter.tree import Batch, Group, Response, TokenTree, make_batch

FIRST = 5
"""Id of the first scored token of `batch_of`; each has its own."""


class Scripted(nn.Module):
    """A trunk that answers with given numbers, which are its parameters."""

    def __init__(self, **answers: Sequence[float]) -> None:
        super().__init__()
        self.asked: list[int] = []  # scored tokens of each tree
        self.answers = nn.ParameterDict({k: torch.tensor(v, dtype=torch.float64) for k, v in answers.items()})

    def forward(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
        self.asked.append(len(tree.target))
        answers = {role: self.answers[role] for role in ask}
        if all(want == "logprobs" for want in ask.values()) and len(tree.target) < min(map(len, answers.values())):
            return {role: values[tree.target - FIRST] for role, values in answers.items()}  # a part of a batch
        return answers


def batch_of(lengths: Sequence[Sequence[int]], ranks: Sequence[Sequence[float]], **columns: Sequence[float]) -> Batch:
    """One batch: the lengths and ranks of each group's responses; `columns` are float[N] extras."""
    number = count(FIRST)
    groups = [
        Group(
            (1,),
            tuple(
                Response(tuple(islice(number, n)), per_response={"rank": r, "margin": 2 * r})
                for n, r in zip(ls, rs, strict=True)
            ),
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
