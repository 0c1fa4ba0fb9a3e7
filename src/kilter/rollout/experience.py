"""What a rollout taught, token by token: log-probs, values, what was paid, advantages, returns, and their figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from kilter import ops
from kilter.config import PpoConfig
from kilter.rollout.collect import Rollout
from kilter.rollout.reward import RunningNorm, paid_rewards
from kilter.tree import Batch, Group, Response, split_by_response

ASK = {"policy": "logprobs", "reference": "logprobs", "value": "values"}
TRAINED_ON = ("old_logprobs", "old_values", "advantages", "returns")


@dataclass(frozen=True, slots=True)
class Measured:
    """The trunk's answers for every sampled token, [N] in the order of the responses, before any update on them."""

    leaf: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor


def measure(trunk: nn.Module, batches: Sequence[Batch], num_responses: int, device: torch.device) -> Measured:
    """Runs policy, reference and value over `batches`, whose responses carry their number as `response`."""
    found: dict[str, list[Tensor]] = {role: [torch.empty(0)] * num_responses for role in ASK}
    with torch.no_grad():
        for batch in batches:
            answers = trunk(batch.tree.to(device), ASK)
            places = batch.extras["response"].to(torch.int64).tolist()
            for role, values in answers.items():
                for place, part in zip(
                    places, split_by_response(values.cpu(), batch.tree.leaf, len(places)), strict=True
                ):
                    found[role][place] = part
    counts = torch.tensor([len(part) for part in found["policy"]])
    return Measured(
        leaf=torch.repeat_interleave(torch.arange(num_responses), counts),
        logprobs=torch.cat(found["policy"]),
        ref_logprobs=torch.cat(found["reference"]),
        values=torch.cat(found["value"]),
    )


@dataclass(frozen=True, slots=True)
class Pay:
    """What a rollout is paid."""

    scores: Tensor  # float[R], normalised, clipped, less the penalty for cut answers
    rewards: Tensor  # float[N], those at the last tokens, less the price of the KL


def pay(
    scores: Sequence[float],
    finished: Sequence[bool],
    measured: Measured,
    *,
    norm: RunningNorm,
    kl_coef: float,
    config: PpoConfig,
) -> Pay:
    """From scores to rewards. The penalty for a cut answer comes after the normalisation, so it has its unit.

    Args:
        scores, finished: of R answers.
        norm: takes the scores in first; unused when normalisation is off.
    """
    if config.normalize_reward:
        norm.update(scores)
        scores = norm(scores, clip=config.reward_clip)
    paid = torch.tensor(
        [score - (0.0 if end else config.truncation_penalty) for score, end in zip(scores, finished, strict=True)]
    )
    rewards = paid_rewards(paid, measured.logprobs, measured.ref_logprobs, measured.leaf, kl_coef=kl_coef)
    return Pay(paid, rewards)


@dataclass(frozen=True, slots=True)
class Credit:
    """Per sampled token, [N]."""

    advantages: Tensor
    returns: Tensor


def credit(rewards: Tensor, measured: Measured, config: PpoConfig) -> Credit:
    """By GAE over the whole rollout, advantages (then whitened if so configured) and returns (never)."""
    advantages, returns = ops.gae(
        rewards, measured.values, measured.leaf, gamma=config.gamma, gae_lambda=config.gae_lambda
    )
    return Credit(ops.whiten(advantages) if config.whiten_advantages else advantages, returns)


def with_credit(groups: Sequence[Group], measured: Measured, credited: Credit) -> list[Group]:
    """The groups with what PPO's objective reads on every response."""
    columns = (measured.logprobs, measured.values, credited.advantages, credited.returns)
    parts = [split_by_response(column, measured.leaf, int(measured.leaf[-1]) + 1) for column in columns]
    rows = iter(zip(*parts, strict=True))
    return [
        replace(
            group,
            responses=tuple(
                Response(response.ids, per_token=dict(zip(TRAINED_ON, next(rows), strict=True)))
                for response in group.responses
            ),
        )
        for group in groups
    ]


def sampler_gap(rollouts: Sequence[Rollout], measured: Measured) -> float:
    """Largest difference between a token's log-prob when it was sampled and in the trainer's forward, nats."""
    sampled = torch.tensor([logprob for rollout in rollouts for logprob in rollout.completion.logprobs])
    return float((sampled - measured.logprobs).abs().max())


def figures(
    rollouts: Sequence[Rollout], scores: Sequence[float], paid: Pay, measured: Measured, credited: Credit
) -> dict[str, float]:
    """What a rollout looked like. A mean over answers has its standard error beside it, `_sem`, over `samples`."""
    num_responses = len(rollouts)
    per_answer = {
        "score": torch.tensor(scores, dtype=torch.float64),
        "paid_score": paid.scores.double(),
        "reward": ops.sum_by(paid.rewards.double(), measured.leaf, num_responses),
        "kl_k1": ops.sum_by(ops.kl_k1(measured.logprobs, measured.ref_logprobs).double(), measured.leaf, num_responses),
        "kl_k3": ops.sum_by(ops.kl_k3(measured.logprobs, measured.ref_logprobs).double(), measured.leaf, num_responses),
        "length": torch.bincount(measured.leaf, minlength=num_responses).double(),
    }
    found: dict[str, float] = {"samples": float(num_responses)}
    for name, values in per_answer.items():
        mean, sem = ops.mean_and_sem(values)
        found[name] = float(mean)
        if num_responses > 1:
            found[f"{name}_sem"] = float(sem)
    residual = credited.returns - measured.values
    spread = float(credited.returns.var(correction=0))
    if spread > 0:
        found["value_explained"] = 1 - float(residual.var(correction=0)) / spread
    found["truncated"] = sum(not rollout.completion.finished for rollout in rollouts) / num_responses
    found["entropy"] = -float(measured.logprobs.mean())  # nats a token, from the samples
    found["distinct"] = len({rollout.text for rollout in rollouts}) / num_responses
    return {f"rollout/{name}": value for name, value in found.items()}
