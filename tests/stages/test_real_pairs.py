"""The stages on real pairs: the committed recipe with its real model, and a tiny Qwen3 with LoRA, nothing special."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
import yaml

import kilter
from kilter.models.load import load_tokenizer

RECIPE = Path(__file__).parents[2] / "recipes" / "hh-stories.yaml"
LORA = {"rank": 4, "alpha": 8}


def shortened(shared_data: Path, shared_models: Path, **stage_changes: Any) -> dict[str, Any]:
    """The committed recipe with its paths made absolute and a fraction of its data; changes go into every stage."""
    recipe: dict[str, Any] = yaml.safe_load(RECIPE.read_text().replace("../shared", str(shared_data.parent)))
    assert str(shared_models) in recipe["stages"]["sft"]["model"]
    for stage in recipe["stages"].values():
        data = stage.get("data", stage.get("prompts"))
        data["limit"] = 700 if stage["stage"] == "reward" else 48
        stage["optim"] |= {"max_tokens": 256}
        stage |= stage_changes
    recipe["stages"]["reward"]["audit"] = {"prompts": 40}
    for name in ("ppo", "grpo"):
        recipe["stages"][name] |= {"rollouts": 2, "prompts_per_rollout": 8, "sampling": {"max_new_tokens": 16}}
    return recipe | {"threads": 1}


def check(run: Path, recipe: dict[str, Any]) -> None:
    """Every stage has ended, its check has passed, and its policy answers in plain transformers."""
    summary = json.loads((run / "summary.json").read_text())
    accuracy = summary["reward_model"]["accuracy_on_labels"]
    assert 0 <= accuracy["low"] < accuracy["mean"] < accuracy["high"] <= 1
    verdicts = {row["name"]: row["verdict"] for row in summary["checks"]}
    assert verdicts.pop("audit of the reward model, reward") == "failed"  # so small a one, of 700 pairs
    assert set(verdicts.values()) == {"passed"} and len(verdicts) == 5
    for at, name in enumerate(recipe["stages"], 1):
        folder = run / "stages" / f"{at:02d}-{name}"
        assert json.loads((folder / "done.json").read_text())["steps"] > 0
        if name != "reward":
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder / "result")
            model = transformers.AutoModelForCausalLM.from_pretrained(folder / "result").eval()
            ids = tokenizer("Hello", return_tensors="pt").input_ids
            answer = model.generate(ids, max_new_tokens=4, do_sample=False)
            assert answer.shape[1] > ids.shape[1]


def test_the_committed_recipe_with_the_real_model(shared_data: Path, shared_models: Path, tmp_path: Path) -> None:
    recipe = shortened(shared_data, shared_models)
    kilter.align(recipe, out=tmp_path / "run")
    check(tmp_path / "run", recipe)


def test_a_tiny_qwen3_with_lora(shared_data: Path, shared_models: Path, tmp_path: Path) -> None:
    source = shared_models / "stories260K" / "hf"
    tokenizer = load_tokenizer(str(source))
    config = transformers.Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.manual_seed(0)
    transformers.Qwen3ForCausalLM(config).save_pretrained(tmp_path / "qwen3")
    tokenizer.save_pretrained(tmp_path / "qwen3")
    recipe = shortened(shared_data, shared_models, lora=LORA)
    recipe["stages"]["sft"]["model"] = str(tmp_path / "qwen3")
    kilter.align(recipe, out=tmp_path / "run")
    check(tmp_path / "run", recipe)
