"""Pair losses that need no reference: one model in memory. Most put the likelihood of the chosen response beside.

Every one returns float[P]; the inputs are described in `registry.PAIR_INPUTS`.
"""

from __future__ import annotations

import math
from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from kilter.losses.pair import LabelNoise, smoothed
from kilter.losses.registry import Range, pair_loss
from kilter.ops import clamp_log_ratio

NllCoef = Annotated[float, Range(at_least=0.0, usual=(0.0, 2.0), what="weight of the chosen response's NLL a token")]
RewardScale = Annotated[float, Range(above=0.0, usual=(1.0, 10.0), what="scale of the reward, per nat a token")]
TargetMargin = Annotated[float, Range(at_least=0.0, usual=(0.0, 8.0), what="target margin of the rewards")]


@pair_loss("nll", unit="chosen_tokens")
def chosen_nll(chosen: Tensor) -> Tensor:
    """Negative log-likelihood of the chosen response, per token over the whole step: the SFT part of a mixture.

        loss = -chosen

    TRL's `sft` term; the mixture of `dpo` and this is DPO + NLL with each token of equal weight.

    Use it in a mixture, beside any loss that lowers the likelihood of chosen responses.

    Returns:
        float[P], summed over the response's tokens and divided by the step's. A uniform model over V tokens: ln V.
    """
    return -chosen


@pair_loss("orpo", length_normalized=True)
def orpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: Annotated[
        float, Range(above=0.0, usual=(0.05, 1.0), what="weight of the odds ratio, the paper's lambda")
    ] = 0.1,
    nll_coef: NllCoef = 1.0,
) -> Tensor:
    """Likelihood of the chosen response and the log odds ratio of chosen to rejected, in one step from the base model.

        odds = p / (1 - p),  p = exp(mean log-prob a token)
        loss = -a * chosen - beta * log sigmoid(log odds(chosen) - log odds(rejected))

    Hong et al. 2024, arXiv 2403.07691, eqs. 4 to 7. Means are of each response. TRL takes the first term over all
    tokens of the step, those of the prompt included: the mixture of this with a = 0 and `nll` where prompts are one
    token.

    Use it to align a base model without an SFT stage before.

    Returns:
        float[P], nats. Equal log-probs of ln 0.5 give ln 2 + 0.1 ln 2 = 0.7625.
    """
    return -nll_coef * chosen - beta * F.logsigmoid(_log_odds(chosen) - _log_odds(rejected))


def _log_odds(logp: Tensor) -> Tensor:
    """log(p / (1 - p)) from log p <= 0; a certain response is taken as one of 1 - 1e-6."""
    logp = logp.clamp(max=math.log1p(-1e-6))
    return logp - (-torch.expm1(logp)).log()


@pair_loss("simpo", length_normalized=True)
def simpo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: RewardScale = 2.0,
    gamma: TargetMargin = 1.0,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """The mean log-prob is the reward, and the chosen one's must lead by a margin.

        m    = beta * (chosen / |chosen| - rejected / |rejected|) - gamma
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    Meng et al. 2024, arXiv 2405.14734, eq. 6; the smoothed form as for DPO. gamma / beta of 0.3 to 1.6 is the paper's.

    Use it when there is no room for a reference; watch the plain-text loss, nothing holds the policy near its start.

    Returns:
        float[P], nats. No margin and gamma = 1 give ln(1 + e) = 1.3133.
    """
    return smoothed(beta * (chosen - rejected) - gamma, label_smoothing)


@pair_loss("alphapo", length_normalized=True)
def alphapo(
    chosen: Tensor,
    rejected: Tensor,
    *,
    beta: RewardScale = 2.0,
    gamma: TargetMargin = 1.0,
    alpha: Annotated[
        float, Range(above=0.0, usual=(0.05, 1.0), what="bend of the reward; towards 0 it is SimPO's")
    ] = 0.25,
) -> Tensor:
    """SimPO with a bent reward: it steepens for unlikely responses and flattens for likely ones.

        r    = (1 - p^-alpha) / alpha,  p = exp(mean log-prob a token)
        loss = -log sigmoid(beta (r_chosen - r_rejected) - gamma)

    Gupta et al. 2025, arXiv 2501.03884. Its negative alphas are not offered. -alpha log p is clamped to 20.

    Use it when SimPO lowers the likelihood of both responses too far.

    Returns:
        float[P], nats. No margin and gamma = 1 give ln(1 + e) = 1.3133.
    """
    bent = [-clamp_log_ratio(-alpha * logp)[0].exp() / alpha for logp in (chosen, rejected)]
    return -F.logsigmoid(beta * (bent[0] - bent[1]) - gamma)


@pair_loss("cpo")
def cpo(
    chosen: Tensor,
    rejected: Tensor,
    chosen_tokens: Tensor,
    *,
    beta: Annotated[float, Range(above=0.0, usual=(0.03, 0.5), what="scale of the log-probs, per nat")] = 0.1,
    nll_coef: NllCoef = 1.0,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """DPO's loss with a uniform reference, and the likelihood of the chosen response in the reference's place.

        m    = beta * (chosen - rejected)
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m) - a * chosen / |chosen|

    Xu et al. 2024, arXiv 2401.08417, eq. 3 and the likelihood term after it. Departure: the likelihood is a
    mean over the response's tokens (the authors' code takes it over the step's tokens: the mixture of this with a = 0
    and `nll`).

    Use it to drop the reference from memory and keep the likelihood up.

    Returns:
        float[P], nats. No margin and 0.5 nats a token give ln 2 + 0.5 = 1.1931.
    """
    return smoothed(beta * (chosen - rejected), label_smoothing) - nll_coef * chosen / chosen_tokens
