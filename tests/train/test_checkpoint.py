"""Checkpoints are complete and atomic: ten steps are five, a save, a load and five, and a kill loses no more."""

from __future__ import annotations

import os
import random
import signal
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor

from kilter.errors import DataError, RunError
from kilter.train import objectives, policy
from kilter.train.checkpoint import CheckpointStore, GeneratorState, from_files, to_files
from kilter.train.loop import TrainState, fit
from kilter.train.optimizer import make_optimizer, make_schedule
from kilter.train.sources import GroupSource


class Controller:
    """Something else that training changes: a number, a buffer of tensors, a nested list."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)
        self.kl_coef = 0.1
        self.buffer: list[Any] = []

    def turn(self) -> None:
        self.kl_coef *= 1 + float(torch.rand((), generator=self.generator))
        self.buffer = [{"rows": [torch.rand(2, generator=self.generator), "text", None]}]

    def state_dict(self) -> dict[str, Any]:
        return {"kl_coef": self.kl_coef, "buffer": self.buffer, "rng": self.generator.get_state()}

    def load_state_dict(self, state: dict[str, Any], /) -> None:
        self.kl_coef, self.buffer = state["kl_coef"], state["buffer"]
        self.generator.set_state(state["rng"])


def run(make: Any, folder: Path | None, steps: int, *, batch_groups: int = 5, **options: Any) -> tuple[TrainState, Any]:
    trunk = make.trunk()
    optimizer = make_optimizer(trunk, ["policy", "value"], learning_rate=0.01, weight_decay=0.1)
    state = TrainState(trunk, optimizer, make_schedule("cosine", steps=10, warmup_steps=2))
    groups = make.groups(12, extras=make.ppo_extras)
    source = GroupSource(groups, batch_groups=batch_groups, row_tokens=40, batch_tokens=80, epochs=9, seed=4)
    controller = Controller()
    also = {"controller": controller, "generator": GeneratorState(torch.Generator().manual_seed(1))}
    store = None if folder is None else CheckpointStore(folder)
    objective = policy.ppo()
    fit(
        state,
        objective,
        source,
        steps=steps,
        checkpoints=store,
        also=also,
        on_step=lambda *_: controller.turn(),
        **options,
    )
    return state, controller


def everything(state: TrainState) -> dict[str, Tensor]:
    found = {name: p.detach() for name, p in state.trunk.named_parameters()}
    for number, entry in enumerate(state.optimizer.state.values()):
        found |= {f"{number}/{key}": value for key, value in entry.items()}
    return found


def test_ten_steps_are_five_a_save_a_load_and_five(make: Any, tmp_path: Path) -> None:
    whole, controller = run(make, None, 10)
    run(make, tmp_path / "checkpoints", 5)
    resumed, other = run(make, tmp_path / "checkpoints", 10)
    one, two = everything(whole), everything(resumed)
    assert one.keys() == two.keys()
    assert all(torch.equal(one[name], two[name]) for name in one)
    assert controller.kl_coef == other.kl_coef
    assert torch.equal(controller.buffer[0]["rows"][0], other.buffer[0]["rows"][0])
    assert other.buffer[0]["rows"][1:] == ["text", None]
    # and it is a test that can fail: fewer steps, other weights
    assert not torch.equal(
        everything(run(make, None, 9)[0])["models.policy.lm_head.weight"], one["models.policy.lm_head.weight"]
    )


def test_only_what_trains_is_saved_and_nothing_is_pickled(make: Any, tmp_path: Path) -> None:
    run(make, tmp_path / "checkpoints", 2)
    folder = tmp_path / "checkpoints" / "step-000002"
    assert {path.suffix for path in folder.iterdir()} == {".safetensors", ".json"}
    names = safetensors.torch.load_file(folder / "weights.safetensors").keys()
    assert names and all(name.startswith(("models.policy", "models.critic", "heads.value")) for name in names)


def test_the_last_checkpoints_are_kept(make: Any, tmp_path: Path) -> None:
    run(make, tmp_path / "checkpoints", 7, checkpoint_every=2)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-000006", "step-000007"]
    assert CheckpointStore(tmp_path / "checkpoints").latest_step() == 7
    assert CheckpointStore(tmp_path / "none").latest_step() is None


def test_what_a_kill_leaves_is_not_taken_for_a_checkpoint(make: Any, tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / ".step-000004.part"
    half.mkdir(parents=True)
    (half / "weights.safetensors").write_bytes(b"half of it")
    assert CheckpointStore(tmp_path / "checkpoints").latest_step() is None
    run(make, tmp_path / "checkpoints", 4)
    assert not half.exists()


def test_a_checkpoint_of_another_run_is_refused(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "checkpoints"
    run(make, folder, 1)
    trunk = make.trunk()
    narrow = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.01))
    store = CheckpointStore(folder)
    with pytest.raises(RunError, match="train different weights"):
        store.load_weights(narrow, 1)
    with pytest.raises(RunError, match=r"differ in controller, generator, source; start a new run"):
        store.load(1, narrow, {})
    groups = make.groups(11, extras=make.ppo_extras)
    source = GroupSource(groups, batch_groups=5, row_tokens=40, batch_tokens=80, seed=4)
    with pytest.raises(DataError, match="num_groups 12 and now has 11"):
        source.load_state_dict({"position": 0, "seed": 4, "num_groups": 12})
    (folder / "step-000001" / "state.json").write_text('{"format": 99, "step": 1, "stopped": false, "processes": 1}')
    with pytest.raises(RunError, match="layout 99"):
        store.load(1, narrow, {})
    (folder / "step-000001" / "state.json").write_text('{"format": 2, "step": 1, "stopped": false, "processes": 2}')
    with pytest.raises(RunError, match="written by 2 processes, and now there are 1"):
        store.load(1, narrow, {})


def test_another_shape_is_refused(make: Any, tmp_path: Path) -> None:
    run(make, tmp_path / "checkpoints", 1)
    file = tmp_path / "checkpoints" / "step-000001" / "weights.safetensors"
    held = safetensors.torch.load_file(file)
    held["heads.value.weight"] = torch.zeros(1, 3)
    safetensors.torch.save_file(held, file)
    with pytest.raises(RunError, match=r"heads.value.weight is \[1, 3\] there and \[1, 16\] here"):
        run(make, tmp_path / "checkpoints", 2)


def test_states_with_tensors_go_through_files() -> None:
    state = {"a": [1, 2.5, None, True, "x"], "b": {"t": torch.arange(3), "u": [torch.zeros(0)]}, "c": (1, 2)}
    plain, tensors = to_files(state)
    back = from_files(plain, tensors)
    assert back["a"] == state["a"]
    assert back["c"] == [1, 2]
    assert torch.equal(back["b"]["t"], torch.arange(3))
    assert back["b"]["u"][0].shape == (0,)
    for wrong, place in (({"a": {1: 2}}, "key 1"), ({"a": [object()]}, "state at a.0: object")):
        with pytest.raises(TypeError, match=place):
            to_files(wrong)


def train_sixty_steps(make: Any, folder: Path, result: Path) -> None:
    trunk = make.trunk()
    state = TrainState(trunk, make_optimizer(trunk, ["policy"], learning_rate=0.01))
    source = GroupSource(make.groups(12), batch_groups=4, row_tokens=40, batch_tokens=80, epochs=40)
    fit(state, objectives.sft(), source, steps=60, checkpoints=CheckpointStore(folder), checkpoint_every=3)
    weights = {name: p.detach() for name, p in trunk.named_parameters() if name.startswith("models.policy")}
    safetensors.torch.save_file(weights, result)


def start_fork(function: Callable[[], None]) -> int:
    """Runs a function in a fork of this process; returns its process id."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        function()
        status = 0
    finally:
        traceback.print_exc()
        os._exit(status)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")
def test_killed_at_ten_random_moments_the_same_command_ends_with_the_same_bytes(make: Any, tmp_path: Path) -> None:
    def again(name: str = "killed") -> None:
        train_sixty_steps(make, tmp_path / name, tmp_path / f"{name}.safetensors")

    assert os.waitpid(start_fork(lambda: again("whole")), 0)[1] == 0
    rng = random.Random(0)
    store = CheckpointStore(tmp_path / "killed")
    kills = 0
    for _ in range(10):
        wanted = (store.latest_step() or 0) + rng.choice([0, 3, 3, 6])
        pid = start_fork(again)
        while (store.latest_step() or 0) < wanted and not (tmp_path / "killed.safetensors").exists():
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.05))  # anywhere in a step, a write, a rename
        os.kill(pid, signal.SIGKILL)
        kills += os.waitpid(pid, 0)[1] == signal.SIGKILL
    assert kills >= 5
    assert (store.latest_step() or 0) > 3
    assert os.waitpid(start_fork(again), 0)[1] == 0
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
