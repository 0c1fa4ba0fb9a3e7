"""PPO as a source of batches: it samples from the policy, scores, credits every token, and hands out minibatches.

The loop and the objective know nothing of this. Everything that decides the next batch is in `state_dict`, so a run
that is killed at any moment goes on to the same bits.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from kilter.config import PpoConfig
from kilter.data.chat import ChatEncoder
from kilter.errors import CheckError, ConfigError, DataError
from kilter.models.attention import text_config
from kilter.models.generation import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Scorer
from kilter.rollout.collect import Rollout, collect, score_rollouts
from kilter.rollout.experience import ASK, TRAINED_ON, Measured, credit, figures, measure, pay, sampler_gap, with_credit
from kilter.rollout.reward import KlController, RunningNorm
from kilter.train.checks import check_first_ratio, check_signs, require
from kilter.tree import Batch, Group, Response, make_batches, split_by_response

GAP_LIMIT = {torch.float32: 1e-2, torch.float64: 1e-2}
"""Largest difference allowed between sampling and training log-probs, nats, by the dtype that computes. Seen: 1e-5 in
float32. A wrong mask, dropout or temperature differs by tenths and more."""
LOW_PRECISION_GAP_LIMIT = 1.0


@dataclass(frozen=True, slots=True)
class Verdict:
    """On the answers of a rollout, before anything is learned from them."""

    again: bool = False
    """They are to be drawn once more: the policy that gave them is gone, an earlier one has its place."""
    stop: str | None = None
    """Why training should stop, in words."""


Judge = Callable[[Sequence[Rollout]], Verdict]


class PPOSource:
    """Rollouts of the trunk's role "policy", as the micro-batches of `epochs` x `minibatches` steps each.

    The trunk has the roles "policy", "reference" and "value", held in whatever way. Advantages, old log-probs and old
    values are fixed when the rollout is drawn; the first step's probability ratios are exactly 1, because the old
    log-probs come from the same packed batches.

    Args:
        prompts: drawn without replacement until all were used, then anew. Over-long ones are left out: `num_dropped`.
        scorer: what pays. An answer it cannot score is left out and counted, never paid 0.
        sampling: temperature 1, no top-k, no top-p: PPO's ratio is one of the policy's own probabilities.
        config: PPO's numbers.
        prompts_per_rollout, num_samples: answers of a rollout: so many prompts times so many samples.
        generator: draws prompts, samples and the order of minibatches.
        row_tokens, batch_tokens: budgets of a packed row and of a micro-batch.
        batch_size: answers sampled side by side.
        judge: looks at the answers of a rollout; it may change the policy's weights, and say so. See `stopped`.
    Raises:
        ConfigError: a number that PPO cannot work with. DataError: no prompt fits into the model.
    """

    def __init__(
        self,
        trunk: Trunk,
        encoder: ChatEncoder,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        *,
        sampling: Sampling,
        config: PpoConfig,
        prompts_per_rollout: int,
        generator: torch.Generator,
        num_samples: int = 1,
        row_tokens: int = 512,
        batch_tokens: int = 8192,
        batch_size: int = 256,
        judge: Judge | None = None,
    ) -> None:
        _check(trunk, sampling, config, prompts_per_rollout)
        self._trunk, self._encoder, self._scorer = trunk, encoder, scorer
        self._sampling, self._config, self._judge = sampling, config, judge
        self._num_prompts, self._num_samples = prompts_per_rollout, num_samples
        self._budget = {"row_tokens": row_tokens, "batch_tokens": batch_tokens, "pad_id": encoder.pad_id}
        self._batch_size, self._generator = batch_size, generator
        ids = [encoder.prompt(prompt.prompt) for prompt in prompts]
        room = _positions(trunk) - sampling.max_new_tokens + 1
        self._prompts = [(prompt, own) for prompt, own in zip(prompts, ids, strict=True) if len(own) <= room]
        self.num_dropped = len(prompts) - len(self._prompts)
        if not self._prompts:
            raise DataError(
                f"none of {len(prompts)} prompts leaves room for sampling.max_new_tokens = {sampling.max_new_tokens} "
                "in the model's positions; give shorter prompts or lower it"
            )

        adaptive = config.kl_controller == "adaptive"
        self.controller = KlController(config.kl_coef, config.kl_target if adaptive else None)
        self.norm = RunningNorm()
        require(*check_signs(self._paid, kl_penalty=config.kl_coef > 0))
        self.num_rollouts = 0
        self.rollouts: list[Rollout] = []
        """The answers of the last rollout; empty after a resume until the next one."""
        self.figures: dict[str, float] = {}
        """Of the last rollout, by metric name."""
        self.stopped: str | None = None
        """Why training should stop, once `judge` says so. The rollout that showed it is still handed out."""
        self._order: list[int] = []  # prompts still to draw before all were used
        self._groups: list[Group] = []
        self._steps: list[list[int]] = []  # of this rollout: the groups of each step
        self._next = 0

    @property
    def steps_per_rollout(self) -> int:
        return self._config.epochs * self._config.minibatches

    def next_step(self) -> list[Batch]:
        """The micro-batches of one optimizer step; at the end of a rollout's epochs, samples anew first."""
        if self._next == len(self._steps):
            self._roll_out()
        step = self._steps[self._next]
        self._next += 1
        return make_batches([self._groups[at] for at in step], **self._budget)

    def _roll_out(self) -> None:
        drawn = self._draw_prompts()
        answers = self._sample(drawn)
        if self._judge is not None and not self.stopped:
            verdict = self._judge(self.rollouts)
            self.stopped = verdict.stop
            if verdict.again:
                answers = self._sample(drawn)
        scores = [[score.value for score in group] for group in score_rollouts(self._scorer, answers)]
        kept = [
            [(rollout, score) for rollout, score in zip(*group, strict=True) if score is not None]
            for group in zip(answers, scores, strict=True)
        ]
        self._learn([group for group in kept if group])

    def _sample(self, drawn: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[list[Rollout]]:
        """Answers to these prompts, [prompt][sample]; `rollouts` holds them from now on."""
        answers = collect(
            self._trunk,
            "policy",
            self._encoder,
            [prompt for prompt, _ in drawn],
            num_samples=self._num_samples,
            sampling=self._sampling,
            generator=self._generator,
            batch_size=self._batch_size,
            prompt_ids=[ids for _, ids in drawn],
        )
        self.rollouts = [rollout for group in answers for rollout in group]
        return answers

    def _learn(self, answers: Sequence[Sequence[tuple[Rollout, float]]]) -> None:
        """Credits the scored answers, [prompt][sample], and lays out the steps of the rollout."""
        if len(answers) < self._config.minibatches:
            raise CheckError(
                f"rollout {self.num_rollouts}: {self._scorer.name} scored answers to only {len(answers)} of "
                f"{self._num_prompts} prompts, fewer than ppo.minibatches = {self._config.minibatches}; read the "
                "reasons it gives for the others"
            )
        rollouts = [rollout for group in answers for rollout, _ in group]
        scores = [score for group in answers for _, score in group]
        numbers = iter(range(len(rollouts)))
        groups = [
            Group(
                group[0][0].completion.prompt,
                tuple(
                    Response(rollout.completion.ids, per_response={"response": float(next(numbers))})
                    for rollout, _ in group
                ),
            )
            for group in answers
        ]
        steps = self._draw_steps(len(groups))
        first_epoch = [
            make_batches([groups[at] for at in step], **self._budget) for step in steps[: self._config.minibatches]
        ]
        device = next(self._trunk.parameters()).device
        self._trunk.train()  # as the loop runs it, so that dropout shows in the checks
        measured = measure(self._trunk, [batch for step in first_epoch for batch in step], len(rollouts), device)
        gap = sampler_gap(rollouts, measured)
        self._check_gap(gap)
        kl_coef = self.controller.kl_coef
        paid = pay(
            scores,
            [rollout.completion.finished for rollout in rollouts],
            measured,
            norm=self.norm,
            kl_coef=kl_coef,
            config=self._config,
        )
        credited = credit(paid.rewards, measured, self._config)
        self._groups = with_credit(groups, measured, credited)
        self._steps, self._next = steps, 0
        if not self.num_rollouts:  # old log-probs come from this very batch, so that the ratio is 1 to the last bit
            first_step = make_batches([self._groups[at] for at in steps[0]], **self._budget)
            require(check_first_ratio(self._trunk, first_step, tolerance=1e-6))
        self.figures = figures(rollouts, scores, paid, measured, credited)
        self.figures |= {"rollout/kl_coef": kl_coef, "rollout/sampler_gap": gap}
        self.figures["rollout/unscored"] = float(len(self.rollouts) - len(rollouts))
        self.controller.update(self.figures["rollout/kl_k1"])
        self.num_rollouts += 1

    def _paid(self, scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, leaf: Tensor) -> Tensor:
        """What two made-up answers would be paid at the start, for the check of signs."""
        made_up = Measured(leaf, logprobs, ref_logprobs, values=torch.zeros_like(logprobs))
        finished, kl_coef = [True] * len(scores), self.controller.kl_coef
        return pay(scores.tolist(), finished, made_up, norm=RunningNorm(), kl_coef=kl_coef, config=self._config).rewards

    def _draw_prompts(self) -> list[tuple[Prompt, tuple[int, ...]]]:
        while len(self._order) < self._num_prompts:
            self._order += torch.randperm(len(self._prompts), generator=self._generator).tolist()
        drawn, self._order = self._order[: self._num_prompts], self._order[self._num_prompts :]
        return [self._prompts[at] for at in drawn]

    def _draw_steps(self, num_groups: int) -> list[list[int]]:
        """For every epoch a new order, cut into minibatches whose sizes differ by at most one."""
        steps: list[list[int]] = []
        for _ in range(self._config.epochs):
            order = torch.randperm(num_groups, generator=self._generator)
            steps += [part.tolist() for part in order.tensor_split(self._config.minibatches)]
        return steps

    def _check_gap(self, gap: float) -> None:
        """Sampler and trainer must compute the same model."""
        dtype = self._trunk.compute_dtype or next(self._trunk.parameters()).dtype
        limit = GAP_LIMIT.get(dtype, LOW_PRECISION_GAP_LIMIT)
        if not gap <= limit:
            raise CheckError(
                f"rollout {self.num_rollouts}: log-probs of the same tokens differ by up to {gap:.3g} nats between "
                f"sampling and training (at most {limit:g} is allowed in {dtype}), so the two do not run the same "
                "model: look at dropout, attention windows and the both-ways check"
            )

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors: generator, prompts left, controller, norm, figures and the rollout in use."""
        responses = [response for group in self._groups for response in group.responses]
        columns = {
            name: torch.cat([torch.as_tensor(response.per_token[name]) for response in responses])
            for name in TRAINED_ON
            if responses
        }
        return {
            "generator": self._generator.get_state(),
            "order": list(self._order),
            "prompts": [list(group.prompt) for group in self._groups],
            "answers": [[list(response.ids) for response in group.responses] for group in self._groups],
            "steps": [list(step) for step in self._steps],
            "next": self._next,
            "controller": self.controller.state_dict(),
            "norm": self.norm.state_dict(),
            "num_rollouts": self.num_rollouts,
            "figures": dict(self.figures),
            "stopped": self.stopped,
            **columns,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._generator.set_state(state["generator"])
        self._order = list(state["order"])
        self.controller.load_state_dict(state["controller"])
        self.norm.load_state_dict(state["norm"])
        self.num_rollouts, self.stopped = int(state["num_rollouts"]), state["stopped"]
        self.figures, self.rollouts = dict(state["figures"]), []
        self._steps, self._next = [list(step) for step in state["steps"]], int(state["next"])
        self._groups = _groups(state)


def _groups(state: Mapping[str, Any]) -> list[Group]:
    answers = state["answers"]
    counts = torch.tensor([len(ids) for group in answers for ids in group], dtype=torch.int64)
    if not len(counts):
        return []
    leaf = torch.repeat_interleave(torch.arange(len(counts)), counts)
    columns: list[list[Tensor]] = [split_by_response(state[name], leaf, len(counts)) for name in TRAINED_ON]
    rows = iter(zip(*columns, strict=True))
    return [
        Group(
            tuple(prompt),
            tuple(Response(tuple(ids), per_token=dict(zip(TRAINED_ON, next(rows), strict=True))) for ids in group),
        )
        for prompt, group in zip(state["prompts"], answers, strict=True)
    ]


def _positions(trunk: Trunk) -> float:
    """The shortest number of positions among the models that read a rollout."""
    models = {trunk.roles[role].model for role in ASK}
    limits = [getattr(text_config(trunk.models[name].config), "max_position_embeddings", None) for name in models]
    return min((float(limit) for limit in limits if limit is not None), default=math.inf)


def _check(trunk: Trunk, sampling: Sampling, config: PpoConfig, prompts_per_rollout: int) -> None:
    for role in ASK:
        if role not in trunk.roles:
            raise ConfigError(
                f"PPO needs the roles {', '.join(ASK)}; the trunk has {', '.join(sorted(trunk.roles))}: build it with "
                f"a role {role!r}"
            )
    if not sampling.is_plain:
        raise ConfigError(
            f"sampling has temperature {sampling.temperature}, top_k {sampling.top_k}, top_p {sampling.top_p}; PPO's "
            "ratio is one of the policy's own probabilities, so set temperature 1, top_k 0, top_p 1"
        )
    if prompts_per_rollout < config.minibatches:
        raise ConfigError(
            f"prompts_per_rollout is {prompts_per_rollout} and ppo.minibatches is {config.minibatches}; a minibatch "
            "needs a prompt: raise the one or lower the other"
        )
