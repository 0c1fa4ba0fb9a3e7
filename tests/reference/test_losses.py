"""The losses again, one number at a time in plain Python floats, compared on random inputs.

Written from the papers and not from the code: loops, no tensors, no shared helper.
"""

from __future__ import annotations

import math
import random

import pytest
import torch

from kilter import losses, ops


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x)) if x > 0 else math.exp(x) / (1 + math.exp(x))


def slow_dpo(chosen: float, rejected: float, ref_chosen: float, ref_rejected: float, beta: float, eps: float) -> float:
    """Rafailov et al. eq. 7, as the probability that the implicit rewards give to the label."""
    reward_chosen, reward_rejected = beta * (chosen - ref_chosen), beta * (rejected - ref_rejected)
    likely, unlikely = sigmoid(reward_chosen - reward_rejected), sigmoid(reward_rejected - reward_chosen)
    return -((1 - eps) * math.log(likely) + eps * math.log(unlikely))


def slow_bradley_terry(rewards: list[float], ranks: list[int]) -> float:
    """All pairs of one ranking; exp(r) are the strengths."""
    total = 0.0
    for i in range(len(rewards)):
        for j in range(i + 1, len(rewards)):
            i_wins = math.exp(rewards[i]) / (math.exp(rewards[i]) + math.exp(rewards[j]))
            if ranks[i] < ranks[j]:
                total -= math.log(i_wins)
            elif ranks[i] > ranks[j]:
                total -= math.log(1 - i_wins)
            else:
                total -= (math.log(i_wins) + math.log(1 - i_wins)) / 2
    return total


def slow_gae(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """Schulman et al. 2016, eq. 16, as the sum over all later errors, for one response."""
    n = len(rewards)
    later = [*values, 0.0]
    errors = [rewards[t] + gamma * later[t + 1] - values[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * errors[k] for k in range(t, n)) for t in range(n)]


def slow_ppo(logprob: float, old: float, advantage: float, clip: float) -> float:
    """Schulman et al. 2017, eq. 7, by cases."""
    ratio = math.exp(logprob) / math.exp(old)
    if advantage > 0 and ratio > 1 + clip:
        return -(1 + clip) * advantage
    if advantage < 0 and ratio < 1 - clip:
        return -(1 - clip) * advantage
    return -ratio * advantage


def slow_value(value: float, old: float, target: float, clip: float) -> float:
    near = min(max(value, old - clip), old + clip)
    return max((value - target) ** 2, (near - target) ** 2) / 2


def tensor(values: list[float] | list[list[float]]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def joined(rows: list[list[float]]) -> list[float]:
    return [value for row in rows for value in row]


@pytest.mark.parametrize("seed", range(4))
def test_dpo(seed: int) -> None:
    rng = random.Random(seed)
    rows = [[-30 * rng.random() for _ in range(4)] for _ in range(16)]
    beta, eps = rng.uniform(0.05, 1), rng.uniform(0, 0.49)
    got = losses.dpo(*tensor(rows).unbind(1), beta=beta, label_smoothing=eps)
    assert got.tolist() == pytest.approx([slow_dpo(*row, beta, eps) for row in rows], abs=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_bradley_terry(seed: int) -> None:
    rng = random.Random(seed)
    sizes = [rng.randint(1, 5) for _ in range(6)]
    rewards = [[rng.gauss(0, 2) for _ in range(k)] for k in sizes]
    ranks = [[rng.randrange(k) for _ in range(k)] for k in sizes]
    group = [g for g, k in enumerate(sizes) for _ in range(k)]
    got = losses.bradley_terry(tensor(joined(rewards)), torch.tensor(group), tensor(joined(ranks)))
    assert len(got) == sum(math.comb(k, 2) for k in sizes)
    assert got.sum().item() == pytest.approx(sum(map(slow_bradley_terry, rewards, ranks)), rel=1e-9)


@pytest.mark.parametrize("seed", range(4))
def test_gae(seed: int) -> None:
    rng = random.Random(seed)
    lengths = [1, 2, 7, 33, rng.randint(1, 70)]
    rewards = [[rng.gauss(0, 1) for _ in range(n)] for n in lengths]
    values = [[rng.gauss(0, 1) for _ in range(n)] for n in lengths]
    gamma, lam = rng.uniform(0.9, 1), rng.uniform(0.8, 1)
    leaf = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    got, returns = ops.gae(tensor(joined(rewards)), tensor(joined(values)), leaf, gamma=gamma, gae_lambda=lam)
    slow = [a for r, v in zip(rewards, values, strict=True) for a in slow_gae(r, v, gamma, lam)]
    assert got.tolist() == pytest.approx(slow, abs=1e-10)
    assert returns.tolist() == pytest.approx([a + v for a, v in zip(slow, joined(values), strict=True)], abs=1e-10)


@pytest.mark.parametrize("seed", range(4))
def test_ppo(seed: int) -> None:
    rng = random.Random(seed)
    old = [-5 * rng.random() - 1 for _ in range(40)]
    new = [x + rng.gauss(0, 0.4) for x in old]
    advantages = [rng.gauss(0, 1) for _ in old]
    targets = [rng.gauss(0, 1) for _ in old]
    clip = rng.uniform(0.1, 0.4)
    got = losses.ppo_clip(tensor(new), tensor(old), tensor(advantages), clip_range=clip)
    assert got.tolist() == pytest.approx(
        [slow_ppo(*row, clip) for row in zip(new, old, advantages, strict=True)], rel=1e-9
    )
    got = losses.value_clip(tensor(new), tensor(old), tensor(targets), clip_range=clip)
    assert got.tolist() == pytest.approx([slow_value(*row, clip) for row in zip(new, old, targets, strict=True)])


def test_kl_estimators_over_a_whole_distribution() -> None:
    rng = random.Random(0)
    p, q = ([x / sum(row) for x in row] for row in ([rng.random() for _ in range(30)] for _ in range(2)))
    exact = sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))
    chi = sum(a * math.log(a / b) ** 2 for a, b in zip(p, q, strict=True)) / 2
    logp, logq = (tensor(list(map(math.log, row))) for row in (p, q))
    weights = tensor(p)
    assert (weights * ops.kl_k1(logp, logq)).sum().item() == pytest.approx(exact, rel=1e-9)
    assert (weights * ops.kl_k2(logp, logq)).sum().item() == pytest.approx(chi, rel=1e-9)
    assert (weights * ops.kl_k3(logp, logq)).sum().item() == pytest.approx(exact, rel=1e-9)


def test_the_gradient_of_k2_is_that_of_the_kl() -> None:
    """E_p[d k2] = d KL(p || q), summed exactly over four outcomes; k1's expected gradient is 0 instead."""
    logits = tensor([0.3, -0.7, 0.1, 0.9]).requires_grad_()
    logq = tensor([-1.0, -2.0, -1.5, math.log(1 - math.exp(-1) - math.exp(-2) - math.exp(-1.5))])
    logp = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((logp.exp() * (logp - logq)).sum(), logits, retain_graph=True)
    p = logp.exp().detach()
    (k2,) = torch.autograd.grad((p * ops.kl_k2(logp, logq)).sum(), logits, retain_graph=True)
    (k1,) = torch.autograd.grad((p * ops.kl_k1(logp, logq)).sum(), logits)
    assert torch.allclose(k2, exact, atol=1e-12)
    assert torch.allclose(k1, torch.zeros(4, dtype=torch.float64), atol=1e-12)
