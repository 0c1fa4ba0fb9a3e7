"""The objective of critic-free policy gradients: its sums by hand, its units, and what it refuses."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from scripted import Scripted, batch_of, figures, gradient
from torch import Tensor

from kilter.errors import CheckError, ConfigError
from kilter.train.loop import TrainState, measure, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.policy import PolicyGradient, aggregated, policy_gradient
from kilter.train.reference import with_reference
from kilter.tree import empty_batch, make_batches

# Responses of 2, 1 and 3 tokens; the first two answer one prompt.
LENGTHS, RANKS = [[2, 1], [3]], [[0, 0], [0]]
OLD = [-1.0, -2.0, -0.5, -1.5, -2.5, -3.0]
RATIOS = [1.1, 1.6, 0.9, 0.8, 0.5, 0.9]
NEW = [old + math.log(ratio) for old, ratio in zip(OLD, RATIOS, strict=True)]
ADVANTAGES = [2.0, 2.0, -1.0, -3.0, -3.0, -3.0]
REFERENCE = [-1.2, -2.5, -0.4, -1.0, -2.0, -3.5]
CLIPPED = [-2 * 1.1, -2 * 1.2, 0.9, 3 * 0.8, 3 * 0.8, 3 * 0.9]
SUMS = {"token": (sum(CLIPPED), "tokens"), "sequence": (-2.3 + 0.9 + 2.5, "responses"), "constant": (0.38, "responses")}


def rollouts(**more: list[float]) -> Any:
    return batch_of(LENGTHS, RANKS, old_logprobs=OLD, advantages=ADVANTAGES, **more)


def test_aggregates_by_their_example() -> None:
    losses, leaf = torch.tensor([1.0, 1.0, 4.0]), torch.tensor([0, 0, 1])
    assert aggregated(losses, leaf, 2, how="token") == (6.0, "tokens")
    assert aggregated(losses, leaf, 2, how="sequence") == (5.0, "responses")
    total, unit = aggregated(losses, leaf, 2, how="constant", constant_length=10)
    assert (total.item(), unit) == (pytest.approx(0.6), "responses")
    assert aggregated(losses, leaf, 5, how="sequence")[0] == 5.0


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_the_clipped_loss_by_hand(how: Any) -> None:
    objective = policy_gradient(aggregate=how, constant_length=10)
    out = objective(Scripted(policy=NEW), rollouts())
    assert out.terms.keys() == {"policy"}
    assert out.terms["policy"][0].item() == pytest.approx(SUMS[how][0], abs=1e-9)
    assert out.terms["policy"][1] == SUMS[how][1]
    got = figures(out)
    assert got["policy/clip_fraction"] == pytest.approx(2 / 6)  # 1.6 paid for rising, 0.5 paid for falling
    assert got["policy/ratio"] == pytest.approx(sum(RATIOS) / 6)
    assert got["policy/surprisal"] == pytest.approx(-sum(NEW) / 6)
    assert got["advantages/mean"] == -1.0
    assert not {"policy/ref_kl", "policy/importance"} & got.keys()


def test_clip_higher() -> None:
    out = policy_gradient(clip_range=0.2, clip_range_high=0.7)(Scripted(policy=NEW), rollouts())
    assert out.terms["policy"][0].item() == pytest.approx(sum(CLIPPED) - 2 * 0.4, abs=1e-9)
    assert figures(out)["policy/clip_fraction"] == pytest.approx(1 / 6)


def test_losses_of_responses_by_hand() -> None:
    second, third = 0.9, 0.36 ** (1 / 3)  # and the first, 1.33, is cut
    trunk = Scripted(policy=NEW)
    out = policy_gradient(loss="gspo", aggregate="sequence", clip_range=0.3)(trunk, rollouts())
    assert out.terms["policy"][0].item() == pytest.approx(-2 * 1.3 + second + 3 * third, abs=1e-9)
    assert figures(out)["policy/clip_fraction"] == pytest.approx(2 / 6)
    out.terms["policy"][0].backward()
    expected = [0.0, 0.0, second, third, third, third]  # s A / |y| at each token, where the clip leaves it
    assert trunk.answers["policy"].grad is not None
    assert trunk.answers["policy"].grad.tolist() == pytest.approx(expected, abs=1e-9)
    own = policy_gradient(loss="gspo", aggregate="sequence")(trunk, rollouts())  # the paper's ranges
    assert own.terms["policy"][0].item() == pytest.approx(-2 * 1.0004 + 0.9997 + 3 * 0.9997, abs=1e-9)
    assert figures(own)["policy/clip_fraction"] == 1.0
    whole = policy_gradient(loss="response_clip", aggregate="sequence")(trunk, rollouts())
    assert whole.terms["policy"][0].item() == pytest.approx(-2 * 1.2 + 0.9 + 3 * 0.8, abs=1e-9)


def test_weighted_log_probs_by_hand() -> None:
    out = policy_gradient(loss="reinforce", aggregate="constant", constant_length=1)(Scripted(policy=NEW), rollouts())
    plain = [-a * logp for a, logp in zip(ADVANTAGES, NEW, strict=True)]
    assert out.terms["policy"][0].item() == pytest.approx(sum(plain), abs=1e-9)
    assert "policy/clip_fraction" not in figures(out), "nothing clips"
    out = policy_gradient(loss="cispo", clip_range=1.0, clip_range_high=0.5)(Scripted(policy=NEW), rollouts())
    weights = [1.1, 1.5, 0.9, 0.8, 0.5, 0.9]
    expected = sum(weight * loss for weight, loss in zip(weights, plain, strict=True))
    assert out.terms["policy"][0].item() == pytest.approx(expected, abs=1e-9)
    assert figures(out)["policy/clip_fraction"] == pytest.approx(1 / 6)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_the_price_of_the_kl(estimator: Any) -> None:
    gaps = [new - ref for new, ref in zip(NEW, REFERENCE, strict=True)]
    values = {"k1": gaps, "k2": [g * g / 2 for g in gaps], "k3": [math.exp(-g) - 1 + g for g in gaps]}[estimator]
    batch = rollouts(ref_logprobs=REFERENCE)
    objective = policy_gradient(aggregate="sequence", kl_coef=0.04, kl_estimator=estimator)
    assert objective.needs_reference and not policy_gradient().needs_reference
    out = objective(Scripted(policy=NEW), batch)
    means = sum(values[:2]) / 2 + values[2] + sum(values[3:]) / 3
    assert out.terms["kl"][0].item() == pytest.approx(0.04 * means, abs=1e-9)
    assert out.terms["kl"][1] == "responses"
    assert figures(out)["policy/ref_kl"] == pytest.approx(sum(values) / 6)
    corrected = policy_gradient(kl_coef=0.5, kl_estimator=estimator, kl_corrected=True)(Scripted(policy=NEW), batch)
    expected = sum(ratio * value for ratio, value in zip(RATIOS, values, strict=True))
    assert corrected.terms["kl"][0].item() == pytest.approx(0.5 * expected, abs=1e-9)
    with pytest.raises(CheckError, match="no ref_logprobs"):
        objective(Scripted(policy=NEW), rollouts())


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
def test_the_exact_kl_as_a_loss(how: Any) -> None:
    """Column 1 of what the trunk answers, aggregated as the policy loss is; no reference is in the batch."""
    kl = [0.1, 0.4, 0.0, 0.2, 0.3, 0.7]
    trunk = Scripted(policy=[list(row) for row in zip(NEW, kl, REFERENCE, strict=True)])
    objective = policy_gradient(aggregate=how, constant_length=10, kl_coef=0.5, kl_estimator="exact")
    assert not objective.needs_reference
    out = objective(trunk, rollouts())
    total = {"token": sum(kl), "sequence": 0.25 + 0.0 + 0.4, "constant": sum(kl) / 10}[how]
    assert out.terms["kl"][0].item() == pytest.approx(0.5 * total, abs=1e-9)
    assert out.terms["kl"][1] == SUMS[how][1]
    assert out.terms["policy"][0].item() == pytest.approx(SUMS[how][0], abs=1e-9)
    assert figures(out)["policy/ref_kl"] == pytest.approx(sum(kl) / 6)
    out.terms["kl"][0].backward()
    slopes = trunk.answers["policy"].grad
    assert slopes is not None and not slopes[:, ::2].any() and float(slopes[:, 1].min()) > 0


@pytest.mark.parametrize("how", ["token", "sequence", "constant"])
@pytest.mark.parametrize("exact", [False, True])
def test_the_bonus_for_entropy(how: Any, exact: bool) -> None:
    """The last column of what the trunk answers, aggregated as the policy loss is, taken from the loss."""
    entropy, kl = [0.5, 1.0, 2.0, 0.0, 0.3, 0.9], [0.1, 0.4, 0.0, 0.2, 0.3, 0.7]
    columns = (NEW, kl, REFERENCE, entropy) if exact else (NEW, entropy)
    trunk = Scripted(policy=[list(row) for row in zip(*columns, strict=True)])
    price: dict[str, Any] = {"kl_coef": 0.5, "kl_estimator": "exact"} if exact else {}
    objective = policy_gradient(aggregate=how, constant_length=10, entropy_coef=0.01, **price)
    out = objective(trunk, rollouts())
    total = {"token": sum(entropy), "sequence": 0.75 + 2.0 + 0.4, "constant": sum(entropy) / 10}[how]
    assert out.terms["entropy"][0].item() == pytest.approx(-0.01 * total, abs=1e-9)
    assert out.terms["entropy"][1] == SUMS[how][1]
    assert out.terms["policy"][0].item() == pytest.approx(SUMS[how][0], abs=1e-9)
    assert figures(out)["policy/entropy"] == pytest.approx(sum(entropy) / 6)
    assert ("kl" in out.terms) == exact
    assert "entropy" not in policy_gradient()(Scripted(policy=NEW), rollouts()).terms


def test_samples_of_another_engine_are_weighted_and_the_kl_is_not() -> None:
    weights = [1.0, 0.5, 2.0, 1.5, 0.25, 1.0]
    batch = rollouts(importance=weights, ref_logprobs=REFERENCE)
    weighted = policy_gradient(weighted=True, kl_coef=0.1)(Scripted(policy=NEW), batch)
    expected = sum(weight * loss for weight, loss in zip(weights, CLIPPED, strict=True))
    assert weighted.terms["policy"][0].item() == pytest.approx(expected, abs=1e-9)
    assert figures(weighted)["policy/importance"] == pytest.approx(6.25 / 6)
    plain = policy_gradient(kl_coef=0.1)(Scripted(policy=NEW), batch)
    assert plain.terms["policy"][0].item() == pytest.approx(sum(CLIPPED), abs=1e-9)
    assert weighted.terms["kl"][0] == plain.terms["kl"][0]
    with pytest.raises(CheckError, match="'importance'"):
        policy_gradient(weighted=True)(Scripted(policy=NEW), rollouts())


def test_a_critic_beside_a_loss_of_responses() -> None:
    batch = rollouts(old_values=[0.0] * 6, returns=[1.0] * 6)
    objective = policy_gradient(loss="gspo", aggregate="sequence", value="value", vf_coef=0.25)
    assert objective.roles == ("policy", "value")
    out = objective(Scripted(policy=NEW, value=[0.0] * 6), batch)
    assert (out.terms["value"][0].item(), out.terms["value"][1]) == (0.25 * 0.5 * 6, "tokens")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"aggregate": "constant"}, "constant_length is 0"),
        ({"clip_range_high": 0.3}, "clip_range is not set"),
        ({"loss": "reinforce", "clip_range": 0.2}, "clips nothing"),
        ({"value_alone": True}, "there is no critic"),
        ({"kl_estimator": "exact", "kl_corrected": True}, "'exact' takes none"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_gradient(**options)


# On a model ----------------------------------------------------------------------------------------------------------

CASES = {
    "grpo": policy_gradient(aggregate="sequence", kl_coef=0.04, kl_corrected=True),
    "dr_grpo": policy_gradient(aggregate="constant", constant_length=6),
    "dapo": policy_gradient(clip_range=0.2, clip_range_high=0.28),
    "gspo": policy_gradient(loss="gspo", aggregate="sequence", clip_range=0.2),
    "rloo": policy_gradient(loss="response_clip", aggregate="sequence"),
    "reinforce": policy_gradient(loss="reinforce", aggregate="constant", constant_length=1),
    "cispo": policy_gradient(loss="cispo", weighted=True),
    "critic": policy_gradient(value="value", kl_coef=0.1, kl_estimator="k2"),
    "exact kl": policy_gradient(kl_coef=0.1, kl_estimator="exact"),
    "entropy": policy_gradient(aggregate="sequence", entropy_coef=0.1),
}


def extras(make: Any) -> Any:
    """What PPO reads and weights; the old log-probs stay as wild as the random policies are."""

    def drawn(length: int, generator: torch.Generator) -> dict[str, Tensor]:
        return make.ppo_extras(length, generator) | {"importance": torch.rand(length, generator=generator)}

    return drawn


@pytest.mark.parametrize("name", CASES)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(name: str, make: Any) -> None:
    trunk = make.trunk().double()
    groups = with_reference(trunk, make.groups(16, k=3, extras=extras(make)))
    expected = gradient(trunk, CASES[name], make_batches(groups, row_tokens=10_000, batch_tokens=10_000))
    assert expected.norm() > 1e-3
    for rows, tokens in ((32, 32), (64, 128), (1, 1)):
        batches = make_batches(groups[::-1], row_tokens=rows, batch_tokens=tokens)
        assert len(batches) > 2
        got = gradient(trunk, CASES[name], batches)
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", CASES)
def test_an_empty_batch_adds_nothing_and_has_every_figure(name: str, make: Any) -> None:
    trunk, objective = make.trunk(), CASES[name]
    (full,) = make_batches(
        with_reference(trunk, make.groups(4, extras=extras(make))), row_tokens=10_000, batch_tokens=10_000
    )
    expected, figures_of_one = gradient(trunk, objective, [full]), measure(trunk, objective, [full])
    for empty in (empty_batch(like=full), *make_batches([], row_tokens=10_000, batch_tokens=10_000)):
        assert torch.equal(gradient(trunk, objective, [full, empty]), expected)
        first, second = objective(trunk, full), objective(trunk, empty)
        assert first.metrics.keys() == second.metrics.keys()
        assert first.terms.keys() == second.terms.keys()
        assert measure(trunk, objective, [full, empty]) == pytest.approx(figures_of_one, nan_ok=True)


@pytest.mark.parametrize("name", ["grpo", "rloo", "cispo"])
def test_the_loop_takes_a_step(name: str, make: Any) -> None:
    """One response to a prompt, of one token, is enough; what was paid for gets likelier."""
    trunk = make.trunk()
    groups = with_reference(trunk, make.groups(1, k=1))
    (batch,) = make_batches(groups, row_tokens=64, batch_tokens=64)
    with torch.no_grad():
        before = trunk(batch.tree, {"policy": "logprobs"})["policy"]
    batch.extras.update(old_logprobs=before, advantages=torch.ones_like(before), importance=torch.ones_like(before))
    objective: PolicyGradient = CASES[name]
    state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=1e-3))
    figures = train_step(state, objective, [batch])
    assert figures["policy/ratio"] == 1.0
    assert figures["policy/clip_fraction"] == 0.0
    with torch.no_grad():
        assert trunk(batch.tree, {"policy": "logprobs"})["policy"].sum() > before.sum()
