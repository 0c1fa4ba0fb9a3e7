"""Shared arithmetic: values worked out by hand, and what must hold for any input."""

from __future__ import annotations

import math
from statistics import fmean, stdev
from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from kilter import ops


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def test_sum_by() -> None:
    got = ops.sum_by(f64(1.0, 2.0, 4.0, 8.0), torch.tensor([0, 2, 0, 2]), 4)
    assert got.tolist() == [5.0, 0.0, 10.0, 0.0]


def test_sum_by_of_nothing() -> None:
    assert ops.sum_by(f64(), torch.tensor([], dtype=torch.int64), 3).tolist() == [0.0, 0.0, 0.0]


def test_sum_by_passes_the_gradient() -> None:
    values = f64(1.0, 2.0, 4.0).requires_grad_()
    (ops.sum_by(values, torch.tensor([1, 0, 1]), 2) * f64(10.0, 3.0)).sum().backward()
    assert values.grad is not None
    assert values.grad.tolist() == [3.0, 10.0, 3.0]


def test_pairs_in_groups() -> None:
    a, b = ops.pairs_in_groups(torch.tensor([0, 0, 1, 0, 2, 1]))
    assert list(zip(a.tolist(), b.tolist(), strict=True)) == [(0, 1), (0, 3), (1, 3), (2, 5)]


def test_no_pairs_in_an_empty_batch() -> None:
    a, b = ops.pairs_in_groups(torch.tensor([], dtype=torch.int64))
    assert a.numel() == b.numel() == 0


def test_clamped_log_ratios_are_counted() -> None:
    clamped, count = ops.clamp_log_ratio(f64(25.0, -3.0, -20.5, 20.0, 0.0))
    assert clamped.tolist() == [20.0, -3.0, -20.0, 20.0, 0.0]
    assert count.item() == 2.0


def test_kl_estimators_by_hand() -> None:
    p, q = f64(math.log(0.5), math.log(0.2)), f64(math.log(0.25), math.log(0.6))
    assert ops.kl_k1(p, q).tolist() == pytest.approx([math.log(2), -math.log(3)], abs=1e-12)
    assert ops.kl_k2(p, q).tolist() == pytest.approx([math.log(2) ** 2 / 2, math.log(3) ** 2 / 2], abs=1e-12)
    assert ops.kl_k3(p, q).tolist() == pytest.approx([0.5 - 1 + math.log(2), 3 - 1 - math.log(3)], abs=1e-12)


def test_the_exact_kl_by_hand() -> None:
    p, q = f64(0.5, 0.5, 1.0, 0.0).view(2, 2), f64(0.25, 0.75, 0.5, 0.5).view(2, 2)
    p[1] = f64(1 - 1e-300, 1e-300)
    expected = [0.5 * math.log(2) + 0.5 * math.log(0.5 / 0.75), math.log(2)]
    assert ops.kl_exact(p.log(), q.log()).tolist() == pytest.approx(expected, abs=1e-12)
    assert expected[0] == pytest.approx(0.1438, abs=1e-4)
    assert ops.kl_exact(f64(0.0)[None], f64(0.0)[None]).tolist() == [0.0]  # one token
    assert ops.kl_exact(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)


def test_the_gradient_of_the_exact_kl() -> None:
    logits = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    logq = torch.randn(3, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    assert torch.autograd.gradcheck(lambda at: ops.kl_exact(at.log_softmax(-1), logq), logits)
    (slope,) = torch.autograd.grad(ops.kl_exact(logits.log_softmax(-1), logq).sum(), logits)
    for row, other, got in zip(logits.softmax(-1).tolist(), logq.exp().tolist(), slope.tolist(), strict=True):
        kl = sum(a * math.log(a / b) for a, b in zip(row, other, strict=True))
        assert got == pytest.approx([a * (math.log(a / b) - kl) for a, b in zip(row, other, strict=True)], abs=1e-12)


def test_the_exact_kl_of_two_near_distributions_in_float32() -> None:
    """Its error is far below that of the textbook's form, which a shift of a row by rounding moves by as much."""
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(16, 20_000, dtype=torch.float64, generator=generator)
    q = p + 1e-2 * torch.randn(p.shape, dtype=torch.float64, generator=generator)
    wide, narrow = ((p.to(t).log_softmax(-1), q.to(t).log_softmax(-1)) for t in (torch.float64, torch.float32))
    exact = ops.kl_exact(*wide)
    assert float(exact.mean()) == pytest.approx(5e-5, rel=0.2)
    assert float((ops.kl_exact(*narrow) - exact).abs().max()) < 2e-7
    assert float(((narrow[0].exp() * (narrow[0] - narrow[1])).sum(-1) - exact).abs().max()) > 4e-7


def test_k3_of_a_vanished_token_is_finite() -> None:
    assert ops.kl_k3(f64(-90.0), f64(0.0)).item() == pytest.approx(math.exp(20) - 21, rel=1e-12)


def test_k1_and_k3_are_unbiased_and_k3_varies_less() -> None:
    p, q = torch.tensor([0.7, 0.2, 0.1], dtype=torch.float64), torch.tensor([0.6, 0.25, 0.15], dtype=torch.float64)
    exact = (p * (p / q).log()).sum().item()
    k1, k3 = ops.kl_k1(p.log(), q.log()), ops.kl_k3(p.log(), q.log())
    assert (p * k1).sum().item() == pytest.approx(exact, abs=1e-12)
    assert (p * k3).sum().item() == pytest.approx(exact, abs=1e-12)
    spread1, spread3 = (p * (k1 - exact) ** 2).sum(), (p * (k3 - exact) ** 2).sum()
    assert spread3 < spread1 / 10


def test_mean_and_standard_error() -> None:
    mean, sem = ops.mean_and_sem(f64(1.0, 2.0, 3.0, 4.0))
    assert mean.item() == 2.5
    assert sem.item() == pytest.approx(math.sqrt((2.25 + 0.25 + 0.25 + 2.25) / 3) / 2, abs=1e-12)
    mean, sem = ops.mean_and_sem(f64(1.0, 4.0))
    assert sem.item() == pytest.approx(math.sqrt(4.5 / 2), abs=1e-12)


def test_one_value_has_a_mean_and_no_known_error() -> None:
    mean, sem = ops.mean_and_sem(f64(7.0))
    assert mean.item() == 7.0
    assert math.isnan(sem.item())


def test_whiten_by_hand() -> None:
    assert ops.whiten(f64(1.0, 3.0)).tolist() == pytest.approx([-1.0, 1.0], abs=1e-7)
    assert ops.whiten(f64(5.0, 9.0), subtract_mean=False).tolist() == pytest.approx([6.0, 8.0], abs=1e-7)
    assert ops.whiten(f64(0.001, 0.003), eps=3e-6).tolist() == pytest.approx([-0.5, 0.5], abs=1e-12)


def test_whitening_one_value_gives_zero() -> None:
    assert ops.whiten(f64(3.0)).tolist() == [0.0]


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-100, 100), min_size=2, max_size=20), st.floats(0.5, 3), st.floats(-5, 5))
def test_whitening_takes_scale_and_level_away(values: list[float], scale: float, level: float) -> None:
    x = f64(*values)
    if x.std() < 0.1:
        return
    got = ops.whiten(x)
    assert got.mean().abs() < 1e-9
    assert got.square().mean().item() == pytest.approx(1, abs=1e-4)
    assert torch.allclose(ops.whiten(scale * x + level), got, rtol=0, atol=1e-4)


def test_whitening_defaults_keep_small_signals() -> None:
    assert ops.whiten(f64(-1e-3, 1e-3)).tolist() == pytest.approx([-0.995037, 0.995037], abs=1e-5)


# GAE: two responses of 3 and 2 tokens. Rewards and values are all different, so that no two mistakes can cancel.
REWARDS, VALUES = f64(0.1, 0.2, 1.0, -0.3, 2.0), f64(0.5, 0.4, 0.7, 0.25, -0.6)
LEAF = torch.tensor([0, 0, 0, 1, 1])


def test_gae_by_hand() -> None:
    gamma, lam = 0.9, 0.8
    d2 = 1.0 - 0.7
    d1 = 0.2 + gamma * 0.7 - 0.4
    d0 = 0.1 + gamma * 0.4 - 0.5
    d4 = 2.0 + 0.6
    d3 = -0.3 + gamma * -0.6 - 0.25
    a2, a4 = d2, d4
    a1, a3 = d1 + gamma * lam * a2, d3 + gamma * lam * a4
    a0 = d0 + gamma * lam * a1
    advantages, returns = ops.gae(REWARDS, VALUES, LEAF, gamma=gamma, gae_lambda=lam)
    assert advantages.tolist() == pytest.approx([a0, a1, a2, a3, a4], abs=1e-12)
    assert returns.tolist() == pytest.approx([a0 + 0.5, a1 + 0.4, a2 + 0.7, a3 + 0.25, a4 - 0.6], abs=1e-12)


def test_gae_defaults_are_undiscounted_with_lambda_0_95() -> None:
    advantages, _ = ops.gae(f64(0.0, 1.0), f64(0.5, 0.25), torch.tensor([0, 0]))
    assert advantages.tolist() == pytest.approx([(0.25 - 0.5) + 0.95 * 0.75, 0.75], abs=1e-12)


def test_gae_of_one_token_and_of_none() -> None:
    advantages, returns = ops.gae(f64(3.0), f64(1.0), torch.tensor([0]))
    assert (advantages.item(), returns.item()) == (2.0, 3.0)
    advantages, returns = ops.gae(f64(), f64(), torch.tensor([], dtype=torch.int64))
    assert advantages.numel() == returns.numel() == 0


def test_lambda_one_is_the_whole_return() -> None:
    _, returns = ops.gae(REWARDS, VALUES, LEAF, gamma=1.0, gae_lambda=1.0)
    assert returns.tolist() == pytest.approx([1.3, 1.2, 1.0, 1.7, 2.0], abs=1e-12)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.floats(0, 1), st.floats(0, 1), st.integers(0, 1000))
def test_gae_of_a_response_does_not_depend_on_its_neighbours(
    lengths: list[int], gamma: float, lam: float, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    n = sum(lengths)
    rewards, values = (torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(2))
    leaf = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    together, _ = ops.gae(rewards, values, leaf, gamma=gamma, gae_lambda=lam)
    for r, v, got in zip(rewards.split(lengths), values.split(lengths), together.split(lengths), strict=True):
        alone, _ = ops.gae(r, v, torch.zeros(len(r), dtype=torch.int64), gamma=gamma, gae_lambda=lam)
        assert torch.allclose(got, alone, rtol=0, atol=1e-10)


def test_values_less_their_groups_mean() -> None:
    group = torch.tensor([0, 1, 0])
    assert ops.less_group_mean(torch.tensor([1.0, 2.0, 6.0]), group).tolist() == [-2.5, 0.0, 2.5]
    assert ops.less_group_mean(torch.zeros(0), torch.zeros(0, dtype=torch.int64)).numel() == 0


def test_means_by_index() -> None:
    got = ops.mean_by(f64(1.0, 2.0, 4.0, 9.0), torch.tensor([0, 2, 0, 0]), 4)
    assert got.tolist() == pytest.approx([14 / 3, 0.0, 2.0, 0.0], abs=1e-12)
    assert ops.mean_by(f64(), torch.tensor([], dtype=torch.int64), 2).tolist() == [0.0, 0.0]


# Advantages: three prompts with three, one and two responses, not side by side.
SCORES, GROUP = f64(1.0, 5.0, 2.0, 4.0, 6.0, 1.5), torch.tensor([0, 1, 0, 2, 0, 2])
CENTRED = [-2.0, 0.0, -1.0, 1.25, 3.0, -1.25]


def test_group_advantages_by_hand() -> None:
    first, third = math.sqrt((4 + 1 + 9) / 2) + 1e-4, math.sqrt(2 * 1.25**2) + 1e-4
    expected = [-2 / first, 0.0, -1 / first, 1.25 / third, 3 / first, -1.25 / third]
    assert ops.group_advantages(SCORES, GROUP).tolist() == pytest.approx(expected, abs=1e-12)
    assert ops.group_advantages(SCORES, GROUP, scale="none").tolist() == pytest.approx(CENTRED, abs=1e-12)


def test_group_advantages_on_the_scale_of_the_batch() -> None:
    deviations = [score - 3.25 for score in SCORES.tolist()]
    spread = math.sqrt(sum(x * x for x in deviations) / 5) + 1e-4
    got = ops.group_advantages(SCORES, GROUP, scale="batch").tolist()
    assert got == pytest.approx([x / spread for x in CENTRED], abs=1e-12)


def test_leave_one_out_by_hand() -> None:
    expected = [1 - 8 / 2, 0.0, 2 - 7 / 2, 4 - 1.5, 6 - 3 / 2, 1.5 - 4]
    assert ops.leave_one_out(SCORES, GROUP).tolist() == pytest.approx(expected, abs=1e-12)


def test_the_example_of_each_advantage() -> None:
    rewards, group = f64(0.0, 1.0), torch.tensor([0, 0])
    assert ops.group_advantages(rewards, group).tolist() == pytest.approx([-0.7070, 0.7070], abs=1e-4)
    assert ops.group_advantages(rewards, group, scale="none").tolist() == [-0.5, 0.5]
    assert ops.leave_one_out(rewards, group).tolist() == [-1.0, 1.0]
    assert ops.reinforce_plus_plus(f64(1.0, 3.0), torch.tensor([0, 1])).tolist() == pytest.approx([-1, 1], abs=1e-7)


@pytest.mark.parametrize("scale", ["group", "batch", "none"])
def test_equal_rewards_alone_and_none_have_no_advantage(scale: Literal["group", "batch", "none"]) -> None:
    equal, together = torch.full((7,), 1000.1), torch.zeros(7, dtype=torch.int64)  # 1000.1 is no float32
    for rewards, group in ((equal, together), (f64(3.0), together[:1]), (f64(), together[:0])):
        for got in (ops.group_advantages(rewards, group, scale=scale), ops.leave_one_out(rewards, group)):
            assert got.dtype == rewards.dtype
            assert got.tolist() == pytest.approx([0.0] * len(rewards), abs=1e-8)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-10, 10), min_size=2, max_size=12), st.integers(0, 1000), st.floats(-5, 5))
def test_what_a_whole_group_is_paid_more_is_no_advantage(scores: list[float], seed: int, bonus: float) -> None:
    group = torch.randint(0, 3, (len(scores),), generator=torch.Generator().manual_seed(seed))
    rewards, moved = f64(*scores), f64(*scores) + bonus * (group == 1)
    scales: tuple[Literal["group", "none"], ...] = ("group", "none")
    for scale in scales:
        got = ops.group_advantages(rewards, group, scale=scale)
        assert torch.allclose(ops.group_advantages(moved, group, scale=scale), got, rtol=0, atol=1e-6)
        assert ops.sum_by(got, group, 3).abs().max() < 1e-6
    assert torch.allclose(ops.leave_one_out(moved, group), ops.leave_one_out(rewards, group), rtol=0, atol=1e-9)


def test_reinforce_plus_plus_by_hand() -> None:
    to_go = [1.3, 1.2, 1.0, 1.7, 2.0]
    mean = sum(to_go) / 5
    spread = math.sqrt(sum((x - mean) ** 2 for x in to_go) / 5 + 1e-8)
    got = ops.reinforce_plus_plus(REWARDS, LEAF).tolist()
    assert got == pytest.approx([(x - mean) / spread for x in to_go], abs=1e-12)


def test_reinforce_plus_plus_with_a_baseline() -> None:
    """Scores 2, 4 of one prompt and 9, 9 of another, paid at the last tokens less their group's mean."""
    scores = ops.less_group_mean(f64(2.0, 4.0, 9.0, 9.0), torch.tensor([0, 0, 1, 1]))
    leaf = torch.tensor([0, 0, 1, 2, 3, 3])
    rewards = torch.zeros(6, dtype=torch.float64).index_put((torch.tensor([1, 2, 3, 5]),), scores)
    spread = math.sqrt((1 + 1 + 1 - 1 / 6) / 6)  # of -1, -1, 1, 0, 0, 0 about their mean, -1/6
    expected = [(x + 1 / 6) / spread for x in (-1, -1, 1, 0, 0, 0)]
    assert ops.reinforce_plus_plus(rewards, leaf).tolist() == pytest.approx(expected, abs=1e-6)


def test_one_token_and_equal_rewards_teach_nothing() -> None:
    assert ops.reinforce_plus_plus(f64(3.0), torch.tensor([0])).tolist() == [0.0]
    assert ops.reinforce_plus_plus(f64(0.0, 2.0, 2.0), torch.tensor([0, 0, 1])).tolist() == [0.0, 0.0, 0.0]
    equal = ops.reinforce_plus_plus(torch.full((7,), 1000.1), torch.arange(7))  # 1000.1 is no float32
    assert equal.dtype == torch.float32
    assert equal.tolist() == pytest.approx([0.0] * 7, abs=1e-6)


def test_step_advantages_equal_a_slow_rederivation() -> None:
    """Prompt 0 with three answers, the last of them without a step; prompt 1 with two, all of whose steps are alike."""
    lengths, groups = [4, 3, 2, 3, 1], [0, 0, 0, 1, 1]
    steps = [[(0, 1.0), (2, -0.5)], [(1, 0.25), (1, 2.0), (2, 0.5)], [], [(0, 0.3), (2, 0.3)], [(0, 0.3)]]
    expected = []
    for answer, length in enumerate(lengths):
        own = [reward for one, group in enumerate(groups) if group == groups[answer] for _, reward in steps[one]]
        mean, deviation = fmean(own), stdev(own) + 1e-4
        expected += [
            sum((reward - mean) / deviation for end, reward in steps[answer] if end >= at) for at in range(length)
        ]
    leaf = torch.repeat_interleave(torch.arange(5), torch.tensor(lengths))
    starts = [sum(lengths[:at]) for at in range(5)]
    token = torch.tensor([start + end for start, row in zip(starts, steps, strict=True) for end, _ in row])
    reward = torch.tensor([reward for row in steps for _, reward in row], dtype=torch.float64)
    found = ops.step_advantages(reward, token, leaf, torch.tensor(groups))
    torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-10)
    assert found[9:].abs().max() == 0


def test_step_advantages_by_hand() -> None:
    leaf, group = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0])
    found = ops.step_advantages(torch.tensor([1.0, 1.0, 0.0, 0.0]), torch.arange(4), leaf, group)
    torch.testing.assert_close(found, torch.tensor([1.7318, 0.8659, -1.7318, -0.8659]), rtol=0, atol=1e-4)


@given(st.lists(st.tuples(st.integers(0, 3), st.sampled_from([-1.0, 0.0, 0.5, 2.0])), min_size=1, max_size=12))
def test_best_of_group_is_the_first_of_the_best(rows: list[tuple[int, float]]) -> None:
    groups, rewards = [group for group, _ in rows], [reward for _, reward in rows]
    best = [max(reward for other, reward in rows if other == group) for group in groups]
    expected = [
        float(reward == best[at] and (groups[at], reward) not in rows[:at]) for at, reward in enumerate(rewards)
    ]
    assert ops.best_of_group(f64(*rewards), torch.tensor(groups)).tolist() == expected


def test_best_of_group_is_the_first_of_many_equals() -> None:
    """A sort that does not keep the order of equals keeps it by chance among sixteen."""
    group = torch.arange(2).repeat(50)
    assert ops.best_of_group(torch.ones(100, dtype=torch.float64), group).tolist() == [1.0, 1.0] + [0.0] * 98


def test_kl_exact_sums_over_the_last_axis() -> None:
    p, q = torch.randn(2, 2, 3, 4, generator=torch.Generator().manual_seed(0)).log_softmax(-1)
    rows = [ops.kl_exact(one, other) for one, other in zip(p.flatten(0, 1), q.flatten(0, 1), strict=True)]
    torch.testing.assert_close(ops.kl_exact(p, q), torch.stack(rows).reshape(2, 3))
