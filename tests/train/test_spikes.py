"""Steps with an unusual gradient: which are told of, and what each row of them is said to have added."""

from __future__ import annotations

import math
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kilter.train import objectives, policy, preferences, rewards, spikes
from kilter.train.checkpoint import CheckpointStore
from kilter.train.loop import TrainState, fit, train_step
from kilter.train.objectives import Objective, prepared
from kilter.train.optimizer import make_optimizer
from kilter.train.reference import with_reference
from kilter.train.sources import GroupSource, with_mismatched
from kilter.train.spikes import FIRST, WINDOW, Spike, Spikes, rows_behind
from kilter.tree import Batch, Group, Response, make_batches, part

METHODS = {
    "sft": (objectives.sft(), ["policy"]),
    "dpo": (preferences.preference("dpo", {"beta": 0.5}), ["policy"]),
    "reward": (rewards.reward_model(), ["reward"]),
    "ppo": (policy.ppo(), ["policy", "value"]),
    "kl in the loss": (policy.policy_gradient(kl_coef=0.1, kl_estimator="exact"), ["policy"]),
}


def named(groups: list[Group]) -> list[Group]:
    return [Group(group.prompt, group.responses, f"rows.jsonl:{place + 1}") for place, group in enumerate(groups)]


def step_of(make: Any, method: str, **held: Any) -> tuple[TrainState, Objective, list[Group]]:
    """A state, an objective and the groups of a step for it."""
    objective, roles = METHODS[method]
    trunk = make.trunk(**held)
    trunk.train_only(*roles)
    groups = named(make.groups(7, extras=make.ppo_extras if method in ("ppo", "kl in the loss") else None))
    if method in ("dpo", "kl in the loss"):
        groups = with_reference(trunk, groups, row_tokens=64, batch_tokens=64)
    return TrainState(trunk, make_optimizer(trunk, roles, learning_rate=0.01)), objective, groups


def cut(groups: list[Group], tokens: int = 60) -> list[Batch]:
    return make_batches(groups, row_tokens=tokens, batch_tokens=tokens)


def flat(state: TrainState) -> Tensor:
    return torch.cat([p.grad.flatten() for p in state.trunk.parameters() if p.grad is not None])


def told_of(state: TrainState, objective: Objective, batches: list[Batch]) -> Spike:
    """What is told of the next step, and what it leaves in the gradients is its own."""
    found: list[Spike] = []
    watch = Spikes(2.0, found.append)
    watch.load_state_dict({"norms": [1e-9] * FIRST})
    train_step(state, objective, batches, max_grad_norm=1e9, spikes=watch)
    (spike,) = found
    return spike


@pytest.fixture(autouse=True)
def _all_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spikes, "ROWS", 99)


@pytest.mark.parametrize("method", METHODS)
def test_a_row_is_said_to_add_what_it_adds(make: Any, method: str) -> None:
    """Each group's own gradient is that of a step with this group alone, over the units of the whole step."""
    state, objective, groups = step_of(make, method)
    batches = cut(groups)
    assert len(batches) > 1
    units = {name: sum(batch.units[name] for batch in batches) for name in batches[0].units}
    spike = told_of(state, objective, batches)
    whole = flat(state)
    assert [row.share for row in spike.rows] == sorted((row.share for row in spike.rows), reverse=True)
    assert sum(row.share for row in spike.rows) == pytest.approx(1, abs=1e-5)
    assert spike.norm == pytest.approx(whole.norm().item(), rel=1e-4) and spike.usual == 1e-9 and spike.step == 1
    state, objective, groups = step_of(make, method)
    for group in groups:
        (batch,) = cut([group])
        state.optimizer.zero_grad()
        out = objective(state.trunk, batch)
        torch.stack([value / units[unit] for value, unit in out.terms.values()]).sum().backward()
        own = torch.cat(
            [
                (torch.zeros_like(p) if p.grad is None else p.grad).flatten()
                for p in state.trunk.parameters()
                if p.requires_grad
            ]
        )
        (row,) = (row for row in spike.rows if row.name == group.name)
        assert row.norm == pytest.approx(own.norm().item(), rel=2e-3, abs=1e-6)
        assert row.share == pytest.approx((own @ whole / whole.norm() ** 2).item(), rel=2e-3, abs=1e-5)
        assert row.texts[0] == (list(group.prompt), list(group.responses[0].ids))


def test_a_loss_that_looks_at_the_whole_step_adds_up_too(make: Any) -> None:
    """KTO's baseline is the step's, and its borrowed responses are no row's."""
    objective = preferences.preference("kto", {})
    trunk = make.trunk()
    trunk.train_only("policy")
    state = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.01))
    thumbs = [
        Group(group.prompt, (Response(group.responses[0].ids, per_response={"desirable": float(at % 2)}),), str(at))
        for at, group in enumerate(make.groups(6))
    ]
    groups = with_reference(trunk, with_mismatched(thumbs), row_tokens=64, batch_tokens=64)
    spike = told_of(state, objective, cut(groups))
    assert sum(row.share for row in spike.rows) == pytest.approx(1, abs=1e-5)
    assert sorted(row.name for row in spike.rows) == [str(at) for at in range(6)]
    assert all(row.texts[0][1] == list(thumbs[int(row.name)].responses[0].ids) for row in spike.rows)


@pytest.mark.parametrize("how", ["checkpointing", "bfloat16", "small tables"])
def test_however_the_trunk_runs(make: Any, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    state, objective, groups = step_of(make, "dpo")
    plain = told_of(state, objective, cut(groups))
    state, objective, groups = step_of(make, "dpo")
    if how == "checkpointing":
        state.trunk.set_checkpointing(True)  # type: ignore[operator]
    elif how == "bfloat16":
        state.trunk.compute_dtype = torch.bfloat16  # type: ignore[assignment]
    else:  # gradients of the tables are made where they are kept, outside of what autograd hands back
        monkeypatch.setattr(state.trunk, "adding_in_place", partial(state.trunk.adding_in_place, large=1))
    spike = told_of(state, objective, cut(groups))
    assert sum(row.share for row in spike.rows) == pytest.approx(1, abs=1e-5 if how != "bfloat16" else 0.02)
    loose = {"rel": 1e-3, "abs": 1e-4} if how != "bfloat16" else {"abs": 0.15}
    shares = [{row.name: row.share for row in one.rows} for one in (plain, spike)]
    assert shares[1] == pytest.approx(shares[0], **loose)


def test_to_look_changes_no_bit(make: Any) -> None:
    after = []
    for watched in (False, True):
        state, objective, groups = step_of(make, "ppo")
        watch = Spikes(2.0, lambda spike: None)
        watch.load_state_dict({"norms": [1e-9] * FIRST})
        train_step(state, objective, cut(groups), max_grad_norm=1.0, spikes=watch if watched else None)
        after.append(torch.cat([p.detach().flatten() for p in state.trunk.parameters()]))
    assert torch.equal(*after)


def test_the_usual_norm_is_the_median_of_the_steps_before() -> None:
    watch = Spikes(3.0, lambda spike: None)
    assert [watch.usual(norm) for norm in (100.0, *[1.0] * (FIRST - 1))] == [None] * FIRST, "too few to know"
    assert watch.usual(3.0) is None, "not more than three times"
    assert watch.usual(3.01) == 1.0
    for _ in range(WINDOW):
        watch.usual(10.0)
    assert watch.usual(29.0) is None, "a level that lasts is the usual one"
    assert watch.usual(math.nextafter(30.0, 31.0)) == 10.0
    again = Spikes(3.0, lambda spike: None)
    again.load_state_dict(watch.state_dict())
    assert again.usual(31.0) == watch.usual(31.0) == 10.0


def test_a_resumed_run_knows_what_is_usual(make: Any, tmp_path: Path) -> None:
    def train(folder: Path, *ends: int) -> list[Spike]:
        found: list[Spike] = []
        for end in ends:
            state, objective, groups = step_of(make, "sft")
            source = GroupSource(groups, batch_groups=1, row_tokens=60, batch_tokens=60, epochs=4, seed=3)
            watch = Spikes(1.2, found.append)
            fit(state, objective, source, steps=end, checkpoints=CheckpointStore(folder), spikes=watch)
        return found

    whole = train(tmp_path / "whole", 28)
    assert whole and whole == train(tmp_path / "parts", 10, 28)


def test_a_part_of_a_batch_keeps_its_names(make: Any) -> None:
    (batch,) = make_batches(named(make.groups(3)), row_tokens=200, batch_tokens=200)
    keep = batch.tree.group != 1
    assert part(batch, keep, extras=()).names == tuple(batch.names[at] for at in (0, 2))


def test_prepared_batches_keep_their_names(make: Any) -> None:
    objective, trunk = preferences.preference("kto", {}), make.trunk()
    thumbs = [
        Group(group.prompt, (Response(group.responses[0].ids, per_response={"desirable": 1.0}),), str(at))
        for at, group in enumerate(make.groups(4))
    ]
    groups = with_reference(trunk, with_mismatched(thumbs), row_tokens=64, batch_tokens=64)
    names = [name for batch in prepared(objective, trunk, cut(groups)) for name in batch.names]
    assert sorted(names) == ["0", "1", "2", "3"]


def test_nothing_of_a_step_is_lost_by_asking_twice(make: Any) -> None:
    state, objective, groups = step_of(make, "sft")
    batches = cut(groups)
    units = {name: sum(batch.units[name] for batch in batches) for name in batches[0].units}
    train_step(state, objective, batches)
    before = flat(state)

    def rows() -> list[spikes.Row]:
        return rows_behind(
            state.trunk,
            objective,
            batches,
            lambda out: torch.stack([value / units[unit] for value, unit in out.terms.values()]).sum(),
            list(state.trunk.parameters()),
        )

    assert rows() == rows()
    assert torch.equal(flat(state), before)
