"""Planted faults are refused by name, and healthy set-ups pass."""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from kilter.errors import CheckError
from kilter.ops import kl_k1, sum_by
from kilter.train import checks
from kilter.train.checks import (
    check_bos,
    check_end_scored,
    check_first_ratio,
    check_policy_is_reference,
    check_scored,
    check_signs,
    require,
)
from kilter.train.reference import with_reference
from kilter.tree import Batch, Group, Response, make_batches

BOS, END = 1, 2


def batches(*groups: Group) -> list[Batch]:
    return make_batches(groups, row_tokens=12, batch_tokens=24)


HEALTHY = [
    Group((BOS, 5, 6), (Response((7, 8, END)), Response((9, END)))),
    Group((BOS, 5), (Response((7, END, 5, 6, END), ((0, 2), (4, 5))),)),
    Group((BOS, 5, BOS, 6), (Response((7, 8, 9, 7, 8)),)),  # a BOS before each turn; cut by the length limit
]


def test_a_healthy_batch_passes() -> None:
    found = batches(*HEALTHY)
    require(check_scored(found), check_end_scored(found, [END]), check_bos(found, BOS), check_bos(found, None))


def test_an_empty_mask_is_refused() -> None:
    verdict = check_scored(batches(*HEALTHY, Group((BOS, 5), (Response((7, END), ()),))))
    with pytest.raises(CheckError, match="empty mask: 1 of 5 responses have no scored token"):
        require(verdict)
    assert not check_scored(batches()).passed


def test_an_end_token_that_is_never_scored_is_refused() -> None:
    groups = [Group((BOS, 5), (Response((7, 8, END), ((0, 2),)), Response((9, END), ((0, 1),))))]
    with pytest.raises(CheckError, match=r"EOS unscored: 0 of 2 responses .*never learns to stop"):
        require(check_end_scored(batches(*groups), [END, 19]))


@pytest.mark.parametrize(
    "group",
    [
        Group((BOS, BOS, 5), (Response((7, END)),)),
        Group((BOS, 5), (Response((8, END)), Response((BOS, 7, END)))),
        Group((BOS,), (Response((BOS, END)),)),
    ],
)
def test_a_doubled_bos_is_refused(group: Group) -> None:
    with pytest.raises(CheckError, match="doubled BOS: 1 paths or responses"):
        require(check_bos(batches(HEALTHY[0], group, HEALTHY[1]), BOS))


def test_a_bos_that_is_also_the_end_token_may_follow_a_prompt() -> None:
    group = Group((BOS, 5), (Response((BOS,)),))  # an empty answer of a model whose BOS ends answers too
    assert check_bos(batches(group), BOS, [BOS]).passed
    assert not check_bos(batches(group), BOS).passed
    assert not check_bos(batches(Group((BOS, BOS), (Response((BOS,)),))), BOS, [BOS]).passed


class Noisy(nn.Module):
    """A trunk with dropout on: other numbers in every forward of training."""

    def __init__(self, trunk: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk

    def forward(self, tree: Any, ask: Any) -> dict[str, Tensor]:
        answers: dict[str, Tensor] = self.trunk(tree, ask)
        noise = {
            role: 0.1 * torch.randn(len(v), generator=torch.Generator().manual_seed(0)) for role, v in answers.items()
        }
        return {role: v + (noise[role] if self.training else 0) for role, v in answers.items()}


def with_roles(make: Any, same: bool) -> tuple[nn.Module, list[Batch]]:
    trunk = make.trunk()
    if same:
        trunk.models["reference"].load_state_dict(trunk.models["policy"].state_dict())
    groups = with_reference(trunk, make.groups(6), row_tokens=40, batch_tokens=40)
    return trunk, make_batches(groups, row_tokens=60, batch_tokens=120)


def test_policy_equal_to_reference_passes(make: Any) -> None:
    trunk, found = with_roles(make, same=True)
    verdicts = check_policy_is_reference(trunk, found)
    require(*verdicts)
    assert [verdict.name for verdict in verdicts] == ["policy is the reference", "DPO starts at ln 2"]
    assert "loss 0.6931" in verdicts[1].line


def test_another_reference_is_refused(make: Any) -> None:
    trunk, found = with_roles(make, same=False)
    with pytest.raises(CheckError, match="policy is the reference: log-probs differ by up to") as err:
        require(*check_policy_is_reference(trunk, found))
    assert "DPO starts at ln 2: loss" in str(err.value)


def test_dropout_is_seen_because_the_policy_runs_as_in_training(make: Any) -> None:
    trunk, found = with_roles(make, same=True)
    assert not check_policy_is_reference(Noisy(trunk), found)[0].passed


def test_demonstrations_have_no_pairs_to_start_at_ln_2(make: Any) -> None:
    trunk = make.trunk()
    groups = with_reference(trunk, make.groups(3, k=1))
    assert len(check_policy_is_reference(trunk, batches(*groups))) == 1


def old_logprobs(trunk: nn.Module, found: Sequence[Batch]) -> list[Batch]:
    return [
        Batch(
            batch.tree,
            batch.units,
            None,
            {"old_logprobs": trunk(batch.tree, {"policy": "logprobs"})["policy"].detach()},
        )
        for batch in found
    ]


def test_first_ratio(make: Any) -> None:
    trunk, found = with_roles(make, same=True)
    rolled = old_logprobs(trunk, found)
    require(check_first_ratio(trunk, rolled))
    with pytest.raises(CheckError, match="first PPO ratio: between 0"):
        require(check_first_ratio(Noisy(trunk), rolled))
    rolled[0].extras["old_logprobs"][0] = math.nan
    assert not check_first_ratio(trunk, rolled).passed


# Signs -------------------------------------------------------------------------------------------------------------


def paid(
    scores: Tensor, logprobs: Tensor, ref_logprobs: Tensor, leaf: Tensor, *, kl_coef: float = 0.1, sign: float = 1.0
) -> Tensor:
    """The score spread over a response's tokens, less the price of each token's log-ratio."""
    share = sign * scores / sum_by(torch.ones_like(logprobs), leaf, len(scores))
    return share[leaf] - kl_coef * kl_k1(logprobs, ref_logprobs)


def test_healthy_signs_pass() -> None:
    require(*check_signs(paid))
    require(*check_signs(functools.partial(paid, kl_coef=1e-4)))
    require(*check_signs(functools.partial(paid, kl_coef=0.0), kl_penalty=False))


@pytest.mark.parametrize(
    ("fault", "name"),
    [
        ({"sign": -1.0}, "sign of the reward"),
        ({"sign": 0.0}, "sign of the reward"),
        ({"kl_coef": -0.1}, "sign of the KL"),
        ({"kl_coef": 0.0}, "sign of the KL"),
        ({"kl_coef": math.nan}, "sign of the KL"),
    ],
)
def test_each_sign_is_refused_on_its_own(fault: dict[str, float], name: str) -> None:
    verdicts = check_signs(functools.partial(paid, **fault))
    refused = [verdict.name for verdict in verdicts if not verdict.passed]
    assert name in refused
    if not math.isnan(fault.get("kl_coef", 0.0)):
        assert refused == [name]
    with pytest.raises(CheckError, match=name):
        require(*verdicts)


def test_a_kl_bonus_is_refused_where_the_penalty_is_switched_off() -> None:
    refused = [v.name for v in check_signs(functools.partial(paid, kl_coef=-0.1), kl_penalty=False) if not v.passed]
    assert refused == ["sign of the KL"]


def test_a_verdict_says_value_rule_and_remedy() -> None:
    verdict = checks.Verdict("name", False, "3", "at most 2", "lower it")
    assert verdict.line == "name: 3; rule: at most 2; lower it"
