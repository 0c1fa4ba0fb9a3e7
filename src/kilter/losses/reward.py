"""Losses of reward models: Bradley-Terry over every pair of a ranking, and centring."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from kilter.ops import pairs_in_groups


def bradley_terry(rewards: Tensor, group: Tensor, rank: Tensor, *, margin: Tensor | None = None) -> Tensor:
    """Negative log-likelihood of a ranking's pairs, all C(k, 2) of them; a tie is half a win for each side.

        loss = -log sigmoid(r_winner - r_loser - m)
        tie:   -1/2 log sigmoid(r_a - r_b) - 1/2 log sigmoid(r_b - r_a)

    Bradley and Terry 1952; for all pairs of a ranking Ouyang et al. 2022 (InstructGPT), arXiv 2203.02155, eq. 1, with
    the margin of Touvron et al. 2023 (Llama 2), arXiv 2307.09288, eq. 2. InstructGPT divides by C(k, 2) for each
    prompt; here every pair weighs the same, which is equal where all rankings have the same k.

    Args:
        rewards: float[R], one number for each response.
        group: int[R], which prompt the response answers.
        rank: [R], 0 is best; only the order within a group counts, equal ranks are ties.
        margin: float[P] >= 0 in the order of `ops.pairs_in_groups(group)`, by how much the winner should win at least;
            a tie has none.
    Returns:
        float[P], nats per pair. No difference in reward gives ln 2 = 0.6931, tie or not.
    """
    a, b = pairs_in_groups(group)
    sign = torch.sign(rank[b] - rank[a]).to(rewards.dtype)  # 1: a is better, -1: b is, 0: a tie
    gap = rewards[a] - rewards[b]
    lead = torch.where(sign == 0, gap, sign * gap)
    if margin is not None:
        lead = lead - sign.abs() * margin
    tie = 0.5 * (1 - sign.abs())
    return -(1 - tie) * F.logsigmoid(lead) - tie * F.logsigmoid(-lead)


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
