"""Gradients of embeddings and heads added in place: the same numbers, without a whole table made on the way."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from families import VOCAB, expected, gradients, mixed_loss, trained_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from kilter.models import heads
from kilter.models.build import policy_trunk
from kilter.models.roles import Lora
from kilter.models.tables import adding_in_place
from kilter.models.trunk import Trunk
from kilter.tree import make_batches

BATCHES = make_batches(expected("llama")[0], row_tokens=64, batch_tokens=64)


def answer(trunk: Trunk, *, large: int) -> dict[str, Tensor]:
    """All gradients of a step of several micro-batches; tables of `large` elements and more are added to in place."""
    trunk.zero_grad()
    with trunk.adding_in_place(large=large), trunk.lowered():
        for batch in BATCHES:
            mixed_loss(trunk, batch).backward()
    return {name: grad.clone() for name, grad in gradients(trunk).items()}


class Fresh(TorchDispatchMode):
    """Counts tensors of one shape that operations made anew."""

    def __init__(self, shape: torch.Size) -> None:
        super().__init__()
        self.shape, self.count = shape, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = func(*args, **(kwargs or {}))
        makes = not func._schema.is_mutable and not func.is_view
        self.count += makes and isinstance(found, Tensor) and found.shape == self.shape
        return found


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2", "qwen3", "phi3", "opt", "cohere"])
@pytest.mark.parametrize("chunk_elements", [heads.CHUNK_ELEMENTS, 7 * VOCAB])
def test_the_gradient_is_autograds(family: str, chunk_elements: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(heads, "CHUNK_ELEMENTS", chunk_elements)
    monkeypatch.setitem(heads.target_logprobs.__kwdefaults__, "chunk_elements", chunk_elements)
    trunk = policy_trunk(trained_model(family))
    want, got = answer(trunk, large=1 << 40), answer(trunk, large=1)
    assert want.keys() == got.keys()
    for name, grad in want.items():
        torch.testing.assert_close(got[name], grad, rtol=1e-5, atol=1e-6 * float(grad.abs().max()), msg=name)


def test_no_whole_table_is_made_beside_the_gradient() -> None:
    """A tied table that three micro-batches read twice each."""
    table, head = nn.Embedding(97, 8), nn.Linear(8, 97, bias=False)
    head.weight = table.weight
    counts = []
    for large in (1 << 40, 1):
        table.zero_grad()
        with Fresh(table.weight.shape) as fresh, adding_in_place([table, head], large=large):
            for _ in range(3):
                head(table(torch.arange(5))).square().sum().backward()
        counts.append(fresh.count)
    assert counts[1] == 1 < counts[0]  # the gradient itself


def tables(trunk: Trunk) -> list[Any]:
    model: Any = trunk.models["policy"]
    return [model.get_input_embeddings(), model.get_output_embeddings()]


def test_a_copy_in_bfloat16_adds_to_its_float32_weight() -> None:
    trunk = policy_trunk(trained_model("llama"), compute_dtype=torch.bfloat16)
    want, got = answer(trunk, large=1 << 40), answer(trunk, large=1)
    for name, grad in want.items():
        assert got[name].dtype == torch.float32
        torch.testing.assert_close(got[name], grad, rtol=0.05, atol=0.02 * float(grad.abs().max()), msg=name)


def test_a_padding_row_gets_no_gradient() -> None:
    table = nn.Embedding(6, 3, padding_idx=2)
    ids = torch.tensor([[2, 4], [4, 0]])
    with adding_in_place([table], large=1):
        table(ids).sum().backward()
    assert table.weight.grad is not None
    assert table.weight.grad[:, 0].tolist() == [1.0, 0.0, 0.0, 0.0, 2.0, 0.0]


def test_a_head_with_a_bias() -> None:
    generator = torch.Generator().manual_seed(0)
    head, hidden = nn.Linear(3, 5), torch.randn(4, 3, generator=generator, requires_grad=True)
    weights = torch.randn(4, 5, generator=generator)
    found = []
    for large in (1 << 40, 1):
        head.zero_grad()
        hidden.grad = None
        with adding_in_place([head], large=large):
            (head(hidden) * weights).sum().backward()
        found.append((head.weight.grad, head.bias.grad, hidden.grad))
    for got, want in zip(found[1], found[0], strict=True):
        torch.testing.assert_close(got, want)


def test_what_is_frozen_or_small_or_not_plain_keeps_its_own_forward() -> None:
    trunk = policy_trunk(trained_model("llama"), lora=Lora(2), generator=torch.Generator())
    trunk.train_only("policy")
    with trunk.adding_in_place(large=1):
        assert not any("forward" in vars(table) for table in tables(trunk))
    plain = policy_trunk(trained_model("llama"))
    with plain.adding_in_place():
        assert not any("forward" in vars(table) for table in tables(plain))
    scaled: Any = policy_trunk(trained_model("gemma2")).models["policy"]
    with adding_in_place([scaled.get_input_embeddings()], large=1):
        assert "forward" not in vars(scaled.get_input_embeddings())


def test_the_tables_have_their_own_forward_back_after_an_error() -> None:
    table = nn.Embedding(3, 2)

    def breaks() -> None:
        with adding_in_place([table, None], large=1):
            assert "forward" in vars(table)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        breaks()
    assert "forward" not in vars(table)
