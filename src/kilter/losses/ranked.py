"""Losses over whole rankings of responses to a prompt. Every one returns float[R]; a prompt's loss is their sum.

The inputs are described in `registry.RANKED_INPUTS`.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from kilter.losses.pair import Beta
from kilter.losses.registry import ranked_loss


@ranked_loss("dpo_pl")
def dpo_pl(logps: Tensor, ref_logps: Tensor, group: Tensor, rank: Tensor, *, beta: Beta = 0.1) -> Tensor:
    """DPO for rankings: the Plackett-Luce likelihood of the order, best first, under the implicit reward.

        r      = beta (logps - ref_logps)
        loss_i = -r_i + log sum_{j of the same prompt, rank_j >= rank_i} exp(r_j)

    Rafailov et al. 2023, arXiv 2305.18290, appendix A.3, eq. 20. Ties after Breslow 1974: tied responses stay in each
    other's sum.

    Use it when rankings are consistent; the pair losses take every pair of a ranking as if it stood alone.

    Returns:
        float[R], nats. k responses without a margin give ln k! a prompt: 2 give ln 2, as DPO does.
    """
    rewards = beta * (logps - ref_logps)
    rivals = (group[:, None] == group[None, :]) & (rank[None, :] >= rank[:, None])  # bool[R, R]
    return torch.logsumexp(rewards[None, :].masked_fill(~rivals, -math.inf), dim=1) - rewards
