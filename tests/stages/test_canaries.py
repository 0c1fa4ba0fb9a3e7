"""Canaries of a stage's guard: what they write, that they leave no trace, and what is refused."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import small

import kilter
from kilter.config import DataRef, GuardConfig, PolicyConfig, parse, stage_inputs
from kilter.errors import ConfigError
from kilter.rundir import read_jsonl
from kilter.stages.guard import check_guard

ASKED = {"path": "kilter.world:prompts", "options": {"split": "held_out", "per_kind": 3, "kinds": ["harmful"]}}


def stage(**guard: Any) -> dict[str, Any]:
    given = {"model": "kilter.world:MODEL_PATH", "reward": "kilter.world:true_reward", "snapshots": 0}
    return {**small.RL, **given, "guard": guard}


def run(folder: Path, **guard: Any) -> tuple[list[dict[str, Any]], str]:
    """The rows of rollouts, and the hash of the weights."""
    made = kilter.align({"stages": {"rl": stage(**guard)}}, out=folder).path / "stages" / "01-rl"
    rows = [row for row in read_jsonl(made / "metrics.jsonl") if "rollout/score" in row]
    return rows, hashlib.sha256((made / "result" / "model.safetensors").read_bytes()).hexdigest()


def test_they_are_asked_now_and_then_and_leave_no_trace(tmp_path: Path) -> None:
    canaries = [
        {"name": "safety", "prompts": ASKED, "reward": "kilter.world:true_reward", "every": 2},
        {"name": "all", "prompts": small.PROMPTS, "reward": "kilter.world:true_reward", "every": 1},
    ]
    rows, weights = run(tmp_path / "asked", canaries=canaries)
    safety = ["rollout/canary/safety" in row for row in rows]
    assert safety == [True, False, True]
    assert all("rollout/canary/all" in row and row["rollout/canary/all_sem"] > 0 for row in rows)
    assert len({row["rollout/canary/all"] for row in rows}) > 1  # drawn anew each time
    plain, same = run(tmp_path / "plain")
    assert same == weights
    assert [row["rollout/score"] for row in plain] == [row["rollout/score"] for row in rows]


def test_what_they_read_is_an_input_of_the_stage() -> None:
    canary = {"prompts": "asked.jsonl", "reward": "refuses.yaml"}
    read = stage_inputs(parse({"stages": {"rl": stage(canaries=[canary])}}, "r").stages["rl"])
    assert ("guard.canaries[0].prompts", "asked.jsonl") in read
    assert ("guard.canaries[0].reward", "refuses.yaml") in read


def test_two_of_one_name_are_refused() -> None:
    two = [{"prompts": DataRef(path="a"), "reward": "b"}, {"prompts": DataRef(path="c"), "reward": "d"}]
    with pytest.raises(ConfigError, match="canaries are named canary, canary; give each a `name`"):
        check_guard(GuardConfig.model_validate({"canaries": two}), PolicyConfig(kl_in="reward"))
