"""However roles are held, the joint gradient is that of separate runs, and nobody's `requires_grad` is touched."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from families import expected, trained_model
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from kilter.errors import ModelError
from kilter.models.adapters import load_adapter, save_adapter
from kilter.models.build import policy_trunk, ppo_trunk, reward_trunk
from kilter.models.roles import Lora, Role, add_adapter, lora_layers, plain_tensors
from kilter.models.trunk import Trunk
from kilter.tree import make_batch

LORA = Lora(rank=3, alpha=6.0)


def stirred(trunk: Trunk) -> Trunk:
    """Adapters and heads away from zero, so that they matter."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in trunk.named_parameters():
            if ".lora_" in name or name.startswith("heads."):
                parameter.normal_(std=0.3, generator=generator)
    return trunk


def held(way: str) -> Trunk:
    generator = torch.Generator().manual_seed(3)
    model = trained_model("llama")
    if way == "copies":
        return stirred(ppo_trunk(model, None))
    if way == "adapters":
        return stirred(ppo_trunk(model, None, lora=LORA, generator=generator))
    return stirred(ppo_trunk(model, None, value="policy", lora=LORA, generator=generator))


def loss_of(trunk: Trunk, asks: list[dict[str, str]]) -> dict[str, Tensor]:
    """Gradients of one backward over the sum of what each forward in `asks` gives, weighted at random."""
    batch = make_batch([expected("llama")[0][:4], expected("llama")[0][4:8]])
    trunk.zero_grad()
    total = torch.zeros(())
    for ask in asks:
        for role, numbers in trunk(batch.tree, ask).items():
            total = total + (batch.extras["mix"] * numbers * (2.0 if role == "value" else 1.0)).sum()
    total.backward()
    return {name: p.grad.clone() for name, p in trunk.named_parameters() if p.grad is not None}


def assert_same(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        torch.testing.assert_close(grad, other[name], rtol=1e-4, atol=1e-5 * float(grad.abs().max()), msg=name)


POLICY, VALUE = {"policy": "logprobs"}, {"value": "values"}


@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointed"])
@pytest.mark.parametrize("way", ["copies", "adapters", "head on the policy"])
def test_joint_gradient_is_that_of_separate_runs(way: str, checkpointing: bool) -> None:
    trunk = held(way)
    policy, value = loss_of(trunk, [POLICY]), loss_of(trunk, [VALUE])
    separate = {name: policy.get(name, 0) + value.get(name, 0) for name in policy.keys() | value.keys()}
    assert all(separate[name].abs().max() > 0 for name in separate)
    trunk.set_checkpointing(checkpointing)
    assert_same(loss_of(trunk, [POLICY | VALUE]), separate)
    assert_same(loss_of(trunk, [POLICY, VALUE]), separate)  # two forwards, one backward
    assert_same(loss_of(trunk, [VALUE, POLICY]), separate)


def test_the_usual_checkpoint_function_is_red() -> None:
    """What the test above is for: recomputed without the role, the first forward's gradient is silently wrong."""
    trunk = held("adapters")
    right = loss_of(trunk, [POLICY, VALUE])
    for model in trunk.models.values():
        model._set_gradient_checkpointing(
            True, lambda function, *args: checkpoint(function, *args, use_reentrant=False)
        )
    try:
        wrong = loss_of(trunk, [POLICY, VALUE])
    except RuntimeError:  # torch noticed that other tensors were saved
        return
    assert any(name not in wrong or (wrong[name] - grad).norm() > 0.5 * grad.norm() for name, grad in right.items())


def test_gradients_reach_only_the_role_asked() -> None:
    trunk = held("adapters")
    found = loss_of(trunk, [POLICY])
    assert found and all(".policy." in name for name in found)
    found = loss_of(trunk, [VALUE])
    assert found and all(".value." in name or name == "heads.value.weight" for name in found)


def test_reference_is_the_trunk_with_adapters_off() -> None:
    batch = make_batch([expected("llama")[0][:4]])
    before = policy_trunk(trained_model("llama"))(batch.tree, POLICY)["policy"]
    trunk = held("adapters")
    found = trunk(batch.tree, {"reference": "logprobs"} | POLICY)
    assert torch.equal(found["reference"], before)
    assert (found["policy"] - before).abs().max() > 0.1
    assert not found["reference"].requires_grad


def test_fresh_adapter_changes_nothing() -> None:
    batch = make_batch([expected("llama")[0][:4]])
    trunk = policy_trunk(trained_model("llama"), lora=LORA, generator=torch.Generator().manual_seed(0))
    found = trunk(batch.tree, {"reference": "logprobs", "policy": "logprobs"})
    assert torch.equal(found["reference"], found["policy"])


def test_a_forward_touches_no_requires_grad() -> None:
    trunk = held("adapters")
    before = {name: p.requires_grad for name, p in trunk.named_parameters()}
    loss_of(trunk, [POLICY, VALUE])
    with trunk.acting_as("reference"):
        pass
    assert {name: p.requires_grad for name, p in trunk.named_parameters()} == before


def test_acting_as_gives_the_roles_model() -> None:
    trunk = held("adapters")
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        with trunk.acting_as("policy") as model:
            policy = model(ids).logits
        with trunk.acting_as("reference") as model:
            reference = model(ids).logits
            with trunk.acting_as("policy"):
                assert torch.equal(model(ids).logits, policy)
            assert torch.equal(model(ids).logits, reference)
    assert (policy - reference).abs().max() > 0.1


@pytest.mark.parametrize("way", ["copies", "adapters", "head on the policy"])
def test_parameters_of_are_those_that_get_gradients(way: str) -> None:
    trunk = held(way)
    for role, ask in (("policy", POLICY), ("value", VALUE)):
        trainable = {id(p) for p in trunk.parameters_of(role)}
        found = loss_of(trunk, [ask])
        assert {id(p) for name, p in trunk.named_parameters() if name in found} == trainable


def test_train_only_freezes_the_rest() -> None:
    trunk = held("copies")
    kept = trunk.train_only("value")
    assert {id(p) for p in kept} == {id(p) for p in trunk.parameters() if p.requires_grad}
    assert all(name.startswith(("models.value", "heads.value")) for name in loss_of(trunk, [VALUE]))


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "qwen3_moe"])
def test_merged_adapter_is_the_adapter(family: str) -> None:
    batch = make_batch([expected(family)[0][:4]])
    trunk = stirred(policy_trunk(trained_model(family), lora=LORA, generator=torch.Generator().manual_seed(0)))
    merged = trained_model(family)
    with torch.no_grad():
        merged.load_state_dict(plain_tensors(trunk.models["policy"], "policy"))
        torch.testing.assert_close(
            policy_trunk(merged)(batch.tree, POLICY)["policy"],
            trunk(batch.tree, POLICY)["policy"],
            rtol=1e-4,
            atol=1e-4,
        )


def test_adapter_goes_through_a_folder(tmp_path: Path) -> None:
    batch = make_batch([expected("llama")[0][:4]])
    trunk = held("adapters")
    for role in ("policy", "value"):
        save_adapter(trunk, role, tmp_path / role)
    other = Trunk({"base": trained_model("llama")}, {})
    load_adapter(other, "policy", tmp_path / "policy", model="base")
    load_adapter(other, "value", tmp_path / "value", model="base")
    assert other.roles == {"policy": Role("base", "policy"), "value": Role("base", "value", "value")}
    with torch.no_grad():
        want, got = trunk(batch.tree, POLICY | VALUE), other(batch.tree, POLICY | VALUE)
    assert torch.equal(want["policy"], got["policy"]) and torch.equal(want["value"], got["value"])


def test_adapter_of_another_trunk_is_refused(tmp_path: Path) -> None:
    save_adapter(held("adapters"), "policy", tmp_path / "policy")
    model = trained_model("llama")
    with torch.no_grad():
        next(model.parameters())[0, 0] += 1e-3
    trunk = Trunk({"base": model}, {})
    with pytest.raises(ModelError, match="trained on the trunk"):
        load_adapter(trunk, "policy", tmp_path / "policy", model="base")
    assert not lora_layers(model)
    with pytest.raises(ModelError, match=r"no kilter\.json"):
        load_adapter(trunk, "policy", tmp_path, model="base")


def test_reward_adapter_starts_the_value_on_the_policys_trunk(tmp_path: Path) -> None:
    """Four roles on one trunk: the reward model was an adapter on it, so the value is a second adapter."""
    batch = make_batch([expected("llama")[0][:4]])
    rewarder = stirred(reward_trunk(trained_model("llama"), lora=LORA, generator=torch.Generator().manual_seed(0)))
    save_adapter(rewarder, "reward", tmp_path / "reward" / "adapter")
    trunk = ppo_trunk(trained_model("llama"), tmp_path / "reward", lora=LORA, generator=torch.Generator())
    assert set(trunk.models) == {"policy"} and trunk.roles["value"] == Role("policy", "value", "value")
    with torch.no_grad():
        want = rewarder(batch.tree, {"reward": "values"})["reward"]
        assert torch.equal(trunk(batch.tree, VALUE)["value"], want)


def test_adapter_targets_are_checked() -> None:
    model = trained_model("mixtral")
    with pytest.raises(ModelError, match=r"lora\.targets"):
        add_adapter(model, "policy", Lora(targets=("no_such_layer",)), torch.Generator())
    add_adapter(model, "policy", Lora(targets=("q_proj",)), torch.Generator())
    assert all(name.endswith("q_proj") for name in lora_layers(model))
    with pytest.raises(ModelError, match="already"):
        add_adapter(model, "policy", LORA, torch.Generator())


def test_adding_an_adapter_freezes_and_thaws_nothing() -> None:
    """peft would freeze the model and the adapters that are there; who trains is not its business."""
    model = trained_model("llama")
    model.lm_head.weight.requires_grad_(False)
    add_adapter(model, "policy", LORA, torch.Generator())
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    assert set(before.values()) == {True, False}
    add_adapter(model, "value", LORA, torch.Generator())
    after = {name: p.requires_grad for name, p in model.named_parameters()}
    assert {name: after[name] for name in before} == before
    assert all(after[name] for name in after.keys() - before.keys())


def test_adapter_is_drawn_from_its_generator() -> None:
    found = []
    for seed in (0, 0, 1):
        model = trained_model("llama")
        add_adapter(model, "policy", LORA, torch.Generator().manual_seed(seed))
        found.append(next(iter(lora_layers(model).values())).lora_A["policy"].weight)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
