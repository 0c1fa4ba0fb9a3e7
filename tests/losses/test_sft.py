"""Next-token losses: values and gradients worked out by hand."""

from __future__ import annotations

import math

import pytest
import torch

from kilter.losses import dft, nll


def test_nll() -> None:
    assert nll(torch.tensor([-1.5, -math.log(8)])).tolist() == pytest.approx([1.5, math.log(8)])


def test_dft_weights_each_token_by_its_probability_which_has_no_gradient() -> None:
    logprobs = torch.tensor([math.log(0.5), math.log(0.25)], dtype=torch.float64, requires_grad=True)
    losses = dft(logprobs)
    assert losses.tolist() == pytest.approx([0.5 * math.log(2), 0.25 * math.log(4)])
    losses.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == pytest.approx([-0.5, -0.25])
