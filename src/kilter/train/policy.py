"""The objective of policy gradients: PPO, GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO, REINFORCE++ are its cases.

The source says how good each token was (`advantages`); here is how the policy moves towards it.

| method | advantages | loss | aggregate |
|---|---|---|---|
| PPO | `ops.gae`, whitened | ppo_clip, with a value role | token |
| GRPO | `ops.group_advantages` | ppo_clip, with kl_coef | sequence |
| Dr. GRPO | the same, scale "none" | ppo_clip | constant |
| DAPO | `ops.group_advantages` | ppo_clip, clip_range_high 0.28 | token |
| GSPO | `ops.group_advantages` | gspo | sequence |
| CISPO | `ops.group_advantages` | cispo | token |
| RLOO | `ops.leave_one_out` | response_clip (TRL); reinforce at constant_length 1 (paper) | sequence; constant |
| REINFORCE++ | `ops.reinforce_plus_plus` | ppo_clip | token |
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, TypedDict, assert_never

import torch
from torch import Tensor, nn

from kilter.errors import CheckError, ConfigError
from kilter.losses import KlEstimator, cispo, gspo, kl_penalty, ppo_clip, reinforce, response_clip, value_clip
from kilter.ops import clamp_log_ratio, kl_k3, mean_by
from kilter.train.objectives import LossOutput, extra, mean_of
from kilter.tree import Batch

PolicyLoss = Literal["ppo_clip", "gspo", "response_clip", "cispo", "reinforce"]
Aggregate = Literal["token", "sequence", "constant"]


EXTREME = 1.0
"""Nats by which a token's log-prob may move on one rollout before its ratio counts as extreme: a factor of e."""


class _Clip(TypedDict, total=False):
    clip_range: float
    clip_range_high: float | None


def aggregated(
    losses: Tensor, leaf: Tensor, num_responses: int, *, how: Aggregate, constant_length: int = 0
) -> tuple[Tensor, str]:
    """Losses of tokens as a sum and what the step divides it by: who counts as much as whom.

        "token"     sum over tokens, by tokens: every token of the step alike (DAPO, eq. 8)
        "sequence"  sum over responses of the mean over its tokens, by responses: every response alike (GRPO, eq. 3)
        "constant"  sum over tokens / constant_length, by responses: neither by its length (Dr. GRPO, section 3.2)

    Args:
        losses: float[N]. leaf: int[N]. num_responses: R; a response without tokens counts with loss 0.
    Returns:
        (sum [], its unit). Losses 1, 1, 4 of responses 0, 0, 1: 6 by 3 tokens, 5 by 2 responses, 6 / 10 by 2 responses
        at length 10.
    """
    match how:
        case "token":
            return losses.sum(), "tokens"
        case "sequence":
            return mean_by(losses, leaf, num_responses).sum(), "responses"
        case "constant":
            return losses.sum() / constant_length, "responses"
        case _:
            assert_never(how)


@dataclass(frozen=True, kw_only=True)
class PolicyGradient:
    """A policy loss, maybe the KL to a reference, and with a critic the clipped value loss (per token, always).

    Extras: `old_logprobs`, `advantages`; with `weighted` also `importance` (`losses.importance_weights`); with a critic
    `old_values`, `returns`, float[N] each. With a `kl_coef` the batch carries `ref_logprobs`. Advantages are used as
    they are: the source scales them over the whole rollout, or not.

    Raises:
        ConfigError: "constant" without its length, or a clip range for a loss that clips nothing.
    """

    loss: PolicyLoss = "ppo_clip"
    aggregate: Aggregate = "token"
    constant_length: int = 0
    """What "constant" divides by: the longest that an answer may be, tokens."""
    clip_range: float | None = None
    """Of the probability ratio, downwards; None: both ranges are the loss's own."""
    clip_range_high: float | None = None
    """The same upwards; None: as downwards."""
    kl_coef: float = 0.0
    """Weight of the KL to the reference as a loss; 0: none. PPO and RLOO pay for it in the rewards instead."""
    kl_estimator: KlEstimator | Literal["exact"] = "k3"
    """`losses.kl_penalty`; "exact": KL(p || q) of the whole vocabulary at each scored position (`heads.whole_stats`),
    and its gradient, with the positions held as they are. The reference runs in every step then: a forward without
    gradient and a language head, and the head once more in the backward of many positions."""
    entropy_coef: float = 0.0
    """Weight of the policy's entropy at each scored position, taken from the loss; 0: not computed."""
    kl_corrected: bool = False
    """The estimate is multiplied by the token's ratio, so that its gradient is that of the KL (`losses.kl_penalty`)."""
    weighted: bool = False
    """The policy loss (not the KL) is multiplied by the extra `importance`."""
    clip_range_value: float = 0.2
    """Of the value's move, in the value's units; 0: no clip."""
    vf_coef: float = 0.5
    """Weight of the value loss."""
    policy: str = "policy"
    value: str | None = None
    """The role of the critic; None: no critic."""
    value_alone: bool = False
    """Only the critic learns. The policy does not run and has no gradient at all: AdamW leaves such weights and their
    moments as they are, where a gradient of 0 would let both decay."""
    reference: str = "reference"
    """The role that "exact" is measured to."""

    def __post_init__(self) -> None:
        if self.aggregate == "constant" and self.constant_length <= 0:
            raise ConfigError(
                f"constant_length is {self.constant_length}; aggregate 'constant' divides by it: set it to the longest "
                "that an answer may be, in tokens"
            )
        if self.clip_range is None and self.clip_range_high is not None:
            raise ConfigError(f"clip_range_high is {self.clip_range_high} and clip_range is not set; set both")
        if self.loss == "reinforce" and self.clip_range is not None:
            raise ConfigError(f"clip_range is {self.clip_range}, but the loss 'reinforce' clips nothing: leave it out")
        if self.kl_estimator == "exact" and self.kl_corrected:
            raise ConfigError("kl_corrected weighs samples, and kl_estimator 'exact' takes none: leave one of them out")
        if self.value_alone and self.value is None:
            raise ConfigError("value_alone is set and there is no critic; name the role of one as `value`")

    @property
    def roles(self) -> tuple[str, ...]:
        return (self.policy,) if self.value is None else (self.policy, self.value)

    @property
    def needs_reference(self) -> bool:
        """Whether batches must carry the reference's log-probs."""
        return self.kl_coef != 0 and self.kl_estimator != "exact"

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        if self.value_alone:
            assert self.value is not None
            return self._critic(trunk(batch.tree, {self.value: "values"})[self.value], batch)
        exact = self.kl_coef != 0 and self.kl_estimator == "exact"
        whole = ["entropy"] * (self.entropy_coef != 0) + [f"kl:{self.reference}"] * exact
        ask = {self.policy: "+".join(whole) or "logprobs"}
        answers = trunk(batch.tree, ask | ({} if self.value is None else {self.value: "values"}))
        columns = answers[self.policy].unbind(1) if whole else [answers[self.policy]]  # float[N] each
        logprobs = columns[0]
        parts = [self._policy(logprobs, batch)]
        if self.kl_coef != 0:
            parts.append(self._kl(columns[1] if exact else self._estimated(logprobs, batch), batch))
        if self.entropy_coef != 0:
            parts.append(self._entropy(columns[-1], batch))
        if self.value is not None:
            parts.append(self._critic(answers[self.value], batch))
        return LossOutput(
            {name: term for part in parts for name, term in part.terms.items()},
            {name: figure for part in parts for name, figure in part.metrics.items()},
        )

    def _policy(self, logprobs: Tensor, batch: Batch) -> LossOutput:
        old_logprobs, advantages = self._extra(batch, "old_logprobs"), self._extra(batch, "advantages")
        clip: _Clip = {}
        if self.clip_range is not None:
            clip = {"clip_range": self.clip_range, "clip_range_high": self.clip_range_high}
        losses = self._losses(logprobs, old_logprobs, advantages, batch, clip)
        with torch.no_grad():
            log_ratio, num_clamped = clamp_log_ratio(logprobs - old_logprobs)
            metrics: dict[str, tuple[Tensor, Tensor | float]] = {
                "policy/approx_kl": mean_of(kl_k3(old_logprobs, logprobs)),
                "policy/ratio": mean_of(log_ratio.exp()),
                "policy/extreme_fraction": mean_of(log_ratio.abs() > EXTREME),
                "policy/clamp_fraction": (num_clamped, float(log_ratio.numel())),
                "policy/surprisal": mean_of(-logprobs),
                "advantages/mean": mean_of(advantages),
            }
            if self.loss != "reinforce":
                wide: _Clip = {"clip_range": math.inf, "clip_range_high": math.inf}
                free = self._losses(logprobs, old_logprobs, advantages, batch, wide)
                metrics["policy/clip_fraction"] = mean_of(losses != free)
        if self.weighted:
            weights = self._extra(batch, "importance")
            losses = losses * weights
            metrics["policy/importance"] = mean_of(weights)
        return LossOutput({"policy": self._summed(losses, batch)}, metrics)

    def _losses(self, logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, batch: Batch, clip: _Clip) -> Tensor:
        leaf, num_responses = batch.tree.leaf, len(batch.tree.last)
        match self.loss:
            case "ppo_clip":
                return ppo_clip(logprobs, old_logprobs, advantages, **clip)
            case "gspo":
                return gspo(logprobs, old_logprobs, advantages, leaf, num_responses, **clip)
            case "response_clip":
                return response_clip(logprobs, old_logprobs, advantages, leaf, num_responses, **clip)
            case "cispo":
                return cispo(logprobs, old_logprobs, advantages, **clip)
            case "reinforce":
                return reinforce(logprobs, advantages)
            case _:
                assert_never(self.loss)

    def _kl(self, losses: Tensor, batch: Batch) -> LossOutput:
        """The KL to the reference, averaged as the policy loss is."""
        total, unit = self._summed(losses, batch)
        return LossOutput({"kl": (self.kl_coef * total, unit)}, {"policy/ref_kl": mean_of(losses)})

    def _entropy(self, entropy: Tensor, batch: Batch) -> LossOutput:
        """What keeps the policy broad (Williams and Peng 1991; Mnih et al. 2016, arXiv 1602.01783, section 4)."""
        total, unit = self._summed(entropy, batch)
        return LossOutput({"entropy": (-self.entropy_coef * total, unit)}, {"policy/entropy": mean_of(entropy)})

    def _estimated(self, logprobs: Tensor, batch: Batch) -> Tensor:
        """The KL at each token, from the token alone."""
        assert self.kl_estimator != "exact"
        if batch.ref_logprobs is not None:
            ref_logprobs = batch.ref_logprobs
        elif len(batch.tree.last):
            raise CheckError(
                f"batch: no ref_logprobs, which kl_coef {self.kl_coef:g} needs; give the groups to "
                "`reference.with_reference` first"
            )
        else:
            ref_logprobs = logprobs.detach()
        old_logprobs = self._extra(batch, "old_logprobs") if self.kl_corrected else None
        return kl_penalty(logprobs, ref_logprobs, self.kl_estimator, old_logprobs=old_logprobs)

    def _critic(self, values: Tensor, batch: Batch) -> LossOutput:
        old_values, returns = self._extra(batch, "old_values"), self._extra(batch, "returns")
        clip_range = self.clip_range_value or math.inf
        squares = value_clip(values, old_values, returns, clip_range=clip_range)
        with torch.no_grad():
            error = returns - values
            metrics: dict[str, tuple[Tensor, Tensor | float]] = {
                "values/mean": mean_of(values),
                "values/clip_fraction": mean_of((values - old_values).abs() > clip_range),
                "values/error": mean_of(error),
                "values/error_square": mean_of(error.square()),
                "returns/mean": mean_of(returns),
                "returns/square": mean_of(returns.square()),
            }
        return LossOutput({"value": (self.vf_coef * squares.sum(), "tokens")}, metrics)

    def _summed(self, losses: Tensor, batch: Batch) -> tuple[Tensor, str]:
        tree = batch.tree
        return aggregated(losses, tree.leaf, len(tree.last), how=self.aggregate, constant_length=self.constant_length)

    def _extra(self, batch: Batch, name: str) -> Tensor:
        return extra(batch, name, f"the policy loss {self.loss!r}")

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        """Adds 1 - var(error) / var(returns): 1 is a perfect critic, 0 one that knows the mean only."""
        means = dict(means)
        if "values/error" in means:
            unexplained = means.pop("values/error_square") - means.pop("values/error") ** 2
            spread = means.pop("returns/square") - means["returns/mean"] ** 2
            if spread > 0:
                means["values/explained_variance"] = 1 - unexplained / spread
        return means


policy_gradient = PolicyGradient  # objectives are made by lower-case names: `sft()`, `ppo()`


def ppo(
    *,
    clip_range: float = 0.2,
    clip_range_value: float = 0.2,
    vf_coef: float = 0.5,
    policy: str = "policy",
    value: str | None = "value",
) -> PolicyGradient:
    """PPO on rollouts: the clipped policy and, with a value role, the clipped value; arguments of `PolicyGradient`."""
    return PolicyGradient(
        clip_range=clip_range, clip_range_value=clip_range_value, vf_coef=vf_coef, policy=policy, value=value
    )
