"""Policy gradients as a source of batches: every token of a rollout is credited, and handed out in minibatches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn

from kilter.config import PolicyConfig
from kilter.data.chat import ChatEncoder
from kilter.errors import CheckError, ConfigError
from kilter.losses import importance_weights
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Scorer
from kilter.rollout.algorithms import ALGORITHMS, grouped
from kilter.rollout.experience import (
    READS,
    Correction,
    Measured,
    credit,
    figures,
    measure,
    pay,
    sampled_logprobs,
    step_ends,
    with_credit,
)
from kilter.rollout.reward import KlBudget, KlController
from kilter.rollout.several import Also, Several
from kilter.rollout.source import Drawing, RolloutSource, Scored, worth
from kilter.train.checks import check_first_ratio, check_signs, require
from kilter.train.objectives import LossOutput
from kilter.train.policy import PolicyGradient
from kilter.tree import Batch, Group, Response

GAP_LIMIT = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Largest difference allowed between sampling and training log-probs, nats, by the dtype that computes. Seen: 1e-5 in
float32. A wrong mask, dropout or temperature differs by tenths and more."""
LOW_PRECISION_GAP_LIMIT = 1.0
KL_SLACK = 1.5
"""How far beyond `target_kl` a step may be before the rest of its rollout is left out: that of OpenAI's Spinning Up
(`ppo.py`) and of Stable-Baselines3 (`PPO.train`)."""


class PolicySource(RolloutSource):
    """A rollout's answers with advantages, returns, old log-probs and old values, all fixed when it is drawn.

    The trunk has the roles "policy", "reference" and, for a critic, "value", held in whatever way. The first step's
    probability ratios are exactly 1, because the old log-probs come from the same packed batches.

    Args:
        scorer: what pays.
        sampling: the policy's own distribution: ratios are of its own probabilities.
        config: its numbers, resolved (`Algorithm.resolved`).
        algorithm: a name in `ALGORITHMS`.
        rollouts: of the whole run; for `kl_controller: budget`.
        also: further scorers, by weight or as constraints.
        correction: where the sampler computes by an engine of its own; the objective is then to be `weighted`.
        signs: `ignore` lets what is paid have a sign the wrong way round, and keeps the verdicts in `turned`.
        drawing: see `RolloutSource`.
    Raises:
        ConfigError: a number that the algorithm cannot work with. DataError: no prompt fits into the model.
    """

    def __init__(
        self,
        trunk: Trunk,
        encoder: ChatEncoder,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        *,
        config: PolicyConfig,
        algorithm: str = "ppo",
        rollouts: int | None = None,
        also: Sequence[Also] = (),
        signs: Literal["heed", "ignore"] = "heed",
        correction: Correction | None = None,
        **drawing: Unpack[Drawing],
    ) -> None:
        self._correction = correction
        self._algorithm = ALGORITHMS[algorithm]
        self.config = config = self._algorithm.resolved(algorithm, config)
        reads = [role for role in READS if self._algorithm.critic or role != "value"]
        _check_roles(algorithm, trunk, reads, config)
        check_numbers(algorithm, config, drawing["sampling"], drawing["prompts_per_rollout"])
        super().__init__(
            trunk,
            encoder,
            prompts,
            scorer,
            epochs=config.epochs,
            minibatches=config.minibatches,
            reads=reads,
            **drawing,
        )
        self.controller = _controller(config, rollouts)
        self.several = Several(also, config)
        tried = [check_signs(partial(self._paid, place), kl_penalty=self._price != 0) for place in range(1 + len(also))]
        verdicts = [verdict for row in tried for verdict in row]
        if signs == "heed":
            require(*verdicts)
        self.turned = [verdict.line for verdict in verdicts if not verdict.passed]

    @property
    def warming_up(self) -> bool:
        """Of the rollout in use: the critic alone learns from it."""
        return self.num_rollouts <= self.config.critic_warmup

    @property
    def price_in_loss(self) -> float:
        """Of a nat of KL, as a loss."""
        return self.controller.kl_coef if self.config.kl_in == "loss" else 0.0

    @property
    def _price(self) -> float:
        """Of a nat of KL, paid away from the rewards."""
        return self.controller.kl_coef if self.config.kl_in == "reward" else 0.0

    def _learn(self, answers: Scored) -> None:
        """Credits the scored answers and lays out the steps of the rollout."""
        answers, columns = self.several.ask(answers)
        what = "and the further scorers, all of them, scored answers to" if self.several.also else "scored answers to"
        reason = next((reason for reason, _ in self._reasons.most_common() if reason), "")
        remedy = f"what most of the others lack: {reason}" if reason else "look at what the scorers say of the others"
        if few := self._too_few(len(answers), what, "policy.minibatches", remedy):
            raise CheckError(few)
        rollouts = [rollout for group in answers for rollout, _ in group]
        numbers = iter(range(len(rollouts)))
        groups = [
            Group(
                group[0][0].completion.prompt,
                tuple(
                    Response(rollout.completion.ids, per_response={"response": float(next(numbers))})
                    for rollout, _ in group
                ),
                group[0][0].prompt.origin,
            )
            for group in answers
        ]
        steps = self._draw_steps(len(groups))
        first_epoch = [self._packed([groups[at] for at in step]) for step in steps[: self._minibatches]]
        device = next(self._trunk.parameters()).device
        self._trunk.train()  # as the loop runs it, so that dropout shows in the checks
        batches = [batch for step in first_epoch for batch in step]
        measured = measure(self._trunk, batches, len(rollouts), device, critic=self._algorithm.critic)
        sampled = sampled_logprobs(rollouts)
        gaps = (sampled - measured.logprobs).abs()
        self._check_gap(float(gaps.max()), float(gaps.mean()))
        kl_coef = self.controller.kl_coef
        learning = self.num_rollouts >= self.config.critic_warmup  # before, no price moves the policy
        self.several.take_in(columns, steer=learning)
        earned = self.several(columns)
        paid = pay(
            earned,
            [rollout.completion.finished for rollout in rollouts],
            measured,
            kl_coef=self._price,
            config=self.config,
            ends=step_ends(rollouts, earned, self._encoder),
        )
        group = grouped([len(group.responses) for group in groups])
        credited = credit(self._algorithm.credit, paid, measured, group, self.config)
        in_loss = self.price_in_loss > 0 and self.config.kl_estimator != "exact"
        importance, cut = None, None
        if self._correction is not None:
            importance, cut = importance_weights(measured.logprobs, sampled, cap=self._correction.cap)
        self._lay_out(with_credit(groups, measured, credited, reference=in_loss, importance=importance), steps)
        if not self.num_rollouts:  # old log-probs come from this very batch, so that the ratio is 1 to the last bit
            first_step = self._packed([self._groups[at] for at in steps[0]])
            require(check_first_ratio(self._trunk, first_step, tolerance=1e-6))
        self.figures = figures(rollouts, [worth(score) for score in columns[0]], paid, measured, credited)
        self.figures |= self.several.figures(columns)
        self.figures |= {"rollout/kl_coef": kl_coef, "rollout/sampler_gap": float(gaps.max())}
        if cut is not None:
            self.figures |= {"rollout/sampler_gap_mean": float(gaps.mean()), "rollout/importance_cut": float(cut)}
        self.figures["rollout/unscored"] = float(len(self.rollouts) - len(rollouts))
        if self.config.target_kl is not None:
            self.figures["rollout/left_out"] = 0.0
        if learning:
            steered_by = "kl_exact" if self.config.kl_controller == "budget" else "kl_k1"
            self.controller.update(self.figures[f"rollout/{steered_by}"])

    def look(self, figures: Mapping[str, float]) -> None:
        """Takes in what the last step's figures say, before the next one and before a checkpoint.

        Once the policy is further from the one that sampled than `target_kl` allows, the rest of the rollout's steps is
        left out, for policy and critic. `policy/approx_kl` is measured before the step's update, which is taken (in
        Spinning Up and Stable-Baselines3 it is not: they measure before they decide about the same step).
        """
        limit = self.config.target_kl
        if limit is None or self._enough or figures.get("policy/approx_kl", 0.0) <= KL_SLACK * limit:
            return
        self._enough = True
        self.figures["rollout/left_out"] = float(len(self._steps) - self._next)

    def _paid(self, place: int, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, leaf: Tensor) -> Tensor:
        """What two made-up answers would be paid at the start, for the check of a scorer's sign."""
        made_up = Measured(leaf, logprobs, ref_logprobs, values=None)
        totals = self.several.tried(place, scores.tolist())
        return pay(totals, [True] * len(scores), made_up, kl_coef=self._price, config=self.config).rewards

    def _check_gap(self, gap: float, mean: float) -> None:
        """Sampler and trainer must compute the same model: to a token's rounding, or in the mean where an engine of its
        own samples."""
        if self._correction is not None:
            if not mean <= self._correction.max_gap:
                raise CheckError(
                    f"rollout {self.num_rollouts}: log-probs of the same tokens differ by {mean:.3g} nats in the mean "
                    "between the sampler's engine and training (at most sampler.max_gap "
                    f"{self._correction.max_gap:g} is allowed), so it does not run this policy: look at what it "
                    "computes in (sampler.dtype), and at its version"
                )
            return
        dtype = self._trunk.compute_dtype or next(self._trunk.parameters()).dtype
        limit = GAP_LIMIT.get(dtype, LOW_PRECISION_GAP_LIMIT)
        if not gap <= limit:
            raise CheckError(
                f"rollout {self.num_rollouts}: log-probs of the same tokens differ by up to {gap:.3g} nats between "
                f"sampling and training (at most {limit:g} is allowed in {dtype}), so the two do not run the same "
                "model: look at dropout, attention windows and the both-ways check"
            )

    def _raise_kl(self, factor: float) -> None:
        self.controller.raise_by(factor)

    def _memory(self) -> dict[str, Any]:
        own = {"controller": self.controller.state_dict(), "several": self.several.state_dict()}
        return super()._memory() | own

    def _remember(self, memory: Mapping[str, Any]) -> None:
        super()._remember(memory)
        self.controller.load_state_dict(memory["controller"])
        self.several.load_state_dict(memory["several"])


def _controller(config: PolicyConfig, rollouts: int | None) -> KlController | KlBudget:
    if config.kl_controller != "budget":
        return KlController(config.kl_coef, config.kl_target if config.kl_controller == "adaptive" else None)
    learning = (rollouts or 0) - config.critic_warmup
    if learning <= 0:
        raise ConfigError(
            f"policy.kl_controller is budget, of {rollouts} rollouts, {config.critic_warmup} of them for the critic; "
            "the budget is spread over those in which the policy learns: say how many `rollouts` the run has"
        )
    return KlBudget(config.kl_coef, config.kl_target, learning)


def _check_roles(name: str, trunk: Trunk, reads: Sequence[str], config: PolicyConfig) -> None:
    for role in reads:
        if role not in trunk.roles:
            raise ConfigError(
                f"{name} needs the roles {', '.join(reads)}; the trunk has {', '.join(sorted(trunk.roles))}: build it "
                f"with a role {role!r}"
            )
    shared = {id(one) for one in trunk.parameters_of("policy")}
    if config.critic_warmup and any(id(one) in shared for one in trunk.parameters_of("value")):
        raise ConfigError(
            f"policy.critic_warmup is {config.critic_warmup}, and the roles value and policy share weights, which the "
            "value would move; set it to 0, or give the value weights of its own"
        )


def check_numbers(name: str, config: PolicyConfig, sampling: Sampling, prompts_per_rollout: int) -> None:
    """Refuses with a ConfigError what does not go together, whatever the models are."""
    if not sampling.is_plain:
        raise ConfigError(
            f"sampling has temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}, "
            f"min_p {sampling.min_p} and repetition_penalty {sampling.repetition_penalty}; {name}'s ratio is one of "
            "the policy's own probabilities, so set temperature 1, top_k 0, top_p 1, min_p 0, repetition_penalty 1"
        )
    if prompts_per_rollout < config.minibatches:
        raise ConfigError(
            f"prompts_per_rollout is {prompts_per_rollout} and policy.minibatches is {config.minibatches}; a minibatch "
            "needs a prompt: raise the one or lower the other"
        )


@dataclass(frozen=True)
class Steered:
    """An objective whose source says what counts in the rollout in use: the price of a KL in the loss, which a guard
    raises, and whether the critic alone learns (`PolicyConfig.critic_warmup`).

    The latter is for one process: DDP waits for gradients of all weights that may train.
    """

    objective: PolicyGradient
    source: PolicySource

    @property
    def roles(self) -> tuple[str, ...]:
        return self.objective.roles

    def __call__(self, trunk: nn.Module, batch: Batch) -> LossOutput:
        now = replace(self.objective, kl_coef=self.source.price_in_loss, value_alone=self.source.warming_up)
        return now(trunk, batch)

    def finish(self, means: Mapping[str, float]) -> dict[str, float]:
        return self.objective.finish(means)
