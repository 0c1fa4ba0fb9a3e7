"""Samples of another engine than the trainer's: they are weighed, their distance is told, and too far is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch

from kilter.config import PolicyConfig
from kilter.errors import CheckError
from kilter.models.generation import NativeSampler
from kilter.models.trunk import Trunk
from kilter.rollout.algorithms import ALGORITHMS
from kilter.rollout.experience import Correction
from kilter.train.loop import TrainState, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.policy import ppo
from kilter.tree import split_by_response

Make = Callable[..., Any]


def stale(trunk: Trunk, by: float) -> NativeSampler:
    """A sampler whose policy is not quite the trainer's, as an engine of other kernels has it."""
    other = copy.deepcopy(trunk)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in other.parameters_of("policy"):
            parameter.add_(by * torch.randn(parameter.shape, generator=generator))
    return NativeSampler(other, "policy")


def test_each_token_is_weighed_by_how_much_likelier_the_trainer_finds_it(make_trunk: Make, make_source: Make) -> None:
    trunk = make_trunk()
    source = make_source(
        trunk, sampler=stale(trunk, 0.02), correction=Correction(cap=1.02, max_gap=1.0), ppo={"minibatches": 1}
    )
    batches = source.next_step()
    drawn = {rollout.completion.ids: rollout.completion.logprobs for rollout in source.rollouts}
    ratios = []
    for batch in batches:
        count = len(batch.tree.last)
        columns = (batch.tree.target, batch.extras["old_logprobs"], batch.extras["importance"])
        for ids, trained, weight in zip(
            *(split_by_response(one, batch.tree.leaf, count) for one in columns), strict=True
        ):
            ratio = (trained - torch.tensor(drawn[tuple(ids.tolist())])).exp()
            torch.testing.assert_close(weight, ratio.clamp(max=1.02))
            ratios += ratio.tolist()
    assert min(ratios) < 0.99 and max(ratios) > 1.02
    cut = sum(ratio > 1.02 for ratio in ratios) / len(ratios)
    figures = source.figures
    assert figures["rollout/importance_cut"] == pytest.approx(cut) and 0 < cut < 1
    gaps = torch.tensor(ratios).log().abs()
    assert figures["rollout/sampler_gap_mean"] == pytest.approx(float(gaps.mean()), rel=1e-3)
    assert figures["rollout/sampler_gap"] == pytest.approx(float(gaps.max()), rel=1e-3)
    state = TrainState(trunk, make_optimizer(trunk, ["policy", "value"], learning_rate=1e-3))
    told = train_step(state, replace(ppo(), weighted=True), batches)
    assert told["policy/importance"] == pytest.approx(sum(min(ratio, 1.02) for ratio in ratios) / len(ratios), rel=1e-4)


def test_an_engine_that_runs_another_model_is_refused(make_trunk: Make, make_source: Make) -> None:
    trunk = make_trunk()
    source = make_source(trunk, sampler=stale(trunk, 0.3), correction=Correction(cap=2.0, max_gap=0.05))
    with pytest.raises(CheckError, match=r"differ by .* nats in the mean .*sampler\.max_gap 0\.05"):
        source.next_step()


def test_kilters_own_samples_are_not_weighed(make_trunk: Make, make_source: Make) -> None:
    source = make_source(make_trunk())
    assert not any("importance" in batch.extras for batch in source.next_step())
    assert not {"rollout/importance_cut", "rollout/sampler_gap_mean"} & source.figures.keys()


@pytest.mark.parametrize("weighted", [False, True])
def test_every_algorithm_can_weigh(weighted: bool) -> None:
    for name, algorithm in ALGORITHMS.items():
        numbers = algorithm.resolved(name, PolicyConfig())
        assert algorithm.objective(numbers, longest=8, weighted=weighted).weighted == weighted
