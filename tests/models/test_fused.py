"""Norms and rotations with written derivatives: transformers' numbers forward, autograd's backward."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from families import CONFIGS, untouched_model
from torch import Tensor, nn
from transformers.models.llama import modeling_llama

from kilter.models.fused import FUSED, fuse

OWN_NORMS = {"gemma2", "gemma3", "olmo2"}  # w + 1; back to bfloat16 only at the end
LAYER_NORMS = {"gpt2", "gpt_neox", "opt", "bloom", "cohere"}
NO_ROTATION = {"gpt2", "opt", "bloom", "mamba"}
OTHER_ROTATION = {"cohere", "olmo2"}  # pairs side by side; back to bfloat16


def is_fused(module: nn.Module) -> bool:
    return FUSED in vars(type(module))


@pytest.mark.parametrize("family", CONFIGS)
def test_what_is_known_is_replaced(family: str) -> None:
    model = untouched_model(family)
    names = [type(module).__name__ for module in model.modules()]
    fuse(model)
    norms = [is_fused(module) for module in model.modules() if "Norm" in type(module).__name__]
    attentions = [is_fused(module) for module in model.modules() if type(module).__name__.endswith("Attention")]
    assert set(norms) == {family not in OWN_NORMS | LAYER_NORMS}
    assert set(attentions) == (set() if family == "mamba" else {family not in NO_ROTATION | OTHER_ROTATION})
    assert [type(module).__name__ for module in model.modules()] == names
    classes = [type(module) for module in model.modules()]
    fuse(model)
    assert [type(module) for module in model.modules()] == classes


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "mamba"])
def test_a_model_says_the_same(family: str) -> None:
    """Forward to the bit; gradients to rounding."""
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        model = untouched_model(family)
        if fused:
            fuse(model)
        logits = model(input_ids=ids, use_cache=False).logits
        logits.log_softmax(-1)[..., 7].square().mean().backward()
        found.append((logits.detach(), {name: parameter.grad for name, parameter in model.named_parameters()}))
    (theirs, their_grads), (ours, grads) = found
    assert torch.equal(ours, theirs)
    for name, grad in grads.items():
        assert (grad is None) == (their_grads[name] is None)
        if grad is not None:
            gap = (grad - their_grads[name]).norm() / their_grads[name].norm().clamp(min=1e-6)
            assert gap < 1e-5, name


def gradients(function: Callable[..., Tensor], *inputs: Tensor) -> list[Tensor]:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    out = function(*inputs)
    weights = torch.linspace(-1.0, 2.0, out.numel()).view_as(out)
    (out.float() * weights).sum().backward()
    return [out.detach(), *(x.grad for x in inputs if x.grad is not None)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(3, 16), (2, 5, 16), (2, 5, 3, 16)])
def test_norm(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    theirs: Any = modeling_llama.LlamaRMSNorm(16, eps=0.3)
    with torch.no_grad():
        theirs.weight.copy_(torch.randn(16, generator=generator))
    theirs.to(dtype)
    ours = copy.deepcopy(theirs)
    fuse(ours)
    assert is_fused(ours) and not is_fused(theirs)
    x = torch.randn(shape, generator=generator).to(dtype)
    (out, grad), (their_out, their_grad) = gradients(ours, x), gradients(theirs, x)
    assert torch.equal(out, their_out) and out.dtype == grad.dtype == dtype
    bound = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(grad, their_grad, rtol=bound, atol=bound)
    torch.testing.assert_close(ours.weight.grad, theirs.weight.grad, rtol=bound, atol=5 * bound)


def test_norm_keeps_little_for_the_backward() -> None:
    def kept(norm: nn.Module) -> int:
        sizes: dict[int, int] = {}

        def note(tensor: Tensor) -> Tensor:
            sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            norm(torch.randn(64, 16, requires_grad=True)).sum().backward()
        return sum(sizes.values())

    theirs = modeling_llama.LlamaRMSNorm(16)
    before = kept(theirs)
    fuse(theirs)
    assert kept(theirs) == 4 * (64 * 16 + 64 + 16) < before


def attention_forward() -> Any:
    model = untouched_model("llama")
    fuse(model)
    return type(model.model.layers[0].self_attn).forward.__globals__["apply_rotary_pos_emb"]


@pytest.mark.parametrize("width", [8, 6])
def test_rotation(width: int) -> None:
    """All of a head, and a narrower table than a head, which transformers refuses and so does ours."""
    ours, theirs = attention_forward(), modeling_llama.apply_rotary_pos_emb
    generator = torch.Generator().manual_seed(0)
    q, k = (torch.randn(2, heads, 5, 8, generator=generator) for heads in (4, 2))
    cos, sin = (torch.randn(2, 5, width, generator=generator) for _ in range(2))
    if width < 8:
        with pytest.raises(RuntimeError):
            ours(q, k, cos, sin)
        return
    for place in (0, 1):
        got = gradients(lambda q, k, place=place: ours(q, k, cos, sin)[place], q, k)
        want = gradients(lambda q, k, place=place: theirs(q, k, cos, sin)[place], q, k)
        assert torch.equal(got[0], want[0])
        for mine, other in zip(got[1:], want[1:], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-6)
    across = [f(q.transpose(1, 2), k.transpose(1, 2), cos, sin, unsqueeze_dim=2)[1] for f in (ours, theirs)]
    assert torch.equal(*across)


def test_others_keep_theirs() -> None:
    """Only the attentions of the model itself call the new rotation, and a copy of a norm has weights of its own."""
    model = untouched_model("llama")
    function = modeling_llama.apply_rotary_pos_emb
    fuse(model)
    assert modeling_llama.apply_rotary_pos_emb is function
    assert not is_fused(untouched_model("llama").model.layers[0].self_attn)
    twin = copy.deepcopy(model.model.norm)
    with torch.no_grad():
        twin.weight.zero_()
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    assert is_fused(twin) and not twin(x).any() and model.model.norm(x).any()


def test_a_norm_that_does_more_stays() -> None:
    class Clipped(modeling_llama.LlamaRMSNorm):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states).clamp(-1.2, 1.2)

    norm = Clipped(16)
    fuse(norm)
    assert type(norm) is Clipped


@pytest.mark.parametrize("family", [family for family in CONFIGS if family != "mamba"])
@pytest.mark.parametrize("way", ["bfloat16", "autocast"])
def test_a_model_in_bfloat16_says_the_same(family: str, way: str) -> None:
    ids = torch.randint(3, 60, (2, 12), generator=torch.Generator().manual_seed(0))
    found = []
    for fused in (False, True):
        model = untouched_model(family)
        if way == "bfloat16":
            model.to(torch.bfloat16)
        if fused:
            fuse(model)
        with torch.autocast("cpu", torch.bfloat16, enabled=way == "autocast"), torch.no_grad():
            found.append(model(input_ids=ids, use_cache=False).logits)
    assert found[0].dtype == found[1].dtype and torch.equal(*found)


def test_a_frozen_weight_gets_no_gradient() -> None:
    norm: Any = modeling_llama.LlamaRMSNorm(16)
    fuse(norm)
    norm.weight.requires_grad_(False)
    x = torch.randn(3, 16, requires_grad=True)
    norm(x).sum().backward()
    assert norm.weight.grad is None and x.grad is not None
