"""Every registered pair loss has a golden row worked out by hand, and passes what must hold for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kilter.losses import PAIR_LOSSES, bind, dpo


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


LN2 = math.log(2)
HALF, QUARTER = math.log(0.5), math.log(0.25)
Row = tuple[dict[str, float], dict[str, Any], float]

A = {"chosen": -1.0, "rejected": -3.0, "ref_chosen": -1.5, "ref_rejected": -2.5}  # log-ratios 0.5 and -0.5
B = {"chosen": -4.0, "rejected": -3.0, "ref_chosen": -2.0, "ref_rejected": -9.0}  # log-ratios -2 and 6
LEVEL = {"chosen": -4.0, "rejected": -3.0, "ref_chosen": -4.0, "ref_rejected": -3.0}  # the policy is the reference

# name -> rows of (inputs by name, options, loss). The arithmetic is written out; no loss computes its own row.
GOLDEN: dict[str, list[Row]] = {
    "dpo": [
        (A, {"beta": 0.5, "label_smoothing": 0.1}, -0.9 * log_sigmoid(0.5) - 0.1 * log_sigmoid(-0.5)),
        (B, {}, -log_sigmoid(-0.8)),  # the default beta of 0.1, no smoothing
        (LEVEL, {"label_smoothing": 0.3}, LN2),
    ],
    "robust": [
        (A, {"beta": 0.5, "label_smoothing": 0.2}, (-0.8 * log_sigmoid(0.5) + 0.2 * log_sigmoid(-0.5)) / 0.6),
        (B, {}, (-0.9 * log_sigmoid(-0.8) + 0.1 * log_sigmoid(0.8)) / 0.8),
        (LEVEL, {}, LN2),
    ],
    "ipo": [
        (A, {"beta": 0.25}, (1.0 - 2.0) ** 2),
        (B, {}, (-8.0 - 5.0) ** 2),
        (LEVEL, {"beta": 0.1}, 25.0),
    ],
    "hinge": [
        (A, {"beta": 0.5}, 0.5),
        (A, {"beta": 2.0}, 0.0),
        (B, {}, 1.8),
        (LEVEL, {}, 1.0),
    ],
    "dpo_norm": [
        (A, {"beta": 0.5, "label_smoothing": 0.1}, -0.9 * log_sigmoid(0.5) - 0.1 * log_sigmoid(-0.5)),
        (A, {}, -log_sigmoid(2.0)),
        (LEVEL, {}, LN2),
    ],
    "f_dpo": [
        (A, {"beta": 2.0, "divergence": "reverse_kl"}, -log_sigmoid(2.0)),
        (A, {"beta": 2.0, "divergence": "forward_kl"}, -log_sigmoid(2 * (-math.exp(-0.5) + math.exp(0.5)))),
        (
            A,  # 2u / (1 + u) is 2 sigmoid(log u)
            {"beta": 2.0},
            -log_sigmoid(2 * (math.log(2 * sigmoid(0.5)) - math.log(2 * sigmoid(-0.5)))),
        ),
        (
            A,
            {"divergence": "alpha", "alpha": 0.25},
            -log_sigmoid(0.1 * ((1 - math.exp(-0.125)) / 0.25 - (1 - math.exp(0.125)) / 0.25)),
        ),
        (A, {"divergence": "alpha"}, -log_sigmoid(0.1 * 2 * (-math.exp(-0.25) + math.exp(0.25)))),
        (LEVEL, {}, LN2),
    ],
    "exo": [
        (
            A,
            {"beta": 0.5, "label_smoothing": 0.1},
            sigmoid(0.5) * math.log(sigmoid(0.5) / 0.9) + sigmoid(-0.5) * math.log(sigmoid(-0.5) / 0.1),
        ),
        (
            B,
            {},
            sigmoid(-0.8) * math.log(sigmoid(-0.8) / 0.999) + sigmoid(0.8) * math.log(sigmoid(0.8) / 0.001),
        ),
        (LEVEL, {}, -LN2 - math.log(0.001 * 0.999) / 2),
    ],
    "nca": [
        (A, {"beta": 2.0}, -log_sigmoid(1) - 0.5 * log_sigmoid(-1) - 0.5 * log_sigmoid(1)),
        (B, {}, -log_sigmoid(-0.02) - 0.5 * log_sigmoid(0.02) - 0.5 * log_sigmoid(-0.06)),
        (LEVEL, {}, 2 * LN2),
    ],
    "bco_pair": [
        (A, {"beta": 2.0}, -log_sigmoid(1) - log_sigmoid(1)),
        (B, {}, -log_sigmoid(-0.2) - log_sigmoid(-0.6)),
        (LEVEL, {}, 2 * LN2),
    ],
    "sppo": [
        (A, {"beta": 0.25}, (0.5 - 2) ** 2 + (-0.5 + 2) ** 2),
        (B, {}, (-2 - 5.0) ** 2 + (6 + 5.0) ** 2),
        (LEVEL, {}, 50.0),
    ],
    "apo_zero": [
        (A, {"beta": 2.0}, 1 - sigmoid(1) + sigmoid(-1)),
        (B, {}, 1 - sigmoid(-0.2) + sigmoid(0.6)),
        (LEVEL, {}, 1.0),
    ],
    "apo_down": [
        (A, {"beta": 2.0}, sigmoid(1) + 1 - sigmoid(2)),
        (B, {}, sigmoid(-0.2) + 1 - sigmoid(-0.8)),
        (LEVEL, {}, 1.0),
    ],
    "discopop": [
        (
            A,
            {"beta": 0.5, "tau": 2.0},
            -(1 - sigmoid(0.25)) * log_sigmoid(0.5) + sigmoid(0.25) * math.exp(-0.5),
        ),
        (A, {}, -(1 - sigmoid(1)) * log_sigmoid(0.05) + sigmoid(1) * math.exp(-0.05)),
        (LEVEL, {}, (LN2 + 1) / 2),
    ],
    "ld_dpo": [
        # chosen: 1 nat gained, 0.25 of it in the head; rejected: 2 lost, all of them in the head
        (
            {
                "chosen": -2.0,
                "ref_chosen": -3.0,
                "chosen_head": -1.0,
                "ref_chosen_head": -1.25,
                "rejected": -6.0,
                "ref_rejected": -4.0,
                "rejected_head": -6.0,
                "ref_rejected_head": -4.0,
            },
            {"beta": 0.5, "alpha": 0.2},
            -log_sigmoid(0.5 * ((0.25 + 0.2 * 0.75) + 2)),
        ),
        (
            {
                "chosen": -2.0,
                "ref_chosen": -2.0,
                "chosen_head": -2.0,
                "ref_chosen_head": -2.0,
                "rejected": -6.0,
                "ref_rejected": -4.0,
                "rejected_head": -1.0,
                "ref_rejected_head": -2.0,
            },
            {},
            -log_sigmoid(0.1 * (0 - (1 - 0.5 * 3))),
        ),
    ],
    "wpo": [
        ({**A, "likeness": 0.25}, {"beta": 0.5}, -0.25 * log_sigmoid(0.5)),
        ({**B, "likeness": 1.0}, {}, -log_sigmoid(-0.8)),
        ({**LEVEL, "likeness": 0.5}, {}, LN2 / 2),
    ],
    "rpo": [
        ({**A, "chosen_tokens": 4.0}, {"beta": 0.5, "nll_coef": 2.0}, -log_sigmoid(0.5) + 2 * 0.25),
        ({**B, "chosen_tokens": 2.0}, {}, -log_sigmoid(-0.8) + 2.0),
        ({**LEVEL, "chosen_tokens": 8.0}, {}, LN2 + 0.5),
    ],
    "aot": [
        (
            {"chosen": -1.0, "rejected": -3.0, "ref_ranked": 0.5},
            {"beta": 0.5, "label_smoothing": 0.1},
            -0.9 * log_sigmoid(0.75) - 0.1 * log_sigmoid(-0.75),
        ),
        ({"chosen": -4.0, "rejected": -3.0, "ref_ranked": 3.0}, {}, -log_sigmoid(-0.4)),
    ],
    "aot_unpaired": [
        # the value stands at the chosen response: 0.5 against the rejected log-ratio of its rank
        (
            {**A, "rejected_ranked": -1.0, "chosen_ranked": 9.0},
            {"beta": 0.5, "label_smoothing": 0.1},
            -0.9 * log_sigmoid(0.75) - 0.1 * log_sigmoid(-0.75),
        ),
        ({**B, "rejected_ranked": 3.0, "chosen_ranked": -9.0}, {}, -log_sigmoid(-0.5)),
    ],
    "nll": [({"chosen": -3.5}, {}, 3.5)],
    "orpo": [
        # odds 1/3 and 1
        ({"chosen": QUARTER, "rejected": HALF}, {"beta": 0.5}, 2 * LN2 + 0.5 * math.log(4)),
        # odds 3 and 1/3, the likelihood at a quarter
        (
            {"chosen": math.log(0.75), "rejected": QUARTER},
            {"nll_coef": 0.25},
            -0.25 * math.log(0.75) + 0.1 * math.log(1 + 1 / 9),
        ),
        ({"chosen": HALF, "rejected": HALF}, {}, LN2 + 0.1 * LN2),
    ],
    "simpo": [
        ({"chosen": -1.0, "rejected": -1.5}, {"beta": 3.0, "gamma": 0.5}, -log_sigmoid(1.0)),
        (
            {"chosen": -2.0, "rejected": -1.5},
            {"label_smoothing": 0.1},
            -0.9 * log_sigmoid(-2.0) - 0.1 * log_sigmoid(2.0),
        ),
        ({"chosen": -1.0, "rejected": -1.0}, {}, math.log(1 + math.e)),
    ],
    "alphapo": [
        # p = 1/2 and 1/4, alpha = 1: rewards 1 - 2 and 1 - 4
        ({"chosen": HALF, "rejected": QUARTER}, {"alpha": 1.0, "beta": 3.0, "gamma": 0.5}, -log_sigmoid(5.5)),
        (
            {"chosen": -2.0, "rejected": -1.0},
            {},
            -log_sigmoid(2 * (4 * (1 - math.exp(0.5)) - 4 * (1 - math.exp(0.25))) - 1),
        ),
        ({"chosen": -1.0, "rejected": -1.0}, {}, math.log(1 + math.e)),
    ],
    "cpo": [
        (
            {"chosen": -1.0, "rejected": -3.0, "chosen_tokens": 4.0},
            {"beta": 0.5, "nll_coef": 2.0, "label_smoothing": 0.1},
            -0.9 * log_sigmoid(1) - 0.1 * log_sigmoid(-1) + 0.5,
        ),
        ({"chosen": -4.0, "rejected": -4.0, "chosen_tokens": 8.0}, {}, LN2 + 0.5),
        ({"chosen": -4.0, "rejected": -3.0, "chosen_tokens": 2.0}, {}, -log_sigmoid(-0.1) + 2),
    ],
}
NOT_BY_PAIR = {
    "apo_down": "lowers both responses: where the policy is the reference the chosen one's gradient is zero",
    "discopop": "is not monotone at no margin",
    "nll": "does not read the rejected response",
}
"""Losses that do not raise the chosen response over the rejected one where the policy is the reference."""


def column(value: float) -> Tensor:
    return torch.tensor([value], dtype=torch.float64)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_golden(name: str) -> None:
    assert name in GOLDEN, f"pair loss {name!r} has no golden row: add one, worked out by hand"
    for inputs, options, expected in GOLDEN[name]:
        got = bind(name, options)(*[column(inputs[key]) for key in PAIR_LOSSES[name].inputs])
        assert got.item() == pytest.approx(expected, abs=1e-12)


def random_inputs(name: str, size: int = 6, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for key in PAIR_LOSSES[name].inputs:
        if key.endswith("_tokens"):
            inputs.append(torch.randint(1, 9, (size,), generator=generator).double())
        elif key == "likeness":
            inputs.append(torch.rand(size, generator=generator, dtype=torch.float64))
        else:
            inputs.append(-5 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.1)
    return inputs


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - {"aot_unpaired"}))
def test_gradient(name: str) -> None:
    """Not of `aot_unpaired`: its value stands at one side and its gradient at both, as tests/reference holds it to."""
    for options in (options for _, options, _ in GOLDEN[name]):
        inputs = [value.requires_grad_() for value in random_inputs(name)]
        assert torch.autograd.gradcheck(bind(name, options), inputs, atol=1e-8)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_a_pair_does_not_depend_on_its_neighbours(name: str) -> None:
    inputs = random_inputs(name)
    loss = bind(name, {})
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(loss(*[value[order] for value in inputs]), loss(*inputs)[order], atol=1e-12)


@pytest.mark.parametrize("name", sorted(set(PAIR_LOSSES) - set(NOT_BY_PAIR)))
def test_at_no_margin_more_for_the_chosen_lowers_the_loss(name: str) -> None:
    level = {key: column(-2.0).requires_grad_() for key in PAIR_LOSSES[name].inputs}
    level |= {key: column(4.0) for key in level if key.endswith("_tokens")}
    level |= {key: column(0.0) for key in level if key.endswith("_ranked")}
    level |= {key: column(0.5) for key in level if key == "likeness"}
    bind(name, {})(*level.values()).sum().backward()
    assert level["chosen"].grad is not None and level["chosen"].grad.item() < 0
    assert level["rejected"].grad is not None and level["rejected"].grad.item() > 0


def test_losses_that_are_no_pull_apart_are_so() -> None:
    assert NOT_BY_PAIR.keys() <= PAIR_LOSSES.keys()
    for name in ("apo_down", "discopop"):
        level = [column(-2.0).requires_grad_() for _ in PAIR_LOSSES[name].inputs]
        bind(name, {})(*level).sum().backward()
        assert level[0].grad is not None and level[0].grad.item() >= 0


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_extreme_margins_stay_finite(name: str) -> None:
    for options in (options for _, options, _ in GOLDEN[name]):
        for chosen, rejected in ((-1e-9, -1e4), (-1e4, -1e-9), (0.0, 0.0), (0.0, -1.0)):
            values = {"chosen": chosen, "rejected": rejected, "ref_chosen": -5.0, "ref_rejected": -5.0}
            inputs = [torch.tensor([values.get(key, 4.0)], requires_grad=True) for key in PAIR_LOSSES[name].inputs]
            loss = bind(name, options)(*inputs).sum()
            assert loss.isfinite()
            loss.backward()
            assert all(value.grad is None or value.grad.isfinite().all() for value in inputs)


def test_clamps_are_where_they_are_said_to_be() -> None:
    """Past 20 nats an exponent stays, so the loss does too; before, it does not."""
    zero = column(0.0)
    for options in ({"divergence": "forward_kl"}, {"divergence": "alpha", "alpha": 0.5}):
        scale = options.get("alpha", 1.0)
        f_dpo = bind("f_dpo", {**options, "beta": 1e-9})
        at = [f_dpo(zero, column(-ratio / scale), zero, zero).item() for ratio in (19.0, 21.0, 30.0)]
        assert at[0] != at[1] == at[2]
    at = [bind("discopop", {"beta": 1.0, "tau": 100.0})(zero, column(x), zero, zero).item() for x in (19.0, 21.0, 30.0)]
    assert at[1] == pytest.approx(math.exp(20) * sigmoid(-0.21) + 21 * sigmoid(0.21), rel=1e-9)
    assert at[2] == pytest.approx(math.exp(20) * sigmoid(-0.30) + 30 * sigmoid(0.30), rel=1e-9)
    at = [bind("alphapo", {"alpha": 0.5, "beta": 1e-9})(column(-x), zero).item() for x in (38.0, 42.0, 60.0)]
    assert at[0] != at[1] == at[2]


def test_orpo_near_certainty() -> None:
    """log odds of p = 1 - 1e-4 in float32, where 1 - p taken naively has lost three digits; past 1 - 1e-6 it stays."""
    orpo = bind("orpo", {"beta": 1.0, "nll_coef": 0.0})
    half = torch.tensor([HALF])
    got = orpo(half, torch.tensor([math.log1p(-1e-4)])).item()
    assert got == pytest.approx(math.log(1 + 9999), rel=1e-6)
    top = [orpo(half, torch.tensor([value])).item() for value in (0.0, math.log1p(-1e-7))]
    assert top[0] == top[1] == pytest.approx(math.log(1 + 999_999), rel=1e-2)


def test_unpaired_dominance_reaches_both_sides() -> None:
    """d loss / d chosen and rejected by hand: each against the other's value of its own rank."""
    values = {**A, "rejected_ranked": -1.0, "chosen_ranked": 0.25}
    inputs = {key: column(value).requires_grad_() for key, value in values.items()}
    bind("aot_unpaired", {"beta": 0.5})(*inputs.values()).sum().backward()
    assert inputs["chosen"].grad is not None and inputs["rejected"].grad is not None
    assert inputs["chosen"].grad.item() == pytest.approx(-0.5 * sigmoid(-0.5 * (0.5 + 1)))
    assert inputs["rejected"].grad.item() == pytest.approx(0.5 * sigmoid(-0.5 * (0.25 + 0.5)))


def test_swapping_chosen_and_rejected_changes_dpo_by_minus_the_margin() -> None:
    chosen, rejected, ref_chosen, ref_rejected = random_inputs("dpo")
    margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected))
    straight = dpo(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    swapped = dpo(rejected, chosen, ref_rejected, ref_chosen, beta=0.3)
    assert torch.allclose(straight - swapped, -margin, atol=1e-12)


def test_smoothed_dpo_is_least_where_the_policy_is_as_sure_as_the_labels() -> None:
    # With a share e of flipped labels the best margin is log((1 - e) / e), and the loss there is their entropy.
    e, zero = 0.2, column(0.0)
    best = column(math.log((1 - e) / e)).requires_grad_()
    loss = dpo(best, zero, zero, zero, beta=1.0, label_smoothing=e)
    loss.sum().backward()
    assert best.grad is not None and abs(best.grad.item()) < 1e-12
    assert loss.item() == pytest.approx(-e * math.log(e) - (1 - e) * math.log(1 - e), abs=1e-12)
