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


LN2 = math.log(2)
# name -> rows of (inputs by name, options, loss in nats). The arithmetic is written out; no loss computes its own row.
GOLDEN: dict[str, list[tuple[dict[str, float], dict[str, Any], float]]] = {
    "dpo": [
        # margin = 0.5 * ((-1 + 1.5) - (-3 + 2.5)) = 0.5
        (
            {"chosen": -1.0, "rejected": -3.0, "ref_chosen": -1.5, "ref_rejected": -2.5},
            {"beta": 0.5, "label_smoothing": 0.1},
            -0.9 * log_sigmoid(0.5) - 0.1 * log_sigmoid(-0.5),
        ),
        # the default beta of 0.1, no smoothing: margin = 0.1 * ((-4 + 2) - (-3 + 9)) = -0.8
        ({"chosen": -4.0, "rejected": -3.0, "ref_chosen": -2.0, "ref_rejected": -9.0}, {}, -log_sigmoid(-0.8)),
        # no margin
        ({"chosen": -4.0, "rejected": -3.0, "ref_chosen": -2.0, "ref_rejected": -1.0}, {"label_smoothing": 0.3}, LN2),
    ],
}


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
        else:
            inputs.append(-5 * torch.rand(size, generator=generator, dtype=torch.float64) - 0.1)
    return inputs


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_gradient(name: str) -> None:
    inputs = [value.requires_grad_() for value in random_inputs(name)]
    assert torch.autograd.gradcheck(bind(name, {}), inputs, atol=1e-8)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_a_pair_does_not_depend_on_its_neighbours(name: str) -> None:
    inputs = random_inputs(name)
    loss = bind(name, {})
    order = torch.tensor([3, 1, 5, 0, 2, 4])
    assert torch.allclose(loss(*[value[order] for value in inputs]), loss(*inputs)[order], atol=1e-12)


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_at_no_margin_more_for_the_chosen_lowers_the_loss(name: str) -> None:
    level = [column(4.0 if key.endswith("_tokens") else -2.0).requires_grad_() for key in PAIR_LOSSES[name].inputs]
    bind(name, {})(*level).sum().backward()
    grads = dict(zip(PAIR_LOSSES[name].inputs, level, strict=True))
    assert grads["chosen"].grad is not None and grads["chosen"].grad.item() < 0
    assert grads["rejected"].grad is not None and grads["rejected"].grad.item() > 0


@pytest.mark.parametrize("name", sorted(PAIR_LOSSES))
def test_extreme_margins_stay_finite(name: str) -> None:
    for chosen, rejected in ((-1.0, -1e4), (-1e4, -1.0)):
        values = {"chosen": chosen, "rejected": rejected, "ref_chosen": -5.0, "ref_rejected": -5.0}
        inputs = [torch.tensor([values.get(key, 4.0)], requires_grad=True) for key in PAIR_LOSSES[name].inputs]
        bind(name, {})(*inputs).sum().backward()
        assert all(value.grad is None or value.grad.isfinite().all() for value in inputs)


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
