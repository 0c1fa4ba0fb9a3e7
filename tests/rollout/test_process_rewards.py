"""Rewards for steps inside an answer: where they are paid, and what each method makes of them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import stdev
from typing import Any

import pytest
import torch

from kilter.config import PolicyConfig
from kilter.errors import CheckError, ConfigError
from kilter.models.generation import Completion
from kilter.records import Message, Prompt, Sample, Score, Step
from kilter.rollout import Rollout
from kilter.rollout.algorithms import ALGORITHMS
from kilter.rollout.experience import Measured, credit, pay, step_ends
from kilter.rollout.several import Also, Earned, Multiplier, Several

Make = Callable[..., Any]


class PaysEachWord:
    """`each` for every liked word, at its end; and `more` for the answer as a whole."""

    name = "pays each word"

    def __init__(self, each: float = 1.0, more: float = 0.0, word: str = "5") -> None:
        self.each, self.more, self.word = each, more, word

    def score(self, samples: Sequence[Sample]) -> list[Score]:
        return [self._score(one.text) for one in samples]

    def _score(self, text: str) -> Score:
        words = text.split()
        ends = [len(" ".join(words[: at + 1])) for at, word in enumerate(words) if word == self.word]
        return Score(self.more + self.each * len(ends), steps=tuple(Step(end, self.each) for end in ends))


def measured() -> Measured:
    """Answers of three and two tokens, each token 0.5 nats likelier than the reference thinks."""
    leaf = torch.tensor([0, 0, 0, 1, 1])
    return Measured(leaf, torch.full((5,), -1.0), torch.full((5,), -1.5), torch.zeros(5))


def test_a_step_is_paid_where_it_ends_and_the_rest_at_the_last_token() -> None:
    earned = [Earned(2.0, (Step(1, 0.5), Step(2, 1.0)), 0.75), Earned(-1.0, (), -0.25)]
    config = PolicyConfig(truncation_penalty=0.125)
    paid = pay(earned, [True, False], measured(), kl_coef=0.2, config=config, ends=[[0, 1], []])
    torch.testing.assert_close(paid.rewards, torch.tensor([0.4, 0.9, 0.4, -0.1, -1.225]))
    assert paid.scores.tolist() == [2.0, -1.125] and paid.steps is not None
    assert paid.steps.token.tolist() == [0, 1, 2, 4]
    assert paid.steps.reward.tolist() == [0.5, 1.0, 0.75, -0.375]
    whole = [replace(one, rest=0.0) for one in earned]
    alone = pay(whole, [True, True], measured(), kl_coef=0.2, config=config, ends=[[0, 1], []])
    assert alone.steps is not None and alone.steps.token.tolist() == [0, 1]
    none = pay([Earned(2.0), Earned(-1.0)], [True, True], measured(), kl_coef=0.2, config=config, ends=[[], []])
    assert none.steps is None and none.rewards[2] == pytest.approx(1.9)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_what_each_method_makes_of_steps(name: str) -> None:
    """Token-wise methods credit a step from its own tokens on, GRPO's kind by steps, the others by totals."""
    config = ALGORITHMS[name].resolved(name, PolicyConfig(kl_coef=0.0, whiten_advantages=False))
    steps = [Earned(1.0, (Step(1, 1.0),), 0.0), Earned(1.0, (Step(1, 0.5), Step(2, 0.5)), 0.0)]
    made = Measured(torch.tensor([0, 0, 0, 1, 1, 1]), torch.zeros(6), torch.zeros(6), torch.zeros(6))
    paid = pay(steps, [True, True], made, kl_coef=0.0, config=config, ends=[[0], [0, 1]])
    advantages, _ = credit(ALGORITHMS[name].credit, paid, made, torch.tensor([0, 0]), config)
    first, second = advantages[:3].tolist(), advantages[3:].tolist()
    if name in ("grpo", "dapo", "cispo"):
        assert first[0] > 0 > second[0] and first[1:] == [0.0, 0.0] and second[1] < 0 and second[2] == 0
    elif name in ("ppo", "reinforce++"):
        assert first[0] > first[1] == first[2] and second[0] > second[1] > second[2] and second[1] > first[1]
    else:  # equal totals, but raft takes the first of equals
        assert len(set(first)) == len(set(second)) == 1 and (first == second or name == "raft")


def test_grpo_refuses_a_price_of_the_kl_that_belongs_to_no_step() -> None:
    config = ALGORITHMS["grpo"].resolved("grpo", PolicyConfig(kl_in="reward"))
    paid = pay([Earned(1.0, (Step(1, 1.0),))] * 2, [True] * 2, measured(), kl_coef=0.1, config=config, ends=[[0], [0]])
    with pytest.raises(ConfigError, match="set kl_in to loss"):
        credit(ALGORITHMS["grpo"].credit, paid, measured(), torch.tensor([0, 0]), config)


def test_steps_of_several_scorers_are_scaled_as_their_scores_are() -> None:
    also = [Also("cost", PaysEachWord(), multiplier=Multiplier(0.0, value=1.0)), Also("whole", PaysEachWord(), 2.0)]
    made = Several(also, PolicyConfig(reward_clip=0.0))
    main = [Score(3.0, steps=(Step(4, 1.0),)), Score(1.0), Score(0.0)]
    cost = [Score(0.0), Score(4.0, steps=(Step(2, 4.0),)), Score(2.0, steps=(Step(9, 1.5),))]
    whole = [Score(1.0), Score(2.0), Score(6.0)]
    made.take_in([main, cost, whole], steer=False)
    deviations = [stdev([3, 1, 0]), stdev([0, 4, 2]), stdev([1, 2, 6])]
    first, second, third = made([main, cost, whole])
    assert first.steps == (Step(4, pytest.approx(1 / deviations[0] / 2)),)
    assert second.steps == (Step(2, pytest.approx(-4 / deviations[1] / 2)),)
    assert third.rest == pytest.approx((0 - 0.5 / deviations[1] + 2 * (6 - 3) / deviations[2]) / 2)
    total = ((3 - 4 / 3) / deviations[0] - (0 - 2) / deviations[1] + 2 * (1 - 3) / deviations[2]) / 2
    assert first.total == pytest.approx(total)


def rollout(ids: tuple[int, ...], text: str) -> Rollout:
    return Rollout(Prompt(prompt=(Message("user", "a"),)), Completion((1,), ids, (-1.0,) * len(ids), True), text)


def test_a_step_ends_with_the_token_that_completes_its_text(encoder: Any) -> None:
    answer = rollout((10, 5, 12, 2), "10 5 12")
    steps = tuple(Step(end, 1.0) for end in (1, 2, 3, 4, 5, 6, 7))
    assert step_ends([answer], [Earned(7.0, steps)], encoder) == [[0, 0, 1, 1, 2, 2, 2]]
    assert step_ends([rollout((2,), "")], [Earned(0.0)], encoder) == [[]]
    for step in (Step(0, 1.0), Step(8, 1.0), Step(3, math.nan)):
        with pytest.raises(CheckError, match=f"pays {step.reward:g} for a step that ends at character {step.end} of 7"):
            step_ends([answer], [Earned(1.0, (step,))], encoder)


@pytest.mark.parametrize("algorithm", ["ppo", "grpo"])
def test_the_source_credits_a_word_from_there_back(algorithm: str, make_trunk: Make, make_source: Make) -> None:
    numbers = {"normalize_reward": False, "kl_coef": 0.0, "whiten_advantages": False, "gae_lambda": 1.0}
    if algorithm == "grpo":
        del numbers["gae_lambda"]
    source = make_source(
        make_trunk(), algorithm=algorithm, scorer=PaysEachWord(2.0), ppo=numbers | {"minibatches": 1}, num_samples=4
    )
    [batch, *more] = source.next_step()
    batches, paid = [batch, *more], 0
    for one in batches:
        returns = one.extras["advantages"] + one.extras.get("old_values", 0.0)
        for leaf in range(len(one.tree.last)):
            own = one.tree.leaf == leaf
            liked = (one.tree.target[own] == 5).tolist()
            paid += sum(liked)
            drops = (returns[own][:-1] - returns[own][1:]).tolist()
            if algorithm == "ppo":  # what is still to come is 2 less after each liked word
                assert drops == pytest.approx([2.0 * word for word in liked[:-1]], abs=1e-5)
            else:  # all steps are alike, so that none is better than another
                assert returns[own].abs().max() < 1e-6
    assert paid > 5
    assert source.figures["rollout/score"] == pytest.approx(2.0 * paid / source.figures["rollout/samples"])
