"""On a GPU the loop takes the same step as on the CPU; skipped without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kilter.train import objectives, policy, preferences, rewards
from kilter.train.checkpoint import CheckpointStore
from kilter.train.loop import TrainState, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.reference import with_reference
from kilter.tree import make_batches

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "ppo"])
def test_a_step_on_a_gpu_is_a_step_on_the_cpu(name: str, make: Any, tmp_path: Any) -> None:
    objective: Any = {
        "sft": objectives.sft(),
        "dpo": preferences.preference("dpo"),
        "reward": rewards.reward_model(),
        "ppo": policy.ppo(),
    }[name]
    rows = []
    for device in ("cpu", "cuda"):
        trunk = make.trunk().to(device)
        groups = with_reference(trunk, make.groups(6, k=3, extras=make.ppo_extras))
        state = TrainState(trunk, make_optimizer(trunk, objective.roles, learning_rate=0.01))
        batches = make_batches(groups, row_tokens=64, batch_tokens=128)
        rows.append(train_step(state, objective, batches))
        store = CheckpointStore(tmp_path / device)
        store.save(state, {})
        before = [p.detach().clone() for p in trunk.parameters()]
        store.resume(state, {})
        assert all(torch.equal(a, b) for a, b in zip(before, trunk.parameters(), strict=True))
    assert rows[1] == pytest.approx(rows[0], rel=1e-3, abs=1e-5)
