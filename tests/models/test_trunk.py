"""The trunk's one forward: what it reads, what it must not read, and in which type."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from families import VOCAB, expected, gradients, mixed_loss, trained_model
from torch import Tensor

from kilter.errors import ModelError
from kilter.models import heads
from kilter.models.attention import attention_kinds
from kilter.models.build import policy_trunk, ppo_trunk, reward_trunk
from kilter.models.roles import Lora
from kilter.models.trunk import Trunk, decoder
from kilter.tree import Batch, Group, Response, empty_batch, make_batch, make_tree, unroll


def two_rows() -> Batch:
    """Several trees in one row, one and a long tail in the other."""
    groups = expected("llama")[0]
    return make_batch([groups[:5], groups[5:6]])


def answer(trunk: Trunk, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """The mixed loss and all gradients."""
    trunk.zero_grad()
    loss = mixed_loss(trunk, batch)
    loss.backward()
    return loss.detach(), {name: grad.clone() for name, grad in gradients(trunk).items()}


def assert_bit_equal(one: tuple[Tensor, dict[str, Tensor]], other: tuple[Tensor, dict[str, Tensor]]) -> None:
    assert torch.equal(one[0], other[0])
    assert [name for name in one[1] if not torch.equal(one[1][name], other[1][name])] == []


@pytest.mark.parametrize("family", ["llama", "gemma2", "bloom"])
def test_poison_in_tails(family: str) -> None:
    """Other tokens and positions in the unused tail: loss and gradient are the same bits."""
    batch = two_rows()
    trunk = policy_trunk(trained_model(family))
    clean = answer(trunk, batch)
    tail = batch.tree.segment < 0
    assert tail.any()
    tokens = torch.where(tail, torch.randint(VOCAB, tail.shape), batch.tree.tokens)
    positions = torch.where(tail, 9, batch.tree.positions)
    poisoned = replace(batch, tree=replace(batch.tree, tokens=tokens, positions=positions))
    assert_bit_equal(answer(trunk, poisoned), clean)


@pytest.mark.parametrize("family", ["llama", "granite"])
def test_poison_outside_source(family: str) -> None:
    """NaN in every final hidden state that predicts no target, tails among them: the same bits."""
    batch = two_rows()
    model = trained_model(family)
    trunk = policy_trunk(model)
    clean = answer(trunk, batch)
    read = torch.zeros(batch.tree.tokens.numel(), dtype=torch.bool)
    read[batch.tree.source] = True
    assert not read.all()

    def poison(_module, _args, output):
        hidden = output.last_hidden_state
        output.last_hidden_state = torch.where(read.view(*hidden.shape[:2], 1), hidden, torch.nan)
        return output

    hook = decoder(model).register_forward_hook(poison)
    poisoned = answer(trunk, batch)
    hook.remove()
    assert_bit_equal(poisoned, clean)


def test_head_in_chunks_is_the_head() -> None:
    model = trained_model("gemma2")
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(VOCAB, (10,), generator=generator)
    hidden = torch.randn(10, 32, generator=generator)
    found = []
    for chunk_elements in (heads.CHUNK_ELEMENTS, 3 * VOCAB, 1):
        at = hidden.clone().requires_grad_()
        model.zero_grad()
        logprobs = heads.target_logprobs(model, at, target, chunk_elements=chunk_elements)
        (logprobs * torch.arange(10)).sum().backward()
        found.append((logprobs.detach(), at.grad, model.get_output_embeddings().weight.grad.clone()))
    for one in found[1:]:
        for got, want in zip(one, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    assert float(found[0][0].max()) < 0


def test_token_stats_are_of_the_models_own_distribution() -> None:
    model = trained_model("gemma2")  # caps its logits
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(VOCAB, (10,), generator=generator)
    hidden = torch.randn(10, 32, generator=generator).requires_grad_()
    probabilities = torch.softmax(heads.logits_of(model, hidden.detach()).double(), -1)
    entropy = [-sum(p * math.log(p) for p in row) for row in probabilities.tolist()]
    collision = [math.log(sum(p * p for p in row)) for row in probabilities.tolist()]
    for chunk_elements in (heads.CHUNK_ELEMENTS, 3 * VOCAB):
        stats = heads.token_stats(model, hidden, target, chunk_elements=chunk_elements)
        assert stats[:, 1].tolist() == pytest.approx(entropy, abs=1e-5)
        assert stats[:, 2].tolist() == pytest.approx(collision, abs=1e-5)
        alone = heads.target_logprobs(model, hidden, target)
        torch.testing.assert_close(stats[:, 0], alone)
        ours, plain = (torch.autograd.grad(value.sum(), hidden)[0] for value in (stats, alone))
        torch.testing.assert_close(ours, plain)  # entropy and collision add none


def test_head_never_holds_more_than_a_chunk(monkeypatch: pytest.MonkeyPatch) -> None:
    model = trained_model("llama")
    sizes = []
    right = heads.logits_of

    def watched(model, hidden):
        logits = right(model, hidden)
        sizes.append(logits.numel())
        return logits

    monkeypatch.setattr(heads, "logits_of", watched)
    hidden = torch.randn(10, 32, requires_grad=True)
    heads.target_logprobs(model, hidden, torch.arange(10), chunk_elements=4 * VOCAB).sum().backward()
    assert max(sizes) == 4 * VOCAB and len(sizes) == 6  # three chunks, each once more in the backward


def test_unrolled_is_packed() -> None:
    """A family that takes trees gives the same either way."""
    batch = two_rows()
    model = trained_model("qwen3")
    trunk = policy_trunk(model)
    loss, packed = answer(trunk, batch)
    trunk.layout = "unrolled"
    other, unrolled = answer(trunk, batch)
    assert abs(float(loss - other)) < 1e-4
    for name, grad in packed.items():
        torch.testing.assert_close(unrolled[name], grad, rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)
    tree = unroll(batch.tree)
    trunk.layout = "packed"
    alone, _ = answer(trunk, replace(batch, tree=tree))
    assert abs(float(loss - alone)) < 1e-4


def test_rewards_are_read_at_last_and_values_at_source() -> None:
    batch = two_rows()
    trunk = reward_trunk(trained_model("llama"), generator=torch.Generator().manual_seed(0))
    rewards = trunk(batch.tree, {"reward": "rewards"})["reward"]
    values = trunk(batch.tree, {"reward": "values"})["reward"]
    hidden = trunk.models["reward"](
        batch.tree.tokens[:1, : len(expected("llama")[0][0].prompt) + 1], use_cache=False
    ).last_hidden_state[0]
    assert rewards.shape == batch.tree.last.shape and values.shape == batch.tree.source.shape
    depth = len(expected("llama")[0][0].prompt)
    torch.testing.assert_close(values[:2], trunk.heads["reward"](hidden[depth - 1 : depth + 1]), rtol=1e-5, atol=1e-5)
    response = expected("llama")[0][0].responses[0]
    path = torch.tensor([expected("llama")[0][0].prompt + response.ids])
    own = trunk.heads["reward"](trunk.models["reward"](path, use_cache=False).last_hidden_state[0, -1:])
    torch.testing.assert_close(rewards[:1], own, rtol=1e-5, atol=1e-5)


def test_roles_of_one_adapter_share_one_forward() -> None:
    trunk = ppo_trunk(trained_model("llama"), None, value="policy")
    calls = []
    decoder(trunk.models["policy"]).register_forward_hook(lambda *_: calls.append(1))
    found = trunk(two_rows().tree, {"policy": "logprobs", "value": "values"})
    assert len(calls) == 1 and list(found) == ["policy", "value"]


def test_empty_batch_runs_and_gives_zero_gradients() -> None:
    trunk = policy_trunk(trained_model("llama"))
    loss = mixed_loss(trunk, empty_batch(two_rows()))
    loss.backward()
    assert float(loss.detach()) == 0
    for name, parameter in trunk.named_parameters():
        assert parameter.grad is not None and not parameter.grad.any(), name


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_bfloat16_compute_keeps_float32_gradients(family: str) -> None:
    batch = two_rows()
    loss, grads = answer(policy_trunk(trained_model(family)), batch)
    trunk = policy_trunk(trained_model(family), compute_dtype=torch.bfloat16)
    logprobs = trunk(batch.tree, {"policy": "logprobs"})["policy"]
    assert logprobs.dtype == torch.float32
    rough, rough_grads = answer(trunk, batch)
    assert rough != loss
    whole = torch.cat([grad.flatten() for grad in grads.values()])
    rough_whole = torch.cat([grad.flatten() for grad in rough_grads.values()])
    assert rough_whole.dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(whole, rough_whole, dim=0) > 0.98


@pytest.mark.parametrize("family", ["llama", "gemma3", "gpt2", "mixtral"])
def test_copies_in_bfloat16_are_functions_of_the_weights(family: str) -> None:
    """Plain, checkpointed and with an adapter: the forward sees bfloat16 weights, the gradient reaches float32 ones."""
    batch = two_rows()
    found = []
    for checkpointing in (False, True):
        trunk = policy_trunk(trained_model(family), compute_dtype=torch.bfloat16)
        trunk.set_checkpointing(checkpointing)
        names = [name for name, _ in trunk.named_parameters()]
        seen: list[torch.dtype] = []
        inner = decoder(trunk.models["policy"])
        inner.register_forward_hook(lambda _, __, out, seen=seen: seen.append(out.last_hidden_state.dtype))
        with trunk.lowered():
            assert not any(True for _ in trunk.models.parameters())
            mixed_loss(trunk, batch).backward()
        assert set(seen) == {torch.bfloat16}
        assert [name for name, _ in trunk.named_parameters()] == names
        grads = {name: parameter.grad for name, parameter in trunk.named_parameters()}
        assert all(grad is None or grad.dtype == torch.float32 for grad in grads.values())
        found.append(grads)
    for name, grad in found[0].items():
        assert (grad is None) == (found[1][name] is None)
        if grad is not None:
            torch.testing.assert_close(found[1][name], grad, msg=name)


def test_copies_are_gone_after_a_fault() -> None:
    trunk = policy_trunk(
        trained_model("llama"),
        lora=Lora(2),
        generator=torch.Generator().manual_seed(0),
        compute_dtype=torch.bfloat16,
    )
    before = {name: id(parameter) for name, parameter in trunk.named_parameters()}
    with pytest.raises(ZeroDivisionError), trunk.lowered():
        raise ZeroDivisionError
    assert {name: id(parameter) for name, parameter in trunk.named_parameters()} == before
    batch = two_rows()
    with trunk.lowered():
        inside = trunk(batch.tree, {"policy": "logprobs"})["policy"]
    assert torch.equal(inside, trunk(batch.tree, {"policy": "logprobs"})["policy"])
    trunk.compute_dtype = None
    exact = trunk(batch.tree, {"policy": "logprobs"})["policy"]
    assert not torch.equal(inside, exact) and (inside - exact).abs().max() < 0.5


def test_what_is_not_there_is_refused() -> None:
    trunk = policy_trunk(trained_model("llama"))
    tree = make_tree([[Group((3,), (Response((4,)),))]])
    with pytest.raises(ModelError, match=r"no role 'value'; it has policy"):
        trunk(tree, {"value": "values"})
    with pytest.raises(ModelError, match="asked for 'logits'"):
        trunk(tree, {"policy": "logits"})
    with pytest.raises(ModelError, match="no scalar head"):
        trunk(tree, {"policy": "rewards"})
    rewarder = reward_trunk(trained_model("llama"), generator=torch.Generator())
    with pytest.raises(ModelError, match="no language head"):
        rewarder(tree, {"reward": "logprobs"})


def test_models_that_cannot_take_a_tree_are_known() -> None:
    for family in ("bloom", "mamba"):
        assert isinstance(attention_kinds(decoder(trained_model(family))), str)
    model = trained_model("llama")
    model.config.layer_types = ["full_attention", "chunked_attention"]
    assert attention_kinds(model) == "LlamaForCausalLM has layers of type 'chunked_attention'"
