"""The methods of reinforcement learning from rollouts, a row each: who says how good a token was, and how the policy
moves towards it (`train.policy`)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from kilter import ops
from kilter.config import PolicyConfig
from kilter.errors import ConfigError
from kilter.train.policy import Aggregate, PolicyGradient, PolicyLoss

CRITICS = (
    "clip_range_value",
    "vf_coef",
    "gamma",
    "gae_lambda",
    "value_learning_rate",
    "value_from",
    "critic_warmup",
)
"""The numbers of a critic alone."""


@dataclass(frozen=True, slots=True)
class Steps:
    """What was paid step by step, and where an answer as a whole was paid too, that as a step up to its end."""

    reward: Tensor
    """float[M], of each step, without the price of the KL."""
    token: Tensor
    """int[M], the token of the rollout at which it ends."""


@dataclass(frozen=True, slots=True)
class Paid:
    """What all answers of a rollout were paid."""

    rewards: Tensor
    """float[N], of each token: the score at the last, less the price of the KL where that is paid."""
    leaf: Tensor
    """int[N], the answer of each token."""
    group: Tensor
    """int[R], the prompt of each answer."""
    values: Tensor | None = None
    """float[N], what a critic expected before each token."""
    steps: Steps | None = None
    """None: answers were paid as a whole."""

    @property
    def totals(self) -> Tensor:
        """float[R], what each answer was paid in all."""
        return ops.sum_by(self.rewards, self.leaf, len(self.group))


Credit = tuple[Tensor, Tensor | None]
"""Advantages and, of a critic, returns: float[N] each."""


def by_critic(paid: Paid, config: PolicyConfig) -> Credit:
    """Generalised advantages, `ops.gae`."""
    assert paid.values is not None
    return ops.gae(paid.rewards, paid.values, paid.leaf, gamma=config.gamma, gae_lambda=config.gae_lambda)


def by_group(paid: Paid, _: PolicyConfig) -> Credit:
    """How far above the others to its prompt, in their standard deviations, `ops.group_advantages`."""
    return ops.group_advantages(paid.totals, paid.group)[paid.leaf], None


def by_group_and_step(paid: Paid, config: PolicyConfig) -> Credit:
    """As `by_group`; of answers paid step by step, by the steps that are still to end, `ops.step_advantages`.

    Raises:
        ConfigError: the KL is paid in the reward too, which belongs to no step.
    """
    if paid.steps is None:
        return by_group(paid, config)
    if config.kl_in == "reward" and config.kl_coef:
        raise ConfigError(
            "policy.kl_in is reward, and the reward is paid step by step, where this method compares steps and the KL "
            "belongs to none; set kl_in to loss"
        )
    return ops.step_advantages(paid.steps.reward, paid.steps.token, paid.leaf, paid.group), None


def by_group_unscaled(paid: Paid, _: PolicyConfig) -> Credit:
    """How far above the others to its prompt."""
    return ops.group_advantages(paid.totals, paid.group, scale="none")[paid.leaf], None


def by_the_others(paid: Paid, _: PolicyConfig) -> Credit:
    """How far above the mean of the other answers to its prompt, `ops.leave_one_out`."""
    return ops.leave_one_out(paid.totals, paid.group)[paid.leaf], None


def by_what_is_to_come(paid: Paid, _: PolicyConfig) -> Credit:
    """What is still to be paid, on one scale for the rollout, `ops.reinforce_plus_plus`."""
    return ops.reinforce_plus_plus(paid.rewards, paid.leaf), None


def by_being_best(paid: Paid, _: PolicyConfig) -> Credit:
    """1 for the best answer to each prompt (of equals, the first), 0 for the others."""
    return ops.best_of_group(paid.totals, paid.group)[paid.leaf], None


@dataclass(frozen=True, slots=True)
class Algorithm:
    """A method: what it does where the recipe says nothing else."""

    credit: Callable[[Paid, PolicyConfig], Credit]
    loss: PolicyLoss
    aggregate: Aggregate
    kl_in: Literal["reward", "loss"]
    about: str
    critic: bool = False
    clip: tuple[float | None, float | None] = (0.2, None)

    def resolved(self, name: str, config: PolicyConfig) -> PolicyConfig:
        """The numbers with nothing left open.

        Raises:
            ConfigError: a number that this method has no use for, or that does not go with another.
        """
        if not self.critic:
            fields = type(config).model_fields
            for field in (field for field in CRITICS if getattr(config, field) != fields[field].default):
                raise ConfigError(
                    f"policy.{field} is {getattr(config, field)}, but {name} has no critic; leave it out, or choose ppo"
                )
        low, high = self.clip if config.loss in (None, self.loss) else (None, None)
        kl_in = config.kl_in or self.kl_in
        controller = config.kl_controller or ("adaptive" if kl_in == "reward" else "fixed")
        if kl_in == "loss" and controller != "fixed":
            raise ConfigError(
                f"policy.kl_controller is {controller} and policy.kl_in is loss; only a price in the reward is "
                "steered: set kl_controller to fixed, or kl_in to reward"
            )
        if kl_in == "reward" and config.kl_estimator == "exact":
            raise ConfigError(
                f"policy.kl_estimator is exact and policy.kl_in is reward, where {name} pays for log-ratios of "
                "sampled tokens; leave kl_estimator out, or set kl_in to loss"
            )
        if config.kl_coef < 0 and (kl_in, controller) != ("reward", "fixed"):
            raise ConfigError(
                f"policy.kl_coef is {config.kl_coef:g}, kl_in {kl_in} and kl_controller {controller}; a bonus is paid "
                "in the reward alone, and is not steered: set kl_in to reward and kl_controller to fixed"
            )
        if controller == "budget" and config.kl_coef == 0:
            raise ConfigError(
                "policy.kl_controller is budget and policy.kl_coef is 0, which no factor raises; set kl_coef to the "
                "least price"
            )
        if config.target_kl is not None and config.epochs * config.minibatches == 1:
            raise ConfigError(
                f"policy.target_kl is {config.target_kl:g}, and a rollout is one step, by the very policy that "
                "sampled; leave it out, or set epochs or minibatches above 1"
            )
        return config.model_copy(
            update={
                "kl_in": kl_in,
                "kl_controller": controller,
                "loss": config.loss or self.loss,
                "aggregate": config.aggregate or self.aggregate,
                "clip_range": config.clip_range or low,
                "clip_range_high": config.clip_range_high or (high if config.clip_range is None else None),
                "whiten_advantages": self.critic if config.whiten_advantages is None else config.whiten_advantages,
            }
        )

    def objective(self, config: PolicyConfig, *, longest: int, weighted: bool = False) -> PolicyGradient:
        """What is minimised, by resolved numbers.

        Args:
            longest: an answer may be, tokens.
            weighted: by `importance`, because another engine samples.
        """
        assert config.loss is not None and config.aggregate is not None
        return PolicyGradient(
            loss=config.loss,
            aggregate=config.aggregate,
            constant_length=longest if config.aggregate == "constant" else 0,
            clip_range=config.clip_range,
            clip_range_high=config.clip_range_high,
            kl_coef=config.kl_coef if config.kl_in == "loss" else 0.0,
            kl_estimator=config.kl_estimator,
            entropy_coef=config.entropy_coef,
            weighted=weighted,
            clip_range_value=config.clip_range_value,
            vf_coef=config.vf_coef,
            value="value" if self.critic else None,
        )


ALGORITHMS: dict[str, Algorithm] = {
    "ppo": Algorithm(by_critic, "ppo_clip", "token", "reward", "Schulman et al. 2017, arXiv 1707.06347", critic=True),
    "grpo": Algorithm(by_group_and_step, "ppo_clip", "sequence", "loss", "Shao et al. 2024, arXiv 2402.03300"),
    "dr_grpo": Algorithm(by_group_unscaled, "ppo_clip", "constant", "loss", "Liu et al. 2025, arXiv 2503.20783"),
    "dapo": Algorithm(
        by_group_and_step,
        "ppo_clip",
        "token",
        "loss",
        "Yu et al. 2025, arXiv 2503.14476: clip-higher, every token alike",
        clip=(0.2, 0.28),
    ),
    "gspo": Algorithm(by_group, "gspo", "sequence", "loss", "Zheng et al. 2025, arXiv 2507.18071", clip=(None, None)),
    "cispo": Algorithm(
        by_group_and_step, "cispo", "token", "loss", "MiniMax 2025, arXiv 2506.13585", clip=(None, None)
    ),
    "rloo": Algorithm(by_the_others, "response_clip", "sequence", "reward", "Ahmadian et al. 2024, arXiv 2402.14740"),
    "reinforce++": Algorithm(by_what_is_to_come, "ppo_clip", "token", "reward", "Hu et al. 2025, arXiv 2501.03262"),
    "raft": Algorithm(
        by_being_best,
        "reinforce",
        "token",
        "loss",
        "Dong et al. 2023, arXiv 2304.06767: likelihood of each prompt's best answer",
        clip=(None, None),
    ),
}
"""By the name in a recipe."""


def grouped(rollouts_per_prompt: list[int]) -> Tensor:
    """int[R]: the prompt of each answer, for so many answers to each prompt."""
    return torch.repeat_interleave(torch.arange(len(rollouts_per_prompt)), torch.tensor(rollouts_per_prompt))
