"""Objectives: their sums by hand over a scripted trunk, and the same gradient however a step is cut into batches."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scripted import Scripted, batch_of, figures, gradient

from kilter.errors import CheckError
from kilter.train import objectives, policy, preferences, rewards
from kilter.train.loop import measure
from kilter.train.objectives import Objective
from kilter.train.reference import with_reference
from kilter.tree import make_batches


def test_sft_is_the_sum_over_tokens_with_tokens_as_unit() -> None:
    batch = batch_of([[2], [3]], [[0], [0]])
    out = objectives.sft()(Scripted(policy=[-1.0, -2.0, -0.5, -0.25, -0.25]), batch)
    assert out.terms["nll"][0].item() == 4.0
    assert out.terms["nll"][1] == "tokens"
    assert objectives.sft().finish(figures(out))["perplexity"] == pytest.approx(math.exp(4 / 5))
    assert "surprisal" not in objectives.sft().finish(figures(out))


def test_dynamic_fine_tuning_weights_each_token_by_its_probability() -> None:
    trunk = Scripted(policy=[math.log(0.5), math.log(0.25)])
    out = objectives.sft(loss="dft")(trunk, batch_of([[2]], [[0]]))
    assert out.terms["dft"][0].item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(4))
    out.terms["dft"][0].backward()
    assert trunk.answers["policy"].grad is not None
    assert trunk.answers["policy"].grad.tolist() == pytest.approx([-0.5, -0.25])
    assert objectives.sft(loss="dft").finish(figures(out))["perplexity"] == pytest.approx(math.sqrt(8))


def test_what_a_user_gets_wrong_is_named() -> None:
    with pytest.raises(CheckError, match="policy loss 'ppo_clip' needs 'old_logprobs'"):
        policy.ppo()(Scripted(policy=[-1.0], value=[0.0]), batch_of([[1]], [[0]]))


def test_defaults_and_who_trains() -> None:
    by_hand = policy.PolicyGradient(clip_range=0.2, clip_range_value=0.2, vf_coef=0.5, policy="policy", value="value")
    assert policy.ppo() == by_hand == policy.policy_gradient(clip_range=0.2, value="value")
    assert policy.ppo().roles == ("policy", "value")
    assert policy.ppo(value=None).roles == objectives.sft().roles == ("policy",)


def test_ppo_by_hand() -> None:
    old = [-1.0, -2.0, -1.0]
    new = [-1.0 + math.log(0.7), -2.0 + math.log(0.5), -1.0 + 30]
    batch = batch_of(
        [[2], [1]],
        [[0], [0]],
        old_logprobs=old,
        advantages=[-2.0, -1.0, -0.5],
        old_values=[1.0, 1.0, 0.5],
        returns=[1.5, 0.0, 3.0],
    )
    out = policy.ppo(vf_coef=0.1)(Scripted(policy=new, value=[0.5, 0.9, 0.5]), batch)
    assert out.terms["policy"][0].item() == pytest.approx(2 * 0.8 + 0.8 + 0.5 * math.exp(20), rel=1e-9)
    # value 0.5 moved too far from 1, and away from the return: it counts as it is; the other two moved less
    assert out.terms["value"][0].item() == pytest.approx(0.1 * 0.5 * (1.0**2 + 0.9**2 + 2.5**2), abs=1e-9)
    assert {unit for _, unit in out.terms.values()} == {"tokens"}
    got = figures(out)
    assert got["policy/clip_fraction"] == pytest.approx(2 / 3)
    assert got["policy/clamp_fraction"] == pytest.approx(1 / 3)
    assert got["policy/extreme_fraction"] == pytest.approx(1 / 3)  # the halved one moved by less than a factor of e
    assert got["policy/surprisal"] == pytest.approx(-sum(new) / 3)
    assert got["advantages/mean"] == pytest.approx(-3.5 / 3)
    assert got["values/mean"] == pytest.approx(1.9 / 3)
    assert got["returns/mean"] == pytest.approx(1.5)
    assert got["policy/ratio"] == pytest.approx((0.7 + 0.5 + math.exp(20)) / 3)
    k3 = [0.7 - 1 - math.log(0.7), 0.5 - 1 - math.log(0.5), math.exp(20) - 1 - 20]
    assert got["policy/approx_kl"] == pytest.approx(sum(k3) / 3)
    assert got["values/clip_fraction"] == pytest.approx(1 / 3)
    done = policy.ppo().finish(got)
    error = torch.tensor([1.0, -0.9, 2.5])
    explained = 1 - error.var(correction=0) / torch.tensor([1.5, 0.0, 3.0]).var(correction=0)
    assert done["values/explained_variance"] == pytest.approx(explained.item(), abs=1e-6)
    assert not {"values/error", "values/error_square", "returns/square"} & done.keys()


def test_ppo_at_the_first_pass() -> None:
    batch = batch_of([[2]], [[0]], old_logprobs=[-1.0, -2.0], advantages=[1.0, -3.0])
    out = policy.ppo(value=None)(Scripted(policy=[-1.0, -2.0]), batch)
    assert list(out.terms) == ["policy"]
    assert out.terms["policy"][0].item() == 2.0
    assert figures(out)["policy/ratio"] == 1.0
    assert figures(out)["policy/approx_kl"] == 0.0
    assert figures(out)["policy/clip_fraction"] == 0.0


def test_the_value_clip_can_be_switched_off() -> None:
    columns = {"old_logprobs": [0.0], "advantages": [0.0], "old_values": [0.0], "returns": [9.0]}
    batch = batch_of([[1]], [[0]], **columns)
    out = policy.ppo(clip_range_value=0, vf_coef=1.0)(Scripted(policy=[0.0], value=[8.0]), batch)
    assert out.terms["value"][0].item() == 0.5
    assert figures(out)["values/clip_fraction"] == 0.0


def test_constant_returns_have_no_explained_variance() -> None:
    figure = policy.ppo().finish(
        {"values/error": 0.5, "values/error_square": 0.25, "returns/mean": 2.0, "returns/square": 4.0}
    )
    assert "values/explained_variance" not in figure


# Batching is not a hyper-parameter --------------------------------------------------------------------------------


def objective_named(name: str) -> Objective:
    return {
        "sft": objectives.sft(),
        "dpo": preferences.preference("dpo", {"beta": 0.3}),
        "reward": rewards.reward_model(centring_coef=0.05),
        "ppo": policy.ppo(),
    }[name]


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "ppo"])
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(name: str, make: Any) -> None:
    trunk = make.trunk().double()
    groups = make.groups(16, k=3, extras=make.ppo_extras)
    groups = with_reference(trunk, groups)
    objective = objective_named(name)
    expected = gradient(trunk, objective, make_batches(groups, row_tokens=10_000, batch_tokens=10_000))
    assert expected.norm() > 0.01
    for rows, tokens in ((32, 32), (64, 128), (1, 1)):
        batches = make_batches(groups[::-1], row_tokens=rows, batch_tokens=tokens)
        assert len(batches) > 2
        got = gradient(trunk, objective, batches)
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "ppo"])
def test_an_empty_batch_adds_nothing_and_has_every_figure(name: str, make: Any) -> None:
    trunk = make.trunk()
    groups = with_reference(trunk, make.groups(4, extras=make.ppo_extras))
    objective = objective_named(name)
    (full,) = make_batches(groups, row_tokens=10_000, batch_tokens=10_000)
    empty = make_batches([], row_tokens=10_000, batch_tokens=10_000)
    expected = gradient(trunk, objective, [full])
    assert torch.equal(gradient(trunk, objective, [full, *empty]), expected)
    first, second = objective(trunk, full), objective(trunk, empty[0])
    assert first.metrics.keys() == second.metrics.keys()
    assert first.terms.keys() == second.terms.keys()
    assert measure(trunk, objective, [full, *empty]) == pytest.approx(measure(trunk, objective, [full]), nan_ok=True)


def test_measured_figures_are_those_of_one_batch(make: Any) -> None:
    trunk = make.trunk()
    groups = with_reference(trunk, make.groups(8))
    whole = measure(trunk, preferences.preference(), make_batches(groups, row_tokens=10_000, batch_tokens=10_000))
    parts = measure(trunk, preferences.preference(), make_batches(groups, row_tokens=20, batch_tokens=20))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["loss"] == whole["loss/dpo"]
    assert trunk.training
