"""Objectives of reward models: any registered loss, over one head or several.

A reward model has one head, or one for each group of annotators or criterion (each learns from its own comparisons), or
several that learn from all comparisons and form an ensemble, or a second one that takes up what is length.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from kilter.errors import ConfigError
from kilter.losses import REWARD_LOSSES, bind, centring
from kilter.ops import less_group_mean, pairs_in_groups, sum_by
from kilter.train import distributed
from kilter.train.objectives import LossOutput, extra, mean_of, side_by_side, summed
from kilter.tree import Batch

Teaching = Literal["all", "own", "drawn"]
"""Which comparisons teach a head: all, those of its own group (`extras["head"]`), or all by weights drawn for it."""
LENGTH = "length"
"""The role whose head takes up length in a disentangled model."""


def draw_name(member: int) -> str:
    """In `extras`, float[R]: the weight drawn for a prompt's responses and one member of an ensemble."""
    return f"draw_{member}"


@dataclass(frozen=True)
class RewardModel:
    """One loss over the heads of a reward model, with centring; per unit of the loss.

        loss = 1 / n sum over heads h and comparisons c of w_c s_hc loss_c(r_h) + centring

    w: the comparison's own weight (`extras["weight"]`); s: what the head learns from it; n: the whole step's count.
    """

    name: str = "bradley_terry"
    options: Mapping[str, Any] = field(default_factory=dict)
    centring_coef: float = 0.01
    heads: tuple[str, ...] = ("reward",)
    """Roles, one for each head."""
    teaching: Teaching = "all"
    length_coef: float = 0.0

    @property
    def roles(self) -> tuple[str, ...]:
        return (*self.heads, LENGTH) if self.length_coef else self.heads

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        group = batch.tree.group
        a, b = pairs_in_groups(group)
        answers = trunk(batch.tree, dict.fromkeys(self.roles, "rewards"))
        heads = torch.stack([answers[role] for role in self.heads])  # float[K, R]
        shares = self._shares(batch, heads)
        unit = REWARD_LOSSES[self.name].unit
        bound = bind(self.name, self.options, table=REWARD_LOSSES)
        total, centred = heads.new_zeros(()), heads.new_zeros(())
        for rewards, share in zip(heads, shares, strict=True):
            predicted = rewards + answers[LENGTH] if self.length_coef else rewards
            losses = bound(*self._inputs(batch, predicted, a, b))
            total = total + (losses * (share[a] if unit == "pairs" else share)).sum()
            if self.centring_coef:
                centred = centred + (centring(predicted, group) * share[a]).sum()
        terms: dict[str, tuple[Tensor, str]] = {self.name: (total, unit)}
        if self.centring_coef:
            terms["centring"] = (self.centring_coef * centred, "pairs")
        if self.length_coef:
            terms["length"] = (self.length_coef * _pulled(batch, heads[0], answers[LENGTH]), "responses")
        return LossOutput(terms, self._metrics(batch, heads.detach(), a, b))

    def _inputs(self, batch: Batch, rewards: Tensor, a: Tensor, b: Tensor) -> list[Tensor]:
        found = {"rewards": rewards, "group": batch.tree.group}
        needed = f"the loss {self.name!r}"
        for name in REWARD_LOSSES[self.name].inputs:
            if name in ("rank", "value", "error", "desirable"):
                found[name] = extra(batch, name, needed)
            elif name == "margin":
                margin = extra(batch, name, needed) if self.options.get("margin_coef") else torch.zeros_like(rewards)
                found[name] = (margin[a] - margin[b]).abs()
        return [found[name] for name in REWARD_LOSSES[self.name].inputs]

    def _shares(self, batch: Batch, heads: Tensor) -> Tensor:
        """float[K, R]: what each head learns from a response's comparisons, the record's own weight included."""
        weight = batch.extras.get("weight", torch.ones_like(heads[0]))
        if self.teaching == "all":
            return weight.expand_as(heads) / len(heads)
        if self.teaching == "own":
            own = extra(batch, "head", "a reward model with a head for each group")
            return weight * (own == torch.arange(len(heads), device=own.device)[:, None])
        drawn = [extra(batch, draw_name(member), "an ensemble") for member in range(len(heads))]
        return weight * torch.stack(drawn) / len(heads)

    def _metrics(self, batch: Batch, heads: Tensor, a: Tensor, b: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
        """Of what the heads say together: that of a comparison's own head, or their mean."""
        if self.teaching == "own":
            own = extra(batch, "head", "a reward model with a head for each group").long()
            rewards = heads.gather(0, own[None])[0]
        else:
            rewards = heads.mean(0)
        rank = extra(batch, "rank", "the accuracy of a reward model")
        first_is_better = rank[a] <= rank[b]
        better, worse = torch.where(first_is_better, a, b), torch.where(first_is_better, b, a)
        ordered = (rank[a] != rank[b]).to(rewards.dtype)  # float[P], 0 for ties: they have no better side
        found = side_by_side("rewards", rewards[better], rewards[worse], ordered)
        if self.teaching == "own":
            for place, role in enumerate(self.heads):
                mine = ordered * (own[a] == place)
                sides = side_by_side(role, rewards[better], rewards[worse], mine)
                found[f"{role}/accuracy"] = sides[f"{role}/accuracy"]
        elif len(heads) > 1:
            found["rewards/spread"] = mean_of(((heads - rewards).square().sum(0) / (len(heads) - 1)).sqrt())
        length, level = (less_group_mean(values, batch.tree.group) for values in (_lengths(batch), rewards.double()))
        return found | {
            "rewards/mean": mean_of(rewards),
            "rewards/square": mean_of(rewards.square()),
            "along/length": (summed(length * level), 1.0),
            "along/lengths": (summed(length.square()), 1.0),
            "along/rewards": (summed(level.square()), 1.0),
        }

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        """Spread, and how far rewards go with length among the answers to a prompt."""
        means = dict(means)
        if (square := means.pop("rewards/square", None)) is not None:
            means["rewards/std"] = math.sqrt(max(0.0, square - means["rewards/mean"] ** 2))
        if (along := means.pop("along/length", None)) is not None:
            spread = math.sqrt(means.pop("along/lengths") * means.pop("along/rewards"))
            means["rewards/length_correlation"] = along / spread if spread > 0 else 0.0
        return means

    @torch.no_grad()
    def prepare(self, trunk: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Of a disentangled model: the gradient of both correlations with length, which the whole step decides.

        d rho(r, l) / d r_i = (l_i / |l| - rho r_i / |r|) / |r|,   r and l less their means over a prompt
        """
        if not self.length_coef:
            return batches
        sides = (self.heads[0], LENGTH)
        rows = []  # float[3, R] of each batch: the reward, what the other head says, the length
        for batch in batches:
            answers = trunk(batch.tree, dict.fromkeys(sides, "rewards"))
            columns = [answers[side].double() for side in sides]
            rows.append(
                torch.stack([less_group_mean(column, batch.tree.group) for column in (*columns, _lengths(batch))])
            )
        sums = torch.stack([torch.stack([row @ row[2], row.square().sum(1)]) for row in rows]).sum(0)  # float[2, 3]
        along, squares = distributed.total(sums)
        norms = squares.sqrt().clamp(min=1e-12)
        rho = along[:2] / (norms[:2] * norms[2])  # of the reward, of the other head
        count = distributed.total(sums.new_tensor([sum(row.shape[1] for row in rows)]))
        made = []
        for batch, row in zip(batches, rows, strict=True):
            pull = (row[2] / norms[2] - rho[:, None] * row[:2] / norms[:2, None]) / norms[:2, None]
            pull = pull * torch.stack([rho[0].sign(), -torch.ones_like(rho[0])])[:, None]
            level = (rho[0].abs() - rho[1]).expand(row.shape[1])
            extras = dict(zip(PULL, (*(count * pull).float(), level.float()), strict=True))
            made.append(replace(batch, extras=batch.extras | extras))
        return made


PULL = ("reward_pull", "length_pull", "length_level")
"""What `prepare` gives each response of a disentangled model: float[R] each."""


def _pulled(batch: Batch, reward: Tensor, length: Tensor) -> Tensor:
    """|rho(reward, length)| - rho(length head, length), times the responses of this batch: the value that it has over
    the whole step, with its gradient."""
    if not len(reward):
        return reward.sum() + length.sum()
    first, second, level = (extra(batch, name, "a length-disentangled model") for name in PULL)
    return (first * (reward - reward.detach()) + second * (length - length.detach()) + level).sum()


def _lengths(batch: Batch) -> Tensor:
    """float64[R], scored tokens of each response."""
    ones = torch.ones(len(batch.tree.leaf), dtype=torch.float64, device=batch.tree.leaf.device)
    return sum_by(ones, batch.tree.leaf, len(batch.tree.last))


def reward_model(
    name: str = "bradley_terry",
    options: Mapping[str, Any] | None = None,
    *,
    centring_coef: float = 0.01,
    heads: Sequence[str] = ("reward",),
    teaching: Teaching = "all",
    length_coef: float = 0.0,
) -> RewardModel:
    """The objective of a reward model; `bradley_terry` goes over all C(k, 2) pairs of each ranking.

    Args:
        name, options: of a loss in `losses.REWARD_LOSSES`.
        centring_coef: weight of the squared sum of a pair's rewards; 0 leaves it out. 0.01 is usual.
        heads: the roles whose scalar heads train.
        teaching: which comparisons teach which head; see `Teaching`.
        length_coef: above 0, a head `length` stands beside: the sum of both explains the comparisons, and the reward
            is pushed to go along with length as little, the other as much as it can, among the answers to a prompt
            (ODIN: Chen et al. 2024, arXiv 2402.07319, whose correlations are over a batch and which also keeps the two
            heads orthogonal). The correlations are those of the whole step.
    Raises:
        ConfigError: no such loss or option.
    """
    try:
        bind(name, options or {}, table=REWARD_LOSSES)
    except ValueError as err:
        raise ConfigError(str(err)) from err
    return RewardModel(name, options or {}, centring_coef, tuple(heads), teaching, length_coef)
