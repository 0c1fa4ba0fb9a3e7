"""A policy whose answers fail goes back to the last one whose answers did not; after some in a row the run stops."""

from __future__ import annotations

import pytest
import torch

from kilter.config import DataRef, RlStage
from kilter.models.generation import Completion
from kilter.records import Message, Prompt
from kilter.rollout.collect import Rollout
from kilter.rollout.source import Verdict
from kilter.stages.reinforce import LastGood

PROMPT = Prompt(prompt=(Message("user", "Hm?"),))


def stage(stop_after: int) -> RlStage:
    path = DataRef(path="somewhere")
    return RlStage(
        model="sft",
        reward="reward",
        prompts=path,
        stop_below=0.5,
        stop_after=stop_after,
        stop_measure=DataRef(path="a:b"),
    )


def rollouts(good: int, bad: int) -> list[Rollout]:
    done = Completion((1,), (2,), (0.0,), finished=True)
    return [Rollout(PROMPT, done, text) for text in ["good"] * good + ["bad"] * bad]


def last_good(weight: torch.Tensor, stop_after: int) -> LastGood:
    return LastGood([weight], lambda prompt, text: prompt is PROMPT and text == "good", stage(stop_after))


def test_stops_below_the_share_and_puts_the_weights_back() -> None:
    weight = torch.zeros(2, requires_grad=True)
    found = last_good(weight, 1)
    assert found(rollouts(2, 2)) == Verdict() and found.share == 0.5
    with torch.no_grad():
        weight.add_(1)
    assert not found.restore() and weight.tolist() == [1, 1]  # the last rollout was good: nothing to undo
    assert found(rollouts(1, 3)) == Verdict(stop="25% of the answers pass a:b, below 50%")
    assert found.restore() and weight.tolist() == [0, 0]


def test_a_policy_that_stumbles_goes_on_from_the_last_good_one() -> None:
    weight = torch.zeros(1)
    found = last_good(weight, 2)
    for good, again, kept in ((4, False, 0), (1, True, 0), (3, False, 1), (0, True, 1)):
        assert found(rollouts(good, 4 - good)) == Verdict(again=again)
        assert weight.tolist() == [kept]
        weight.add_(1)
    assert found(rollouts(1, 3)) == Verdict(stop="25% of the answers pass a:b, below 50% 2 times in a row")
    assert found.restore() and weight.tolist() == [1]  # that of the third rollout


def test_a_run_that_ends_after_a_bad_rollout_goes_back_too() -> None:
    weight = torch.zeros(1)
    found = last_good(weight, 3)
    found(rollouts(4, 0))
    weight.add_(1)
    assert found(rollouts(0, 4)) == Verdict(again=True)
    weight.add_(1)  # what was learned since, nobody has judged
    assert found.restore() and weight.tolist() == [0]


def test_a_policy_that_never_was_good_stays() -> None:
    weight = torch.ones(1)
    found = last_good(weight, 2)
    assert found(rollouts(0, 4)) == Verdict()  # no other answers to be had
    assert found(rollouts(0, 4)) == Verdict(stop="0% of the answers pass a:b, below 50% 2 times in a row")
    assert not found.restore() and weight.tolist() == [1]


@pytest.mark.parametrize("bad", [0, 1])
def test_goes_on_after_a_kill_where_it_was(bad: int) -> None:
    weight = torch.zeros(1)
    found = last_good(weight, 2)
    for good in (4, 0)[: bad + 1]:
        found(rollouts(good, 4 - good))
        weight.add_(1)
    resumed = last_good(weight, 2)
    resumed.load_state_dict(found.state_dict())
    assert resumed.share == found.share == 1 - bad
    assert (resumed(rollouts(0, 4)).stop is None) == (bad == 0)
    assert resumed.restore() and weight.tolist() == [0]
