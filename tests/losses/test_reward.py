"""Bradley-Terry over all pairs of a ranking: by hand, with ties and margins, and what must hold for any ranking."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kilter.losses import bradley_terry, centring
from kilter.ops import pairs_in_groups


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def nls(x: float) -> float:
    """-log sigmoid(x)"""
    return math.log1p(math.exp(-x))


# Two prompts: a ranking of three (its responses 0 and 2 tied behind 1), and a pair whose second response is better.
REWARDS, GROUP, RANK = f64(0.5, -0.25, 1.0, 2.0, 1.5), torch.tensor([0, 0, 0, 1, 1]), f64(1, 0, 1, 1, 0)


def test_by_hand() -> None:
    got = bradley_terry(REWARDS, GROUP, RANK)
    expected = [
        nls(-0.25 - 0.5),  # 1 beats 0
        0.5 * nls(0.5 - 1.0) + 0.5 * nls(1.0 - 0.5),  # 0 and 2 are tied
        nls(-0.25 - 1.0),  # 1 beats 2
        nls(1.5 - 2.0),  # 4 beats 3
    ]
    assert got.tolist() == pytest.approx(expected, abs=1e-12)


def test_the_margin_is_taken_from_the_winners_lead_and_a_tie_has_none() -> None:
    got = bradley_terry(REWARDS, GROUP, RANK, margin=f64(0.1, 0.2, 0.3, 0.4))
    expected = [nls(-0.75 - 0.1), 0.5 * nls(-0.5) + 0.5 * nls(0.5), nls(-1.25 - 0.3), nls(-0.5 - 0.4)]
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
    assert torch.autograd.gradcheck(lambda r: bradley_terry(r, GROUP, RANK, margin=margin), rewards)
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
