"""Canaries: prompts that are asked of a policy now and then while it learns something else, and pay nothing."""

from __future__ import annotations

import torch

from kilter.config import RlStage
from kilter.data.chat import ChatEncoder
from kilter.guard import CANARY
from kilter.models.generation import Sampler
from kilter.models.sampling import Sampling
from kilter.ops import mean_and_sem
from kilter.rollout.collect import collect, score_rollouts
from kilter.stages.context import Context
from kilter.stages.scoring import reward_of, scorer_of


class Canaries:
    """Those of a stage's guard. Their samples have seeds of their own, so asking changes nothing that is learned."""

    def __init__(self, context: Context, stage: RlStage, sampler: Sampler, encoder: ChatEncoder) -> None:
        self._context, self._sampler, self._encoder = context, sampler, encoder
        self._sampling = Sampling.of(stage.sampling)
        self._asked = []
        for at, one in enumerate(stage.guard.canaries):
            place = f"guard.canaries[{at}]"
            prompts = context.records(f"{place}.prompts", one.prompts, "prompt")
            scorer = scorer_of(reward_of(context, one.reward), device=stage.precision.device)
            self._asked.append((one, prompts, scorer))

    def __call__(self, rollout: int) -> dict[str, float]:
        """The mean score of each that is asked at this rollout, counted from 0, and its standard error."""
        found = {}
        for one, prompts, scorer in self._asked:
            if rollout % one.every:
                continue
            drawn = collect(
                self._sampler,
                self._encoder,
                prompts,
                num_samples=1,
                sampling=self._sampling,
                generator=self._context.generator(f"canary {one.name} {rollout}"),
            )
            said = [score.value for row in score_rollouts(scorer, drawn) for score in row if score.value is not None]
            if said:
                mean, sem = mean_and_sem(torch.tensor(said, dtype=torch.float64))
                found[f"{CANARY}{one.name}"] = float(mean)
                found[f"{CANARY}{one.name}_sem"] = float(sem) if len(said) > 1 else 0.0
        return found
