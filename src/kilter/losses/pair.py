"""Losses over a chosen and a rejected response to one prompt, as functions of their log-probs.

Every one returns float[P], nats per pair. Their inputs are described in `registry.PAIR_INPUTS`.
"""

from __future__ import annotations

from typing import Annotated

from torch import Tensor
from torch.nn import functional as F

from kilter.losses.registry import Range, pair_loss

Beta = Annotated[float, Range(above=0.0, usual=(0.03, 0.5))]
"""Strength of the pull towards the reference."""
LabelNoise = Annotated[float, Range(at_least=0.0, below=0.5, usual=(0.0, 0.4))]
"""Assumed share of flipped labels."""


@pair_loss("dpo")
def dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """Negative log-likelihood of the preferences under the policy's implicit reward.

        m    = beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with e > 0 the "conservative" form, Mitchell 2023,
    ericmitchell.ai/cdpo.pdf, eq. 3.

    Args:
        chosen, rejected: float[P], policy log-prob of each response, nats, summed over its tokens.
        ref_chosen, ref_rejected: float[P], the same under the reference; no gradient.
        beta: > 0; pull towards the reference. 0.1-0.5 is usual.
        label_smoothing: e in [0, 0.5), assumed share of flipped labels.
    Returns:
        float[P], nats per pair. No margin gives ln 2 = 0.6931, whatever beta and e.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)
