"""Reward models: one head or several, by hand over a scripted trunk, and the same gradient however a step is cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripted import Scripted, batch_of, figures, gradient, log_sigmoid
from torch import Tensor

from kilter.errors import CheckError, ConfigError
from kilter.models.build import reward_trunk
from kilter.train import rewards
from kilter.train.loop import measure
from kilter.train.objectives import prepared
from kilter.train.rewards import RewardModel, reward_model
from kilter.tree import Batch, Group, make_batches

# A ranking of three (its responses 0 and 2 tied behind 1), and a pair whose second response is better.
LENGTHS, RANKS = [[1, 2, 1], [1, 1]], [[1, 0, 1], [0, 1]]
SAID = [0.5, -0.25, 1.0, 2.0, 1.5]
KINDS: Mapping[str, RewardModel] = {
    "one": reward_model(centring_coef=0.05),
    "davidson": reward_model("davidson", centring_coef=0.0),
    "plackett_luce": reward_model("plackett_luce"),
    "regression": reward_model("regression", {"level": "prompt"}),
    "thumbs": reward_model("thumbs", centring_coef=0.0),
    "ensemble": reward_model(heads=("reward_0", "reward_1")),
    "bootstrap": reward_model(heads=("reward_0", "reward_1"), teaching="drawn"),
    "groups": reward_model(heads=("reward_0", "reward_1"), teaching="own"),
    "length": reward_model(length_coef=0.7),
    "length, whole rankings": reward_model("plackett_luce", length_coef=0.7),
}


def with_extras(batch: Batch, **columns: Sequence[float]) -> Batch:
    extras = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    return replace(batch, extras=batch.extras | extras)


def test_one_head_by_hand() -> None:
    out = reward_model(centring_coef=0.1)(Scripted(reward=SAID), batch_of(LENGTHS, RANKS))
    pairs = -log_sigmoid(-0.75) - log_sigmoid(-1.25) - log_sigmoid(0.5)
    tie = -0.5 * log_sigmoid(0.5) - 0.5 * log_sigmoid(-0.5)
    assert out.terms["bradley_terry"][0].item() == pytest.approx(pairs + tie, abs=1e-6)
    assert out.terms["centring"][0].item() == pytest.approx(0.1 * (0.25**2 + 1.5**2 + 0.75**2 + 3.5**2), abs=1e-6)
    assert {unit for _, unit in out.terms.values()} == {"pairs"}
    mean = sum(SAID) / 5
    along = [(-1 / 3) * (0.5 - 5 / 12), (2 / 3) * (-0.25 - 5 / 12), (-1 / 3) * (1.0 - 5 / 12)]
    spread = 6 / 9 * sum((value - middle) ** 2 for value, middle in zip(SAID, [5 / 12] * 3 + [1.75] * 2, strict=True))
    assert reward_model().finish(figures(out)) == pytest.approx(
        {
            "rewards/chosen": (-0.25 - 0.25 + 2) / 3,
            "rewards/rejected": (0.5 + 1 + 1.5) / 3,
            "rewards/margin": (-0.75 - 1.25 + 0.5) / 3,
            "rewards/accuracy": 1 / 3,
            "rewards/mean": mean,
            "rewards/std": math.sqrt(sum((r - mean) ** 2 for r in SAID) / 5),
            "rewards/length_correlation": sum(along) / math.sqrt(spread),
        },
        abs=1e-6,
    )


def test_margins_and_weights() -> None:
    batch = batch_of([[1, 1], [1, 1]], [[3, 1], [0, 1]])  # margins 6 and 2, 0 and 2 on the responses
    objective = reward_model(options={"margin_coef": 0.25}, centring_coef=0)
    trunk = Scripted(reward=[1.0, 0.5, 0.5, 1.5])
    out = objective(trunk, batch)
    assert list(out.terms) == ["bradley_terry"]
    first, second = -log_sigmoid(-0.5 - 0.25 * 4), -log_sigmoid(-1.0 - 0.25 * 2)
    assert out.terms["bradley_terry"][0].item() == pytest.approx(first + second, abs=1e-6)
    weighted = replace(objective, centring_coef=1.0)(trunk, with_extras(batch, weight=[0.5, 0.5, 3.0, 3.0]))
    assert weighted.terms["bradley_terry"][0].item() == pytest.approx(0.5 * first + 3 * second, abs=1e-6)
    assert weighted.terms["centring"][0].item() == pytest.approx(0.5 * 1.5**2 + 3 * 2**2, abs=1e-6)


def test_thumbs_by_hand_and_their_accuracy_within_a_prompt() -> None:
    """Up, down, up; then two thumbs down, of which nobody says which is better."""
    batch = with_extras(batch_of([[1, 2, 1], [1, 1]], [[0, 1, 0], [1, 1]]), desirable=[1, 0, 1, 0, 0])
    out = reward_model("thumbs", centring_coef=0)(Scripted(reward=SAID), batch)
    terms = [log_sigmoid(0.5), log_sigmoid(0.25), log_sigmoid(1.0), log_sigmoid(-2.0), log_sigmoid(-1.5)]
    assert out.terms["thumbs"][0].item() == pytest.approx(-sum(terms), abs=1e-6)
    assert out.terms["thumbs"][1] == "responses"
    assert figures(out)["rewards/accuracy"] == 1.0 and out.metrics["rewards/accuracy"][1] == 2
    with pytest.raises(CheckError, match="the loss 'thumbs' needs 'desirable'"):
        reward_model("thumbs")(Scripted(reward=SAID), batch_of(LENGTHS, RANKS))


def test_each_group_teaches_its_own_head_and_is_measured_by_it() -> None:
    batch = with_extras(batch_of([[1, 1], [1, 1]], [[0, 1], [0, 1]]), head=[1.0, 1.0, 0.0, 0.0])
    trunk = Scripted(reward_0=[9.0, 0.0, 1.0, 2.0], reward_1=[3.0, 1.0, 0.0, 9.0])
    out = reward_model(centring_coef=0, heads=("reward_0", "reward_1"), teaching="own")(trunk, batch)
    value, unit = out.terms["bradley_terry"]
    assert (value.item(), unit) == (pytest.approx(-log_sigmoid(2.0) - log_sigmoid(-1.0), abs=1e-6), "pairs")
    value.backward()
    first, second = (trunk.answers[name].grad for name in ("reward_0", "reward_1"))
    assert first is not None and second is not None
    assert first[:2].tolist() == [0, 0] and second[2:].tolist() == [0, 0]
    assert first[3] > 0 > first[2] and second[0] < 0 < second[1]
    found = figures(out)
    assert (found["reward_0/accuracy"], found["reward_1/accuracy"], found["rewards/accuracy"]) == (0.0, 1.0, 0.5)
    with pytest.raises(CheckError, match="a head for each group needs 'head'"):
        reward_model(heads=("reward_0", "reward_1"), teaching="own")(trunk, batch_of([[1, 1]], [[0, 1]]))


def test_members_of_an_ensemble_weigh_the_prompts_each_in_its_own_way() -> None:
    batch = batch_of([[1, 1], [1, 1]], [[0, 1], [0, 1]])
    batch = with_extras(batch, weight=[1, 1, 3, 3], draw_0=[2.0, 2.0, 0.5, 0.5], draw_1=[0.0, 0.0, 1.0, 1.0])
    trunk = Scripted(reward_0=[1.0, 0.0, 0.0, 2.0], reward_1=[1.0, 5.0, 3.0, 0.0])
    heads = ("reward_0", "reward_1")
    out = reward_model(centring_coef=0, heads=heads, teaching="drawn")(trunk, batch)
    drawn = -2 * log_sigmoid(1.0) - 1.5 * log_sigmoid(-2.0) - 3 * log_sigmoid(3.0)
    assert out.terms["bradley_terry"][0].item() == pytest.approx(drawn / 2, abs=1e-6)
    found = figures(out)
    assert found["rewards/accuracy"] == 0.5  # means 1, 2.5 and 1.5, 1
    assert found["rewards/spread"] == pytest.approx((0 + 5 + 3 + 2) / math.sqrt(2) / 4, abs=1e-6)
    alike = reward_model(centring_coef=0, heads=heads)(trunk, batch).terms["bradley_terry"][0]
    plain = [1 * log_sigmoid(1.0), 3 * log_sigmoid(-2.0), log_sigmoid(-4.0), 3 * log_sigmoid(3.0)]
    assert alike.item() == pytest.approx(-sum(plain) / 2, abs=1e-6)


def rho(values: Tensor, lengths: Tensor, sizes: Sequence[int]) -> Tensor:
    """Pearson's correlation after the means of each prompt are taken away."""

    def within(column: Tensor) -> Tensor:
        return torch.cat([part - part.mean() for part in torch.split(column, list(sizes))])

    a, b = within(values), within(lengths)
    return (a * b).sum() / (a.norm() * b.norm())


@pytest.mark.parametrize("turned", [1.0, -1.0])
def test_length_is_pulled_out_of_the_reward_by_the_gradient_of_the_correlations(turned: float) -> None:
    """Value and gradient are those of |rho(r, l)| - rho(s, l) over the whole step, made by autograd."""
    lengths, sizes = [[1, 4, 2], [5, 1], [2, 2, 6]], [3, 2, 3]
    said = [turned * value for value in (0.5, 1.25, 1.0, 2.0, 1.5, 0.3, -0.2, 0.4)]
    other = [0.1, 0.9, -0.3, 0.2, 0.4, 0.8, 0.0, -0.5]
    trunk, batch = Scripted(reward=said, length=other), batch_of(lengths, [[0, 1, 2], [1, 0], [0, 0, 1]])
    objective = reward_model(centring_coef=0, length_coef=0.5)
    assert objective.roles == ("reward", "length")
    (batch,) = prepared(objective, trunk, [batch])
    value, unit = objective(trunk, batch).terms["length"]
    assert unit == "responses"
    leaves = [torch.tensor(values, dtype=torch.float64, requires_grad=True) for values in (said, other)]
    flat = torch.tensor([float(n) for row in lengths for n in row], dtype=torch.float64)
    first, second = (rho(leaf, flat, sizes) for leaf in leaves)
    assert first.item() * turned > 0.1
    expected = 0.5 * (first.abs() - second)
    assert value.item() / 8 == pytest.approx(expected.item(), abs=1e-6)
    (value / 8).backward()
    expected.backward()
    for role, leaf in zip(("reward", "length"), leaves, strict=True):
        got = trunk.answers[role].grad
        assert got is not None and leaf.grad is not None
        assert torch.allclose(got, leaf.grad, atol=1e-6) and leaf.grad.abs().max() > 0.01
    pairs = objective(trunk, batch).terms["bradley_terry"][0]
    together = [a + b for a, b in zip(said, other, strict=True)]
    alone = reward_model(centring_coef=0)(Scripted(reward=together), batch).terms["bradley_terry"][0]
    assert pairs.item() == pytest.approx(alone.item(), abs=1e-12)


def test_defaults_and_who_trains() -> None:
    plain = RewardModel("bradley_terry", {}, 0.01, ("reward",), "all", 0.0)
    assert reward_model() == plain == RewardModel()
    assert plain.roles == ("reward",) and reward_model(length_coef=1.0).roles == ("reward", "length")


def test_what_a_user_gets_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"loss.name is 'dpo'; choose one of bradley_terry"):
        reward_model("dpo")
    with pytest.raises(ConfigError, match="'davidson' has no such option; it takes nu"):
        reward_model("davidson", {"mu": 1.0})
    with pytest.raises(CheckError, match="the loss 'regression' needs 'value'"):
        reward_model("regression")(Scripted(reward=SAID), batch_of(LENGTHS, RANKS))


# Batching is not a hyper-parameter -----------------------------------------------------------------------------------


def marked(groups: Sequence[Group]) -> list[Group]:
    """Groups with everything that any kind of reward model reads; no two prompts weigh the same."""
    made = []
    for place, group in enumerate(groups):
        prompt = {"weight": 0.5 + place % 3, "head": float(place % 2), "draw_0": 0.2 * place, "draw_1": 1.0}
        responses = [
            replace(
                one,
                per_response={
                    **one.per_response,
                    **prompt,
                    "value": 0.3 * at - place,
                    "error": 0.5 * at,
                    "desirable": at % 2,
                },
            )
            for at, one in enumerate(group.responses)
        ]
        made.append(replace(group, responses=tuple(responses)))
    return made


def trunk_for(objective: RewardModel, make: Any) -> Any:
    generator = torch.Generator().manual_seed(1)
    return reward_trunk(make.llama(), generator=generator, head_std=0.3, heads=objective.roles).double()


@pytest.mark.parametrize("kind", KINDS)
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(kind: str, make: Any) -> None:
    objective = KINDS[kind]
    trunk, groups = trunk_for(objective, make), marked(make.groups(16, k=3))
    expected = gradient(trunk, objective, make_batches(groups, row_tokens=10_000, batch_tokens=10_000))
    assert expected.norm() > 0.01
    for rows, tokens in ((32, 32), (64, 128), (1, 1)):
        batches = make_batches(groups[::-1], row_tokens=rows, batch_tokens=tokens)
        assert len(batches) > 2
        got = gradient(trunk, objective, batches)
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("kind", KINDS)
def test_an_empty_batch_adds_nothing_and_has_every_figure(kind: str, make: Any) -> None:
    objective = KINDS[kind]
    trunk = trunk_for(objective, make)
    (full,) = make_batches(marked(make.groups(4)), row_tokens=10_000, batch_tokens=10_000)
    empty = make_batches([], row_tokens=10_000, batch_tokens=10_000)
    assert torch.equal(gradient(trunk, objective, [full, *empty]), gradient(trunk, objective, [full]))
    first, second = (objective(trunk, batch) for batch in prepared(objective, trunk, [full, *empty]))
    assert first.metrics.keys() == second.metrics.keys()
    assert first.terms.keys() == second.terms.keys()
    assert measure(trunk, objective, [full, *empty]) == pytest.approx(measure(trunk, objective, [full]))


def test_lengths_are_scored_tokens() -> None:
    assert rewards._lengths(batch_of(LENGTHS, RANKS)).tolist() == [1, 2, 1, 1, 1]
