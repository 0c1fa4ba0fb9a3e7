"""World size is not a hyper-parameter: two gloo processes take the steps of one, under DDP and FSDP2.

Every objective, with unequal numbers of micro-batches, a process without any group, figures included; then training
that is saved and resumed by two processes.
"""

from __future__ import annotations

import functools
import json
import os
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor

from kilter.errors import CheckError
from kilter.losses import UNPAIRED_LOSSES, preference_losses
from kilter.models.build import policy_trunk
from kilter.models.roles import Lora
from kilter.models.shard import whole
from kilter.train import distributed, objectives, policy, preferences, rewards
from kilter.train.checkpoint import CheckpointStore
from kilter.train.loop import TrainState, fit, measure, train_step
from kilter.train.optimizer import make_optimizer
from kilter.train.preferences import Term
from kilter.train.reference import with_reference
from kilter.train.sources import GroupSource, with_mismatched
from kilter.tree import Batch, Group, make_batches

pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")

OBJECTIVES: dict[str, Callable[[], Any]] = {
    "sft": objectives.sft,
    **{name: functools.partial(preferences.preference, name) for name in preference_losses()},
    "mixture": functools.partial(preferences.mixture, [Term("aot"), Term("nll", weight=0.3), Term("dpo_pl")]),
    "reward": functools.partial(rewards.reward_model, centring_coef=0.05),
    "rewards of two heads": functools.partial(
        rewards.reward_model, "plackett_luce", heads=("reward", "value"), centring_coef=0.05
    ),
    "reward apart from length": functools.partial(rewards.reward_model, length_coef=0.5),
    "ppo": policy.ppo,
    "exact kl and entropy": functools.partial(
        policy.policy_gradient, kl_coef=0.1, kl_estimator="exact", entropy_coef=0.1
    ),
}


def two_processes(function: Callable[[int], None], folder: Path) -> None:
    """Runs a function of the rank in two forks of this process that meet over gloo."""
    children = []
    for rank in range(2):
        pid = os.fork()
        if pid == 0:
            status = 1
            try:
                os.environ["GLOO_SOCKET_IFNAME"] = "lo"
                dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=2)
                function(rank)
                dist.barrier()
                dist.destroy_process_group()
                status = 0
            except Exception:  # noqa: BLE001
                traceback.print_exc()
                sys.stderr.flush()
            finally:
                os._exit(status)
        children.append(pid)
    statuses = [os.waitpid(pid, 0)[1] for pid in children]
    (folder / "meet").unlink(missing_ok=True)
    assert statuses == [0, 0]


def groups_for(make: Any, name: str, count: int) -> list[Group]:
    groups = make.groups(count, k=3, extras=make.ppo_extras)
    if name in UNPAIRED_LOSSES:
        groups = [
            replace(group, responses=(replace(group.responses[0], per_response={"desirable": float(place % 2)}),))
            for place, group in enumerate(groups)
        ]
        groups = with_mismatched(groups)
    return with_reference(make.trunk(), groups)


def cut(groups: list[Group], tokens: int) -> list[Batch]:
    return make_batches(groups, row_tokens=tokens, batch_tokens=tokens)


def one_step(
    trunk: Any, name: str, batches: list[Batch], how: Any = None
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """The gradient that an optimizer step is made of, by name, and the step's figures."""
    objective = OBJECTIVES[name]()
    trunk.train_only(*objective.roles)
    wrapped = distributed.wrap(trunk, how) if how else trunk
    optimizer = make_optimizer(wrapped, objective.roles, learning_rate=0.01)
    figures = train_step(TrainState(wrapped, optimizer), objective, batches, max_grad_norm=1e9)
    grads = {name: whole(p.grad).clone() for name, p in trunk.named_parameters() if p.grad is not None}
    return grads, figures | {f"eval/{k}": v for k, v in measure(wrapped, objective, batches).items()}


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_take_the_step_of_one(how: str, make: Any, tmp_path: Path) -> None:
    cases = {name: groups_for(make, name, 7) for name in OBJECTIVES}

    def work(rank: int) -> None:
        for name, groups in cases.items():
            for case, held in (("seven", groups), ("one", groups[:1])):  # of one, the second process has nothing
                own = cut(distributed.share_of(held), 60 if rank == 0 else 200)
                grads, figures = one_step(make.trunk(), name, own, how)
                if rank == 0:
                    safetensors.torch.save_file(grads, tmp_path / f"{name}-{case}.safetensors")
                    (tmp_path / f"{name}-{case}.json").write_text(json.dumps(figures))

    two_processes(work, tmp_path)
    for name, groups in cases.items():
        for case, held in (("seven", groups), ("one", groups[:1])):
            expected, figures = one_step(make.trunk(), name, cut(held, 10_000))
            got = safetensors.torch.load_file(tmp_path / f"{name}-{case}.safetensors")
            assert got.keys() == expected.keys()
            norm = torch.cat([grad.flatten() for grad in expected.values()]).norm()
            assert norm > 1e-3
            for place, grad in expected.items():
                gap = (got[place] - grad).norm() / max(grad.norm(), 1e-3 * norm)
                assert gap <= 1e-5, f"{name} {case} {place}: {gap:.1e}"
            assert json.loads((tmp_path / f"{name}-{case}.json").read_text()) == pytest.approx(
                figures, rel=1e-3, abs=1e-5
            )


def trained(make: Any, how: Any, steps: int, folder: Path | None, result: Path | None) -> None:
    """Trains DPO with LoRA for some steps; rank 0 writes the adapter."""
    trunk = policy_trunk(make.llama(0), lora=Lora(rank=4), generator=torch.Generator().manual_seed(0))
    objective = preferences.preference("dpo", {"beta": 1.0})
    trunk.train_only("policy")
    groups = with_reference(trunk, make.groups(9))
    wrapped = distributed.wrap(trunk, how) if how else trunk
    state = TrainState(wrapped, make_optimizer(wrapped, ["policy"], learning_rate=0.01))
    source = GroupSource(groups, batch_groups=5, row_tokens=60, batch_tokens=120, epochs=9, seed=1)
    store = None if folder is None else CheckpointStore(folder)
    fit(state, objective, source, steps=steps, checkpoints=store)
    weights = {name: whole(p.detach()) for name, p in trunk.named_parameters() if ".lora_" in name}
    if distributed.rank() == 0 and result is not None:
        safetensors.torch.save_file(weights, result)


@pytest.mark.parametrize("how", ["ddp", "fsdp2"])
def test_two_processes_train_save_and_resume_like_one(how: str, make: Any, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        trained(make, how, 6, None, tmp_path / "whole.safetensors")
        trained(make, how, 3, tmp_path / "checkpoints", None)
        trained(make, how, 6, tmp_path / "checkpoints", tmp_path / "resumed.safetensors")

    two_processes(work, tmp_path)
    assert (tmp_path / "whole.safetensors").read_bytes() == (tmp_path / "resumed.safetensors").read_bytes()
    names = {path.name for path in (tmp_path / "checkpoints" / "step-000006").iterdir()}
    assert {"parts-0.json", "parts-1.json"} <= names
    trained(make, None, 6, None, tmp_path / "one.safetensors")
    one, two = (safetensors.torch.load_file(tmp_path / f"{name}.safetensors") for name in ("one", "whole"))
    assert one.keys() == two.keys()
    for name, value in one.items():
        assert torch.allclose(two[name], value, atol=1e-4), name


def test_a_bad_gradient_on_one_process_is_refused_by_both(make: Any, tmp_path: Path) -> None:
    def work(rank: int) -> None:
        groups = make.groups(4, extras=make.ppo_extras)
        groups[1].responses[0].per_token["advantages"][0] = float("nan")  # in the second process's share
        trunk = make.trunk()
        trunk.train_only("policy")
        wrapped = distributed.wrap(trunk, "ddp")
        state = TrainState(wrapped, make_optimizer(wrapped, ["policy"], learning_rate=0.01))
        before = torch.cat([p.detach().flatten() for p in trunk.parameters()])
        batches = cut(distributed.share_of(groups), 100)
        with pytest.raises(CheckError, match=f"its batches are in .*step-000000-rank-{rank}"):
            train_step(state, policy.ppo(value=None), batches, failures=tmp_path)
        assert torch.equal(torch.cat([p.detach().flatten() for p in trunk.parameters()]), before)

    two_processes(work, tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_bytes_are_gathered_from_all(tmp_path: Path) -> None:
    def work(rank: int) -> None:
        assert distributed.gather_bytes(b"" if rank else b"first\0") == [b"first\0", b""]
        assert (distributed.rank(), distributed.world_size()) == (rank, 2)

    two_processes(work, tmp_path)
    assert distributed.gather_bytes(b"alone") == [b"alone"]
