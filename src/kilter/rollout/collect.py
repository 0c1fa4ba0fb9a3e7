"""Sampled answers with their texts: what annotators rank, scorers score and sources learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kilter.data.chat import ChatEncoder
from kilter.models.attention import text_config
from kilter.models.generation import Completion, Sampler
from kilter.models.sampling import Sampling, Stops, draw_seeds
from kilter.models.trunk import Trunk
from kilter.records import Prompt, Sample, Score, Scorer
from kilter.train.reference import with_reference
from kilter.tree import Group, Response


@dataclass(frozen=True, slots=True)
class Rollout:
    """One answer of a model to a prompt."""

    prompt: Prompt
    completion: Completion
    text: str

    @property
    def sample(self) -> Sample:
        """As a scorer sees it."""
        return Sample(self.prompt.prompt, self.text, self.completion.ids, self.completion.finished, self.prompt.truth)


def collect(
    sampler: Sampler,
    encoder: ChatEncoder,
    prompts: Sequence[Prompt],
    *,
    num_samples: int,
    sampling: Sampling,
    generator: torch.Generator,
    prompt_ids: Sequence[tuple[int, ...]] | None = None,
) -> list[list[Rollout]]:
    """Draws `num_samples` answers to each prompt.

    Args:
        generator: draws a seed for each answer.
        prompt_ids: the encoded prompts, when the caller has them.
    Returns:
        [prompt][sample].
    """
    ids = [encoder.prompt(prompt.prompt) for prompt in prompts] if prompt_ids is None else prompt_ids
    drawn = sampler.sample(
        ids,
        draw_seeds(generator, len(ids), num_samples),
        sampling=sampling,
        stops=Stops(encoder.stop_ids, sampling.stop, decode=encoder.decode),
    )
    return [
        [Rollout(prompt, completion, sampling.cut(encoder.decode(completion.ids))) for completion in completions]
        for prompt, completions in zip(prompts, drawn, strict=True)
    ]


def score_rollouts(scorer: Scorer, rollouts: Sequence[Sequence[Rollout]]) -> list[list[Score]]:
    """All scores in one call, in the shape of `rollouts`."""
    scores = iter(scorer.score([rollout.sample for answers in rollouts for rollout in answers]))
    return [[next(scores) for _ in answers] for answers in rollouts]


def token_log_ratios(trunk: Trunk, role: str, rollouts: Sequence[Rollout], pad_id: int) -> list[Tensor]:
    """log p / q of each sampled token, nats: p is the model that sampled, q the `role` of this trunk."""
    groups = [Group(one.completion.prompt, (Response(one.completion.ids),)) for one in rollouts]
    held = with_reference(trunk, groups, role=role, pad_id=pad_id)
    return [
        torch.tensor(one.completion.logprobs) - group.responses[0].per_token["ref_logprobs"]
        for one, group in zip(rollouts, held, strict=True)
    ]


def positions(trunk: Trunk, roles: Iterable[str]) -> float:
    """The smallest number of positions among the models of these roles; infinite where none has a limit."""
    models = {trunk.roles[role].model for role in roles}
    limits = [getattr(text_config(trunk.models[name].config), "max_position_embeddings", None) for name in models]
    return min((float(limit) for limit in limits if limit is not None), default=math.inf)
