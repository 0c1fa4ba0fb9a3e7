"""Objectives: a trunk and a batch go in, sums by name come out. The loop divides each by the whole step's units once.

An objective is a callable with `roles` (who trains) and maybe two hooks: `prepare(trunk, batches)` computes, without
gradient and before the first forward, what is a function of the whole step; `finish(means)` works out figures that are
no means themselves (a variance explained, a perplexity) from those that are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from kilter.errors import CheckError, ConfigError
from kilter.losses import (
    PAIR_LOSSES,
    UNPAIRED_LOSSES,
    PreferenceLoss,
    bind,
    bradley_terry,
    centring,
    nll,
    ppo_clip,
    value_clip,
)
from kilter.ops import clamp_log_ratio, kl_k3, pairs_in_groups, sum_by
from kilter.train import distributed
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


def _sum(values: Tensor) -> Tensor:
    return values.detach().double().sum()


def _mean_of(values: Tensor) -> tuple[Tensor, float]:
    return _sum(values), float(values.numel())


def _extra(batch: Batch, name: str, needed_by: str) -> Tensor:
    if name in batch.extras:
        return batch.extras[name]
    if not len(batch.tree.last):
        return batch.tree.leaf.new_zeros(0, dtype=torch.float32)
    raise CheckError(
        f"batch: extras hold {', '.join(sorted(batch.extras)) or 'nothing'}, but {needed_by} needs {name!r}; "
        "the source of the batches has to fill it"
    )


# Supervised fine-tuning ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Sft:
    """Mean negative log-likelihood of the scored tokens."""

    role: str = "policy"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        losses = nll(trunk(batch.tree, {self.role: "logprobs"})[self.role])
        return LossOutput({"nll": (losses.sum(), "tokens")}, {})

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        return {**means, "perplexity": math.exp(min(means["loss/nll"], 700.0))}


def sft(*, role: str = "policy") -> Sft:
    """Cross-entropy of demonstrations, per token."""
    return Sft(role)


# Reward models -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RewardModel:
    """Bradley-Terry over all pairs of every ranking, with centring."""

    centring_coef: float = 0.01
    margin_coef: float = 0.0
    role: str = "reward"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        group, rank = batch.tree.group, _extra(batch, "rank", "the reward model's loss")
        a, b = pairs_in_groups(group)
        margin = None
        if self.margin_coef:
            strength = _extra(batch, "margin", "a loss with margins")
            margin = self.margin_coef * (strength[a] - strength[b]).abs()
        rewards = trunk(batch.tree, {self.role: "rewards"})[self.role]
        terms = {"bradley_terry": (bradley_terry(rewards, group, rank, margin=margin).sum(), "pairs")}
        if self.centring_coef:
            terms["centring"] = (self.centring_coef * centring(rewards, group).sum(), "pairs")
        first_is_better = rank[a] <= rank[b]
        better, worse = torch.where(first_is_better, a, b), torch.where(first_is_better, b, a)
        ordered = (rank[a] != rank[b]).to(rewards.dtype)  # float[P], 0 for ties: they have no better side
        return LossOutput(
            terms,
            _side_by_side("rewards", rewards.detach()[better], rewards.detach()[worse], ordered)
            | {
                "rewards/mean": _mean_of(rewards),
                "rewards/square": _mean_of(rewards.square()),
            },
        )

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        means = dict(means)
        if (square := means.pop("rewards/square", None)) is not None:
            means["rewards/std"] = math.sqrt(max(0.0, square - means["rewards/mean"] ** 2))
        return means


def reward_model(*, centring_coef: float = 0.01, margin_coef: float = 0.0, role: str = "reward") -> RewardModel:
    """Bradley-Terry over all C(k, 2) pairs of each ranking (`losses.bradley_terry`), per pair.

    Args:
        centring_coef: weight of the squared sum of a pair's rewards; 0 leaves it out. 0.01 is usual.
        margin_coef: how much of the difference in `extras["margin"]` the winner must lead by; 0: margins are not used.
        role: whose scalar head trains.
    """
    return RewardModel(centring_coef, margin_coef, role)


def _side_by_side(name: str, better: Tensor, worse: Tensor, weight: Tensor) -> dict[str, tuple[Tensor, Tensor | float]]:
    """Figures of the better and the worse response of each pair: float[P] each; exact equality is half right."""
    count = weight.sum()
    right = (better > worse).double() + 0.5 * (better == worse).double()
    return {
        f"{name}/chosen": (_sum(better * weight), count),
        f"{name}/rejected": (_sum(worse * weight), count),
        f"{name}/margin": (_sum((better - worse) * weight), count),
        f"{name}/accuracy": (_sum(right * weight), count),
    }


# Pairs ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A registered pair loss over all pairs of each group, the better response of each being chosen."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    role: str = "policy"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    @property
    def needs_reference(self) -> bool:
        return PAIR_LOSSES[self.name].needs_reference

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        tree, loss = batch.tree, PAIR_LOSSES[self.name]
        better, worse, share, ordered = _preferences(tree.group, _extra(batch, "rank", f"{self.name!r}"))
        num_responses = len(tree.last)
        logprobs = trunk(tree, {self.role: "logprobs"})[self.role]  # float[N]
        tokens = sum_by(torch.ones_like(logprobs), tree.leaf, num_responses)  # float[R]
        logps = sum_by(logprobs, tree.leaf, num_responses)  # float[R]
        ref_logps = _ref_logps(batch, loss.needs_reference, self.name)
        divisor = tokens if loss.length_normalized else torch.ones_like(tokens)
        inputs = {
            "chosen": (logps / divisor)[better],
            "rejected": (logps / divisor)[worse],
            "ref_chosen": (ref_logps / divisor)[better],
            "ref_rejected": (ref_logps / divisor)[worse],
            "chosen_tokens": tokens[better],
            "rejected_tokens": tokens[worse],
        }
        losses = loss.fn(*[inputs[name] for name in loss.inputs], **self.options) * share
        beta = self.options.get("beta", loss.defaults.get("beta", 1.0))
        rewards = beta * ((logps - ref_logps) / divisor).detach()
        num_pairs = len(ordered)
        better, worse = better[:num_pairs], worse[:num_pairs]
        metrics = _side_by_side("rewards", rewards[better], rewards[worse], ordered)
        sides = _side_by_side("logps", logps.detach()[better], logps.detach()[worse], ordered)
        metrics |= {key: sides[key] for key in ("logps/chosen", "logps/rejected")}
        return LossOutput({self.name: (losses.sum(), "pairs")}, metrics)


def pair(name: str = "dpo", options: Mapping[str, Any] | None = None, *, role: str = "policy") -> Pair:
    """A pair loss by name, per pair. A tied pair counts half in each direction.

    Raises:
        ConfigError: no such loss, no such option, or a value out of its range.
    """
    return Pair(*_bound(PAIR_LOSSES, name, options), role)


def _bound(
    table: Mapping[str, PreferenceLoss], name: str, options: Mapping[str, Any] | None
) -> tuple[str, dict[str, Any]]:
    """Name and options after a dry call; a mistake of the user's becomes a ConfigError."""
    options = dict(options or {})
    try:
        bind(name, options)
    except ValueError as err:
        raise ConfigError(str(err)) from err
    if name not in table:
        raise ConfigError(f"loss.name is {name!r}, which needs other data; choose one of {', '.join(sorted(table))}")
    return name, options


def _ref_logps(batch: Batch, needed: bool, name: str) -> Tensor:
    """float[R], the reference's log-prob of each response; zeros where no loss needs it and none was filled."""
    num_responses = len(batch.tree.last)
    if batch.ref_logprobs is not None:
        return sum_by(batch.ref_logprobs, batch.tree.leaf, num_responses)
    if needed and num_responses:
        raise CheckError(
            f"batch: no ref_logprobs, which {name!r} needs; give the groups to `sources.with_reference` first"
        )
    return torch.zeros(num_responses, device=batch.tree.leaf.device)


def _preferences(group: Tensor, rank: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Which response is preferred to which, and how much of a pair that is.

    Returns:
        (better, worse): int[Q]; the first P are all pairs of all groups, behind them stand the tied ones the other way.
        share: float[Q], 1, or 1/2 for both directions of a tie.
        ordered: float[P], 1, or 0 for a tie: it has no better side to show in figures.
    """
    a, b = pairs_in_groups(group)
    first_is_better = rank[a] <= rank[b]
    better, worse = torch.where(first_is_better, a, b), torch.where(first_is_better, b, a)
    tied = rank[a] == rank[b]
    share = torch.where(tied, 0.5, 1.0)
    return (
        torch.cat([better, worse[tied]]),
        torch.cat([worse, better[tied]]),
        torch.cat([share, share[tied]]),
        (~tied).float(),
    )


# Single responses ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Unpaired:
    """A registered loss over single responses with a thumb up or down, per prompt.

    Where the loss asks for `kl`, groups carry a second response that belongs to another prompt, marked `mismatched`: it
    only measures how far the policy is from the reference, gets no gradient and is no unit (`sources.with_mismatched`).
    """

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)
    role: str = "policy"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.role,)

    @property
    def needs_reference(self) -> bool:
        return UNPAIRED_LOSSES[self.name].needs_reference

    @torch.no_grad()
    def prepare(self, trunk: nn.Module, batches: Sequence[Batch]) -> Sequence[Batch]:
        """Fills `extras["kl"]`: the mean log-ratio of the mismatched responses of the whole step, at least 0."""
        if "kl" not in UNPAIRED_LOSSES[self.name].inputs:
            return batches
        sums = torch.zeros(2, dtype=torch.float64, device=batches[0].tree.tokens.device)
        for batch in batches:
            logps, ref_logps, _ = self._logps(trunk, batch)
            mismatched = _extra(batch, "mismatched", f"{self.name!r}").double()
            sums += torch.stack([((logps - ref_logps).double() * mismatched).sum(), mismatched.sum()])
        sums = distributed.total(sums)
        kl = (sums[0] / sums[1].clamp(min=1)).clamp(min=0).float()
        return [replace(batch, extras={**batch.extras, "kl": kl}) for batch in batches]

    def _logps(self, trunk: nn.Module, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        tree, num_responses = batch.tree, len(batch.tree.last)
        logprobs = trunk(tree, {self.role: "logprobs"})[self.role]
        tokens = sum_by(torch.ones_like(logprobs), tree.leaf, num_responses)
        return sum_by(logprobs, tree.leaf, num_responses), _ref_logps(batch, self.needs_reference, self.name), tokens

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        loss = UNPAIRED_LOSSES[self.name]
        desirable = _extra(batch, "desirable", f"{self.name!r}")
        mismatched = batch.extras.get("mismatched", torch.zeros_like(desirable))
        (real,) = (mismatched == 0).nonzero(as_tuple=True)
        logps, ref_logps, tokens = (values[real] for values in self._logps(trunk, batch))
        divisor = tokens if loss.length_normalized else torch.ones_like(tokens)
        desirable = desirable[real]
        inputs = {"logps": logps / divisor, "ref_logps": ref_logps / divisor, "desirable": desirable, "tokens": tokens}
        if "kl" in loss.inputs:
            inputs["kl"] = _extra(batch, "kl", f"{self.name!r}")
        losses = loss.fn(*[inputs[name] for name in loss.inputs], **self.options)
        beta = self.options.get("beta", loss.defaults.get("beta", 1.0))
        rewards = beta * (inputs["logps"] - inputs["ref_logps"]).detach()
        metrics: dict[str, tuple[Tensor, Tensor | float]] = {
            f"rewards/{side}": (_sum(rewards * weight), weight.sum())
            for side, weight in (("desirable", desirable), ("undesirable", 1 - desirable))
        }
        if "kl" in loss.inputs:
            metrics["kl/mismatched"] = (inputs["kl"].double(), 1.0)
        return LossOutput({self.name: (losses.sum(), "prompts")}, metrics)


def unpaired(name: str, options: Mapping[str, Any] | None = None, *, role: str = "policy") -> Unpaired:
    """A loss over single responses by name, per prompt. Raises ConfigError as `pair` does."""
    return Unpaired(*_bound(UNPAIRED_LOSSES, name, options), role)


# PPO -----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Ppo:
    """The clipped policy loss and, with a critic, the clipped value loss, per token."""

    clip_range: float = 0.2
    clip_range_value: float = 0.2
    vf_coef: float = 0.5
    policy: str = "policy"
    value: str | None = "value"

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.policy,) if self.value is None else (self.policy, self.value)

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        ask = {self.policy: "logprobs"} | ({} if self.value is None else {self.value: "values"})
        answers = trunk(batch.tree, ask)
        logprobs = answers[self.policy]  # float[N]
        old_logprobs, advantages = _extra(batch, "old_logprobs", "PPO"), _extra(batch, "advantages", "PPO")
        losses = ppo_clip(logprobs, old_logprobs, advantages, clip_range=self.clip_range)
        terms = {"policy": (losses.sum(), "tokens")}
        with torch.no_grad():
            log_ratio, num_clamped = clamp_log_ratio(logprobs - old_logprobs)
            ratio = log_ratio.exp()
            cut = losses > -advantages * ratio  # the clipped side is the larger loss: no gradient
            metrics: dict[str, tuple[Tensor, Tensor | float]] = {
                "policy/approx_kl": _mean_of(kl_k3(old_logprobs, logprobs)),
                "policy/ratio": _mean_of(ratio),
                "policy/clip_fraction": _mean_of(cut),
                "policy/clamp_fraction": (num_clamped, float(ratio.numel())),
                "policy/surprisal": _mean_of(-logprobs),
                "advantages/mean": _mean_of(advantages),
            }
        if self.value is not None:
            values = answers[self.value]
            old_values, returns = _extra(batch, "old_values", "PPO"), _extra(batch, "returns", "PPO")
            clip_range = self.clip_range_value or math.inf
            squares = value_clip(values, old_values, returns, clip_range=clip_range)
            terms["value"] = (self.vf_coef * squares.sum(), "tokens")
            with torch.no_grad():
                error = returns - values
                metrics |= {
                    "values/mean": _mean_of(values),
                    "values/clip_fraction": _mean_of((values - old_values).abs() > clip_range),
                    "values/error": _mean_of(error),
                    "values/error_square": _mean_of(error.square()),
                    "returns/mean": _mean_of(returns),
                    "returns/square": _mean_of(returns.square()),
                }
        return LossOutput(terms, metrics)

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        """Adds 1 - var(error) / var(returns): 1 is a perfect critic, 0 one that knows the mean only."""
        means = dict(means)
        if "values/error" in means:
            unexplained = means.pop("values/error_square") - means.pop("values/error") ** 2
            spread = means.pop("returns/square") - means["returns/mean"] ** 2
            if spread > 0:
                means["values/explained_variance"] = 1 - unexplained / spread
        return means


def ppo(
    *,
    clip_range: float = 0.2,
    clip_range_value: float = 0.2,
    vf_coef: float = 0.5,
    policy: str = "policy",
    value: str | None = "value",
) -> Ppo:
    """PPO on rollouts: extras `old_logprobs`, `advantages`, and with a critic `old_values`, `returns`, float[N] each.

    Advantages are used as they are: the source whitens them over the whole rollout, or not.

    Args:
        clip_range: of the probability ratio.
        clip_range_value: of the value's move, in the value's units; 0: no clip.
        vf_coef: weight of the value loss.
        policy, value: the roles that train; no value role: no critic.
    """
    return Ppo(clip_range, clip_range_value, vf_coef, policy, value)
