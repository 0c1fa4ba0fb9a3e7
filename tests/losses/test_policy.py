"""Policy losses: by hand on both sides of each clip, gradients, and SFT's cross-entropy."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from kilter.losses import (
    KlEstimator,
    cispo,
    gspo,
    importance_weights,
    kl_penalty,
    nll,
    ppo_clip,
    reinforce,
    response_clip,
    value_clip,
)
from kilter.ops import mean_by


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


def test_ppo_clips_higher_above_than_below() -> None:
    ratios = logs(1.25, 1.5, 0.75, 0.5)
    got = ppo_clip(ratios, f64(0.0, 0.0, 0.0, 0.0), f64(1.0, 1.0, -1.0, -1.0), clip_range=0.3, clip_range_high=0.4)
    assert got.tolist() == pytest.approx([-1.25, -1.4, 0.75, 0.7], abs=1e-12)


# Three responses of 2, 1 and 3 tokens, of which the second has the leaf between the others'.
LEAF = torch.tensor([0, 0, 2, 1, 1, 1])
OLD = f64(-1.0, -2.0, -0.5, -1.5, -2.5, -3.0)
RATIOS = (1.1, 1.6, 0.9, 0.8, 0.5, 0.9)
ADVANTAGES = f64(2.0, 2.0, -1.0, -3.0, -3.0, -3.0)


def test_gspo_by_hand() -> None:
    s = [math.sqrt(1.1 * 1.6), 0.9, (0.8 * 0.5 * 0.9) ** (1 / 3)]  # 1.33, 0.9, 0.71: outside, inside, outside
    got = gspo(OLD + logs(*RATIOS), OLD, ADVANTAGES, LEAF, 3, clip_range=0.2)
    assert got.tolist() == pytest.approx([-2 * (1 + 4e-4)] * 2 + [s[1]] + [3 * 0.8] * 3, abs=1e-12)
    got = gspo(OLD + logs(*RATIOS), OLD, -ADVANTAGES, LEAF, 3, clip_range=0.2)
    assert got.tolist() == pytest.approx([2 * s[0]] * 2 + [-s[1]] + [-3 * s[2]] * 3, abs=1e-12)
    got = gspo(OLD + logs(*RATIOS), OLD, ADVANTAGES, LEAF, 3, clip_range=0.25, clip_range_high=None)
    assert got.tolist() == pytest.approx([-2 * 1.25] * 2 + [s[1]] + [3 * 0.75] * 3, abs=1e-12)


def test_gspo_has_the_ranges_of_its_paper() -> None:
    one = torch.tensor([0, 1])
    got = gspo(logs(2.0, 0.5), f64(0.0, 0.0), f64(1.0, -1.0), one, 2)
    assert got.tolist() == pytest.approx([-1.0004, 0.9997], abs=1e-12)


def test_response_clip_by_hand() -> None:
    whole = [1.1 * 1.6, 0.9, 0.8 * 0.5 * 0.9]
    got = response_clip(OLD + logs(*RATIOS), OLD, ADVANTAGES, LEAF, 3)
    assert got.tolist() == pytest.approx([-2 * 1.2] * 2 + [0.9] + [3 * 0.8] * 3, abs=1e-12)
    got = response_clip(OLD + logs(*RATIOS), OLD, -ADVANTAGES, LEAF, 3, clip_range=0.05, clip_range_high=0.1)
    assert got.tolist() == pytest.approx([2 * whole[0]] * 2 + [-whole[1]] + [-3 * whole[2]] * 3, abs=1e-12)
    got = response_clip(OLD + logs(*RATIOS), OLD, ADVANTAGES, LEAF, 3, clip_range=0.05, clip_range_high=0.1)
    assert got.tolist() == pytest.approx([-2 * 1.1] * 2 + [0.95] + [3 * 0.95] * 3, abs=1e-12)


def test_at_the_first_pass_losses_of_responses_have_the_policy_gradient() -> None:
    for loss, share in ((gspo, [1 / 2, 1 / 2, 1, 1 / 3, 1 / 3, 1 / 3]), (response_clip, [1.0] * 6)):
        new = OLD.clone().requires_grad_()
        losses = loss(new, OLD, ADVANTAGES, LEAF, 3)
        assert losses.tolist() == (-ADVANTAGES).tolist()
        mean_by(losses, LEAF, 3).sum().backward()
        assert new.grad is not None
        expected = [-a * part for a, part in zip(ADVANTAGES.tolist(), share, strict=True)]
        assert new.grad.tolist() == pytest.approx(expected, abs=1e-12)


def test_cispo_by_hand() -> None:
    old, advantages = f64(-1.0, -2.0, -3.0, -1.0), f64(1.0, -2.0, 0.5, 1.0)
    new = (old + logs(1.5, 9.0, 0.25, 0.01)).requires_grad_()
    weights = [1.5, 5.0, 0.25, 0.01]
    losses = cispo(new, old, advantages)
    rows = zip(weights, advantages.tolist(), new.tolist(), strict=True)
    assert losses.tolist() == pytest.approx([-w * a * logp for w, a, logp in rows], abs=1e-12)
    losses.sum().backward()
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([-1.5, 10.0, -0.125, -0.01], abs=1e-12)


def test_cispo_ranges() -> None:
    old = f64(0.0, 0.0)
    for high, above in ((0.5, 1.5), (None, 1.2)):
        got = cispo(logs(2.0, 0.25), old, f64(1.0, 1.0), clip_range=0.2, clip_range_high=high)
        assert got.tolist() == pytest.approx([-above * math.log(2), -0.8 * math.log(0.25)], abs=1e-12)


def test_reinforce_by_hand() -> None:
    logprobs = f64(-2.0, -0.5).requires_grad_()
    losses = reinforce(logprobs, f64(1.0, -4.0))
    assert losses.tolist() == [2.0, -2.0]
    losses.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist() == [-1.0, 4.0]


@pytest.mark.parametrize(
    ("estimator", "value", "slope"),
    [("k1", math.log(2), 1.0), ("k2", math.log(2) ** 2 / 2, math.log(2)), ("k3", math.log(2) - 0.5, 0.5)],
)
def test_kl_penalties_by_hand(estimator: KlEstimator, value: float, slope: float) -> None:
    """p = 0.5 and q = 0.25: the slopes are 1, log p/q and 1 - q/p."""
    logprobs = logs(0.5).requires_grad_()
    loss = kl_penalty(logprobs, logs(0.25), estimator)
    assert loss.item() == pytest.approx(value, abs=1e-12)
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(slope, abs=1e-12)
    if estimator == "k3":
        assert torch.equal(kl_penalty(logprobs, logs(0.25)), loss)


def test_a_corrected_penalty_by_hand() -> None:
    """p = 0.5, q = 0.25, p_old = 0.4: k3 = ln 2 - 1/2 by the ratio 1.25, whose slope is k3's and the ratio's own."""
    logprobs = logs(0.5).requires_grad_()
    loss = kl_penalty(logprobs, logs(0.25), old_logprobs=logs(0.4))
    assert loss.item() == pytest.approx(1.25 * (math.log(2) - 0.5), abs=1e-12)
    loss.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.item() == pytest.approx(1.25 * 0.5 + 1.25 * (math.log(2) - 0.5), abs=1e-12)
    far = kl_penalty(f64(0.0), f64(-1.0), "k1", old_logprobs=f64(-95.0))
    assert far.item() == pytest.approx(math.exp(20), rel=1e-12)


def test_importance_weights_by_hand() -> None:
    old = f64(-1.0, -2.0, -3.0, -1.0).requires_grad_()
    sampler = f64(-1.0, -2.0, -3.0, -1.0) - logs(1.0, 3.0, 0.25, 2.5)
    weights, cut = importance_weights(old, sampler)
    assert weights.tolist() == pytest.approx([1.0, 2.0, 0.25, 2.0], abs=1e-12)
    assert cut.item() == 0.5
    assert not weights.requires_grad
    weights, cut = importance_weights(old, sampler, cap=2.75)
    assert weights.tolist() == pytest.approx([1.0, 2.75, 0.25, 2.5], abs=1e-12)
    assert cut.item() == 0.25


def test_a_weight_at_its_cap_is_not_cut() -> None:
    assert importance_weights(f64(0.0), f64(0.0), cap=1.0)[1].item() == 0.0


def test_weights_of_no_tokens_are_not_measured() -> None:
    weights, cut = importance_weights(f64(), f64())
    assert weights.numel() == 0 and cut.isnan()


def test_vanished_tokens_stay_finite_in_every_loss() -> None:
    new, old = torch.tensor([0.0, -95.0]), torch.tensor([-95.0, 0.0])
    advantages, leaf = torch.tensor([-1.0, 1.0]), torch.tensor([0, 1])
    big, small = math.exp(20), -math.exp(-20)
    assert gspo(new, old, advantages, leaf, 2).tolist() == pytest.approx([big, small], rel=1e-6)
    assert response_clip(new, old, advantages, leaf, 2).tolist() == pytest.approx([big, small], rel=1e-6)
    assert cispo(new, old, advantages).tolist() == pytest.approx([0.0, 95 * math.exp(-20)], rel=1e-6)
    assert importance_weights(new, old, cap=math.inf)[0].tolist() == pytest.approx([big, -small], rel=1e-6)


def test_losses_of_no_tokens() -> None:
    none, leaf = f64(), torch.tensor([], dtype=torch.int64)
    for losses in (
        gspo(none, none, none, leaf, 0),
        response_clip(none, none, none, leaf, 2),
        cispo(none, none, none),
        reinforce(none, none),
        kl_penalty(none, none),
    ):
        assert losses.numel() == 0


def test_gradients_of_the_critic_free_losses() -> None:
    generator = torch.Generator().manual_seed(0)
    a, b, c = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(3))
    mean = 0.4 * a  # log-ratios of a size that leaves some responses inside the range
    for loss in (gspo, response_clip):
        assert torch.autograd.gradcheck(
            lambda x, loss=loss: loss(x, a, c, LEAF, 3, clip_range=0.3, clip_range_high=0.5),
            (a + mean).requires_grad_(),
        )
    assert torch.autograd.gradcheck(lambda x: reinforce(x, c), a.clone().requires_grad_())
    estimators: tuple[KlEstimator, ...] = ("k1", "k2", "k3")
    for estimator in estimators:
        assert torch.autograd.gradcheck(
            lambda x, estimator=estimator: kl_penalty(x, b, estimator), a.clone().requires_grad_()
        )
