"""PPO's two losses: the clipped policy and the clipped value."""

from __future__ import annotations

import torch
from torch import Tensor

from kilter.ops import clamp_log_ratio


def ppo_clip(logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, *, clip_range: float = 0.2) -> Tensor:
    """The clipped surrogate: a token gains nothing by moving out of the range in the direction it is paid for.

        ratio = exp(logprobs - old_logprobs)
        loss  = max(-A ratio, -A clip(ratio, 1 - c, 1 + c))

    Schulman et al. 2017, arXiv 1707.06347, eq. 7, with the sign of a loss. The log-ratio is
    clamped to +-20 before `exp`.

    Args:
        logprobs: float[N], of the sampled tokens under the policy.
        old_logprobs: float[N], the same before the first update on these samples; no gradient.
        advantages: float[N]; no gradient.
        clip_range: c in (0, 1).
    Returns:
        float[N]. At the first pass (ratio 1) it is -A.
    """
    ratio = clamp_log_ratio(logprobs - old_logprobs)[0].exp()
    return torch.maximum(-advantages * ratio, -advantages * ratio.clamp(min=1 - clip_range, max=1 + clip_range))


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
