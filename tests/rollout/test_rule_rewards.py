"""PPO and online DPO paid by a rule sheet: the policy comes to say what each prompt's own truth asks for."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from statistics import fmean
from typing import Any

import pytest
import torch

from kilter.errors import CheckError
from kilter.models.generation import NativeSampler
from kilter.models.sampling import Sampling
from kilter.models.trunk import Trunk
from kilter.records import Prompt
from kilter.rollout import PolicySource, best_of_n
from kilter.rollout.pairs import PairSource
from kilter.scorers import load_rules
from kilter.train.loop import TrainState, fit
from kilter.train.optimizer import make_optimizer
from kilter.train.policy import ppo
from kilter.train.preferences import preference

SHEET: dict[str, Any] = {
    "rules": [
        {"rule": "exact", "how": "contains", "name": "right"},
        {"rule": "length", "longest": 3, "ramp": 6, "weight": 0.5},
    ]
}


@pytest.fixture
def asked(prompts: list[Prompt]) -> list[Prompt]:
    """Every other prompt wants another word, so that none pleases all."""
    return [replace(prompt, truth={"answer": str(5 + 2 * (at % 2))}) for at, prompt in enumerate(prompts)]


def trained(trunk: Trunk, objective: Any, source: Any, steps: int, learning_rate: float) -> list[float]:
    """Mean score of each rollout."""
    seen: list[float] = []
    state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=learning_rate))
    fit(state, objective, source, steps=steps, on_step=lambda *_: seen.append(source.figures["rollout/score"]))
    return seen


def test_ppo_raises_what_the_sheet_pays(
    make_source: Callable[..., PolicySource], make_trunk: Callable[..., Trunk], asked: list[Prompt]
) -> None:
    trunk = make_trunk()
    sheet = load_rules(SHEET)
    source = make_source(trunk, prompts=asked, scorer=sheet, prompts_per_rollout=16, num_samples=4)
    seen = trained(trunk, ppo(), source, 160, 3e-3)
    assert seen[0] < 0.9 and fmean(seen[-20:]) > 1.2  # 1.5 is all there is
    assert source.figures["rollout/unscored"] == 0
    parts = [score.parts["right"] for score in sheet.score([one.sample for one in source.rollouts])]
    assert fmean(parts) > 0.7


def test_online_dpo_raises_what_the_sheet_pays(
    make_trunk: Callable[..., Trunk], encoder: Any, asked: list[Prompt]
) -> None:
    trunk = make_trunk()
    source = PairSource(
        trunk,
        encoder,
        asked,
        load_rules(SHEET),
        sampler=NativeSampler(trunk, "policy"),
        sampling=Sampling(max_new_tokens=8),
        prompts_per_rollout=16,
        num_samples=4,
        epochs=1,
        minibatches=1,
        generator=torch.Generator().manual_seed(0),
    )
    seen = trained(trunk, preference("dpo", {"beta": 0.3}), source, 60, 3e-3)
    assert seen[0] < 0.9 and fmean(seen[-5:]) > 1.2


def test_without_truth_nothing_is_scored_and_nothing_is_learned(
    make_source: Callable[..., PolicySource], make_trunk: Callable[..., Trunk]
) -> None:
    with pytest.raises(CheckError, match=r"scored answers to only 0 of 8 prompts.*most of the others lack: .*truth"):
        make_source(make_trunk(), scorer=load_rules(SHEET)).next_step()


def test_best_of_n_chooses_by_each_prompts_own_truth(
    make_trunk: Callable[..., Trunk], encoder: Any, asked: list[Prompt]
) -> None:
    chosen = best_of_n(
        NativeSampler(make_trunk(), "policy"),
        encoder,
        asked,
        load_rules({"rules": [SHEET["rules"][0]]}),
        n=8,
        sampling=Sampling(max_new_tokens=8),
        generator=torch.Generator().manual_seed(0),
    )
    for prompt, one in zip(asked, chosen, strict=True):
        right = [prompt.truth["answer"] in rollout.text.split() for rollout in one.rollouts]
        assert (prompt.truth["answer"] in one.chosen.text.split()) == any(right)
    assert sum(one.score.value or 0 for one in chosen) > 10
