"""Objectives of preference losses: what each is given, mixtures, and the same gradient however a step is cut."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from scripted import Scripted, batch_of, figures, gradient, log_sigmoid
from torch import Tensor, nn

from kilter.errors import CheckError, ConfigError
from kilter.losses import (
    PAIR_LOSSES,
    RANKED_LOSSES,
    UNPAIRED_LOSSES,
    pair_loss,
    preference_losses,
    ranked_loss,
    unpaired_loss,
)
from kilter.train import preferences
from kilter.train.loop import measure
from kilter.train.preferences import Term
from kilter.train.reference import with_reference
from kilter.train.sources import with_mismatched
from kilter.tree import Batch, Group, Response, TokenTree, make_batches


@pytest.fixture(autouse=True)
def _losses_of_a_test() -> Iterator[None]:
    """What a test registers is gone after it."""
    tables = (PAIR_LOSSES, RANKED_LOSSES, UNPAIRED_LOSSES)
    before = [dict(table) for table in tables]
    yield
    for table, held in zip(tables, before, strict=True):
        for name in set(table) - set(held):
            del table[name]


PAIR_LOGPROBS = [-1.0, -2.0, -0.5, -4.0, -1.0, -1.0, -3.0]  # responses of 2, 1, 1 and 3 tokens: -3, -0.5, -4, -5
PAIR_REFERENCE = [-1.5, -2.5, -1.0, -3.0, -1.0, -1.0, -1.0]  # -4, -1, -3, -3


def test_dpo_by_hand() -> None:
    # Group 0: response 0 is chosen; group 1: the second one is.
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]], ref_logprobs=PAIR_REFERENCE)
    out = preferences.preference("dpo", {"beta": 0.5})(Scripted(policy=PAIR_LOGPROBS), batch)
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
            "displacement/chosen": (1 - 2) / 2,
            "displacement/rejected": (0.5 - 1) / 2,
            "pairs/weight": (1 / (1 + math.exp(first)) + 1 / (1 + math.exp(second))) / 2,
        },
        abs=1e-6,
    )


def test_a_tied_pair_counts_half_in_each_direction_and_in_no_figure() -> None:
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [4, 4]], ref_logprobs=PAIR_REFERENCE)
    out = preferences.preference("dpo", {"beta": 0.5})(Scripted(policy=PAIR_LOGPROBS), batch)
    tie = 0.5 * ((-4 + 3) - (-5 + 3))
    expected = -log_sigmoid(0.25) - 0.5 * log_sigmoid(tie) - 0.5 * log_sigmoid(-tie)
    assert out.terms["dpo"][0].item() == pytest.approx(expected, abs=1e-6)
    assert figures(out)["rewards/margin"] == pytest.approx(0.25)
    assert figures(out)["rewards/accuracy"] == 1.0
    assert figures(out)["pairs/weight"] == pytest.approx(1 / (1 + math.exp(0.25)))
    better, worse, margin = preferences.preference("dpo", {"beta": 0.5}).margins(Scripted(policy=PAIR_LOGPROBS), batch)
    assert (better.tolist(), worse.tolist()) == ([0], [1]) and margin.tolist() == pytest.approx([0.25])


def test_equal_rewards_are_half_right() -> None:
    batch = batch_of([[1, 1]], [[0, 1]], ref_logprobs=[-1.0, -2.0])
    assert figures(preferences.preference()(Scripted(policy=[-1.0, -2.0]), batch))["rewards/accuracy"] == 0.5


def test_a_ranking_gives_all_its_pairs() -> None:
    batch = batch_of([[1, 1, 1]], [[2, 0, 1]], ref_logprobs=[0.0, 0.0, 0.0])
    out = preferences.preference("dpo", {"beta": 1.0})(Scripted(policy=[-1.0, -2.0, -4.0]), batch)
    expected = -log_sigmoid(-2 + 1) - log_sigmoid(-4 + 1) - log_sigmoid(-2 + 4)
    assert out.terms["dpo"][0].item() == pytest.approx(expected, abs=1e-6)
    assert batch.units["pairs"] == 3


def test_a_length_normalised_loss_without_reference() -> None:
    @pair_loss("gap", length_normalized=True)
    def gap(
        chosen: Tensor, rejected: Tensor, chosen_tokens: Tensor, rejected_tokens: Tensor, *, beta: float = 2.0
    ) -> Tensor:
        return beta * (rejected - chosen) + 100 * chosen_tokens + 10000 * rejected_tokens

    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]])
    objective = preferences.preference("gap")
    assert not objective.needs_reference
    out = objective(Scripted(policy=PAIR_LOGPROBS), batch)
    expected = 2 * (-0.5 + 1.5) + 200 + 10000 + 2 * (-4 + 5 / 3) + 300 + 10000
    assert out.terms["gap"][0].item() == pytest.approx(expected, abs=1e-4)
    assert figures(out)["rewards/chosen"] == pytest.approx(2 * (-1.5 - 5 / 3) / 2)
    assert figures(out)["logps/chosen"] == pytest.approx((-3 - 5) / 2)


def test_all_four_log_probs_are_normalised_by_their_own_length() -> None:
    @pair_loss("sums", length_normalized=True)
    def sums(chosen: Tensor, rejected: Tensor, ref_chosen: Tensor, ref_rejected: Tensor) -> Tensor:
        return chosen + 10 * rejected + 100 * ref_chosen + 1000 * ref_rejected

    batch = batch_of([[3, 2]], [[1, 0]], ref_logprobs=[-1.0, -2.0, -3.0, -1.0, -0.5])
    out = preferences.preference("sums")(Scripted(policy=[-3.0, -3.0, -1.5, -2.0, -4.0]), batch)
    assert out.terms["sums"][0].item() == pytest.approx(-3 - 10 * 2.5 - 100 * 0.75 - 1000 * 2, abs=1e-3)
    assert figures(out)["rewards/rejected"] == pytest.approx(-2.5 + 2)  # without beta a reward is the log-ratio


@pytest.fixture
def thumbs() -> None:
    """A loss over single responses with a baseline, as KTO is one, registered for one test."""

    @unpaired_loss("plain")
    def thumbs(logps: Tensor, ref_logps: Tensor, desirable: Tensor, kl: Tensor, *, beta: float = 0.5) -> Tensor:
        return (1 - 2 * desirable) * torch.sigmoid(beta * (logps - ref_logps - kl))


def thumbs_batch(mismatched: Sequence[float] = (0, 1, 0, 1)) -> Batch:
    columns = {"desirable": [1.0, 1.0, 0.0, 0.0], "mismatched": mismatched, "ref_logprobs": PAIR_REFERENCE}
    return batch_of([[2, 1], [1, 3]], [[0, 0], [0, 0]], **columns)


def test_single_responses_by_hand(thumbs: None) -> None:
    """Log-ratios 1, 0.5, -1, -2 or 2; the second and fourth are mismatched, the first is desired, the third is not."""
    objective = preferences.preference("plain", {"beta": 3.0})
    for ratios, kl in (([0.5, -2.0], 0.0), ([0.5, 2.0], 1.25)):
        logprobs = [*PAIR_LOGPROBS[:4], *(torch.tensor(PAIR_REFERENCE[4:]) + ratios[1] / 3).tolist()]
        trunk = Scripted(policy=logprobs)
        (batch,) = objective.prepare(trunk, [thumbs_batch()])
        assert batch.extras["kl"].item() == pytest.approx(kl)
        out = objective(trunk, batch)
        expected = -1 / (1 + math.exp(-3 * (1 - kl))) + 1 / (1 + math.exp(-3 * (-1 - kl)))
        assert out.terms["plain"][0].item() == pytest.approx(expected, abs=1e-6)
        assert out.terms["plain"][1] == "prompts"
        assert trunk.asked == [1 + 3, 2 + 1]  # what is borrowed, once; then what is learned from
        assert figures(out) == pytest.approx(
            {"rewards/desirable": 3.0, "rewards/undesirable": -3.0, "kl/mismatched": kl}, abs=1e-6
        )
        out.terms["plain"][0].backward()
        grad = trunk.answers["policy"].grad
        assert grad is not None
        assert grad[2] == 0 and (grad[4:] == 0).all() and (grad[:2] != 0).all() and grad[3] != 0


@pytest.mark.parametrize(("mismatched", "kl"), [((0, 1, 0, 0), 0.5), ((0, 0, 0, 0), 0.0)])
def test_the_baseline_of_one_mismatched_response_and_of_none(
    mismatched: Sequence[float], kl: float, thumbs: None
) -> None:
    batch = thumbs_batch(mismatched)
    (batch,) = preferences.preference("plain").prepare(Scripted(policy=PAIR_LOGPROBS), [batch])
    assert batch.extras["kl"].item() == pytest.approx(kl)


def test_single_responses_without_baseline_normalised_by_length() -> None:
    @unpaired_loss("plain", length_normalized=True)
    def plain(logps: Tensor, ref_logps: Tensor, desirable: Tensor, tokens: Tensor) -> Tensor:
        return logps + 10 * ref_logps + 100 * desirable + 1000 * tokens

    objective = preferences.preference("plain")
    batch = batch_of([[2], [3]], [[0], [0]], desirable=[1.0, 0.0], ref_logprobs=[-1.0, -2.0, -3.0, -1.0, -0.5])
    assert objective.prepare(Scripted(policy=[0.0]), [batch]) == [batch]
    out = objective(Scripted(policy=[-3.0, -4.0, -1.0, -2.0, -4.5]), batch)
    assert out.terms["plain"][0].item() == pytest.approx(-3.5 - 2.5 - 10 * (1.5 + 1.5) + 100 + 5000, abs=1e-3)
    assert figures(out) == pytest.approx({"rewards/desirable": -2.0, "rewards/undesirable": -1.0})


def thumbs_groups(make: Any, count: int) -> list[Group]:
    """Single responses, every other one with a thumb up."""
    return [
        Group(group.prompt, (Response(group.responses[0].ids, per_response={"desirable": float(place % 2)}),))
        for place, group in enumerate(make.groups(count))
    ]


def test_the_baseline_is_one_for_the_whole_step(thumbs: None, make: Any) -> None:
    trunk = make.trunk().double()
    groups = with_reference(trunk, with_mismatched(thumbs_groups(make, 12)))
    objective = preferences.preference("plain")
    found = []
    for tokens in (10_000, 24):
        batches = objective.prepare(trunk, make_batches(groups, row_tokens=tokens, batch_tokens=tokens))
        assert len({batch.extras["kl"].item() for batch in batches}) == 1
        found.append(batches[0].extras["kl"].item())
    assert found[0] > 0.01 and found[0] == pytest.approx(found[1])


@pytest.mark.parametrize(
    ("desirable", "shift"),
    [((1.0, 0.0, 0.0), (1.0 - 0.75) / 2), ((1.0, 1.0, 1.0), -0.5 / 3), ((0.0, 0.0, 0.0), -0.5 / 3)],
)
def test_the_shift_is_the_mean_of_both_sides_means(desirable: Sequence[float], shift: float) -> None:
    """Log-ratios 1, 0.5 and -2: of a side that is not there, there is no mean."""
    batch = batch_of([[1], [1], [1]], [[0], [0], [0]], desirable=desirable, ref_logprobs=[-2.0, -1.0, -1.0])
    objective = preferences.preference("bco", {"beta": 1.0})
    (batch,) = objective.prepare(Scripted(policy=[-1.0, -0.5, -3.0]), [batch])
    assert batch.extras["shift"].item() == pytest.approx(shift)


def test_what_a_user_gets_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match=r"loss.name is 'dpoo'; did you mean 'dpo'\?"):
        preferences.preference("dpoo")
    with pytest.raises(CheckError, match="no ref_logprobs, which 'dpo' needs"):
        preferences.preference()(Scripted(policy=[-1.0, -2.0]), batch_of([[1, 1]], [[0, 1]]))
    with pytest.raises(CheckError, match="no ref_logprobs, which 'kto' needs"):
        preferences.preference("kto").prepare(
            Scripted(policy=PAIR_LOGPROBS), [replace(thumbs_batch(), ref_logprobs=None)]
        )
    with pytest.raises(CheckError, match="a loss over comparisons needs 'rank'"):
        preferences.preference("simpo")(Scripted(policy=[-1.0]), replace(batch_of([[1]], [[0]]), extras={}))
    with pytest.raises(ConfigError, match="losses dpo, kto read comparisons and thumbs"):
        preferences.mixture([Term("dpo"), Term("kto")])
    with pytest.raises(ConfigError, match="'dpo' stands twice"):
        preferences.mixture([Term("dpo"), Term("nll"), Term("dpo", {"beta": 0.3})])


# What a loss can ask for ------------------------------------------------------------------------------------------


def asked_for(name: str, trunk: nn.Module, batches: Sequence[Batch]) -> list[float]:
    """What a pair loss that asks for one input gets, pair by pair."""

    kept: list[float] = []

    def echo(given: Tensor) -> Tensor:
        kept.extend(given.tolist())
        return given

    PAIR_LOSSES["echo"] = PAIR_LOSSES["dpo"]._replace(fn=echo, inputs=("chosen",), defaults={}, ranges={})
    objective = preferences.preference("echo")
    PAIR_LOSSES["echo"] = PAIR_LOSSES["echo"]._replace(inputs=(name,))
    kept.clear()
    for batch in objective.prepare(trunk, batches):
        objective(trunk, batch)
    return kept


def test_the_head_of_a_response_is_as_long_as_the_shorter_one() -> None:
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]], ref_logprobs=PAIR_REFERENCE)
    trunk = Scripted(policy=PAIR_LOGPROBS)
    assert asked_for("chosen_head", trunk, [batch]) == [-1.0, -1.0]
    assert asked_for("rejected_head", trunk, [batch]) == [-0.5, -4.0]
    assert asked_for("ref_chosen_head", trunk, [batch]) == [-1.5, -1.0]
    assert asked_for("ref_rejected_head", trunk, [batch]) == [-1.0, -3.0]
    even = batch_of([[2, 2], [1, 2]], [[0, 1], [1, 0]], ref_logprobs=PAIR_REFERENCE)
    assert asked_for("chosen_head", trunk, [even]) == [-3.0, -1.0]
    assert asked_for("rejected_head", trunk, [even]) == [-4.5, -1.0]


def test_a_head_keeps_its_digits_in_a_large_batch() -> None:
    lengths = [[40, 20]] * 400
    values = (-7 - torch.arange(24_000) % 5 * 0.1).tolist()
    batch = batch_of(lengths, [[0, 1]] * 400)
    got = asked_for("chosen_head", Scripted(policy=values).float(), [batch])
    assert got == pytest.approx([sum(values[at : at + 20]) for at in range(0, 24_000, 60)], abs=2e-4)


def test_likeness_is_of_both_responses() -> None:
    class Stats(Scripted):
        def forward(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
            assert set(ask.values()) == {"token_stats"}
            return {role: self.answers[role].reshape(3, -1).T for role in ask}

    collision = [-0.5, -1.0, -0.25]
    trunk = Stats(policy=[-1.0, -2.0, -0.5, *[0.0] * 3, *collision])
    batch = batch_of([[2, 1]], [[1, 0]])
    expected = math.exp((-1 + 0.5 - 2 + 1) / 2) * math.exp(-0.25)
    assert asked_for("likeness", trunk, [batch]) == pytest.approx([expected])
    objective = preferences.mixture([Term("wpo", {"beta": 1.0})], reference_free=True)
    out = objective(trunk, batch)
    assert out.terms["wpo"][0].item() == pytest.approx(-expected * log_sigmoid(-0.5 + 3))
    out.terms["wpo"][0].backward()
    grad = trunk.answers["policy"].grad
    assert grad is not None and (grad[:3] != 0).all() and (grad[3:] == 0).all()


def test_ranks_are_of_the_whole_step_and_not_of_a_batch() -> None:
    """Three pairs in two batches: margins 1, -2, 0.5 under the policy, 0.25, -0.5, 3 under the reference."""
    first = batch_of([[1, 1], [1, 1]], [[0, 1], [1, 0]], ref_logprobs=[-1.0, -1.25, -2.0, -2.5])
    second = batch_of([[1, 1]], [[0, 1]], ref_logprobs=[-1.0, -4.0])

    class Two(Scripted):
        def forward(self, tree: TokenTree, ask: Mapping[str, str]) -> dict[str, Tensor]:
            return {role: self.answers[role][:4] if len(tree.last) == 4 else self.answers[role][4:] for role in ask}

    trunk = Two(policy=[-1.0, -2.0, -1.0, -3.0, -1.0, -1.5])
    assert asked_for("ref_ranked", trunk, [first, second]) == [3.0, -0.5, 0.25]
    # log-ratios of the chosen: 0, -0.5, 0 ; of the rejected: -0.75, 1, 2.5
    assert asked_for("rejected_ranked", trunk, [first, second]) == [1.0, -0.75, 2.5]
    assert asked_for("chosen_ranked", trunk, [first, second]) == [-0.5, 0.0, 0.0]


def test_a_ranked_loss_is_given_what_it_asks_for_and_counts_prompts() -> None:
    @ranked_loss("spread", length_normalized=True)
    def spread(logps: Tensor, ref_logps: Tensor, group: Tensor, rank: Tensor, tokens: Tensor) -> Tensor:
        return logps + 10 * ref_logps + 100 * group + 1000 * rank + 10_000 * tokens

    batch = batch_of([[2, 1], [3]], [[1, 0], [2]], ref_logprobs=[-1.0, -3.0, -1.0, -1.0, -1.0, -4.0])
    out = preferences.preference("spread")(Scripted(policy=[-1.0, -2.0, -0.5, -4.0, -1.0, -1.0]), batch)
    expected = (-1.5 - 0.5 - 2) + 10 * (-2 - 1 - 2) + 100 + 1000 * 3 + 10_000 * 6
    assert out.terms["spread"][0].item() == pytest.approx(expected)
    assert out.terms["spread"][1] == "prompts"


# Mixtures -----------------------------------------------------------------------------------------------------------


def test_a_mixture_is_the_weighted_sum_of_its_losses_each_by_its_own_unit() -> None:
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]], ref_logprobs=PAIR_REFERENCE)
    trunk = Scripted(policy=PAIR_LOGPROBS)
    objective = preferences.mixture([Term("dpo", {"beta": 0.5}, 2.0), Term("nll", weight=0.25), Term("dpo_pl")])
    (prepared,) = objective.prepare(trunk, [batch])
    assert prepared.units["chosen_tokens"] == 5
    out = objective(trunk, prepared)
    alone = {name: preferences.preference(name)(trunk, batch).terms[name][0].item() for name in ("nll", "dpo_pl")}
    assert out.terms["dpo"][0].item() == pytest.approx(-2 * (log_sigmoid(0.25) + log_sigmoid(-0.5)), abs=1e-6)
    assert out.terms["nll"][0].item() == pytest.approx(0.25 * 8)
    assert alone["nll"] == pytest.approx(8)
    assert out.terms["dpo_pl"][0].item() == pytest.approx(alone["dpo_pl"])
    assert {name: unit for name, (_, unit) in out.terms.items()} == {
        "dpo": "pairs",
        "nll": "chosen_tokens",
        "dpo_pl": "prompts",
    }
    assert figures(out)["rewards/margin"] == pytest.approx((0.25 - 0.5) / 2)  # of the first loss


def test_a_tie_counts_half_of_the_tokens_of_both_sides() -> None:
    batch = batch_of([[2, 1]], [[0, 0]])
    objective = preferences.preference("nll")
    (prepared,) = objective.prepare(Scripted(policy=[-1.0, -2.0, -0.5]), [batch])
    assert prepared.units["chosen_tokens"] == 1.5
    out = objective(Scripted(policy=[-1.0, -2.0, -0.5]), prepared)
    assert out.terms["nll"][0].item() == pytest.approx((3 + 0.5) / 2)


def test_thumbs_can_be_mixed() -> None:
    batch = thumbs_batch((0, 0, 0, 0))
    trunk = Scripted(policy=PAIR_LOGPROBS)
    terms = [Term("apo_zero_unpaired", {"beta": 0.5}, 0.5), Term("bco", {"beta": 0.5})]
    objective = preferences.mixture(terms)
    (prepared,) = objective.prepare(trunk, [batch])
    out = objective(trunk, prepared)
    for term in terms:
        alone = preferences.preference(term.name, term.options)(trunk, prepared).terms[term.name][0]
        assert out.terms[term.name][0].item() == pytest.approx(term.weight * alone.item())


def test_without_a_reference_its_log_probs_are_zero() -> None:
    batch = batch_of([[2, 1], [1, 3]], [[0, 1], [1, 0]], ref_logprobs=PAIR_REFERENCE)
    objective = preferences.preference("dpo", {"beta": 0.5}, reference_free=True)
    assert not objective.needs_reference
    for given in (batch, replace(batch, ref_logprobs=None)):
        out = objective(Scripted(policy=PAIR_LOGPROBS), given)
        expected = -log_sigmoid(0.5 * (-3 + 0.5)) - log_sigmoid(0.5 * (-5 + 4))
        assert out.terms["dpo"][0].item() == pytest.approx(expected, abs=1e-6)
    assert not preferences.preference("kto", reference_free=True).needs_reference
    assert preferences.preference("kto").needs_reference and preferences.preference("kto").needs_mismatched
    assert not preferences.preference("bco").needs_mismatched


# Batching is not a hyper-parameter --------------------------------------------------------------------------------


def groups_for(name: str, make: Any, trunk: nn.Module) -> list[Group]:
    groups = with_mismatched(thumbs_groups(make, 16)) if name in UNPAIRED_LOSSES else make.groups(16, k=3)
    return with_reference(trunk, groups)


@pytest.mark.parametrize("name", sorted(preference_losses()))
def test_the_gradient_does_not_depend_on_how_a_step_is_cut(name: str, make: Any) -> None:
    trunk = make.trunk().double()
    groups = groups_for(name, make, trunk)
    objective = preferences.preference(name)
    expected = gradient(trunk, objective, make_batches(groups, row_tokens=10_000, batch_tokens=10_000))
    assert expected.norm() > 1e-3
    for rows, tokens in ((32, 32), (64, 128), (1, 1)):
        batches = make_batches(groups[::-1], row_tokens=rows, batch_tokens=tokens)
        assert len(batches) > 1
        got = gradient(trunk, objective, batches)
        assert (got - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("name", sorted(preference_losses()))
def test_an_empty_batch_adds_nothing_and_has_every_figure(name: str, make: Any) -> None:
    trunk = make.trunk()
    objective = preferences.preference(name)
    (full,) = make_batches(groups_for(name, make, trunk)[:4], row_tokens=10_000, batch_tokens=10_000)
    empty = make_batches([], row_tokens=10_000, batch_tokens=10_000)
    expected = gradient(trunk, objective, [full])
    assert torch.equal(gradient(trunk, objective, [full, *empty]), expected)
    first, second = (objective(trunk, batch) for batch in objective.prepare(trunk, [full, *empty]))
    assert first.metrics.keys() == second.metrics.keys()
    assert first.terms.keys() == second.terms.keys()
    assert measure(trunk, objective, [full, *empty]) == pytest.approx(measure(trunk, objective, [full]), nan_ok=True)
