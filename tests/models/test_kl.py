"""The exact KL to another role and the entropy: of the models' own distributions, with their gradients, in chunks."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from families import (
    VOCAB,
    expected,
    gradient_gap,
    gradients,
    mixed,
    some_groups,
    trained_model,
    untouched_model,
)
from torch import Tensor

from kilter.errors import ModelError
from kilter.models import heads
from kilter.models.build import policy_trunk, reward_trunk
from kilter.models.roles import Lora, Role, plain_tensors
from kilter.models.trunk import Trunk
from kilter.tree import Batch, Group, empty_batch, make_batch

ASK = {"policy": "kl:reference"}
FAMILIES = ["llama", "gemma2", "granite", "cohere", "gpt2", "opt", "olmo2", "bloom"]


def other_model(family: str) -> Any:
    """Of the family, with other weights: near enough for every term of the sum to count."""
    model = trained_model(family)
    far = untouched_model(family, seed=7).state_dict()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.lerp_(far[name], 0.3)
    return model


def pair(family: str) -> Trunk:
    models = {"policy": trained_model(family), "reference": other_model(family).requires_grad_(False)}
    return Trunk(models, {name: Role(name) for name in models})


def distributions(model: Any, group: Group, ids: tuple[int, ...]) -> Tensor:
    """float64[n, V]: log-probs of every token at each position of a response, by a forward of the response alone."""
    logits = model(input_ids=torch.tensor([group.prompt + ids])).logits[0].double()
    return logits[len(group.prompt) - 1 : -1].log_softmax(-1)


def slow_kl(policy: Any, reference: Any, groups: list[Group]) -> list[Tensor]:
    """KL at every scored position, in float64 by untouched models, from the definition."""
    found = []
    for group in groups:
        for response in group.responses:
            ours = distributions(policy, group, response.ids)
            with torch.no_grad():
                theirs = distributions(reference, group, response.ids)
            own = (ours.exp() * (ours - theirs)).sum(-1)
            spans = response.spans or ((0, len(response.ids)),)
            found.append(torch.cat([own[start:end] for start, end in spans]))
    return found


def plain(family: str, weights: dict[str, Tensor]) -> Any:
    model = untouched_model(family).double()
    model.load_state_dict(weights)
    return model


def cut_in_rows(groups: list[Group]) -> Batch:
    return make_batch([groups[:6], groups[6:11], groups[11:]])


@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_kl_of_the_untouched_models_and_so_is_its_gradient(family: str) -> None:
    groups = mixed(some_groups())
    batch, trunk = cut_in_rows(groups), pair(family)
    policy, reference = (plain(family, trunk.models[name].state_dict()) for name in ("policy", "reference"))
    slow = torch.cat(slow_kl(policy, reference, groups))
    stats = trunk(batch.tree, ASK)["policy"]
    assert stats.shape == (len(slow), 3) and stats.dtype == torch.float32
    assert float(slow.detach().mean()) > 0.05
    torch.testing.assert_close(stats[:, 1].double(), slow, rtol=1e-4, atol=1e-4)
    (slow * batch.extras["mix"]).sum().backward()
    (stats[:, 1] * batch.extras["mix"]).sum().backward()
    gap, where = gradient_gap(gradients(trunk.models["policy"]), gradients(policy))
    assert gap <= 1e-4, where
    assert all(parameter.grad is None for parameter in trunk.models["reference"].parameters())


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_the_log_probs_beside_it_are_the_bits_of_those_asked_for_alone(family: str) -> None:
    trunk, tree = pair(family), cut_in_rows(mixed(some_groups())).tree
    alone = trunk(tree, {"policy": "logprobs", "reference": "logprobs"})
    stats = trunk(tree, ASK)["policy"]
    assert torch.equal(stats[:, 0], alone["policy"]) and torch.equal(stats[:, 2], alone["reference"])
    parameters = list(trunk.models["policy"].parameters())
    for one, two in zip(
        torch.autograd.grad(stats[:, 0].sum(), parameters, allow_unused=True),
        torch.autograd.grad(alone["policy"].sum(), parameters, allow_unused=True),
        strict=True,
    ):
        torch.testing.assert_close(one, two)


def test_a_reference_that_may_train_gets_no_gradient() -> None:
    """Nor does the policy through it, where the two are one model: the KL to oneself is flat."""
    trunk = pair("llama")
    trunk.models["reference"].requires_grad_(True)
    held: list[bool] = []
    decoder = trunk.models["reference"].model
    decoder.register_forward_hook(lambda _, __, out: held.append(out.last_hidden_state.requires_grad))
    trunk(cut_in_rows(mixed(some_groups())).tree, ASK)["policy"].sum().backward()
    assert all(parameter.grad is None for parameter in trunk.models["reference"].parameters())
    assert held == [False], "no activations are kept for it"
    trunk.zero_grad()
    trunk.roles["reference"] = Role("policy")
    kl = trunk(cut_in_rows(mixed(some_groups())).tree, ASK)["policy"][:, 1]
    kl.sum().backward()
    assert not kl.any()
    assert max(float(grad.abs().max()) for grad in gradients(trunk.models["policy"]).values()) < 1e-4


@pytest.mark.parametrize("checkpointing", [False, True])
def test_with_adapters_the_reference_is_the_model_without(checkpointing: bool) -> None:
    groups = mixed(some_groups())
    trunk = policy_trunk(
        trained_model("llama"), reference=True, lora=Lora(3), generator=torch.Generator().manual_seed(0)
    )
    trunk.set_checkpointing(checkpointing)
    batch = cut_in_rows(groups)
    assert not trunk(batch.tree, ASK)["policy"][:, 1].any()  # B is zero
    with torch.no_grad():
        for parameter in trunk.parameters_of("policy"):
            parameter.normal_(std=0.1, generator=torch.Generator().manual_seed(1))
    held = trunk.models["policy"]
    adapted, bare = (
        plain("llama", {name: value.detach() for name, value in plain_tensors(held, adapter).items()})
        for adapter in ("policy", None)
    )
    slow = torch.cat(slow_kl(adapted, bare, groups)).detach()
    assert float(slow.mean()) > 0.01
    kl = trunk(batch.tree, ASK)["policy"][:, 1]
    torch.testing.assert_close(kl.double(), slow, rtol=1e-4, atol=1e-4)
    kl.sum().backward()
    learned = {name for name, parameter in trunk.named_parameters() if parameter.grad is not None}
    assert learned and all("lora" in name for name in learned)
    # Along the gradient the KL moves as fast as it says: a difference quotient of the whole forward.
    slope = math.sqrt(sum(float(p.grad.double().square().sum()) for p in trunk.parameters_of("policy")))
    step = 1e-3
    ends = []
    for sign in (1, -1):
        moved = copy.deepcopy(trunk)
        with torch.no_grad():
            for parameter, own in zip(moved.parameters_of("policy"), trunk.parameters_of("policy"), strict=True):
                parameter.add_(sign * step / slope * own.grad)
            ends.append(float(moved(batch.tree, ASK)["policy"][:, 1].double().sum()))
    assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(slope, rel=1e-2)


def test_in_chunks_is_the_whole() -> None:
    policy, reference = trained_model("gemma2"), other_model("gemma2")
    generator = torch.Generator().manual_seed(0)
    target = torch.randint(VOCAB, (10,), generator=generator)
    hidden, ref_hidden = torch.randn(2, 10, 32, generator=generator)
    found = []
    for chunk_elements in (heads.CHUNK_ELEMENTS, 3 * VOCAB, 1):
        at = hidden.clone().requires_grad_()
        policy.zero_grad()
        to = heads.Other(reference, ref_hidden)
        stats = heads.whole_stats(policy, at, target, to=to, chunk_elements=chunk_elements)
        (stats[:, 1] * torch.arange(10)).sum().backward()
        found.append((stats.detach(), at.grad, policy.get_output_embeddings().weight.grad.clone()))
    for one in found[1:]:
        for got, want in zip(one, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    logits = [heads.logits_of(model, row).double() for model, row in ((policy, hidden), (reference, ref_hidden))]
    (p, q) = (row.softmax(-1).tolist() for row in logits)
    slow = [sum(a * math.log(a / b) for a, b in zip(*rows, strict=True)) for rows in zip(p, q, strict=True)]
    assert found[0][0][:, 1].tolist() == pytest.approx(slow, abs=1e-5)


def test_no_more_than_a_chunk_of_either_model_is_held(monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference, sizes, right = trained_model("llama"), other_model("llama"), [], heads.logits_of

    def watched(model: Any, hidden: Tensor) -> Tensor:
        logits = right(model, hidden)
        sizes.append((model is policy, logits.numel()))
        return logits

    monkeypatch.setattr(heads, "logits_of", watched)
    hidden = torch.randn(10, 32, requires_grad=True)
    to = heads.Other(reference, hidden.detach())
    stats = heads.whole_stats(policy, hidden, torch.arange(10), to=to, chunk_elements=4 * VOCAB)
    assert len(sizes) == 6  # three chunks of each
    stats.sum().backward()
    assert max(size for _, size in sizes) == 4 * VOCAB and sum(own for own, _ in sizes) == 6 == len(sizes) / 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "cohere", "bloom"])
def test_the_entropy_and_its_gradient_are_the_untouched_models(family: str) -> None:
    groups = mixed(some_groups())
    batch, trunk = cut_in_rows(groups), pair(family)
    policy, found = plain(family, trunk.models["policy"].state_dict()), []
    for group in groups:
        for response in group.responses:
            logp = distributions(policy, group, response.ids)
            own = -(logp.exp() * logp).sum(-1)
            spans = response.spans or ((0, len(response.ids)),)
            found.append(torch.cat([own[start:end] for start, end in spans]))
    slow = torch.cat(found)
    stats = trunk(batch.tree, {"policy": "entropy"})["policy"]
    assert stats.shape == (len(slow), 2)
    torch.testing.assert_close(stats[:, 1].double(), slow, rtol=1e-4, atol=1e-4)
    (slow * batch.extras["mix"]).sum().backward()
    (stats[:, 1] * batch.extras["mix"]).sum().backward()
    gap, where = gradient_gap(gradients(trunk.models["policy"]), gradients(policy))
    assert gap <= 1e-4, where


def test_entropy_and_kl_are_the_columns_of_each_alone() -> None:
    trunk, tree = pair("llama"), cut_in_rows(mixed(some_groups())).tree
    entropy, kl, both = (
        trunk(tree, {"policy": want})["policy"] for want in ("entropy", "kl:reference", "entropy+kl:reference")
    )
    assert torch.equal(both, torch.cat([kl, entropy[:, 1:]], dim=1))
    assert torch.equal(entropy[:, 0], trunk(tree, {"policy": "logprobs"})["policy"])
    assert torch.equal(trunk(tree, {"policy": "token_stats"})["policy"][:, 1], entropy[:, 1])


def test_the_entropy_in_chunks_is_the_whole() -> None:
    model, found = trained_model("gemma2"), []
    generator = torch.Generator().manual_seed(0)
    hidden, target = torch.randn(10, 32, generator=generator), torch.arange(10)
    for chunk_elements in (heads.CHUNK_ELEMENTS, 3 * VOCAB, 1):
        at = hidden.clone().requires_grad_()
        stats = heads.whole_stats(model, at, target, entropy=True, chunk_elements=chunk_elements)
        (stats[:, 1] * torch.arange(10)).sum().backward()
        found.append((stats.detach(), at.grad))
    for one in found[1:]:
        for got, want in zip(one, found[0], strict=True):
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


def test_each_model_and_each_head_runs_once() -> None:
    trunk, calls = pair("llama"), []
    for name, model in trunk.models.items():
        model.get_output_embeddings().register_forward_hook(lambda *_, name=name: calls.append(f"{name} head"))
        model.model.register_forward_hook(lambda *_, name=name: calls.append(name))
    trunk(cut_in_rows(mixed(some_groups())).tree, ASK)
    assert sorted(calls) == ["policy", "policy head", "reference", "reference head"]


def test_an_empty_batch_runs_and_gives_zero_gradients() -> None:
    trunk = pair("llama")
    stats = trunk(empty_batch(cut_in_rows(mixed(some_groups()))).tree, ASK)["policy"]
    stats.sum().backward()
    assert stats.shape == (0, 3)
    for parameter in trunk.models["policy"].parameters():
        assert parameter.grad is not None and not parameter.grad.any()


def test_in_bfloat16_the_gradient_stays_near() -> None:
    batch, found = cut_in_rows(expected("llama")[0]), []
    for dtype in (None, torch.bfloat16):
        trunk = pair("llama")
        trunk.compute_dtype = dtype
        with trunk.lowered():
            trunk(batch.tree, ASK)["policy"][:, 1].sum().backward()
        found.append(torch.cat([grad.flatten() for grad in gradients(trunk.models["policy"]).values()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.98


def test_what_cannot_be_compared_is_refused() -> None:
    trunk, tree = pair("llama"), cut_in_rows(mixed(some_groups())).tree
    with pytest.raises(ModelError, match=r"no role 'older'; it has policy, reference"):
        trunk(tree, {"policy": "kl:older"})
    with pytest.raises(ModelError, match=r"choose one of .*rewards, entropy, kl:ROLE, entropy\+kl:ROLE"):
        trunk(tree, {"policy": "kl"})
    trunk.models["reference"].config.vocab_size = VOCAB + 3
    with pytest.raises(ModelError, match="vocabularies of 61 and 64 tokens"):
        trunk(tree, ASK)
    rewarder = reward_trunk(trained_model("llama"), generator=torch.Generator())
    rewarder.roles["policy"] = Role("reward")
    with pytest.raises(ModelError, match="no language head"):
        rewarder(tree, {"policy": "kl:reward"})
