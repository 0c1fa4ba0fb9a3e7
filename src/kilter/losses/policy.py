"""Losses of policy gradients, per scored token: clipped and plain, the KL to a reference, and the clipped value.

`leaf` is the response of each token, 0..R-1. A loss over whole responses (`gspo`, `response_clip`) stands at each token
of its response, so that the mean over the response's tokens is the response's loss.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from kilter.ops import clamp_log_ratio, kl_k1, kl_k2, kl_k3, mean_by, sum_by

KlEstimator = Literal["k1", "k2", "k3"]
KL_ESTIMATORS = {"k1": kl_k1, "k2": kl_k2, "k3": kl_k3}


def ppo_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
) -> Tensor:
    """The clipped surrogate: a token gains nothing by moving out of the range in the direction it is paid for.

        ratio = exp(logprobs - old_logprobs)
        loss  = max(-A ratio, -A clip(ratio, 1 - c, 1 + d))

    Schulman et al. 2017, arXiv 1707.06347, eq. 7, with the sign of a loss; two ranges ("clip-higher", DAPO) are Yu et
    al. 2025, arXiv 2503.14476, eq. 10. The log-ratio is clamped to +-20 before `exp`.

    Args:
        logprobs: float[N], of the sampled tokens under the policy.
        old_logprobs: float[N], the same before the first update on these samples; no gradient.
        advantages: float[N]; no gradient.
        clip_range: c in (0, 1).
        clip_range_high: d > 0; None: c. DAPO has 0.28 above and 0.2 below, so that rare tokens can become likely.
    Returns:
        float[N]. At the first pass (ratio 1) it is -A.
    """
    return _clipped(logprobs - old_logprobs, advantages, clip_range, clip_range_high)


def gspo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    leaf: Tensor,
    num_responses: int,
    *,
    clip_range: float = 3e-4,
    clip_range_high: float | None = 4e-4,
) -> Tensor:
    """The clipped surrogate with one ratio a response: the geometric mean of those of its tokens.

        s    = exp(mean over the response's tokens of (logprobs - old_logprobs))
        loss = max(-A s, -A clip(s, 1 - c, 1 + d))

    Zheng et al. 2025, arXiv 2507.18071, eq. 5-7, the ranges from section 5.1. The mean over a response's tokens is the
    paper's loss and has its gradient, (s A / |y|) sum of d log p, in every token. Unlike GSPO-token (eq. 13) the ratio
    passes the gradient of the whole mean, so advantages are meant to be one number a response.

    Args:
        logprobs, old_logprobs, advantages: as of `ppo_clip`; the advantage stands at each token of its response.
        leaf: int[N]. num_responses: R.
        clip_range, clip_range_high: c and d, as of `ppo_clip`; far smaller, because a mean moves less than a token.
    Returns:
        float[N]. At the first pass (s = 1) it is -A.
    """
    mean = mean_by(logprobs - old_logprobs, leaf, num_responses)
    return _clipped(mean[leaf], advantages, clip_range, clip_range_high)


def response_clip(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    leaf: Tensor,
    num_responses: int,
    *,
    clip_range: float = 0.2,
    clip_range_high: float | None = None,
) -> Tensor:
    """The clipped surrogate of a response as one action: the ratio is that of its whole probability.

        R    = exp(sum over the response's tokens of (logprobs - old_logprobs))
        loss = max(-A R, -A clip(R, 1 - c, 1 + d))

    What TRL's RLOOTrainer minimises: Schulman et al. 2017 (see `ppo_clip`) with the action of Ahmadian et al. 2024,
    arXiv 2402.14740. At the first pass the mean over a response's tokens has REINFORCE's gradient, -A times
    that of the response's log-prob. Arguments as of `gspo`.

    Returns:
        float[N]. At the first pass (R = 1) it is -A.
    """
    total = sum_by(logprobs - old_logprobs, leaf, num_responses)
    return _clipped(total[leaf], advantages, clip_range, clip_range_high)


def _clipped(log_ratio: Tensor, advantages: Tensor, low: float, high: float | None) -> Tensor:
    ratio = clamp_log_ratio(log_ratio)[0].exp()
    near = ratio.clamp(min=1 - low, max=1 + (low if high is None else high))
    return torch.maximum(-advantages * ratio, -advantages * near)


def cispo(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    *,
    clip_range: float = 1.0,  # same above 1: no ratio is below 0
    clip_range_high: float | None = 4.0,
) -> Tensor:
    """The policy gradient with a clipped weight for each token: unlike under `ppo_clip`, none loses its gradient.

        ratio = exp(logprobs - old_logprobs)
        loss  = -stop(clip(ratio, 1 - c, 1 + d)) A logprobs

    MiniMax 2025 (MiniMax-M1), arXiv 2506.13585, eq. 4-5. Its lower range is off, and so is a c of 1. TRL's
    `epsilon_high` is 1 + d, 5 in Khatri et al. 2025, arXiv 2510.13786.

    Args:
        logprobs, old_logprobs, advantages: as of `ppo_clip`.
        clip_range: c in (0, 1].
        clip_range_high: d > 0; None: c.
    Returns:
        float[N]. Advantage 1, log-prob -2, ratio 1 give 2.
    """
    ratio = clamp_log_ratio(logprobs - old_logprobs)[0].exp()
    high = clip_range if clip_range_high is None else clip_range_high
    weight = ratio.clamp(min=1 - clip_range, max=1 + high).detach()
    return -weight * advantages * logprobs


def reinforce(logprobs: Tensor, advantages: Tensor) -> Tensor:  # same if swapped
    """The plain policy gradient: log-probs weighted by what they brought.

        loss = -A logprobs

    Williams 1992, "Simple statistical gradient-following algorithms for connectionist reinforcement learning"; with
    `ops.leave_one_out` it is RLOO (Ahmadian et al. 2024, arXiv 2402.14740). It knows no old policy: every update
    but the first on the same samples is biased.

    Args:
        logprobs: float[N], of the sampled tokens under the policy.
        advantages: float[N]; no gradient.
    Returns:
        float[N]. Advantage 1, log-prob -2 give 2.
    """
    return -advantages * logprobs


def kl_penalty(
    logprobs: Tensor, ref_logprobs: Tensor, estimator: KlEstimator = "k3", *, old_logprobs: Tensor | None = None
) -> Tensor:
    """An estimate of the KL to the reference, as a loss. The estimators agree in value, not in gradient.

        k1  log p - log q              gradient 1 d log p: expected 0, it holds nothing
        k2  (log p - log q)^2 / 2      gradient (log p - log q) d log p: expected, that of KL(p || q)
        k3  q/p - 1 - log(q/p)         gradient (1 - q/p) d log p: expected, that of KL(q || p)

    Estimators: Schulman 2020 (`ops.kl_k1`). k3 is GRPO's (Shao et al. 2024, arXiv 2402.03300, eq. 4). The expectations
    are over the policy's own samples; Tang and Munos 2025, arXiv 2506.09477, on the gradients. k1 belongs into the
    rewards (`rollout.reward.paid_rewards`), where its gradient is that of KL(p || q).

    With `old_logprobs` the estimate is multiplied by the ratio p / p_old, and the gradient goes through that too: k1
    and k3 then have the value and the gradient of KL(p || q) in expectation, though an older policy drew the samples
    (DeepSeek-AI 2025, DeepSeek-V3.2, arXiv 2512.02556, section 3.1). TRL's `use_bias_correction_kl`, which is on there
    by default, is this where ratios are those of tokens; below `gspo` TRL takes the ratio of the response.

    Args:
        logprobs: float[N], under the policy p, with gradient.
        ref_logprobs: float[N], under the reference q; no gradient.
        old_logprobs: float[N], when the samples were drawn; None: no correction.
    Returns:
        float[N], nats. p = 0.5 and q = 0.25 give 0.6931, 0.2402, 0.1931.
    """
    estimate = KL_ESTIMATORS[estimator](logprobs, ref_logprobs)
    if old_logprobs is None:
        return estimate
    return estimate * clamp_log_ratio(logprobs - old_logprobs)[0].exp()


def importance_weights(old_logprobs: Tensor, sampler_logprobs: Tensor, *, cap: float = 2.0) -> tuple[Tensor, Tensor]:
    """Weights that make samples of another engine count as the trainer's own, cut at the top so that few cannot rule.

        w = min(exp(old_logprobs - sampler_logprobs), cap)

    Yao et al. 2025, "Your efficient RL framework secretly brings you off-policy RL training" (truncated importance
    sampling); TRL's `vllm_importance_sampling_mode="token_truncate"`. Multiply a policy loss by them.

    Args:
        old_logprobs: float[N], of the sampled tokens in the trainer's forward, before the first update on them.
        sampler_logprobs: float[N], the same as the sampler gave them.
        cap: > 1.
    Returns:
        (weights float[N] without gradient, share of tokens cut [], NaN of none). Log-ratios 0 and ln 3 give 1, 2 and
        0.5.
    """
    ratio = clamp_log_ratio(old_logprobs - sampler_logprobs)[0].exp().detach()
    return ratio.clamp(max=cap), (ratio > cap).to(ratio.dtype).mean()


def value_clip(values: Tensor, old_values: Tensor, returns: Tensor, *, clip_range: float = 0.2) -> Tensor:
    """Half the squared error of the value, the larger of that and of the value kept within the range of its old one.

        loss = 1/2 max((V - G)^2, (clip(V, V_old - c, V_old + c) - G)^2)

    The PPO authors' code (openai/baselines, ppo2), not in the paper; Engstrom et al. 2020, arXiv 2005.12729, section 3.

    Args:
        values: float[N], now.
        old_values: float[N], when the samples were drawn; no gradient.
        returns: float[N], G; no gradient.
        clip_range: c > 0, in units of the value; infinity switches the clip off.
    Returns:
        float[N]. Value 1, old value 1, return 3 give 2.
    """
    near = old_values + (values - old_values).clamp(min=-clip_range, max=clip_range)
    return 0.5 * torch.maximum((values - returns).square(), (near - returns).square())
