"""What every source that samples from the policy shares: prompts, answers, scores, the steps of a rollout, its state.

The loop and the objective know nothing of this. Everything that decides the next batch is in `state_dict`, so a run
that is killed at any moment goes on to the same bits.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Required, TypedDict

import torch
from torch import Tensor

from kilter.data.chat import ChatEncoder
from kilter.errors import DataError
from kilter.models.generation import Sampler
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Score, Scorer
from kilter.rollout.collect import Rollout, collect, positions, score_rollouts
from kilter.tree import Batch, Group, Response, make_batches, split_by_response


@dataclass(frozen=True, slots=True)
class Verdict:
    """On the answers of a rollout, before anything is learned from them."""

    again: bool = False
    """They are to be drawn once more: the policy that gave them is gone, an earlier one has its place."""
    stop: str | None = None
    """Why training should stop, in words."""
    raise_kl: float = 1.0
    """The price of a nat of KL is multiplied by this, for the rollouts to come."""


Scored = Sequence[Sequence[tuple[Rollout, Score]]]
"""Scored answers, [prompt][sample]; every score has a value."""
Judge = Callable[[Scored, dict[str, float]], Verdict]
"""Of a rollout's scored answers and its figures, to which it may add."""


def worth(score: Score) -> float:
    """The value of a score that has one."""
    assert score.value is not None
    return score.value


class Drawing(TypedDict, total=False):
    """How answers are drawn and packed: keywords of `RolloutSource` that its kinds hand through."""

    sampler: Required[Sampler]
    sampling: Required[Sampling]
    prompts_per_rollout: Required[int]
    generator: Required[torch.Generator]
    num_samples: int
    row_tokens: int
    batch_tokens: int
    judge: Judge | None


class RolloutSource(ABC):
    """Rollouts of the trunk's role "policy", as the micro-batches of `epochs` x `minibatches` steps each.

    Args:
        prompts: drawn without replacement until all were used, then anew. Over-long ones are left out: `num_dropped`.
        sampler: answers as the role "policy" would.
        scorer: an answer it cannot score is left out and counted, it never has a score of 0.
        prompts_per_rollout, num_samples: answers of a rollout: so many prompts times so many samples.
        epochs, minibatches: passes over a rollout, and steps in each of them.
        generator: draws prompts, samples and the order of minibatches.
        row_tokens, batch_tokens: budgets of a packed row and of a micro-batch.
        judge: looks at the scored answers of a rollout and at their figures, before anything is learned from them; it
            may change the policy's weights, and say so. See `stopped`.
        reads: the roles that read the answers; all their models must have room for them.
    Raises:
        DataError: no prompt fits into the models.
    """

    def __init__(
        self,
        trunk: Trunk,
        encoder: ChatEncoder,
        prompts: Sequence[Prompt],
        scorer: Scorer,
        *,
        epochs: int,
        minibatches: int,
        reads: Iterable[str],
        sampler: Sampler,
        sampling: Sampling,
        prompts_per_rollout: int,
        generator: torch.Generator,
        num_samples: int = 1,
        row_tokens: int = 512,
        batch_tokens: int = 8192,
        judge: Judge | None = None,
    ) -> None:
        self._trunk, self._encoder, self._scorer = trunk, encoder, scorer
        self._sampler, self._sampling, self._judge = sampler, sampling, judge
        self._num_prompts, self._num_samples = prompts_per_rollout, num_samples
        self._epochs, self._minibatches = epochs, minibatches
        self._budget = {"row_tokens": row_tokens, "batch_tokens": batch_tokens, "pad_id": encoder.pad_id}
        self._generator = generator
        ids = [encoder.prompt(prompt.prompt) for prompt in prompts]
        room = positions(trunk, reads) - sampling.max_new_tokens + 1
        self._prompts = [(prompt, own) for prompt, own in zip(prompts, ids, strict=True) if len(own) <= room]
        self.num_dropped = len(prompts) - len(self._prompts)
        if not self._prompts:
            raise DataError(
                f"none of {len(prompts)} prompts leaves room for sampling.max_new_tokens = {sampling.max_new_tokens} "
                "in the model's positions; give shorter prompts or lower it"
            )
        self.num_rollouts = 0
        self.rollouts: list[Rollout] = []
        """The answers of the last rollout; empty after a resume until the next one."""
        self.figures: dict[str, float] = {}
        """Of the last rollout, by metric name."""
        self.stopped: str | None = None
        """Why training should stop, in words. A rollout on which `judge` said so is still handed out."""
        self._order: list[int] = []  # prompts still to draw before all were used
        self._groups: list[Group] = []
        self._steps: list[list[int]] = []  # of this rollout: the groups of each step
        self._next = 0
        self._enough = False
        """What is left of this rollout's steps is left out."""
        self._reasons: Counter[str] = Counter()
        """Why answers of the last rollout could not be scored."""

    @property
    def steps_per_rollout(self) -> int:
        """Optimizer steps between two rollouts."""
        return self._epochs * self._minibatches

    def next_step(self) -> list[Batch] | None:
        """The micro-batches of one optimizer step; at the end of a rollout's epochs, samples anew first.

        An empty list where the new answers teach nothing more: `stopped` says why. None of a step that is left out.
        """
        if self._next == len(self._steps):
            self._roll_out()
        if not self._steps:
            return []
        step = self._steps[self._next]
        self._next += 1
        if self._enough:
            return None
        return self._packed([self._groups[at] for at in step])

    def _packed(self, groups: Sequence[Group]) -> list[Batch]:
        return make_batches(groups, **self._budget)

    def _roll_out(self) -> None:
        drawn = self._draw_prompts()
        answers = self._sample(drawn)
        before = self._memory()
        scored = self._take_in(answers)
        if self._judge is not None and not self.stopped:
            verdict = self._judge(scored, self.figures)
            self.stopped = verdict.stop
            if verdict.again:  # as if the answers that are thrown away had only been drawn
                self._remember(before)
                self._take_in(self._sample(drawn))
                self.figures["rollout/put_back"] = 1.0
            if verdict.raise_kl != 1:
                self._raise_kl(verdict.raise_kl)
        self.num_rollouts += 1

    def _take_in(self, answers: Sequence[Sequence[Rollout]]) -> Scored:
        """Scores the answers and lays out the steps of the rollout; returns those that could be scored."""
        scores = score_rollouts(self._scorer, answers)
        kept = [
            [(rollout, score) for rollout, score in zip(*group, strict=True) if score.value is not None]
            for group in zip(answers, scores, strict=True)
        ]
        scored = [group for group in kept if group]
        self._reasons = Counter(score.reason for group in scores for score in group if score.value is None)
        self._learn(scored)
        spreads = [score.spread for group in scores for score in group if score.spread is not None]
        if spreads:  # of several heads: where they part, the reward is not known
            self.figures["rollout/spread"] = fmean(spreads)
        return scored

    def _sample(self, drawn: Sequence[tuple[Prompt, tuple[int, ...]]]) -> list[list[Rollout]]:
        """Answers to these prompts, [prompt][sample]; `rollouts` holds them from now on."""
        answers = collect(
            self._sampler,
            self._encoder,
            [prompt for prompt, _ in drawn],
            num_samples=self._num_samples,
            sampling=self._sampling,
            generator=self._generator,
            prompt_ids=[ids for _, ids in drawn],
        )
        self.rollouts = [rollout for group in answers for rollout in group]
        return answers

    @abstractmethod
    def _learn(self, answers: Scored) -> None:
        """Makes groups of the scored answers, hands them to `_lay_out`, and fills in `figures`."""

    def _raise_kl(self, factor: float) -> None:
        """Multiplies the price of a nat of KL."""
        raise NotImplementedError(f"{type(self).__name__} pays for no KL, so no factor {factor:g} can raise its price")

    def _lay_out(self, groups: Sequence[Group], steps: list[list[int]]) -> None:
        self._groups, self._steps, self._next, self._enough = list(groups), steps, 0, False

    def _too_few(self, count: int, what: str, place: str, remedy: str) -> str | None:
        """What to say of a rollout that does not fill its minibatches; None of one that does."""
        if count >= self._minibatches:
            return None
        return (
            f"rollout {self.num_rollouts}: {self._scorer.name} {what} only {count} of {self._num_prompts} prompts, "
            f"fewer than {place} = {self._minibatches}; {remedy}"
        )

    def _draw_prompts(self) -> list[tuple[Prompt, tuple[int, ...]]]:
        while len(self._order) < self._num_prompts:
            self._order += torch.randperm(len(self._prompts), generator=self._generator).tolist()
        drawn, self._order = self._order[: self._num_prompts], self._order[self._num_prompts :]
        return [self._prompts[at] for at in drawn]

    def _draw_steps(self, num_groups: int) -> list[list[int]]:
        """For every epoch a new order, cut into minibatches whose sizes differ by at most one."""
        steps: list[list[int]] = []
        for _ in range(self._epochs):
            order = torch.randperm(num_groups, generator=self._generator)
            steps += [part.tolist() for part in order.tensor_split(self._minibatches)]
        return steps

    def _memory(self) -> dict[str, Any]:
        """What taking in a rollout moves, and a resumed run needs: generators, norms, prices."""
        return {"generator": self._generator.get_state()}

    def _remember(self, memory: Mapping[str, Any]) -> None:
        """Takes back what `_memory` gave."""
        self._generator.set_state(memory["generator"])

    def state_dict(self) -> dict[str, Any]:
        """JSON values and tensors: generator, prompts left, figures and the rollout in use."""
        return self._memory() | {
            "order": list(self._order),
            "groups": _plain(self._groups),
            "steps": [list(step) for step in self._steps],
            "next": self._next,
            "enough": self._enough,
            "num_rollouts": self.num_rollouts,
            "figures": dict(self.figures),
            "stopped": self.stopped,
        }

    def load_state_dict(self, state: Mapping[str, Any], /) -> None:
        self._remember(state)
        self._order = list(state["order"])
        self.num_rollouts, self.stopped = int(state["num_rollouts"]), state["stopped"]
        self.figures, self.rollouts = dict(state["figures"]), []
        self._steps, self._next = [list(step) for step in state["steps"]], int(state["next"])
        self._groups, self._enough = _groups(state["groups"]), bool(state["enough"])


def _plain(groups: Sequence[Group]) -> dict[str, Any]:
    """Groups of wholly scored responses that all carry the same names."""
    responses = [response for group in groups for response in group.responses]
    first = responses[0] if responses else Response(())
    return {
        "prompts": [list(group.prompt) for group in groups],
        "names": [group.name for group in groups],
        "answers": [[list(response.ids) for response in group.responses] for group in groups],
        "per_token": {
            name: torch.cat([torch.as_tensor(response.per_token[name]) for response in responses])
            for name in first.per_token
        },
        "per_response": {
            name: [float(response.per_response[name]) for response in responses] for name in first.per_response
        },
    }


def _groups(state: Mapping[str, Any]) -> list[Group]:
    """The inverse of `_plain`."""
    lengths = [len(ids) for group in state["answers"] for ids in group]
    leaf = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths, dtype=torch.int64))
    per_token: dict[str, list[Tensor]] = {
        name: split_by_response(values, leaf, len(lengths)) for name, values in state["per_token"].items()
    }
    numbers = iter(range(len(lengths)))

    def response(ids: Sequence[int]) -> Response:
        at = next(numbers)
        return Response(
            tuple(ids),
            per_token={name: values[at] for name, values in per_token.items()},
            per_response={name: values[at] for name, values in state["per_response"].items()},
        )

    return [
        Group(tuple(prompt), tuple(response(ids) for ids in group), name)
        for prompt, group, name in zip(state["prompts"], state["answers"], state["names"], strict=True)
    ]
