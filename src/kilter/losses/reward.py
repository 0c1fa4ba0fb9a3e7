"""Losses of reward models: comparisons, whole rankings, rated responses and thumbs; and centring.

The inputs are described in `registry.REWARD_INPUTS`.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kilter.losses.pair import LabelNoise, smoothed
from kilter.losses.registry import Range, reward_loss
from kilter.ops import less_group_mean, pairs_in_groups

MarginCoef = Annotated[
    float, Range(at_least=0.0, usual=(0.0, 3.0), what="by how much of the data's margin a winner must lead")
]


@reward_loss("bradley_terry", unit="pairs")
def bradley_terry(
    rewards: Tensor,
    group: Tensor,
    rank: Tensor,
    margin: Tensor | None = None,
    *,
    margin_coef: MarginCoef = 0.0,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """Negative log-likelihood of all C(k, 2) pairs of a ranking; a tie is half a win for each side.

        lead = r_winner - r_loser - c m
        loss = -(1 - e) log sigmoid(lead) - e log sigmoid(-lead)
        tie:   -1/2 log sigmoid(r_a - r_b) - 1/2 log sigmoid(r_b - r_a)

    Bradley and Terry 1952; for all pairs of a ranking Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, eq. 1, with
    the margin of Touvron et al. 2023 (Llama 2), arXiv 2307.09288, eq. 2, and the smoothed labels of Wang et al. 2024
    (Secrets of RLHF II), arXiv 2401.06080. InstructGPT divides by C(k, 2) for each prompt; here every pair weighs the
    same, which is equal where all rankings have the same k.

    Use it unless the data say more than who won; `label_smoothing` is the share of verdicts known to be wrong.

    Returns:
        float[P], nats per pair. No difference in reward gives ln 2 = 0.6931, tie or not.
    """
    gap, sign = _compared(rewards, group, rank)
    lead = torch.where(sign == 0, gap, sign * gap)
    if margin is not None:
        lead = lead - sign.abs() * margin_coef * margin
    return smoothed(lead, torch.where(sign == 0, 0.5, label_smoothing))


@reward_loss("davidson", unit="pairs")
def davidson(
    rewards: Tensor,
    group: Tensor,
    rank: Tensor,
    *,
    nu: Annotated[float, Range(above=0.0, usual=(0.05, 3.0), what="odds of a tie between two equally good")] = 0.5,
) -> Tensor:
    """A tie as an outcome of its own, likely where two responses are about equally good.

        loss = -log P(what was said),   2 d = r_a - r_b
        P(a wins) = e^d / (e^d + e^-d + nu),   P(tie) = nu / (e^d + e^-d + nu)

    Davidson 1970 (JASA 65), eq. 2.3, which `kilter data rate --ties davidson` fits too: its nu is the one to set. Of
    two equally good responses, nu / (2 + nu) are called a tie.

    Use it where annotators may say "no difference" and often do: a tie then says that the gap is small, and not that
    the label is a coin toss.

    Returns:
        float[P], nats per pair. No difference in reward and nu = 1 give ln 3 = 1.0986, tie or not.
    """
    gap, sign = _compared(rewards, group, rank)
    half, log_nu = gap / 2, math.log(nu)
    total = torch.logaddexp(torch.logaddexp(half, -half), torch.full_like(half, log_nu))
    return total - torch.where(sign == 0, log_nu, sign * half)


@reward_loss("plackett_luce", unit="prompts")
def plackett_luce(rewards: Tensor, group: Tensor, rank: Tensor) -> Tensor:
    """Negative log-likelihood of a whole ranking: the best is chosen among all, the next among the rest.

        loss_i = -r_i + log sum_{j of the same prompt, rank_j >= rank_i} exp(r_j)

    Luce 1959; Plackett 1975 (Appl. Stat. 24). Ties after Breslow 1974: tied responses stay in each other's sum. For two
    responses it is `bradley_terry`, but for a tie, which counts as two losses there.

    Use it where rankings were made as such: it takes the order once, and the pairs of a ranking, which hang together,
    not as so many verdicts of their own.

    Returns:
        float[R], nats. k equal rewards give ln k! a prompt: 3 give ln 6 = 1.7918.
    """
    rivals = (group[:, None] == group[None, :]) & (rank[None, :] >= rank[:, None])  # bool[R, R]
    return torch.logsumexp(rewards[None, :].masked_fill(~rivals, -math.inf), dim=1) - rewards


@reward_loss("regression", unit="responses")
def regression(
    rewards: Tensor,
    group: Tensor,
    value: Tensor,
    error: Tensor,
    *,
    noise: Annotated[
        float, Range(above=0.0, usual=(0.1, 5.0), what="spread of values around the reward, as `value`")
    ] = 1.0,
    level: Literal["given", "prompt"] = "given",
) -> Tensor:
    """Squared distance from a number that was given to the response, by how surely it is known.

        loss = (r - v)^2 / (2 (noise^2 + error^2))
        level = prompt: r and v less their means over the prompt's responses

    A normal likelihood without its constant; regression on rated scalars as in HelpSteer2 (Wang et al. 2024, arXiv
    2406.08673). `level = prompt` is for values that compare responses of one prompt
    alone, such as those of `kilter data scale`.

    Use it for marks (1 to 5) that mean the same for everybody (`standardize: annotator` for those that do not), or for
    scales made of many comparisons; with `centering: 0`, as the values have a level of their own.

    Returns:
        float[R]. A distance of 2 with noise 1 and no error gives 2.
    """
    gap = rewards - value
    if level == "prompt":
        gap = less_group_mean(gap, group)
    return gap.square() / (2 * (noise**2 + error.square()))


@reward_loss("thumbs", unit="responses")
def thumbs(rewards: Tensor, desirable: Tensor) -> Tensor:
    """Negative log-likelihood of a thumb on a response by itself: the reward is the log-odds of a thumb up.

        up:   loss = -log sigmoid(r)
        down: loss = -log sigmoid(-r)

    Logistic regression (Cox 1958, J. R. Stat. Soc. B 20). Unlike comparisons it takes it that everybody's thumb goes up
    at the same height, and learns that height with the rest: a reward of 0 is as often liked as not.

    Use it where answers were seen one at a time; with `centering: 0`, as the thumbs have a level of their own.

    Returns:
        float[R], nats. A reward of 0 gives ln 2 = 0.6931, up or down.
    """
    return -F.logsigmoid((2 * desirable - 1) * rewards)


def centring(rewards: Tensor, group: Tensor) -> Tensor:
    """Squared sum of each pair's rewards: keeps a reward model's level near 0, which Bradley-Terry leaves free.

        (r_a + r_b)^2

    Eisenstein et al. 2023, arXiv 2312.09244, eq. 2 (their auxiliary loss, before its coefficient of about 0.01).

    Args:
        rewards: float[R].
        group: int[R], which prompt the response answers.
    Returns:
        float[P] in the order of `ops.pairs_in_groups(group)`. Rewards 1 and 2 give 9.
    """
    a, b = pairs_in_groups(group)
    return (rewards[a] + rewards[b]).square()


def _compared(rewards: Tensor, group: Tensor, rank: Tensor) -> tuple[Tensor, Tensor]:
    """Of each pair: the reward of the first less that of the second; 1 where the first is better, -1 the second, 0 tie.

    float[P] each, in the order of `ops.pairs_in_groups(group)`.
    """
    a, b = pairs_in_groups(group)
    return rewards[a] - rewards[b], torch.sign(rank[b] - rank[a]).to(rewards.dtype)
