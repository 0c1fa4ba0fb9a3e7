"""Losses over single responses with a thumb up or down. Every one returns float[R], one number a response.

The inputs are described in `registry.UNPAIRED_INPUTS`.
"""

from __future__ import annotations

from typing import Annotated

import torch
from torch import Tensor
from torch.nn import functional as F

from kilter.losses.pair import Beta
from kilter.losses.registry import Range, unpaired_loss

Weight = Annotated[float, Range(at_least=0.0, usual=(0.1, 10.0), what="weight of responses of this side")]


@unpaired_loss("kto")
def kto(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    kl: Tensor,
    *,
    beta: Beta = 0.1,
    desirable_weight: Weight = 1.0,
    undesirable_weight: Weight = 1.0,
) -> Tensor:
    """Kahneman and Tversky's value of a gain or a loss against a reference point, from thumbs alone.

        r    = logps - ref_logps,  z = mean log-ratio of mismatched responses over the step, at least 0
        loss = w_up (1 - sigmoid(beta (r - z)))  or  w_down (1 - sigmoid(beta (z - r)))

    Ethayarajh et al. 2024, arXiv 2402.01306, eq. 7, less the constant. The paper asks for
    w_up n_up / (w_down n_down) between 1 and 4/3.

    Use it when there are thumbs and no pairs.

    Returns:
        float[R], no unit. At the reference point 0.5 times the weight.
    """
    gain = beta * (logps - ref_logps - kl)
    return torch.where(desirable > 0, desirable_weight * torch.sigmoid(-gain), undesirable_weight * torch.sigmoid(gain))


@unpaired_loss("apo_zero_unpaired")
def apo_zero_unpaired(
    logps: Tensor,
    ref_logps: Tensor,
    desirable: Tensor,
    *,
    beta: Beta = 0.1,
    desirable_weight: Weight = 1.0,
    undesirable_weight: Weight = 1.0,
) -> Tensor:
    """KTO's value with the reference itself as the reference point: no mismatched responses, no extra forward.

        r    = logps - ref_logps
        loss = w_up (1 - sigmoid(beta r))  or  w_down sigmoid(beta r)

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7 over single responses.

    Use it as `kto` where its baseline costs too much.

    Returns:
        float[R], no unit. Equal to the reference gives 0.5 times the weight.
    """
    at_reference = torch.zeros_like(logps)
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(logps, ref_logps, desirable, at_reference, beta=beta, **weights)


@unpaired_loss("bco")
def bco(logps: Tensor, ref_logps: Tensor, desirable: Tensor, shift: Tensor, *, beta: Beta = 0.1) -> Tensor:
    """A classifier of good and bad whose logit is the implicit reward above its mean.

        r     = logps - ref_logps,  shift = (mean r of desirable + mean r of undesirable) / 2 over the step
        loss  = -log sigmoid(beta (r - shift))  or  -log sigmoid(-beta (r - shift))

    Jung et al. 2024, arXiv 2404.04656, with its reward shift. Departures: the shift is the whole step's, not a moving
    average; the weights by density ratio are not built.

    Use it as `kto`; it needs no mismatched responses.

    Returns:
        float[R], nats. At the shift ln 2 = 0.6931.
    """
    gain = beta * (logps - ref_logps - shift)
    return -F.logsigmoid(torch.where(desirable > 0, gain, -gain))
