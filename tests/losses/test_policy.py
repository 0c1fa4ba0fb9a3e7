"""PPO's losses: by hand on both sides of each clip, gradients, and SFT's cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kilter.losses import nll, ppo_clip, value_clip


def f64(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def logs(*ratios: float) -> Tensor:
    return f64(*map(math.log, ratios))


def test_ppo_by_hand_in_all_four_corners() -> None:
    old = f64(-1.0, -2.0, -3.0, -0.5, -1.5, -1.0)
    new = old + logs(1.5, 1.5, 0.5, 0.5, 1.1, 0.95)
    advantages = f64(2.0, -2.0, 3.0, -3.0, 4.0, -4.0)
    # ratio above the range: a gain is capped at 1.2, a loss is not; below it the other way round; inside: -A ratio
    expected = [-2.0 * 1.2, 2.0 * 1.5, -3.0 * 0.5, 3.0 * 0.8, -4.0 * 1.1, 4.0 * 0.95]
    assert ppo_clip(new, old, advantages).tolist() == pytest.approx(expected, abs=1e-12)


def test_ppo_clip_range() -> None:
    zero = f64(0.0)
    assert ppo_clip(logs(2.0), zero, f64(1.0), clip_range=0.5).item() == pytest.approx(-1.5, abs=1e-12)
    assert ppo_clip(logs(0.25), zero, f64(-1.0), clip_range=0.5).item() == pytest.approx(0.5, abs=1e-12)


def test_at_the_first_pass_the_gradient_is_the_policy_gradient() -> None:
    old, advantages = f64(-1.0, -2.0), f64(0.7, -1.3)
    new = old.clone().requires_grad_()
    loss = ppo_clip(new, old, advantages)
    assert loss.tolist() == [-0.7, 1.3]
    loss.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-0.7, 1.3], abs=1e-12)


def test_outside_the_range_a_gain_has_no_gradient() -> None:
    new = logs(1.5, 0.5).requires_grad_()
    ppo_clip(new, f64(0.0, 0.0), f64(1.0, -1.0)).sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == [0.0, 0.0]


def test_a_token_that_all_but_vanished_stays_finite() -> None:
    new = torch.tensor([0.0, -95.0], requires_grad=True)
    loss = ppo_clip(new, torch.tensor([-95.0, 0.0]), torch.tensor([-1.0, 1.0]))
    assert loss[0].item() == pytest.approx(math.exp(20), rel=1e-6)
    assert loss[1].item() == pytest.approx(-math.exp(-20), rel=1e-6)
    loss.sum().backward()
    assert new.grad is not None and new.grad.isfinite().all()


def test_value_by_hand() -> None:
    values, old, returns = f64(1.0, 2.0, 2.0, -1.0, 0.1), f64(1.0, 1.0, 1.0, 0.0, 0.0), f64(3.0, 3.0, 1.5, -0.4, 2.0)
    expected = [
        0.5 * 2.0**2,  # not moved
        0.5 * 1.8**2,  # moved too far towards the return: judged at 1.2
        0.5 * 0.5**2,  # moved past it: (2 - 1.5)^2 = 0.25 against (1.2 - 1.5)^2 = 0.09, the larger counts
        0.5 * 0.6**2,  # downwards past it: (-1 + 0.4)^2 = 0.36 against (-0.2 + 0.4)^2 = 0.04
        0.5 * 1.9**2,  # moved by less than the range
    ]
    assert value_clip(values, old, returns).tolist() == pytest.approx(expected, abs=1e-12)
    assert value_clip(f64(-2.0), f64(-1.0), f64(-3.0)).item() == pytest.approx(0.5 * 1.8**2, abs=1e-12)


def test_value_clip_range() -> None:
    one = f64(1.0)
    assert value_clip(f64(2.0), one, f64(3.0), clip_range=0.5).item() == pytest.approx(0.5 * 1.5**2, abs=1e-12)
    assert value_clip(f64(9.0), one, f64(3.0), clip_range=math.inf).item() == pytest.approx(0.5 * 36, abs=1e-12)


def test_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(8, generator=generator, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda x: ppo_clip(x, b, c), a.clone().requires_grad_())
    assert torch.autograd.gradcheck(lambda x: value_clip(x, b, c), a.clone().requires_grad_())


def test_nll() -> None:
    logprobs = torch.full((3,), -math.log(50), dtype=torch.float64, requires_grad=True)
    assert nll(logprobs).tolist() == pytest.approx([math.log(50)] * 3, abs=1e-12)
    nll(logprobs).sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, -1.0, -1.0]
