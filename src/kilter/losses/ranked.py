"""Losses over whole rankings of responses to a prompt. Every one returns float[R]; a prompt's loss is their sum.

The inputs are described in `registry.RANKED_INPUTS`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor

from kilter.losses.pair import Beta, LabelNoise, smoothed
from kilter.losses.reference_free import RewardScale, TargetMargin
from kilter.losses.registry import Range, ranked_loss
from kilter.losses.reward import plackett_luce

GoldCoef = Annotated[float, Range(at_least=0.0, usual=(0.0, 2.0), what="weight of the best response's NLL a token")]


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
    return plackett_luce(beta * (logps - ref_logps), group, rank)


@ranked_loss("tpo")
def tpo(
    logps: Tensor,
    group: Tensor,
    rank: Tensor,
    tokens: Tensor,
    *,
    beta: Annotated[float, Range(above=0.0, usual=(0.005, 0.5), what="scale of the reward, per nat")] = 0.01,
    nll_coef: GoldCoef = 1.0,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """Likelihood of a prompt's best response beside a contrast of the others, in one step from the base model.

        loss_i = -a * logps_i / |y_i|                                             of the best
        loss_i = sum_{j worse than i} -(1 - e) log sigmoid(m_ij) - e log sigmoid(-m_ij)     of the others
        m_ij   = beta * (logps_i - logps_j)

    Saeidi et al. 2024, arXiv 2405.16681: triples of a gold, a chosen and a rejected response; here rankings of three,
    and of more. Each gold response weighs the same; TRL gives each of their tokens the same weight, which is equal
    where they are equally long.

    Use it for triples when there is no room for a reference and no SFT stage before.

    Returns:
        float[R], nats. Three responses of ln 0.5 a token: ln 2 of the best and ln 2 of the second.
    """
    gold = torch.where(rank == 0, -logps / tokens, 0.0)
    return nll_coef * gold + _below_the_best(beta * logps, group, rank, 0.0, label_smoothing)


@ranked_loss("tpo_l", length_normalized=True)
def tpo_l(
    logps: Tensor,
    group: Tensor,
    rank: Tensor,
    *,
    beta: RewardScale = 2.0,
    gamma: TargetMargin = 0.5,
    nll_coef: GoldCoef = 1.0,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """TPO on mean log-probs with a margin: to `tpo` what SimPO is to DPO.

        loss_i = -a * logps_i                                                     of the best
        loss_i = sum_{j worse than i} -(1 - e) log sigmoid(m_ij) - e log sigmoid(-m_ij)     of the others
        m_ij   = beta * (logps_i - logps_j) - gamma

    Saeidi et al. 2024, arXiv 2405.16681, TPO-L; weights of the gold responses as in `tpo`.

    Use it as `tpo`, when its answers grow longer than their quality explains.

    Returns:
        float[R], nats. Three responses of ln 0.5 a token, gamma 0.5: ln 2 of the best, ln(1 + e^0.5) = 0.9741 of the
        second.
    """
    gold = torch.where(rank == 0, -logps, 0.0)
    return nll_coef * gold + _below_the_best(beta * logps, group, rank, gamma, label_smoothing)


def _below_the_best(rewards: Tensor, group: Tensor, rank: Tensor, gamma: float, label_smoothing: float) -> Tensor:
    """float[R]: each response that is not the best against those of its prompt that are worse."""
    worse = (group[:, None] == group[None, :]) & (rank[None, :] > rank[:, None]) & (rank[:, None] > 0)  # bool[R, R]
    margins = rewards[:, None] - rewards[None, :] - gamma
    return torch.where(worse, smoothed(margins, label_smoothing), 0.0).sum(1)
