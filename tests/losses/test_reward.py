"""Losses of reward models: golden rows worked out by hand, and what must hold for any ranking."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kilter.losses import REWARD_INPUTS, REWARD_LOSSES, bind, bradley_terry, centring, plackett_luce
from kilter.ops import pairs_in_groups


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nls(x: float) -> float:
    """-log sigmoid(x)"""
    return math.log1p(math.exp(-x))


# Two prompts: a ranking of three (its responses 0 and 2 tied behind 1), and a pair whose second response is better.
REWARDS, GROUP, RANK = f64(0.5, -0.25, 1.0, 2.0, 1.5), torch.tensor([0, 0, 0, 1, 1]), f64(1, 0, 1, 1, 0)


INPUTS = {
    "rewards": REWARDS,
    "group": GROUP,
    "rank": RANK,
    "margin": f64(0.1, 0.2, 0.3, 0.4),
    "value": f64(1.5, -1.0, 1.0, 0.5, 4.0),
    "error": f64(0.0, 0.5, 1.0, 0.0, 2.0),
    "desirable": f64(1, 0, 1, 0, 0),
}
E5, E_25, E1 = math.exp(0.5), math.exp(-0.25), math.e


def three(gap: float, nu: float, tie: bool) -> float:
    """-log of Davidson's chance of a win by this gap, or of a tie."""
    total = math.exp(gap / 2) + math.exp(-gap / 2) + nu
    return -math.log((nu if tie else math.exp(gap / 2)) / total)


# options, loss of each pair (0 and 1, 0 and 2, 1 and 2, 3 and 4) or response
GOLDEN: dict[str, list[tuple[dict[str, Any], list[float]]]] = {
    "bradley_terry": [
        (
            {},
            [
                nls(-0.25 - 0.5),  # 1 beats 0
                0.5 * nls(0.5 - 1.0) + 0.5 * nls(1.0 - 0.5),  # 0 and 2 are tied
                nls(-0.25 - 1.0),  # 1 beats 2
                nls(1.5 - 2.0),  # 4 beats 3
            ],
        ),
        (
            {"label_smoothing": 0.25, "margin_coef": 1.0},
            [
                0.75 * nls(-0.85) + 0.25 * nls(0.85),
                0.5 * nls(-0.5) + 0.5 * nls(0.5),
                0.75 * nls(-1.55) + 0.25 * nls(1.55),
                0.75 * nls(-0.9) + 0.25 * nls(0.9),
            ],
        ),
    ],
    "davidson": [
        ({}, [three(gap, 0.5, gap == 0.5) for gap in (-0.75, 0.5, -1.25, -0.5)]),
        ({"nu": 3.0}, [three(gap, 3.0, gap == 0.5) for gap in (-0.75, 0.5, -1.25, -0.5)]),
    ],
    "plackett_luce": [
        # 1 is best of three; 0 and 2 are tied behind it, each in the other's sum; 4 is better than 3
        (
            {},
            [
                math.log((E5 + E1) / E5),
                math.log((E5 + E_25 + E1) / E_25),
                math.log((E5 + E1) / E1),
                0.0,
                math.log1p(E5),
            ],
        )
    ],
    "regression": [
        ({}, [0.5, 0.75**2 / 2.5, 0.0, 1.5**2 / 2, 2.5**2 / 10]),
        ({"noise": 2.0}, [1 / 8, 0.75**2 / 8.5, 0.0, 1.5**2 / 8, 2.5**2 / 16]),
        # gaps -1, 0.75, 0 and 1.5, -2.5 less their means -1/12 and -1/2
        (
            {"level": "prompt"},
            [(11 / 12) ** 2 / 2, (5 / 6) ** 2 / 2.5, (1 / 12) ** 2 / 4, 2.0, 2.0**2 / 10],
        ),
    ],
    "thumbs": [({}, [nls(0.5), nls(0.25), nls(1.0), nls(-2.0), nls(-1.5)])],
}


@pytest.mark.parametrize(("name", "row"), [(name, row) for name, rows in GOLDEN.items() for row in rows])
def test_by_hand(name: str, row: tuple[dict[str, Any], list[float]]) -> None:
    options, expected = row
    inputs = [INPUTS[given] for given in REWARD_LOSSES[name].inputs]
    got = bind(name, options, table=REWARD_LOSSES)(*inputs)
    assert got.tolist() == pytest.approx(expected, abs=1e-12)
    moving = REWARDS.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda r: REWARD_LOSSES[name].fn(r, *inputs[1:], **options), moving)


def test_every_loss_has_a_golden_row_and_every_input_a_user() -> None:
    assert set(GOLDEN) == set(REWARD_LOSSES)
    assert {given for loss in REWARD_LOSSES.values() for given in loss.inputs} == set(REWARD_INPUTS) == set(INPUTS)


@pytest.mark.parametrize("name", sorted(REWARD_LOSSES))
def test_an_empty_batch_and_one_of_equal_rewards_are_finite(name: str) -> None:
    loss = REWARD_LOSSES[name]
    none = torch.zeros(0, dtype=torch.int64)
    empty = {"group": none, **{given: f64() for given in ("rewards", "rank", "margin", "value", "error", "desirable")}}
    assert loss.fn(*[empty[given] for given in loss.inputs]).numel() == 0
    for level in (0.0, 1e4):
        rewards = torch.full((5,), level, requires_grad=True)
        inputs = [
            rewards,
            *(INPUTS[given].to(torch.float32 if given != "group" else None) for given in loss.inputs[1:]),
        ]
        loss.fn(*inputs).sum().backward()
        assert rewards.grad is not None and rewards.grad.isfinite().all()


def test_two_responses_make_a_plackett_luce_of_bradley_terry() -> None:
    pair, group = f64(0.3, 1.1), torch.tensor([0, 0])
    for rank in (f64(0, 1), f64(1, 0)):
        whole = plackett_luce(pair, group, rank).sum().item()
        assert whole == pytest.approx(bradley_terry(pair, group, rank).sum().item(), abs=1e-12)
    tie = f64(0, 0)  # two losses against each other
    twice = 2 * bradley_terry(pair, group, tie).sum().item()
    assert plackett_luce(pair, group, tie).sum().item() == pytest.approx(twice, abs=1e-12)


def test_the_margin_is_taken_from_the_winners_lead_and_a_tie_has_none() -> None:
    got = bradley_terry(REWARDS, GROUP, RANK, f64(0.1, 0.2, 0.3, 0.4), margin_coef=2.0)
    expected = [nls(-0.75 - 0.2), 0.5 * nls(-0.5) + 0.5 * nls(0.5), nls(-1.25 - 0.6), nls(-0.5 - 0.8)]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_no_difference_gives_ln_2_tie_or_not() -> None:
    got = bradley_terry(f64(3, 3, 3), torch.tensor([0, 0, 0]), f64(0, 1, 1))
    assert got.tolist() == pytest.approx([math.log(2)] * 3, abs=1e-12)


def test_only_the_order_of_the_ranks_counts() -> None:
    assert torch.equal(bradley_terry(REWARDS, GROUP, RANK), bradley_terry(REWARDS, GROUP, 7 * RANK + 3))
    assert torch.equal(bradley_terry(REWARDS, GROUP, RANK), bradley_terry(REWARDS, GROUP, RANK.int()))


def test_the_level_of_the_rewards_is_free_and_centring_fixes_it() -> None:
    assert torch.allclose(bradley_terry(REWARDS + 5, GROUP, RANK), bradley_terry(REWARDS, GROUP, RANK), atol=1e-12)
    assert centring(REWARDS, GROUP).tolist() == pytest.approx([0.25**2, 1.5**2, 0.75**2, 3.5**2], abs=1e-12)


def test_pairs_of_a_permuted_batch_are_the_same_pairs() -> None:
    order = torch.tensor([4, 2, 0, 3, 1])
    assert bradley_terry(REWARDS[order], GROUP[order], RANK[order]).sum().item() == pytest.approx(
        bradley_terry(REWARDS, GROUP, RANK).sum().item(), abs=1e-12
    )


def test_gradients() -> None:
    rewards = REWARDS.clone().requires_grad_()
    margin = f64(0.1, 0.2, 0.3, 0.4)
    assert torch.autograd.gradcheck(
        lambda r: bradley_terry(r, GROUP, RANK, margin, margin_coef=0.5, label_smoothing=0.1), rewards
    )
    assert torch.autograd.gradcheck(lambda r: centring(r, GROUP), rewards)


def test_a_better_response_is_pushed_up_and_a_tie_together() -> None:
    rewards = f64(0.0, 0.0).requires_grad_()
    bradley_terry(rewards, torch.tensor([0, 0]), f64(0, 1)).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad.tolist() == [-0.5, 0.5]
    rewards = f64(1.0, 0.0).requires_grad_()
    bradley_terry(rewards, torch.tensor([0, 0]), f64(0, 0)).sum().backward()
    assert rewards.grad is not None
    assert rewards.grad[0] > 0 > rewards.grad[1]


def test_a_tie_far_apart_stays_finite() -> None:
    rewards = torch.tensor([1e4, -1e4], requires_grad=True)
    bradley_terry(rewards, torch.tensor([0, 0]), torch.tensor([0, 0])).sum().backward()
    assert rewards.grad is not None and rewards.grad.isfinite().all()


def test_an_empty_batch_has_no_pairs() -> None:
    empty = torch.zeros(0, dtype=torch.int64)
    assert bradley_terry(f64(), empty, empty).numel() == 0
    assert centring(f64(), empty).numel() == 0
    assert pairs_in_groups(empty)[0].numel() == 0
