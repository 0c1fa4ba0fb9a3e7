"""What a rollout taught, token by token: log-probs, values, what was paid, advantages, returns, and their figures."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from kilter import ops
from kilter.config import PolicyConfig
from kilter.data.chat import ChatEncoder
from kilter.errors import CheckError
from kilter.losses.policy import KL_ESTIMATORS
from kilter.rollout.algorithms import Credit, Paid, Steps
from kilter.rollout.collect import Rollout
from kilter.rollout.reward import paid_rewards
from kilter.rollout.several import Earned
from kilter.tree import Batch, Group, Response, split_by_response

ASK = {"policy": "kl:reference", "value": "values"}
READS = ("policy", "reference", "value")
"""The roles that run for it."""
REST = 1e-6
"""What steps leave of an answer's pay, below which it is rounding."""


@dataclass(frozen=True, slots=True)
class Measured:
    """The trunk's answers for every sampled token, [N] in the order of the responses, before any update on them."""

    leaf: Tensor
    logprobs: Tensor
    ref_logprobs: Tensor
    values: Tensor | None
    """None: there is no critic."""
    kl: Tensor | None = None
    """KL(policy || reference) of the whole vocabulary at each token's position; None: not measured."""


def measure(
    trunk: nn.Module, batches: Sequence[Batch], num_responses: int, device: torch.device, *, critic: bool = True
) -> Measured:
    """Runs policy, reference and value over `batches`, whose responses carry their number as `response`.

    Each model and each language head runs once: log-probs and the exact KL are read off the same logits, so the KL
    costs some passes over a chunk of them.
    """
    ask = {role: want for role, want in ASK.items() if critic or want != "values"}
    found: dict[str, list[Tensor]] = {role: [torch.empty(0)] * num_responses for role in ask}
    with torch.no_grad():
        for batch in batches:
            answers = trunk(batch.tree.to(device), ask)
            places = batch.extras["response"].to(torch.int64).tolist()
            for role, values in answers.items():
                for place, part in zip(
                    places, split_by_response(values.cpu(), batch.tree.leaf, len(places)), strict=True
                ):
                    found[role][place] = part
    counts = torch.tensor([len(part) for part in found["policy"]])
    logprobs, kl, ref_logprobs = torch.cat(found["policy"]).unbind(1)
    return Measured(
        leaf=torch.repeat_interleave(torch.arange(num_responses), counts),
        logprobs=logprobs.contiguous(),
        ref_logprobs=ref_logprobs.contiguous(),
        values=torch.cat(found["value"]) if critic else None,
        kl=kl.contiguous(),
    )


@dataclass(frozen=True, slots=True)
class Pay:
    """What a rollout is paid."""

    scores: Tensor  # float[R], as they were scaled, less the penalty for cut answers
    rewards: Tensor  # float[N], those of steps where they end, the rest at the last tokens, less the price of the KL
    steps: Steps | None = None


def pay(
    earned: Sequence[Earned],
    finished: Sequence[bool],
    measured: Measured,
    *,
    kl_coef: float,
    config: PolicyConfig,
    ends: Sequence[Sequence[int]] = (),
) -> Pay:
    """From what answers earned to rewards.

    Args:
        earned, finished: of R answers; the penalty for a cut one has the unit of what they earned.
        ends: of each answer's steps, the token of the answer at which each ends; needed where there are any.
    """
    penalties = [0.0 if end else config.truncation_penalty for end in finished]
    paid = torch.tensor([one.total - penalty for one, penalty in zip(earned, penalties, strict=True)])
    rewards = paid_rewards(paid, measured.logprobs, measured.ref_logprobs, measured.leaf, kl_coef=kl_coef)
    if not any(one.steps for one in earned):
        return Pay(paid, rewards)
    counts = torch.bincount(measured.leaf, minlength=len(earned))
    last = counts.cumsum(0) - 1
    answer = torch.tensor([at for at, places in enumerate(ends) for _ in places])
    token = (last - counts + 1)[answer] + torch.tensor([place for places in ends for place in places])
    reward = torch.tensor([step.reward for one in earned for step in one.steps])
    rewards = rewards.index_add(0, token, reward).index_add(0, last[answer], -reward)
    rest = torch.tensor([one.rest - penalty for one, penalty in zip(earned, penalties, strict=True)])
    if float(rest.abs().max()) > REST:
        reward, token = torch.cat([reward, rest]), torch.cat([token, last])
    return Pay(paid, rewards, Steps(reward, token))


def step_ends(rollouts: Sequence[Rollout], earned: Sequence[Earned], encoder: ChatEncoder) -> list[list[int]]:
    """The token of its answer at which each step ends: the first with which its text is there.

    Raises:
        CheckError: a step that ends outside the answer's text, or is paid no finite number.
    """
    found = []
    for rollout, one in zip(rollouts, earned, strict=True):
        for end, reward in one.steps:
            if not (0 < end <= len(rollout.text) and math.isfinite(reward)):
                raise CheckError(
                    f"a scorer pays {reward:g} for a step that ends at character {end} of {len(rollout.text)} of the "
                    f"answer {rollout.text[:80]!r}; a step ends within the text, and is paid a finite number"
                )
        found.append([_token_at(encoder, rollout.completion.ids, end) for end, _ in one.steps])
    return found


def _token_at(encoder: ChatEncoder, ids: tuple[int, ...], end: int) -> int:
    def characters(length: int) -> int:
        return len(encoder.decode(ids[:length]))

    return bisect_left(range(1, len(ids)), end, key=characters)


def credit(
    how: Callable[[Paid, PolicyConfig], Credit],
    paid: Pay,
    measured: Measured,
    group: Tensor,
    config: PolicyConfig,
) -> Credit:
    """Advantages over the whole rollout, then whitened if so configured, and a critic's returns, which never are."""
    advantages, returns = how(Paid(paid.rewards, measured.leaf, group, measured.values, paid.steps), config)
    return ops.whiten(advantages) if config.whiten_advantages else advantages, returns


def with_credit(
    groups: Sequence[Group],
    measured: Measured,
    credited: Credit,
    *,
    reference: bool,
    importance: Tensor | None = None,
) -> list[Group]:
    """The groups with what the objective reads on every response; `reference`: also the reference's log-probs."""
    advantages, returns = credited
    columns: dict[str, Tensor | None] = {
        "old_logprobs": measured.logprobs,
        "old_values": measured.values,
        "advantages": advantages,
        "returns": returns,
        "ref_logprobs": measured.ref_logprobs if reference else None,
        "importance": importance,
    }
    there = {name: column for name, column in columns.items() if column is not None}
    size = int(measured.leaf[-1]) + 1
    parts = [split_by_response(column, measured.leaf, size) for column in there.values()]
    rows = iter(zip(*parts, strict=True))
    return [
        replace(
            group,
            responses=tuple(
                Response(response.ids, per_token=dict(zip(there, next(rows), strict=True)))
                for response in group.responses
            ),
        )
        for group in groups
    ]


class Correction(NamedTuple):
    """What is done where the sampler computes the policy in another way than the trainer."""

    cap: float
    """Of the importance weights (`losses.importance_weights`)."""
    max_gap: float
    """Mean difference of a token's log-probs, nats, above which a rollout is refused."""


def sampled_logprobs(rollouts: Sequence[Rollout]) -> Tensor:
    """float[N], of every token as it was drawn."""
    return torch.tensor([logprob for rollout in rollouts for logprob in rollout.completion.logprobs])


def figures(
    rollouts: Sequence[Rollout], scores: Sequence[float], paid: Pay, measured: Measured, credited: Credit
) -> dict[str, float]:
    """What a rollout looked like. A mean over answers has its standard error beside it, `_sem`, over `samples`.

    `kl_k1`, `kl_k2`, `kl_k3` and `kl_exact` are sums over an answer's tokens and estimate one number, the KL of the
    policy's answers to the reference's; k2 with a bias that grows with the distance. `kl_exact` knows each position's
    KL and samples only which positions there are, so it usually varies least (Amini et al. 2025, arXiv 2504.10637:
    Rao-Blackwell at each position).
    """
    num_responses = len(rollouts)
    per_token = {"reward": paid.rewards}
    for name, estimate in KL_ESTIMATORS.items():
        per_token[f"kl_{name}"] = estimate(measured.logprobs, measured.ref_logprobs)
    if measured.kl is not None:
        per_token["kl_exact"] = measured.kl
    per_answer = {
        "score": torch.tensor(scores, dtype=torch.float64),
        "paid_score": paid.scores.double(),
        **{name: ops.sum_by(values.double(), measured.leaf, num_responses) for name, values in per_token.items()},
        "length": torch.bincount(measured.leaf, minlength=num_responses).double(),
    }
    found: dict[str, float] = {"samples": float(num_responses)}
    for name, values in per_answer.items():
        mean, sem = ops.mean_and_sem(values)
        found[name] = float(mean)
        if num_responses > 1:
            found[f"{name}_sem"] = float(sem)
    _, returns = credited
    if returns is not None and measured.values is not None and (spread := float(returns.var(correction=0))) > 0:
        found["value_explained"] = 1 - float((returns - measured.values).var(correction=0)) / spread
    found["truncated"] = sum(not rollout.completion.finished for rollout in rollouts) / num_responses
    found["entropy"] = -float(measured.logprobs.mean())  # nats a token, from the samples
    found["distinct"] = len({rollout.text for rollout in rollouts}) / num_responses
    return {f"rollout/{name}": value for name, value in found.items()}
