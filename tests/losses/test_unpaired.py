"""Losses over single responses: golden rows worked out by hand, and what must hold for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from kilter.losses import UNPAIRED_LOSSES, bind


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


UP = {"logps": -3.0, "ref_logps": -5.0, "desirable": 1.0, "kl": 0.5, "shift": -1.0}  # log-ratio 2
DOWN = {**UP, "desirable": 0.0}
GOLDEN: dict[str, list[tuple[dict[str, float], dict[str, Any], float]]] = {
    "kto": [
        (UP, {}, 1 - sigmoid(0.15)),
        (DOWN, {}, 1 - sigmoid(-0.15)),
        (UP, {"beta": 2.0, "desirable_weight": 0.5, "undesirable_weight": 7.0}, 0.5 * (1 - sigmoid(3))),
        (DOWN, {"beta": 2.0, "desirable_weight": 7.0, "undesirable_weight": 0.25}, 0.25 * (1 - sigmoid(-3))),
        ({**UP, "kl": 2.0}, {}, 0.5),
    ],
    "apo_zero_unpaired": [
        (UP, {}, 1 - sigmoid(0.2)),
        (DOWN, {}, sigmoid(0.2)),
        (UP, {"beta": 2.0, "desirable_weight": 0.5, "undesirable_weight": 7.0}, 0.5 * (1 - sigmoid(4))),
        (DOWN, {"beta": 2.0, "desirable_weight": 7.0, "undesirable_weight": 0.25}, 0.25 * sigmoid(4)),
    ],
    "bco": [
        (UP, {}, -math.log(sigmoid(0.3))),
        (DOWN, {"beta": 2.0}, -math.log(sigmoid(-6))),
        ({**DOWN, "shift": 2.0}, {}, math.log(2)),
    ],
}


def given(name: str, row: dict[str, float]) -> list[torch.Tensor]:
    return [torch.tensor([row[key]], dtype=torch.float64) for key in UNPAIRED_LOSSES[name].inputs]


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_golden(name: str) -> None:
    assert name in GOLDEN, f"unpaired loss {name!r} has no golden row: add one, worked out by hand"
    for row, options, expected in GOLDEN[name]:
        assert bind(name, options)(*given(name, row)).item() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_gradient(name: str) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = {"kl": (), "shift": ()}
    inputs = {
        key: -3 * torch.rand(shape.get(key, (6,)), generator=generator, dtype=torch.float64)
        for key in UNPAIRED_LOSSES[name].inputs
    }
    inputs["desirable"] = torch.tensor([1.0, 0, 1, 0, 0, 1], dtype=torch.float64)
    for key in ("logps", "ref_logps"):
        inputs[key].requires_grad_()
    assert torch.autograd.gradcheck(bind(name, {"beta": 0.7}), list(inputs.values()), atol=1e-8)


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_a_thumb_up_raises_and_a_thumb_down_lowers(name: str) -> None:
    for row, sign in ((UP, -1), (DOWN, 1)):
        inputs = given(name, row)
        inputs[0].requires_grad_()
        bind(name, {})(*inputs).sum().backward()
        assert inputs[0].grad is not None and inputs[0].grad.item() * sign > 0


@pytest.mark.parametrize("name", sorted(UNPAIRED_LOSSES))
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    for desirable in (0.0, 1.0):
        for logps in (-1e5, 0.0):
            row = {"logps": logps, "ref_logps": -5e4, "desirable": desirable, "kl": 0.0, "shift": 0.0}
            inputs = [torch.tensor([row[key]], requires_grad=True) for key in UNPAIRED_LOSSES[name].inputs]
            loss = bind(name, {})(*inputs).sum()
            loss.backward()
            assert loss.isfinite() and inputs[0].grad is not None and inputs[0].grad.isfinite().all()
