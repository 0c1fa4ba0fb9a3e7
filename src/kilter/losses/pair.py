"""Losses over a chosen and a rejected response, measured against a reference: DPO and what came after it.

Every one returns float[P], nats per pair unless it says otherwise; the inputs are described in `registry.PAIR_INPUTS`.
Without a reference (`reference: none` in a recipe) its log-probs are 0: `hinge` is then SLiC's loss and `dpo` CPO's
without its likelihood term.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kilter.losses.registry import Range, pair_loss
from kilter.ops import clamp_log_ratio

Beta = Annotated[float, Range(above=0.0, usual=(0.03, 0.5), what="pull towards the reference, per nat")]
MeanBeta = Annotated[float, Range(above=0.0, usual=(0.1, 10.0), what="pull towards the reference, per nat a token")]
LabelNoise = Annotated[float, Range(at_least=0.0, below=0.5, usual=(0.0, 0.4), what="assumed share of flipped labels")]


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
    """Negative log-likelihood of the preferences under the policy's implicit reward; conservative when smoothed.

        m    = beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    Rafailov et al. 2023, arXiv 2305.18290, eq. 7; with e > 0 the "conservative" form, Mitchell 2023,
    ericmitchell.ai/cdpo.pdf, eq. 3.

    Use it first; with e > 0 when labels are known to be noisy. The log-prob of chosen responses often falls with it.

    Returns:
        float[P]. No margin gives ln 2 = 0.6931, whatever beta and e.
    """
    return smoothed(beta * ((chosen - ref_chosen) - (rejected - ref_rejected)), label_smoothing)


def smoothed(margin: Tensor, label_smoothing: float | Tensor) -> Tensor:
    """-(1 - e) log sigmoid(margin) - e log sigmoid(-margin)."""
    return -(1 - label_smoothing) * F.logsigmoid(margin) - label_smoothing * F.logsigmoid(-margin)


@pair_loss("robust")
def robust(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelNoise = 0.1,
) -> Tensor:
    """DPO's loss without the bias of flipped labels: its mean over noisy labels is DPO's over clean ones.

        m    = beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]
        loss = [-(1 - e) log sigmoid(m) + e log sigmoid(-m)] / (1 - 2 e)

    Chowdhury et al. 2024, arXiv 2403.00409, the loss of rDPO. Not bounded below: the better a pair is fitted, the more
    it pays.

    Use it when the share of flipped labels is known; too large an e makes it diverge.

    Returns:
        float[P]. No margin gives ln 2 = 0.6931, whatever beta and e.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    clean, flipped = -(1 - label_smoothing) * F.logsigmoid(margin), label_smoothing * F.logsigmoid(-margin)
    return (clean + flipped) / (1 - 2 * label_smoothing)


@pair_loss("ipo", length_normalized=True)
def ipo(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: MeanBeta = 0.1) -> Tensor:
    """Squared distance of the log-ratio's margin from 1 / (2 beta): it cannot grow without end as DPO's can.

        loss = [(chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 beta)]^2

    Azar et al. 2023, arXiv 2310.12036, eq. 17 (beta is their tau). Departure, as in TRL and confirmed there by the
    authors: log-probs are means over a response's tokens, not sums.

    Use it when labels are certain or few, so that DPO overfits.

    Returns:
        float[P], square nats. No margin gives 1 / (4 beta^2): 25 at beta = 0.1.
    """
    return ((chosen - ref_chosen) - (rejected - ref_rejected) - 1 / (2 * beta)).square()


@pair_loss("hinge")
def hinge(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Beta = 0.1) -> Tensor:
    """A margin of 1 and no more: pairs that are further apart give no gradient.

        loss = max(0, 1 - beta * [(chosen - ref_chosen) - (rejected - ref_rejected)])

    Liu et al. 2023 (RSO), arXiv 2309.06657, the hinge loss, after Zhao et al. 2023 (SLiC-HF), arXiv 2305.10425, which
    has no reference.

    Use it to leave fitted pairs alone; with `reference: none` it is SLiC's calibration loss.

    Returns:
        float[P]. No margin gives 1.
    """
    return F.relu(1 - beta * ((chosen - ref_chosen) - (rejected - ref_rejected)))


@pair_loss("dpo_norm", length_normalized=True)
def dpo_norm(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: MeanBeta = 2.0,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """DPO on log-ratios per token: a longer response has no louder voice.

        m    = beta * [(chosen - ref_chosen) / |chosen| - (rejected - ref_rejected) / |rejected|]
        loss = -(1 - e) log sigmoid(m) - e log sigmoid(-m)

    Lambert et al. 2024 (Tulu 3), arXiv 2411.15124, length-normalised DPO; TRL's `sigmoid_norm`.

    Use it when DPO makes answers longer than their quality explains.

    Returns:
        float[P]. No margin gives ln 2 = 0.6931.
    """
    return dpo(
        chosen, rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, beta=beta, label_smoothing=label_smoothing
    )


@pair_loss("f_dpo")
def f_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Beta = 0.1,
    divergence: Literal["forward_kl", "reverse_kl", "js", "alpha"] = "js",
    alpha: Annotated[
        float, Range(above=0.0, below=1.0, usual=(0.1, 0.9), what="of the alpha divergence; towards 0 reverse KL")
    ] = 0.5,
) -> Tensor:
    """DPO under another divergence from the reference than the reverse KL.

        u    = exp(log-ratio of policy to reference)
        f'   = log u (reverse_kl), -1 / u (forward_kl), log(2 u / (1 + u)) (js), (1 - u^-alpha) / alpha (alpha)
        loss = -log sigmoid(beta [f'(u_chosen) - f'(u_rejected)])

    Wang et al. 2023, arXiv 2309.16240, the loss of f-DPO, constants left out. TRL's `f_alpha_divergence_coef` is
    1 - alpha. Exponents are clamped to +-20.

    Use it for more diverse answers (js, forward_kl) at some cost in reward.

    Returns:
        float[P]. No margin gives ln 2 = 0.6931 where both log-ratios are equal.
    """
    scores = [_derivative(ratio, divergence, alpha) for ratio in (chosen - ref_chosen, rejected - ref_rejected)]
    return -F.logsigmoid(beta * (scores[0] - scores[1]))


def _derivative(log_ratio: Tensor, divergence: str, alpha: float) -> Tensor:
    """f'(exp(log_ratio)) up to a constant."""
    if divergence == "forward_kl":
        return -clamp_log_ratio(-log_ratio)[0].exp()
    if divergence == "js":
        return F.logsigmoid(log_ratio)
    if divergence == "alpha":
        return -clamp_log_ratio(-alpha * log_ratio)[0].exp() / alpha
    return log_ratio


@pair_loss("exo")
def exo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: Annotated[
        float, Range(above=0.0, below=0.5, usual=(1e-4, 0.4), what="share of the label given to the rejected side")
    ] = 1e-3,
) -> Tensor:
    """Reverse KL from the policy's preference to the smoothed label, where DPO takes the forward one.

        q    = sigmoid(beta * [(chosen - ref_chosen) - (rejected - ref_rejected)])
        loss = q log(q / (1 - e)) + (1 - q) log((1 - q) / e)

    Ji et al. 2024, arXiv 2402.00856, eq. 16 for two responses.

    Use it to seek the best answer rather than to cover all good ones.

    Returns:
        float[P]. No margin gives -ln 2 - ln(e (1 - e)) / 2: 2.7612 at e = 0.001.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    right, wrong = F.logsigmoid(margin), F.logsigmoid(-margin)
    return right.exp() * (right - math.log1p(-label_smoothing)) + wrong.exp() * (wrong - math.log(label_smoothing))


@pair_loss("nca")
def nca(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Annotated[float, Range(above=0.0, usual=(1e-3, 0.5), what="pull towards the reference, per nat")] = 0.01,
) -> Tensor:
    """Noise-contrastive alignment: each response against the reference alone, so the chosen one keeps its likelihood.

        r    = beta * (log-prob - reference's)
        loss = -log sigmoid(r_chosen) - 1/2 log sigmoid(-r_chosen) - 1/2 log sigmoid(-r_rejected)

    Chen et al. 2024, arXiv 2402.05369, NCA with the labels of a pair.

    Use it when DPO lowers the likelihood of chosen responses and that hurts.

    Returns:
        float[P]. Equal to the reference gives 2 ln 2 = 1.3863.
    """
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return -F.logsigmoid(good) - 0.5 * F.logsigmoid(-good) - 0.5 * F.logsigmoid(-bad)


@pair_loss("bco_pair")
def bco_pair(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Beta = 0.1) -> Tensor:
    """A classifier of good and bad whose logit is the implicit reward, on pairs.

        loss = -log sigmoid(beta (chosen - ref_chosen)) - log sigmoid(-beta (rejected - ref_rejected))

    Jung et al. 2024, arXiv 2404.04656, without the reward shift; `bco` has it and needs no pairs.

    Use it inside a mixture; alone on thumbs, take `bco`.

    Returns:
        float[P]. Equal to the reference gives 2 ln 2 = 1.3863.
    """
    return -F.logsigmoid(beta * (chosen - ref_chosen)) - F.logsigmoid(-beta * (rejected - ref_rejected))


@pair_loss("sppo")
def sppo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Annotated[float, Range(above=0.0, usual=(1e-4, 0.5), what="inverse of the step of self-play")] = 0.1,
) -> Tensor:
    """Self-play preference optimisation with hard labels: each log-ratio is drawn to its own target.

        loss = (chosen - ref_chosen - 1 / (2 beta))^2 + (rejected - ref_rejected + 1 / (2 beta))^2

    Wu et al. 2024, arXiv 2405.00675, eq. 4.7 with a win probability of 1 and 0 (beta is their 1 / eta).

    Use it online, round by round, each from the last policy.

    Returns:
        float[P], square nats. Equal to the reference gives 1 / (2 beta^2): 50 at beta = 0.1.
    """
    target = 0.5 / beta
    return (chosen - ref_chosen - target).square() + (rejected - ref_rejected + target).square()


@pair_loss("apo_zero")
def apo_zero(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Beta = 0.1) -> Tensor:
    """Anchored: raises the chosen response above the reference and lowers the rejected one below it.

        loss = 1 - sigmoid(beta (chosen - ref_chosen)) + sigmoid(beta (rejected - ref_rejected))

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 7.

    Use it when chosen responses are better than what the model writes by itself.

    Returns:
        float[P], no unit. Equal to the reference gives 1.
    """
    return torch.sigmoid(-beta * (chosen - ref_chosen)) + torch.sigmoid(beta * (rejected - ref_rejected))


@pair_loss("apo_down")
def apo_down(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor, *, beta: Beta = 0.1) -> Tensor:
    """Anchored: lowers both responses, the rejected one more.

        u    = chosen - ref_chosen,  v = rejected - ref_rejected
        loss = sigmoid(beta u) + 1 - sigmoid(beta (u - v))

    D'Oosterlinck et al. 2024, arXiv 2408.06266, eq. 8.

    Use it when even the chosen responses are worse than what the model writes by itself.

    Returns:
        float[P], no unit. Equal to the reference gives 1.
    """
    good, bad = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    return torch.sigmoid(good) + torch.sigmoid(bad - good)


@pair_loss("discopop")
def discopop(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    *,
    beta: Annotated[float, Range(above=0.0, usual=(0.01, 0.5), what="pull towards the reference, per nat")] = 0.05,
    tau: Annotated[float, Range(above=0.0, usual=(0.01, 1.0), what="width of the blend between the two losses")] = 0.05,
) -> Tensor:
    """A blend of the logistic and the exponential loss that a language model's search found.

        m    = beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]
        s    = sigmoid(m / tau)
        loss = -(1 - s) log sigmoid(m) + s exp(-m)

    Lu et al. 2024, arXiv 2406.08414, eq. 5. Not monotone: near no margin a larger one raises it. -m is clamped to +-20.

    Use it for comparison.

    Returns:
        float[P]. No margin gives (ln 2 + 1) / 2 = 0.8466.
    """
    margin = beta * ((chosen - ref_chosen) - (rejected - ref_rejected))
    blend = torch.sigmoid(margin / tau)
    return -(1 - blend) * F.logsigmoid(margin) + blend * clamp_log_ratio(-margin)[0].exp()


@pair_loss("ld_dpo")
def ld_dpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_head: Tensor,
    rejected_head: Tensor,
    ref_chosen_head: Tensor,
    ref_rejected_head: Tensor,
    *,
    beta: Beta = 0.1,
    alpha: Annotated[
        float, Range(at_least=0.0, usual=(0.0, 1.0), what="weight of what the longer response has beyond the shorter")
    ] = 0.5,
) -> Tensor:
    """DPO in which the longer response's surplus counts less.

        l    = min(|chosen|, |rejected|);  lp = log-prob of the first l tokens + alpha * that of the rest
        loss = -log sigmoid(beta * [(lp - lp_ref)_chosen - (lp - lp_ref)_rejected])

    Liu et al. 2024, arXiv 2409.06411; the reference is cut in the same way.

    Use it when DPO makes answers longer; alpha = 1 is DPO.

    Returns:
        float[P]. No margin gives ln 2 = 0.6931.
    """
    good = alpha * (chosen - ref_chosen) + (1 - alpha) * (chosen_head - ref_chosen_head)
    bad = alpha * (rejected - ref_rejected) + (1 - alpha) * (rejected_head - ref_rejected_head)
    return -F.logsigmoid(beta * (good - bad))


@pair_loss("wpo")
def wpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    likeness: Tensor,
    *,
    beta: Beta = 0.1,
) -> Tensor:
    """DPO with pairs weighted by how likely the policy is to write them itself: off-policy data as if on-policy.

        likeness = w_chosen w_rejected,  w = exp(mean_t [log p(y_t) - log sum_v p(v)^2])
        loss     = -likeness * log sigmoid(beta * [(chosen - ref_chosen) - (rejected - ref_rejected)])

    Zhou et al. 2024, arXiv 2406.11827, eq. 2 with their sampled alignment.

    Use it when the pairs were written by other models.

    Returns:
        float[P]. No margin and a likeness of 0.5 give 0.3466.
    """
    return likeness * dpo(chosen, rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, beta=beta)


@pair_loss("rpo")
def rpo(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    chosen_tokens: Tensor,
    *,
    beta: Beta = 0.1,
    nll_coef: Annotated[
        float, Range(at_least=0.0, usual=(0.0, 2.0), what="weight of the chosen response's NLL a token")
    ] = 1.0,
) -> Tensor:
    """DPO with the negative log-likelihood of the chosen response beside it.

        loss = -log sigmoid(beta * [(chosen - ref_chosen) - (rejected - ref_rejected)]) - a * chosen / |chosen|

    Pang et al. 2024 (iterative reasoning preference optimisation), arXiv 2404.19733, eq. 1. Each response weighs the
    same in the second term; the mixture of `dpo` and `nll` gives each token the same weight, as TRL's does.

    Use it when the log-prob of chosen responses falls and the text gets worse with it.

    Returns:
        float[P]. No margin and 0.5 nats a token give ln 2 + 0.5 = 1.1931.
    """
    return (
        dpo(chosen, rejected, ref_chosen=ref_chosen, ref_rejected=ref_rejected, beta=beta)
        - nll_coef * chosen / chosen_tokens
    )


@pair_loss("aot")
def aot(
    chosen: Tensor,
    rejected: Tensor,
    ref_ranked: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """Stochastic dominance instead of pair by pair: the step's sorted margins against the reference's sorted margins.

        d_(i)  = i-th smallest chosen - rejected of the step under the policy, d_ref_(i) under the reference
        loss_i = smoothed -log sigmoid(beta (d_(i) - d_ref_(i)))

    Melnyk et al. 2024, arXiv 2406.05882, algorithm 1 (paired). The order is of the whole step, over all processes.

    Use it with large steps, when it is the distribution of rewards that has to move.

    Returns:
        float[P]. A policy equal to the reference gives ln 2 = 0.6931 for every pair.
    """
    return smoothed(beta * (chosen - rejected - ref_ranked), label_smoothing)


@pair_loss("aot_unpaired")
def aot_unpaired(
    chosen: Tensor,
    rejected: Tensor,
    ref_chosen: Tensor,
    ref_rejected: Tensor,
    rejected_ranked: Tensor,
    chosen_ranked: Tensor,
    *,
    beta: Beta = 0.1,
    label_smoothing: LabelNoise = 0.0,
) -> Tensor:
    """Stochastic dominance of the chosen log-ratios over the rejected ones, which need not be of the same prompts.

        u_(i)  = i-th smallest chosen - ref_chosen of the step,  v_(i) = i-th smallest rejected - ref_rejected
        loss_i = smoothed -log sigmoid(beta (u_(i) - v_(i)))

    Melnyk et al. 2024, arXiv 2406.05882, algorithm 1 (unpaired). The order is of the whole step, over all processes.
    The value stands at the chosen response, and the gradient reaches both: each against the other's value.

    Use it as `aot`, when pairs are not to be trusted as pairs.

    Returns:
        float[P]. A policy equal to the reference gives ln 2 = 0.6931 for every pair.
    """
    at_chosen = smoothed(beta * (chosen - ref_chosen - rejected_ranked), label_smoothing)
    at_rejected = smoothed(beta * (chosen_ranked - (rejected - ref_rejected)), label_smoothing)
    return at_chosen + at_rejected - at_rejected.detach()
