"""What PPO's value function stands on: a model of its own, an adapter of its own, or the policy's own states."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import small
import torch
from safetensors import safe_open

import kilter
from kilter.cli.main import main
from kilter.config import PolicyConfig
from kilter.errors import ConfigError
from kilter.models.load import load_model, load_tokenizer
from kilter.rundir import read_jsonl
from kilter.stages.training import processor_multiplies_in_bfloat16
from kilter.world import MODEL_PATH

PPO = {**small.RL, "model": "kilter.world:MODEL_PATH", "reward": "kilter.world:true_reward", "rollouts": 2}


def stage(value_from: str, rank: int) -> dict[str, Any]:
    kept = {key: value for key, value in PPO.items() if key not in ("audit", "snapshots")}
    return {**kept, "lora": {"rank": rank}, "policy": {"value_from": value_from}}


@pytest.mark.parametrize("rank", [0, 4])
@pytest.mark.parametrize("value_from", ["policy", "shared"])
def test_the_value_has_weights_of_its_own_or_the_policys(value_from: str, rank: int, tmp_path: Path) -> None:
    run = kilter.align({"threads": 1, "stages": {"ppo": stage(value_from, rank)}}, out=tmp_path / "run")
    folder = run.path / "stages/01-ppo"
    rows = read_jsonl(folder / "metrics.jsonl")
    assert len(rows) == 8 and all(row["loss/value"] > 0 for row in rows)
    (weights,) = folder.glob(f"checkpoints/step-{len(rows):06}/weights.safetensors")
    with safe_open(weights, "pt") as file:
        names = list(file.keys())
    assert "heads.value.weight" in names
    apart = [
        name for name in names if name.startswith("models.value.") or ".value." in name.removeprefix("heads.value")
    ]
    assert bool(apart) == (value_from == "policy")


@pytest.mark.skipif(not processor_multiplies_in_bfloat16(), reason="computes in float32 on a float32 base here")
def test_on_a_base_in_bfloat16_a_run_learns_the_bits_of_one_in_float32(tmp_path: Path) -> None:
    """Rollouts, value and policy: what a float32 base is rounded to in every step, it is here from the start."""
    finer, weights, rewards = tmp_path / "finer", {}, {}
    model = load_model(MODEL_PATH)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.001)  # the world's own are numbers that bfloat16 has
    model.save_pretrained(finer)
    load_tokenizer(MODEL_PATH).save_pretrained(finer)
    for base in ("float32", "bfloat16"):
        held = {**stage("policy", 4), "model": str(finer), "precision": {"compute": "bfloat16", "base": base}}
        run = kilter.align({"threads": 1, "stages": {"ppo": held}}, out=tmp_path / base)
        folder = run.path / "stages/01-ppo"
        (file,) = folder.glob("checkpoints/step-000008/weights.safetensors")
        weights[base] = file.read_bytes()
        rewards[base] = [row.get("reward/mean") for row in read_jsonl(folder / "metrics.jsonl")]
        about = json.loads((folder / "result/kilter.json").read_text())
        assert about.get("base", "float32") == base and (folder / "result/adapter").is_dir()
    assert weights["float32"] == weights["bfloat16"] and rewards["float32"] == rewards["bfloat16"]


def test_a_critic_on_the_policys_weights_cannot_learn_first() -> None:
    with pytest.raises(ConfigError, match="critic_warmup is 2 and value_from shared"):
        kilter.align(
            {"stages": {"ppo": {**stage("shared", 4), "policy": {"value_from": "shared", "critic_warmup": 2}}}}
        )
    assert PolicyConfig(value_from="policy", critic_warmup=2).critic_warmup == 2


@pytest.mark.parametrize(
    ("value_from", "rank", "said"),
    [
        ("shared", 4, "one model: policy, reference and value on one: "),
        ("policy", 4, "one model: policy, reference and value on one: "),
        ("shared", 0, "two models: policy and value on one, reference: "),
        ("policy", 0, "three models: policy, reference, value: "),
    ],
)
def test_a_dry_run_says_what_it_stands_on(
    value_from: str, rank: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["rl", "--model", PPO["model"], "--reward", PPO["reward"], "--prompts", "kilter.world:prompts"]
    words += ["--lora.rank", str(rank), "--policy.value-from", value_from, "--out", str(tmp_path / "dry"), "--dry-run"]
    assert main(words) == 0
    assert said in " ".join(capsys.readouterr().out.split())
