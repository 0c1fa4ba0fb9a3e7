"""A reference that follows the policy: how it moves, what the batches carry, what is refused."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kilter.errors import ConfigError
from kilter.models.build import policy_trunk
from kilter.models.roles import Lora, Role, add_adapter
from kilter.train.live import LiveReference, ReferenceSync, with_live_reference
from kilter.train.loop import TrainState, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.preferences import preference
from kilter.train.reference import with_reference
from kilter.train.sources import GroupSource
from kilter.tree import make_batches


def moved(trunk: Any) -> Any:
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in trunk.parameters_of("policy"):
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return trunk


def test_the_reference_takes_its_share_of_the_policy_when_it_is_due(make: Any) -> None:
    trunk = moved(policy_trunk(make.llama(), reference=True))
    before = [parameter.clone() for parameter in trunk.parameters_of("reference")]
    policy = [parameter.clone() for parameter in trunk.parameters_of("policy")]
    sync = ReferenceSync(trunk, every=3, mix=0.25)
    for step in (1, 2):
        sync.look(step)
    assert all(torch.equal(a, b) for a, b in zip(before, trunk.parameters_of("reference"), strict=True))
    sync.look(3)
    for own, old, new in zip(trunk.parameters_of("reference"), before, policy, strict=True):
        torch.testing.assert_close(own, 0.25 * new + 0.75 * old)
    ReferenceSync(trunk, every=1).look(4)
    for own, new in zip(trunk.parameters_of("reference"), trunk.parameters_of("policy"), strict=True):
        torch.testing.assert_close(own, new)
    assert all(torch.equal(a, b) for a, b in zip(policy, trunk.parameters_of("policy"), strict=True))


def test_its_state_comes_back(make: Any) -> None:
    trunk = moved(policy_trunk(make.llama(), reference=True))
    sync = ReferenceSync(trunk, every=1, mix=0.5)
    held = sync.state_dict()
    sync.look(1)
    moved_to = [parameter.clone() for parameter in trunk.parameters_of("reference")]
    sync.load_state_dict(held)
    assert not all(torch.equal(a, b) for a, b in zip(moved_to, trunk.parameters_of("reference"), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(held["weights"], trunk.parameters_of("reference"), strict=True))


def test_live_log_probs_are_those_of_the_reference_as_data(make: Any) -> None:
    trunk, groups = moved(policy_trunk(make.llama(), reference=True)), make.groups(6)
    live = with_live_reference(trunk, make_batches(groups, row_tokens=64, batch_tokens=64))
    held = make_batches(with_reference(trunk, groups), row_tokens=64, batch_tokens=64)
    for one, other in zip(live, held, strict=True):
        assert one.ref_logprobs is not None and other.ref_logprobs is not None and not one.ref_logprobs.requires_grad
        torch.testing.assert_close(one.ref_logprobs, other.ref_logprobs)


def test_a_hard_update_each_step_keeps_the_loss_at_its_start(make: Any) -> None:
    """With mix 1 and every 1 the reference is the policy of the step before: each step begins at ln 2."""
    trunk = policy_trunk(make.llama(), reference=True)
    objective = preference("dpo")
    state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=1e-2))
    source = LiveReference(GroupSource(make.groups(12), batch_groups=4, row_tokens=64, batch_tokens=64), trunk)
    sync = ReferenceSync(trunk, every=1)
    losses = []
    for step in range(1, 4):
        losses.append(train_step(state, objective, source.next_step())["loss"])
        sync.look(step)
    assert losses == pytest.approx([0.6931] * 3, abs=1e-4)
    held = source.state_dict()
    assert held["position"] == 12
    source.load_state_dict(held | {"position": 4})
    assert source.state_dict()["position"] == 4


def test_an_adapter_is_followed_by_an_adapter(make: Any) -> None:
    trunk = policy_trunk(make.llama(), lora=Lora(2), generator=torch.Generator().manual_seed(0))
    with pytest.raises(ConfigError, match="another kind of model"):
        ReferenceSync(trunk, every=1)  # the reference is the adapter switched off
    add_adapter(trunk.models["policy"], "reference", Lora(2), torch.Generator().manual_seed(0))
    trunk.add_role("reference", Role("policy", "reference"))
    groups = make.groups(4)
    (batch,) = make_batches(groups, row_tokens=256, batch_tokens=256)
    start = with_live_reference(trunk, [batch])[0].ref_logprobs
    moved(trunk)
    ReferenceSync(trunk, every=1).look(1)
    followed = with_live_reference(trunk, [batch])[0].ref_logprobs
    assert start is not None and followed is not None and not torch.allclose(start, followed)
    torch.testing.assert_close(followed, trunk(batch.tree, {"policy": "logprobs"})["policy"].detach())


def test_a_model_of_another_shape_cannot_follow(make: Any) -> None:
    trunk = policy_trunk(make.llama())
    trunk.add_model("reference", make.llama(hidden=32))
    trunk.add_role("reference", Role("reference"))
    with pytest.raises(ConfigError, match="of the policy's own shape"):
        ReferenceSync(trunk, every=1)
    shared = policy_trunk(make.llama())
    shared.add_role("reference", Role("policy"))
    with pytest.raises(ConfigError, match="another kind of model"):
        ReferenceSync(shared, every=1)
