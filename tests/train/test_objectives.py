"""Objectives: their sums by hand over a scripted trunk, and the same gradient however a step is cut into batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilter.errors import CheckError, ConfigError
from kilter.losses import PAIR_LOSSES, UNPAIRED_LOSSES, pair_loss, unpaired_loss
from kilter.train import objectives
from kilter.train.loop import measure
from kilter.train.objectives import LossOutput, Objective
from kilter.train.sources import with_mismatched, with_reference
from kilter.tree import Batch, Group, Response, TokenTree, make_batch, make_batches


class Scripted(nn.Module):
    """A trunk that answers with given numbers, which are its parameters."""

    def __init__(self, **answers: Sequence[float]) -> None:
        super().__init__()
        self.answers = nn.ParameterDict({k: torch.tensor(v, dtype=torch.float64) for k, v in answers.items()})

    def forward(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
        return {role: self.answers[role] for role in ask}


def batch_of(lengths: Sequence[Sequence[int]], ranks: Sequence[Sequence[float]], **columns: Sequence[float]) -> Batch:
    """One batch: the lengths and ranks of each group's responses; `columns` are float[N] extras."""
    groups = [
        Group(
            (1,),
            tuple(Response((5,) * n, per_response={"rank": r, "margin": 2 * r}) for n, r in zip(ls, rs, strict=True)),
        )
        for ls, rs in zip(lengths, ranks, strict=True)
    ]
    batch = make_batch([[group] for group in groups])
    extras = {name: torch.tensor(values, dtype=torch.float64) for name, values in columns.items()}
    reference = extras.pop("ref_logprobs", None)
    return Batch(batch.tree, batch.units, reference, batch.extras | extras)


def figures(out: LossOutput) -> dict[str, float]:
    assert not any(value.requires_grad for value, _ in out.metrics.values())
    return {name: float(value) / float(weight) for name, (value, weight) in out.metrics.items()}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def test_sft_is_the_sum_over_tokens_with_tokens_as_unit() -> None:
    batch = batch_of([[2], [3]], [[0], [0]])
    out = objectives.sft()(Scripted(policy=[-1.0, -2.0, -0.5, -0.25, -0.25]), batch)
    assert out.terms["nll"][0].item() == 4.0
    assert out.terms["nll"][1] == "tokens"
    assert objectives.sft().finish({"loss/nll": 2.0})["perplexity"] == pytest.approx(math.exp(2))


PAIR_LOGPROBS = [-1.0, -2.0, -0.5, -4.0, -1.0, -1.0, -3.0]  # responses of 2, 1, 1 and 3 tokens: -3, -0.5, -4, -5
PAIR_REFERENCE = [-1.5, -2.5, -1.0, -3.0, -1.0, -1.0, -1.0]  # -4, -1, -3, -3


def test_dpo_by_hand() -> None:
    # Group 0: response 0 is chosen; group 1: the second one is.
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]], ref_logprobs=PAIR_REFERENCE)
    out = objectives.pair("dpo", {"beta": 0.5})(Scripted(policy=PAIR_LOGPROBS), batch)
    first = 0.5 * ((-3 + 4) - (-0.5 + 1))
    second = 0.5 * ((-5 + 3) - (-4 + 3))
    assert out.terms["dpo"][0].item() == pytest.approx(-log_sigmoid(first) - log_sigmoid(second), abs=1e-6)
    assert out.terms["dpo"][1] == "pairs"
    assert figures(out) == pytest.approx(
        {
            "rewards/chosen": 0.5 * (1 - 2) / 2,
            "rewards/rejected": 0.5 * (0.5 - 1) / 2,
            "rewards/margin": (first + second) / 2,
            "rewards/accuracy": 0.5,
            "logps/chosen": (-3 - 5) / 2,
            "logps/rejected": (-0.5 - 4) / 2,
        },
        abs=1e-6,
    )


def test_a_tied_pair_counts_half_in_each_direction_and_in_no_figure() -> None:
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [4, 4]], ref_logprobs=PAIR_REFERENCE)
    out = objectives.pair("dpo", {"beta": 0.5})(Scripted(policy=PAIR_LOGPROBS), batch)
    tie = 0.5 * ((-4 + 3) - (-5 + 3))
    expected = -log_sigmoid(0.25) - 0.5 * log_sigmoid(tie) - 0.5 * log_sigmoid(-tie)
    assert out.terms["dpo"][0].item() == pytest.approx(expected, abs=1e-6)
    assert figures(out)["rewards/margin"] == pytest.approx(0.25)
    assert figures(out)["rewards/accuracy"] == 1.0


def test_equal_rewards_are_half_right() -> None:
    batch = batch_of([[1, 1]], [[0, 1]], ref_logprobs=[-1.0, -2.0])
    assert figures(objectives.pair()(Scripted(policy=[-1.0, -2.0]), batch))["rewards/accuracy"] == 0.5


def test_a_ranking_gives_all_its_pairs() -> None:
    batch = batch_of([[1, 1, 1]], [[2, 0, 1]], ref_logprobs=[0.0, 0.0, 0.0])
    out = objectives.pair("dpo", {"beta": 1.0})(Scripted(policy=[-1.0, -2.0, -4.0]), batch)
    expected = -log_sigmoid(-2 + 1) - log_sigmoid(-4 + 1) - log_sigmoid(-2 + 4)
    assert out.terms["dpo"][0].item() == pytest.approx(expected, abs=1e-6)
    assert batch.units["pairs"] == 3


def test_a_length_normalised_loss_without_reference(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAIR_LOSSES, "gap", None)  # type: ignore[arg-type]
    del PAIR_LOSSES["gap"]

    @pair_loss("gap", length_normalized=True)
    def gap(
        chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, *, beta: float = 2.0
    ) -> Tensor:
        return beta * (rejected - chosen) + 100 * chosen_tokens + 10000 * rejected_tokens

    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]])
    objective = objectives.pair("gap")
    assert not objective.needs_reference
    out = objective(Scripted(policy=PAIR_LOGPROBS), batch)
    expected = 2 * (-0.5 + 1.5) + 200 + 10000 + 2 * (-4 + 5 / 3) + 300 + 10000
    assert out.terms["gap"][0].item() == pytest.approx(expected, abs=1e-4)
    assert figures(out)["rewards/chosen"] == pytest.approx(2 * (-1.5 - 5 / 3) / 2)
    assert figures(out)["logps/chosen"] == pytest.approx((-3 - 5) / 2)


def test_all_four_log_probs_are_normalised_by_their_own_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(PAIR_LOSSES, "sums", None)  # type: ignore[arg-type]
    del PAIR_LOSSES["sums"]

    @pair_loss("sums", length_normalized=True)
    def sums(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        return chosen + 10 * rejected + 100 * ref_chosen + 1000 * ref_rejected

    batch = batch_of([[3, 2]], [[1, 0]], ref_logprobs=[-1.0, -2.0, -3.0, -1.0, -0.5])
    out = objectives.pair("sums")(Scripted(policy=[-3.0, -3.0, -1.5, -2.0, -4.0]), batch)
    assert out.terms["sums"][0].item() == pytest.approx(-3 - 10 * 2.5 - 100 * 0.75 - 1000 * 2, abs=1e-3)
    assert figures(out)["rewards/rejected"] == pytest.approx(-2.5 + 2)  # without beta a reward is the log-ratio


def test_what_a_user_gets_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"loss.name is 'dpoo'"):
        objectives.pair("dpoo")
    with pytest.raises(CheckError, match="no ref_logprobs, which 'dpo' needs"):
        objectives.pair()(Scripted(policy=[-1.0, -2.0]), batch_of([[1, 1]], [[0, 1]]))
    with pytest.raises(CheckError, match="PPO needs 'old_logprobs'"):
        objectives.ppo()(Scripted(policy=[-1.0], value=[0.0]), batch_of([[1]], [[0]]))


def test_reward_model_by_hand() -> None:
    batch = batch_of([[1, 2, 1], [1, 1]], [[1, 0, 1], [0, 1]])
    trunk = Scripted(reward=[0.5, -0.25, 1.0, 2.0, 1.5])
    out = objectives.reward_model(centring_coef=0.1)(trunk, batch)
    pairs = -log_sigmoid(-0.75) - log_sigmoid(-1.25) - log_sigmoid(0.5)
    tie = -0.5 * log_sigmoid(0.5) - 0.5 * log_sigmoid(-0.5)
    assert out.terms["bradley_terry"][0].item() == pytest.approx(pairs + tie, abs=1e-6)
    assert out.terms["centring"][0].item() == pytest.approx(0.1 * (0.25**2 + 1.5**2 + 0.75**2 + 3.5**2), abs=1e-6)
    assert {unit for _, unit in out.terms.values()} == {"pairs"}
    got = objectives.reward_model().finish(figures(out))
    rewards = [0.5, -0.25, 1.0, 2.0, 1.5]
    mean = sum(rewards) / 5
    assert got == pytest.approx(
        {
            "rewards/chosen": (-0.25 - 0.25 + 2) / 3,
            "rewards/rejected": (0.5 + 1 + 1.5) / 3,
            "rewards/margin": (-0.75 - 1.25 + 0.5) / 3,
            "rewards/accuracy": 1 / 3,
            "rewards/mean": mean,
            "rewards/std": math.sqrt(sum((r - mean) ** 2 for r in rewards) / 5),
        },
        abs=1e-6,
    )


def test_reward_model_without_centring_and_with_margins() -> None:
    batch = batch_of([[1, 1]], [[3, 1]])  # margins 6 and 2 on the responses
    out = objectives.reward_model(centring_coef=0, margin_coef=0.25)(Scripted(reward=[1.0, 0.5]), batch)
    assert list(out.terms) == ["bradley_terry"]
    assert out.terms["bradley_terry"][0].item() == pytest.approx(-log_sigmoid(-0.5 - 0.25 * 4), abs=1e-6)


def test_defaults_and_who_trains() -> None:
    assert objectives.ppo() == objectives.Ppo(0.2, 0.2, 0.5, "policy", "value") == objectives.Ppo()
    assert objectives.reward_model() == objectives.RewardModel(0.01, 0.0, "reward") == objectives.RewardModel()
    assert objectives.ppo().roles == ("policy", "value")
    assert objectives.ppo(value=None).roles == objectives.pair().roles == objectives.sft().roles == ("policy",)
    assert objectives.reward_model().roles == ("reward",)


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
    out = objectives.ppo(vf_coef=0.1)(Scripted(policy=new, value=[0.5, 0.9, 0.5]), batch)
    assert out.terms["policy"][0].item() == pytest.approx(2 * 0.8 + 0.8 + 0.5 * math.exp(20), rel=1e-9)
    # value 0.5 moved too far from 1, and away from the return: it counts as it is; the other two moved less
    assert out.terms["value"][0].item() == pytest.approx(0.1 * 0.5 * (1.0**2 + 0.9**2 + 2.5**2), abs=1e-9)
    assert {unit for _, unit in out.terms.values()} == {"tokens"}
    got = figures(out)
    assert got["policy/clip_fraction"] == pytest.approx(2 / 3)
    assert got["policy/clamp_fraction"] == pytest.approx(1 / 3)
    assert got["policy/surprisal"] == pytest.approx(-sum(new) / 3)
    assert got["advantages/mean"] == pytest.approx(-3.5 / 3)
    assert got["values/mean"] == pytest.approx(1.9 / 3)
    assert got["returns/mean"] == pytest.approx(1.5)
    assert got["policy/ratio"] == pytest.approx((0.7 + 0.5 + math.exp(20)) / 3)
    k3 = [0.7 - 1 - math.log(0.7), 0.5 - 1 - math.log(0.5), math.exp(20) - 1 - 20]
    assert got["policy/approx_kl"] == pytest.approx(sum(k3) / 3)
    assert got["values/clip_fraction"] == pytest.approx(1 / 3)
    done = objectives.ppo().finish(got)
    error = torch.tensor([1.0, -0.9, 2.5])
    explained = 1 - error.var(correction=0) / torch.tensor([1.5, 0.0, 3.0]).var(correction=0)
    assert done["values/explained_variance"] == pytest.approx(explained.item(), abs=1e-6)
    assert not {"values/error", "values/error_square", "returns/square"} & done.keys()


def test_ppo_at_the_first_pass() -> None:
    batch = batch_of([[2]], [[0]], old_logprobs=[-1.0, -2.0], advantages=[1.0, -3.0])
    out = objectives.ppo(value=None)(Scripted(policy=[-1.0, -2.0]), batch)
    assert list(out.terms) == ["policy"]
    assert out.terms["policy"][0].item() == 2.0
    assert figures(out)["policy/ratio"] == 1.0
    assert figures(out)["policy/approx_kl"] == 0.0
    assert figures(out)["policy/clip_fraction"] == 0.0


def test_the_value_clip_can_be_switched_off() -> None:
    columns = {"old_logprobs": [0.0], "advantages": [0.0], "old_values": [0.0], "returns": [9.0]}
    batch = batch_of([[1]], [[0]], **columns)
    out = objectives.ppo(clip_range_value=0, vf_coef=1.0)(Scripted(policy=[0.0], value=[8.0]), batch)
    assert out.terms["value"][0].item() == 0.5
    assert figures(out)["values/clip_fraction"] == 0.0


def test_constant_returns_have_no_explained_variance() -> None:
    figure = objectives.ppo().finish(
        {"values/error": 0.5, "values/error_square": 0.25, "returns/mean": 2.0, "returns/square": 4.0}
    )
    assert "values/explained_variance" not in figure


@pytest.fixture
def thumbs(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loss over single responses with a baseline, as KTO is one, registered for one test."""
    monkeypatch.setitem(UNPAIRED_LOSSES, "thumbs", None)  # type: ignore[arg-type]
    del UNPAIRED_LOSSES["thumbs"]

    @unpaired_loss("thumbs")
    def thumbs(logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, *, beta: float = 0.5) -> Tensor:
        return (1 - 2 * desirable) * torch.sigmoid(beta * (logps - ref_logps - kl))


def thumbs_batch(mismatched: Sequence[float] = (0, 1, 0, 1)) -> Batch:
    columns = {"desirable": [1.0, 1.0, 0.0, 0.0], "mismatched": mismatched, "ref_logprobs": PAIR_REFERENCE}
    return batch_of([[2, 1], [1, 3]], [[0, 0], [0, 0]], **columns)


def test_single_responses_by_hand(thumbs: None) -> None:
    """Log-ratios 1, 0.5, -1, -2 or 2; the second and fourth are mismatched, the first is desired, the third is not."""
    objective = objectives.unpaired("thumbs", {"beta": 3.0})
    for ratios, kl in (([0.5, -2.0], 0.0), ([0.5, 2.0], 1.25)):
        logprobs = [*PAIR_LOGPROBS[:4], *(torch.tensor(PAIR_REFERENCE[4:]) + ratios[1] / 3).tolist()]
        trunk = Scripted(policy=logprobs)
        (batch,) = objective.prepare(trunk, [thumbs_batch()])
        assert batch.extras["kl"].item() == pytest.approx(kl)
        out = objective(trunk, batch)
        expected = -1 / (1 + math.exp(-3 * (1 - kl))) + 1 / (1 + math.exp(-3 * (-1 - kl)))
        assert out.terms["thumbs"][0].item() == pytest.approx(expected, abs=1e-6)
        assert out.terms["thumbs"][1] == "prompts"
        assert figures(out) == pytest.approx(
            {"rewards/desirable": 3.0, "rewards/undesirable": -3.0, "kl/mismatched": kl}, abs=1e-6
        )
        out.terms["thumbs"][0].backward()
        grad = trunk.answers["policy"].grad
        assert grad is not None
        assert grad[2] == 0 and (grad[4:] == 0).all() and (grad[:2] != 0).all() and grad[3] != 0


@pytest.mark.parametrize(("mismatched", "kl"), [((0, 1, 0, 0), 0.5), ((0, 0, 0, 0), 0.0)])
def test_the_baseline_of_one_mismatched_response_and_of_none(
    mismatched: Sequence[float], kl: float, thumbs: None
) -> None:
    batch = thumbs_batch(mismatched)
    (batch,) = objectives.unpaired("thumbs").prepare(Scripted(policy=PAIR_LOGPROBS), [batch])
    assert batch.extras["kl"].item() == pytest.approx(kl)


def test_single_responses_without_baseline_normalised_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(UNPAIRED_LOSSES, "plain", None)  # type: ignore[arg-type]
    del UNPAIRED_LOSSES["plain"]

    @unpaired_loss("plain", length_normalized=True)
    def plain(logps: Tensor, ref_logps: Tensor, desirable: Tensor, tokens: Tensor) -> Tensor:
        return logps + 10 * ref_logps + 100 * desirable + 1000 * tokens

    objective = objectives.unpaired("plain")
    batch = batch_of([[2], [3]], [[0], [0]], desirable=[1.0, 0.0], ref_logprobs=[-1.0, -2.0, -3.0, -1.0, -0.5])
    assert objective.prepare(Scripted(policy=[0.0]), [batch]) == [batch]
    out = objective(Scripted(policy=[-3.0, -4.0, -1.0, -2.0, -4.5]), batch)
    assert out.terms["plain"][0].item() == pytest.approx(-3.5 - 2.5 - 10 * (1.5 + 1.5) + 100 + 5000, abs=1e-3)
    assert figures(out) == pytest.approx({"rewards/desirable": -2.0, "rewards/undesirable": -1.0})


def test_the_baseline_is_one_for_the_whole_step(thumbs: None, make: Any) -> None:
    groups = [
        Group(group.prompt, (Response(group.responses[0].ids, per_response={"desirable": float(place % 2)}),))
        for place, group in enumerate(make.groups(12))
    ]
    trunk = make.trunk().double()
    groups = with_reference(trunk, with_mismatched(groups))
    objective = objectives.unpaired("thumbs")
    found = []
    for tokens in (10_000, 24):
        batches = objective.prepare(trunk, make_batches(groups, row_tokens=tokens, batch_tokens=tokens))
        assert len({batch.extras["kl"].item() for batch in batches}) == 1
        found.append((batches[0].extras["kl"].item(), gradient(trunk, objective, batches)))
    (kl, one), (same_kl, other) = found
    assert kl > 0.01 and kl == pytest.approx(same_kl)
    assert (one - other).norm() <= 1e-6 * one.norm()


def test_a_pair_loss_is_no_loss_over_single_responses(thumbs: None) -> None:
    with pytest.raises(ConfigError, match="'dpo', which needs other data; choose one of thumbs"):
        objectives.unpaired("dpo")
    with pytest.raises(ConfigError, match="'thumbs', which needs other data; choose one of dpo"):
        objectives.pair("thumbs")
    objective, batch = objectives.unpaired("thumbs"), replace(thumbs_batch(), ref_logprobs=None)
    with pytest.raises(CheckError, match="no ref_logprobs, which 'thumbs' needs"):
        objective.prepare(Scripted(policy=PAIR_LOGPROBS), [batch])


# Batching is not a hyper-parameter --------------------------------------------------------------------------------


def objective_named(name: str) -> Objective:
    return {
        "sft": objectives.sft(),
        "dpo": objectives.pair("dpo", {"beta": 0.3}),
        "reward": objectives.reward_model(centring_coef=0.05),
        "ppo": objectives.ppo(),
    }[name]


def gradient(trunk: nn.Module, objective: Any, batches: Sequence[Batch]) -> Tensor:
    """One vector of all gradients, made as `train_step` makes it."""
    units = {unit: sum(batch.units[unit] for batch in batches) for unit in batches[0].units}
    trunk.zero_grad()
    for batch in batches:
        sum(total / units[unit] for total, unit in objective(trunk, batch).terms.values()).backward()
    return torch.cat([p.grad.flatten() for p in trunk.parameters() if p.grad is not None])


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
    whole = measure(trunk, objectives.pair(), make_batches(groups, row_tokens=10_000, batch_tokens=10_000))
    parts = measure(trunk, objectives.pair(), make_batches(groups, row_tokens=20, batch_tokens=20))
    assert parts == pytest.approx(whole, rel=1e-5)
    assert whole["loss"] == whole["loss/dpo"]
    assert trunk.training
