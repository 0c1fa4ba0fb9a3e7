"""Losses over whole rankings: golden rows worked out by hand, and what must hold for all of them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from kilter.losses import PAIR_LOSSES, RANKED_LOSSES, bind

LN2 = math.log(2)
E1, E3 = math.exp(1.0), math.exp(3.0)
# (logps, ref_logps, group, rank), options, loss of each response
Row = tuple[tuple[list[float], list[float], list[int], list[float]], dict[str, Any], list[float]]
GOLDEN: dict[str, list[Row]] = {
    "dpo_pl": [
        # log-ratios 1, 3, 0 and, of another prompt, 5; beta 1; order: second, first, third
        (
            ([-1.0, -2.0, -4.0, -1.0], [-2.0, -5.0, -4.0, -6.0], [0, 0, 0, 1], [1, 0, 2, 0]),
            {"beta": 1.0},
            [math.log((E1 + 1) / E1), math.log((E1 + E3 + 1) / E3), 0.0, 0.0],
        ),
        # the first two are tied: each stays in the other's sum
        (
            ([-1.0, -2.0, -4.0], [-2.0, -5.0, -4.0], [0, 0, 0], [0, 0, 1]),
            {"beta": 1.0},
            [math.log((E1 + E3 + 1) / E1), math.log((E1 + E3 + 1) / E3), 0.0],
        ),
        # the default beta of 0.1; no margin between three: ln 3! in all
        (([-1.0, -1.0, -1.0], [-2.0, -2.0, -2.0], [0, 0, 0], [2, 0, 1]), {}, [0.0, math.log(3), LN2]),
        (([-1.0, -4.0], [-2.0, -3.0], [0, 0], [0, 1]), {}, [math.log1p(math.exp(-0.2)), 0.0]),
    ],
    # tokens are 4 each
    "tpo": [
        # gold -8, chosen -2, rejected -5; of another prompt, alone with its worse one: gold and nothing to contrast
        (
            ([-2.0, -8.0, -5.0, -6.0, -1.0], [0.0] * 5, [0, 0, 0, 1, 1], [1, 0, 2, 0, 1]),
            {"beta": 1.0, "nll_coef": 0.5},
            [math.log1p(math.exp(-3.0)), 1.0, 0.0, 0.75, 0.0],
        ),
        (
            ([-2.0, -8.0, -5.0], [0.0] * 3, [0, 0, 0], [1, 0, 2]),
            {"beta": 0.5, "label_smoothing": 0.25},
            [0.75 * math.log1p(math.exp(-1.5)) + 0.25 * math.log1p(math.exp(1.5)), 2.0, 0.0],
        ),
        # of four, the second beats two and the third one; a tie is no contrast; the default beta of 0.01
        (
            ([-4.0, -3.0, -2.0, -1.0], [0.0] * 4, [0, 0, 0, 0], [0, 1, 2, 2]),
            {},
            [1.0, math.log1p(math.exp(0.01)) + math.log1p(math.exp(0.02)), 0.0, 0.0],
        ),
        (([-4 * LN2] * 3, [0.0] * 3, [0, 0, 0], [0, 1, 2]), {}, [LN2, LN2, 0.0]),
    ],
    "tpo_l": [
        (
            ([-2.0, -8.0, -5.0, -6.0, -1.0], [0.0] * 5, [0, 0, 0, 1, 1], [1, 0, 2, 0, 1]),
            {"beta": 1.0, "gamma": 1.0, "nll_coef": 0.5},
            [math.log1p(math.exp(-2.0)), 4.0, 0.0, 3.0, 0.0],
        ),
        (
            ([-2.0, -8.0, -5.0], [0.0] * 3, [0, 0, 0], [1, 0, 2]),
            {"beta": 0.5, "gamma": 0.0, "label_smoothing": 0.25},
            [0.75 * math.log1p(math.exp(-1.5)) + 0.25 * math.log1p(math.exp(1.5)), 8.0, 0.0],
        ),
        # the defaults: beta 2, gamma 0.5
        (([-1.0, -2.0, -3.0], [0.0] * 3, [0, 0, 0], [0, 1, 2]), {}, [1.0, math.log1p(math.exp(-1.5)), 0.0]),
        (([-LN2] * 3, [0.0] * 3, [0, 0, 0], [0, 1, 2]), {}, [LN2, math.log1p(math.exp(0.5)), 0.0]),
    ],
}


def given(name: str, columns: tuple[list[Any], ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    logps, ref_logps, group, rank = columns
    made = {
        "logps": torch.tensor(logps, dtype=dtype),
        "ref_logps": torch.tensor(ref_logps, dtype=dtype),
        "group": torch.tensor(group),
        "rank": torch.tensor(rank, dtype=torch.float32),
        "tokens": torch.full((len(rank),), 4.0, dtype=dtype),
    }
    return [made[key] for key in RANKED_LOSSES[name].inputs]


@pytest.mark.parametrize("name", sorted(RANKED_LOSSES))
def test_golden(name: str) -> None:
    assert name in GOLDEN, f"ranked loss {name!r} has no golden row: add one, worked out by hand"
    for columns, options, expected in GOLDEN[name]:
        assert bind(name, options)(*given(name, columns)).tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("name", sorted(RANKED_LOSSES))
def test_gradient(name: str) -> None:
    columns = ([-1.0, -2.5, -4.0, -1.5, -3.0], [-2.0, -5.0, -4.5, -6.0, -1.0], [0, 0, 0, 1, 1], [1.0, 0, 2, 1, 0])
    inputs = [value.requires_grad_(value.dtype == torch.float64) for value in given(name, columns)]
    assert torch.autograd.gradcheck(bind(name, {"beta": 0.7}), inputs, atol=1e-8)


@pytest.mark.parametrize("name", sorted(RANKED_LOSSES))
def test_extreme_log_ratios_stay_finite(name: str) -> None:
    inputs = given(name, ([-1e5, 0.0, -1.0], [-5.0, -5e4, -1.0], [0, 0, 0], [0, 1, 2]), torch.float32)
    inputs[0].requires_grad_()
    loss = bind(name, {})(*inputs).sum()
    loss.backward()
    assert loss.isfinite() and inputs[0].grad is not None and inputs[0].grad.isfinite().all()


def test_of_two_responses_it_is_dpo() -> None:
    logps, ref_logps = [-1.0, -4.0], [-2.0, -3.5]
    ranked = bind("dpo_pl", {"beta": 0.3})(*given("dpo_pl", (logps, ref_logps, [0, 0], [1, 0]))).sum()
    chosen, rejected, ref_chosen, ref_rejected = torch.tensor([[-4.0], [-1.0], [-3.5], [-2.0]], dtype=torch.float64)
    pair = PAIR_LOSSES["dpo"].fn(chosen, rejected, ref_chosen, ref_rejected, beta=0.3)
    assert ranked.item() == pytest.approx(pair.item(), abs=1e-12)
